"""llama/model.py: equal to a naive second writing of LLaMA 2, causal to the bit."""

import pytest
import torch

from llama import ModelArgs, Transformer
from llama.model import rope_table, rotate

from .helpers import tiny
from .memory import saved_bytes
from .reference import naive_logits

SHAPES = {
    "MHA": dict(),
    "GQA": dict(n_kv_heads=2),
    "MQA": dict(n_kv_heads=1),
    "odd sizes": dict(dim=36, n_heads=6, n_kv_heads=3, vocab_size=53, multiple_of=7, n_layers=3),
    "wide SwiGLU": dict(ffn_dim_multiplier=1.3, multiple_of=8),
    "other theta and eps": dict(rope_theta=500.0, norm_eps=1e-2),
    "tied": dict(tie_embeddings=True),
}


def ids(T, vocab=50, B=1):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_the_naive_reference(shape, T):
    model, tokens = tiny(**shape), ids(T)
    expected = naive_logits(model.state_dict(), model.args, tokens[0].tolist())
    assert (model(tokens)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_logits_equal_the_naive_reference_far_from_the_start():
    model, tokens = tiny(n_layers=1, n_kv_heads=2), ids(160)
    expected = naive_logits(model.state_dict(), model.args, tokens[0].tolist())
    assert (model(tokens)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_fp64_passes_through_unrounded():
    model, tokens = tiny().double(), ids(20)
    expected = naive_logits(model.state_dict(), model.args, tokens[0].tolist())
    assert (model(tokens)[0] - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("shape", [SHAPES["MHA"], SHAPES["GQA"]])
def test_a_token_changes_nothing_before_it(shape):
    model, tokens = tiny(**shape), ids(40, B=2)
    before = model(tokens)
    for t in (0, 17, 39):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t], after[:, t])


def test_padding_on_the_right_changes_nothing():
    model, short, long = tiny(), ids(9), ids(30)
    batch = torch.cat([torch.cat([short, torch.full((1, 21), 2)], 1), long])
    logits = model(batch)
    assert torch.allclose(logits[0, :9], model(short)[0], atol=1e-5)
    assert torch.allclose(logits[1], model(long)[0], atol=1e-5)


def test_rows_selects_from_all_logits():
    model, tokens = tiny(), ids(12, B=3)
    rows = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.allclose(model(tokens, rows=rows), model(tokens)[rows], atol=1e-6)
    assert model(tokens, rows=torch.zeros_like(rows)).shape == (0, 400)


def test_checkpointing_changes_no_gradient_and_frees_memory():
    tokens = ids(12, B=2)
    kept = []
    gradients = []
    for checkpointing in (False, True):
        model = tiny(n_layers=8).double()
        model.checkpointing = checkpointing
        loss, n_bytes = saved_bytes(model, lambda model=model: model(tokens).square().sum())
        loss.backward()
        kept.append(n_bytes)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 4


def test_sizes_of_the_published_models():
    assert ModelArgs().hidden_dim == 11008
    assert ModelArgs(dim=5120, n_heads=40).hidden_dim == 13824
    args = ModelArgs(dim=8192, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3)
    assert args.hidden_dim == 28672
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(ModelArgs()).parameters()) == 6_738_415_616


@pytest.mark.parametrize("dtype, off", [
    (torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_compiled_blocks_turn_pairs_by_the_same_angles(monkeypatch, dtype, off):
    """In real numbers, which a compiler fuses, as in complex ones, backward too."""
    rope = rope_table(9, 6, 10000.0, "cpu", torch.promote_types(dtype, torch.float32))
    x, g = torch.randn(2, 2, 9, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    y = rotate(x, rope)
    gradient, = torch.autograd.grad(y, x, g)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "view_as_complex", None)
    compiled = rotate(x, rope)
    assert compiled.dtype == dtype and compiled.shape == x.shape
    torch.testing.assert_close(compiled, y, rtol=off, atol=off)
    other, = torch.autograd.grad(compiled, x, g)
    torch.testing.assert_close(other, gradient, rtol=off, atol=off)


def test_random_weights_start_at_uniform_guessing():
    torch.manual_seed(0)
    model = Transformer(ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=400, multiple_of=16))
    model.init_weights()
    loss = torch.nn.functional.cross_entropy(model(ids(50))[0], ids(50)[0])
    assert abs(loss.item() - torch.tensor(400.0).log().item()) < 0.1


@pytest.mark.parametrize("wrong, message", [
    (dict(dim=30), "dim 30 must be n_heads 4 times an even head width"),
    (dict(dim=36), "dim 36 must be n_heads 4 times an even head width"),
    (dict(n_kv_heads=3), "must be a multiple of n_kv_heads 3"),
    (dict(n_layers=0), "n_layers is 0, must be 1 to 512"),
    (dict(dim=10 ** 12), "dim is 1000000000000, must be 1 to"),
    (dict(norm_eps=0.0), "norm_eps is 0.0, must be above 0 and at most 1"),
    (dict(rope_theta=float("nan")), "rope_theta is nan"),
    (dict(ffn_dim_multiplier=float("inf")), "ffn_dim_multiplier is inf"),
])
def test_sizes_that_do_not_fit_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelArgs(**{**dict(dim=32, n_layers=2, n_heads=4, vocab_size=50), **wrong})


def test_a_row_longer_than_max_seq_len_is_refused():
    with pytest.raises(ValueError, match="a row of 9 tokens is longer than max_seq_len 8"):
        tiny(max_seq_len=8)(ids(9))


