"""The runs and measurements behind paper.py: a LoRA per row and seed, and what is in it."""
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.evaluate import score_answers
from finetune.exam import Exam
from finetune.examples import read_examples
from finetune.folder import ADAPTER
from finetune.hardware import DTYPES
from finetune.options import DEMO, is_demo
from llama import load_checkpoint
from llama.peft import adapter_at
from lora.adapter import last_part
from lora.layers import lora_layers

from . import claims
from .runs import flag_words
from .tables import (
    CellRun,
    Table,
    measure_side_by_side,
    report,
    run_fresh,
    worker_processes,
)
from .training import (
    Task,
    examine,
    finish_run,
    load_answering_model,
    new_prose,
    values_of,
)

TEXT_PARTS = 10
EXAMPLES_PER_PART = 200                              # of the demo's prose


@dataclass(frozen=True)
class Study:
    """What all runs have in common.  flags: train.py's, besides those of the task."""
    table: Table
    task: Task
    flags: dict
    seeds: list

    def runs(self, targets: str, r: int) -> list:
        """Return the Run of each seed."""
        return [Run(self, targets, r, seed) for seed in self.seeds]

    def results(self, targets: str, r: int) -> list:
        """Return the result of each seed's Run."""
        return [run.result() for run in self.runs(targets, r)]

    def train_all(self, rows: list, n_processes: int):
        """Make the cells of all Runs; rows: (targets, r)."""
        runs = []
        for targets, r in dict.fromkeys(rows):       # The budget's row may be one of the ranks'.
            runs += [run.as_cell for run in self.runs(targets, r)]
        with worker_processes(n_processes) as pool:
            measure_side_by_side(self.table, runs, pool, n_processes)

    def cell(self, settings: dict, title: str, compute: Callable):
        """Return compute() as a cell of the table."""
        result = self.table.cell(settings, compute)
        report(title)
        return result


@dataclass(frozen=True)
class Run:
    """A LoRA on some matrices.  Its folder stays, below the table's, for what follows."""
    study: Study
    targets: str
    r: int
    seed: int

    @property
    def flags(self) -> list:
        settings = {"targets": self.targets, "r": self.r, "seed": self.seed}
        return [*self.study.task.flags(), *flag_words(self.study.flags | settings)]

    @property
    def adapter(self) -> Path:
        """The adapter's file, another one for all that the run depends on."""
        key = json.dumps([self.flags, self.study.table.conditions])
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.study.table.out / "paper" / digest / ADAPTER

    @property
    def as_cell(self) -> CellRun:
        task = self.study.task
        flags = [*self.flags, "--out", str(self.adapter.parent), "--overwrite"]
        return CellRun(f"{self.targets}, r {self.r}, seed {self.seed}",
                       {"flags": self.flags, "questions": task.questions}, train_and_examine,
                       (flags, self.adapter, task.questions, task.precision))

    def result(self) -> dict:
        """Return what `train_and_examine` found.  `train_all` must have made the cell."""
        return self.study.table.cell(self.as_cell.settings, None)

    def kept_adapter(self) -> Path:
        """Return the adapter's file; train it again if it was deleted."""
        if not self.adapter.exists():
            run_fresh(self.as_cell.function, *self.as_cell.arguments)
        return self.adapter


def train_and_examine(argv: list, adapter: Path, questions: str, precision: str | None) -> dict:
    """Run train.py; return the measures of its adapter's answers, and what it amplifies.

    The result has "amplified": {target: [[factor, seen / random] of each block]}, and "parameters",
    the trained ones.  Raises ValueError if the run leaves no adapter.
    """
    finish_run(argv)
    if not adapter.exists():
        raise ValueError("a run diverged before its first save: give a lower --lr")
    flags = flag_words({"adapter": adapter, "precision": precision})
    result = examine(flags, read_examples(questions))
    model, _ = load_answering_model(flags)
    trained = 0
    amplified = {}
    for path, layer in lora_layers(model).items():
        A, B = layer.factors()
        trained += A.numel() + B.numel()
        A = A.detach().float()
        B = B.detach().float()
        block = claims.amplification(layer.base.weight.float(), layer.scale * B, A)
        blocks = amplified.setdefault(last_part(path), [])
        blocks.append([block.factor, block.seen / block.random])
    return result | {"parameters": trained, "amplified": amplified}


def common_directions(pairs: list, sizes: list) -> list:
    """Return {target: [phi(A1, A2, i, i) for i in sizes]} of each pair of adapters' files.

    The values are means over the blocks.
    """
    results = []
    for first, second in pairs:
        first_tensors = adapter_at(first)["tensors"]
        second_tensors = adapter_at(second)["tensors"]
        by_target = {}
        for name, A in first_tensors.items():
            path, _, kind = name.rpartition(".")
            if kind == "lora_A":
                phis = [claims.subspace_similarity(A, second_tensors[name], i, i) for i in sizes]
                by_target.setdefault(last_part(path), []).append(phis)
        results.append({target: column_means(rows) for target, rows in by_target.items()})
    return results


def column_means(rows: list) -> list:
    """Return the mean of each column of a list of rows."""
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def losses_by_part(data_type: str, task: Task) -> list:
    """Return the base's loss in nats per token on each part of a text, with rounded weights."""
    dtype = DTYPES[task.precision or "fp32"]
    model, tokenizer = load_checkpoint(task.checkpoint or DEMO, dtype=dtype,
                                       convert=claims.RoundTrip(data_type))
    losses = []
    for examples in parts_of_text(task):
        exam = Exam(examples, tokenizer, model.args.max_seq_len)
        losses.append(values_of(score_answers(model.eval(), exam.rows))["loss"])
    return losses


def parts_of_text(task: Task) -> list:
    """Return parts of a text that the base knows to continue, each a list of examples.

    Over the demo's base each part is new prose about its world, in the form that it was trained on.
    Over another base the held-out examples are dealt out.
    """
    if is_demo(task.checkpoint or DEMO):
        return [new_prose(1000 + i, EXAMPLES_PER_PART) for i in range(TEXT_PARTS)]
    examples = read_examples(task.questions)
    n_parts = min(TEXT_PARTS, len(examples))
    return [examples[i::n_parts] for i in range(n_parts)]


def directions_of(pairs: list, sizes: list) -> list:
    """Return `common_directions` of pairs of Runs, as a cell of the table."""
    def compute():
        adapters = [(first.kept_adapter(), second.kept_adapter()) for first, second in pairs]
        return run_fresh(common_directions, adapters, sizes)

    flags = [(first.flags, second.flags) for first, second in pairs]
    study = pairs[0][0].study
    return study.cell({"pairs": flags, "sizes": sizes}, "common directions", compute)


def losses_of_data_types(study: Study, data_types: list) -> dict:
    """Return {data type: the base's loss on each part of the text}, a cell of the table each."""
    task = study.task
    losses = {}
    for data_type in data_types:
        def compute(data_type=data_type):
            return run_fresh(losses_by_part, data_type, task)

        settings = {"data type": data_type, "checkpoint": task.checkpoint,
                    "questions": task.questions, "precision": task.precision}
        losses[data_type] = study.cell(settings, f"base, weights: {data_type}", compute)
    return losses
