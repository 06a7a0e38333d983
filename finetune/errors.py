"""Bad input ends in one line on stderr and an exit code, never in a traceback."""
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from .ranks import leave

LONGEST = 1000                                       # characters of an error message


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


def end(line, code):
    """Say why on stderr and exit, without a word to other ranks: they are somewhere else, and torchrun ends them."""
    print(line, file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
