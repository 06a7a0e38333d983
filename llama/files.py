"""Read files that others made without trusting them, and write files whole or not at all."""
import errno
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .pickles import check_pickle

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A file with this suffix belongs to the safetensors package, any other one to torch.
SAFETENSORS = ".safetensors"

# No description of a model is larger, and no file of tensors has a larger pickle or more records.
JSON_BYTES = 2 ** 24
PICKLE_BYTES = 2 ** 21
RECORDS = 2 ** 15
# How a file begins that stands for one which git-lfs has not fetched.
POINTER = "version https://git-lfs.github.com/spec/"
# What these add to the names of a state dict, at the beginning or in between.
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|"
                      r"_checkpoint_wrapped_module)\.")


def listed(keys: Iterable[str], limit: int = 6) -> str:
    """Return the first keys in sorted order as one text, and how many more there are."""
    keys = sorted(keys)
    text = ", ".join(keys[:limit])
    if len(keys) > limit:
        text += f" and {len(keys) - limit} more"
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has no message."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def check_pointer(path: Path):
    """Raise ValueError for a file of git-lfs that only says which file belongs there."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER.encode():
            raise ValueError(f"{path} is a git-lfs pointer, not the file: git lfs pull")


def read_object(path: Path, limit: int = JSON_BYTES) -> dict:
    """Return the JSON object in a file of at most `limit` bytes.

    Raises FileNotFoundError, or ValueError for a file that holds anything else.
    """
    # A pipe is no file either: it would be waited for.
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes: it describes no model or adapter")
    check_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def has_safetensors() -> bool:
    """Return whether the safetensors package is installed."""
    return find_spec("safetensors") is not None


def safetensors(path: Path):
    """Return the safetensors package, which is not among our requirements.

    Raises ValueError, with `path` as the file that needs it, where the package is not installed.
    """
    if not has_safetensors():
        raise ValueError(f"{path} needs a package that is not installed: pip install safetensors")
    import safetensors.torch
    return safetensors


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return {name: tensor} from a .safetensors file or from a file that torch.save wrote.

    The tensors are mapped: they come into memory as they are used.  Names lose what torch.compile
    or DDP put before them.  Raises ValueError for a file that holds anything else.
    """
    if path.suffix == SAFETENSORS:
        package = safetensors(path)
        with reading(path, "a checkpoint of tensors"):
            with package.safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
    else:
        state = load_saved(path, mapped=True, summed=False)
    if not isinstance(state, dict) or not all(map(is_weight, state.items())):
        raise ValueError(f"{path} does not hold a dict of floating-point tensors in 16, 32 or 64 "
                         "bit")
    return plain_names(state, path)


def plain_names(tensors: dict, path: Path) -> dict:
    """Return {name: tensor} without what torch.compile, DDP and FSDP add to the names.

    Raises ValueError for a name that is then there twice.
    """
    plain = {}
    for name, tensor in tensors.items():
        plain_name = WRAPPERS.sub("", name) if isinstance(name, str) else name
        if plain_name in plain:
            raise ValueError(f"{path} holds {plain_name} twice, with and without the prefix of a "
                             "wrapper")
        plain[plain_name] = tensor
    return plain


def is_weight(item: tuple) -> bool:
    """Return whether a dict's (key, value) is a name with a floating-point tensor."""
    name, tensor = item
    return isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS


def load_saved(path: Path, what: str = "a checkpoint of tensors", mapped: bool = False,
               summed: bool = True) -> Any:
    """Return the content of a file that torch.save wrote, if that is plain values and tensors.

    torch.load runs no code of the file with weights_only, but makes whatever the file asks for,
    of any size, and can be kept busy for ever.  So its zip and its pickle are checked first, and
    its content afterwards: dicts, lists, tuples, numbers, text and dense tensors, not larger
    than the file.  mapped: tensors come into memory as they are used; otherwise they are copies.
    summed: compare the file with its checksums, which shows where it was damaged.
    Raises ValueError, "PATH is not WHAT: ...", for any other file.
    """
    path = Path(path)
    with reading(path, what):
        pickled = read_pickle(path, summed)
        check_pickle(pickled)
        with warnings.catch_warnings(action="ignore"):
            # A mapped storage lies within the file whatever size the pickle claims.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_plain(content, 8 * len(pickled), 2 * path.stat().st_size)
        return detached(content, copy=not mapped)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever error a broken file causes into a ValueError, "PATH is not WHAT: ..."."""
    if not path.is_file():
        raise ValueError(f"{path} is not {what}: it is no file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is not {what}: it is empty")
    check_pointer(path)
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is not {what}: {first_line(error)}") from error


def read_pickle(path: Path, summed: bool) -> bytes:
    """Return the pickle in a file of torch.save, a zip whose other records are tensors' bytes.

    Raises ValueError for a zip that takes more memory than it has bytes, and, where summed, for
    one that is damaged.
    """
    with zipfile.ZipFile(path) as file:
        check_records(file, path.stat().st_size)
        sizes = {record.filename: record.file_size for record in file.infolist()}
        folder = next(iter(sizes), "").partition("/")[0]
        name = f"{folder}/data.pkl"
        if name not in sizes:
            raise ValueError("it has no data.pkl")
        if sizes[name] > PICKLE_BYTES:
            raise ValueError(f"its data.pkl has {sizes[name]:,} bytes")
        byteorder = f"{folder}/byteorder"
        if byteorder in sizes and file.read(byteorder) != b"little":
            raise ValueError("its numbers are big-endian")
        damaged = file.testzip() if summed else None
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        return file.read(name)


def check_records(file: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError unless the records of a zip of `size` bytes are stored as torch does.

    Where two have one name, but for capitals, torch could read another one than zipfile.
    """
    check_directory(file, size)
    records = file.infolist()
    packed = any(record.compress_type or record.compress_size != record.file_size
                 for record in records)
    overlap = sum(record.file_size for record in records) > size
    names = {record.filename.lower() for record in records}
    if packed or overlap or len(names) < len(records) or len(records) > RECORDS:
        raise ValueError("its records are compressed, overlap, or are too many")


def check_directory(file: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError unless torch finds a zip's directory where zipfile found it.

    Otherwise a file could show zipfile harmless records and torch others.
    """
    file.fp.seek(max(0, size - 98))
    end = file.fp.read()
    agree = end[-22:-18] == b"PK\5\6"
    start = int.from_bytes(end[-6:-2], "little")
    # In a file of torch's, another end record and the place of that record stand before this one.
    if end[-42:-38] == b"PK\6\7":
        place = int.from_bytes(end[64:72], "little")
        agree = agree and end[:4] == b"PK\6\6" and place == size - 98
        start = int.from_bytes(end[48:56], "little")
    if not agree or start != file.start_dir:
        raise ValueError("its directory is not at its end")


def check_plain(content: Any, items_left: int, bytes_left: int) -> None:
    """Raise ValueError for a value of another kind, and for content larger than allowed.

    Everything counts as often as it is referred to, as in a list of lists of one list.
    items_left: how many items and characters there may be.  bytes_left: how large all tensors
    may be together; a tied matrix is there twice.
    """
    todo = [content]
    while todo:
        item = todo.pop()
        if isinstance(item, (int, float, type(None))):
            continue
        if isinstance(item, torch.Tensor):
            # A small tensor takes more memory than its numbers do.
            bytes_left -= max(64, math.prod(item.shape) * item.element_size())
        elif isinstance(item, (str, dict, list, tuple)):
            items_left -= len(item) + 1
        else:
            raise ValueError(f"it holds a {type(item).__name__}, which is no plain value")
        if isinstance(item, dict):
            items_left -= sum(len(key) for key in item if isinstance(key, str))
        if items_left < 0:
            raise ValueError("it holds itself, or one thing too many times")
        if bytes_left < 0:
            raise ValueError("its tensors are larger than the file")
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item


def detached(value: Any, copy: bool) -> Any:
    """Return plain content with its tensors out of autograd, and on request copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if copy else value.detach()
    if isinstance(value, dict):
        return {key: detached(item, copy) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(detached(item, copy) for item in value)
    return value


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is, or put together from the ranks' parts if it is cut over them.

    All ranks call this.  A value of a cut tensor that is read otherwise may be this rank's alone.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write {name: tensor} in the safetensors package's format or torch's, as the suffix says."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix != SAFETENSORS:
        # An open file: given a path, torch.save would write the file's name into it.
        write_whole(path, lambda file: torch.save(tensors, file))
        return
    package = safetensors(path)

    def write(file):
        # The package puts another file in the place of this one, which its owner alone may read.
        package.torch.save_file(tensors, file.name, {"format": "pt"})
        os.chmod(file.name, os.fstat(file.fileno()).st_mode)
        with open(file.name, "rb+") as written:
            os.fsync(written.fileno())

    try:
        write_whole(path, write)
    except package.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write content as JSON, one line per item."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, with line ends as they are."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_whole(path: Path, write: Callable, previous: Path | None = None) -> None:
    """Call write(file) on a new file beside `path`, then rename it: no half-written file remains.

    previous: the path that the old file moves to.  Between the two renamings it is the only one.
    Raises OSError, or MemoryError.
    """
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(new, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise error_of_write(path, error) from error
    finally:
        # On a disk that has become read-only this fails too; the first error is the one to show.
        with suppress(OSError):
            new.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk: a power cut can undo a renaming before that."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:                          # Windows cannot open a folder.
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):     # Some file systems cannot.
            raise
    finally:
        os.close(fd)


def error_of_write(path: Path, error: BaseException) -> Exception:
    """Return the error to raise for a file that cannot be written: MemoryError or OSError.

    torch.save turns both into a RuntimeError, of which the first error is the context.
    """
    reason = None
    cause = error
    while cause is not None:
        lacks_memory = isinstance(cause, MemoryError) or "allocate memory" in str(cause).lower()
        if lacks_memory:
            return MemoryError(f"{path} cannot be written: not enough memory")
        reason = reason or getattr(cause, "strerror", None)
        cause = cause.__context__
    return OSError(f"{path} cannot be written: {reason or error}")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give the block a folder to write to, which gets the name `path` if the block ends well.

    Otherwise the folder is removed; if the process is killed, PATH.PID.tmp remains.
    Raises ValueError for a path where something other than an empty folder is already.
    """
    path = Path(path).resolve()
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name another folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; name another folder")
    folder = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        if path.is_dir():
            path.rmdir()
        folder.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
