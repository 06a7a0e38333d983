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
from finetune.preflight import MIB, largest_batch_rows
from finetune.ranks import SINGLE_PROCESS
from finetune.run import ADAPTER
from llama.sampling import generate as generate_ids
from lora import merge_lora
from lora.methods import METHODS

from . import sweep
from .measure import count_work
from .runs import flag_words, seconds_of
from .sweep import Sweep, difference, forgotten, quality
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
            raise ValueError("a run diverged before its first save: give lower --lrs")
        job = train.prepare(options, SINGLE_PROCESS)
        shapes, _ = train.load_model(job, torch.device("cpu"), "random")
        batch = job.collate(largest_batch_rows(job.train_set, job.plan))
        work = count_work(shapes, [batch], contextlib.nullcontext())
        flags = {"adapter": adapter, "precision": task.precision}
        model, tokenizer = load_answering_model(flag_words(flags))
    examples = read_examples(task.questions)[:ANSWERED_AT_ONCE]
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    speeds = [rows[-1]["epoch"] * len(job.train_set) / seconds_of(rows)]
    speeds.append(generating_speed(model, prompts))
    merge_lora(model)
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
            at_common |= {name: runs.results(name, flags, [common], runs.seeds)[common]}
        costs = {}
        for name, curve in curves.items():
            if curve.share_right is not None:
                costs[name] = cost_of(runs, settings[name] | {"lr": curve.rate})
    table.draw([panel("Held-out loss by learning rate", "learning rate", "nats per answer token",
                      {name: curve.losses for name, curve in curves.items()}),
                panel("Held-out answers right to the letter, each method at its best rate", "",
                      "share of answers",
                      {"mean of the seeds": [(name, curve.share_right)
                                             for name, curve in curves.items()]})])
    return [*quality_table(curves, at_common, base_loss), "", distance(curves), "",
            *cost_table(costs), "", note(args)]


def quality_table(curves: dict, at_common: dict, base_loss: float | None) -> list:
    """Return the table of each method at its own best rate, and of its results at LoRA's."""
    reference = curves[LORA]
    header = ["method", "trained", "best rate", "held-out loss", "right to the letter",
              "loss, difference to lora [95 %]", f"at {reference.rate:g}: held-out loss",
              "right to the letter", "forgotten, nats per token"]
    rows = []
    for name, curve in curves.items():
        distance_to_lora = "" if name == LORA else difference(curve.best, reference.best, "loss")
        rows.append([name, f"{curve.best[0]['parameters']:,}", curve.rate_text,
                     *quality(curve.best), distance_to_lora, *quality(at_common[name]),
                     forgotten(curve.best, base_loss)])
    return markdown(header, rows)


def distance(curves: dict) -> str:
    """Return a sentence about the best and the worst method, each at its own best rate."""
    shares = {name: curve.share_right for name, curve in curves.items()
              if curve.share_right is not None}
    if not shares:
        return "All methods diverged."
    best = max(shares, key=shares.get)
    worst = min(shares, key=shares.get)
    return (f"Right answers range from {shares[worst]:.1%} ({worst}) to {shares[best]:.1%} "
            f"({best}). Nine methods of arXiv 2602.04998 end within 1 to 2 % of each other.")


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
    """Return what the tables leave out."""
    return (f"{sweep.note(args)}; speeds: of "
            "one run, so compare them on a quiet machine only)")
