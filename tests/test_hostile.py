"""Files that mean harm, or were harmed: one line and exit code 2, none of their code run.

The slow test gives thousands of files to the command lines, changed at random
(benchmarks/mutate.py).
"""
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch

import generate
from benchmarks.lives import write_base
from benchmarks.mutate import build, in_bytes, reads
from finetune.examples import read_examples
from finetune.errors import in_one_line, one_line_errors
from llama import load_checkpoint
from llama.files import load_saved
from llama.peft import adapter_at
from lora import load_adapter, read_adapter

from .helpers import (HAS_SAFETENSORS, ONE_THREAD, ROOT, needs_safetensors, saved, spoil, stored,
                      tiny)


# --- what torch.save wrote, or might have


def plain(value):
    """The pickle of a value without what stands around it."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(size, stride, numel=4, offset=0, name="0"):
    place = plain(name) + plain("cpu") + plain(numel)
    storage = b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + place + b"tQ"
    view = plain(offset) + plain(size) + plain(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"\x89}tR"


def pickled(**items):
    return b"\x80\x02}(" + b"".join(plain(name) + value for name, value in items.items()) + b"u."


def zipped(pickled, stored=bytes(16), extra=b"", compression=0, **others):
    """A zip as torch.save writes it; `extra` moves the bytes behind it to other addresses."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        records = {"data.pkl": pickled, "version": b"3\n", **others, "data/0": stored}
        for name, content in records.items():
            record = zipfile.ZipInfo(f"archive/{name}")
            record.compress_type = compression
            # Records of torch's begin at multiples of 64.
            n_pad = -(file.tell() + 34 + len(record.filename)) % 64 + len(extra)
            record.extra = b"FB" + struct.pack("<H", n_pad) + bytes(n_pad)
            archive.writestr(record, content)
    return file.getvalue()


def with_directory(change):
    """Return a zip of four records, whose directory `change` has changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(a=tensor((4,), (1,))))
        archive.writestr("archive/data/0", bytes(10_000))
        archive.writestr("archive/data/1", b"")
        archive.writestr("archive/version", b"3\n")
        change(archive.filelist)
    return file.getvalue()


def nested(times, kind):
    """A list or tuple of itself twice, `times` deep: 2 ** times of them to whoever walks it."""
    value = kind()
    for _ in range(times):
        value = kind((value, value))
    return value


def with_two_directories():
    """A zip in which zipfile finds a small pickle and torch a large one, in other directories.

    torch follows the pointer that stands right before the end; zipfile takes it for a comment.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled(a=plain("x" * 10 ** 6)))
        archive.writestr("archive/version", b"3\n")
    length, start = struct.unpack("<II", file.getvalue()[-10:-2])
    place = file.seek(0, io.SEEK_END)
    file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, length, start))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(a=plain("y")))
        archive.filelist[-1].comment = struct.pack("<4sIQI", b"PK\6\7", 0, place, 1)
    return file.getvalue()


NO_CALL = "it makes a call that torch.save does not"
VIEW = tensor((2 ** 40, 2), (0, 0))
ORDERED = b"ccollections\nOrderedDict\n"
PACKED = "its records are compressed, overlap, or are too many"
SAVED = {
    "a byte string of 100 GB": (
        zipped(pickled(a=b"c__builtin__\nbytearray\n" + plain((10 ** 11,)) + b"R")),
        "it calls __builtin__.bytearray"),
    "a view of a TB": (
        zipped(pickled(a=tensor((2 ** 20, 2 ** 20), (0, 0)))),
        "its tensors are larger than the file"),
    "a size that overflows": (zipped(pickled(a=tensor((2 ** 62, 4), (4, 1)))), NO_CALL),
    "bytes before it": (
        zipped(pickled(a=tensor((4,), (1,), offset=-4))), "invalid storage offset -4"),
    "a hundred names for one storage": (
        zipped(pickled(**{f"a{i}": tensor((4096,), (1,), 4096) for i in range(100)}), bytes(16384)),
        "its tensors are larger than the file"),
    "a key to hash for ever": (
        zipped(b"\x80\x02}(" + plain(nested(60, tuple)) + b"K\x01u."),
        "a key is neither text nor a small whole number"),
    "lists without end": (
        zipped(pickled(a=plain(nested(60, list)))), "it holds itself, or one thing too many times"),
    "a list in itself": (zipped(b"\x80\x02]q\0h\0a."), "it holds itself"),
    "lists too deep": (
        zipped(b"\x80\x02" + b"]" * 10 ** 5 + b"a" * (10 ** 5 - 1) + b"."), "recursion"),
    "a function": (zipped(pickled(a=ORDERED)), "it holds a type, which is no plain value"),
    # torch.load alone would be busy with one of these for hours, or ask for terabytes.
    "a dict of what a view holds": (zipped(pickled(a=ORDERED + VIEW + b"\x85R")), NO_CALL),
    "as many bytes as a view has numbers": (
        zipped(pickled(a=b"(" + plain("storage") + b"ctorch\nFloatStorage\n" + plain("7")
                       + plain("cpu") + VIEW + b"tQ")), NO_CALL),
    "a later protocol": (
        zipped(pickle.dumps({"a": 1}, 4)), "FRAME in its pickle; torch reads protocols 2 and 3"),
    "a pickle of 3 MB": (zipped(b"}" * 3_000_000), "its data.pkl has 3,000,000 bytes"),
    "a bomb": (zipped(b"}" * 3_000_000, compression=zipfile.ZIP_DEFLATED), PACKED),
    "a bomb in a second directory": (with_two_directories(), "its directory is not at its end"),
    "one name for two": (
        with_directory(lambda records: setattr(records[2], "filename", "archive/data/0")), PACKED),
    "a record that takes more room than it has": (
        with_directory(lambda records: setattr(records[1], "compress_size", 2 ** 31)), PACKED),
    "the other byte order": (
        zipped(pickled(a=tensor((4,), (1,))), byteorder=b"big"), "its numbers are big-endian"),
    "the format of torch before 1.6": (
        saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "File is not a zip file"),
}


@pytest.mark.parametrize("case", SAVED)
def test_what_torch_save_might_have_written(tmp_path, case):
    content, message = SAVED[case]
    (tmp_path / "file").write_bytes(content)
    for mapped in (False, True):
        pattern = f"file is not an adapter file: .*{re.escape(message)}"
        with pytest.raises(ValueError, match=pattern):
            load_saved(tmp_path / "file", "an adapter file", mapped, not mapped)


def test_what_does_no_harm_loads(tmp_path):
    """Values that are left over, values that are there twice, and what PEFT and torch share."""
    harmless = [(b"\x80\x02}}.", {})]
    for value in ([[1]] * 2, [(0.9, 0.999)] * 3, 2 ** 200):
        harmless.append((pickled(a=plain(value)), {"a": value}))
    for pickle_bytes, content in harmless:
        (tmp_path / "file").write_bytes(zipped(pickle_bytes))
        assert load_saved(tmp_path / "file") == content


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8)


def same(one, other):
    """Tell whether two saved values are equal, in type, dtype, strides and order of keys too."""
    if isinstance(one, torch.Tensor):
        is_alike = one.dtype == other.dtype and one.stride() == other.stride()
        return is_alike and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, list | tuple):
        is_alike = type(one) is type(other) and len(one) == len(other)
        return is_alike and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_torch_save_wrote_comes_back(tmp_path):
    """A run's state: numbers, text, an optimizer's, random generators', views, a tied matrix."""
    layer = torch.nn.Linear(3, 4)
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.randn(4, 3)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}]
    content = {
        "model": layer.state_dict(), "optimizer": {"state": {0: moments}, "param_groups": groups},
        "torch": torch.get_rng_state(), "python": random.getstate(),
        "numpy": np.random.default_rng(0).bit_generator.state,
        "plain": [1, -5, 2.5, None, True, False, "\u00e9", (), (1,), {}, 2 ** 130],
        "weight": layer.weight, "again": layer.weight, "turned": torch.arange(6.0).view(2, 3).T,
        "none": torch.zeros(0, 3), "number": torch.tensor(3.5),
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES}}
    path = tmp_path / "file"
    path.write_bytes(saved(content))
    for mapped in (False, True):
        loaded = load_saved(path, mapped=mapped, summed=not mapped)
        assert same(content, loaded)
        assert same(content, torch.load(io.BytesIO(saved(loaded)), weights_only=True))
        # A tensor's own bytes, not the file's; mapped, it is tied still.
        assert loaded["weight"].untyped_storage().nbytes() == 48
        assert loaded["weight"].is_set_to(loaded["model"]["weight"]) == mapped
    loaded = load_saved(path)
    path.write_bytes(bytes(20_000))
    assert same(content, loaded)
    # A zip that another program wrote has tensors at any address.
    ones = torch.ones(4).numpy().tobytes()
    path.write_bytes(zipped(pickled(a=tensor((4,), (1,))), ones, b"xy"))
    assert same({"a": torch.ones(4)}, load_saved(path, mapped=True, summed=False))


def test_a_file_that_was_torn_or_changed_anywhere_is_found(tmp_path):
    """Or nothing is read from the byte: it is padding, or a date."""
    whole = saved({"a": torch.arange(300.0), "b": [1, 2, 3]})
    for at in range(0, len(whole), 41):
        turned = bytes([whole[at] ^ 1])
        for rest in (b"", bytes(len(whole) - at), turned + whole[at + 1:]):
            (tmp_path / "file").write_bytes(whole[:at] + rest)
            try:
                content = load_saved(tmp_path / "file")
            except ValueError as error:
                assert "file is not a checkpoint of tensors: " in str(error)
                continue
            assert rest and content["b"] == [1, 2, 3]
            assert torch.equal(content["a"], torch.arange(300.0))


# --- at every door


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small file of each kind."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder)
    build(folder)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of them, as the current folder."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def load(name):
    """Load what the file of this name belongs to, as the library does."""
    top = name.split("/")[0]
    if top == "data.json":
        return read_examples(name)
    if top in ("base", "hf", "shards", "safe"):
        return load_checkpoint(top)
    return read_adapter("int8/adapter.pt" if top == "int8" else adapter_at(top, tiny().args))


TORCH = ["base/consolidated.00.pth", "hf/pytorch_model.bin",
         "shards/pytorch_model-00001-of-00003.bin", "adapter.pt", "peft/adapter_model.bin"]
FILES = [*TORCH, "base/params.json", "base/tokenizer.model", "hf/config.json",
         "shards/pytorch_model.bin.index.json", "int8/adapter.pt", "peft/adapter_config.json",
         "data.json"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [*FILES, *["safe/model.safetensors"] * HAS_SAFETENSORS])
def test_bytes_changed_at_random(here, name):
    """The file loads, or is an error that the command lines print as one line."""
    whole = (here / name).read_bytes()
    draw = random.Random(name)
    for _ in range(60):
        (here / name).write_bytes(in_bytes(whole, draw))
        with suppress(ValueError, FileNotFoundError):
            load(name)


class Plant:
    """Pickled, it is this call."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("i, call, write", [
    (0, Plant(os.mkdir, "planted"), saved),
    (1, Plant(os.system, "mkdir planted"), partial(saved, _use_new_zipfile_serialization=False)),
    (2, Plant(exec, "import os; os.mkdir('planted')"), pickle.dumps),
])
def test_a_planted_pickle_does_not_run(refused, here, i, call, write):
    """Nor through load_adapter, the library's own door."""
    pickle.loads(pickle.dumps(call))
    (here / "planted").rmdir()                       # It is no dud.
    content = {"config": {"r": 2}, "base": call, "tensors": {"a": torch.ones(2)}}
    for name in FILES:
        whole = (here / name).read_bytes()
        lines = reads(name)
        (here / name).write_bytes(write(content))
        refused(*lines[i % len(lines)])
        with pytest.raises(ValueError):
            load_adapter(tiny(), here / name)
        (here / name).write_bytes(whole)
    assert not (here / "planted").exists()


@pytest.mark.parametrize("name", FILES)
def test_no_file_where_one_belongs(refused, here, name):
    """A pipe would be waited for, and /dev/zero has no end."""
    path = here / name
    lines = itertools.cycle(reads(name))
    ways = [partial(path.symlink_to, target) for target in ("/dev/zero", path.name, "nowhere")]
    for make in (*ways, path.touch, partial(os.mkfifo, path), path.mkdir):
        path.unlink()
        make()
        refused(*next(lines))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("json")])
def test_json_that_is_none(refused, here, name):
    lines = itertools.cycle(reads(name))
    for content in (b"\xff\xfe{", b'{"a":' * 10 ** 5, b"\0" * 100, b"NaN",
                    b'{"dim": ' + b"9" * 10 ** 5 + b"}", b'{"instruction": "\\ud800"}'):
        (here / name).write_bytes(content)
        assert len(refused(*next(lines))) < 1100
    if name == "data.json":
        return
    (here / name).write_bytes(b"{" + b" " * 2 ** 24)
    assert "bytes: it describes no model or adapter" in refused(*reads(name)[1])


PARAMS = "base/params.json"
INDEX = "shards/pytorch_model.bin.index.json"


@pytest.mark.parametrize("name, changes, message", [
    (PARAMS, {"n_layers": 9, "dim": 2 ** 20, "n_heads": 2 ** 12, "vocab_size": 2 ** 24},
     "the weights in base do not fit its params.json"),
    (PARAMS, {"n_layers": 513}, "n_layers is 513, must be 1 to 512"),
    (PARAMS, {"x\x1b[2J" * 1000: 1}, "base/params.json has 'x\\x1b[2J"),
    ("hf/config.json", {"hidden_act": ["\x1b[2J\n\u2028"] * 1000}, "hidden_act is ['\\x1b[2J"),
    (INDEX, {"weight_map": {"a": "../base/consolidated.00.pth"}},
     "'../base/consolidated.00.pth', which is not a file of this folder"),
    (INDEX, {"weight_map": {"a": "a" * 5000}}, "File name too long"),
    ("peft/adapter_config.json", {"r": 10 ** 400}, "r is 1000"),
])
def test_json_that_lies(refused, here, name, changes, message):
    spoil(here / name, changes)
    for line in reads(name):
        error = refused(*line)
        assert message in error and len(error) < 1100
        assert error.isascii() and error.strip().isprintable()


@pytest.mark.parametrize("name", [*TORCH, "int8/adapter.pt"])
def test_values_that_are_no_numbers(refused, here, name):
    content = stored(here, name)
    tensors = content.get("scales", content.get("tensors", content))
    for line, value in zip(reads(name), (math.nan, math.inf, -math.inf), strict=True):
        next(iter(tensors.values())).view(-1)[-1] = value
        torch.save(content, here / name)
        assert re.search("values that are (not|no) finite", refused(*line))


WQ = "layers.0.attention.wq.lora_A"


@pytest.mark.parametrize("key, changes, message", [
    ("config", {"method": "vera", "r": 10 ** 9}, "vera: r is 1000000000, must be 1 to 16384"),
    ("config", {"r": 10 ** 9}, "r is 1000000000, must be 1 to 32"),
    ("config", {"targets": ["wq"] * 10 ** 4 + ["x" * 10 ** 4]}, "no layer named x"),
    ("config", {"method": ["lora"]}, "unhashable"),
    ("config", {"dropout": "\x1b[2J"}, "dropout is '\\x1b[2J'"),
    ("base", {"fingerprint": torch.ones(2)}, "adapter.pt is not an adapter file: "),
    ("scales", {WQ: torch.ones(10 ** 5, 1)}, "is not an adapter file: The expanded size"),
    ("tensors", {WQ: torch.ones(2)}, "adapter.pt does not fit"),
])
def test_an_adapter_that_lies(refused, here, key, changes, message):
    content = stored(here, "adapter.pt")
    content[key] = content[key] | changes if key in ("config", "base") else changes
    torch.save(content, here / "adapter.pt")
    for line in reads("adapter.pt"):
        error = refused(*line)
        assert message in error and error.strip().isprintable() and len(error) < 1200


@pytest.mark.parametrize("content", [
    {"from_base": 1}, {"from_base": ("lora_A",)}, {"skips_blocks": True},
    {"matrices": {WQ: torch.ones(2)}, "names_in_file": 3}])
def test_what_only_peft_folders_say_is_not_believed(refused, here, content):
    """Whole matrices, blocks left out, tensors that the base gives."""
    known = stored(here, "adapter.pt")
    torch.save(known | {"tensors": {}} | content, here / "adapter.pt")
    for line in reads("adapter.pt"):
        assert "adapter.pt does not fit" in refused(*line)
    model = tiny()
    model.origin = known["base"]
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(model, here / "adapter.pt")


def test_a_base_that_an_adapter_names(refused, here):
    content = stored(here, "adapter.pt")
    names = ("a\0b", "\ud800", "x" * 5000, "\x1b[2J", "/proc/self/mem", "/dev", "~", "", 5)
    wrong = [{"folder": name} for name in names]
    for changes in (*wrong, {"layers": "x"}, {"layers": [1]}):
        torch.save(content | {"base": content["base"] | changes}, here / "adapter.pt")
        for flags in ([], ["--shard"]):
            line = refused(generate.main, "--adapter", "adapter.pt", *flags)
            assert line.strip().isprintable()


def varint(value):
    """Return a number as protobuf has it: 7 bits per byte, the lowest first."""
    digits = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])


@pytest.mark.parametrize("piece", [b"\xff\xfe", b"", b"a" * 10 ** 6, b"<unk>"])
def test_tokenizers_with_a_piece_that_is_none(refused, here, piece):
    path = here / "base/tokenizer.model"
    entry = b"\x0a" + varint(len(piece)) + piece + b"\x15" + struct.pack("<f", -1.0)
    path.write_bytes(b"\x0a" + varint(len(entry)) + entry + path.read_bytes())
    for line in reads("base/tokenizer.model"):
        assert "base/tokenizer.model is not a sentencepiece model" in refused(*line)


def test_a_random_base_larger_than_memory(refused, here):
    sizes = {"n_layers": 9, "dim": 2 ** 20, "n_heads": 2 ** 8, "n_kv_heads": 2 ** 8}
    spoil(here / PARAMS, sizes)
    error = refused(*reads("data.json")[0], "--init", "random")
    assert "base describes a model of 475,000 GB, which this machine cannot hold" in error


def header(n_bytes=0, **tensors):
    """Return a safetensors file: its header, and as many bytes."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@needs_safetensors
@pytest.mark.parametrize("content", [
    struct.pack("<Q", 2 ** 60) + b"{}",
    struct.pack("<Q", 10 ** 5) + b'{"a":' * 20_000 + bytes(16),
    b"\x01",
    header(),
    header(24, a=entry([4], 0, 16), b=entry([4], 8, 24)),
    header(16, a=entry([4], 16, 0)),
    header(16, a=entry([2 ** 62, 4], 0, 16)),
    header(16, a=entry([2 ** 40], 0, 2 ** 42)),
    header(16, a=entry([4], 0, 16, "X")),
])
def test_safetensors_that_lie(refused, here, content):
    for name in ("hf/model.safetensors", "peft/adapter_model.safetensors"):
        (here / name).write_bytes(content)
        for line in reads(name):
            refused(*line)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep")])
def test_what_asks_for_too_much_ends_in_one_line_too(refused, error):
    def main(flags):
        with one_line_errors("x"):
            raise error

    assert refused(main) == f"x: {str(error) or 'MemoryError'}\n"


def test_what_is_quoted_can_be_seen():
    error = ValueError("a\n b\x1b[31m \u202e\ud800\u00e9")
    assert in_one_line(error) == "a b\\x1b[31m \\u202e\\ud800\u00e9"
    assert in_one_line(MemoryError()) == "MemoryError" and len(in_one_line("x" * 10 ** 6)) == 1000


# --- at random


@pytest.mark.slow
def test_files_changed_at_random():
    """2,400 files of all kinds: each is a success or one line, within 10 seconds and 2 GB."""
    n = 2400
    results = []
    while len(results) < n:
        command = [sys.executable, "-m", "benchmarks.mutate", "0", str(len(results)), str(n)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD,
                              timeout=900)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        results += lines
        if done.returncode:                          # The next case took the process with it.
            assert lines, done.stderr                # Or nothing works.
            results.append([len(results), "WRONG", f"exit {done.returncode}", done.stderr[-1000:]])
    wrong = [result for result in results if result[1] == "WRONG"]
    assert not wrong, wrong
    kinds = Counter(kind for _, _, kind, *_ in results)
    n_ok = sum(outcome == "ok" for _, outcome, *_ in results)
    assert min(kinds.values()) > 20 and n_ok > n / 8, (kinds, n_ok)
