"""What a table of scored examples says, and whether a difference is more than chance.

Every measure is computed from column sums, so ranks and bootstrap samples use the same code.
"""
import math
from collections.abc import Iterable

import torch

from .batches import split

RESAMPLES = 2000


def measures(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return {measure: value} from the sums of a table's columns.

    Sums may have one more axis in front, which the values keep; it counts bootstrap samples.
    """
    values = {}
    values["loss"] = sums["nats"] / sums["tokens"]
    values["perplexity"] = values["loss"].exp()
    values["token_accuracy"] = sums["hits"] / sums["tokens"]
    for name in ("exact_match", "ended"):
        if name in sums:
            values[name] = sums[name] / sums["examples"]
    if "confusion" in sums:
        values |= class_measures(sums["confusion"], sums["examples"])
    return values


def class_measures(confusion: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return accuracy, macro F1 and Matthews correlation of confusion counts (..., C, C).

    confusion[..., i, k]: how often the answer is class i and the model chooses k.  n: their sum.
    Macro F1 is the mean over classes of 2 TP / (2 TP + FP + FN), without classes that are neither
    an answer nor chosen.  The correlation is R_K (Gorodkin 2004), which for two classes is the
    usual one.  It is 0 if all answers are one class, or if the model chooses one class only.
    """
    right = confusion.diagonal(dim1=-2, dim2=-1)                               # (..., C)
    expected = confusion.sum(-1)
    chosen = confusion.sum(-2)
    n_right = right.sum(-1)
    covariance = n * n_right - (expected * chosen).sum(-1)
    variances = (n ** 2 - (expected ** 2).sum(-1)) * (n ** 2 - (chosen ** 2).sum(-1))
    return {"accuracy": n_right / n,
            "macro_f1": (2 * right / (expected + chosen)).nanmean(-1),
            "mcc": torch.where(variances > 0, covariance / variances.sqrt(), 0.0)}


def intervals(tables: dict[str, dict[str, torch.Tensor]], seed: int = 0,
              resamples: int = RESAMPLES) -> dict[str, dict[str, list]]:
    """Return {name: {measure: [value, low, high]}} of tables by name.

    If there are tables named "base" and "adapter", the result also has their "difference".  Between
    low and high lie the middle 95 % of a measure's values over `resamples` samples.  A sample has
    as many examples as a table, drawn with replacement (the percentile bootstrap, Efron &
    Tibshirani 1993, chapter 13).  All tables use the same samples, so an example that is equally
    hard for both adds nothing to the difference.
    A value that is not a finite number is None.
    """
    any_table = next(iter(tables.values()))
    n = len(any_table["examples"])
    whole = weighted_measures(tables, torch.ones(1, n, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for numbers in split(range(resamples), 100):     # so that the weights need little memory
        drawn = torch.randint(n, (len(numbers), n), generator=generator)
        times_drawn = torch.zeros(len(numbers), n, dtype=torch.float64)
        times_drawn.scatter_add_(1, drawn, torch.ones_like(times_drawn))
        samples.append(weighted_measures(tables, times_drawn))
    result = {}
    for name, values in whole.items():
        result[name] = {}
        for measure, value in values.items():
            draws = torch.cat([sample[name][measure] for sample in samples])
            result[name][measure] = finite_or_none([value.item(), *middle_95_percent(draws)])
    return result


def weighted_measures(tables: dict[str, dict[str, torch.Tensor]],
                      weights: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Return {name: {measure: (R,)}} for weights (R, n): how often each example counts."""
    result = {}
    for name, table in tables.items():
        sums = {column: torch.tensordot(weights, values, 1) for column, values in table.items()}
        result[name] = measures(sums)
    if result.keys() >= {"base", "adapter"}:
        base = result["base"]
        result["difference"] = {measure: value - base[measure]
                                for measure, value in result["adapter"].items()}
    return result


def middle_95_percent(draws: torch.Tensor) -> list[float]:
    """Return [low, high]: 2.5 % of the draws lie below and 2.5 % above."""
    return draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def finite_or_none(values: Iterable[float]) -> list[float | None]:
    """Return the values, with None for one that is not finite: JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in values]
