"""The processes of one run as torchrun starts them: connecting, agreeing, summing, leaving."""
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .watchdog import Watchdog

# The limit of a collective, for hangs that the watchdog does not see.  It must be longer than a
# compilation or the save of a whole model, for which the other ranks wait.
COLLECTIVE_LIMIT = timedelta(minutes=30)


class RankError(Exception):
    """Raised on every rank when one of them reports an error; the text is that error."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is: rank counts from 0 to size - 1, local_rank on this machine.

    begun_with: how many ranks a resumed run was begun with; None: as many as there are now.
    """
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    watchdog: Watchdog = field(default_factory=Watchdog, compare=False)
    begun_with: int | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> list:
        """Return every rank's value, in the order of the ranks.

        If a rank is dead, exit with one line.
        """
        values = [value] * self.size
        if self.size > 1:
            try:
                dist.all_gather_object(values, value)
            except RuntimeError as error:
                self.watchdog.leave_if_a_rank_is_dead(error)
                raise
        return values

    def exchange(self, value=None, error: str | None = None) -> list:
        """Return every rank's value.  Raises RankError on all ranks if one passed an error.

        A failing rank calls exchange(error=...) wherever it fails.  The others get the error at
        their next exchange, so none waits for it.
        """
        answers = self.gather((value, error))
        for _, rank_error in answers:
            if rank_error:
                raise RankError(rank_error)
        return [value for value, _ in answers]

    def agree(self, value, what: str):
        """Raise ValueError on every rank unless all of them have the same value."""
        values = self.exchange(value)
        if any(other != value for other in values):
            raise ValueError(f"the ranks were not started alike: {what} differ between ranks")

    def exit_together(self, code: int):
        """Exit with this code, together with all other ranks.

        A rank waits for the others, so that none is killed before it has printed or saved.
        """
        self.gather(None)
        exit_now(code)


SINGLE_PROCESS = Ranks()


def connect(program: str = "train.py") -> Ranks:
    """Join the process group that torchrun describes; without torchrun there is none.

    program: named in the line that is printed when a rank hangs.
    """
    if not dist.is_torchelastic_launched():
        return SINGLE_PROCESS
    # torch 2.13 deprecates broadcast_buffers, and torch 2.11 has no replacement for it.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps the store across restarts, with addresses of dead ranks; the prefix keeps this
    # start apart from earlier ones.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    watchdog = Watchdog(program)
    watchdog.connect(store, rank, size)
    dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT, store=store, rank=rank,
                            world_size=size)
    watchdog.start()
    return Ranks(rank, size, int(os.environ["LOCAL_RANK"]), watchdog)


@contextmanager
def connected_ranks(program: str = "train.py"):
    """Yield this process's Ranks.  Only rank 0 prints, and all ranks exit together at the end."""
    ranks = connect(program)
    if not ranks.is_first:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    yield ranks
    if ranks.size > 1:
        ranks.exit_together(0)


def sum_over_ranks(tensor):
    """Add up a tensor over all ranks in place and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def exit_now(code: int):
    """Exit with this code without waiting for other ranks, which torchrun then ends.

    os._exit, since gloo's threads that still hold a tensor can abort a normal shutdown.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
