"""What the command lines share: arguments that check themselves, one-line errors, device and precision."""
import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit 2, and which takes no abbreviated flags."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n")


def number(kind, low, high=2 ** 53, open_low=False, open_high=False):
    """A type for argparse: `kind` within low..high; an end is left out where it is open.  nan is never within."""
    def parse(text):
        value = kind(text)
        if (low < value if open_low else low <= value) and (value < high if open_high else value <= high):
            return value
        bounds = f"{'above' if open_low else 'at least'} {low:g}"
        if high < 2 ** 53:
            bounds += f" and {'below' if open_high else 'at most'} {high:g}"
        raise argparse.ArgumentTypeError(f"{text} is out of range, must be {bounds}")
    parse.__name__ = "whole number" if kind is int else "number"              # argparse names it in its messages
    return parse


def add_hardware_flags(group):
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    group.add_argument("--precision", choices=DTYPES,
                       help="compute dtype (default: bf16 where the hardware has it, fp16 on older CUDA, else fp32)")


def pick_hardware(device, precision):
    """(torch.device, "fp32" | "bf16" | "fp16") from the two flags.  Raises ValueError for a device that is not there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    device = torch.device(device)
    if precision is None and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, precision or "fp32"


def shown(path):
    """The path as a person here would write it: from the current folder, if it is inside."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextmanager
def bad_input_ends_in_one_line(program):
    """Turn the ValueError or OSError that says what is wrong with an input into one line on stderr and exit 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
