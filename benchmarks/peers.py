"""transformers + PEFT, and litgpt, against this: training and generation, alternated, in fresh processes.

Both sides read one folder in Hugging Face's layout, and the same rows of ids in the same order.  The peers' side is
tests/peers.py, run by a python that has them.
"""
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from finetune.arguments import number, text
from finetune.dataset import count_answer
from finetune.options import parse_options
from finetune.hardware import DTYPES, pick_hardware
from llama.checkpoint import is_huggingface, load_checkpoint
from llama.guesses import NgramPool
from llama.sampling import generate as generate_ids
from lora.prepack import prepack

from . import runs
from .measure import Peaks
from .runs import most, rows_of, run_of, say, shape_folder
from .tables import ROOT, cell, listed, markdown, picture, tried

FILES = [ROOT / "tests/peers.py"]
PEERS = "transformers", "litgpt"
CELLS = {
    "train bf16 batch 4": dict(precision="bf16", batch=4),
    "train fp32 batch 4": dict(precision="fp32", batch=4),
    "train bf16 batch 4 dropout 0.05": dict(precision="bf16", batch=4, dropout=0.05),
    "train bf16 batch 32 share-prefix": dict(precision="bf16", batch=32, flags=["--share-prefix"]),
    "train fp32 batch 4 fast-matmul": dict(precision="fp32", batch=4, flags=["--fast-matmul"]),
    "train bf16 batch 4 one 7b layer": dict(precision="bf16", batch=4, one_layer=True),
    "compiled train bf16 batch 4": dict(precision="bf16", batch=4, flags=["--compile"], warm=12),
    "generate bf16 64 tokens": dict(precision="bf16", batch=1, new=64),
    "long generate bf16 256 tokens": dict(precision="bf16", batch=1, new=256),
    "generate fp32 64 tokens": dict(precision="fp32", batch=1, new=64),
    "generate bf16 64 tokens batch 8": dict(precision="bf16", batch=8, new=64, caches=[True]),
    **{f"grid {precision} batch {batch}{' checkpointing' * checkpointing}": dict(precision=precision, batch=batch, checkpointing=checkpointing)
       for precision, checkpointing, batch in product(("fp32", "bf16"), (False, True), (1, 4, 16))},
}
USUAL = ["train*", "generate*"]                      # ten minutes on two cores


def add_flags(parser):
    runs.add_flags(parser, warm=1, steps=4, repeats=2)
    flag = parser.add_argument
    flag("--cells", metavar="PATTERN,...", type=listed(text), default=USUAL,
         help=f"what is compared, * for anything, of: {', '.join(CELLS)} (default: {','.join(USUAL)})")
    flag("--against", metavar="NAME,...", type=listed(text), default=["transformers"], help=f"of {','.join(PEERS)} (default: transformers)")
    flag("--peer-python", metavar="PATH,...", type=listed(text), default=[sys.executable],
         help="pythons that have them, each its own packages (default: this one)")
    flag("--prompts", metavar="N", type=number(int, 1), default=2,
         help="prompts of 64 tokens; longer answers and batches take fewer (default: 2)")


def peer_python(pythons, peer):
    """The first of the pythons that has this peer, or None."""
    for python in pythons:
        try:
            if subprocess.run([python, "-c", f"import {peer}"], capture_output=True).returncode == 0:
                return os.path.abspath(shutil.which(python))
        except OSError as error:
            raise ValueError(f"--peer-python {python} does not run: {error.strerror}") from None


def theirs(python, ask, rows):
    """What tests/peers.py answers, run by the peer's own python; nothing where memory did not suffice."""
    run = subprocess.run([python, "-m", "tests.peers"], input=json.dumps({**ask, "rows": rows}), capture_output=True, text=True, cwd=ROOT)
    last = ["", *run.stderr.strip().splitlines()][-1]
    if run.returncode == -9 or run.returncode and "memory" in last.lower():
        return {}
    if run.returncode:
        raise ValueError(f"{ask['peer']}: {last}")
    return json.loads(run.stdout.splitlines()[-1])


def generated(run):
    """{tokens_per_second, peaks, ids}: greedy, past any eos, after the first prompts (one, or a batch) to warm up, with what was
    said in answers to others before; from the first again when they end, but then with nothing."""
    args = parse_options(run["flags"])
    device, precision = pick_hardware(args.device, args.precision)
    peaks, prompts = Peaks(device), [tokens[:len(tokens) - count_answer(labels)] for tokens, labels in rows_of(run)]
    peaks("start")
    model, _ = load_checkpoint(args.checkpoint, args.layers, DTYPES[precision], device, init=args.init)
    prepack(model.eval())
    peaks("weights")
    batch, answers, seconds, pool = run["batch"], [], [], NgramPool()
    for start in range(0, batch * run["prompts"] + batch, batch):
        asked = [prompts[i % len(prompts)] for i in range(start, start + batch)]
        if start + batch > len(prompts):
            pool.clear()                             # their answers would be known
        some, began = [[] for _ in asked], time.perf_counter()
        for i, token in generate_ids(model, asked, run["new"] if start else min(run["new"], 64), -1, pool=pool):
            some[i].append(token)
        seconds.append(time.perf_counter() - began)
        answers += some
    peaks("generate")
    if any(len(answer) < run["new"] for answer in answers[batch:]):
        raise ValueError(f"{args.checkpoint} takes {model.args.max_seq_len} tokens: too few for these prompts and {run['new']} new ones")
    return dict(tokens_per_second=batch * run["prompts"] * run["new"] / sum(seconds[1:]), peaks=peaks.mb, ids=answers[batch:])


def contestants(args, name, pythons):
    """{who: (settings, what is measured with them)} of a cell.  More examples a step make fewer steps, so that each cell
    reads about as many."""
    wanted = {"dropout": 0.0, "checkpointing": False, "flags": [], "caches": [True, False], "one_layer": False, "warm": args.warm, **CELLS[name]}
    base = SimpleNamespace(**vars(args))
    if wanted["one_layer"]:
        base.folder, base.checkpoint, base.layers, base.data = shape_folder("7b", args.out), None, 1, None
    steps, generates = max(1, round(args.steps * 4 / wanted["batch"])), "new" in wanted
    asked = {key: wanted[key] for key in ("precision", "batch", "dropout", "checkpointing", "new") if key in wanted}
    if generates:
        asked["prompts"] = max(1, round(args.prompts * 64 / wanted["new"] / wanted["batch"]))
    run = run_of(base, "--precision", wanted["precision"], "--batch-size", str(wanted["batch"]), "--accumulation-steps", "1",
                 "--dropout", str(wanted["dropout"]), *["--checkpointing"] * wanted["checkpointing"], *wanted["flags"],
                 warm=wanted["warm"], steps=steps, repeats=1) | asked
    sides = {"ours": (run, lambda: tried(generated if generates else runs.measured, run))}
    for who, python in pythons.items():
        for cache in (wanted["caches"] if who == "transformers" else [True] * (wanted["batch"] == 1)) if generates else [None]:
            ask = {**asked, "peer": who, "cache": cache, "folder": str(Path(base.folder).resolve()), "random": not base.checkpoint,
                   "layers": base.layers, "device": args.device, "steps": steps, "warm": wanted["warm"], "data": base.data}
            said = {None: "", True: ", KV cache", False: ", no cache"}[cache]
            sides[who + said] = ask, lambda python=python, ask=ask: theirs(python, ask, rows_of(run))
    return sides


def make(args):
    names = [name for name in CELLS if any(fnmatch.fnmatch(name, pattern) for pattern in args.cells)]
    if not names:
        raise ValueError(f"--cells {','.join(args.cells)} is none of: {'; '.join(CELLS)}")
    if unknown := set(args.against) - set(PEERS):
        raise ValueError(f"--against {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    runs.settle(args)
    pythons = {peer: python for peer in args.against if (python := peer_python(args.peer_python, peer))}
    if not pythons:
        raise ValueError(f"no --peer-python has {' or '.join(args.against)}: tests/requirements.txt and tests/requirements-litgpt.txt "
                         "say what to install, each in an environment of its own")
    if not is_huggingface(Path(args.folder)):
        raise ValueError(f"{args.folder} is not in Hugging Face's layout, which both sides read: "
                         f"python -m finetune.convert {args.folder} COPY --to hf")
    tables, panels, versions = {}, {}, {}
    for name in names:
        sides = contestants(args, name, pythons)
        results = {who: [] for who in sides}
        for i in range(args.repeats):
            for who in list(sides)[::-1 if i % 2 else 1]:               # A B B A: nobody always comes first
                settings, measure = sides[who]
                result = cell(args, settings | {"who": who, "round": i, "cell": name}, measure)
                say(f"{name}, {who}, {i + 1}/{args.repeats}", result)
                results[who].append(result)
                versions |= result.get("versions", {})
        header, row = versus(results, "new" in CELLS[name] and args.checkpoint)
        tables.setdefault(tuple(header), []).append([name, *row])
        for who, some in results.items():
            if all("peaks" in result for result in some):
                panels.setdefault(name.partition(" ")[0], {}).setdefault(who, []).append(
                    (name, statistics.median(result["tokens_per_second"] for result in some)))
    picture(args, [(kind, "", "tokens/s", lines) for kind, lines in panels.items()])
    return [*(line for header, rows in tables.items() for line in [*markdown(["", *header], rows), ""]),
            f"(medians of {args.repeats} runs each, alternated, every run a process of its own, {args.warm} steps or a first prompt to warm "
            f"up; tokens are real, never padding; MiB: the peak of the whole process, or of the GPU's allocations; "
            f"{', '.join(f'{name} {version}' for name, version in versions.items())}, not compiled)"]


def versus(results, texts):
    """(header, row) of {who: results}: each one's speed and peak, and ours by theirs.  texts: whether they are the same too."""
    header, row = [], []
    done = {who: some for who, some in results.items() if all("peaks" in result for result in some)}
    middle = {who: (statistics.median(result["tokens_per_second"] for result in some), statistics.median(map(most, some)))
              for who, some in done.items()}
    for who, some in results.items():
        header += [f"{who}, tokens/s", "MiB"]
        row += [f"{middle[who][0]:,.1f}", f"{middle[who][1]:,.0f}"] if who in middle else ["out of memory", ""]
        if who != "ours":
            header += ["speed, ours / theirs", "memory"]
            both = zip(middle["ours"], middle[who]) if {"ours", who} <= middle.keys() else ()
            row += [f"{ours / their:.2f}" for ours, their in both] or ["", ""]
        if texts and who.startswith("transformers"):
            header.append("same text")
            ids = [one[0].get("ids") for one in (results["ours"], some)]
            row.append("" if None in ids else "yes" if ids[0] == ids[1] else "no")
    return header, row
