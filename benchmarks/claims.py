"""How a paper's claim is judged, and the mathematics that the claims are about.

A claim says that a difference is above zero, below zero, or about zero.  It is compared with the
95 % t-interval of the differences that were measured, one per seed:

    mean +- t(0.975, n - 1) * standard deviation / sqrt(n)

- "holds" if the whole interval lies where the claim says, "fails" if the whole interval lies where
  the claim does not say, and "can't be told apart" otherwise.
- "About zero" means within a margin of zero on both sides; the other two have no margin.
- With one seed the interval is infinite, so nothing can be told apart.

Each interval stands alone.  Where nothing differs, about one claim in twenty is still judged.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
"""
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn

from lora.quantize import BLOCK, TINY, NF4Linear, rows_of

ABOVE = "above"
BELOW = "below"
ABOUT_ZERO = "about zero"
HOLDS = "holds"
FAILS = "fails"
CANNOT_TELL = "can't be told apart"
# The 0.975 quantile of Student's t for 1 to 30 degrees of freedom.  More would be a little lower.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


# ---- The rule ---------------------------------------------------------------

class Interval(NamedTuple):
    """A mean and its 95 % t-interval."""
    mean: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """Return it as `mean [low, high]`, with signs; an infinite one as its mean alone."""
        mean = format(self.mean, f"+{form}")
        if math.isinf(self.low):
            return f"{mean} (no interval)"
        return f"{mean} [{format(self.low, f'+{form}')}, {format(self.high, f'+{form}')}]"


def interval_of(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its 95 % t-interval."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    freedom = min(len(values) - 1, len(T_QUANTILES))
    error = statistics.stdev(values) / math.sqrt(len(values))
    distance = T_QUANTILES[freedom - 1] * error
    return Interval(mean, mean - distance, mean + distance)


def pseudo_values(values: dict) -> list:
    """Return one value per seed for the interval of a mean over pairs of seeds.

    values: {(seed, other seed): value} of every pair of at least three seeds.  A seed is in several
    pairs, so these values depend on each other.  The jackknife's pseudo-values (Tukey 1958) have
    the same mean, and about the spread of independent ones.
    """
    seeds = sorted(set().union(*values))
    mean = statistics.mean(values.values())
    pseudo = []
    for seed in seeds:
        others = statistics.mean(value for pair, value in values.items() if seed not in pair)
        pseudo.append(len(seeds) * mean - (len(seeds) - 1) * others)
    return pseudo


def side_of(interval: Interval, margin: float = 0.0) -> str | None:
    """Return on which side of zero a whole interval lies; None if it is on several.

    margin: how far from zero is still about zero.
    """
    if interval.low > margin:
        return ABOVE
    if interval.high < -margin:
        return BELOW
    if -margin <= interval.low and interval.high <= margin:
        return ABOUT_ZERO
    return None


def verdict(claim: str, interval: Interval, margin: float = 0.0) -> str:
    """Return HOLDS, FAILS or CANNOT_TELL for a claim about a difference.

    claim: ABOVE, BELOW or ABOUT_ZERO.  margin: for ABOUT_ZERO alone.
    """
    side = side_of(interval, margin if claim == ABOUT_ZERO else 0.0)
    if side is None:
        return CANNOT_TELL
    return HOLDS if side == claim else FAILS


# ---- Subspaces of updates ---------------------------------------------------

def subspace_similarity(first: torch.Tensor, second: torch.Tensor, i: int, j: int) -> float:
    """Return phi, from 0 (orthogonal) to 1 (one contains the other) (LoRA, equation 4).

    first (r1, d) and second (r2, d): the A of two adapters.  Their top i and top j right singular
    vectors span two subspaces U and V, and phi is ||U V^T||_F^2 / min(i, j).  Two random subspaces
    have max(i, j) / d on average.
    """
    U = torch.linalg.svd(first, full_matrices=False).Vh[:i]
    V = torch.linalg.svd(second, full_matrices=False).Vh[:j]
    return (U @ V.T).square().sum().item() / min(i, j)


class Amplification(NamedTuple):
    """How much of W lies in the directions of an update (LoRA, section 7.3).

    update: ||Delta W||_F.  seen: ||U^T W V^T||_F, with the singular vectors U and V of Delta W.
    random: what `seen` would be, in the quadratic mean, for random directions.
    """
    update: float
    seen: float
    random: float

    @property
    def factor(self) -> float:
        """The amplification factor of these directions."""
        return self.update / self.seen


def amplification(W: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> Amplification:
    """Return the Amplification of W (d_out, d_in) by the update B A.

    B (d_out, r) and A (r, d_in) have full rank.  The columns of Q in B = Q R span the same space as
    the left singular vectors of B A, and those of A^T the same as the right ones.  A rotation
    within these spaces leaves the norm as it is, so no singular vectors are needed.
    """
    r = len(A)
    left = torch.linalg.qr(B).Q
    right = torch.linalg.qr(A.T).Q
    seen = torch.linalg.norm(left.T @ W @ right).item()
    random = torch.linalg.norm(W).item() * r / math.sqrt(W.numel())
    return Amplification(torch.linalg.norm(B @ A).item(), seen, random)


# ---- Data types of 4 bits ---------------------------------------------------

def with_signs(magnitudes: Sequence[float]) -> torch.Tensor:
    """Return the magnitudes (0 first) and their negatives as levels from -1 to 1, in order."""
    positive = torch.tensor(magnitudes) / max(magnitudes)
    return torch.cat([-positive[1:].flip(0), positive])


# 15 levels each, because zero has two codes, or -8 of int4 has no counterpart.  E2M1 is as in the
# Open Compute Project's microscaling formats, with the subnormal 0.5.
CODEBOOKS = {
    "Int4": with_signs([0, 1, 2, 3, 4, 5, 6, 7]),
    "FP4 (E2M1)": with_signs([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "FP4 (E3M0)": with_signs([0, 1, 2, 4, 8, 16, 32, 64]),
}
NF4 = "NF4 + double quantisation"
UNCHANGED = "as stored"


def rounded(W: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return W in fp32 after a round trip through levels, each block of 64 scaled by its absmax."""
    blocks = rows_of(W.float().flatten(), BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).clamp(min=TINY)
    midpoints = (levels[1:] + levels[:-1]) / 2
    nearest = levels[torch.bucketize(blocks / scales, midpoints)]
    return (nearest * scales).flatten()[:W.numel()].view_as(W)


class RoundTrip:
    """Replaces an nn.Linear by one whose weight went through a data type of 4 bits."""
    kind = "none"                                    # The layer that is left computes as usual.

    def __init__(self, data_type: str):
        self.data_type = data_type

    def __call__(self, linear: nn.Linear, path: str = "") -> nn.Linear:
        weight = linear.weight.detach()
        if self.data_type == NF4:
            weight = NF4Linear(linear).dequantize(torch.float32)
        elif self.data_type != UNCHANGED:
            weight = rounded(weight, CODEBOOKS[self.data_type])
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear
