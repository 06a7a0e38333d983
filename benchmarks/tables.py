"""How measured tables come about: cells in fresh processes, kept as soon as they are measured; Markdown and pictures."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path

import torch

from finetune.errors import in_one_line
from finetune.pictures import Panel, draw
from llama.files import read_object, write_json

ROOT = Path(__file__).resolve().parents[1]


class OutOfMemory(ValueError):
    """Memory did not suffice, or something else killed the process."""


def first_to_go():
    """If memory ends, Linux is to end this process and not the one that waits for it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def begin_cell():
    """In a process for a cell: it ends with the one that waits for it, however that ends."""
    first_to_go()
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def within_memory(function, *args):
    """function(*args); OutOfMemory where torch, CUDA or Python cannot allocate."""
    try:
        return function(*args)
    except (RuntimeError, MemoryError) as error:                     # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("memory", "bad_alloc")):
            raise OutOfMemory(f"{function.__name__} ran out of memory") from None
        raise


def fresh(function, *args):
    """function(*args) in a process of its own, which starts without what the last one left in memory or caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_cell) as pool:
        try:
            return pool.submit(within_memory, function, *args).result()
        except BrokenProcessPool:
            raise OutOfMemory(f"{function.__name__} was killed: out of memory?") from None


def tried(function, *args):
    """fresh(function, *args), a dict; an empty one where memory did not suffice."""
    try:
        return fresh(function, *args)
    except OutOfMemory:
        return {}


def machine():
    """One line about what the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] \
        if cpuinfo.exists() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")


def cell(args, settings, compute):
    """What compute() returns, a dict, or what args.out has of these settings already, on args.on: this machine, this code."""
    settings, path = json.loads(json.dumps(settings | {"on": args.on})), args.out / f"{args.table}.json"

    def known():
        kept = read_object(path).get("cells") if path.exists() else []
        if not isinstance(kept, list) or not all(isinstance(one, dict) and {"settings", "result"} <= one.keys() for one in kept):
            raise ValueError(f"{path} holds something else than finished cells; delete it, or name another --out")
        return kept
    for one in known():
        if one["settings"] == settings:
            return one["result"]
    result = compute()
    write_json(path, {"cells": [*known(), {"command": args.said, "settings": settings, "result": result}]})
    return result


def code(*files):
    """Eight digits that change with what is measured: train.py and what it imports, how it is measured, and these files,
    the table's own page and the examples."""
    digest = hashlib.sha256()
    for path in [*sorted(path for pattern in ("train.py", "generate.py", "llama/*.py", "lora/*.py") for path in ROOT.glob(pattern)),
                 ROOT / "benchmarks/measure.py", ROOT / "benchmarks/runs.py", *files]:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:8]


def listed(kind):
    """A type for argparse: a list of `kind`, with commas between."""
    def parse(value):
        return [kind(part.strip()) for part in value.split(",")]
    parse.__name__ = "list"
    return parse


def markdown(header, rows):
    return ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]


def spread(values, form):
    """Mean, and behind it how far the furthest lies from it."""
    values = list(values)
    mean = statistics.mean(values)
    return form.format(mean) + (f" ± {form.format(max(abs(value - mean) for value in values))}" if len(values) > 1 else "")


def picture(args, panels):
    """out/TABLE.png of llama/pictures.py's panels, where matplotlib is installed; no table is lost for a picture."""
    if find_spec("matplotlib"):
        try:
            draw(args.out / f"{args.table}.png", [Panel(*panel, from_zero=True) for panel in panels], args.said)
        except Exception as error:                               # a package that does not fit its others raises anything
            print(f"no picture: {in_one_line(error)}", file=sys.stderr)
