"""Files of others, read without trust, and files of ours, written whole or not at all."""
import json
import os
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAFETENSORS = ".safetensors"                          # by this suffix a file is the safetensors package's, else torch's


def listed(keys, most=6):
    return ", ".join(sorted(keys)[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def read_object(path):
    """The JSON object in a file.  Raises ValueError for what is none."""
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
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path} is not a checkpoint of tensors: it is empty")
    package = safetensors(path) if path.suffix == SAFETENSORS else None
    try:
        if package:
            with package.safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:                                    # a broken file raises whatever it happens to hit
        raise ValueError(f"{path} is not a checkpoint of tensors: {[*str(error).splitlines(), type(error).__name__][0]}") from error
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS
            and tensor.layout is torch.strided and tensor.device.type == "cpu" for name, tensor in state.items()):
        raise ValueError(f"{path} does not hold a dict of floating-point tensors in 16, 32 or 64 bit")
    return state


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
    except (OSError, RuntimeError, *([package.SafetensorError] if package else [])) as error:      # a full disk, say
        raise OSError(f"{path} cannot be written: {error}") from error


def write_json(path, content):
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def write_whole(path, write):
    """Call write(file) on a file beside `path`, then rename it: `path` is the old file or the new, never a part."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
