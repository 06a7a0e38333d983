"""What does a teacher add?  Students of three kinds, each trained on the answers alone and with --teacher."""
import contextlib
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import generate
import train
from benchmark import fresh, spread
from llama.alpaca import read_examples
from llama.checkpoint import PARAMS, TOKENIZER, read_params
from llama.evaluate import Exam, measures

EPOCHS = 6                                           # beyond that, what is trained on the answers alone only gets worse
WAYS = {"alone": [], "distilled": ["--distill-temperature", "2", "--distill-weight", "0.5"]}


def made(folder, tokenizer, **params):
    """A folder that --init random can begin from."""
    folder.mkdir()
    (folder / TOKENIZER).write_bytes(tokenizer.model)
    (folder / PARAMS).write_text(json.dumps(params))
    return folder


def students(checkpoint, folder):
    """{name: flags of train.py}: a quarter of the teacher's own blocks, a small transformer, and no transformer at all."""
    sizes, tokenizer = read_params(checkpoint)
    quarter = max(1, sizes.n_layers // 4)
    small = dict(dim=128, n_layers=2, vocab_size=sizes.vocab_size)
    return {f"the teacher's first {quarter} of {sizes.n_layers} blocks": ["--checkpoint", str(checkpoint), "--layers", str(quarter)],
            "a transformer, 2 blocks of 128, random": ["--init", "random", "--checkpoint", str(made(
                folder / "transformer", tokenizer, **small, n_heads=4, multiple_of=32))],
            "an LSTM, 2 layers of 128, random": ["--init", "random", "--checkpoint", str(made(
                folder / "lstm", tokenizer, **small, rnn="lstm"))]}


def examined(flags, examples):
    """What generate.py with these flags answers to examples: parameters, and what evaluate.measures says."""
    args = generate.parse_args(flags)
    device, args.precision = generate.pick_hardware(args.device, args.precision)
    model, tokenizer, _ = generate.load(args, device)
    exam = Exam(examples, tokenizer, model.args.max_seq_len)
    found = measures({name: column.sum(0) for name, column in exam.take(model).items()})
    return {"parameters": sum(p.numel() for p in model.parameters()), **{name: value.item() for name, value in found.items()}}


def trained(argv, examples):
    """The same of what train.py makes with these flags."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(argv)
    args = train.parse_args(argv)
    left = ["--checkpoint", args.out, "--adapter", "none"] if args.method == "full" else ["--adapter", args.out + "/adapter.pt"]
    return examined([*left, *["--precision", args.precision] * bool(args.precision)], examples)


def make(args):
    """Lines of Markdown.  args: checkpoint, adapter (the teacher's; without one, a LoRA is trained first), data, val_data,
    precision, None where train.py's default serves; epochs of the students; seeds, lrs, out, and `said`, the command.
    Each cell is in args.out/distill.json at once.

    A student's learning rate is the one of args.lrs that gives the lowest held-out loss with the first seed, chosen for
    either way of training on its own.
    """
    teacher, data, cells = args.checkpoint or str(train.DEMO), [], []
    for name in ("data", "val_data", "precision"):
        if getattr(args, name) is not None:
            data += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    data += ["--val-data", str(train.DEMO / "held_out.json"), "--data", str(train.DEMO / "train.json")] * (args.val_data is None)
    examples = read_examples(args.val_data or train.DEMO / "held_out.json")

    def cell(function, *rest, **about):
        cells.append(about | fresh(function, *rest, examples))
        (Path(args.out) / "distill.json").write_text(json.dumps({"command": args.said, "cells": cells}, indent=1) + "\n")
        return cells[-1]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        precision = ["--precision", args.precision] * bool(args.precision)
        rows = {}
        if args.adapter:
            rows["teacher", ""] = [cell(examined, ["--checkpoint", teacher, "--adapter", args.adapter, *precision], name="teacher")]
        else:
            base = ["--checkpoint", teacher] * bool(args.checkpoint)
            rows["teacher", ""] = [cell(trained, [*base, *data, "--out", str(folder / "teacher")], name="teacher")]
        steps = ["--epochs", str(args.epochs or EPOCHS), "--batch-size", "32", "--accumulation-steps", "1"]
        asked = ["--teacher", teacher, "--teacher-adapter", args.adapter or str(folder / "teacher/adapter.pt")]
        for name, flags in students(teacher, folder).items():
            for way, also in WAYS.items():
                def run(lr, seed):
                    argv = [*flags, *data, *steps, "--method", "full", "--lr", str(lr), "--seed", str(seed), "--out", str(folder / "student")]
                    result = cell(trained, argv + (asked + also) * bool(also), name=name, way=way, lr=lr, seed=seed)
                    shutil.rmtree(folder / "student")
                    return result
                first = min((run(lr, args.seeds[0]) for lr in args.lrs), key=lambda result: result["loss"])
                rows[name, way] = [first, *(run(first["lr"], seed) for seed in args.seeds[1:])]
    return table(rows, ["exact_match"] + ["accuracy", "mcc"] * ("accuracy" in rows["teacher", ""][0])) + [
        "", f"(temperature 2, weight 0.5; {len(args.seeds)} seeds; ±: how far the furthest lies from their mean; learning rate: the best of "
        f"{', '.join(f'{lr:g}' for lr in args.lrs)} by the held-out loss of seed {args.seeds[0]}, for each row)"]


def table(rows, shown):
    """Lines of Markdown from {(student, way): cells}; below them, what distillation changed in each student's means."""
    titles = {"exact_match": "right to the letter", "accuracy": "accuracy", "mcc": "MCC"}
    forms = {"loss": "{:.3f}", "exact_match": "{:.1%}", "accuracy": "{:.1%}", "mcc": "{:.3f}"}
    lines = [f"| model | trained | learning rate | parameters | held-out loss | {' | '.join(titles[name] for name in shown)} |",
             "|---" * (5 + len(shown)) + "|"]
    for (name, way), cells in rows.items():
        lr = f"{cells[0]['lr']:g}" if "lr" in cells[0] else ""
        lines.append(f"| {name} | {way} | {lr} | {cells[0]['parameters']:,} | " + " | ".join(
            spread((cell[measure] for cell in cells), forms[measure]) for measure in ("loss", *shown)) + " |")
    lines.append("")
    for name in dict.fromkeys(name for name, way in rows if way):
        alone, distilled = ([statistics.mean(cell[measure] for cell in rows[name, way]) for measure in ("loss", shown[-1])] for way in WAYS)
        lines.append(f"What the teacher changed in {name}: held-out loss {distilled[0] - alone[0]:+.3f}, {titles[shown[-1]]} "
                     f"{distilled[1] - alone[1]:+.3f}.")
    return lines
