"""The LoRA family: each method at its own best learning rate, and all at LoRA's."""
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import torch

import train
from finetune.answers import ANSWERED_AT_ONCE
from finetune.dataset import encode_prompt
from finetune.examples import read_examples
from finetune.folder import ADAPTER
from finetune.job import load_model, prepare
from finetune.memory import MIB, largest_batch_rows
from finetune.ranks import SINGLE_PROCESS
from llama.sampling import generate as generate_ids
from lora import merge_lora
from lora.methods import METHODS
from lora.prepack import prepack

from . import sweep
from .measure import count_work
from .runs import flag_words, seconds_of
from .sweep import Sweep, difference, forgotten, quality, share_right
from .tables import ROOT, Table, markdown, panel, run_fresh
from .training import Task, finish_run, load_answering_model, run_flags

FILES = [ROOT / "benchmarks/sweep.py", ROOT / "benchmarks/claims.py"]
LORA = "lora"
# A row's name, and the flags of train.py that it stands for.
FAMILY = {method: {"method": method} for method in METHODS}
FAMILY |= {"lora, LoRA+ 4": {"lora_plus_ratio": 4},
           "lora, PiSSA": {"method_options": "start=pissa"},
           "lora, OLoRA": {"method_options": "start=olora"}}
COST_HEADER = ["method", "train, examples/s", "generate, tokens/s", "generate merged, tokens/s",
               "kept for backward, MiB"]
TIMED_TOKENS = 32                                    # per answer, where speed is measured
PUBLISHED = ("Published: nine variants and LoRA end within 1 to 2 % of each other (arXiv "
             "2602.04998).")


def add_flags(parser):
    sweep.add_flags(parser, seeds=[0, 1, 2])


def measure_cost(argv: list, task: Task) -> list:
    """Run train.py; return [examples/s, tokens/s, tokens/s merged, MiB kept for backward].

    The tokens are those of greedy answers, with the adapter and with it merged into the weights.
    Raises ValueError if the run leaves no adapter.
    """
    with tempfile.TemporaryDirectory() as out:
        options, rows = finish_run([*argv, "--out", out, "--overwrite"])
        adapter = Path(out) / ADAPTER
        if not adapter.exists():
            raise ValueError("the run that is timed diverged, and the same run before did not")
        job = prepare(options, SINGLE_PROCESS, train.build_optimizer)
        shapes, _ = load_model(job, torch.device("cpu"), "random")
        batch = job.collate(largest_batch_rows(job.train_set, job.plan))
        work = count_work(shapes, [batch], contextlib.nullcontext())
        flags = {"adapter": adapter, "precision": task.precision}
        model, tokenizer = load_answering_model(flag_words(flags))
    examples = read_examples(task.questions)[:ANSWERED_AT_ONCE]
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    speeds = [rows[-1]["epoch"] * len(job.train_set) / seconds_of(rows)]
    speeds.append(generating_speed(model, prompts))
    merge_lora(model)
    prepack(model)                                   # as generate.py --merge does
    speeds.append(generating_speed(model, prompts))
    return [*speeds, (work["copies"] + work["activations"]) / MIB]


def generating_speed(model, prompts: list) -> float:
    """Return the tokens per second of answers that do not end at eos.

    It is the median of three rounds, after one to warm up.
    """
    no_eos = -1
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        n_tokens = sum(1 for _ in generate_ids(model, prompts, TIMED_TOKENS, no_eos))
        seconds.append(time.perf_counter() - began)
    return n_tokens / statistics.median(seconds[1:])


def make(args, table: Table) -> list:
    """Sweep each method's learning rates, then measure its speed; return lines of Markdown."""
    settings = {name: run_flags(args) | flags for name, flags in FAMILY.items()}
    with sweep.sweeping(args, table) as runs:
        base_loss = runs.base_loss()
        curves = {name: runs.curve(name, flags) for name, flags in settings.items()}
        common = curves[LORA].rate
        at_common = {}
        for name, flags in settings.items():
            at_common[name] = runs.results(name, flags, [common], runs.seeds)[common]
        costs = {}
        for name, curve in curves.items():
            if share_right(curve.best) is not None:
                costs[name] = cost_of(runs, settings[name] | {"lr": curve.rate})
    losses = {name: curve.losses for name, curve in curves.items()}
    table.draw([sweep.losses_panel("Held-out loss by learning rate", losses),
                panel("Held-out answers right to the letter, each method at its best rate", "",
                      "share of answers",
                      {"mean of the seeds": [(name, share_right(curve.best))
                                             for name, curve in curves.items()]})])
    at_best = {name: curve.best for name, curve in curves.items()}
    return [*quality_table(curves, at_common, base_loss), "",
            range_of("Each at its own best rate", at_best),
            range_of(f"All at {common:g}", at_common), PUBLISHED, "",
            *cost_table(costs), "", note(args)]


def quality_table(curves: dict, at_common: dict, base_loss: float | None) -> list:
    """Return the table of each method at its own best rate, and of its results at LoRA's."""
    reference = curves[LORA]
    header = ["method", "trained", "best rate", "held-out loss", "right to the letter",
              "forgotten, nats per token", "loss, difference to lora [95 %]",
              f"at {reference.rate:g}: held-out loss", f"at {reference.rate:g}: right"]
    rows = []
    for name, curve in curves.items():
        above_lora = "" if name == LORA else difference(curve.best, reference.best)
        rows.append([name, f"{curve.best[0]['parameters']:,}", curve.rate_text,
                     *quality(curve.best), forgotten(curve.best, base_loss), above_lora,
                     *quality(at_common[name])])
    return markdown(header, rows)


def range_of(where: str, results: dict) -> str:
    """Return a sentence about the best and the worst method; results: {name: by seed}."""
    shares = {name: share_right(by_seed) for name, by_seed in results.items()}
    diverged = [name for name, share in shares.items() if share is None]
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return f"{where}: all diverged."
    best = max(known, key=known.get)
    worst = min(known, key=known.get)
    points = 100 * (known[best] - known[worst])
    return (f"{where}: right answers from {known[worst]:.1%} ({worst}) to {known[best]:.1%} "
            f"({best}), {points:.1f} points apart; diverged: {', '.join(diverged) or 'none'}.")


def cost_of(runs: Sweep, flags: dict) -> list:
    """Return what `measure_cost` finds in a run with these flags and the first seed, as a cell."""
    argv = [*runs.task.flags(), *flag_words(flags | {"seed": runs.seeds[0]})]
    return runs.table.cell({"cost of": argv}, lambda: run_fresh(measure_cost, argv, runs.task))


def cost_table(costs: dict) -> list:
    """Return the table of what each method costs; costs: {name: what measure_cost returns}."""
    rows = []
    for name, (*speeds, kept) in costs.items():
        rows.append([name, *(f"{speed:,.0f}" for speed in speeds), f"{kept:.2f}"])
    return markdown(COST_HEADER, rows)


def note(args) -> str:
    return (f"({sweep.note(args)}; speeds: of one run, so compare them only if they were measured "
            "on a quiet machine)")
