"""The README's measured tables, each a command; every cell in a fresh process.

    python benchmark.py methods                              the LoRA family on the demo, three seeds each
    python benchmark.py methods --checkpoint llama-135m --data alpaca_data.json --val-fraction 0.1 --seeds 0 --lrs 3e-4

Tables are printed in Markdown and left as JSON in --out.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import generate
import train
from llama.alpaca import encode_prompt, read_examples
from llama.checkpoint import read_params
from llama.cli import Parser, bad_input_ends_in_one_line, number, text
from llama.sampling import generate as generate_ids
from lora.adapter import METHODS

FAMILY = {**{method: ["--method", method] for method in METHODS}, "lora, LoRA+ 4": ["--method", "lora", "--lora-plus-ratio", "4"]}


def fresh(function, *args):
    """function(*args) in a process of its own, which starts without what the last one left in memory or caches."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def machine():
    """One line about what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{gpu}, {platform.system()}, torch {torch.__version__}"


def trained(argv):
    """(rows of metrics.jsonl, number of trained parameters, of training examples) of one run of train.py."""
    args = train.parse_args(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(argv)
    args.precision = args.precision or "fp32"
    model, _ = train.load_model(args, train.lora_config(args), torch.device("meta"), "random")
    examples = len(train.load_data(args, read_params(args.checkpoint)[1])[0])
    rows = [json.loads(line) for line in (Path(args.out) / "metrics.jsonl").read_text().splitlines()]
    return rows, sum(p.numel() for p in model.parameters() if p.requires_grad), examples


def answered(adapter, data, most, merge):
    """(share of answers that are right to the letter, tokens a second) of greedy answers to the first `most` examples."""
    args = generate.parse_args(["--adapter", str(adapter), *["--merge"] * merge])
    device, args.precision = generate.pick_hardware(args.device, args.precision)
    model, tokenizer, _ = generate.load(args, device)
    examples, n, began = read_examples(data)[:most], 0, time.perf_counter()
    answers = [[] for _ in examples]
    for start in range(0, len(examples), generate.BATCH):
        prompts = [encode_prompt(example, tokenizer) for example in examples[start:start + generate.BATCH]]
        for i, token in generate_ids(model, prompts, 32, tokenizer.eos_id):
            answers[start + i].append(token)
            n += 1
    seconds = time.perf_counter() - began
    right = sum(tokenizer.decode(answer).strip() == example["output"].strip() for answer, example in zip(answers, examples))
    return right / len(examples), n / seconds


def cell(name, lr, seed, args, folder):
    """All that is measured of one method at one learning rate and seed."""
    out = Path(folder) / f"{name}-{lr}-{seed}".replace(" ", "").replace(",", "-")
    rows, parameters, examples = fresh(trained, [*FAMILY[name], "--lr", str(lr), "--seed", str(seed), "--log-every", "1000", *args.train, "--out", str(out)])
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    result = dict(method=name, lr=lr, seed=seed, parameters=parameters, held_out_loss=held_out[-1] if held_out else None,
                  examples_per_second=rows[-1]["epoch"] * examples / sum(row["tokens"] / row["tokens_per_second"] for row in rows),
                  peak_memory_mb=rows[-1]["peak_memory_mb"])
    result["right"], result["generated_per_second"] = fresh(answered, out / "adapter.pt", args.questions, args.answers, False)
    result["right_merged"], result["merged_per_second"] = fresh(answered, out / "adapter.pt", args.questions, args.answers, True)
    print(f"{name}, lr {lr:g}, seed {seed}: held-out loss {result['held_out_loss']:.4f}, right {result['right']:.1%}", file=sys.stderr, flush=True)
    return result


def spread(values, form):
    """Mean, and behind it how far the furthest lies from it."""
    mean = statistics.mean(values)
    return form.format(mean) + (f" ± {form.format(max(abs(value - mean) for value in values))}" if len(values) > 1 else "")


def methods(args):
    """Each method at the learning rate that serves it best with the first seed, then with the others."""
    with tempfile.TemporaryDirectory() as folder:
        cells = []
        for name in FAMILY:
            first = [cell(name, lr, args.seeds[0], args, folder) for lr in args.lrs]
            best = min(first, key=lambda result: result["held_out_loss"])
            cells += [[best, *(cell(name, best["lr"], seed, args, folder) for seed in args.seeds[1:])]]
    lines = ["| method | learning rate | trained | held-out loss | right to the letter | train, examples/s | generate, tokens/s | merged | peak MiB |",
             "|---|---|---|---|---|---|---|---|---|"]
    for results in cells:
        def of(key, form):
            return spread([result[key] for result in results], form)
        first = results[0]
        lines.append(f"| {first['method']} | {first['lr']:g} | {first['parameters']:,} | {of('held_out_loss', '{:.3f}')} | {of('right', '{:.1%}')} | "
                     f"{statistics.median(r['examples_per_second'] for r in results):,.0f} | {statistics.median(r['generated_per_second'] for r in results):,.0f} | "
                     f"{statistics.median(r['merged_per_second'] for r in results):,.0f} | {max(r['peak_memory_mb'] for r in results):,.0f} |")
    return lines, cells


def listed(kind):
    def parse(value):
        return [kind(part) for part in value.split(",")]
    parse.__name__ = "list"
    return parse


def parse_args(argv=None):
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("methods",))
    parser.add_argument("--checkpoint", metavar="DIR", type=text, help="base (default: the demo's)")
    parser.add_argument("--data", metavar="FILE", type=text, help="examples (default: the demo's)")
    parser.add_argument("--val-fraction", metavar="F", help="of --data, held out (default: the demo's own held-out examples)")
    parser.add_argument("--epochs", metavar="N", type=number(int, 1), help="passes over the data (default: train.py's)")
    parser.add_argument("--precision", help="compute dtype (default: train.py's)")
    parser.add_argument("--answers", metavar="N", type=number(int, 1), help="questions answered with each adapter (default: all)")
    parser.add_argument("--seeds", metavar="N,...", type=listed(int), default=[0, 1, 2], help="runs of each (default: 0,1,2)")
    parser.add_argument("--lrs", metavar="F,...", type=listed(float), default=[5e-3, 2e-2, 1e-1],
                        help="learning rates to choose from, by held-out loss with the first seed (default: 5e-3,2e-2,1e-1)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("out-benchmark"), help="where JSON goes (default: out-benchmark)")
    args = parser.parse_args(argv)
    args.questions = args.data or str(train.DEMO / "held_out.json")
    args.train = [word for flag in ("checkpoint", "data", "val_fraction", "epochs", "precision") if getattr(args, flag) is not None
                  for word in ("--" + flag.replace("_", "-"), str(getattr(args, flag)))]
    train.parse_args(args.train)                     # what train.py would refuse is refused now
    return args


def main(argv=None):
    with bad_input_ends_in_one_line("benchmark.py"):
        args = parse_args(argv)
        args.out.mkdir(parents=True, exist_ok=True)
    lines, cells = globals()[args.table](args)
    said = f"`python benchmark.py {shlex.join(sys.argv[1:] if argv is None else argv)}` on {machine()}"
    (args.out / f"{args.table}.json").write_text(json.dumps({"command": said, "cells": cells}, indent=1) + "\n")
    print("\n".join([said, "", *lines]))


if __name__ == "__main__":
    main()
