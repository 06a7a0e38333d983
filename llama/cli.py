"""What the command lines share: arguments that check themselves, one-line errors, device and precision."""
import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

LONGEST = 1000                                       # characters of an error message
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """argparse that raises ValueError, and takes no abbreviated flags."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def number(kind, low, high=2 ** 53, open_low=False, open_high=False):
    """A type for argparse: `kind` within low..high; an end is left out where it is open.  nan is never within."""
    def parse(text):
        value = kind(text)
        if (low < value if open_low else low <= value) and (value < high if open_high else value <= high):
            return value
        bounds = f"{'above' if open_low else 'at least'} {low:g}"
        if high < 2 ** 53 or value > high:
            bounds += f" and {'below' if open_high else 'at most'} {high:.16g}"
        raise argparse.ArgumentTypeError(f"{text} is out of range, must be {bounds}")
    parse.__name__ = "whole number" if kind is int else "number"              # argparse names it in its messages
    return parse


def utf8(value):
    """A type for argparse: text whose every character is one (bytes that are no UTF-8 come in as halves)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8 text") from None
    return value


def text(value):
    """A type for argparse: any text but none, as an unset variable of the shell would give."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return utf8(value)


def named_values(text):
    """A type for argparse: {name: value} from NAME=VALUE,NAME=VALUE; a value is a number, true, false, or a word."""
    values = {}
    for part in text.split(","):
        name, given, value = part.partition("=")
        if not given or not name or name in values:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=VALUE" if name not in values else f"{name} is given twice")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = utf8(value)
    return values


def add_hardware_flags(group):
    group.add_argument("--device", type=text, help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    group.add_argument("--precision", choices=DTYPES,
                       help="compute dtype (default: bf16 where the hardware has it, fp16 on older CUDA, else fp32)")


def pick_hardware(device, precision, local_rank=0, fast_matmul=False):
    """(torch.device, "fp32" | "bf16" | "fp16") from the two flags; each rank of a machine takes a GPU of its own.

    fast_matmul: products of fp32 matrices may round what they read, to bf16 on a CPU, to TF32 on CUDA, and add up in fp32.
    It is leave, no order: on a CPU without matrix units oneDNN's kernels, which then do them, round nothing.
    Raises ValueError for a device that is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = f"cuda:{local_rank}" if device == "cuda" else device
    if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device} cannot be used here: there is cpu, cuda, cuda:N and mps")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    device = torch.device(device)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if fast_matmul else "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if fast_matmul else "ieee"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        precision = precision or ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    return device, precision or "fp32"


def shown(path):
    """The path as a person here would write it: from the current folder, if it is inside."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def in_one_line(error):
    """What an error says, in one line of no more than LONGEST characters, each of which can be seen: files of others are
    quoted there, and a terminal would obey what they hold."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if len(said) <= LONGEST else said[:LONGEST - 3] + "..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in said)


@contextmanager
def bad_input_ends_in_one_line(program):
    """Turn the ValueError or OSError that says what is wrong with an input into one line on stderr and exit 2.

    Of several ranks each must pass here: an error on any ends all, and rank 0 alone prints it.  The block gets a
    list; what it appends must be alike on all ranks.
    """
    error, alike = None, []
    try:
        yield alike
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, RecursionError) as caught:
        error = f"{program}: {in_one_line(caught)}"
    said = [(error, alike)]
    if dist.is_initialized():
        said *= dist.get_world_size()
        dist.all_gather_object(said, (error, alike))
    error = next(filter(None, (error for error, _ in said)), None)
    if not error and any(other != alike for _, other in said):
        error = f"{program}: the ranks were not started alike: compare their flags, their data, their base and what they see in --out"
    if error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(error, file=sys.stderr)
        leave(2)


def sum_over_ranks(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def leave(code):
    """Exit.  A rank waits for the others, so that none is killed before it has printed or saved, and skips the
    interpreter's own end: gloo's threads, if they are still letting go of a tensor, would abort it there."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def end(line, code):
    """Say why on stderr and exit, without a word to other ranks: they are somewhere else, and torchrun ends them."""
    print(line, file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def peak_memory_mb(device):
    """Peak of the GPU's allocations, or of the process's memory on a CPU, in MiB; None where nobody counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource                                              # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def progress(row, steps, seconds):
    """One line for people, whole and of fixed columns, so that it reads well in a log file too."""
    left = round(seconds / row["step"] * (steps - row["step"]))
    columns = [f"step {row['step']:>{len(str(steps))}}/{steps}", f"epoch {row['epoch']:.2f}", f"loss {row['loss']:.4f}",
               f"lr {row['lr']:.1e}", f"grad norm {row['grad_norm']:.2f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if row["peak_memory_mb"] is not None:
        columns.append(f"{row['peak_memory_mb']:,.0f} MiB")
    columns.append(f"{left // 60}:{left % 60:02} left")
    if "val_loss" in row:
        columns.append(held_out(row))
    return " | ".join(columns)


def held_out(row):
    """What was found on held-out examples, as columns of that line."""
    classes = f" | accuracy {row['val_accuracy']:.1%} | MCC {row['val_mcc']:.3f}" if "val_accuracy" in row else ""
    return f"held-out loss {row['val_loss']:.4f}{classes}"
