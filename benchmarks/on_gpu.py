"""What `python -m benchmarks gpu` measures: a cell in a process, which prints its figures as JSON.

    python -m benchmarks.on_gpu "7b, plain"
"""
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import torch
import torch.nn.functional as F

import generate
import train
from finetune.batches import pack
from finetune.folder import METRICS
from finetune.hardware import pick_hardware
from finetune.pictures import read_metrics
from llama import layout
from lora.methods import METHODS

from .measure import flop_per_token, matmul_peak
from .runs import (
    Workload,
    estimate_costs,
    measure_run,
    output_discarded,
    peak_of,
    random_rows,
    shape_folder,
)
from .tables import ROOT

MIB = 2 ** 20
TOO_MANY_TOKENS = "1000000"                          # per micro-batch: no GPU has memory for it


@dataclass(frozen=True)
class Size:
    """How much a cell does; the smaller one is for a device that is pretended.

    layers: of the 7B and the demo; None for all.
    """
    layers: int | None = None
    steps: int = 40
    batch_size: int = 32
    lengths: int = 30
    heads: int = 32
    matrix_sizes: tuple = (4096, 8192, 16384)
    is_pretended: bool = False


PRETENDED = Size(layers=1, steps=2, batch_size=2, lengths=2, heads=2, matrix_sizes=(64,),
                 is_pretended=True)


def losses(folder: str, name: str, size: Size, *flags) -> list:
    """Return the losses of a run of the demo."""
    out = Path(folder, name)
    words = ["--out", str(out), "--max-steps", str(size.steps), *flags]
    if size.layers:
        words += ["--layers", str(size.layers), "--accumulation-steps", "1"]
    with output_discarded():
        train.main(words)
    return [row["loss"] for row in read_metrics(out / METRICS)]


def losses_beside_cpu(size: Size) -> dict:
    """Train the demo in each precision; return the largest distance from the CPU's fp32 losses."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        expected = losses(folder, "cpu", size, "--device", "cpu", "--precision", "fp32")
        for precision in ("fp32", "bf16", "fp16"):
            found = losses(folder, precision, size, "--device", "cuda", "--precision", precision)
            pairs = zip(found, expected, strict=True)
            figures[f"{precision}, off by"] = max(abs(a - b) for a, b in pairs)
    return figures


def every_kind(size: Size) -> dict:
    """Train the demo for a few steps in each way; return whether the losses are numbers."""
    size = replace(size, steps=min(5, size.steps))
    kinds = {f"--method {name}": ["--method", name] for name in (*METHODS, "full")}
    for flags in ("--lora-plus-ratio 16", "--quantize nf4", "--quantize int8", "--share-prefix",
                  "--checkpointing", "--targets all", "--fast-matmul --precision fp32"):
        kinds[flags] = flags.split()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, flags) in enumerate(kinds.items()):
            found = losses(folder, str(i), size, "--device", "cuda", *flags)
            figures[name] = "yes" if all(map(math.isfinite, found)) else "not finite"
    return figures


def same_text(size: Size) -> dict:
    """Answer generate.py's own instructions in fp32 on both devices."""
    texts = []
    for device in ("cpu", "cuda"):
        printed = StringIO()
        with redirect_stdout(printed):
            generate.main(["--adapter", "none", "--precision", "fp32", "--device", device])
        texts.append(printed.getvalue())
    return {"the same text as on the CPU": "yes" if texts[0] == texts[1] else "no"}


def tests_for_gpus(size: Size) -> dict:
    """Run the tests that need a GPU."""
    if size.is_pretended:
        return {"tests": "not on a pretended device"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT,
                          env={**os.environ, "GPU_TESTS": "1"}, capture_output=True, text=True)
    last_line = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
    if done.returncode:
        raise ValueError(last_line)
    return {"tests": last_line}


def milliseconds(function: Callable, repeats: int = 1) -> float:
    """Return how long a call takes on the GPU, the mean of the repeats."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats * 1000


def random_heads(length: int, size: Size) -> list:
    """Return q, k and v (1, length, heads, 128) in bf16 on the GPU."""
    shape = (1, length, size.heads, 128)
    parts = []
    for _ in range(3):
        parts.append(torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_())
    return parts


def attention_with_cudnn(size: Size) -> dict:
    """Time attention of lengths that are new, and again, with cuDNN's kernel and without."""
    figures = {}
    kernels = {"no cuDNN": False}
    if not size.is_pretended:
        kernels["cuDNN"] = True
    for name, is_allowed in kernels.items():
        torch.backends.cuda.enable_cudnn_sdp(is_allowed)
        for turn in ("first", "second"):
            total = 0.0
            for length in range(100, 100 + size.lengths):
                parts = [z.transpose(1, 2) for z in random_heads(length, size)]
                total += milliseconds(lambda heads=parts: F.scaled_dot_product_attention(
                    *heads, is_causal=True).sum().backward())
            figures[f"{name}, {turn} time, ms"] = total / size.lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    return figures


def attention_of_segments(size: Size) -> dict:
    """Time attention of 32 packed examples: a call per example, and one call for all."""
    pick_hardware("cuda", None)
    rows = random_rows(32000)[:size.batch_size]
    figures = {}
    takes_one_call = layout.takes_one_call
    for share_prefix in (False, True):
        batch = pack(rows, share_prefix)
        packed = batch.layout.to("cuda")
        q, k, v = random_heads(batch.tokens.shape[1], size)
        suffix = ", share-prefix" if share_prefix else ""
        for name, is_allowed in (("a call per segment", False), ("one call", True)):
            layout.takes_one_call = takes_one_call if is_allowed else lambda q, k: False

            def passes(packed=packed, q=q, k=k, v=v):
                packed.attend(q, k, v).sum().backward()

            passes()
            figures[f"{name}{suffix}, ms"] = milliseconds(passes, 5)
    layout.takes_one_call = takes_one_call
    return figures


def fastest_products(size: Size) -> dict:
    """Measure the fastest matrix products."""
    figures = {}
    for name, dtype, fast in (("bf16", torch.bfloat16, False), ("fp32", torch.float32, False),
                              ("fp32 --fast-matmul", torch.float32, True)):
        device, _ = pick_hardware("cuda", None, fast_matmul=fast)
        figures[f"{name}, TFLOP/s"] = matmul_peak(dtype, device, size.matrix_sizes) / 1e12
    return figures


def training(*flags: str, warm: int = 2, batch_size: int | None = None) -> Callable:
    """Return a function that trains 7B's shape with random weights, rows as long as Alpaca's."""
    def measure(size: Size) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--checkpoint", shape_folder("7b", Path(folder)), "--init", "random",
                     "--device", "cuda", "--accumulation-steps", "1",
                     "--batch-size", str(batch_size or size.batch_size), *flags]
            if size.layers:
                words += ["--layers", str(size.layers)]
            n_warm = min(warm, size.steps)
            workload = Workload(words, None, warm=n_warm, steps=2, repeats=1)
            estimate = estimate_costs(workload)
            result = measure_run(workload)
        speed = result["tokens_per_second"]
        flop = flop_per_token(estimate["P"], checkpointing="--checkpointing" in flags)
        return {"tokens/s": speed, "TFLOP/s by rule of thumb": speed * flop / 1e12,
                "peak, MiB": peak_of(result),
                "peak by estimate, MiB": sum(estimate["estimate"].values()) / MIB}
    return measure


def interrupted(size: Size) -> dict:
    """Stop a run by SIGTERM, resume it, and ask for more memory than there is."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--device", "cuda", "--out", f"{folder}/stopped", "--max-steps", "40",
                 "--accumulation-steps", "1"]
        log = Path(folder, "stopped", METRICS)
        threading.Thread(target=terminate_after_a_step, args=(log,), daemon=True).start()
        figures["exit code after SIGTERM"] = exit_code(flags)
        figures["exit code of --resume"] = exit_code([*flags, "--resume"])
        if size.is_pretended:
            return figures
        shape = ["--checkpoint", shape_folder("7b", Path(folder)), "--init", "random", "--device",
                 "cuda", "--data", "finetune/demo/train.json", "--max-steps", "1"]
        figures["exit code without enough memory"] = exit_code(
            [*shape, "--method", "full", "--tokens-per-batch", TOO_MANY_TOKENS, "--out",
             f"{folder}/large"])
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=1", "--"]
        done = subprocess.run([sys.executable, "-m", *launcher, "train.py", "--max-steps", "2",
                               "--out", f"{folder}/torchrun"], cwd=ROOT)
        figures["exit code under torchrun"] = done.returncode
    return figures


def terminate_after_a_step(log: Path):
    """Send SIGTERM to this process once a step stands in the run's metrics.jsonl."""
    while not log.exists() or not log.read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def exit_code(flags: list) -> int:
    try:
        with output_discarded():
            train.main(flags)
    except SystemExit as left:
        return left.code or 0
    return 0


CELLS = {
    "tests that need a GPU": tests_for_gpus,
    "the demo beside the CPU": losses_beside_cpu,
    "every kind of training": every_kind,
    "generation in fp32": same_text,
    "attention, new lengths": attention_with_cudnn,
    "attention of 32 segments": attention_of_segments,
    "fastest products": fastest_products,
    "7b, plain": training(),
    "7b, checkpointing": training("--checkpointing"),
    "7b, nf4 and checkpointing": training("--quantize", "nf4", "--checkpointing"),
    "7b, int8 and checkpointing": training("--quantize", "int8", "--checkpointing"),
    "7b, share-prefix": training("--share-prefix"),
    "7b, all seven matrices": training("--targets", "all"),
    "7b, 4 examples": training(batch_size=4),
    "7b, nf4, 1 example": training("--quantize", "nf4", "--checkpointing", batch_size=1),
    "7b, compile": training("--compile", warm=8),
    "7b, compile and nf4": training("--compile", "--quantize", "nf4", warm=8),
    "7b, compile, nf4 and checkpointing": training(
        "--compile", "--quantize", "nf4", "--checkpointing", warm=8),
    "interruptions": interrupted,
}


def main(argv=None, size: Size = Size()):
    """Measure the cell of this name, and print its figures as the last line."""
    name, = sys.argv[1:] if argv is None else argv
    print(json.dumps(CELLS[name](size)))


if __name__ == "__main__":
    main()
