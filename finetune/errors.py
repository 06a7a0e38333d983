"""Errors for people: one line on stderr that says what, where and what to do, and an exit code."""
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from .ranks import SINGLE_PROCESS, RankError, exit_now

BAD_INPUT = 2                                        # or a file that cannot be written
GAVE_UP = 3                                          # out of memory, or too many bad steps

LONGEST_MESSAGE = 1000                               # characters


def short_path(path) -> Path:
    """Return the path, relative to the current folder if it is inside it."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def short_paths(paths) -> str:
    """Return the short paths of files as one text."""
    return ", ".join(str(short_path(path)) for path in paths)


def in_one_line(error) -> str:
    """Return an error's text as one line of at most LONGEST_MESSAGE printable characters.

    Messages quote files, and control characters from a file would act on the terminal.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE - 3] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def is_out_of_memory(error) -> bool:
    """Return whether this is an out-of-memory error; torch often raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = "out of memory|allocate memory|ALLOC_FAILED"
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error).split("\n")[0]))


@contextmanager
def one_line_errors(program: str, ranks=SINGLE_PROCESS):
    """Turn an error about the input, or too little memory for it, into one line and exit code 2.

    Every rank must run this block.  An error on one ends all, and rank 0 prints it.  A rank that
    lacks memory, or loses another, prints its own line.
    """
    line = None
    try:
        yield
    except BrokenPipeError:                          # This is an OSError, but not an input error.
        raise
    except RankError as failure:                     # All ranks have received this error.
        exit_after_rank_error(failure, ranks)
    except Exception as error:
        is_about_input = isinstance(error, (ValueError, OSError, RecursionError))
        line = f"{program}: {in_one_line(error)}"
        if not is_about_input and not is_out_of_memory(error):
            if isinstance(error, RuntimeError):
                ranks.watchdog.leave_if_a_rank_is_dead(error)
            raise                                    # It is a fault of the program.
        if is_out_of_memory(error) and ranks.size > 1:
            exit_with_line(line, BAD_INPUT)          # The others may wait for it in a collective.
    try:
        ranks.exchange(error=line)
    except RankError as failure:
        exit_after_rank_error(failure, ranks)


def exit_after_rank_error(failure, ranks):
    """Print a failed rank's error once and leave with all ranks."""
    if ranks.is_first:
        print(failure, file=sys.stderr)
    ranks.exit_together(BAD_INPUT)


def exit_with_line(line: str, code: int):
    """Print the line on stderr and exit, without waiting for ranks at other points."""
    print(line, file=sys.stderr, flush=True)
    exit_now(code)
