"""finetune/batches.py: padding and packing by hand, the plan of an epoch, the next batch ahead."""
from contextlib import nullcontext

import pytest
import torch

from finetune.batches import (DataCollatorForSupervisedDataset, fill, pack, plan_epoch, prefetch,
                              to_device)
from finetune.dataset import IGNORE
from finetune.loss import answer_loss
from llama import layout
from lora import LoRAConfig, add_lora

from .helpers import epoch_windows, tiny
from .test_layout import PLAIN_AND_SHARED, drawn

_ = IGNORE


# --- padding, and the order of examples


def test_collator_by_hand():
    """The row's own eos is a target, padding with the same id is none."""
    rows = [([1, 10, 11, 20, 2], [_, _, _, 20, 2]), ([1, 12, 2], [_, _, 2])]
    batch = DataCollatorForSupervisedDataset(pad_id=2)(rows)
    assert batch.tokens.tolist() == [[1, 10, 11, 20, 2], [1, 12, 2, 2, 2]]
    assert batch.labels.tolist() == [[_, _, _, 20, 2], [_, _, 2, _, _]]
    assert batch.n_answer == 3
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def dealt(batch_size, steps, seed=0, epoch=0, n=23, rank=0, world_size=1):
    """For each step the examples of each micro-batch, and the step's counts."""
    rows = [([1, i, 2], [_, i, 2]) for i in range(3, 3 + n)]
    made = epoch_windows(rows, DataCollatorForSupervisedDataset(0), batch_size, steps, seed, epoch,
                         rank, world_size)
    deals = []
    for window in made:
        batches = []
        for batch in window.batches:
            examples = zip(batch.tokens[:, 1].tolist(), batch.labels[:, 1], strict=True)
            batches.append([i for i, label in examples if label != _])
        deals.append((batches, window.n_tokens, window.n_answer))
    return deals


def flat(*args, **settings):
    """Return the examples of each step."""
    return [sum(batches, []) for batches, *_ in dealt(*args, **settings)]


def test_every_example_once_an_epoch_and_the_last_window_is_smaller():
    steps = dealt(batch_size=3, steps=4)
    assert [list(map(len, batches)) for batches, *_ in steps] == [[3, 3, 3, 3], [3, 3, 3, 2]]
    assert [counts for _, *counts in steps] == [[36, 24], [33, 22]]
    assert sorted(sum(flat(3, 4), [])) == list(range(3, 26))


@pytest.mark.parametrize("n", [16, 17, 19, 24, 201])
def test_ranks_share_each_step_without_a_duplicate_and_none_goes_without_a_batch(n):
    first, second = (flat(2, 2, n=n, rank=rank, world_size=2) for rank in (0, 1))
    for one, other, step in zip(first, second, flat(4, 2, n=n), strict=True):
        assert sorted(one + other) == sorted(step)
    for rank in (0, 1):
        steps = dealt(2, 2, n=n, rank=rank, world_size=2)
        assert [counts for _, *counts in steps] == [counts for _, *counts in dealt(4, 2, n=n)]
        assert all(batches for batches, *_ in steps)
    # If one example is left, rank 1 masks its whole batch.
    assert (second[-1] == []) == (n in (17, 201))


# --- packed rows


def test_written_out_by_hand():
    batch = pack([([1, 5, 7, 2], [_, _, 7, 2]), ([1, 6, 2], [_, 6, 2])])
    assert batch.tokens.tolist() == [[1, 5, 7, 2, 1, 6, 2]]
    assert batch.labels.tolist() == [[_, _, 7, 2, _, 6, 2]]
    assert batch.n_answer == 4
    assert batch.layout.segments == [(4, ()), (3, ())]
    assert batch.layout.longest == 4
    assert batch.layout.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    # Nothing before 7 predicts it, least of all 5.
    batch = pack([([1, 5], [_, 5]), ([7, 2], [7, 2])])
    assert batch.labels.tolist() == [[_, 5, _, 2]]
    assert batch.n_answer == 2


def test_a_shared_beginning_written_out_by_hand(monkeypatch):
    """Two of three begin with 1 5 6, and one of these answers right after it.

    The 6 predicts that answer, so it is not shared.
    """
    monkeypatch.setattr(layout, "MIN_SHARED", 2)
    rows = [
        ([1, 5, 6, 8, 9, 2], [_, _, _, _, 9, 2]),
        ([1, 4, 2], [_, _, 2]),
        ([1, 5, 6, 7, 2], [_, _, _, 7, 2]),
    ]
    batch = pack(rows, share_prefix=True)
    assert batch.tokens.tolist() == [[1, 5, 6, 8, 9, 2, 6, 7, 2, 1, 4, 2]]
    assert batch.labels.tolist() == [[_, _, _, _, 9, 2, _, 7, 2, _, _, 2]]
    assert batch.layout.segments == [(2, ()), (4, (0,)), (3, (0,)), (3, ())]
    assert batch.layout.longest == 6
    assert batch.layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 0, 1, 2]
    assert batch.n_answer == 2 + 2 + 1


# --- the plan of an epoch


def test_micro_batches_by_tokens_are_full_and_hold_every_example_once():
    lengths = torch.randint(20, 300, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[5] = 5000                                # longer than a micro-batch: alone in one
    plan = {"accumulation_steps": 3, "seed": 0, "world_size": 2, "tokens_per_batch": 2048}
    steps = plan_epoch(lengths, 4, epoch=0, **plan)
    batches = []
    for step in steps:
        for rank in step:
            batches += rank
    assert sorted(sum(batches, [])) == list(range(3000))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert [5] in batches
    for size, batch in zip(sizes, batches, strict=True):
        assert size <= 2048 or batch == [5]
    assert sum(min(size, 2048) for size in sizes) / len(sizes) > 0.98 * 2048
    for step in steps[:-1]:
        assert [len(rank) for rank in step] == [3, 3]
    assert steps == plan_epoch(lengths, 9, epoch=0, **plan)      # --batch-size plays no part
    assert steps != plan_epoch(lengths, 4, epoch=1, **plan)


def test_filled_by_hand():
    """With a capacity of 10: the longest first, each into the first group where it fits.

    Groups follow the order of their earliest example.
    """
    lengths = {0: 4, 1: 7, 2: 3, 3: 6, 4: 12}
    assert fill([0, 1, 2, 3, 4], lengths, 10) == [[0, 3], [1, 2], [4]]
    assert fill([4, 3, 2, 1, 0], lengths, 10) == [[4], [3, 0], [2, 1]]
    assert fill([0, 1, 2, 3], lengths, 10, at_once=2) == [[0], [1], [2, 3]]


def test_a_rank_with_fewer_micro_batches_gets_masked_ones():
    """All ranks have as many: with --shard every forward needs all of them."""
    rows = [([1, 5, 2], [_, 5, 2])] * 3

    def windows_of(rank, n):
        return epoch_windows(rows[:n], pack, 1, 2, rank=rank, world_size=2, tokens_per_batch=3)

    first = windows_of(0, 3)
    second = windows_of(1, 3)
    assert [window.n_answer for window in first] == [window.n_answer for window in second] == [6]
    assert [batch.n_answer for batch in first[0].batches] == [2, 2]
    assert [batch.n_answer for batch in second[0].batches] == [2, 0]
    masked = windows_of(1, 1)[0].batches[0]
    assert masked.n_answer == 0
    assert (masked.labels == IGNORE).all()


# --- while the model computes


def test_a_copy_is_waited_for_except_on_cuda(monkeypatch):
    """Apple's GPU would read from memory that is freed by then."""
    asynchronous = []
    to = torch.Tensor.to

    def noted(self, *args, non_blocking=False):
        asynchronous.append(non_blocking)
        return to(self, *args)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    for device, expected in ((torch.device("meta"), False), (torch.device("cuda"), True)):
        asynchronous.clear()
        with nullcontext() if torch.cuda.is_available() or not expected else pytest.raises(
                (AssertionError, RuntimeError)):
            copied = pack([([1, 2, 3], [IGNORE, 2, 3])]).to(device)
            to_device(copied.labels, device)
        assert set(asynchronous) == {expected}


def test_made_ahead_is_the_same_and_errors_arrive():
    assert list(prefetch(range(5))) == list(range(5))
    assert list(prefetch([])) == []

    def broken():
        yield 1
        raise ValueError("a broken row")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="a broken row"):
        next(items)


@pytest.mark.gpu
@PLAIN_AND_SHARED
def test_nothing_waits_for_the_gpu_within_a_micro_batch(share_prefix):
    model = tiny(n_kv_heads=2).cuda()
    add_lora(model, LoRAConfig(r=4, dropout=0))
    batch = pack(drawn(), share_prefix)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = answer_loss(model, batch.to(torch.device("cuda")))
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
