"""Rows of tokens and labels -> micro-batches -> optimizer steps: padding, packing, the plan."""
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from llama.layout import Layout, arrange, copy_to

from .dataset import IGNORE, count_answer


class Batch(NamedTuple):
    """A micro-batch: tokens and labels (B, T) int64, its number of answer tokens, and its layout.

    Labels are aligned with their tokens (labels[t] is tokens[t] or IGNORE); the loss shifts them
    by one.  layout: where the examples of a packed row stand; None for a padded batch.
    """
    tokens: torch.Tensor
    labels: torch.Tensor
    n_answer: int
    layout: Layout | None = None

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory, from which CUDA copies while the host goes on."""
        layout = self.layout.copied(torch.Tensor.pin_memory) if self.layout else None
        return self._replace(tokens=self.tokens.pin_memory(), layout=layout)

    def to(self, device) -> "Batch":
        """Copy tokens and layout to the device; see copy_to.

        Labels stay on the CPU, so that picking answer rows does not wait for the GPU.
        """
        layout = self.layout.to(device) if self.layout else None
        return self._replace(tokens=copy_to(self.tokens, device), layout=layout)


class Window(NamedTuple):
    """One optimizer step: this rank's micro-batches, and the tokens and answer tokens of all ranks.

    epoch: epochs completed after this step.
    """
    batches: list
    n_tokens: int
    n_answer: int
    epoch: float


def pad_right(lists, value) -> torch.Tensor:
    """Return B lists of ids as (B, T) int64; shorter lists are filled with `value` on the right."""
    T = max(map(len, lists))
    return torch.tensor([ids + [value] * (T - len(ids)) for ids in lists])


class DataCollatorForSupervisedDataset:
    """Make a Batch of a list of (tokens, labels), padded on the right with pad_id and IGNORE.

    Most training code pads like this.  train.py packs instead, and tests compare the two.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, rows) -> Batch:
        tokens = [tokens for tokens, _ in rows]
        labels = [labels for _, labels in rows]
        n_answer = sum(map(count_answer, labels))
        return Batch(pad_right(tokens, self.pad_id), pad_right(labels, IGNORE), n_answer)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device; to a CUDA device asynchronously, through pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return copy_to(tensor, device)


def pack(rows, share_prefix: bool = False, pinned: bool = False) -> Batch:
    """Join rows of (tokens, labels) into one row (1, N) without padding.

    share_prefix: store a common beginning once.  At least the last prompt token is not shared: it
    predicts the first target.  The gradient of the beginning is the sum over the examples.  The
    result is exact except for dropout: all examples then have the same mask on the beginning.
    pinned: in memory from which a GPU copies fast.
    """
    n_shareable = [first_target(labels) - 1 if share_prefix else 0 for _, labels in rows]
    pieces, ends = arrange([tokens for tokens, _ in rows], n_shareable)
    packed_tokens = []
    packed_labels = []
    for example, start, stop, _ in pieces:
        tokens, labels = rows[example]
        packed_tokens += tokens[start:stop]
        # A piece's first token is no target here: the token before it is in another piece.
        packed_labels += [IGNORE, *labels[start + 1:stop]]
    layout = Layout([(piece.stop - piece.start, piece.context) for piece in pieces], ends=ends)
    n_answer = sum(count_answer(labels) for _, labels in rows)
    batch = Batch(torch.tensor([packed_tokens]), torch.tensor([packed_labels]), n_answer, layout)
    return batch.pin_memory() if pinned else batch


def first_target(labels) -> int:
    """Return the index of the first target after the first token, or the number of labels."""
    for i, label in enumerate(labels[1:], 1):
        if label != IGNORE:
            return i
    return len(labels)


def plan_epoch(lengths, batch_size: int, accumulation_steps: int, seed: int, epoch: int, *,
               world_size: int = 1, begun_with: int | None = None,
               tokens_per_batch: int | None = None) -> list:
    """Return the optimizer steps of an epoch: [step][rank][micro-batch] -> indices of examples.

    lengths: the number of tokens of each example.  The order is drawn from (seed, epoch).  Every
    example is used once, so the last step may be smaller.  Rank i gets the parts i, i + n, i + 2 n
    and so on of a step, so in the last step a rank may get no example.  A micro-batch holds
    batch_size examples.  With tokens_per_batch it holds at most so many tokens instead, but at
    least one example.
    begun_with: the number of ranks that the run was begun with, if it is another one.  It decides
    which examples a step has, and world_size only how they are dealt out.
    """
    begun_with = begun_with or world_size
    n_parts = accumulation_steps * begun_with             # micro-batches of a step
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    if tokens_per_batch:
        batches = fill(order, lengths, tokens_per_batch)
        steps = split(batches, n_parts)
        return [deal(step, world_size) for step in steps]
    steps = []
    for step in split(order, batch_size * n_parts):
        steps.append([split(indices, batch_size) for indices in deal(step, world_size)])
    return steps


def plan_run(steps_of_epoch: Callable, epochs: int, max_steps: int | None) -> list:
    """Return every optimizer step of a run: (epochs completed after it, [rank][micro-batch][i]).

    steps_of_epoch(epoch): the steps of an epoch, as plan_epoch returns them.
    """
    plan = []
    for epoch in range(epochs):
        steps = steps_of_epoch(epoch)
        plan += [(epoch + i / len(steps), step) for i, step in enumerate(steps, 1)]
        if max_steps and len(plan) >= max_steps:
            break
    return plan[:max_steps]


def deal(items: list, n: int) -> list:
    """Return n lists: list i gets the items i, i + n, i + 2 n and so on."""
    return [items[i::n] for i in range(n)]


def collect(lists: list) -> list:
    """Return the items that `deal` gave to these lists, in their order before."""
    items = []
    for i in range(max(map(len, lists))):
        items += [part[i] for part in lists if i < len(part)]
    return items


def split(items, n: int) -> list:
    """Return the items in pieces of n; the last piece may be shorter."""
    return [items[i:i + n] for i in range(0, len(items), n)]


def fill(order, lengths, capacity: int, at_once: int = 1024) -> list:
    """Return the indices in `order` as groups whose lengths add up to at most `capacity`.

    A longer example gets a group of its own.  Each `at_once` examples are sorted by length, and
    the longest comes first into the first group that has space (first-fit decreasing,
    Johnson 1973).  The groups then follow the order of their earliest example.
    """
    groups = []
    for indices in split(order, at_once):
        free_tokens = []                                  # tokens that still fit into each group
        members = []                                 # positions in `indices`, for each group
        by_length = sorted(range(len(indices)), key=lambda place: -lengths[indices[place]])
        for place in by_length:
            length = lengths[indices[place]]
            group = first_index(free_tokens, length)
            if group is None:
                group = len(free_tokens)
                free_tokens.append(capacity)
                members.append([])
            free_tokens[group] -= length
            members[group].append(place)
        for group in sorted(map(sorted, members)):
            groups.append([indices[place] for place in group])
    return groups


def first_index(free_tokens, length: int) -> int | None:
    """Return the index of the first value in free_tokens that is at least `length`, or None."""
    for i, space in enumerate(free_tokens):
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


def indices_as_dealt_to(n_ranks: int, step, whole_batches: bool) -> list:
    """Return the indices of a step in the order that they have if it is dealt to n_ranks ranks.

    So a run has the same fingerprint on any number of ranks.  whole_batches: whether micro-batches
    are dealt out, as with tokens_per_batch, or single examples.
    """
    epoch, ranks = step
    dealt = ranks
    if not whole_batches:
        dealt = []
        for batches in ranks:
            indices = example_indices((epoch, [batches]))
            dealt.append([[i] for i in indices])
    parts = collect(dealt)
    return example_indices((epoch, deal(parts, min(n_ranks, len(parts)))))


def windows(dataset, collate: Callable, plan: Iterable, rank: int = 0) -> Iterator[Window]:
    """Yield a Window for each step of a plan, (epochs completed, [rank][micro-batch][index]).

    Each rank knows the whole plan, so token counts need no all-reduce.  All ranks get the same
    number of micro-batches in a step: a rank that has fewer gets some whose labels are all masked
    and whose loss is 0.  A rank without any would leave out the all-reduce of the gradients, and
    with --shard every forward needs all ranks.
    """
    for step in plan:
        epoch, ranks = step
        rows = [dataset[i] for i in example_indices(step)]
        batches = []
        for batch in ranks[rank]:
            batches.append(collate([dataset[i] for i in batch]))
        tokens, labels = rows[0]
        for _ in range(max(map(len, ranks)) - len(batches)):
            batches.append(collate([(tokens, [IGNORE] * len(labels))]))
        n_tokens = sum(len(tokens) for tokens, _ in rows)
        n_answer = sum(count_answer(labels) for _, labels in rows)
        yield Window(batches, n_tokens, n_answer, epoch)


def prefetch(items: Iterable) -> Iterator:
    """Yield the items.  A thread makes the next one while the caller uses the current one."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)
        while True:
            item = future.result()
            if item is None:
                return
            future = thread.submit(next, items, None)
            yield item
