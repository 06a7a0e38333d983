"""Command-line arguments that check themselves."""
import argparse
import json

from .hardware import DTYPES

LARGEST = 2 ** 53                                    # up to here a float holds every whole number


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError and accepts no abbreviated flags."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def number(kind, low, high=LARGEST, open_low=False, open_high=False):
    """Return a type for argparse that accepts an int or a float between low and high.

    open_low, open_high: whether that end itself is excluded.  nan is never accepted.
    """
    def parse(value):
        parsed = kind(value)
        above = low < parsed if open_low else low <= parsed
        below = parsed < high if open_high else parsed <= high
        if above and below:
            return parsed
        bounds = f"above {low:g}" if open_low else f"at least {low:g}"
        if high < LARGEST or parsed > high:
            bounds += f" and below {high:.16g}" if open_high else f" and at most {high:.16g}"
        raise argparse.ArgumentTypeError(f"{value} is out of range, must be {bounds}")

    # argparse names the type in its own messages.
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def utf8(value: str) -> str:
    """Return the text.  Raises ArgumentTypeError if its bytes were not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8 text") from None
    return value


def text(value: str) -> str:
    """Return the text.  Raises ArgumentTypeError if it is empty, as an unset shell variable is."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty")
    return utf8(value)


def names(value: str) -> tuple:
    """Return the words between commas."""
    return tuple(value.split(","))


def named_values(value: str) -> dict:
    """Return {name: value} from NAME=VALUE,NAME=VALUE; a value is JSON, or else a word."""
    values = {}
    for part in value.split(","):
        name, equals, content = part.partition("=")
        if name in values:
            raise argparse.ArgumentTypeError(f"{name} is given twice")
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=VALUE")
        try:
            values[name] = json.loads(content)
        except ValueError:
            values[name] = utf8(content)
    return values


def add_hardware_flags(group):
    group.add_argument("--device", type=text,
                       help="cpu, cuda, cuda:1 or mps (default: cuda if there is one, else cpu)")
    group.add_argument("--precision", choices=DTYPES,
                       help="compute dtype (default: bf16 if the hardware computes in it, fp16 on "
                            "older CUDA, else fp32)")
