"""The papers' claims: how a verdict follows from an interval, and the mathematics behind them."""
import math
import shutil

import pytest
import torch
import torch.nn as nn

from benchmarks import __main__ as benchmark
from benchmarks import claims, paper, tables
from benchmarks.claims import (ABOUT_ZERO, ABOVE, BELOW, CANNOT_TELL, FAILS, HOLDS, Interval,
                               amplification, interval_of, pseudo_values, rounded, side_of,
                               subspace_similarity, verdict)
from finetune.options import DEMO
from lora.quantize import NF4Linear


# The rule


def test_an_interval_is_students():
    """By hand: the mean of 1, 2, 3 is 2, their standard error 1 / sqrt(3), t(0.975, 2) 4.303."""
    interval = interval_of([1, 2, 3])
    assert interval.mean == 2
    assert math.isclose(interval.high - 2, 4.303 / math.sqrt(3))
    assert math.isclose(2 - interval.low, 4.303 / math.sqrt(3))
    assert interval_of([5]) == (5, -math.inf, math.inf)
    assert interval_of([0.25] * 40) == (0.25, 0.25, 0.25)            # more than the table has


def test_quantiles_are_students():
    """The density of Student's t, integrated from 0 to the quantile, gives 0.475."""
    for freedom, quantile in enumerate(claims.T_QUANTILES, 1):
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(factor) / math.sqrt(freedom * math.pi)
        density = density * (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=3e-5), freedom


@pytest.mark.parametrize("claim, low, high, expected", [
    (ABOVE, 0.1, 0.5, HOLDS),
    (ABOVE, -0.5, -0.1, FAILS),
    (ABOVE, -0.1, 0.5, CANNOT_TELL),
    (ABOVE, 0.0, 0.0, FAILS),                        # exactly equal with every seed
    (BELOW, -0.5, -0.1, HOLDS),
    (BELOW, 0.1, 0.5, FAILS),
    (BELOW, -0.5, 0.1, CANNOT_TELL),
    (ABOUT_ZERO, -0.9, 0.9, HOLDS),                  # the margin is 1
    (ABOUT_ZERO, 0.2, 0.9, HOLDS),
    (ABOUT_ZERO, 1.1, 2.0, FAILS),
    (ABOUT_ZERO, -2.0, -1.1, FAILS),
    (ABOUT_ZERO, 0.9, 1.1, CANNOT_TELL),
    (ABOUT_ZERO, -math.inf, math.inf, CANNOT_TELL),
])
def test_a_verdict_follows_from_the_interval(claim, low, high, expected):
    assert verdict(claim, Interval((low + high) / 2, low, high), margin=1.0) == expected


def test_a_side_is_that_of_the_whole_interval():
    assert side_of(Interval(2, 1, 3)) == ABOVE
    assert side_of(Interval(2, 1, 3), margin=2) is None
    assert side_of(Interval(2, 1, 3), margin=4) == ABOUT_ZERO
    assert side_of(Interval(0, -1, 1)) is None


def test_what_the_paper_says_is_read_with_its_own_noise():
    """Beside 73.7: 0.5 is the standard deviation of its seeds."""
    assert [paper.claim_of(value, 73.7) for value in (70.4, 73.0, 73.2, 74.2, 74.3, None)] == [
        BELOW, BELOW, ABOUT_ZERO, ABOUT_ZERO, ABOVE, None]
    assert paper.claim_of(1.1, 0.6) == ABOUT_ZERO    # In binary they are further apart than 0.5.


def test_a_lower_loss_counts_as_better():
    """One row is better with each seed by both measures, and the paper says so."""
    loss = paper.compared([0.1, 0.2, 0.3], [0.6, 0.7, 0.8], ABOVE, paper.LOSS)
    right = paper.compared([90.0, 91.0, 92.0], [80.0, 81.0, 82.0], ABOVE, paper.RIGHT)
    assert loss == ["-0.500 [-0.500, -0.500]", HOLDS] and right[1] == HOLDS
    loss = paper.compared([0.1, 0.2, 0.3], [0.6, 0.7, 0.8], BELOW, paper.LOSS)
    assert loss[1] == FAILS
    assert paper.compared([0.1, 0.2, 0.3], [0.6, 0.7, 0.8], None, paper.LOSS)[1] == "here better"
    assert paper.compared([90.0], [80.0], ABOVE, paper.RIGHT) == ["+10.0 (no interval)",
                                                                  CANNOT_TELL]


def test_differences_are_taken_seed_by_seed():
    """Each seed is better by about 1, though seeds differ by 100."""
    values = [11.0, 111.1, 210.9]
    assert paper.compared(values, [10.0, 110.0, 210.0], ABOVE, paper.RIGHT)[1] == HOLDS


def test_pairs_of_seeds_are_not_independent():
    """If each seed adds its own part to a pair, the pseudo-values are these parts, doubled."""
    part = {0: 1.0, 1: 2.0, 2: 4.0, 3: 8.0}
    pairs = {}
    for first in part:
        for second in range(first + 1, 4):
            pairs[first, second] = part[first] + part[second]
    assert pseudo_values(pairs) == pytest.approx([2.0, 4.0, 8.0, 16.0])


# Subspaces


def test_similarity_of_equal_orthogonal_and_overlapping_subspaces():
    unit = torch.eye(4, dtype=torch.float64)
    plane = torch.stack([3 * unit[0], 2 * unit[1]])
    mixed = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64) @ plane
    assert subspace_similarity(plane, mixed, 2, 2) == pytest.approx(1)      # the same plane
    assert subspace_similarity(plane, unit[2:], 2, 2) == pytest.approx(0)
    half = torch.stack([3 * unit[0], 2 * unit[2]])
    assert subspace_similarity(plane, half, 2, 2) == pytest.approx(0.5)     # one common axis of two
    assert subspace_similarity(plane, half, 1, 1) == pytest.approx(1)       # the longest axes
    assert subspace_similarity(plane, half, 1, 2) == pytest.approx(1)       # one contains the other
    turned = torch.stack([unit[0] + unit[2]])
    assert subspace_similarity(plane, turned, 1, 1) == pytest.approx(0.5)   # cos^2 of 45 degrees


def test_random_subspaces_share_what_chance_gives():
    torch.manual_seed(0)
    values = [subspace_similarity(torch.randn(8, 64), torch.randn(16, 64), 8, 16)
              for _ in range(40)]
    assert sum(values) / len(values) == pytest.approx(16 / 64, abs=0.02)


def test_amplification_of_an_update_by_hand():
    """The update is 6 e0 e1^T, and W has 2 there: it triples what W has in that direction."""
    W = torch.zeros(4, 3)
    W[0, 1] = 2
    W[3, 2] = 5
    B = torch.tensor([[3.0], [0], [0], [0]])
    A = torch.tensor([[0, 2.0, 0]])
    result = amplification(W, B, A)
    assert (result.update, result.seen) == pytest.approx((6, 2))
    assert result.factor == pytest.approx(3)
    assert result.random == pytest.approx(math.sqrt(29 / 12))


def test_amplification_is_that_of_singular_vectors():
    """As in the paper: project W on the update's left and right singular vectors."""
    torch.manual_seed(0)
    W, B, A = torch.randn(9, 7).double(), torch.randn(9, 3).double(), torch.randn(3, 7).double()
    U, _, Vh = torch.linalg.svd(B @ A)
    expected = torch.linalg.norm(U[:, :3].T @ W @ Vh[:3].T).item()
    assert amplification(W, B, A).seen == pytest.approx(expected)


def test_random_directions_see_what_is_expected_of_them():
    torch.manual_seed(0)
    W = torch.randn(12, 10)
    squares = []
    for _ in range(400):
        result = amplification(W, torch.randn(12, 2), torch.randn(2, 10))
        squares.append(result.seen ** 2)
    assert math.sqrt(sum(squares) / 400) == pytest.approx(result.random, rel=0.05)


# Data types


def test_codebooks_are_15_symmetric_levels():
    upper = {
        "Int4": [0, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1],
        "FP4 (E2M1)": [0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1],
        "FP4 (E3M0)": [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
    }
    assert claims.CODEBOOKS.keys() == upper.keys()
    for name, levels in claims.CODEBOOKS.items():
        assert levels[7:].tolist() == pytest.approx(upper[name])
        assert torch.equal(levels, -levels.flip(0)) and len(levels) == 15


def test_a_weight_goes_to_the_nearest_level_of_its_own_block():
    """Two blocks of 64: the first one's absmax is 7, so int4 are whole numbers; the other is 0."""
    W = torch.zeros(2, 64)
    W[0, :5] = torch.tensor([7.0, 2.4, 2.6, -0.4, -6.6])
    result = rounded(W, claims.CODEBOOKS["Int4"])
    assert result[0, :5].tolist() == pytest.approx([7, 2, 3, 0, -7])
    assert not result[1].any() and result.shape == W.shape
    powers = rounded(W, claims.CODEBOOKS["FP4 (E3M0)"])
    assert powers[0, :3].tolist() == pytest.approx([7, 1.75, 1.75])


def test_a_block_may_reach_over_rows_and_the_last_one_be_short():
    torch.manual_seed(0)
    W = torch.randn(3, 40)                           # 120 weights: 64, then 56
    levels = claims.CODEBOOKS["FP4 (E2M1)"]
    flat = W.flatten()
    expected = torch.cat([rounded(flat[:64], levels), rounded(flat[64:], levels)])
    assert torch.equal(rounded(W, levels), expected.view(3, 40))


def test_each_data_type_replaces_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    weights = {}
    for name in (*paper.TABLE_2, claims.UNCHANGED):
        linear = nn.Linear(64, 8, bias=False)
        linear.weight = nn.Parameter(weight.clone())
        weights[name] = claims.RoundTrip(name)(linear).weight.detach()
    linear.weight = nn.Parameter(weight.clone())
    assert torch.equal(weights[claims.UNCHANGED], weight)
    assert torch.equal(weights[claims.NF4], NF4Linear(linear).dequantize(torch.float32))
    for name, levels in claims.CODEBOOKS.items():
        assert torch.equal(weights[name], rounded(weight, levels))


# The page


def test_a_budget_of_parameters_goes_where_the_paper_puts_it():
    """The feed-forward matrices of the demo are too wide to have just as many."""
    matrices = paper.matrices_of(DEMO)
    assert paper.ranks_for(matrices, 4, paper.TABLE_5) == {
        "wq": 8, "wk": 8, "wv": 8, "wo": 8, "wq,wk": 4, "wq,wv": 4, "wq,wk,wv,wo": 2, "w1,w2,w3": 1}
    assert paper.ranks_for(matrices, 4, {"w1,w2,w3", "wq,wv"}) == {"wq,wv": 4, "w1,w2,w3": 1}


def test_no_rank_is_above_the_smaller_side_of_a_matrix(base):
    """The base has keys of 16 numbers and queries of 32."""
    ranks = paper.ranks_for(paper.matrices_of(base), 1000, paper.TABLE_5)
    assert (ranks["wq"], ranks["wk"], ranks["wq,wk"]) == (32, 16, 16)


@pytest.mark.parametrize("flags, message", [
    (["--ranks", "4,4"], "--ranks needs two different ranks"),
    (["--seeds", "1,1"], "--seeds names a seed twice"),
    (["--ranks", "8,129"], "rank 129 is too large for wq,wv of this base: .* up to 128"),
    (["--r", "200"], "rank 200 is too large"),
    (["--data", "x.json"], "--data and --val-data go together"),
])
def test_flags_that_cannot_be_compared_are_refused(tmp_path, flags, message):
    args = benchmark.parse_args(["paper", *flags])
    with pytest.raises(ValueError, match=message):
        paper.make(args, tables.Table("paper", tmp_path, "here", "`this`"))


def test_a_base_that_is_not_a_transformer_is_refused(tmp_path):
    (tmp_path / "params.json").write_text('{"rnn": "lstm", "dim": 8, "n_layers": 1}')
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match="is not a transformer: it has no wq,wv to adapt"):
        paper.matrices_of(tmp_path)


def test_each_data_type_is_compared_with_the_next_and_with_nf4():
    losses = {"Int4": [0.31, 0.39, 0.52], "FP4 (E2M1)": [0.3, 0.4, 0.5],
              "FP4 (E3M0)": [0.35, 0.45, 0.56], claims.NF4: [0.1, 0.2, 0.3],
              claims.UNCHANGED: [0.1, 0.2, 0.3]}
    rows = [line.strip("| ").split(" | ") for line in paper.data_types_table(losses)[2:]]
    with_next = {row[0]: row[5] for row in rows[:4]}
    assert with_next == {"Int4": CANNOT_TELL, "FP4 (E2M1)": FAILS, "FP4 (E3M0)": HOLDS,
                         claims.NF4: "(not in the paper)"}
    with_nf4 = {row[0]: row[7] for row in rows[:3]}
    assert with_nf4 == {"Int4": HOLDS, "FP4 (E2M1)": HOLDS, "FP4 (E3M0)": HOLDS}
