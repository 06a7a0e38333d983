"""Files changed at random, each given to a command line that reads it:

    python -m benchmarks.mutate SEED FIRST LAST

Prints one JSON line per case, drawn from (seed, number) alone: [number, outcome, file, how it was
changed, command line, what came of it].  "ok" is a success, "refused" the one-line error with exit
code 2, all else is "WRONG".  A case that crashes the interpreter ends the process: the last line
is of the case before.
"""
import copy
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

try:
    import resource
except ImportError:                                  # Windows, where nothing here is called.
    resource = None

import torch

import generate
import train
from finetune import convert
from finetune.folder import ARGS, PREVIOUS
from finetune.run import Run
from llama import load_checkpoint, save_checkpoint
from lora import LoRAConfig, add_lora, lora_state_dict, save_adapter

from .lives import Place

HAS_SAFETENSORS = find_spec("safetensors") is not None
SECONDS = 10                                         # that a case may take, and bytes
BYTES = 2 * 2 ** 30
ODD = [None, True, -1, 0, 1, 3.5, 1e400, float("nan"), 2 ** 31, 2 ** 63, 10 ** 400, 1e-300, "",
       "x", "32", "../../x", "a\0b", "\ud800", "\x1b[2J", "line\nline", "x" * 5000, "lora", "none",
       [], {}, [1], [[]], {"a": 1}, ["wq"]]
ODD_SAVED = [*ODD, torch.tensor(float("nan")), torch.zeros(0), torch.zeros(3, dtype=torch.int64),
             torch.zeros(1).expand(2 ** 20, 2 ** 20), torch.ones(2, 2, dtype=torch.float64),
             torch.ones(4, 4).T, torch.ones(2).to_sparse(), torch.full((16, 16), float("inf")),
             (1, 2), b"bytes", {1: 2}, torch.float16]


TWO_STEPS = ["--checkpoint", "base", "--data", "data.json", "--max-steps", "2",
             "--accumulation-steps", "1", "--batch-size", "2"]
# Checksums show every change of these, so what loads must be what it was.
SUMMED = ("half/state.pt", "adapter.pt", "int8/adapter.pt")


# --- the files, and who reads them


def build(folder):
    """Write one small file of every kind beside `base` and data.json, which are there."""
    base = str(folder / "base")
    adapter = str(folder / "adapter.pt")
    model, tokenizer = load_checkpoint(base)
    save_checkpoint(model, tokenizer, folder / "hf", "hf", ".bin")
    save_checkpoint(model, tokenizer, folder / "shards", "hf", ".bin", 60_000)
    if HAS_SAFETENSORS:
        save_checkpoint(model, tokenizer, folder / "safe", "hf")
    add_lora(model, LoRAConfig(r=2))
    for tensor in lora_state_dict(model).values():
        torch.nn.init.normal_(tensor, std=0.1)       # as after training
    save_adapter(model, adapter)
    convert.main([base, "--adapter", adapter, "--to", "peft", str(folder / "peft"), "--bin"])
    convert.main([base, "--adapter", adapter, "--to", "int8", str(folder / "int8")])


class Stopped(Exception):
    """Ends a run after its first step."""


def build_half(folder):
    """Leave in `half` a run of two steps that was stopped after the first one."""
    def save_and_stop(run):
        run.save()
        raise Stopped

    end_step = Run.end_step
    Run.end_step = save_and_stop
    with suppress(Stopped):
        train.main([*TWO_STEPS, "--out", str(folder / "half")])
    Run.end_step = end_step
    (folder / "half" / PREVIOUS).unlink()


def reads(name):
    """Return command lines that read the file of this name."""
    top = name.split("/")[0]
    training = (train.main, "--checkpoint", "base", "--data", "data.json")
    answering = (generate.main, "--checkpoint", "base", "--adapter")
    if top == "half":
        return [(train.main, *TWO_STEPS, "--out", "out", "--resume")]
    if top == "data.json":
        return [training, (*answering, "none", "--data", name)]
    if top in ("base", "hf", "shards", "safe"):
        return [(train.main, "--checkpoint", top, "--data", "data.json"),
                (generate.main, "--checkpoint", top, "--adapter", "none"),
                (convert.main, top, "new", "--to", "meta")]
    adapter = "int8/adapter.pt" if top == "int8" else top
    return [(*training, "--adapter", adapter), (*answering, adapter),
            (convert.main, "base", "new", "--to", "int8", "--adapter", adapter)]


# --- how a file is changed


def in_bytes(data, draw):
    """Change, repeat or remove a few bytes, often near an end, where headers are."""
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        near = draw.randrange(min(len(data), 1500))
        at = draw.choice([near, len(data) - 1 - near, draw.randrange(len(data))])
        n = draw.choice([1, 4, 64, 500])
        piece = draw.choice([bytes(n), draw.randbytes(n), data[at:at + n] * 2, b""])
        data[at:at + n] = piece
        if draw.random() < 0.1 or not data:
            data[at:] = b"x"
    return bytes(data)


def swapped(content, draw, odd):
    """Return a copy with one node replaced, taken out, renamed or nested deeply."""
    content = copy.deepcopy(content)
    nodes = []
    unseen = [content]
    while unseen:
        item = unseen.pop()
        if isinstance(item, dict | list) and item:
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            nodes.append((item, keys))
            unseen += [item[key] for key in keys]
    if not nodes or draw.random() < 0.05:
        return draw.choice(odd)
    item, keys = draw.choice(nodes)
    key = draw.choice(keys)
    chance = draw.random()
    if chance < 0.7:
        item[key] = draw.choice(odd)
    elif chance < 0.8:
        del item[key]
    elif chance < 0.9 and isinstance(item, dict):
        item[draw.choice(["x", "", "dim", "../x", "\ud800", "a" * 3000])] = item.pop(key)
    else:
        for _ in range(draw.choice([3, 100])):
            item[key] = [item[key]]
    return content


def in_json(data, draw):
    return json.dumps(swapped(json.loads(data), draw, ODD)).encode()


def in_saved(data, draw):
    """Change a value of what torch.save wrote."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    file = io.BytesIO()
    try:
        torch.save(swapped(content, draw, ODD_SAVED), file)
        return file.getvalue()
    except (ValueError, OverflowError, UnicodeError):
        return data[:-10]                            # Pickle has no word for this value.


def in_zip(data, draw):
    """Change one record of torch.save's zip, with checksums that are right."""
    source = zipfile.ZipFile(io.BytesIO(data))
    names = source.namelist()
    chosen = draw.choice([*names, *[name for name in names if name.endswith("data.pkl")] * 9])
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w") as archive:
        for name in names:
            content = source.read(name)
            if name == chosen and content:
                content = in_bytes(content, draw)
            archive.writestr(name, content)
            if name == chosen and draw.random() < 0.1:
                archive.writestr(draw.choice([name, "x", "../data.pkl"]), content)
    return file.getvalue()


def in_safetensors(data, draw):
    """Change the header, and rarely its length too."""
    length, = struct.unpack("<Q", data[:8])
    text = in_json(data[8:8 + length], draw)
    n = len(text) if draw.random() < 0.9 else draw.choice([0, 1, len(text) + 1, 2 ** 60])
    return struct.pack("<Q", n) + text + data[8 + length:]


CHANGES = {".json": [in_json], ".jsonl": [in_bytes], ".pt": [in_saved, in_zip],
           ".pth": [in_saved, in_zip], ".bin": [in_saved, in_zip],
           ".safetensors": [in_safetensors], ".model": [in_bytes]}
# These are written for others, and not read here.
NOT_READ = ("generation_config.json", "tokenizer_config.json", ARGS)


# --- what comes of it

ADAPTER_OUT = "out/adapter.pt"


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(line, log, limit):
    """Return (outcome, details, trained adapter) of a command line; log: where stderr goes."""
    program, *flags = line
    if "--resume" in flags:
        shutil.copytree("half", "out")
    elif program is train.main:
        flags += ["--max-steps", "1", "--accumulation-steps", "1", "--batch-size", "2"]
    if program is generate.main:
        flags += ["--max-new-tokens", "1"]
        flags += [] if "--data" in flags else ["--instruction", "Say"]
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    before = peak()
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    try:
        code = program(flags) or 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stderr.flush()
        result = Path(ADAPTER_OUT).read_bytes() if Path(ADAPTER_OUT).exists() else None
        shutil.rmtree("new", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
    text = os.pread(log, 10 ** 6, 0).decode(errors="replace")
    lines = []
    for printed in text.splitlines():
        is_news = not printed.startswith(("base ", "merged: ", "eos: "))
        # sentencepiece warns of odd pieces itself, and absl that it does.
        is_warning = "sentencepiece_processor.cc:" in printed or "absl::InitializeLog()" in printed
        if is_news and not is_warning and not printed.endswith(" answered"):
            lines.append(printed)
    outcome = "WRONG"
    is_in_proportion = "memory" not in text and not before < peak() > limit
    if is_in_proportion and code == 0 and not lines:
        outcome = "ok"
    if is_in_proportion and code == 2 and len(lines) == 1 and len(lines[0]) < 1200:
        outcome = "refused"
    return outcome, f"{code}, {time.process_time() - began:.1f} s: {text[-600:]}", result


def change_files(log, report, seed, numbers):
    """Run the cases of these numbers in the current folder, where the files are."""
    names = [str(path) for path in sorted(Path().rglob("*")) if path.suffix in CHANGES]
    names = [name for name in names if not name.endswith(NOT_READ)]
    results = {}
    for name in names:                               # Unchanged, all goes well.
        for line in reads(name):
            outcome, details, results[line] = run(line, log, 2 ** 60)
            if outcome != "ok":
                write_case(report, -1, "WRONG", name, "unchanged", line, details)
                sys.exit(1)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = n_pages * resource.getpagesize() + 2 * BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    limit = peak() + BYTES
    for number in numbers:
        draw = random.Random(f"{seed}, {number}")
        name = draw.choice(names)
        path = Path(name)
        whole = path.read_bytes()
        change = draw.choice([in_bytes, *CHANGES[path.suffix] * 2])
        path.write_bytes(change(whole, draw))
        line = draw.choice(reads(name))
        outcome, details, result = run(line, log, limit)
        is_summed = change is in_bytes and name in SUMMED
        if outcome == "ok" and is_summed and result != results[line]:
            outcome = "WRONG"
            details += "it was loaded as something else"
        write_case(report, number, outcome, name, change.__name__, line, details)
        path.write_bytes(whole)


def write_case(report, number, outcome, *about):
    name, change, line, details = about
    command = " ".join([line[0].__module__, *line[1:]])
    case = [number, outcome, name, change, command, details]
    os.write(report, json.dumps(case).encode() + b"\n")


def read_cases(path):
    """Return the cases in a report, without one that was not written to its end."""
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def main(seed, numbers, report):
    """Run the cases of these numbers in the current folder, where lives.write_base has been."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)          # as on a command line
    report = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = os.open("stderr", os.O_RDWR | os.O_CREAT)
    sys.stderr = os.fdopen(os.dup(log), "w", errors="backslashreplace")
    os.dup2(log, 2)
    build(Path())
    build_half(Path())
    change_files(log, report, seed, numbers)


def print_cases(seed, first, last):
    """Run cases in a process of their own and print them; exit with its exit code."""
    with Place() as place:
        report = place.folder / "cases"
        child = place.start(lambda: main(seed, range(first, last), report))
        code, errors = place.end(child, within=20 * (last - first) + 60)
        sys.stdout.write(report.read_text() if report.exists() else "")
    sys.stderr.write(errors)
    sys.exit(code != 0)


if __name__ == "__main__":
    print_cases(*map(int, sys.argv[1:4]))
