"""Files of others, read without trust, and files of ours, written whole or not at all."""
import json
import math
import os
import pickletools
import shutil
import struct
import zipfile
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS = ".safetensors"                          # by this suffix a file is the safetensors package's, else torch's
JSON_BYTES, PICKLE_BYTES, RECORDS = 2 ** 24, 2 ** 21, 2 ** 15      # more is no description of a model or its tensors
# What the pickles of torch.save call for a tensor's bytes.
STORAGES = {f"torch {name}Storage": dtype for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}.items()}


def listed(keys, most=6):
    return ", ".join(sorted(keys)[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def first_line(error):
    """Of what an error says, or its kind where it says nothing."""
    return [*str(error).splitlines(), type(error).__name__][0]


def read_object(path):
    """The JSON object in a file.  Raises FileNotFoundError, or ValueError for what is none."""
    if not path.is_file():                                        # but a folder, or a pipe that would be waited for
        raise FileNotFoundError(f"no file at {path}")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: it describes no model or adapter")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:                 # bytes that are no text are a ValueError too
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def has_safetensors():
    return find_spec("safetensors") is not None


def safetensors(path):
    """The safetensors package, which is not among our requirements.  Raises ValueError without it."""
    if not has_safetensors():
        raise ValueError(f"{path} needs a package that is not installed: pip install safetensors")
    import safetensors.torch
    return safetensors


def read_tensors(path):
    """{name: tensor} of a .safetensors file, or of one that torch.save wrote; raises ValueError for anything else.

    Mapped: nothing is in memory until it is touched.  No pickled code runs.
    """
    if path.suffix == SAFETENSORS:
        package = safetensors(path)
        with reading(path, "a checkpoint of tensors"), package.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    else:
        state = read_saved(path, mapped=True, summed=False)
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS
                                              for name, tensor in state.items()):
        raise ValueError(f"{path} does not hold a dict of floating-point tensors in 16, 32 or 64 bit")
    return state


def read_saved(path, what="a checkpoint of tensors", mapped=False, summed=True):
    """What torch.save wrote, made of dicts, lists, tuples, numbers, text and dense tensors, on the CPU.

    mapped: tensors come into memory as they are touched, else they are copies.  summed: a file that was torn or changed
    anywhere is found by its checksums.  Raises ValueError, "PATH is not WHAT: ...", for anything else.
    """
    with reading(path, what):
        return SavedFile(path, mapped, summed).content()


@contextmanager
def reading(path, what):
    """Make a ValueError of whatever a broken file happens to hit."""
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} is not {what}: it is {'empty' if path.is_file() else 'no file'}")
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is not {what}: {first_line(error)}") from error


class SavedFile:
    """A file of torch.save's: a zip of records, of which data.pkl, a pickle, says what to make of the others.

    torch.load with weights_only runs no code of a file's either, but it makes byte strings and tensors as large as that
    asks for.  Here the pickle is run by a dozen lines that know nothing more than torch.save's own words for plain
    values, and what they make is no larger than the file: a tensor lies within its record, all of them together take at
    most twice the file (a tied matrix is there twice), and what is there by reference counts each time.
    """

    def __init__(self, path, mapped, summed):
        self.mapped, size = mapped, path.stat().st_size
        self.bytes, self.room = torch.UntypedStorage.from_file(str(path), False, size), 2 * size
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
            self.records = {record.filename: record for record in records}
            if any(r.compress_type or r.compress_size != r.file_size for r in records) or sum(r.file_size for r in records) > size \
                    or not len(self.records) == len(records) <= RECORDS:
                raise ValueError("its records are compressed, overlap, or are too many")
            self.folder = next((name.removesuffix("data.pkl") for name in self.records if name.endswith("/data.pkl")), "")
            if self.record("data.pkl").file_size > PICKLE_BYTES:
                raise ValueError(f"its data.pkl has {self.record('data.pkl').file_size:,} bytes")
            if self.folder + "byteorder" in self.records and file.read(self.record("byteorder")) != b"little":
                raise ValueError("its numbers are big-endian")
            if summed and (damaged := file.testzip()):
                raise ValueError(f"{damaged} in it is damaged")
            self.pickled, self.storages = file.read(self.record("data.pkl")), {}
            self.starts = {record.filename: self.start(file.fp, record.header_offset) for record in records}

    @staticmethod
    def start(file, header):
        """Where a record's bytes begin: read, not looked up in the mapping, of which each touch brings in 64 KiB."""
        file.seek(header + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        return header + 30 + name + extra

    def record(self, name):
        if self.folder + name not in self.records:
            raise ValueError(f"it has no {name}")
        return self.records[self.folder + name]

    def storage(self, kind, dtype, name, device, numel):
        """The bytes of a tensor, or of several."""
        if name not in self.storages:
            record = self.record(f"data/{name}")
            start = self.starts[record.filename]
            self.storages[name] = self.bytes[start:start + record.file_size]
        return dtype, self.storages[name]

    def tensor(self, storage, offset, size, stride, *_):
        (dtype, stored), numel = storage, math.prod(size) if len(size) < 9 else math.inf
        reach = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
        if min([offset, *size, *stride]) < 0 or max(numel, offset + reach) * dtype.itemsize > stored.nbytes():
            raise ValueError(f"a tensor of {size} in steps of {stride} is larger than its bytes")
        self.room -= max(64, numel * dtype.itemsize)              # a tensor itself takes something too
        if self.room < 0:
            raise ValueError("its tensors are larger than the file")
        tensor = torch.empty(0, dtype=dtype).set_(stored, offset, size, stride)
        return tensor if self.mapped else tensor.clone()

    def content(self):
        names = {**STORAGES, "collections OrderedDict": lambda: {}, "torch._utils _rebuild_tensor_v2": self.tensor,
                 "torch._utils _rebuild_parameter": lambda tensor, *_: tensor}
        stack, marks, memo = [], [], {}

        def pop(n=None):
            """The last n, or what came since the last mark."""
            at = marks.pop() if n is None else len(stack) - n
            taken = stack[at:]
            del stack[at:]
            return taken
        for code, value, _ in pickletools.genops(self.pickled):
            match code.name:
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(value)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(code.name))
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[code.name]())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(pop({"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}.get(code.name))))
                case "APPEND" | "APPENDS":
                    items = pop(1 if code.name == "APPEND" else None)
                    stack[-1].extend(items)
                case "SETITEM" | "SETITEMS":
                    items = pop(2 if code.name == "SETITEM" else None)
                    if not all(type(key) in (str, int) for key in items[::2]):         # a tuple may take for ever to hash
                        raise ValueError("a key is neither text nor a whole number")
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "GLOBAL":
                    if value not in names:
                        raise ValueError(f"it calls {value.replace(' ', '.')}; only plain values and dense numbers are read")
                    stack.append(names[value])
                case "BINPERSID":
                    stack.append(self.storage(*stack.pop()))
                case "REDUCE":
                    function, values = pop(2)
                    stack.append(function(*values))
                case "BUILD":                                     # an OrderedDict's attributes: nothing reads them
                    pop(1)
                case "PROTO" | "STOP":
                    pass
                case other:
                    raise ValueError(f"{other} in its pickle; only plain values and dense numbers are read")
        content, = stack
        self.check_plain(content, 8 * len(self.pickled))
        return content

    @staticmethod
    def check_plain(content, room):
        """Raise ValueError for a value of another kind, and for what grows beyond `room`: lists of lists of one list."""
        todo = [content]
        while todo:
            item = todo.pop()
            if isinstance(item, (str, dict, list, tuple)):
                room -= len(item) + 1
            if room < 0:
                raise ValueError("it holds itself, or one thing too many times")
            if isinstance(item, dict):
                room -= sum(len(key) for key in item if isinstance(key, str))
                todo += item.values()
            elif isinstance(item, (list, tuple)):
                todo += item
            elif not isinstance(item, (str, int, float, torch.Tensor, type(None))):
                raise ValueError(f"it holds a {type(item).__name__}, which is no plain value")


def check_alike(own, other, name):
    """Raise ValueError where `other`, read from a file, is not made as `own` is: kinds, keys, lengths, sizes, words and
    switches.  Numbers may differ, but none is nan or beyond all use; None stands for one that is not known yet."""
    if isinstance(own, dict):
        good = isinstance(other, dict) and own.keys() == other.keys()
        inner = own
    elif isinstance(own, (list, tuple)):
        good = type(own) is type(other) and len(own) == len(other)
        inner = range(len(own))
    else:
        inner = ()
        if isinstance(own, torch.Tensor):
            good = isinstance(other, torch.Tensor) and (own.shape, own.dtype) == (other.shape, other.dtype) and not other.isnan().any()
        elif own is None or type(own) in (int, float):
            good = type(own) is type(other) or own is None and type(other) in (int, float)
            good = good and (other == own or abs(other) <= 2 ** 53)
        else:
            good = type(own) is type(other) and own == other
    if not good:
        raise ValueError(f"{name} is not as it would be here")
    for key in inner:
        check_alike(own[key], other[key], f"{name}, {key}")


def write_tensors(path, tensors):
    """Write {name: tensor}: with the safetensors package where the suffix is its own, with torch.save elsewhere."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    package = safetensors(path) if path.suffix == SAFETENSORS else None

    def write(file):
        if package:
            package.torch.save_file(tensors, file.name, {"format": "pt"})  # puts another file in its place,
            os.chmod(file.name, os.fstat(file.fileno()).st_mode)           # and one that its owner alone may read
        else:
            torch.save(tensors, file)                 # through an open handle: given a path, it would write the file's name
    try:
        write_whole(path, write)
    except package.SafetensorError if package else () as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def write_whole(path, write, previous=None):
    """Call write(file) on a file beside `path`, then rename it: `path` is the old file or the new, never a part.

    previous: where the old one goes; between its renaming and the new one's it is the only one.  Raises OSError.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:          # torch.save makes the latter of a full disk
        said = error
        while said.__context__ and not isinstance(said, OSError):
            said = said.__context__
        raise OSError(f"{path} cannot be written: {getattr(said, 'strerror', None) or said}") from error
    finally:
        with suppress(OSError):                       # on a disk that has become read-only, say: the error is another
            beside.unlink()


@contextmanager
def new_folder(path):
    """A folder beside `path` to write to, which takes that name if the block ends well and else disappears (but for a
    kill: then PATH.PID.tmp stays).

    Raises ValueError for a path where something is already.
    """
    path = Path(path).resolve()
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name another folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name another folder")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        if path.is_dir():
            path.rmdir()
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
