"""The best learning rate of a setting, by held-out loss.

The first seed tries all rates.  If the best one is the lowest or the highest, the next one of the
series 1, 2, 5, 10, ... is tried too, until a worse one stands on both sides.  Then all seeds try
the best rate and its two neighbours, and more in the same way; the lowest mean decides.
"""
import math
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import train
from finetune.arguments import number, text
from finetune.evaluate import score_answers
from finetune.exam import BrokenWeights, Exam
from finetune.examples import read_examples
from finetune.folder import ADAPTER
from finetune.forgetting import OtherText
from finetune.job import prepare
from finetune.options import DEMO, is_demo
from finetune.pictures import Panel
from finetune.ranks import SINGLE_PROCESS
from llama.checkpoint import PARAMS

from .claims import interval_of
from .runs import flag_words
from .tables import (
    CellRun,
    Table,
    add_processes_flag,
    list_of,
    measure_side_by_side,
    run_fresh,
    spread,
    worker_processes,
)
from .training import (
    Task,
    add_run_flags,
    add_training_flags,
    examine,
    finish_run,
    load_answering_model,
    new_prose,
    task_of,
    values_of,
)

FIRST_RATES = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
MOST_RATES = 14                                      # of a setting, unless --lrs has more
PROSE_EXAMPLES = 400                                 # of other text over the demo's base


# ---- Runs -------------------------------------------------------------------

@dataclass(frozen=True)
class Sweep:
    """What the runs of all settings have in common.

    rates: learning rates to begin with.  also: file of other text; None for the demo's prose.
    pool: the processes that train, as many as n_processes.
    """
    table: Table
    task: Task
    rates: list
    seeds: list
    also: str | None
    pool: ProcessPoolExecutor
    n_processes: int

    def curve(self, name: str, flags: dict) -> "Curve":
        """Find the best learning rate of a setting.  flags: train.py's."""
        survey = self.widened(name, flags, self.rates, self.seeds[:1])
        near = neighbours(list(survey), best_rate(survey))
        return Curve(survey, self.widened(name, flags, near, self.seeds))

    def widened(self, name: str, flags: dict, rates: list, seeds: list) -> dict:
        """Return {rate: results}, in the order of the rates, until the best one is bracketed."""
        results = {}
        while rates:
            results |= self.results(name, flags, rates, seeds)
            results = dict(sorted(results.items()))
            rates = rates_to_add(results)
        return results

    def results(self, name: str, flags: dict, rates: list, seeds: list) -> dict:
        """Return {rate: [what `train_and_score` finds with each seed]}."""
        runs = {}
        for rate, seed in product(rates, seeds):
            argv = [*self.task.flags(), *flag_words(flags | {"lr": rate, "seed": seed})]
            settings = {"flags": argv, "questions": self.task.questions, "also": self.also}
            runs[rate, seed] = CellRun(f"{name}, lr {rate:g}, seed {seed}", settings,
                                       train_and_score, (argv, self.task, self.also))
        measure_side_by_side(self.table, list(runs.values()), self.pool, self.n_processes)
        found = {rate: [] for rate in rates}
        for (rate, _), run in runs.items():
            found[rate].append(self.table.cell(run.settings, None))
        return found

    def base_loss(self) -> float | None:
        """Return the base's loss on the other text, a cell; None if there is no such text."""
        settings = {"base": self.task.checkpoint, "precision": self.task.precision,
                    "also": self.also}
        base = flag_words({"checkpoint": self.task.checkpoint or DEMO, "adapter": "none",
                           "precision": self.task.precision})
        return self.table.cell(settings, lambda: run_fresh(loss_on_other, base, self.task,
                                                           self.also))


def add_flags(parser, seeds: list):
    """Add the flags of a Sweep and of its runs; seeds: the default."""
    add_training_flags(parser)
    add_run_flags(parser)
    flag = parser.add_argument
    flag("--seeds", metavar="N,...", type=list_of(number(int, 0)), default=seeds,
         help=f"random seeds, one run each (default: {','.join(map(str, seeds))})")
    flag("--lrs", metavar="F,...", type=list_of(number(float, 0, open_low=True)),
         default=FIRST_RATES,
         help="learning rates to begin with; if the best one is the lowest or the highest, more "
              f"are tried (default: {','.join(f'{rate:g}' for rate in FIRST_RATES)})")
    add_processes_flag(parser)
    flag("--also", metavar="FILE", type=text,
         help='other text, rows of {"text": ...}, for what an adapter forgets (default: new prose '
              "of the demo's world; with --checkpoint nothing is measured)")


@contextmanager
def sweeping(args, table: Table) -> Iterator[Sweep]:
    """Give the Sweep of these flags.  Raises ValueError."""
    for name, values in (("--seeds", args.seeds), ("--lrs", args.lrs)):
        if len(values) > len(set(values)):
            raise ValueError(f"{name} names a value twice; its runs would be the same")
    task = task_of(args)
    read_examples(task.questions)                    # Refuse a wrong file before the first run.
    with worker_processes(args.processes) as pool:
        yield Sweep(table, task, args.lrs, args.seeds, args.also, pool, args.processes)


def train_and_score(argv: list, task: Task, also: str | None) -> dict:
    """Run train.py; return {parameters, loss, exact_match, other_loss} of what it leaves.

    parameters: the trained ones.  exact_match: the share of answers that are right to the letter.
    All but the parameters are None if the run diverged: it leaves no result, because its last
    steps were skipped, or one whose logits are not numbers.  other_loss is None if there is no
    other text.
    """
    with tempfile.TemporaryDirectory() as out:
        options, _ = finish_run([*argv, "--out", out, "--overwrite"])
        job = prepare(options, SINGLE_PROCESS, train.build_optimizer)
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
        found = {"parameters": trained, "loss": None, "exact_match": None, "other_loss": None}
        flags = {"precision": task.precision}
        if (Path(out) / ADAPTER).exists():
            flags["adapter"] = Path(out) / ADAPTER
        elif (Path(out) / PARAMS).exists():          # of --method full
            # Its weights are in fp32; 16 bits would round most updates away.
            flags = {"checkpoint": out, "adapter": "none", "precision": "fp32"}
        else:
            return found
        words = flag_words(flags)
        try:
            values = examine(words, read_examples(task.questions))
        except BrokenWeights:                        # The run diverged in its last steps.
            return found
        return found | {"loss": finite(values["loss"]), "exact_match": values["exact_match"],
                        "other_loss": loss_on_other(words, task, also)}


def loss_on_other(flags: list, task: Task, also: str | None) -> float | None:
    """Return the loss in nats per token on other text, None without; flags: generate.py's."""
    if not is_demo(task.checkpoint or DEMO) and not also:
        return None
    model, tokenizer = load_answering_model(flags)
    context = model.args.max_seq_len
    if also:
        rows = OtherText(also, tokenizer, context).rows
    else:
        rows = Exam(new_prose(1000, PROSE_EXAMPLES), tokenizer, context).rows
    return finite(values_of(score_answers(model, rows))["loss"])


def finite(value: float) -> float | None:
    """Return the value, or None for infinity and NaN, which JSON does not know."""
    return value if math.isfinite(value) else None


# ---- Learning rates ---------------------------------------------------------

@dataclass(frozen=True)
class Curve:
    """A setting's results, {learning rate: results by seed}.

    survey: the first seed's at all rates.  near: all seeds' at the best rate and around it.
    """
    survey: dict
    near: dict

    @property
    def losses(self) -> list:
        """Return [(rate, held-out loss)] of the first seed; None where the run diverged."""
        return [(rate, result["loss"]) for rate, (result,) in self.survey.items()]

    @property
    def rate(self) -> float:
        """The best learning rate."""
        return best_rate(self.near)

    @property
    def best(self) -> list:
        """Return the results at the best rate, one per seed."""
        return self.near[self.rate]

    @property
    def is_bracketed(self) -> bool:
        """Whether a worse rate stands on both sides of the best one."""
        return min(self.near) < self.rate < max(self.near)

    @property
    def rate_text(self) -> str:
        return f"{self.rate:g}{'' if self.is_bracketed else ' (at an end)'}"


def loss_of(result: dict) -> float:
    """Return the held-out loss; infinity if the run diverged."""
    return math.inf if result["loss"] is None else result["loss"]


def mean_loss(results: list) -> float:
    return statistics.mean(map(loss_of, results))


def share_right(results: list) -> float | None:
    """Return the mean share of answers that are right to the letter; None if a seed diverged."""
    if math.isinf(mean_loss(results)):
        return None
    return statistics.mean(result["exact_match"] for result in results)


def best_rate(results: dict) -> float:
    """Return the rate of the lowest mean held-out loss."""
    return min(results, key=lambda rate: mean_loss(results[rate]))


def neighbours(rates: list, best: float) -> list:
    """Return the best of some rates in order, with the one before and the one after it."""
    i = rates.index(best)
    return rates[max(0, i - 1):i + 2]


def rates_to_add(results: dict) -> list:
    """Return the next rate beyond the best one if that is the lowest or the highest, else none."""
    best = best_rate(results)
    if len(results) >= MOST_RATES or math.isinf(mean_loss(results[best])):
        return []
    rates = []
    if best == min(results):
        rates.append(next_rate(best, -1))
    if best == max(results):
        rates.append(next_rate(best, 1))
    return rates


def next_rate(rate: float, direction: int) -> float:
    """Return the next number of the series 1, 2, 5, 10, ..., upwards (1) or downwards (-1)."""
    exponent = math.floor(math.log10(rate))
    series = []
    for power in (exponent - 1, exponent, exponent + 1):
        series += [float(f"{digit}e{power}") for digit in (1, 2, 5)]
    if direction > 0:
        return min(value for value in series if value > rate)
    return max(value for value in series if value < rate)


# ---- Columns and panels of a table ------------------------------------------

def quality(results: list) -> list:
    """Return [held-out loss, right to the letter] over the seeds, as text."""
    n_diverged = sum(loss_of(result) == math.inf for result in results)
    if n_diverged:
        return [f"diverged, {n_diverged} of {len(results)} seeds", ""]
    return [spread(map(loss_of, results), ".3f"),
            spread([result["exact_match"] for result in results], ".1%")]


def forgotten(results: list, base_loss: float | None) -> str:
    """Return how far the loss on other text is above the base's, over the seeds, as text."""
    losses = [result["other_loss"] for result in results]
    if base_loss is None or None in losses:
        return ""
    return spread([loss - base_loss for loss in losses], ".3f")


def difference(results: list, reference: list) -> str:
    """Return the mean difference of the losses and its 95 % interval, seed by seed, as text."""
    values = [(a["loss"], b["loss"]) for a, b in zip(results, reference, strict=True)]
    if None in chain(*values):
        return ""
    return interval_of([a - b for a, b in values]).text(".3f")


def losses_panel(title: str, lines: dict) -> Panel:
    """Return the panel of {setting: Curve.losses}."""
    return Panel(title, "learning rate", "nats per answer token", lines, log_y=True)


def note(args) -> str:
    """Return how the rates were chosen, and what the numbers are."""
    n_seeds = "1 seed" if len(args.seeds) == 1 else f"{len(args.seeds)} seeds"
    return (f"{n_seeds}; best rate: seed {args.seeds[0]} tries {len(args.lrs)} rates from "
            f"{min(args.lrs):g} to {max(args.lrs):g} and, if an outer one is best, more; then all "
            "seeds try the best one and its neighbours, and the lowest mean held-out loss decides. "
            "The same examples and seeds choose the rate and give the numbers, so the best results "
            "are too good by an unknown amount, and intervals are for the chosen rates; ±: the "
            "largest distance of a seed from the mean; forgotten: how far the loss on other text "
            "is above the base's")
