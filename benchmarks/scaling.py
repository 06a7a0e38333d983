"""Speed and memory by tokens per micro-batch, length, layers, rank of the adapter, and ranks."""
from dataclasses import dataclass, field

import torch

from finetune.memory import MIB, mib
from llama.checkpoint import read_params

from . import runs
from .launch import measure_on_ranks
from .runs import Setup, completed, make_setup, measure_cell, measure_run, peak_of
from .tables import Table, markdown, panel

HEADER = ["along", "", "tokens per step", "tokens/s", "seconds per step", "peak, MiB",
          "estimate, MiB"]
NOTE = ("(one micro-batch of 4 examples per step unless the line says otherwise; along tokens per "
        "example, 1,024 tokens per micro-batch; peak: of rank 0's whole process, or of the GPU's "
        "allocations; estimate: by finetune/memory.py, of tensors alone)")


@dataclass(frozen=True)
class Point:
    """A point on an axis: its value, and the flags and fields of a Workload that it changes."""
    value: int
    flags: dict
    changes: dict = field(default_factory=dict)


def add_flags(parser):
    runs.add_flags(parser, warm=1, steps=1, repeats=3)


def make(args, table: Table) -> list:
    """Measure along each axis; return lines of Markdown."""
    setup = make_setup(args, table.out)
    rows = []
    panels = []                                      # For each axis speed and peak, side by side.
    for axis, points in axes_of(setup).items():
        results = {}
        for point in points:
            result = measure_point(table, setup, axis, point)
            rows.append([axis, str(point.value), *columns_of(result)])
            results[point.value] = result
        drawn = {value: result for value, result in results.items() if completed(result)}
        if drawn:
            panels += [speed_panel(axis, drawn), peak_panel(axis, drawn)]
    table.draw(panels)
    return [*markdown(HEADER, rows), "", NOTE]


def axes_of(setup: Setup) -> dict:
    """Return {axis: Points on it}."""
    model_args, _ = read_params(setup.folder)
    n_layers = setup.layers or model_args.n_layers
    key_width = model_args.dim // model_args.n_heads * model_args.n_kv_heads
    kind = setup.device.partition(":")[0]
    n_devices = {"cpu": 2, "cuda": torch.cuda.device_count()}.get(kind, 1)
    by_length = []
    for length in (64, 128, 256, 512):
        if length <= model_args.max_seq_len:
            flags = {"batch_size": max(1, 1024 // length)}
            by_length.append(Point(length, flags, {"length": length, "data": None}))
    depths = sorted({max(1, n_layers * quarters // 4) for quarters in (1, 2, 3, 4)})
    by_ranks = []
    for n in (1, 2):
        if n <= n_devices:
            # "cuda" without a number gives each rank a GPU of its own.
            by_ranks.append(Point(n, {"device": kind}, {"ranks": n}))
    return {
        "examples per micro-batch": [Point(n, {"batch_size": n}) for n in (1, 2, 4, 8, 16)],
        "tokens per example": by_length,
        "layers": [Point(n, {"layers": n}) for n in depths],
        "r": [Point(n, {"r": n}) for n in (1, 4, 16, 64, 256) if n <= key_width],
        "ranks": by_ranks,
    }


def measure_point(table: Table, setup: Setup, axis: str, point: Point) -> dict:
    flags = {"batch_size": 4, "accumulation_steps": 1} | point.flags
    workload = setup.workload(flags, **point.changes)
    measure = measure_run if workload.ranks == 1 else measure_on_ranks
    return measure_cell(table, f"{axis} {point.value}", workload, measure)


def columns_of(result: dict) -> list:
    """Return a result as the columns of HEADER after the first two."""
    estimate = mib(sum(result["estimate"].values()))
    if not completed(result):
        return ["", "", "", "out of memory", estimate]
    n_tokens = result["tokens_per_second"] * result["seconds"]
    return [f"{n_tokens:,.0f}", f"{result['tokens_per_second']:,.0f}", f"{result['seconds']:.2f}",
            f"{peak_of(result):,.0f}", estimate]


def speed_panel(axis: str, results: dict):
    points = [(value, result["tokens_per_second"]) for value, result in results.items()]
    return panel(f"Training speed by {axis}", axis, "tokens/s", {"all ranks": points})


def peak_panel(axis: str, results: dict):
    peaks = [(value, peak_of(result)) for value, result in results.items()]
    estimates = []
    for value, result in results.items():
        estimates.append((value, sum(result["estimate"].values()) / MIB))
    lines = {"process": peaks, "estimate of its tensors": estimates}
    return panel(f"Peak memory by {axis}", axis, "MiB", lines)
