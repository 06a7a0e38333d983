"""llama/model.py: equal to a naive second writing of LLaMA 2, causal to the bit, right in every dtype."""
import subprocess
import sys

import pytest
import torch

from llama import ModelArgs, Transformer
from llama.model import RMSNorm, rope_table, rotate

from .helpers import ROOT, tiny
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
    tokens, kept, grads = ids(12, B=2), [], []
    for checkpointing in (False, True):
        model, saved = tiny(n_layers=8).double(), []
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = model(tokens).square().sum()
        loss.backward()
        kept.append(sum(saved))
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert kept[1] < kept[0] / 4


def test_sizes_of_the_published_models():
    assert ModelArgs().hidden_dim == 11008
    assert ModelArgs(dim=5120, n_heads=40).hidden_dim == 13824
    assert ModelArgs(dim=8192, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3).hidden_dim == 28672
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(ModelArgs()).parameters()) == 6_738_415_616


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_norm_survives_fp16_and_keeps_the_stream_in_its_dtype():
    x = torch.full((1, 8), 300.0, dtype=torch.float16)                   # 300^2 is past fp16's largest number
    assert torch.allclose(RMSNorm(8, 1e-5).half()(x), torch.ones(1, 8).half())
    assert RMSNorm(8, 1e-5)(x.bfloat16()).dtype == torch.bfloat16        # an fp32 weight must not widen the stream


def test_positions_stay_exact_when_the_model_is_cast(monkeypatch):
    """A table cast to bf16 cannot tell position 256 from 257; ours is made in fp32 at each forward."""
    model, made = tiny(dim=8, n_heads=1, n_layers=1).bfloat16(), []
    monkeypatch.setattr("llama.model.rope_table", lambda *args: made.append(rope_table(*args)) or made[-1])
    model(ids(300))
    assert made[0].dtype == torch.float32
    assert torch.equal(made[0], rope_table(300, 8, 10000.0, "cpu", torch.float32))
    assert not any("rope" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_compiled_blocks_turn_pairs_by_the_same_angles(monkeypatch, dtype, off):
    """In real numbers, which a compiler fuses, as in complex ones, backward too."""
    rope = rope_table(9, 6, 10000.0, "cpu", torch.promote_types(dtype, torch.float32))
    x, g = (torch.randn(2, 9, 3, 6, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    found = []
    for compiling in False, True:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        monkeypatch.setattr(torch, "view_as_complex", torch.view_as_complex if not compiling else None)
        y = rotate(x.requires_grad_(), rope)
        assert y.dtype == dtype and y.shape == x.shape
        found.append((y, *torch.autograd.grad(y, x, g)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=off, atol=off)


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


def test_model_py_stands_alone(tmp_path):
    """The one file, copied elsewhere, runs with torch and nothing of ours."""
    (tmp_path / "model.py").write_text((ROOT / "llama/model.py").read_text())
    code = ("import sys, model, torch; model.Transformer(model.ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=9))"
            "(torch.zeros(1, 2, dtype=torch.long)); assert not {'llama', 'lora', 'sentencepiece'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
