"""llama/packing.py: rows without padding give the padded loss and gradients, and no example sees another."""
import json

import pytest
import torch

import train
from llama import layout as packed
from finetune.batches import prefetch, DataCollatorForSupervisedDataset, fill, plan_epoch
from finetune.loss import answer_loss
from finetune.batches import pack
from lora import LoRAConfig, add_lora

from .helpers import epoch_windows, tiny

_ = -100
PREAMBLE, BRANCHES = list(range(10, 30)), ([31, *range(40, 60)], [32, *range(60, 90)])


def drawn(n=7, seed=0):
    """Rows of random lengths that begin alike and branch in two, with answers of 1 to 12 tokens; the last two are the same."""
    draw = torch.Generator().manual_seed(seed)

    def some(low, high):
        return torch.randint(3, 390, (int(torch.randint(low, high, (), generator=draw)),), generator=draw).tolist()
    rows = []
    for i in range(n - 1):
        prompt, answer = [1, *PREAMBLE, *BRANCHES[i % 2], *some(1, 40)], [some(1, 12), []][i % 3 == 1] + [2]
        rows.append((prompt + answer, [_] * len(prompt) + answer))
    return [*rows, rows[-1]]


def gradients(batch, checkpointing=False, **settings):
    """(loss, gradient of everything that is trained) of a small GQA model with adapters at every layer."""
    model = tiny(n_kv_heads=2).to(settings.pop("dtype", torch.float32))
    add_lora(model, LoRAConfig(r=4, dropout=0, targets="all"))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.checkpointing = checkpointing
    loss, n = answer_loss(model, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), n


def test_written_out_by_hand():
    rows = [([1, 5, 7, 2], [_, _, 7, 2]), ([1, 6, 2], [_, 6, 2])]
    batch = pack(rows)
    assert batch.tokens.tolist() == [[1, 5, 7, 2, 1, 6, 2]] and batch.labels.tolist() == [[_, _, 7, 2, _, 6, 2]]
    assert batch.n_answer == 4 and batch.layout.segments == [(4, ()), (3, ())] and batch.layout.longest == 4
    assert batch.layout.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    batch = pack([([1, 5], [_, 5]), ([7, 2], [7, 2])])                   # nothing before 7 predicts it, least of all 5
    assert batch.labels.tolist() == [[_, 5, _, 2]] and batch.n_answer == 2


def test_a_shared_beginning_written_out_by_hand(monkeypatch):
    """Two of three begin with 1 5 6; the second answers at once, so 6, which predicts its answer, is its own."""
    monkeypatch.setattr(packed, "LEAST", 2)
    batch = pack([([1, 5, 6, 8, 9, 2], [_, _, _, _, 9, 2]), ([1, 4, 2], [_, _, 2]), ([1, 5, 6, 7, 2], [_, _, _, 7, 2])], True)
    assert batch.tokens.tolist() == [[1, 5, 6, 8, 9, 2, 6, 7, 2, 1, 4, 2]]
    assert batch.labels.tolist() == [[_, _, _, _, 9, 2, _, 7, 2, _, _, 2]]
    assert batch.layout.segments == [(2, ()), (4, (0,)), (3, (0,)), (3, ())] and batch.layout.longest == 6
    assert batch.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 0, 1, 2]
    assert batch.n_answer == 2 + 2 + 1


@pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("short", [256, 0], ids=["products", "kernel"])
@pytest.mark.parametrize("dtype, loss_off, gradient_off", [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-13, 1e-12)])
def test_loss_and_gradients_are_the_padded_ones(monkeypatch, share_prefix, short, dtype, loss_off, gradient_off):
    monkeypatch.setattr(packed, "SHORT", short)
    for rows in drawn(), drawn(2), drawn(3)[:1], drawn(3)[:1] * 4, drawn(9, seed=1):
        batch = pack(rows, share_prefix)
        loss, gradient, n = gradients(DataCollatorForSupervisedDataset(0)(rows), dtype=dtype)
        for checkpointing in False, True:
            ours, own, count = gradients(batch, checkpointing, dtype=dtype)
            assert ours == pytest.approx(loss, rel=loss_off) and count == n
            assert (own - gradient).norm() <= gradient_off * gradient.norm()


def test_what_stands_once_is_not_computed_twice():
    rows = drawn(9)
    plain, shared = pack(rows), pack(rows, share_prefix=True)
    assert plain.tokens.numel() == sum(len(tokens) for tokens, _ in rows)
    once = 1 + len(PREAMBLE) + sum(map(len, BRANCHES))
    assert plain.tokens.numel() - shared.tokens.numel() >= sum(1 + len(PREAMBLE) + len(BRANCHES[i % 2]) for i in (*range(8), 7)) - once
    assert shared.n_answer == plain.n_answer == (shared.labels != _).sum()


@pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
def test_no_example_sees_another(share_prefix):
    """Tokens of one example replaced: the logits of the others stay to the last bit."""
    rows = drawn(4)
    other = [rows[0], (rows[1][0][:50] + [7, 8, 9] + rows[1][0][53:], rows[1][1]), *rows[2:]]
    model = tiny(n_kv_heads=1)
    one, two = pack(rows, share_prefix), pack(other, share_prefix)
    assert one.layout.segments == two.layout.segments
    logits, changed = (model(batch.tokens, layout=batch.layout)[0] for batch in (one, two))
    apart = (logits != changed).any(-1).nonzero().flatten()
    begin = (one.tokens != two.tokens)[0].nonzero()[0].item()
    end = begin + len(rows[1][0]) - 50
    assert apart.min() == begin and apart.max() == end - 1


@pytest.mark.parametrize("short", [256, 0], ids=["products", "kernel"])
def test_models_of_several_kinds_read_one_layout(monkeypatch, short):
    """A teacher in bf16 without gradients, a student in fp32, other numbers of heads, another device: each its own masks."""
    monkeypatch.setattr(packed, "SHORT", short)
    batch, apart = (pack(drawn(3), share_prefix=True) for each in range(2))
    for dtype, heads in (torch.bfloat16, 4), (torch.float32, 4), (torch.float32, 2), (torch.float64, 1):
        model, apart.layout.masks = tiny(n_kv_heads=heads).to(dtype), {}
        with torch.set_grad_enabled(dtype != torch.bfloat16):
            logits, alone = (model(batch.tokens, layout=layout) for layout in (batch.layout, apart.layout))
        assert logits.dtype == dtype and torch.equal(logits, alone)
    elsewhere = batch.to(torch.device("meta"))
    assert tiny().to("meta")(elsewhere.tokens, layout=elsewhere.layout).is_meta
    assert all(mask is None or mask.is_meta for mask in elsewhere.layout.masks.values())


def test_a_row_may_be_longer_than_an_example_may():
    model, rows = tiny(max_seq_len=64), [(list(range(3, 60)), [_] * 50 + [5] * 7)] * 4
    batch = pack(rows)
    assert model(batch.tokens, layout=batch.layout).shape == (1, 228, 400)
    batch = pack([(list(range(3, 68)), [_] * 60 + [5] * 5)])
    with pytest.raises(ValueError, match="a row of 65 tokens is longer than max_seq_len 64"):
        model(batch.tokens, layout=batch.layout)


def test_micro_batches_by_tokens_are_full_and_hold_every_example_once():
    lengths = torch.randint(20, 300, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[5] = 5000                                                    # longer than the room: alone
    steps = plan_epoch(lengths, 4, 3, seed=0, epoch=0, world_size=2, tokens_per_batch=2048)
    batches = [batch for step in steps for rank in step for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(3000))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(size <= 2048 for size, batch in zip(sizes, batches) if batch != [5]) and [5] in batches
    assert sum(min(size, 2048) for size in sizes) / len(sizes) > 0.98 * 2048
    assert all([len(rank) for rank in step] == [3, 3] for step in steps[:-1])
    assert steps == plan_epoch(lengths, 9, 3, seed=0, epoch=0, world_size=2, tokens_per_batch=2048)      # --batch-size plays no part
    assert steps != plan_epoch(lengths, 4, 3, seed=0, epoch=1, world_size=2, tokens_per_batch=2048)


def test_filled_by_hand():
    """Room for 10; the longest first, each into the first group where it fits; groups by who came first."""
    lengths = {0: 4, 1: 7, 2: 3, 3: 6, 4: 12}
    assert fill([0, 1, 2, 3, 4], lengths, 10) == [[0, 3], [1, 2], [4]]
    assert fill([4, 3, 2, 1, 0], lengths, 10) == [[4], [3, 0], [2, 1]]
    assert fill([0, 1, 2, 3], lengths, 10, at_once=2) == [[0], [1], [2, 3]]


def test_a_rank_without_a_micro_batch_gets_a_masked_one():
    rows = [([1, 5, 2], [_, 5, 2])] * 3
    first, second = (epoch_windows(rows, pack, 1, 2, rank=rank, world_size=2, tokens_per_batch=3) for rank in (0, 1))
    assert [window.n_answer for window in first] == [window.n_answer for window in second] == [6]
    assert [batch.n_answer for batch in first[0].batches] == [2, 2] and [batch.n_answer for batch in second[0].batches] == [2]
    first, second = (epoch_windows(rows[:1], pack, 1, 2, rank=rank, world_size=2, tokens_per_batch=3) for rank in (0, 1))
    assert second[0].batches[0].n_answer == 0 and (second[0].batches[0].labels == _).all()


def test_made_ahead_is_the_same_and_errors_arrive():
    assert list(prefetch(range(5))) == list(range(5)) and list(prefetch([])) == []

    def broken():
        yield 1
        raise ValueError("a broken row")
    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="a broken row"):
        next(items)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
def test_nothing_waits_for_the_gpu_within_a_micro_batch(share_prefix):
    model = tiny(n_kv_heads=2).cuda()
    add_lora(model, LoRAConfig(r=4, dropout=0))
    batch = pack(drawn(), share_prefix)
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer_loss(model, batch.to(torch.device("cuda")))[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_compiled_blocks_take_rows_of_any_length_and_give_the_same(base, data, tmp_path, monkeypatch):
    """Two graphs a kind of pass, made while the first rows come; no later length makes another."""
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--lr", "1e-2", "--dropout", "0", "--batch-size", "1",
             "--accumulation-steps", "1"]
    train.main([*flags, "--out", "plain"])
    compiled, honest = [], train.begin_step

    def counting(*args):
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return honest(*args)
    monkeypatch.setattr(train, "begin_step", counting)
    torch._dynamo.utils.counters.clear()
    train.main([*flags, "--compile", "--out", "compiled"])
    assert 0 < compiled[2] == compiled[-1] <= 12 and len(compiled) == 36
    plain, ours = (json.loads(f"[{','.join((tmp_path / out / 'metrics.jsonl').read_text().splitlines())}]") for out in ("plain", "compiled"))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
