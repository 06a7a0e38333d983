"""llama/layout.py: packed rows give the padded loss and gradients, and no example sees another."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from finetune.batches import DataCollatorForSupervisedDataset, pack
from finetune.dataset import IGNORE
from finetune.loss import answer_loss
from llama import layout, one_call
from llama.layout import Piece, arrange

from .helpers import adapt, random_ids, tiny

PREAMBLE = list(range(10, 30))
BRANCHES = ([31, *range(40, 60)], [32, *range(60, 90)])


def drawn(n=7, seed=0):
    """Return rows of random lengths that begin alike and branch in two; the last two are equal.

    Answers have 1 to 12 tokens, some are eos alone.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n - 1):
        prompt = [1, *PREAMBLE, *BRANCHES[i % 2], *random_ids(draw, 1, 40)]
        answer = random_ids(draw, 1, 12)
        answer = [2] if i % 3 == 1 else [*answer, 2]
        rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    return [*rows, rows[-1]]


def gradients(batch, checkpointing=False, dtype=torch.float32):
    """Return (loss, gradient of all that is trained, answers) of a GQA model with adapters."""
    model = adapt(tiny(n_kv_heads=2).to(dtype), r=4, targets="all")
    model.checkpointing = checkpointing
    loss, n_answer = answer_loss(model, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return loss.item(), gradient, n_answer


PLAIN_AND_SHARED = pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
BOTH_KERNELS = pytest.mark.parametrize("short", [256, 0], ids=["products", "kernel"])


def test_arranged_by_hand(monkeypatch):
    """Three of four begin with 1 5 6, and two of these go on alike."""
    monkeypatch.setattr(layout, "MIN_SHARED", 2)
    rows = [[1, 5, 6, 8, 9, 3], [1, 4, 2], [1, 5, 6, 8, 9, 4], [1, 5, 6, 7]]
    assert arrange(rows, [5, 2, 5, 3]) == (
        [Piece(0, 0, 3, ()), Piece(0, 3, 5, (0,)), Piece(0, 5, 6, (0, 1)), Piece(2, 5, 6, (0, 1)),
         Piece(3, 3, 4, (0,)), Piece(1, 0, 3, ())],
        [2, 5, 3, 4])
    whole = [Piece(i, 0, len(row), ()) for i, row in enumerate(rows)]
    assert arrange(rows, [0] * 4) == (whole, [0, 1, 2, 3])


@PLAIN_AND_SHARED
@BOTH_KERNELS
@pytest.mark.parametrize("dtype, loss_off, gradient_off", [
    (torch.float32, 1e-5, 1e-4), (torch.float64, 1e-13, 1e-12)])
def test_loss_and_gradients_are_the_padded_ones(monkeypatch, share_prefix, short, dtype, loss_off,
                                                gradient_off):
    monkeypatch.setattr(layout, "SHORT_CONTEXT", short)
    for rows in (drawn(), drawn(2), drawn(3)[:1], drawn(3)[:1] * 4, drawn(9, seed=1)):
        padded = DataCollatorForSupervisedDataset(0)(rows)
        loss, gradient, n_answer = gradients(padded, dtype=dtype)
        batch = pack(rows, share_prefix)
        for checkpointing in (False, True):
            packed_loss, packed_gradient, count = gradients(batch, checkpointing, dtype)
            assert packed_loss == pytest.approx(loss, rel=loss_off)
            assert count == n_answer
            assert (packed_gradient - gradient).norm() <= gradient_off * gradient.norm()


@PLAIN_AND_SHARED
def test_no_example_sees_another(share_prefix):
    """Tokens of one example replaced: the logits of the others stay to the last bit."""
    rows = drawn(4)
    tokens, labels = rows[1]
    changed_rows = [rows[0], (tokens[:50] + [7, 8, 9] + tokens[53:], labels), *rows[2:]]
    model = tiny(n_kv_heads=1)
    batch = pack(rows, share_prefix)
    changed_batch = pack(changed_rows, share_prefix)
    assert batch.layout.segments == changed_batch.layout.segments
    logits = model(batch.tokens, layout=batch.layout)[0]
    changed = model(changed_batch.tokens, layout=changed_batch.layout)[0]
    differ = (logits != changed).any(-1).nonzero().flatten()
    begin = (batch.tokens != changed_batch.tokens)[0].nonzero()[0].item()
    assert differ.min() == begin
    assert differ.max() == begin + len(tokens) - 50 - 1


@BOTH_KERNELS
def test_models_of_several_kinds_read_one_layout(monkeypatch, short):
    """Each makes masks of its own.

    A teacher in bf16 without gradients, a student in fp32, other numbers of heads, another device.
    """
    monkeypatch.setattr(layout, "SHORT_CONTEXT", short)
    batch = pack(drawn(3), share_prefix=True)
    fresh = pack(drawn(3), share_prefix=True)
    kinds = [(torch.bfloat16, 4), (torch.float32, 4), (torch.float32, 2), (torch.float64, 1)]
    for dtype, heads in kinds:
        model = tiny(n_kv_heads=heads).to(dtype)
        fresh.layout.masks = {}
        with torch.set_grad_enabled(dtype != torch.bfloat16):
            logits = model(batch.tokens, layout=batch.layout)
            alone = model(batch.tokens, layout=fresh.layout)
        assert logits.dtype == dtype
        assert torch.equal(logits, alone)
    elsewhere = batch.to(torch.device("meta"))
    assert tiny().to("meta")(elsewhere.tokens, layout=elsewhere.layout).is_meta
    assert all(mask is None or mask.is_meta for mask in elsewhere.layout.masks.values())


def plain_varlen(q, k, v, query_bounds, key_bounds, most_queries, most_keys, *, window_size,
                 enable_gqa=False):  # fmt: skip
    """Compute what varlen_attn does, segment by segment; the mask is aligned at the lower right."""
    assert window_size == (-1, 0)
    outputs = []
    for i in range(len(query_bounds) - 1):
        queries = q[query_bounds[i]:query_bounds[i + 1]].transpose(0, 1)
        keys = k[key_bounds[i]:key_bounds[i + 1]].transpose(0, 1)
        values = v[key_bounds[i]:key_bounds[i + 1]].transpose(0, 1)
        n_queries = queries.shape[1]
        n_keys = keys.shape[1]
        assert n_queries <= most_queries and n_keys <= most_keys
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
        y = F.scaled_dot_product_attention(queries, keys, values, seen, enable_gqa=enable_gqa)
        outputs.append(y.transpose(0, 1))
    return torch.cat(outputs)


@PLAIN_AND_SHARED
def test_one_call_for_all_segments_is_the_loop(monkeypatch, share_prefix):
    """In fp64, with a plain reference in the place of CUDA's kernel."""
    for rows in (drawn(), drawn(2), drawn(3)[:1] * 4):
        batch = pack(rows, share_prefix)
        loss, gradient, _ = gradients(batch, dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(layout, "takes_one_call", lambda q, k: True)
            patch.setattr(one_call, "varlen_attn", plain_varlen)
            loss_at_once, gradient_at_once, _ = gradients(batch, dtype=torch.float64)
        assert loss_at_once == pytest.approx(loss, rel=1e-14)
        assert 0 < (gradient_at_once - gradient).norm() <= 1e-14 * gradient.norm()


@pytest.mark.parametrize("expected, changes", [
    (True, {}),
    (True, {"dtype": torch.float16}),
    (False, {"dtype": torch.float32}),
    (False, {"is_cuda": False}),
    (False, {"shape": (1, 9, 4, 12)}),               # flash wants heads in steps of 8 numbers
    (True, {"shape": (1, 9, 8, 64)}),
    (False, {"shape": (1, 9, 8, 64), "options": ("window_size",)}),      # GQA in torch 2.11
    (True, {"options": ("window_size",)}),
    (False, {"options": ()}),
    (False, {"capability": (7, 5)}),
    (True, {"shape": (1, 9, 4, 256)}),
    (False, {"shape": (1, 9, 4, 264)}),              # beyond FlashAttention 2
])
def test_who_takes_one_call(monkeypatch, expected, changes):
    settings = {"is_cuda": True, "dtype": torch.bfloat16, "shape": (1, 9, 4, 64),
                "options": ("window_size", "enable_gqa"), "capability": (8, 0), **changes}
    monkeypatch.setattr(one_call, "OPTIONS", settings["options"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: settings["capability"])
    q = SimpleNamespace(**settings, device="cuda")
    assert layout.takes_one_call(q, SimpleNamespace(shape=(1, 9, 4, 64))) == expected


@pytest.mark.gpu
@PLAIN_AND_SHARED
def test_one_call_on_a_gpu_is_the_loop(monkeypatch, share_prefix):
    """In bf16, as far as its rounding allows."""
    packed = pack(drawn(), share_prefix).layout
    parts = [torch.randn(1, len(packed.positions), 4, 64, dtype=torch.bfloat16) for _ in range(3)]
    expected = packed.attend(*parts)
    at_once = packed.to("cuda").attend(*[part.cuda() for part in parts]).cpu()
    assert layout.takes_one_call(parts[0].cuda(), parts[1].cuda())
    assert (at_once - expected).abs().max() < 0.02


def test_a_row_may_be_longer_than_an_example_may():
    model = tiny(max_seq_len=64)
    batch = pack([(list(range(3, 60)), [IGNORE] * 50 + [5] * 7)] * 4)
    assert model(batch.tokens, layout=batch.layout).shape == (1, 228, 400)
    batch = pack([(list(range(3, 68)), [IGNORE] * 60 + [5] * 5)])
    with pytest.raises(ValueError, match="a row of 65 tokens is longer than max_seq_len 64"):
        model(batch.tokens, layout=batch.layout)


@pytest.mark.slow
def test_compiled_blocks_take_rows_of_any_length_and_give_the_same(run, monkeypatch):
    """Two graphs per kind of pass, made while the first rows come; no later length adds one."""
    flags = ["--dropout", "0", "--batch-size", "1", "--accumulation-steps", "1"]
    plain = run("plain", *flags)
    compiled = []
    begin_step = train.begin_step

    def counting(*args):
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return begin_step(*args)

    monkeypatch.setattr(train, "begin_step", counting)
    torch._dynamo.utils.counters.clear()
    rows = run("compiled", *flags, "--compile")
    assert 0 < compiled[2] == compiled[-1] <= 12
    assert len(compiled) == 36
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([row["loss"] for row in plain], rel=1e-4)
