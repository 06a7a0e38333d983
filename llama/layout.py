"""Packed rows: several examples in one row without padding, each attending to itself alone.

A third of a padded batch of Alpaca examples is padding, and a quarter of the rest is the same preamble again.  Training,
scoring and generation all lay out their rows here.
"""
import copy
from os.path import commonprefix
from typing import NamedTuple

import torch
import torch.nn.functional as F

LEAST = 8                                            # tokens: sharing fewer costs more in attention than it saves
SHORT = 256                                          # tokens: up to here plain products beat torch's CPU kernel (bf16)


class Layout:
    """Where the examples of a row (1, N) stand.

    segments: [(length, context)] from left to right; context lists the earlier segments that this one continues, in
    order: none for the beginning of an example.  Positions count from each example's own beginning.
    trees: {segment: (L, L) bool}, for one whose L tokens are no line but a tree: row t holds those that t sees, which are
    those it follows and itself.
    ends: for each example, the segment that it ends with.
    """

    def __init__(self, segments, trees=None, ends=()):
        self.segments, self.trees, self.ends = segments, trees or {}, ends
        begins = [sum(segments[i][0] for i in context) for _, context in segments]
        self.positions = torch.cat([begin + (self.trees[i].sum(-1) - 1 if i in self.trees else torch.arange(length))
                                    for i, (begin, (length, _)) in enumerate(zip(begins, segments))])
        self.longest = self.positions.max().item() + 1                         # of the examples
        self.masks = {}                                                        # what `mask` has made

    def to(self, device):
        there = copy.copy(self)
        there.positions, there.masks = self.positions.to(device, non_blocking=True), {}
        there.trees = {i: tree.to(device, non_blocking=True) for i, tree in self.trees.items()}
        return there

    @torch.compiler.disable                                      # its many shapes would compile a block again and again
    def attend(self, q, k, v):
        """q (1, N, H, hd), k and v (1, N, K, hd) -> (1, N, H, hd): each token sees its own example up to itself."""
        groups, lengths, read = q.shape[2] // k.shape[2], [length for length, _ in self.segments], []
        q, k, v = (z.split(lengths, dim=1) for z in (q, k, v))
        for i, (_, context) in enumerate(self.segments):
            keys, values = (torch.cat([z[j] for j in (*context, i)], dim=1) if context else z[i] for z in (k, v))
            read.append(after_context(q[i], keys, values, self.mask(i, keys, groups)))
        return torch.cat(read, dim=1)

    def mask(self, i, keys, groups):
        """What `after_context` is told that segment i's L tokens see of the S keys: (groups L, S) to add to the scores,
        (L, S) bool, or None for the usual triangle.  Made once for all blocks."""
        L, S, made = self.segments[i][0], keys.shape[1], (i, groups, keys.dtype)
        if made not in self.masks:
            seen = F.pad(self.trees[i] if i in self.trees else keys.new_ones(L, L, dtype=torch.bool).tril(), (S - L, 0), value=True)
            if keys.is_cpu and S <= SHORT:
                self.masks[made] = keys.new_zeros(L, S).masked_fill(~seen, -torch.inf).repeat(groups, 1)
            else:
                self.masks[made] = seen if i in self.trees or L < S else None
        return self.masks[made]


def after_context(q, k, v, mask):
    """q (1, L, H, hd), k and v (1, S, K, hd), S >= L, and Layout's mask -> (1, L, H, hd)."""
    (L, H, hd), K = q.shape[1:], k.shape[2]
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))                                               # (1, H|K, L|S, hd)
    if mask is not None and mask.dtype != torch.bool:
        scores = torch.baddbmm(mask, q.reshape(K, -1, hd), k[0].transpose(1, 2), alpha=hd ** -0.5)
        return (scores.softmax(-1) @ v[0]).reshape(1, H, L, hd).transpose(1, 2)                    # fp32 inside softmax
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=H > K).transpose(1, 2)


class Piece(NamedTuple):
    """Tokens start..stop of one example, which continue the earlier pieces that `context` lists."""
    example: int
    start: int
    stop: int
    context: tuple


def arrange(rows, shareable):
    """Return (pieces, ends): how examples stand one behind another, with equal beginnings only once.

    rows: lists of ids.  shareable: for each row, how many of its first tokens may be shared; 0 shares nothing.
    pieces: a list of Piece from left to right.  ends: for each row, the index of its last piece.
    Beginnings may branch, as Alpaca's two preambles do.
    """
    pieces = []
    ends = [None] * len(rows)

    def place(members, start, context):
        """Lay out the rows in `members`, which agree in their first `start` tokens; `context` holds those."""
        branches = {}
        for i in members:
            beginning = tuple(rows[i][start:min(start + LEAST, shareable[i])])
            key = beginning if len(beginning) == LEAST else i
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
