"""The processes of one run as torchrun starts them: connecting, agreeing, summing, leaving."""
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class FailedRank(Exception):
    """A rank has reported an error, which is this exception's text.  All ranks get it."""


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`, and number `local_rank` on its machine."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value) -> list:
        """Return every rank's value, in the order of the ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def exchange(self, value=None, error: str | None = None) -> list:
        """Return every rank's value.  Raises FailedRank on all of them if one has an error.

        A rank that fails calls this with its error wherever it is, and the others hear of it at
        their next exchange.  So no rank waits for one that has given up.
        """
        answers = self.gather((value, error))
        for _, text in answers:
            if text:
                raise FailedRank(text)
        return [value for value, _ in answers]

    def agree(self, value, what: str):
        """Raise ValueError on every rank unless all of them have the same value."""
        values = self.exchange(value)
        if any(other != value for other in values):
            raise ValueError(f"the ranks were not started alike: {what} differ from rank to rank")


ALONE = Ranks()


def connect() -> Ranks:
    """Join the process group that torchrun describes; one process alone needs none."""
    if not dist.is_torchelastic_launched():
        return ALONE
    # torch 2.13 deprecates broadcast_buffers, and torch 2.11 lacks its successor.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    store, rank, size = next(rendezvous("env://"))
    # The store outlives a restart by torchrun and holds the addresses of the ranks that are gone.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Ranks(rank, size, int(os.environ["LOCAL_RANK"]))


@contextmanager
def connected_ranks():
    """Yield this process's Ranks, of which the first alone prints; leave together at the end."""
    ranks = connect()
    if not ranks.is_first:
        sys.stdout = open(os.devnull, "w")
    yield ranks
    if ranks.size > 1:
        leave(0)


def sum_over_ranks(tensor):
    """Add up a tensor over all ranks in place and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def leave(code: int):
    """Exit with this code, together with all other ranks.

    A rank waits for the others, so that none is killed before it has printed or saved.  It then
    skips the interpreter's own end, which gloo's threads would abort if they still hold a tensor.
    """
    if dist.is_initialized():
        dist.barrier()
        leave_alone(code)
    sys.exit(code)


def leave_alone(code: int):
    """Exit with this code without waiting for other ranks, which torchrun then ends."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
