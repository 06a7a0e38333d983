"""Random search over method, targets, r, alpha and learning rate under a budget of steps; weak candidates stop early.

Successive halving (Jamieson & Talwalkar 2016, algorithm 1), by thirds: every candidate gets a short run of its own, the
third with the lowest held-out loss one three times as long, and so on, until one is left.  Each round takes an equal part
of the budget.  A run is begun anew each time, since its learning rate falls to zero at its own end.
"""
import math
import random
import shlex
import sys
import tempfile

from finetune.arguments import number
from lora.adapter import METHODS

from .runs import add_training_flags, finished, training_flags
from .tables import cell, fresh, listed, markdown, picture

TARGETS = "wq,wv", "wq,wk,wv,wo", "w1,w2,w3", "wq,wk,wv,wo,w1,w2,w3"
KEEP = 3                                                          # of so many one goes on, with so many times the steps


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--budget", metavar="N", type=number(int, 1), default=1080, help="optimizer steps of all runs together (default: 1080)")
    flag("--candidates", metavar="N", type=number(int, 1), default=27, help="settings that are drawn (default: 27)")
    flag("--methods", metavar="NAME,...", type=listed(str), default=list(METHODS), help="to draw from (default: all)")
    flag("--lrs", metavar="LOW,HIGH", type=listed(number(float, 0, open_low=True)), default=[1e-3, 1e-1],
         help="learning rates to draw between, evenly by their logarithm (default: 1e-3,1e-1)")
    flag("--seed", metavar="N", type=number(int, 0), default=0, help="of what is drawn, and of each run (default: 0)")


def drawn(n, seed, methods, lrs):
    """n settings {method, targets, r, alpha, lr}, the same for a seed whatever n is."""
    chance, low, high = random.Random(seed), *map(math.log, lrs)
    candidates = []
    for _ in range(n):
        r = chance.choice([2, 4, 8, 16, 32])
        candidates.append(dict(method=chance.choice(methods), targets=chance.choice(TARGETS), r=r, alpha=r * chance.choice([1, 2, 4]),
                               lr=float(f"{math.exp(chance.uniform(low, high)):.2g}")))
    return candidates


def rounds(n, budget):
    """[(candidates, steps each)] of every round; the budget divided by what is to be done."""
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // KEEP))
    return [(size, budget // len(sizes) // size) for size in sizes]


def halved(candidates, budget, loss_after):
    """[[(loss, index of the candidate)], best first] of every round.  loss_after(index, steps): lower is better."""
    left, found = range(len(candidates)), []
    for size, steps in rounds(len(candidates), budget):
        found.append(sorted((loss_after(i, steps), i) for i in left[:size]))
        left = [i for _, i in found[-1]]
    return found


def held_out_loss(argv):
    """{held_out_loss} after a run, None if it was not finite."""
    with tempfile.TemporaryDirectory() as out:
        _, rows = finished([*argv, "--out", out, "--overwrite"])
    return dict(held_out_loss=rows[-1].get("val_loss"))


def make(args):
    if unknown := set(args.methods) - set(METHODS):
        raise ValueError(f"--methods {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}")
    if len(args.lrs) != 2 or args.lrs[0] > args.lrs[1]:
        raise ValueError("--lrs wants two numbers, the lower one first")
    plan, base = rounds(args.candidates, args.budget), training_flags(args)
    if plan[0][1] < 1:
        raise ValueError(f"--budget {args.budget} leaves {args.candidates} candidates no step each; {len(plan) * args.candidates} would one")
    candidates = drawn(args.candidates, args.seed, args.methods, args.lrs)

    def loss_after(i, steps):
        flags = [*base, *(word for name, value in candidates[i].items() for word in (f"--{name}", f"{value}")),
                 "--max-steps", str(steps), "--epochs", str(steps), "--seed", str(args.seed)]
        loss = cell(args, {"flags": flags}, lambda: fresh(held_out_loss, flags))["held_out_loss"]
        said = ", ".join(f"{name} {value}" for name, value in candidates[i].items())
        print(f"{i + 1} of {len(candidates)}, {steps} steps, {said}: held-out loss {loss if loss is None else f'{loss:.4f}'}",
              file=sys.stderr, flush=True)
        return math.inf if loss is None else loss                 # JSON has no infinity: it diverged
    found = halved(candidates, args.budget, loss_after)
    rows, seen = [], set()
    for (_, steps), ranking in reversed([*zip(plan, found)]):
        for loss, i in ranking:
            if i not in seen:
                seen.add(i)
                rows.append([str(len(rows) + 1), *(f"{value}" for value in candidates[i].values()), str(steps),
                             f"{loss:.4f}" if loss < math.inf else "diverged"])

    def drawn_as(loss):
        return loss if loss < math.inf else None                  # a cross
    by_lr = sorted((candidates[i]["lr"], candidates[i]["method"], loss) for loss, i in found[0])
    first = {method: [(lr, drawn_as(loss)) for lr, own, loss in by_lr if own == method] for method in args.methods}
    picture(args, [("the first round", "learning rate", "held-out loss", {method: line for method, line in first.items() if line}),
                   ("every round", "steps of a run", "held-out loss", {
                       which: [(steps, drawn_as(ranking[len(ranking) * part // 2][0])) for (_, steps), ranking in zip(plan, found)]
                       for which, part in (("best", 0), ("median", 1))})])
    (loss, winner), = found[-1]
    best = candidates[winner]
    then = shlex.join([*base, *(word for name, value in best.items() for word in (f"--{name}", f"{value}"))])
    return [*markdown(["", *best, "steps", "held-out loss"], rows), "",
            f"({sum(size * steps for size, steps in plan)} steps in all: {', '.join(f'{size} x {steps}' for size, steps in plan)}. "
            + (f"The best goes on with: python train.py {then})" if loss < math.inf else "All diverged: try lower --lrs)")]
