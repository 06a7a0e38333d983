"""Packed rows: several examples in one row without padding, and each attends to itself alone.

A third of a padded batch of Alpaca examples is padding, and a quarter of the rest is the same
preamble again.  Training, scoring and generation lay out their rows here.
"""
import copy
from os.path import commonprefix
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .one_call import OneCall, takes_one_call

MIN_SHARED = 8           # tokens: sharing fewer costs more in attention than it saves
SHORT_CONTEXT = 256      # tokens: up to here plain products are faster than torch's CPU kernel


class Layout:
    """Where the examples of a packed row (1, N) stand.

    segments: (length, context) from left to right.  context: the numbers of the earlier
    segments that come before this one in its text, in order; empty at the beginning of an example.
    trees: {segment: (L, L) bool} for a segment whose L tokens are a tree, not a line.  Row t is
    True for the tokens that t sees: those that it follows, and itself.
    ends: for each example the segment that it ends with.
    positions (N,) count from the beginning of each token's own example.
    """

    def __init__(self, segments: list[tuple[int, tuple]], trees: dict | None = None, ends=()):
        self.segments = segments
        self.trees = trees or {}
        self.ends = ends
        self.masks = {}                              # what `mask` has made
        positions = []
        for i, (length, context) in enumerate(segments):
            begin = sum(segments[j][0] for j in context)
            depth = self.trees[i].sum(-1) - 1 if i in self.trees else torch.arange(length)
            positions.append(begin + depth)
        self.positions = torch.cat(positions)
        self.one_call = OneCall.of(segments)
        self.longest = self.positions.max().item() + 1       # tokens of the longest example

    def to(self, device) -> "Layout":
        """Return a copy on the device; from pinned memory to a CUDA device asynchronously."""
        return self.copied(lambda tensor: copy_to(tensor, device))

    def copied(self, copy_of) -> "Layout":
        """Return a copy with copy_of(tensor) in place of each tensor."""
        other = copy.copy(self)
        other.positions = copy_of(self.positions)
        other.trees = {i: copy_of(tree) for i, tree in self.trees.items()}
        other.one_call = self.one_call.copied(copy_of)
        other.masks = {}
        return other

    @torch.compiler.disable          # Each batch has other shapes, and each would be compiled.
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return the attention of each token to its own example up to itself.

        q (1, N, H, hd), k and v (1, N, K, hd) -> (1, N, H, hd).
        """
        if not self.trees and takes_one_call(q, k):
            return self.one_call.attend(q, k, v)
        heads_per_key = q.shape[2] // k.shape[2]
        lengths = [length for length, _ in self.segments]
        queries = q.split(lengths, dim=1)
        keys = k.split(lengths, dim=1)
        values = v.split(lengths, dim=1)
        outputs = []
        for i, (_, context) in enumerate(self.segments):
            keys_read = joined(keys, context, i)
            values_read = joined(values, context, i)
            mask = self.mask(i, keys_read, heads_per_key)
            outputs.append(segment_attention(queries[i], keys_read, values_read, mask))
        return torch.cat(outputs, dim=1)

    def mask(self, i: int, keys: torch.Tensor, heads_per_key: int) -> torch.Tensor | None:
        """Return what segment i's L tokens see of the S keys, in the form for `segment_attention`.

        It is added to the scores: on a CPU with short contexts (heads_per_key L, S), else (L, S).
        None stands for the usual triangle, which needs no mask.  Made once for all blocks.
        """
        length = self.segments[i][0]
        n_keys = keys.shape[1]
        tree = self.trees.get(i)
        if tree is None and length == n_keys and not by_products(keys):
            return None
        variant = (i, heads_per_key, keys.dtype)
        if variant in self.masks:
            return self.masks[variant]
        visible = keys.new_ones(length, length, dtype=torch.bool).tril() if tree is None else tree
        # The whole context is visible.  CUDA's kernel wants rows in steps of 8 numbers.
        visible = F.pad(visible, (n_keys - length, -n_keys % 8), value=True)
        scores = torch.zeros_like(visible, dtype=keys.dtype).masked_fill_(~visible, -torch.inf)
        mask = scores[:, :n_keys]
        if by_products(keys):
            mask = mask.repeat(heads_per_key, 1)
        self.masks[variant] = mask
        return mask


def copy_to(tensor: torch.Tensor, device) -> torch.Tensor:
    """Copy a tensor to the device; from pinned memory to a CUDA device asynchronously.

    Elsewhere the host waits: Apple's GPU could read memory that has been freed since.
    """
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def joined(parts, context: tuple, i: int) -> torch.Tensor:
    """Return part i behind the parts of its context, along the tokens: (1, S, K, hd)."""
    if not context:
        return parts[i]
    return torch.cat([parts[j] for j in (*context, i)], dim=1)


def by_products(k: torch.Tensor) -> bool:
    """Return whether plain products are faster than torch's kernel for keys k (1, S, K, hd)."""
    return k.is_cpu and k.shape[1] <= SHORT_CONTEXT


def segment_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                      mask: torch.Tensor | None) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(hd) + mask) v for L tokens that stand behind their context.

    q (1, L, H, hd), k and v (1, S, K, hd) with S >= L -> (1, L, H, hd).  mask: as Layout.mask.
    """
    _, L, H, hd = q.shape
    K = k.shape[2]
    use_products = by_products(k)
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))             # (1, H|K, L|S, hd)
    if use_products:
        q = q.reshape(K, -1, hd)                                 # (K, H / K L, hd)
        scores = torch.baddbmm(mask, q, k[0].transpose(1, 2), alpha=hd ** -0.5)
        y = scores.softmax(-1) @ v[0]                            # softmax computes in fp32
        return y.reshape(1, H, L, hd).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=H > K)
    return y.transpose(1, 2)


class Piece(NamedTuple):
    """Tokens start..stop of one example, which continue the earlier pieces that `context` lists."""
    example: int
    start: int
    stop: int
    context: tuple[int, ...]


def arrange(rows: list[list[int]], shareable: list[int]) -> tuple[list[Piece], list[int]]:
    """Return (pieces, ends): how examples stand one behind another, equal beginnings only once.

    rows: lists of ids.  shareable: for each row, how many of its first tokens may be shared; 0
    shares nothing.  Beginnings may branch, as Alpaca's two preambles do.
    pieces: a list of Piece from left to right.  ends: for each row, the index of its last piece.
    """
    pieces = []
    ends = [None] * len(rows)

    def place(members, start, context):
        """Lay out the rows in `members`, which agree in their first `start` tokens.

        context: the pieces that hold those tokens.
        """
        branches = {}
        for i in members:
            beginning = tuple(rows[i][start:min(start + MIN_SHARED, shareable[i])])
            key = beginning if len(beginning) == MIN_SHARED else i
            branches.setdefault(key, []).append(i)
        for branch in branches.values():
            first = branch[0]
            if len(branch) == 1:
                ends[first] = len(pieces)
                pieces.append(Piece(first, start, len(rows[first]), context))
            else:
                stop = len(commonprefix([rows[i][:shareable[i]] for i in branch]))
                pieces.append(Piece(first, start, stop, context))
                place(branch, stop, (*context, len(pieces) - 1))

    place(range(len(rows)), 0, ())
    return pieces, ends
