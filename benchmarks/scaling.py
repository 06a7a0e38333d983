"""Speed and memory against tokens a micro-batch, length, layers, rank of the adapter, and ranks."""
import torch

from llama.checkpoint import read_params

from . import runs
from .runs import most, run_of, taken
from .tables import markdown, picture


def add_flags(parser):
    runs.add_flags(parser, warm=1, steps=1, repeats=3)


def make(args):
    runs.settle(args)
    model_args, _ = read_params(args.folder)
    layers = args.layers or model_args.n_layers
    lengths = [n for n in (64, 128, 256, 512) if n <= model_args.max_seq_len]
    width = model_args.dim // model_args.n_heads * model_args.n_kv_heads
    kind = args.device.partition(":")[0]
    devices = {"cpu": 2, "cuda": torch.cuda.device_count()}.get(kind, 1)
    axes = {
        "examples a micro-batch": [(n, ["--batch-size", str(n)], {}) for n in (1, 2, 4, 8, 16)],
        "tokens an example": [(n, ["--batch-size", str(max(1, 1024 // n)), "--max-seq-len", str(n)], {"length": n, "data": None})
                              for n in lengths],
        "layers": [(n, ["--layers", str(n)], {}) for n in sorted({max(1, layers * share // 4) for share in (1, 2, 3, 4)})],
        "r": [(n, ["--r", str(n)], {}) for n in (1, 4, 16, 64, 256) if n <= width],
        "ranks": [(n, ["--device", kind], {"ranks": n}) for n in (1, 2) if n <= devices],                # a GPU each
    }
    rows, panels = [], {"tokens/s": [], "peak, MiB": []}
    for axis, points in axes.items():
        one = "--batch-size", "4", "--accumulation-steps", "1"
        results = {n: taken(args, f"{axis} {n}", run_of(args, *one, *flags, **settings)) for n, flags, settings in points}
        for n, result in results.items():
            figures = [f"{result['tokens_per_second']:,.0f}", f"{result['seconds']:.2f}", f"{most(result):,.0f}"] \
                if "peaks" in result else ["", "", "out of memory"]
            tokens = f"{result['tokens_per_second'] * result['seconds']:,.0f}" if "peaks" in result else ""
            rows.append([axis, str(n), tokens, *figures, runs.mib(sum(result["estimate"].values()))])
        done = {n: result for n, result in results.items() if "peaks" in result}
        if done:
            panels["tokens/s"].append((f"tokens/s by {axis}", axis, "tokens/s", {
                "all ranks": [(n, result["tokens_per_second"]) for n, result in done.items()]}))
            panels["peak, MiB"].append((f"peak by {axis}", axis, "MiB", {
                "process": [(n, most(result)) for n, result in done.items()],
                "estimate of its tensors": [(n, sum(result["estimate"].values()) / 2 ** 20) for n, result in done.items()]}))
    picture(args, [*panels["tokens/s"], *panels["peak, MiB"]])
    return [*markdown(["along", "", "tokens a step", "tokens/s", "s a step", "peak, MiB", "estimate, MiB"], rows), "",
            "(one micro-batch of 4 examples a step but where the line says otherwise; along tokens an example, 1,024 tokens a "
            "micro-batch; peak: of rank 0's process with all it takes, or of the GPU's allocations)"]
