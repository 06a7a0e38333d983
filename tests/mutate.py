"""Files changed at random, each given to a command line:  python -m tests.mutate SEED FIRST LAST

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
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch

import generate
import train
from finetune import convert
from llama import Tokenizer, load_checkpoint, save_checkpoint
from lora import save_adapter

from .helpers import EXAMPLES, ROOT, adapt, saved, tiny

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


# --- the files, and who reads them


def build(folder, tokenizer):
    """Write one small file of every kind."""
    model = tiny(tokenizer.vocab_size, n_layers=1, n_kv_heads=2)
    save_checkpoint(model, tokenizer, folder / "base")
    model, _ = load_checkpoint(folder / "base")
    save_checkpoint(model, tokenizer, folder / "hf", "hf", ".bin")
    save_checkpoint(model, tokenizer, folder / "shards", "hf", ".bin", 60_000)
    if HAS_SAFETENSORS:
        save_checkpoint(model, tokenizer, folder / "safe", "hf")
    save_adapter(adapt(model, r=2), folder / "adapter.pt")
    convert_adapter = [str(folder / "base"), "--adapter", str(folder / "adapter.pt"), "--to"]
    convert.main([*convert_adapter, "peft", str(folder / "peft"), "--bin"])
    convert.main([*convert_adapter, "int8", str(folder / "int8")])
    (folder / "data.json").write_text(json.dumps(EXAMPLES))


def reads(name):
    """Return command lines that read the file of this name."""
    top = name.split("/")[0]
    training = (train.main, "--checkpoint", "base", "--data", "data.json")
    answering = (generate.main, "--checkpoint", "base", "--adapter")
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
    try:
        return saved(swapped(content, draw, ODD_SAVED))
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


CHANGES = {".json": [in_json], ".pt": [in_saved, in_zip], ".pth": [in_saved, in_zip],
           ".bin": [in_saved, in_zip], ".safetensors": [in_safetensors], ".model": [in_bytes]}


# --- what comes of it


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(line, log, limit):
    """Return (outcome, details) of a command line; `log` is the file that stderr goes to."""
    program, *flags = line
    if program is train.main:
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
        shutil.rmtree("new", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
    text = os.pread(log, 10 ** 6, 0).decode(errors="replace")
    lines = []
    for printed in text.splitlines():
        is_news = not printed.startswith(("base ", "merged: ", "eos: "))
        if is_news and not printed.endswith(" answered"):
            lines.append(printed)
    outcome = "WRONG"
    is_in_proportion = "memory" not in text and not before < peak() > limit
    if is_in_proportion and code == 0 and not lines:
        outcome = "ok"
    if is_in_proportion and code == 2 and len(lines) == 1 and len(lines[0]) < 1200:
        outcome = "refused"
    return outcome, f"{code}, {time.process_time() - began:.1f} s: {text[-600:]}"


def change_files(folder, log, report, seed, numbers):
    """Run the cases of these numbers, in the folder where the files are."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    names = [name for name in names if Path(name).suffix in CHANGES]
    names = [name for name in names if not name.endswith(("generation_config.json",
                                                          "tokenizer_config.json", "args.json"))]
    for name in names:                               # Unchanged, all goes well.
        for line in reads(name):
            outcome, details = run(line, log, 2 ** 60)
            assert outcome == "ok", (line, details)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    address_space = n_pages * resource.getpagesize() + 2 * BYTES
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    limit = peak() + BYTES
    for number in numbers:
        draw = random.Random(f"{seed}, {number}")
        name = draw.choice(names)
        path = folder / name
        whole = path.read_bytes()
        change = draw.choice([in_bytes, *CHANGES[path.suffix] * 2])
        path.write_bytes(change(whole, draw))
        line = draw.choice(reads(name))
        outcome, details = run(line, log, limit)
        command = " ".join([line[0].__module__, *line[1:]])
        case = [number, outcome, name, change.__name__, command, details]
        os.write(report, json.dumps(case).encode() + b"\n")
        path.write_bytes(whole)


def main(seed, first, last):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)          # as on a command line
    folder = Path(tempfile.mkdtemp())
    report = os.dup(1)
    log = os.memfd_create("stderr")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(os.dup(log), "w", errors="backslashreplace")
    os.chdir(folder)
    try:
        build(folder, Tokenizer(ROOT / "finetune/demo/tokenizer.model"))
        change_files(folder, log, report, seed, range(first, last))
    except Exception as error:
        os.write(report, f"{error!r}\n".encode())
        raise
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
