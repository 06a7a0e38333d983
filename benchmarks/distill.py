"""What does a teacher add?  Students of three kinds, each trained on the answers alone and with --teacher."""
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from finetune.options import DEMO
from finetune.arguments import number, text
from finetune.dataset import read_examples
from llama.checkpoint import PARAMS, TOKENIZER, read_params

from .runs import add_training_flags, examined, finished, training_flags
from .tables import cell, fresh, listed, markdown, spread

WAYS = {"alone": [], "distilled": ["--distill-temperature", "2", "--distill-weight", "0.5"]}


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--adapter", metavar="PATH", type=text, help="the teacher's, over --checkpoint (default: a LoRA is trained first)")
    flag("--epochs", metavar="N", type=number(int, 1), default=6,
         help="of the students (default: 6; on the demo's answers alone they only get worse after that)")
    flag("--seeds", metavar="N,...", type=listed(number(int, 0)), default=[0, 1, 2], help="runs of each (default: 0,1,2)")
    flag("--lrs", metavar="F,...", type=listed(number(float, 0, open_low=True)), default=[1e-3, 3e-3],
         help="learning rates to choose from (default: 1e-3,3e-3)")


def made(folder, tokenizer, **params):
    """A folder that --init random can begin from."""
    folder.mkdir(exist_ok=True)
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


def trained(argv, examples):
    """What `examined` says of what train.py makes with these flags."""
    args, _ = finished([*argv, "--overwrite"])
    left = ["--checkpoint", args.out, "--adapter", "none"] if args.method == "full" else ["--adapter", args.out + "/adapter.pt"]
    return examined([*left, *["--precision", args.precision] * bool(args.precision)], examples)


def trained_beside(argv, examples):
    """The same, and nothing of it is left."""
    with tempfile.TemporaryDirectory() as out:
        return trained([*argv, "--out", out], examples)


def make(args):
    """A student's learning rate is the one of --lrs that gives the lowest held-out loss with the first seed, chosen for
    either way of training on its own."""
    teacher, data, folder, rows = args.checkpoint or str(DEMO), training_flags(args), args.out / "distill", {}
    if args.adapter and not args.checkpoint:
        raise ValueError("--adapter is the teacher's over a --checkpoint; name that too")
    if args.checkpoint:
        data = data[2:]                                           # each student has a folder of its own
    if not args.data:
        data += ["--data", str(DEMO / "train.json"), "--val-data", str(DEMO / "held_out.json")]
    examples, taught = read_examples(args.val_data or DEMO / "held_out.json"), [*["--checkpoint", teacher] * bool(args.checkpoint), *data]
    home = folder / f"teacher-{hashlib.sha256(json.dumps([taught, args.on]).encode()).hexdigest()[:8]}"        # one for all it depends on
    adapter = args.adapter or str(home / "adapter.pt")
    folder.mkdir(exist_ok=True)

    def known(name, way, function, argv):
        result = cell(args, dict(name=name, way=way, flags=argv), lambda: fresh(function, argv, examples))
        print(f"{name}, {way or 'itself'}: held-out loss {result['loss']:.4f}, right {result['exact_match']:.1%}", file=sys.stderr, flush=True)
        return result
    if args.adapter:
        flags = ["--checkpoint", teacher, "--adapter", adapter, *["--precision", args.precision] * bool(args.precision)]
        rows["teacher", ""] = [known("teacher", "", examined, flags)]
    else:
        flags = [*taught, "--out", str(home)]
        rows["teacher", ""] = [known("teacher", "", trained, flags)]
        if not Path(adapter).exists():
            fresh(trained, flags, examples)
    steps = ["--epochs", str(args.epochs), "--batch-size", "32", "--accumulation-steps", "1", "--share-prefix"]
    asked = ["--teacher", teacher, "--teacher-adapter", adapter]
    for name, flags in students(teacher, folder).items():
        for way, also in WAYS.items():
            def run(lr, seed):
                argv = [*flags, *data, *steps, "--method", "full", "--lr", str(lr), "--seed", str(seed), *(asked + also) * bool(also)]
                return known(name, way, trained_beside, argv) | {"lr": lr}
            first = min((run(lr, args.seeds[0]) for lr in args.lrs), key=lambda result: result["loss"])
            rows[name, way] = [first, *(run(first["lr"], seed) for seed in args.seeds[1:])]
    return table(rows, ["exact_match"] + ["accuracy", "mcc"] * ("accuracy" in rows["teacher", ""][0])) + [
        "", f"(temperature 2, weight 0.5; {len(args.seeds)} seeds; ±: how far the furthest lies from their mean; learning rate: the best of "
        f"{', '.join(f'{lr:g}' for lr in args.lrs)} by the held-out loss of seed {args.seeds[0]}, for each row)"]


def table(rows, short_path):
    """Lines of Markdown from {(student, way): cells}; below them, what distillation changed in each student's means."""
    titles = {"exact_match": "right to the letter", "accuracy": "accuracy", "mcc": "MCC"}
    forms = {"loss": "{:.3f}", "exact_match": "{:.1%}", "accuracy": "{:.1%}", "mcc": "{:.3f}"}
    lines = markdown(["model", "trained", "learning rate", "parameters", "held-out loss", *(titles[name] for name in short_path)], [
        [name, way, f"{cells[0]['lr']:g}" if "lr" in cells[0] else "", f"{cells[0]['parameters']:,}",
         *(spread((cell[measure] for cell in cells), forms[measure]) for measure in ("loss", *short_path))] for (name, way), cells in rows.items()])
    lines.append("")
    for name in dict.fromkeys(name for name, way in rows if way):
        alone, distilled = ([statistics.mean(cell[measure] for cell in rows[name, way]) for measure in ("loss", short_path[-1])] for way in WAYS)
        lines.append(f"What the teacher changed in {name}: held-out loss {distilled[0] - alone[0]:+.3f}, {titles[short_path[-1]]} "
                     f"{distilled[1] - alone[1]:+.3f}.")
    return lines
