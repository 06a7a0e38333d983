"""Accumulation x precision x LoRA x checkpointing: speed, memory by kind, and computation."""
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from finetune.memory import MIB, mib

from . import runs
from .measure import flop_per_token
from .runs import Setup, Workload, completed, make_setup, measure_cell, peak_of
from .tables import Table, markdown, panel

UP = "↑"
DOWN = "↓"
SAME = "–"
PHASES = ("weights", "forward", "backward", "step")
HEADER = ["trained", "precision", "micro-batches x examples", "checkpointing", "seconds per step",
          "tokens/s", "peak, MiB", "estimate, MiB", "peak of weights", "forward", "backward",
          "step"]
TABLE_1_NOTE = (
    "What each technique does. Bytes are those that autograd and the optimizer hold; activations "
    "are what the largest micro-batch keeps for backward. In brackets is the arrow of a student "
    "report (unpublished), where it has one, in bold where the measured one differs; what the "
    "report calls computation is read as FLOP:")


@dataclass(frozen=True)
class Variant:
    """A cell of the ablation.  precision: "fp32", "autocast" or "16 bit", also for the weights."""
    method: str
    precision: str
    accumulates: bool = False
    checkpoints: bool = False

    @property
    def curve(self) -> str:
        return f"{self.method}, {self.precision}"

    @property
    def x_label(self) -> str:
        name = "accumulated" if self.accumulates else "at once"
        return f"{name}, checkpointing" if self.checkpoints else name


@dataclass(frozen=True)
class Change:
    """What a technique changes: a variant without it and one with it.

    report: its name among the arrows of the report.
    """
    before: Variant
    after: Variant
    report: str


@dataclass(frozen=True)
class Kind:
    """A kind of cost as Table 1 shows it: its unit, and which relative difference is noise."""
    unit: str
    size: float
    form: str
    noise: float


FULL = Variant("full", "fp32")
LORA = Variant("lora", "fp32")
CHANGES = {
    "gradient accumulation": Change(FULL, Variant("full", "fp32", accumulates=True),
                                    "gradient accumulation"),
    "checkpointing": Change(FULL, Variant("full", "fp32", checkpoints=True), "checkpointing"),
    "mixed precision (autocast)": Change(FULL, Variant("full", "autocast"), "mixed precision"),
    "LoRA": Change(FULL, LORA, "LoRA"),
    "mixed precision (autocast) over LoRA": Change(LORA, Variant("lora", "autocast"),
                                                   "mixed precision"),
    "frozen weights in 16 bit under LoRA": Change(LORA, Variant("lora", "16 bit"),
                                                  "mixed precision"),
}
# The arrows in Table 1 of an unpublished student report.
REPORT = {
    "gradient accumulation": {"activations": DOWN},
    "checkpointing": {"activations": DOWN, "FLOP per token": UP},
    "mixed precision": {"parameters": DOWN, "optimizer": SAME, "activations": DOWN,
                        "FLOP per token": DOWN},
    "LoRA": {"parameters": UP, "gradients": DOWN, "optimizer": DOWN, "FLOP per token": DOWN},
}
REASONS = {
    ("mixed precision", "parameters", UP):
        "autocast leaves fp32 weights as they are and keeps a 16-bit copy of each matrix until "
        "backward; a frozen base can be held in 16 bit instead",
    ("mixed precision", "FLOP per token", SAME):
        "there are as many products, each faster where the hardware has 16-bit units",
}
KINDS = {
    "parameters": Kind("MiB", MIB, ",.1f", 0.001),
    "gradients": Kind("MiB", MIB, ",.1f", 0.001),
    "optimizer": Kind("MiB", MIB, ",.1f", 0.001),
    "activations": Kind("MiB", MIB, ",.1f", 0.001),
    "forward": Kind("MFLOP", 1e6, ",.1f", 0.001),
    "FLOP per token": Kind("MFLOP", 1e6, ",.1f", 0.001),
    "time per step": Kind("s", 1, ",.2f", 0.1),
}


def add_flags(parser):
    runs.add_flags(parser, batch_size=4, warm=1, steps=1, repeats=3)


def make(args, table: Table) -> list:
    """Measure every variant; return lines of Markdown: all of them, then Table 1."""
    setup = make_setup(args, table.out)
    half_precision = "fp16" if setup.precision == "fp16" else "bf16"
    results = {}
    rows = []
    for variant in variants():
        workload = workload_of(setup, variant, args.batch_size, half_precision)
        name = f"{variant.curve}, {variant.x_label}"
        results[variant] = measure_cell(table, name, workload)
        rows.append(row_of(variant, results[variant], args.batch_size, half_precision))
    table.draw([
        variants_panel("Peak memory above the bare process", "MiB", results, added_peak),
        variants_panel("Training speed", "tokens/s", results,
                       lambda result: result["tokens_per_second"])])
    table_1, differences = make_table_1(results)
    header = ["", *(f"{name}, {kind.unit}" for name, kind in KINDS.items())]
    return [*markdown(HEADER, rows), "", note(results), "", TABLE_1_NOTE, "",
            *markdown(header, table_1), "", *(f"- {line}" for line in differences)]


def variants() -> list:
    """Return every Variant; what is trained is held in fp32, so full never in 16 bit."""
    both = (False, True)
    combinations = product(("full", "lora"), ("fp32", "autocast", "16 bit"), both, both)
    every = [Variant(*combination) for combination in combinations]
    return [variant for variant in every if variant.curve != "full, 16 bit"]


def workload_of(setup: Setup, variant: Variant, batch_size: int, half_precision: str) -> Workload:
    """Return a variant's Workload; half_precision: the 16-bit one."""
    micro_batch, n_micro_batches = shape_of_step(variant, batch_size)
    flags = {"method": variant.method,
             "precision": "fp32" if variant.precision == "fp32" else half_precision,
             "batch_size": micro_batch, "accumulation_steps": n_micro_batches,
             "checkpointing": variant.checkpoints}
    # train.py autocasts full fine-tuning by itself.
    autocast = variant.method == "lora" and variant.precision == "autocast"
    return setup.workload(flags, autocast=autocast, count=True)


def shape_of_step(variant: Variant, batch_size: int) -> tuple[int, int]:
    """Return (examples per micro-batch, micro-batches per step)."""
    return (1, batch_size) if variant.accumulates else (batch_size, 1)


def row_of(variant: Variant, result: dict, batch_size: int, half_precision: str) -> list:
    """Return a variant's row of HEADER."""
    precisions = {"fp32": "fp32", "autocast": f"{half_precision} by autocast",
                  "16 bit": f"{half_precision}, weights too"}
    micro_batch, n_micro_batches = shape_of_step(variant, batch_size)
    row = [variant.method, precisions[variant.precision], f"{n_micro_batches} x {micro_batch}",
           "yes" if variant.checkpoints else "no"]
    estimate = mib(sum(result["estimate"].values()))
    if not completed(result):
        return [*row, "", "", "out of memory", estimate, *[""] * len(PHASES)]
    row += [f"{result['seconds']:.2f}", f"{result['tokens_per_second']:,.0f}",
            f"{added_peak(result):,.0f}", estimate]
    for phase in PHASES:
        has_phase = phase in result["peaks"]
        row.append(f"{added_peak(result, phase):,.0f}" if has_phase else "")
    return row


def added_peak(result: dict, phase: str = "process") -> float:
    """Return the MiB at a phase's peak above those of the process before its weights."""
    return peak_of(result, phase) - result["peaks"].get("start", 0.0)


def variants_panel(title: str, y: str, results: dict, measure: Callable):
    """Return a panel with a line per method and precision; measure(result) is what it shows."""
    lines = {}
    for variant, result in results.items():
        if completed(result):
            points = lines.setdefault(variant.curve, [])
            points.append((variant.x_label, measure(result)))
    return panel(title, "", y, lines)


def note(results: dict) -> str:
    text = "estimate: by finetune/memory.py, of tensors alone"
    all_peaks = [result["peaks"] for result in results.values() if completed(result)]
    starts = [peaks["start"] for peaks in all_peaks if "start" in peaks]
    if starts:
        text = (f"peaks are without the {statistics.median(starts):,.0f} MiB of the process before "
                f"its weights; {text}")
    return f"({text})"


def make_table_1(results: dict) -> tuple[list, list]:
    """Return (rows, sentences): what each technique does, and where the report's arrow differs.

    results: {Variant: result}.  The figures are estimates if one of two runs was out of memory.
    """
    rows = []
    differences = []
    for technique, change in CHANGES.items():
        is_counted = completed(results[change.before]) and completed(results[change.after])
        before = costs_of(change.before, results[change.before], is_counted)
        after = costs_of(change.after, results[change.after], is_counted)
        row = [technique if is_counted else f"{technique} (by estimate)"]
        for name, kind in KINDS.items():
            if name not in before:
                row.append("")
                continue
            arrow = arrow_of(before[name], after[name], kind.noise)
            expected = REPORT[change.report].get(name)
            row.append(f"{before[name] / kind.size:{kind.form}} → "
                       f"{after[name] / kind.size:{kind.form}} {arrow}"
                       f"{expected_arrow(arrow, expected)}")
            if expected not in (None, arrow):
                differences.append(difference(change.report, name, expected, arrow))
        rows.append(row)
    return rows, list(dict.fromkeys(differences))    # Several rows may differ in the same way.


def costs_of(variant: Variant, result: dict, is_counted: bool) -> dict:
    """Return {kind: amount} of a variant: counted as it ran, or estimated."""
    if is_counted:
        return result["bytes"] | {"forward": result["forward"], "FLOP per token": result["flop"],
                                  "time per step": result["seconds"]}
    estimate = result["estimate"]
    flop = flop_per_token(result["P"], variant.method == "full", variant.checkpoints)
    return {"parameters": estimate["weights"], "gradients": estimate["gradients"],
            "optimizer": estimate["optimizer"],
            "activations": estimate["activations"] + estimate["logits"],
            "forward": 2 * result["P"], "FLOP per token": flop}


def arrow_of(before: float, after: float, noise: float) -> str:
    if after > before * (1 + noise):
        return UP
    if after < before * (1 - noise):
        return DOWN
    return SAME


def expected_arrow(arrow: str, expected: str | None) -> str:
    """Return the report's arrow in brackets, in bold if it is another one than here."""
    if expected is None:
        return ""
    return f" (report {expected})" if expected == arrow else f" **(report {expected})**"


def difference(technique: str, kind: str, expected: str, arrow: str) -> str:
    """Return a sentence on where the report differs, with the reason if it is known."""
    sentence = f"{technique}, {kind}: the report says {expected}, here it is {arrow}"
    reason = REASONS.get((technique, kind, arrow))
    return f"{sentence}: {reason}" if reason else sentence
