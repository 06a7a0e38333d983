"""Each of the LoRA family at the learning rate that serves it best with the first seed, then with the others."""
import contextlib
import hashlib
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

import generate
import train
from finetune.options import DEMO
from finetune.preflight import largest_batch_rows
from finetune.ranks import SINGLE_PROCESS
from finetune.run import ADAPTER
from finetune.arguments import number
from finetune.dataset import encode_prompt, read_examples
from llama.sampling import generate as generate_ids
from lora import merge_lora
from lora.adapter import METHODS

from .measure import counted
from .runs import add_training_flags, finished, training_flags
from .tables import cell, fresh, listed, markdown, picture, spread

FAMILY = {**{method: ["--method", method] for method in METHODS}, "lora, LoRA+ 4": ["--method", "lora", "--lora-plus-ratio", "4"]}


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--epochs", metavar="N", type=number(int, 1), help="passes over the data (default: train.py's)")
    flag("--seeds", metavar="N,...", type=listed(number(int, 0)), default=[0, 1], help="runs of each (default: 0,1)")
    flag("--lrs", metavar="F,...", type=listed(number(float, 0, open_low=True)), default=[5e-3, 2e-2, 1e-1],
         help="learning rates to choose from, by held-out loss with the first seed (default: 5e-3,2e-2,1e-1)")


def trained(argv):
    """Run train.py; return what the run says of itself."""
    options, rows = finished(argv)
    job = train.prepare(options, SINGLE_PROCESS)
    model, _ = train.load_model(job, torch.device("cpu"), "random")
    batch = job.collate(largest_batch_rows(job.train_set, job.plan))
    kept = counted(model, [batch], contextlib.nullcontext())
    left = (Path(options.out) / ADAPTER).exists()                    # not where the last steps were all skipped
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in rows)
    return dict(held_out_loss=rows[-1].get("val_loss") if left else None,
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                kept_mb=(kept["copies"] + kept["activations"]) / 2 ** 20, process_mb=rows[-1]["peak_memory_mb"],
                examples_per_second=rows[-1]["epoch"] * len(job.train_set) / seconds)


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


class Trial:
    """A method at one learning rate and seed: learnt() and asked() are what was measured of each, once.

    Its run stays in --out, under a name of its own for all that it depends on.
    """

    def __init__(self, args, name, lr, seed):
        self.args, self.lr, self.name = args, lr, f"{name}, lr {lr:g}, seed {seed}"
        self.settings = dict(method=name, lr=lr, seed=seed, flags=args.train, questions=args.questions)
        self.out = args.out / "methods" / hashlib.sha256(json.dumps([self.settings, args.on]).encode()).hexdigest()[:12]
        self.flags = [*args.train, *FAMILY[name], "--lr", str(lr), "--seed", str(seed), "--out", str(self.out), "--overwrite"]

    def learnt(self):
        result = cell(self.args, self.settings | {"part": "learnt"}, lambda: fresh(trained, self.flags))
        print(f"{self.name}: held-out loss {loss_of(result):.4f}", file=sys.stderr, flush=True)
        return result

    def asked(self):
        def compute():
            if not (self.out / "adapter.pt").exists():
                fresh(trained, self.flags)
            return fresh(answered, self.out / "adapter.pt", self.args.questions, self.args.precision)
        result = cell(self.args, self.settings | {"part": "asked"}, compute)
        print(f"{self.name}: right {result['right']:.1%}", file=sys.stderr, flush=True)
        return result


def loss_of(result):
    return math.inf if result["held_out_loss"] is None else result["held_out_loss"]       # JSON has no NaN: it diverged


def make(args):
    args.questions = args.val_data or str(DEMO / "held_out.json")
    args.train = training_flags(args) + ["--epochs", str(args.epochs)] * bool(args.epochs)
    rows, panels = [], {"held-out loss": [], "right to the letter": []}
    for name in FAMILY:
        best = min((Trial(args, name, lr, args.seeds[0]) for lr in args.lrs), key=lambda trial: loss_of(trial.learnt()))
        others = args.seeds[1:] if loss_of(best.learnt()) < math.inf else []
        trials = [best, *(Trial(args, name, best.lr, seed) for seed in others)]
        learnt = [trial.learnt() for trial in trials]
        row = [name, f"{best.lr:g}", f"{learnt[0]['parameters']:,}"]
        if bad := sum(loss_of(one) == math.inf for one in learnt):       # what it left, if anything, is not worth asking
            rows.append([*row, f"diverged, {bad} of {len(learnt)} seeds", *[""] * 5])
            for points in panels.values():
                points.append((name, None))                          # a cross
            continue
        results = [one | trial.asked() for one, trial in zip(learnt, trials)]
        speeds = (f"{statistics.median(result[key] for result in results):,.0f}"
                  for key in ("examples_per_second", "adapter_per_second", "merged_per_second"))
        rows.append([*row, spread(map(loss_of, results), "{:.3f}"),
                     spread((result["right"] for result in results), "{:.1%}"), *speeds, f"{results[0]['kept_mb']:.2f}"])
        panels["held-out loss"].append((name, statistics.median(map(loss_of, results))))
        panels["right to the letter"].append((name, statistics.median(result["right"] for result in results)))
    picture(args, [(title, "", title, {"median of the seeds": points}) for title, points in panels.items()])
    chosen = (f"learning rate: the best of {', '.join(f'{lr:g}' for lr in args.lrs)} by the held-out loss of seed "
              f"{args.seeds[0]}; " if len(args.lrs) > 1 else "")
    return [*markdown(["method", "learning rate", "trained", "held-out loss", "right to the letter", "train, examples/s",
                       "generate, tokens/s", "merged", "kept for backward, MiB"], rows), "",
            f"({chosen}{len(args.seeds)} seeds; ±: how far the furthest lies from their mean)"]
