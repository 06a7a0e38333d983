"""Errors for people: one line on stderr that says what, where and what to do, and an exit code."""
import sys
from contextlib import contextmanager
from pathlib import Path

from .ranks import ALONE, FailedRank, leave, leave_alone

RANK_FAILED = 1                                      # another rank died or hung
BAD_INPUT = 2
GAVE_UP = 3                                          # out of memory, or too many bad steps
INTERRUPTED = 130                                    # told to stop, and all is saved

LONGEST_MESSAGE = 1000                               # characters


def short_path(path) -> Path:
    """Return the path as a person here would write it: relative, if it is in this folder."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def in_one_line(error) -> str:
    """Return an error's text as one line of at most LONGEST_MESSAGE printable characters.

    Errors quote what stands in other people's files, and a terminal would obey control characters.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE - 3] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@contextmanager
def one_line_errors(program: str, ranks=ALONE):
    """Turn an error about the input into one line on stderr and exit code 2.

    All ranks must pass through the block: an error on any of them ends all; the first prints it.
    """
    line = None
    try:
        yield
    except BrokenPipeError:                          # This is an OSError, but no input's fault.
        raise
    except FailedRank as failure:                    # Every rank has heard of this one already.
        end_all_ranks(failure, ranks)
    except (ValueError, OSError, MemoryError, RecursionError) as error:
        line = f"{program}: {in_one_line(error)}"
    try:
        ranks.exchange(error=line)
    except FailedRank as failure:
        end_all_ranks(failure, ranks)


def end_all_ranks(failure, ranks):
    """Print a failed rank's error once and leave with all ranks."""
    if ranks.is_first:
        print(failure, file=sys.stderr)
    leave(BAD_INPUT)


def end_process(line: str, code: int):
    """Print why on stderr and exit, without waiting for ranks that are somewhere else."""
    print(line, file=sys.stderr, flush=True)
    leave_alone(code)
