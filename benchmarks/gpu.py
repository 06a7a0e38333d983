"""A first day with a GPU: does it run, is it right, how fast, in how much memory; by value.

The cells come in the order of what they are worth, so that the day may end after any of them.  Each
is a process of its own with a time limit of its own.  Estimates, by arithmetic for an H100, stand
beside what was measured.
"""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from finetune.arguments import text

from .tables import ROOT, Table, list_of, markdown, report

# Its cells run these too.
FILES = [ROOT / "benchmarks/on_gpu.py", ROOT / "benchmarks/peers.py",
         ROOT / "benchmarks/request.py", *sorted(ROOT.glob("tests/*.py"))]
HEADER = ["cell", "what", "measured", "estimate"]
# The allocator then grows its segments, so that rows of other lengths find a place.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
PRETENDED_SECONDS = 600      # a limit per cell on a pretended GPU: each operation is Python there


@dataclass(frozen=True)
class Cell:
    """seconds: its time limit.  estimates: {what: figure}, by arithmetic, for an H100."""
    seconds: int
    estimates: dict


def speed(tokens_per_second: str, **others) -> dict:
    return {"tokens/s": tokens_per_second, **others}


# In the order of their value.  What they do stands in on_gpu.py, under the same names.
CELLS = {
    "tests that need a GPU": Cell(120, {}),
    "the demo beside the CPU": Cell(120, {"fp32, off by": "below 0.0001"}),
    "every kind of training": Cell(150, {}),
    "generation in fp32": Cell(60, {"the same text as on the CPU": "yes"}),
    "attention, new lengths": Cell(90, {"cuDNN, first time, ms": "1,000",
                                        "no cuDNN, first time, ms": "below 1"}),
    "attention of 32 segments": Cell(60, {"a call per segment, ms": "3.4", "one call, ms": "0.7"}),
    "fastest products": Cell(60, {"bf16, TFLOP/s": "680"}),
    "7b, plain": Cell(120, speed("18,000")),
    "7b, checkpointing": Cell(120, speed("12,000 to 13,000")),
    "7b, nf4 and checkpointing": Cell(180, speed("11,000")),
    "7b, int8 and checkpointing": Cell(120, {}),
    "7b, share-prefix": Cell(120, {}),
    "7b, all seven matrices": Cell(120, speed("15,200")),
    "7b, 4 examples": Cell(90, speed("13,000 to 15,000")),
    "7b, nf4, 1 example": Cell(120, {"peak, MiB": "below 6,000"}),
    "peers": Cell(600, {}),
    "7b, compile": Cell(240, speed("21,000")),
    "7b, compile and nf4": Cell(240, {}),
    "7b, compile, nf4 and checkpointing": Cell(240, {}),
    "interruptions": Cell(120, {"exit code after SIGTERM": "130", "exit code of --resume": "0",
                                "exit code without enough memory": "3",
                                "exit code under torchrun": "0"}),
}


def add_flags(parser):
    flag = parser.add_argument
    flag("--cells", metavar="PATTERN,...", type=list_of(text), default=["*"],
         help=f"what is measured, * for anything, of: {'; '.join(CELLS).replace(',', '?')} "
              "(default: *)")
    flag("--pretend", action="store_true",
         help="go through every cell at a small size on a GPU that is not there, to find slips "
              "before the day; the figures mean nothing")


def make(args, table: Table) -> list:
    """Measure the cells one after another; return lines of Markdown."""
    if not args.pretend and not torch.cuda.is_available():
        raise ValueError("no GPU here, or this torch is built without CUDA; --pretend goes through "
                         "the cells without one")
    names = []
    for name in CELLS:
        if any(fnmatch(name, pattern) for pattern in args.cells):
            names.append(name)
    if not names:
        raise ValueError(f"--cells {','.join(args.cells)}: no match among {'; '.join(CELLS)}")
    rows = []
    for name in names:
        settings = {"cell": name, "gpu": about_gpu(args.pretend)}
        try:
            figures = table.cell(settings, lambda name=name: measure(name, args.pretend, table))
        except CellFailed as error:                  # It is not kept: the same command tries again.
            figures = {"failed": str(error)}
        report(f"{name}: {', '.join(f'{what} {shown(value)}' for what, value in figures.items())}")
        estimates = CELLS[name].estimates
        for what, value in figures.items():
            rows.append([name, what, shown(value), estimates.get(what, "")])
    return [f"({about_gpu(args.pretend)})", "", *markdown(HEADER, rows)]


class CellFailed(ValueError):
    """A cell that ended with an error, or took longer than its limit."""


def measure(name: str, is_pretended: bool, table: Table) -> dict:
    """Return the figures of a cell, {what: number or text}.  Raises CellFailed."""
    seconds = CELLS[name].seconds
    words = [sys.executable, "-m", "benchmarks.on_gpu", name]
    if name == "peers":
        words = [sys.executable, "-m", "benchmarks", "peers", "--shape", "7b", "--out",
                 str(table.out / "peers"), "--cells", "train bf16 batch 4,generate bf16 64 tokens"]
    if is_pretended:
        if name == "peers":
            return {"peers": "not on a pretended device"}
        words = [sys.executable, "-m", "tests.pretend_cuda", "cell", name]
        seconds = PRETENDED_SECONDS
    try:
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, **ALLOCATOR}, text=True,
                              capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise CellFailed(f"stopped after {seconds} seconds") from None
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        raise CellFailed(lines[-1] if lines else f"exit code {done.returncode}")
    if name == "peers":
        return {f"line {i}": line for i, line in enumerate(done.stdout.splitlines()) if line}
    result = json.loads(done.stdout.splitlines()[-1])
    if not is_pretended:
        return result
    if result["error"] or result["exit"]:
        reason = lines[-1] if lines else f"exit code {result['exit']}"
        raise CellFailed(result["error"] or reason)
    return json.loads(result["text"].splitlines()[-1])


def shown(value) -> str:
    """Return a figure as it stands in the table."""
    if not isinstance(value, float):
        return str(value).replace("|", "/")
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def about_gpu(is_pretended: bool) -> str:
    """Return the card, the driver, torch and cuDNN in one line."""
    parts = [f"torch {torch.__version__}"]
    if is_pretended:
        return ", ".join(["a pretended GPU", *parts])
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True)
        driver = asked.stdout.strip().partition("\n")[0]
    except OSError:
        driver = "unknown"
    parts = [torch.cuda.get_device_name(), f"driver {driver}", *parts]
    parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join(parts)
