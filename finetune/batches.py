"""Rows of tokens and labels -> micro-batches -> optimizer steps: padding, packing, the plan."""
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from llama.layout import Layout, arrange

from .dataset import IGNORE, count_answer


class Batch(NamedTuple):
    """A micro-batch: tokens and labels (B, T) int64, its number of answer tokens, and its layout.

    Labels stand where their tokens stand (labels[t] is tokens[t] or IGNORE); the loss shifts them
    by one.  layout: where the examples of a packed row stand; None for a padded batch.
    """
    tokens: torch.Tensor
    labels: torch.Tensor
    n_answer: int
    layout: Layout | None = None

    def to(self, device) -> "Batch":
        """Copy tokens and layout to the device asynchronously.

        Labels stay on the CPU, so that nothing has to synchronise.
        """
        tokens = self.tokens.pin_memory() if device.type == "cuda" else self.tokens
        layout = self.layout.to(device) if self.layout else None
        return self._replace(tokens=tokens.to(device, non_blocking=True), layout=layout)


class Window(NamedTuple):
    """An optimizer step: this rank's micro-batches, all ranks' tokens and answer tokens, and the
    number of epochs that have passed with it."""
    batches: list
    n_tokens: int
    n_answer: int
    epoch: float


def pad_right(lists, value) -> torch.Tensor:
    """Return B lists of ids as (B, T) int64, filled up with `value` to the longest."""
    T = max(map(len, lists))
    return torch.tensor([ids + [value] * (T - len(ids)) for ids in lists])


class DataCollatorForSupervisedDataset:
    """List of (tokens, labels) -> Batch, padded on the right: tokens with pad_id, labels IGNORE.

    This is the form that most code uses.  train.py packs instead, and tests compare the two.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows) -> Batch:
        tokens = [tokens for tokens, _ in rows]
        labels = [labels for _, labels in rows]
        n_answer = sum(map(count_answer, labels))
        return Batch(pad_right(tokens, self.pad_id), pad_right(labels, IGNORE), n_answer)


def pack(rows, share_prefix: bool = False) -> Batch:
    """Put rows of (tokens, labels) one behind another: one row (1, N) without padding.

    share_prefix: what examples have in common at their beginning, up to before the token that
    predicts the first target, stands once, and its gradient is the sum of theirs.  This is exact
    except for dropout, which then drops the same elements there for all.
    """
    shareable = [first_target(labels) - 1 if share_prefix else 0 for _, labels in rows]
    pieces, ends = arrange([tokens for tokens, _ in rows], shareable)
    packed_tokens = []
    packed_labels = []
    for example, start, stop, _ in pieces:
        tokens, labels = rows[example]
        packed_tokens += tokens[start:stop]
        # The token that predicts a piece's first one stands elsewhere in the row, if anywhere.
        packed_labels += [IGNORE, *labels[start + 1:stop]]
    layout = Layout([(piece.stop - piece.start, piece.context) for piece in pieces], ends=ends)
    n_answer = sum(count_answer(labels) for _, labels in rows)
    return Batch(torch.tensor([packed_tokens]), torch.tensor([packed_labels]), n_answer, layout)


def first_target(labels) -> int:
    """Return the index of the first target after the first token, or the number of labels."""
    for i, label in enumerate(labels[1:], 1):
        if label != IGNORE:
            return i
    return len(labels)


def plan_epoch(lengths, batch_size: int, accumulation_steps: int, seed: int, epoch: int, *,
               world_size: int = 1, tokens_per_batch: int | None = None) -> list:
    """Return the optimizer steps of an epoch: [step][rank][micro-batch] -> indices of examples.

    lengths: tokens of each example.  The order is drawn from (seed, epoch) and every example comes
    once; what is left at the end makes a smaller step like any other.  A step is dealt out to the
    ranks in turn, so at the end a rank may get nothing.  A micro-batch holds batch_size examples
    or, with tokens_per_batch, as many as fit into so many tokens, and always one.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    if tokens_per_batch:
        groups = fill(order, lengths, tokens_per_batch)
        steps = split(groups, accumulation_steps * world_size)
        return [deal(step, world_size) for step in steps]
    steps = []
    for step in split(order, batch_size * accumulation_steps * world_size):
        steps.append([split(indices, batch_size) for indices in deal(step, world_size)])
    return steps


def deal(items: list, n: int) -> list:
    """Return n lists, to which the items go in turn."""
    return [items[i::n] for i in range(n)]


def split(items, n: int) -> list:
    """Return the items in pieces of n; the last piece holds what is left."""
    return [items[i:i + n] for i in range(0, len(items), n)]


def fill(order, lengths, capacity: int, at_once: int = 1024) -> list:
    """Return the indices in `order` as groups whose lengths add up to at most `capacity`.

    A longer example gets a group of its own.  Of each 1,024 examples the longest come first, each
    into the first group that has space (first-fit decreasing, Johnson 1973: at most 11/9 of the
    fewest groups).  Groups then follow the order of their earliest example.
    """
    groups = []
    for indices in split(order, at_once):
        spaces = []                                  # tokens that still fit into each group
        places = []                                  # positions in `indices` of its examples
        by_length = sorted(range(len(indices)), key=lambda place: -lengths[indices[place]])
        for place in by_length:
            length = lengths[indices[place]]
            group = first_index(spaces, length)
            if group is None:
                group = len(spaces)
                spaces.append(capacity)
                places.append([])
            spaces[group] -= length
            places[group].append(place)
        for group in sorted(map(sorted, places)):
            groups.append([indices[place] for place in group])
    return groups


def first_index(spaces, length: int) -> int | None:
    """Return the index of the first space that is large enough, or None."""
    for i, space in enumerate(spaces):
        if space >= length:
            return i
    return None


def example_indices(step) -> list:
    """Return the indices of all examples in a step of a plan, (epoch, [rank][micro-batch])."""
    _, ranks = step
    indices = []
    for batches in ranks:
        for batch in batches:
            indices += batch
    return indices


def windows(dataset, collate: Callable, plan: Iterable, rank: int = 0) -> Iterator[Window]:
    """Yield a Window for each step of a plan, (epochs passed, [rank][micro-batch][index]).

    Each rank knows the whole plan, so the counts need no communication.  A rank that has no example
    in a step gets one micro-batch whose labels are all masked and whose loss is 0: it must not miss
    the all-reduce of the gradients.
    """
    for step in plan:
        epoch, ranks = step
        rows = [dataset[i] for i in example_indices(step)]
        batches = [collate([dataset[i] for i in batch]) for batch in ranks[rank]]
        if not batches:
            tokens, labels = rows[0]
            batches = [collate([(tokens, [IGNORE] * len(labels))])]
        n_tokens = sum(len(tokens) for tokens, _ in rows)
        n_answer = sum(count_answer(labels) for _, labels in rows)
        yield Window(batches, n_tokens, n_answer, epoch)


def ahead(items: Iterable) -> Iterator:
    """Yield the same items, each made in a thread while the one before it is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while True:
            item = coming.result()
            if item is None:
                return
            coming = thread.submit(next, items, None)
            yield item
