"""Files changed at random, each given to a command line:  python -m tests.mutate SEED FIRST LAST [WHAT]

One JSON line a case, drawn from (seed, number) alone, on stdout: what was changed and how, what came of it.  "ok" is a
success or the one-line error with exit code 2.  The process may take 4 GB more than it has when it begins, and a case 10
seconds of its own: what needs more, or crashes the interpreter, ends it, and its last line tells the case before.
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

SECONDS, BYTES = 10, 2 * 2 ** 30                        # that a case may take, for each as many are beyond proportion
ODD = [None, True, False, -1, 0, 1, 2, 3.5, 1e400, float("nan"), 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 30, 10 ** 400, 1e-300, "", "x", "32",
       "../../x", "/etc/passwd", "..\\x", "a\0b", "\ud800", "\x1b[2J", "line\nline", "x" * 5000, "lora", "none", [], {}, [1], [[]], {"a": 1}, ["wq"],
       {"rope_type": "default"}]
ODD_SAVED = [torch.tensor(float("nan")), torch.zeros(0), torch.zeros(1).expand(2 ** 20, 2 ** 20), torch.zeros(3, dtype=torch.int64),
             torch.ones(2, 2, dtype=torch.float64), torch.zeros(2 ** 12, dtype=torch.int8), torch.ones(4, 4).T, torch.ones(2).to_sparse(),
             torch.full((16, 16), float("inf")), (1, 2), ("storage",), b"bytes", {1: 2}, torch.float16]


# ---- how: bytes -> bytes

def place(data, draw):
    """A position: anywhere, or near an end, where headers and directories are."""
    near = min(len(data), 1500)
    return draw.choice([draw.randrange(len(data)), draw.randrange(near), len(data) - 1 - draw.randrange(near)])


def flip(data, draw):
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[place(data, draw)] ^= 1 << draw.randrange(8)


def zero(data, draw):
    at = place(data, draw)
    piece = data[at:at + draw.choice([1, 4, 64, 4096])]
    data[at:at + len(piece)] = bytes(len(piece))


def noise(data, draw):
    at = place(data, draw)
    piece = data[at:at + draw.choice([1, 4, 64])]
    data[at:at + len(piece)] = draw.randbytes(len(piece))


def truncate(data, draw):
    del data[place(data, draw):]


def twice(data, draw):
    at, to = place(data, draw), place(data, draw)
    data[to:to] = data[at:at + draw.choice([1, 16, 500, len(data)])]


def cut(data, draw):
    at = place(data, draw)
    del data[at:at + draw.choice([1, 16, 500])]


BYTES_CHANGED = [flip, flip, zero, noise, truncate, twice, cut]


def changed(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 2])):
        if data:
            draw.choice(BYTES_CHANGED)(data, draw)
    return bytes(data)


# ---- how: a value -> another value

def swapped(content, draw, odd=ODD):
    """A copy with one node replaced, taken out, put in twice, under another name or nested deeply."""
    content = copy.deepcopy(content)
    nodes, todo = [], [content]
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list)) and item:
            places = list(item) if isinstance(item, dict) else list(range(len(item)))
            nodes.append((item, places))
            todo += [item[key] for key in places]
    if not nodes or draw.random() < 0.05:
        return draw.choice(odd)
    item, places = draw.choice(nodes)
    key, how = draw.choice(places), draw.random()
    if how < 0.65:
        item[key] = draw.choice(odd)
    elif how < 0.75:
        del item[key]
    elif how < 0.85 and isinstance(item, dict):
        item[draw.choice(["x", "", "dim", "../x", "\ud800", "a" * 3000])] = item.pop(key)
    elif how < 0.9:
        for _ in range(draw.choice([3, 900, 100_000] if odd is ODD else [3, 100])):
            item[key] = [item[key]]
    else:
        other, theirs = draw.choice(nodes)
        item[key] = copy.deepcopy(other[draw.choice(theirs)])
    return content


def dumped(content):
    """JSON of lists however deep."""
    try:
        return json.dumps(content).encode()
    except (RecursionError, ValueError):
        return b'{"a":' * 100_000


def in_json(data, draw):
    return dumped(swapped(json.loads(data), draw))


def in_jsonl(data, draw):
    lines = data.splitlines()
    i = draw.randrange(len(lines))
    lines[i] = dumped(swapped(json.loads(lines[i]), draw))
    return b"\n".join(lines)


def in_saved(data, draw):
    """What torch.save wrote, with a node swapped."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    file = io.BytesIO()
    for _ in range(draw.choice([1, 1, 3])):
        content = swapped(content, draw, ODD_SAVED + ODD) if isinstance(content, (dict, list)) else content
    try:
        torch.save(content, file)
    except (ValueError, RecursionError, OverflowError, UnicodeError):     # what pickle has no word for
        return data[:-10]
    return file.getvalue()


def in_zip(data, draw):
    """torch.save's zip, whole again, with the pickle's bytes changed or another record, or something else about one."""
    source = zipfile.ZipFile(io.BytesIO(data))
    records = [(info.filename, source.read(info)) for info in source.infolist()]
    out, how = io.BytesIO(), draw.random()
    i = next(i for i, (name, _) in enumerate(records) if name.endswith("data.pkl")) if how < 0.7 else draw.randrange(len(records))
    name, content = records[i]
    if how < 0.8 and content:
        records[i] = name, changed(content, draw)
    elif how < 0.85:
        del records[i]
    elif how < 0.9:
        records[i] = draw.choice(["x", "archive/data/0", "../data.pkl", "archive/constants.pkl", "a/b/data.pkl"]), content
    elif how < 0.95:
        records.append((name, b"other"))
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if how > 0.97 else 0) as file:
        for name, content in records:
            file.writestr(name, content)
    return out.getvalue()


def in_safetensors(data, draw):
    """Another header, of the length it says."""
    length, = struct.unpack("<Q", data[:8])
    header = swapped(json.loads(data[8:8 + length]), draw)
    text = dumped(header)
    said = len(text) if draw.random() < 0.9 else draw.choice([0, 1, len(text) + 1, 2 ** 31, 2 ** 60, 2 ** 64 - 1])
    return struct.pack("<Q", said) + text + data[8 + length:]


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def as_varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def fields(data):
    """[number, wire type, value] of a protobuf message.  Raises IndexError or ValueError."""
    at, found = 0, []
    while at < len(data):
        key, at = varint(data, at)
        if key & 7 == 0:
            value, at = varint(data, at)
        else:
            length, at = varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = data[at:at + length], at + length
        found.append([key >> 3, key & 7, value])
    return found


def message(found):
    out = b""
    for number, kind, value in found:
        out += as_varint(number << 3 | kind) + (as_varint(value) if kind == 0 else as_varint(len(value)) * (kind == 2) + value)
    return out


def in_message(data, draw, depth=0):
    """A protobuf message, well formed, with a field changed, gone, there twice or in another's place."""
    found = fields(data)
    chosen, how = draw.choice(sorted({number for number, *_ in found})), draw.random()         # not mostly a piece
    i = draw.choice([i for i, (number, *_) in enumerate(found) if number == chosen])
    number, kind, value = found[i]
    if how < 0.1:
        del found[i]
    elif how < 0.2:
        found.insert(draw.randrange(len(found)), found[i])
    elif kind == 0:
        found[i][2] = draw.choice([0, 1, 2, 3, 4, 5, 6, 300, 2 ** 31, 2 ** 32 - 1, 2 ** 63, 2 ** 64 - 1])
    elif kind == 5:
        found[i][2] = struct.pack("<f", draw.choice([float("nan"), float("inf"), -1e38, 0.0, 0.5]))
    else:
        try:
            found[i][2] = in_message(value, draw, depth + 1) if depth < 2 and how < 0.7 else changed(value, draw)
        except (IndexError, KeyError, ValueError):
            found[i][2] = draw.choice([changed(value, draw), b"", b"\xff\xfe", "\u2581".encode() * 3000, b"<unk>", b"a" * 50_000])
    return message(found)


INSIDE = {".json": in_json, ".jsonl": in_jsonl, ".pt": in_saved, ".pth": in_saved, ".bin": in_saved, ".safetensors": in_safetensors,
          ".model": in_message}


# ---- what

def build(folder):
    """One small file of every kind, in `folder`: {kind: (path, command lines that read it)}."""
    import sentencepiece as spm

    from finetune import convert
    from finetune.run import Run
    from llama import Tokenizer, load_checkpoint, save_checkpoint
    from lora import LoRAConfig, add_lora, lora_state_dict, save_adapter

    import train as program

    from .helpers import CORPUS, EXAMPLES, tiny
    sizes = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, multiple_of=8)

    def trained(**settings):
        out = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2, hard_vocab_limit=False, remove_extra_whitespaces=False,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, **{"normalization_rule_name": "identity", **settings})
        return Tokenizer(out.getvalue())
    bpe = trained(model_type="bpe", vocab_size=300, byte_fallback=True)
    for name, tokenizer in (("base", bpe), ("other", trained(model_type="unigram", vocab_size=60, normalization_rule_name="nmt_nfkc"))):
        save_checkpoint(tiny(tokenizer.vocab_size, **sizes), tokenizer, folder / name)
    shutil.copytree(folder / "base", folder / "cut")
    whole = torch.load(folder / "base/consolidated.00.pth", weights_only=True)
    for i in range(2):
        torch.save({name: tensor.chunk(2, -1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0)[i].clone()
                    if tensor.dim() > 1 else tensor for name, tensor in whole.items()}, folder / f"cut/consolidated.0{i}.pth")
    model, _ = load_checkpoint(folder / "base")
    for suffix in (".bin", ".safetensors")[:1 + bool(find_spec("safetensors"))]:
        save_checkpoint(model, bpe, folder / f"hf{suffix}", "hf", suffix)
        save_checkpoint(model, bpe, folder / f"shards{suffix}", "hf", suffix, 20_000)
    convert.main([str(folder / "hf.bin"), str(folder / "kept"), "--to", "meta"])
    for method in ("lora", "dora", "vera", "dylora"):
        model, _ = load_checkpoint(folder / "base")
        add_lora(model, LoRAConfig(method=method, r=2, alpha=4))
        for tensor in lora_state_dict(model).values():
            torch.nn.init.normal_(tensor, std=0.1)
        save_adapter(model, folder / f"{method}.pt")
        if method == "dora":
            convert.main([str(folder / "base"), str(folder / "small"), "--to", "int8", "--adapter", str(folder / "dora.pt")])
            for suffix in (".bin", ".safetensors")[:1 + bool(find_spec("safetensors"))]:
                convert.main([str(folder / "base"), str(folder / f"peft{suffix}"), "--to", "peft", "--adapter", str(folder / "dora.pt"),
                                 *["--bin"] * (suffix == ".bin")])
    (folder / "data.json").write_text(json.dumps(EXAMPLES[:3]))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES[:3])))

    begin = ["--r", "2", "--checkpoint", "base", "--data", "data.json", "--max-steps", "3", "--out", "half"]
    honest = Run.sum_loss
    Run.sum_loss = lambda run, loss: os.kill(os.getpid(), signal.SIGTERM) or honest(run, loss)
    try:
        program.main(FLAGS["train"] + begin)                      # told to stop in its first step
    except SystemExit:
        Run.sum_loss = honest

    def base(path):
        train = ["train", "--r", "2", "--checkpoint", path, "--data", "data.json"]
        return [train, train + ["--init", "random"] if path == "base" else train + ["--method", "full"], ["generate", "--checkpoint", path, "--adapter", "none"],
                ["checkpoint", path, "new", "--to", "hf" if path in ("base", "cut", "kept") else "meta",
                 *["--bin"] * (path in ("base", "cut", "kept"))]]

    def adapter(path):
        return [["train", "--checkpoint", "base", "--data", "data.json", "--adapter", path], ["generate", "--adapter", path, "--checkpoint", "base"],
                ["generate", "--adapter", path, "--checkpoint", "base", "--merge"], ["checkpoint", "base", "new", "--to", "meta", "--adapter", path]]

    def data(path):
        return [["train", "--r", "2", "--checkpoint", "base", "--data", path], ["train", "--r", "2", "--checkpoint", "base", "--data", "data.json", "--val-data", path],
                ["generate", "--checkpoint", "base", "--adapter", "none", "--data", path]]
    what = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.name not in ("args.json", "state.previous.pt"):
            top = name.parts[0]
            lines = [["train", *begin, "--resume"]] if top == "half" else data(top) if top.startswith("data") else adapter(str(name) if top == "small" else top) if top.startswith("peft") or \
                name.suffix == ".pt" else base(top)
            what[str(name)] = path, lines
    return what


# ---- what came of it

FLAGS = {"generate": ["--max-new-tokens", "1"], "checkpoint": [],
         "train": ["--max-steps", "1", "--accumulation-steps", "1", "--batch-size", "2", "--max-seq-len", "200"]}


def most_held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(line, log, most):
    """(outcome, what it said) of a command line, with its streams in the file `log`, native writes too."""
    import generate
    import train
    from finetune import convert
    program, *flags = line
    flags = FLAGS[program] + flags + (["--instruction", "Say"] if program == "generate" and "--data" not in flags else [])
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    streams, error_output = (sys.stdout, sys.stderr), os.dup(2)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(log, "w", closefd=False, errors="backslashreplace")
    before, began = most_held(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)                 # of its own: a machine may be busy with others
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)            # it waits for what does not come
    try:
        code = {"generate": generate, "train": train, "checkpoint": convert}[program].main(flags) or 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stderr.close()
        sys.stdout.close()
        sys.stdout, sys.stderr = streams
        os.dup2(error_output, 2)
        os.close(error_output)
        shutil.rmtree("new", ignore_errors=True)
    said = os.pread(log, 10 ** 6, 0).decode(errors="replace")
    lines = [line for line in said.splitlines() if not line.startswith(("base ", "merged: ", "eos: ")) and not line.endswith(" answered")]
    fine = code == 0 and not lines or code == 2 and len(lines) == 1 and len(lines[0]) < 1200
    if "memory" in said or before < most_held() > most:           # granted or not: it asked for too much
        fine = False
    return ("ok" if code == 0 else "refused") if fine else "WRONG", f"{code}, {time.process_time() - began:.1f} s: {said[-600:]}"


def main(seed, first, last, only=""):
    torch.set_num_threads(1)
    folder, report = Path(tempfile.mkdtemp()), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    log = os.memfd_create("said")
    os.chdir(folder)
    try:
        what = {kind: found for kind, found in build(folder).items() if only in kind}
        whole = {kind: path.read_bytes() for kind, (path, _) in what.items()}
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)       # as on a command line
        for kind, (_, lines) in what.items():                     # as it is, all goes well; and all is imported
            for line in lines:
                outcome, said = run(line, log, 2 ** 60)
                assert outcome == "ok" or "transformers would read this tokenizer.model differently" in said, (kind, line, said)
        size, most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize(), most_held() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * BYTES, size + 2 * BYTES))
        for i in range(first, last):
            draw = random.Random(f"{seed}, {i}")
            kind = draw.choice(list(what))
            path, lines = what[kind]
            how = draw.choice(["bytes", "bytes", "inside", "inside", "inside", "type"])
            if how == "type":
                content = draw.choice([b"", b"{}", b"[]", b"null", b"\x80\x02N.", b"PK\x05\x06" + bytes(18), b"\xef\xbb\xbf", draw.randbytes(500), *whole.values()])
            elif how == "bytes":
                content = changed(whole[kind], draw)
            else:
                inside = in_zip if path.suffix in (".pt", ".pth", ".bin") and draw.random() < 0.5 else INSIDE[path.suffix]
                content, how = inside(whole[kind], draw), inside.__name__
            path.write_bytes(content)
            line = draw.choice(lines)
            outcome, said = run(line, log, most)
            os.write(report, json.dumps([i, outcome, kind, how, " ".join(line), said]).encode() + b"\n")
            path.write_bytes(whole[kind])
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
