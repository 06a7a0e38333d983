"""The README's measured tables, each a command; every cell in a fresh process.

    python benchmark.py methods                              the LoRA family on the demo, three seeds each
    python benchmark.py methods --checkpoint llama-135m --data train.json --val-data held_out.json --seeds 0 --lrs 3e-4,3e-3

Tables are printed in Markdown; every cell is left as JSON in --out as soon as it is measured.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

import generate
import train
from llama.alpaca import encode_prompt, read_examples
from llama.checkpoint import read_params
from llama.cli import DTYPES, Parser, bad_input_ends_in_one_line, number, text
from llama.sampling import generate as generate_ids
from lora import merge_lora
from lora.adapter import METHODS

FAMILY = {**{method: ["--method", method] for method in METHODS}, "lora, LoRA+ 4": ["--method", "lora", "--lora-plus-ratio", "4"]}


def fresh(function, *args):
    """function(*args) in a process of its own, which starts without what the last one left in memory or caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise ValueError(f"{function.__name__} was killed: out of memory?") from None


def machine():
    """One line about what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{gpu}, {platform.system()}, torch {torch.__version__}"


def trained(argv):
    """What one run of train.py says of itself.  Raises ValueError where it refuses."""
    args = train.parse_args(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            train.main(argv)
        except SystemExit:
            raise ValueError(f"train.py {shlex.join(argv)} was refused, as it says above") from None
    rows = [json.loads(line) for line in (Path(args.out) / "metrics.jsonl").read_text().splitlines()]
    tokenizer = read_params(args.checkpoint)[1]
    examples, args.precision = train.load_data(args, tokenizer)[0], args.precision or "fp32"
    model, _ = train.load_model(args, train.lora_config(args), torch.device("cpu"), "random")
    batch = train.trying_batch(examples, train.pack, train.plan(args, examples, 1))
    return dict(held_out_loss=rows[-1].get("val_loss"), parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                kept_mb=kept_bytes(model, batch) / 2 ** 20, process_mb=rows[-1]["peak_memory_mb"],
                examples_per_second=rows[-1]["epoch"] * len(examples) / sum(row["tokens"] / row["tokens_per_second"] for row in rows))


def kept_bytes(model, batch):
    """What autograd keeps for the backward pass of one micro-batch, the model's own tensors apart."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train.answer_loss(model.train(), batch)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def answered(adapter, data, precision):
    """{share of answers right to the letter, tokens a second with the adapter and merged}, greedy, eight prompts at a time.

    The speed is the median of three rounds of 32 tokens each after the first eight prompts, past any eos, after one to
    warm up.
    """
    args = generate.parse_args(["--adapter", str(adapter), *["--precision", precision] * bool(precision)])
    device, args.precision = generate.pick_hardware(args.device, args.precision)
    model, tokenizer, _ = generate.load(args, device)
    examples = read_examples(data)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    answers = [[] for _ in examples]
    for start in range(0, len(examples), generate.BATCH):
        for i, token in generate_ids(model, prompts[start:start + generate.BATCH], 64, tokenizer.eos_id):
            answers[start + i].append(token)
    right = sum(tokenizer.decode(answer).strip() == example["output"].strip() for answer, example in zip(answers, examples))

    def speed():
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            n = sum(1 for _ in generate_ids(model, prompts[:generate.BATCH], 32, -1))
            seconds.append(time.perf_counter() - began)
        return n / statistics.median(seconds[1:])
    result = dict(right=right / len(examples), adapter_per_second=speed())
    merge_lora(model)
    return result | dict(merged_per_second=speed())


def cell(name, lr, seed, args, folder):
    """All that is measured of one method at one learning rate and seed; it joins the JSON at once."""
    out = Path(folder) / f"{name}-{lr}-{seed}".replace(" ", "").replace(",", "-")
    result = dict(method=name, lr=lr, seed=seed) | fresh(
        trained, [*FAMILY[name], "--lr", str(lr), "--seed", str(seed), *args.train, "--out", str(out)])
    result |= fresh(answered, out / "adapter.pt", args.questions, args.precision)
    args.cells.append(result)
    (args.out / f"{args.table}.json").write_text(json.dumps({"command": args.said, "cells": args.cells}, indent=1) + "\n")
    print(f"{name}, lr {lr:g}, seed {seed}: held-out loss {loss_of(result):.4f}, right {result['right']:.1%}", file=sys.stderr, flush=True)
    return result


def loss_of(result):
    return math.inf if result["held_out_loss"] is None else result["held_out_loss"]       # JSON has no NaN: it diverged


def spread(values, form):
    """Mean, and behind it how far the furthest lies from it."""
    values = list(values)
    mean = statistics.mean(values)
    return form.format(mean) + (f" ± {form.format(max(abs(value - mean) for value in values))}" if len(values) > 1 else "")


def methods(args):
    """Each method at the learning rate that serves it best with the first seed, then with the others."""
    lines = ["| method | learning rate | trained | held-out loss | right to the letter | train, examples/s "
             "| generate, tokens/s | merged | kept for backward, MiB |", "|---|---|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name in FAMILY:
            first = min((cell(name, lr, args.seeds[0], args, folder) for lr in args.lrs), key=loss_of)
            results = [first, *(cell(name, first["lr"], seed, args, folder) for seed in args.seeds[1:])]
            speeds = (f"{statistics.median(result[key] for result in results):,.0f}"
                      for key in ("examples_per_second", "adapter_per_second", "merged_per_second"))
            lines.append(f"| {name} | {first['lr']:g} | {first['parameters']:,} | {spread(map(loss_of, results), '{:.3f}')} | "
                         f"{spread((result['right'] for result in results), '{:.1%}')} | {' | '.join(speeds)} | {first['kept_mb']:.2f} |")
    chosen = (f"learning rate: the best of {', '.join(f'{lr:g}' for lr in args.lrs)} by the held-out loss of seed "
              f"{args.seeds[0]}; " if len(args.lrs) > 1 else "")
    return [*lines, "", f"({chosen}{len(args.seeds)} seeds; ±: how far the furthest lies from their mean)"]


TABLES = {"methods": methods}


def listed(kind):
    def parse(value):
        return [kind(part) for part in value.split(",")]
    parse.__name__ = "list"
    return parse


def parse_args(argv=None):
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("table", choices=TABLES)
    flag("--checkpoint", metavar="DIR", type=text, help="base (default: the demo's)")
    flag("--data", metavar="FILE", type=text, help="examples (default: the demo's)")
    flag("--val-data", metavar="FILE", type=text, help="held-out examples, which are also asked (default: the demo's)")
    flag("--epochs", metavar="N", type=number(int, 1), help="passes over the data (default: train.py's)")
    flag("--precision", choices=DTYPES, help="compute dtype (default: train.py's)")
    flag("--seeds", metavar="N,...", type=listed(number(int, 0)), default=[0, 1, 2], help="runs of each (default: 0,1,2)")
    flag("--lrs", metavar="F,...", type=listed(number(float, 0, open_low=True)), default=[5e-3, 2e-2, 1e-1],
         help="learning rates to choose from, by held-out loss with the first seed (default: 5e-3,2e-2,1e-1)")
    flag("--out", metavar="DIR", type=Path, default=Path("out-benchmark"), help="where JSON goes (default: out-benchmark)")
    args = parser.parse_args(argv)
    if bool(args.data) != bool(args.val_data):
        parser.error("--data and --val-data go together: what is held out is measured, and asked")
    args.questions, args.cells = args.val_data or str(train.DEMO / "held_out.json"), []
    args.train = [word for flag in ("checkpoint", "data", "val_data", "epochs", "precision") if getattr(args, flag) is not None
                  for word in ("--" + flag.replace("_", "-"), str(getattr(args, flag)))]
    return args


def main(argv=None):
    with bad_input_ends_in_one_line("benchmark.py"):
        args = parse_args(argv)
        args.out.mkdir(parents=True, exist_ok=True)
        args.said = f"`python benchmark.py {shlex.join(sys.argv[1:] if argv is None else argv)}` on {machine()}"
        lines = TABLES[args.table](args)
    print("\n".join([args.said, "", *lines]))


if __name__ == "__main__":
    main()
