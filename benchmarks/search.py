"""Random search over method, targets, r, alpha and learning rate, under a budget of steps.

Successive halving (Jamieson & Talwalkar 2016, algorithm 1, https://arxiv.org/abs/1502.07943), by
thirds: every candidate gets a short run of its own, the best third by held-out loss are trained
again, for three times as many steps, and so on until one is left.  Each round takes an equal part
of the budget.
A run begins anew in each round, since its learning rate falls to zero at its own end.
"""
import math
import random
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

from finetune.arguments import number
from lora.methods import METHODS

from .runs import flag_words
from .tables import Table, list_of, markdown, panel, report, run_fresh
from .training import Task, add_training_flags, finish_run, task_of

TARGETS = ("wq,wv", "wq,wk,wv,wo", "w1,w2,w3", "wq,wk,wv,wo,w1,w2,w3")
# One of this many candidates goes on to the next round, where it gets this many times the steps.
FACTOR = 3


@dataclass(frozen=True)
class Candidate:
    """Settings that are drawn, by the names of train.py's flags."""
    method: str
    targets: str
    r: int
    alpha: int
    lr: float

    def __str__(self):
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Search:
    """Candidates, what they are trained on, and the table that keeps their losses."""
    table: Table
    task: Task
    candidates: list
    seed: int

    def loss_after(self, index: int, steps: int) -> float:
        """Return a candidate's held-out loss after so many steps; infinity if it diverged."""
        candidate = self.candidates[index]
        settings = {"max_steps": steps, "epochs": steps, "seed": self.seed}
        flags = [*self.task.flags(), *flag_words(asdict(candidate) | settings)]
        cell = self.table.cell({"flags": flags}, lambda: run_fresh(train_briefly, flags))
        loss = cell["held_out_loss"]
        if loss is None:                             # JSON has no infinity.
            loss = math.inf
        report(f"{index + 1} of {len(self.candidates)}, {steps} steps, {candidate}: held-out loss "
               f"{loss_text(loss)}")
        return loss

    def command(self, index: int) -> str:
        """Return the command that trains with a candidate's settings."""
        flags = [*self.task.flags(), *flag_words(asdict(self.candidates[index]))]
        return f"python train.py {shlex.join(flags)}"


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--budget", metavar="N", type=number(int, 1), default=1080,
         help="optimizer steps of all runs together (default: 1080)")
    flag("--candidates", metavar="N", type=number(int, 1), default=27,
         help="number of settings that are drawn (default: 27)")
    flag("--methods", metavar="NAME,...", type=list_of(str), default=list(METHODS),
         help="methods to draw from (default: all)")
    flag("--lrs", metavar="LOW,HIGH", type=list_of(number(float, 0, open_low=True)),
         default=[1e-3, 1e-1],
         help="learning rates to draw between, evenly by their logarithm (default: 1e-3,1e-1)")
    flag("--seed", metavar="N", type=number(int, 0), default=0,
         help="random seed of the candidates and of each run (default: 0)")


def train_briefly(argv: list) -> dict:
    """Return {held_out_loss} after a run; None if it was not finite."""
    with tempfile.TemporaryDirectory() as out:
        _, rows = finish_run([*argv, "--out", out, "--overwrite"])
    return {"held_out_loss": rows[-1].get("val_loss")}


def draw_candidates(n: int, seed: int, methods: list, lrs: list) -> list:
    """Return n Candidates; the first ones of a seed are the same whatever n is."""
    source = random.Random(seed)
    low, high = map(math.log, lrs)
    candidates = []
    for _ in range(n):
        r = source.choice([2, 4, 8, 16, 32])
        method = source.choice(methods)
        targets = source.choice(TARGETS)
        alpha = r * source.choice([1, 2, 4])
        lr = float(f"{math.exp(source.uniform(low, high)):.2g}")
        candidates.append(Candidate(method, targets, r, alpha, lr))
    return candidates


def rounds_of(n: int, budget: int) -> list:
    """Return (candidates, steps of each) for every round of a search."""
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // FACTOR))
    return [(size, budget // len(sizes) // size) for size in sizes]


def successive_halving(n: int, budget: int, loss_after: Callable) -> list:
    """Return the ranking of every round: [(loss, index of a candidate)], the lowest loss first.

    loss_after(index, steps): the loss of a new run.
    """
    indices = list(range(n))
    rankings = []
    for size, steps in rounds_of(n, budget):
        ranking = sorted((loss_after(i, steps), i) for i in indices[:size])
        rankings.append(ranking)
        indices = [i for _, i in ranking]
    return rankings


def make(args, table: Table) -> list:
    """Search; return lines of Markdown with the candidates in the order of their success."""
    check_flags(args.methods, args.lrs)
    plan = rounds_of(args.candidates, args.budget)
    if plan[0][1] < 1:
        raise ValueError(f"--budget {args.budget} leaves no step for each of {args.candidates} "
                         f"candidates; {len(plan) * args.candidates} would leave one")
    candidates = draw_candidates(args.candidates, args.seed, args.methods, args.lrs)
    search = Search(table, task_of(args), candidates, args.seed)
    rankings = successive_halving(len(candidates), args.budget, search.loss_after)
    first_round = first_round_panel(args.methods, candidates, rankings[0])
    table.draw([first_round, all_rounds_panel(plan, rankings)])
    total = sum(size * steps for size, steps in plan)
    rounds = ", ".join(f"{size} x {steps}" for size, steps in plan)
    loss, winner = rankings[-1][0]
    advice = "All diverged: try lower --lrs"
    if loss < math.inf:
        advice = f"To train with the best: {search.command(winner)}"
    header = ["", *asdict(candidates[0]), "steps", "held-out loss"]
    return [*markdown(header, rows_of(candidates, plan, rankings)), "",
            f"({total} steps in all: {rounds}. {advice})"]


def check_flags(methods: list, lrs: list):
    unknown = set(methods) - set(METHODS)
    if unknown:
        raise ValueError(f"--methods {', '.join(sorted(unknown))}: choose from "
                         f"{', '.join(METHODS)}")
    if len(lrs) != 2 or lrs[0] > lrs[1]:
        raise ValueError("--lrs takes two numbers, the lower one first")


def rows_of(candidates: list, plan: list, rankings: list) -> list:
    """Return a row per candidate: those of the last round first, each with its last loss."""
    rows = []
    listed_indices = set()
    for (_, steps), ranking in zip(reversed(plan), reversed(rankings), strict=True):
        for loss, i in ranking:
            if i not in listed_indices:
                listed_indices.add(i)
                settings = [str(value) for value in asdict(candidates[i]).values()]
                rows.append([str(len(rows) + 1), *settings, str(steps), loss_text(loss)])
    return rows


def loss_text(loss: float) -> str:
    return f"{loss:.4f}" if loss < math.inf else "diverged"


def loss_point(loss: float) -> float | None:
    """Return the loss as a picture takes it: None is drawn as a cross."""
    return loss if loss < math.inf else None


def first_round_panel(methods: list, candidates: list, ranking: list):
    """Return a panel with a line per method, over the learning rate."""
    lines = {method: [] for method in methods}
    for loss, i in sorted(ranking, key=lambda entry: candidates[entry[1]].lr):
        lines[candidates[i].method].append((candidates[i].lr, loss_point(loss)))
    lines = {method: points for method, points in lines.items() if points}
    return panel("Every candidate after the first round", "learning rate", "held-out loss", lines)


def all_rounds_panel(plan: list, rankings: list):
    """Return a panel of the best and the median candidate of each round."""
    lines = {"best": [], "median": []}
    for (_, steps), ranking in zip(plan, rankings, strict=True):
        lines["best"].append((steps, loss_point(ranking[0][0])))
        lines["median"].append((steps, loss_point(ranking[len(ranking) // 2][0])))
    return panel("Best and median candidate of each round", "steps per run", "held-out loss", lines)
