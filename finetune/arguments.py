"""Arguments that check themselves: what the command lines share."""
import argparse
import json

from .hardware import DTYPES


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
