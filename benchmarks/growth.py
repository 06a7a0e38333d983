"""How the memory of a training process grows by step: with oneDNN's own limit of kernels, and ours.

finetune/hardware.py:limit_kernel_caches is the rule.  Both runs are alike but for the limit.
"""
import os
import tempfile

from finetune.arguments import number, text
from finetune.hardware import DTYPES, KERNEL_CACHES

from .runs import flag_words
from .tables import Table, markdown, panel, report, run_fresh
from .training import finish_run

# {line: kernels kept, or None for what train.py chooses}
LIMITS = {"1,024 kernels, oneDNN's own limit": 1024, "the limit that train.py sets": None}
STEPS_SHOWN = (1, 5, 10, 20, 30, 40, 50)


def add_flags(parser):
    flag = parser.add_argument
    flag("--checkpoint", metavar="DIR", type=text, help="base (default: the demo's)")
    flag("--data", metavar="FILE", type=text, help="examples (default: the demo's)")
    flag("--precision", choices=DTYPES, default="bf16", help="compute dtype (default: bf16)")
    flag("--batch-size", metavar="N", type=number(int, 1), default=4,
         help="examples per step (default: 4)")
    flag("--steps", metavar="N", type=number(int, 2), default=50, help="steps (default: 50)")


def make(args, table: Table) -> list:
    """Measure both runs; return lines of Markdown."""
    argv = flag_words({
        "checkpoint": args.checkpoint, "data": args.data, "precision": args.precision,
        "batch_size": args.batch_size, "accumulation_steps": 1, "dropout": 0.0,
        "max_steps": args.steps, "epochs": args.steps})          # enough of them for any data
    peaks = {}
    for name, kernels in LIMITS.items():
        result = table.cell({"flags": argv, "kernels": kernels},
                            lambda kernels=kernels: run_fresh(peaks_of_run, argv, kernels))
        report(f"{name}: {result['peaks'][-1]:,.0f} MiB after {args.steps} steps")
        peaks[name] = result["peaks"]
    lines = {name: list(enumerate(values, 1)) for name, values in peaks.items()}
    peak = panel("Peak memory of the process so far", "step", "MiB", lines)
    table.draw([peak._replace(log_x=False)])
    steps = [step for step in STEPS_SHOWN if step < args.steps] + [args.steps]
    rows = []
    for name, values in peaks.items():
        rows.append([name, *[f"{values[step - 1]:,.0f}" for step in steps]])
    return markdown(["kernels kept", *[f"step {step}" for step in steps]], rows)


def peaks_of_run(argv: list, kernels: int | None) -> dict:
    """Train; return {peaks: MiB of the process's peak after each step}.

    kernels: the limit that the environment sets before the first product; None: it sets none.
    """
    for name in KERNEL_CACHES:
        os.environ.pop(name, None)
        if kernels:
            os.environ[name] = str(kernels)
    with tempfile.TemporaryDirectory() as out:
        _, rows = finish_run([*argv, "--out", out, "--overwrite"])
    return {"peaks": [row["peak_memory_mb"] for row in rows]}
