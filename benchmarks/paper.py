"""Do the claims of the LoRA and QLoRA papers hold here?  Each with a verdict from an interval.

The rule is in claims.py: "holds" or "fails" if the whole 95 % t-interval of a difference over seeds
lies on one side, otherwise "can't be told apart".  A row of tables 5 and 6 is compared with a
reference row, seed by seed; `about the same` means within 1 % of the reference row's mean.

- LoRA, tables 5 and 6: which matrices a budget of parameters should go to, and which rank they
  need.  All runs have the same learning rate, steps and alpha; with another --lr a verdict may
  be another.
- LoRA, section 7.2: which directions two ranks, or two seeds, have in common.
- LoRA, section 7.3: how much an update amplifies directions of W.
- QLoRA, table 2: data types of 4 bits, by the base's loss on text.  Here the interval is over parts
  of the text: there is one base, and rounding it knows no seed.
"""
import math
import statistics
from collections.abc import Container
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.nn as nn

from finetune.arguments import number
from finetune.examples import read_examples
from finetune.options import DEMO
from llama import ModelArgs, Transformer
from llama.checkpoint import read_params
from lora.adapter import last_part

from . import claims
from .claims import ABOUT_ZERO, ABOVE, BELOW, interval_of, side_of, verdict
from .study import Study, directions_of, losses_of_data_types
from .tables import ROOT, Table, add_processes_flag, list_of, markdown, panel, spread
from .training import add_run_flags, add_training_flags, run_flags, task_of

FILES = [ROOT / "benchmarks/claims.py", ROOT / "benchmarks/study.py"]
PAIR = "wq,wv"                                       # the reference row of table 5
# Validation accuracy of GPT-3 175B on WikiSQL in %, by the matrices that were adapted (LoRA, table
# 5), and by the rank on wq and wv (table 6).  None: a row that the paper does not have.
TABLE_5 = {"wq": 70.4, "wk": 70.0, "wv": 73.0, "wo": 73.2, "wq,wk": 71.4, PAIR: 73.7,
           "wq,wk,wv,wo": 73.7, "w1,w2,w3": None}
TABLE_6 = {1: 73.4, 2: 73.3, 4: 73.7, 8: 73.8, 64: 73.5}
NOISE = 0.5                                          # standard deviation of these over seeds
MARGIN = 0.01                                        # of the reference: still about the same
# Mean perplexity of 125M to 13B models (QLoRA, table 2), from the worst to the best.
TABLE_2 = {"Int4": 34.34, "FP4 (E2M1)": 31.07, "FP4 (E3M0)": 29.48, claims.NF4: 27.41}
CLAIM_HEADER = ["measured", "the paper says", "here [95 %]", "verdict"]
WORDS = {ABOVE: "better", BELOW: "worse", ABOUT_ZERO: "about the same"}


@dataclass(frozen=True)
class Measure:
    """A measure of the answers: its name in a result, its title, and how it is printed.

    sign: 1 if more is better, -1 if less is.
    """
    name: str
    title: str
    factor: float
    form: str
    sign: int


LOSS = Measure("loss", "held-out loss", 1, ".3f", -1)
RIGHT = Measure("exact_match", "right to the letter, %", 100, ".1f", 1)
MCC = Measure("mcc", "MCC", 1, ".3f", 1)


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--seeds", metavar="N,...", type=list_of(number(int, 0)), default=[0, 1, 2, 3],
         help="random seeds, one run each (default: 0,1,2,3)")
    flag("--r", metavar="N", type=number(int, 1), default=4,
         help="rank on wq and wv that sets the budget of parameters (default: 4)")
    flag("--matrices", metavar="NAMES", nargs="+", choices=TABLE_5, default=list(TABLE_5),
         help=f"where the budget may go, of: {' '.join(TABLE_5)} (default: all; {PAIR} is always "
              "there, as the reference)")
    flag("--ranks", metavar="N,...", type=list_of(number(int, 1)), default=list(TABLE_6),
         help="ranks to compare on wq and wv (default: 1,2,4,8,64)")
    flag("--lr", metavar="F", type=number(float, 0, open_low=True),
         help="learning rate of every run (default: train.py's)")
    add_run_flags(parser)
    add_processes_flag(parser)


def make(args, table: Table) -> list:
    """Measure every claim; return lines of Markdown."""
    ranks = sorted(set(args.ranks))
    if len(ranks) < 2:
        raise ValueError("--ranks needs two different ranks, which are compared")
    if len(args.seeds) > len(set(args.seeds)):
        raise ValueError("--seeds names a seed twice; its runs would be the same")
    task = task_of(args)
    read_examples(task.questions)                    # Refuse a wrong file before the first run.
    study = Study(table, task, {"lr": args.lr} | run_flags(args), args.seeds)
    matrices = matrices_of(task.checkpoint or DEMO)
    check_ranks([args.r, *ranks], matrices, PAIR, "--r and --ranks")
    budgets = ranks_for(matrices, args.r, {PAIR, *args.matrices})
    study.train_all([*budgets.items(), *((PAIR, r) for r in ranks)], args.processes)
    by_targets = {(targets, r): study.results(targets, r) for targets, r in budgets.items()}
    by_rank = {(PAIR, r): study.results(PAIR, r) for r in ranks}
    data_types = losses_of_data_types(study, [*TABLE_2, claims.UNCHANGED])
    small, large = ranks[-2:]
    r = budgets[PAIR]
    measure = MCC if "mcc" in by_rank[PAIR, small][0] else RIGHT
    parts = {
        "Which matrices? (LoRA, table 5)": comparison(
            by_targets, (PAIR, r), [TABLE_5[targets] for targets in budgets], measure),
        "Which rank? (LoRA, table 6)": comparison(
            by_rank, (PAIR, small), [TABLE_6.get(r) for r in ranks], measure),
        "Which directions? (LoRA, section 7.2)": directions_table(study, small, large),
        "How much is amplified? (LoRA, section 7.3)": amplification_table(
            by_targets[PAIR, r], by_rank[PAIR, large], r, large),
        "Which data type of 4 bits? (QLoRA, table 2)": data_types_table(data_types),
    }
    table.draw(panels_of(by_rank, measure))
    lines = []
    for title, part in parts.items():
        lines += [f"### {title}", "", *part, ""]
    return [*lines, f"({note(args)})"]


def matrices_of(checkpoint: str | Path) -> dict:
    """Return {name: its layer on the meta device} of the matrices in a block.

    Raises ValueError for a base without such blocks.
    """
    sizes, _ = read_params(checkpoint)
    if not isinstance(sizes, ModelArgs):
        raise ValueError(f"{checkpoint} is not a transformer: it has no {PAIR} to adapt")
    with torch.device("meta"):
        block = Transformer(sizes).layers[0]
    matrices = {}
    for path, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            matrices[last_part(path)] = layer
    return matrices


def check_ranks(ranks: list, matrices: dict, targets: str, flags: str):
    """Raise ValueError, which names the flags, for a rank that one of the targets cannot have."""
    highest = highest_rank(matrices, targets)
    if max(ranks) > highest:
        raise ValueError(f"rank {max(ranks)} is too large for {targets} of this base: {flags} go "
                         f"up to {highest}")


def highest_rank(matrices: dict, targets: str) -> int:
    """Return the highest rank that each of the targets can have."""
    return min(min(matrices[name].weight.shape) for name in targets.split(","))


def ranks_for(matrices: dict, r: int, wanted: Container) -> dict:
    """Return {targets: rank} of table 5: as near to the parameters of r on wq and wv as can be.

    wanted: the rows of the table that are measured.
    """
    sizes = {}                                       # parameters of an adapter of rank 1
    for targets in TABLE_5:
        sizes[targets] = sum(sum(matrices[name].weight.shape) for name in targets.split(","))
    ranks = {}
    for targets, size in sizes.items():
        if targets in wanted:
            nearest = round(r * sizes[PAIR] / size)
            ranks[targets] = min(max(nearest, 1), highest_rank(matrices, targets))
    return ranks


def claim_of(value: float | None, reference: float | None) -> str | None:
    """Return which side of the reference the paper's value is on; None if the paper has none.

    A difference up to the standard deviation of its seeds is about zero.
    """
    if value is None or reference is None:
        return None
    difference = round(value - reference, 1)
    if abs(difference) <= NOISE:
        return ABOUT_ZERO
    return ABOVE if difference > 0 else BELOW


def comparison(results: dict, reference: tuple, paper: list, measure: Measure) -> list:
    """Return the table of several LoRAs beside a reference, by a measure of answers and by loss.

    results: {(targets, r): a result per seed}, in the order of `paper`, the paper's values.
    """
    header = ["matrices", "r", "parameters", "paper, %", "the paper says"]
    for each in (measure, LOSS):
        header += [each.title, "difference", "verdict"]
    paper_by_row = dict(zip(results, paper, strict=True))
    rows = []
    for key, cells in results.items():
        value = paper_by_row[key]
        claim = claim_of(value, paper_by_row[reference])
        paper_text = "" if value is None else f"{value}"
        row = [key[0], str(key[1]), f"{cells[0]['parameters']:,}", paper_text]
        if key == reference:
            row.append("(reference)")
        else:
            row.append("nothing" if claim is None else WORDS[claim])
        for each in (measure, LOSS):
            values = [cell[each.name] * each.factor for cell in cells]
            row.append(spread(values, each.form))
            if key == reference:
                row += ["", ""]
                continue
            expected = [cell[each.name] * each.factor for cell in results[reference]]
            row += compared(values, expected, claim, each)
        rows.append(row)
    return markdown(header, rows)


def compared(values: list, reference: list, claim: str | None, measure: Measure) -> list:
    """Return [the interval of the difference, the verdict] as text, seed by seed."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    interval = interval_of(differences)
    better = interval_of([measure.sign * difference for difference in differences])
    margin = MARGIN * abs(statistics.mean(reference))
    if claim:
        return [interval.text(measure.form), verdict(claim, better, margin)]
    side = side_of(better) or side_of(better, margin)
    judged = f"here {WORDS[side]}" if side else claims.CANNOT_TELL
    return [interval.text(measure.form), judged]


def directions_table(study: Study, small: int, large: int) -> list:
    """Return the table of section 7.2."""
    if len(study.seeds) < 3:
        return ["(needs three seeds)"]
    sizes = [1, small]
    smalls = study.runs(PAIR, small)
    larges = study.runs(PAIR, large)
    # With the same seed, the random start of a small A would be a part of the large one's.
    next_larges = [*larges[1:], larges[0]]
    ranks = directions_of(list(zip(smalls, next_larges, strict=True)), sizes)
    run_pairs = list(combinations(larges, 2))
    seeds = directions_of(run_pairs, sizes)
    seed_pairs = [(first.seed, second.seed) for first, second in run_pairs]
    width = read_params(study.task.checkpoint or DEMO)[0].dim
    chance = small / width
    phi = f"phi({small}, {small})"
    by_seed = {}
    rows = []
    for target in PAIR.split(","):
        of_ranks = f"{target}, A of r {small} and r {large}"
        top, whole = zip(*(cell[target] for cell in ranks), strict=True)
        rows.append(claim_row(f"{of_ranks}: phi(1, 1)", "above 0.5", top, 0.5))
        if small > 1:                                # Rank 1 has no other directions.
            rest = [a - b for a, b in zip(top, whole, strict=True)]
            rows.append(claim_row(f"{of_ranks}: phi(1, 1) - {phi}",
                                  "above 0: other directions are not shared", rest, 0))
        _, both = zip(*(cell[target] for cell in seeds), strict=True)
        by_seed[target] = claims.pseudo_values(dict(zip(seed_pairs, both, strict=True)))
        rows.append(claim_row(f"{target}, A of r {large}, two seeds: {phi}",
                              f"above chance, {chance:.3f}", by_seed[target], chance))
    more = [a - b for a, b in zip(by_seed["wq"], by_seed["wv"], strict=True)]
    rows.append(claim_row(f"wq - wv, A of r {large}, two seeds: {phi}",
                          "above 0: wq has more common directions", more, 0))
    return markdown(CLAIM_HEADER, rows)


def claim_row(name: str, claim: str, values: list, least: float) -> list:
    """Return a row whose claim is that the values are above `least`."""
    judged = verdict(ABOVE, interval_of([value - least for value in values]))
    return [name, claim, interval_of(values).text(".3f"), judged]


def amplification_table(low: list, high: list, r: int, large: int) -> list:
    """Return the table of section 7.3.  low, high: the results of ranks r and `large`, by seed."""
    rows = []
    for target in PAIR.split(","):
        factors, seen = means_over_blocks(low, target)
        rows.append(claim_row(f"{target}, r {r}: amplification factor", "21.5 (wq); above 1",
                              factors, 1))
        rows.append(claim_row(f"{target}, r {r}: W in the update's directions / in random ones",
                              "0.32 / 0.02 = 16 (wq); above 1", seen, 1))
        if r != large:
            large_factors, _ = means_over_blocks(high, target)
            less = [a - b for a, b in zip(factors, large_factors, strict=True)]
            rows.append(claim_row(f"{target}: factor of r {r} - factor of r {large}",
                                  "21.5 - 1.9 (wq); above 0", less, 0))
    return markdown(CLAIM_HEADER, rows)


def means_over_blocks(results: list, target: str) -> tuple:
    """Return (factors, shares of random directions), a value per seed: the mean over blocks."""
    columns = []
    for result in results:
        factors, seen = zip(*result["amplified"][target], strict=True)
        columns.append((statistics.mean(factors), statistics.mean(seen)))
    return tuple(zip(*columns, strict=True))


def data_types_table(losses: dict) -> list:
    """Return QLoRA's table 2.  losses: {data type: a loss per part of the text}.

    Each data type is compared with the next one, which the paper has better, and with NF4.
    """
    header = ["data type", "paper, perplexity", "perplexity", "nats per token",
              "above the next row [95 %]", "verdict", "above NF4 [95 %]", "verdict"]
    names = list(losses)
    rows = []
    for name, follower in zip(names, [*names[1:], None], strict=True):
        mean = statistics.mean(losses[name])
        row = [name, str(TABLE_2.get(name, "")), f"{math.exp(mean):.3f}", f"{mean:.4f}"]
        nf4 = claims.NF4 if name in claims.CODEBOOKS else None
        for other in (follower, nf4):
            if other is None:
                row += ["", ""]
                continue
            differences = [a - b for a, b in zip(losses[name], losses[other], strict=True)]
            interval = interval_of(differences)
            judged = verdict(ABOVE, interval) if other in TABLE_2 else "(not in the paper)"
            row += [interval.text(".4f"), judged]
        rows.append(row)
    return markdown(header, rows)


def panels_of(by_rank: dict, measure: Measure) -> list:
    """Return the pictures of rank: by held-out loss and by right answers, a line per seed."""
    panels = []
    for each in (LOSS, measure):
        lines = {"mean": []}
        for (_, r), cells in by_rank.items():
            values = [cell[each.name] * each.factor for cell in cells]
            lines["mean"].append((r, statistics.mean(values)))
            lines.setdefault("lowest seed", []).append((r, min(values)))
            lines.setdefault("highest seed", []).append((r, max(values)))
        if each is RIGHT:
            lines["GPT-3 on WikiSQL (paper)"] = list(TABLE_6.items())
        panels.append(panel(f"{each.title}, by r on wq and wv", "r", each.title, lines))
    return panels


def note(args) -> str:
    n_seeds = "1 seed" if len(args.seeds) == 1 else f"{len(args.seeds)} seeds"
    lr = "train.py's default" if args.lr is None else f"{args.lr:g}"
    return (f"{n_seeds}; ±: the largest distance of a seed from the mean; difference: to the "
            f"reference row, seed by seed, with its 95 % t-interval; about the same: within "
            f"{MARGIN:.0%} of the reference row's mean; learning rate {lr} and alpha 32 in every "
            "row; a difference of at most 0.5 in the paper, its seeds' standard deviation, is "
            "read as about the same")
