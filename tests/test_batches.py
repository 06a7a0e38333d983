"""finetune/batches.py: the collator by hand; each example once per epoch, in an order by seed and epoch, shared by ranks."""
import pytest
import torch

from finetune.batches import DataCollatorForSupervisedDataset

from .helpers import epoch_windows

_ = -100


def test_collator_by_hand():
    batch = DataCollatorForSupervisedDataset(pad_id=2)([([1, 10, 11, 20, 2], [_, _, _, 20, 2]), ([1, 12, 2], [_, _, 2])])
    assert batch.tokens.tolist() == [[1, 10, 11, 20, 2], [1, 12, 2, 2, 2]]
    assert batch.labels.tolist() == [[_, _, _, 20, 2], [_, _, 2, _, _]]       # the row's own eos counts, padding never
    assert batch.n_answer == 3
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def dealt(batch_size, steps, seed=0, epoch=0, n=23, rank=0, world_size=1):
    """For each step the examples of each micro-batch, and the step's counts."""
    rows = [([1, i, 2], [_, i, 2]) for i in range(3, 3 + n)]
    made = epoch_windows(rows, DataCollatorForSupervisedDataset(0), batch_size, steps, seed, epoch, rank, world_size)
    return [([[i for i, label in zip(batch.tokens[:, 1].tolist(), batch.labels[:, 1]) if label != _] for batch in window.batches],
             window.n_tokens, window.n_answer) for window in made]


def flat(*args, **settings):
    return [[i for batch in batches for i in batch] for batches, *_ in dealt(*args, **settings)]


def test_every_example_once_an_epoch_and_the_last_window_is_smaller():
    steps = dealt(batch_size=3, steps=4)
    assert [[len(batch) for batch in batches] for batches, *_ in steps] == [[3, 3, 3, 3], [3, 3, 3, 2]]
    assert [counts for _, *counts in steps] == [[36, 24], [33, 22]]
    assert sorted(sum(flat(3, 4), [])) == list(range(3, 26))


def test_order_depends_on_seed_and_epoch_alone():
    assert sum(flat(3, 4), []) == sum(flat(8, 1), []) == sum(flat(1, 8), [])
    assert len({tuple(sum(flat(3, 4, seed, epoch), [])) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize("n", [16, 17, 19, 24, 201])
def test_ranks_share_each_step_without_a_duplicate_and_none_goes_without_a_batch(n):
    alone, first, second = flat(4, 2, n=n), *(flat(2, 2, n=n, rank=rank, world_size=2) for rank in (0, 1))
    assert [sorted(mine + theirs) for mine, theirs in zip(first, second, strict=True)] == [sorted(step) for step in alone]
    for rank in (0, 1):
        steps = dealt(2, 2, n=n, rank=rank, world_size=2)
        assert [counts for _, *counts in steps] == [counts for _, *counts in dealt(4, 2, n=n)]
        assert all(batches for batches, *_ in steps)
    assert (second[-1] == []) == (n == 17 or n == 201)                   # one example left: rank 1 masks its batch whole
