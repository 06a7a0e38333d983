"""Rows of tokens and labels -> micro-batches -> optimizer steps: padding, packing, the plan of an epoch."""
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from llama.layout import Layout, arrange

from .dataset import IGNORE, count_answer


class Batch(NamedTuple):
    """A micro-batch: tokens and labels (B, T) int64, the number of its answer tokens, and, of a packed one, its layout.

    Labels stand where their tokens stand (labels[t] is tokens[t] or IGNORE); the shift by one is the loss's.
    """
    tokens: torch.Tensor
    labels: torch.Tensor
    n_answer: int
    layout: object = None

    def to(self, device):
        """What the model reads goes to the device, while that still computes; labels stay, and so nothing asks it back."""
        tokens = self.tokens.pin_memory() if device.type == "cuda" else self.tokens
        return self._replace(tokens=tokens.to(device, non_blocking=True), layout=self.layout and self.layout.to(device))


class Window(NamedTuple):
    """An optimizer step: this rank's micro-batches, what all ranks have, and how many epochs will have passed."""
    batches: list
    n_tokens: int
    n_answer: int
    epoch: float


def pad_right(lists, value):
    """Lists of B lists of ids -> (B, T) int64, filled up with `value` to the longest."""
    T = max(map(len, lists))
    return torch.tensor([ids + [value] * (T - len(ids)) for ids in lists])


class DataCollatorForSupervisedDataset:
    """List of (tokens, labels) -> Batch, padded on the right to the longest row: pad_id, labels IGNORE.

    The plain form, in which most code has it; train.py packs instead, and tests compare that with this.
    """

    def __init__(self, pad_id):
        self.pad_id = pad_id

    def __call__(self, rows):
        tokens, labels = zip(*rows)
        return Batch(pad_right(tokens, self.pad_id), pad_right(labels, IGNORE), sum(map(count_answer, labels)))


def pack(rows, share_prefix=False):
    """Put rows of (tokens, labels) one behind another: a Batch of one row (1, N) and its Layout, without padding.

    share_prefix: what examples have in common at their beginning, up to before the token that predicts the first
    target, stands once, and its gradient is the sum of theirs.  Exact but for dropout, which then drops the same
    elements there for all.
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


def first_target(labels):
    """Return the index of the first target after the first token; the number of labels where there is none."""
    for i, label in enumerate(labels[1:], 1):
        if label != IGNORE:
            return i
    return len(labels)


def plan_epoch(lengths, batch_size, accumulation_steps, seed, epoch, world_size=1, tokens_per_batch=None):
    """The optimizer steps of an epoch: [step][rank][micro-batch] -> indices into `lengths`, the examples' tokens.

    The order is drawn from (seed, epoch), every example comes once, and what is left at the end makes a smaller
    step like any other.  A step is dealt out rank by rank; at the end a rank may be left without.  A micro-batch has
    batch_size examples or, with tokens_per_batch, as many as fit in that many tokens, and always one.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    if tokens_per_batch:
        steps = split(fill(order, lengths, tokens_per_batch), accumulation_steps * world_size)
        return [[step[rank::world_size] for rank in range(world_size)] for step in steps]
    steps = split(order, batch_size * accumulation_steps * world_size)
    return [[split(step[rank::world_size], batch_size) for rank in range(world_size)] for step in steps]


def split(some, n):
    """Pieces of n, the last one of what is left."""
    return [some[i:i + n] for i in range(0, len(some), n)]


def fill(order, lengths, room, at_once=1024):
    """Indices in `order`, grouped so that the lengths of a group add up to at most `room`, where one alone does.

    The next thousand are taken from longest to shortest, each into the first group that has room for it
    (first-fit decreasing, Johnson 1973: at most 11/9 of the fewest groups); groups then come by their earliest member.
    """
    groups = []
    for some in split(order, at_once):
        filled = []                                              # [room left, places in the order]
        for place in sorted(range(len(some)), key=lambda place: -lengths[some[place]]):
            length = lengths[some[place]]
            group = next((group for group in filled if group[0] >= length), None)
            if group is None:
                filled.append(group := [room, []])
            group[0] -= length
            group[1].append(place)
        groups += [[some[place] for place in places] for places in sorted(sorted(places) for _, places in filled)]
    return groups


def windows(dataset, collate, steps, rank=0):
    """Yield a Window for each of `steps`, (epochs passed, [rank][micro-batch][index]).

    Each rank knows the whole plan, so the counts need no communication.  A rank that is left without gets one
    micro-batch that is masked whole, whose loss is 0: it must not miss the gradients' all-reduce.
    """
    for epoch, ranks in steps:
        rows = [dataset[i] for batches in ranks for batch in batches for i in batch]
        batches = [collate([dataset[i] for i in batch]) for batch in ranks[rank]]
        batches = batches or [collate([(rows[0][0], [IGNORE] * len(rows[0][1]))])]
        yield Window(batches, sum(len(tokens) for tokens, _ in rows), sum(count_answer(labels) for _, labels in rows), epoch)


def ahead(items):
    """The same items, each made in a thread while the one before it is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
