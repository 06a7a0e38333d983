"""The LoRA family: each method at its best learning rate of a few, with several seeds."""
import contextlib
import hashlib
import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train
from finetune.answers import ANSWERED_AT_ONCE
from finetune.arguments import number
from finetune.batches import split
from finetune.dataset import encode_prompt
from finetune.examples import read_examples
from finetune.preflight import MIB, largest_batch_rows
from finetune.ranks import SINGLE_PROCESS
from finetune.run import ADAPTER
from llama.sampling import generate as generate_ids
from lora import merge_lora
from lora.methods import METHODS

from .measure import count_work
from .runs import flag_words, seconds_of
from .tables import Table, list_of, markdown, panel, report, run_fresh, spread
from .training import Task, add_training_flags, finish_run, load_answering_model, task_of

# A row's name, and the flags of train.py that it stands for.
FAMILY = {method: {"method": method} for method in METHODS}
FAMILY["lora, LoRA+ 4"] = {"method": "lora", "lora_plus_ratio": 4}
HEADER = ["method", "learning rate", "trained parameters", "held-out loss", "right to the letter",
          "train, examples/s", "generate, tokens/s", "generate merged, tokens/s",
          "kept for backward, MiB"]
MAX_NEW_TOKENS = 64                                  # of an answer that is compared
TIMED_TOKENS = 32                                    # per answer, where speed is measured


@dataclass(frozen=True)
class Trial:
    """A method at one learning rate and seed.  Its run stays in a folder below the table's.

    epochs: None for train.py's default.
    """
    table: Table
    task: Task
    epochs: int | None
    method: str
    lr: float
    seed: int

    def __str__(self):
        return f"{self.method}, lr {self.lr:g}, seed {self.seed}"

    @property
    def settings(self) -> dict:
        return {"flags": [*self.task.flags(), *flag_words({"epochs": self.epochs})],
                "questions": self.task.questions, "method": self.method, "lr": self.lr,
                "seed": self.seed}

    @property
    def out(self) -> Path:
        """The run's folder, another one for all that the run depends on."""
        key = json.dumps([self.settings, self.table.conditions])
        return self.table.out / "methods" / hashlib.sha256(key.encode()).hexdigest()[:12]

    @property
    def flags(self) -> list:
        flags = FAMILY[self.method] | {"lr": self.lr, "seed": self.seed, "out": self.out,
                                       "overwrite": True}
        return [*self.settings["flags"], *flag_words(flags)]

    def training(self) -> dict:
        """Return what `measure_training` finds, as a cell of the table."""
        settings = self.settings | {"part": "training"}
        result = self.table.cell(settings, lambda: run_fresh(measure_training, self.flags))
        report(f"{self}: held-out loss {loss_of(result):.4f}")
        return result

    def answering(self) -> dict:
        """Return what `measure_answering` finds, as a cell of the table."""
        adapter = self.out / ADAPTER

        def compute():
            if not adapter.exists():                 # The cell is saved, and the run was deleted.
                run_fresh(measure_training, self.flags)
            return run_fresh(measure_answering, adapter, self.task.questions, self.task.precision)

        result = self.table.cell(self.settings | {"part": "answering"}, compute)
        report(f"{self}: right {result['right']:.1%}")
        return result


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--epochs", metavar="N", type=number(int, 1),
         help="passes over the data (default: train.py's)")
    flag("--seeds", metavar="N,...", type=list_of(number(int, 0)), default=[0, 1],
         help="random seeds, one run each (default: 0,1)")
    flag("--lrs", metavar="F,...", type=list_of(number(float, 0, open_low=True)),
         default=[5e-3, 2e-2, 1e-1],
         help="learning rates to choose from, by held-out loss with the first seed (default: "
              "5e-3,2e-2,1e-1)")


def measure_training(argv: list) -> dict:
    """Run train.py; return held-out loss, parameters, speed and the memory kept for backward.

    The held-out loss is None if the run left no adapter, because its last steps were skipped.
    """
    options, rows = finish_run(argv)
    job = train.prepare(options, SINGLE_PROCESS)
    model, _ = train.load_model(job, torch.device("cpu"), "random")
    batch = job.collate(largest_batch_rows(job.train_set, job.plan))
    work = count_work(model, [batch], contextlib.nullcontext())
    has_adapter = (Path(options.out) / ADAPTER).exists()
    n_examples = rows[-1]["epoch"] * len(job.train_set)
    return {"held_out_loss": rows[-1].get("val_loss") if has_adapter else None,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "kept_mib": (work["copies"] + work["activations"]) / MIB,
            "process_mib": rows[-1]["peak_memory_mb"],
            "examples_per_second": n_examples / seconds_of(rows)}


def measure_answering(adapter: Path, questions: str, precision: str | None) -> dict:
    """Return {right, adapter_per_second, merged_per_second} of an adapter's answers.

    right: the share that is right to the letter, decoded greedily.  The others: tokens per second
    with the adapter, and with it merged into the weights.
    """
    flags = {"adapter": adapter, "precision": precision}
    model, tokenizer = load_answering_model(flag_words(flags))
    examples = read_examples(questions)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    answers = []
    for batch in split(prompts, ANSWERED_AT_ONCE):
        answers += answers_to(model, batch, tokenizer)
    n_right = 0
    for answer, example in zip(answers, examples, strict=True):
        if answer.strip() == example["output"].strip():
            n_right += 1
    first_prompts = prompts[:ANSWERED_AT_ONCE]
    adapter_speed = generating_speed(model, first_prompts)
    merge_lora(model)
    return {"right": n_right / len(examples), "adapter_per_second": adapter_speed,
            "merged_per_second": generating_speed(model, first_prompts)}


def answers_to(model, prompts: list, tokenizer) -> list:
    """Return the greedy answers to prompts (lists of ids) as text."""
    answers = [[] for _ in prompts]
    for i, token in generate_ids(model, prompts, MAX_NEW_TOKENS, tokenizer.eos_id):
        answers[i].append(token)
    return [tokenizer.decode(answer) for answer in answers]


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


def loss_of(training: dict) -> float:
    """Return the held-out loss; infinity if the run diverged, for which JSON has no number."""
    loss = training["held_out_loss"]
    return math.inf if loss is None else loss


def make(args, table: Table) -> list:
    """Train each method and ask its adapters; return lines of Markdown."""
    task = task_of(args)
    rows = []
    losses = []
    shares = []
    for method in FAMILY:
        firsts = [Trial(table, task, args.epochs, method, lr, args.seeds[0]) for lr in args.lrs]
        trials = trials_of(firsts, args.seeds[1:])
        trainings = [trial.training() for trial in trials]
        row = [method, f"{trials[0].lr:g}", f"{trainings[0]['parameters']:,}"]
        n_diverged = sum(loss_of(training) == math.inf for training in trainings)
        if n_diverged:                               # An adapter of such a run is not worth asking.
            rows.append([*row, f"diverged, {n_diverged} of {len(trials)} seeds", *[""] * 5])
            losses.append((method, None))
            shares.append((method, None))
            continue
        answerings = [trial.answering() for trial in trials]
        rows.append(row + columns_of(trainings, answerings))
        losses.append((method, statistics.median(map(loss_of, trainings))))
        shares.append((method, statistics.median(result["right"] for result in answerings)))
    table.draw([panel("Held-out loss of each method", "", "nats per answer token",
                      {"median of the seeds": losses}),
                panel("Held-out answers right to the letter", "", "share of answers",
                      {"median of the seeds": shares})])
    return [*markdown(HEADER, rows), "", note(args.lrs, args.seeds)]


def trials_of(firsts: list, seeds: list) -> list:
    """Return the best of the first Trials and, unless it diverged, the same with other seeds."""
    best = min(firsts, key=lambda trial: loss_of(trial.training()))
    if loss_of(best.training()) == math.inf:
        return [best]
    return [best, *(replace(best, seed=seed) for seed in seeds)]


def columns_of(trainings: list, answerings: list) -> list:
    """Return the columns of HEADER from the held-out loss on, over the results of all seeds."""
    columns = [spread(map(loss_of, trainings), ".3f"),
               spread([result["right"] for result in answerings], ".1%")]
    speeds = [result["examples_per_second"] for result in trainings]
    columns.append(f"{statistics.median(speeds):,.0f}")
    for key in ("adapter_per_second", "merged_per_second"):
        speeds = [result[key] for result in answerings]
        columns.append(f"{statistics.median(speeds):,.0f}")
    columns.append(f"{trainings[0]['kept_mib']:.2f}")
    return columns


def note(lrs: list, seeds: list) -> str:
    parts = []
    if len(lrs) > 1:
        choices = ", ".join(f"{lr:g}" for lr in lrs)
        parts.append(f"learning rate: the one of {choices} with the lowest held-out loss for seed "
                     f"{seeds[0]}")
    parts.append(f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed")
    parts.append("±: the largest distance of a seed from the mean")
    return f"({'; '.join(parts)})"
