"""Command-line arguments that check themselves."""
import argparse
import json
import sys

from .hardware import DTYPES

LARGEST = 2 ** 53                                    # up to here a float holds every whole number
SMALLEST = 2.0 ** -126                               # Below it a 32-bit float may become 0.


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ValueError.

    It accepts neither an abbreviated flag nor one that is given twice, whose last value would win.
    given: names of the arguments whose flags stand on the command line.
    """

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)
        self.given = set()

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        self.check_given_once(words)
        return super().parse_known_args(words, namespace)

    def check_given_once(self, words: list[str]):
        """Raise ValueError for a flag with one value, or with a --no- form, that stands twice."""
        flags = words[:words.index("--")] if "--" in words else words
        self.given = set()
        for word in flags:
            flag, _, _ = word.partition("=")
            action = self._option_string_actions.get(flag)
            is_switch = isinstance(action, argparse.BooleanOptionalAction)
            if action is None:
                continue
            may_repeat = action.nargs == "+" or action.nargs == 0 and not is_switch
            if action.dest in self.given and not may_repeat:
                self.error(f"argument {'/'.join(action.option_strings)}: is given twice; give it "
                           "once")
            self.given.add(action.dest)

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
        if above and below and 0 < abs(parsed) < SMALLEST:
            raise argparse.ArgumentTypeError(f"{value} is too small for a 32-bit float, which "
                                             f"holds {SMALLEST:.2g} or more")
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


def as_flag(name: str, value) -> str:
    """Return a setting as it would stand on the command line."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {flag}"
    return flag if value is True else f"{flag} {as_words(name, value)}"


def as_words(name: str, value) -> str:
    """Return a setting's value as on the command line; of a switch, whether it is given."""
    if value is None or value is False:
        return "not given"
    if value is True:
        return "given"
    if isinstance(value, dict):
        return ",".join(f"{key}={content}" for key, content in value.items())
    if isinstance(value, list | tuple):
        return (" " if name in ("data", "val_data") else ",").join(map(str, value))
    return str(value)


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
                       help="compute dtype (default: bf16 on a CUDA GPU that computes in it, fp16 "
                            "on an older one, else fp32)")
