"""A rank that hangs ends the run within a minute; without this, the others would wait for it.

A rank that dies is noticed by torchrun.  One that hangs is not: it is stopped (SIGSTOP), its
machine is cut off, or a thread of it waits for ever.  So each rank writes a sign of life into
torchrun's store once a second, and reads those of the others.  Two threads do this beside the main
thread, which can be blocked in a collective: one talks to the store, and one counts, since the
store can block too.

All limits count the second thread's wake-ups, one a second, and no clock: while Ctrl-Z or a closed
laptop stops all ranks, nothing is counted.
"""
import os
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from .console import write_error

RANK_FAILED = 1                                      # exit code: another rank died or hangs
SILENT_SECONDS = 45                                  # without a sign of life
STEP_FACTOR = 3                                      # a step may take so many times the longest
DEAD_SECONDS = 3                                     # silence of a rank that has broken connections
LEAVING = "leaving"                                  # key in the store: a rank has said why

BETWEEN = 0                                          # loads, evaluates, saves: without a limit
READING = 1                                          # waits for its examples
IN_STEP = 2                                          # computes, or waits for the others to


class Watchdog:
    """What one rank knows of the others, and what it tells them.

    Not connected, as in a single process, it only notes where the run is.
    """

    def __init__(self, program: str = ""):
        self.program = program
        self.state = BETWEEN
        self.step = 0                                # the step that is read or computed
        self.seconds = 0                             # in this state
        self.longest = None                          # seconds of the longest step so far
        self.compiles = False                        # whether this step compiles
        self.beats = 0
        self.silent_for = []                         # seconds, per rank
        self.unanswered = 0                          # seconds since the store answered
        self.leaves = False
        self.store = None

    def connect(self, store: dist.Store, rank: int, size: int):
        """Write the first sign of life.  Every rank calls this before any of them calls `start`."""
        self.store = store.clone()                   # The main thread can block the other one.
        self.rank = rank
        self.signs = [""] * size
        self.silent_for = [0] * size
        self.give_sign()

    def start(self):
        """Begin to watch, in a thread of its own."""
        for task in (self.talk, self.watch):
            threading.Thread(target=self.repeat, args=[task], daemon=True).start()

    # --- called by the main thread

    def begin_reading(self, step: int):
        """Note that this rank waits for the examples of a step."""
        self.enter(READING)
        self.step = step

    def begin_step(self, compiles: bool):
        """Note that the step's computation begins.  compiles: it may take minutes."""
        self.enter(IN_STEP)
        self.compiles = compiles

    def end_step(self):
        """Note that all ranks have computed the step."""
        if not self.compiles:
            self.longest = max(self.longest or 0, self.seconds)
        self.enter(BETWEEN)

    def enter(self, state: int):
        self.state = state
        self.seconds = 0

    def explain_failure(self):
        """Leave with one line if a collective failed because a rank is dead; else return."""
        if self.store is None:
            return
        for _ in range(DEAD_SECONDS + 2):
            time.sleep(1)
            if self.silent_ranks(DEAD_SECONDS):
                self.leave(f"step {self.step}: {self.suspects()}")

    def suspects(self) -> str:
        """Say which ranks give no sign of life now."""
        silent = self.silent_ranks(DEAD_SECONDS)
        return f"{ranks_are(silent)} silent" if silent else "another rank is probably gone"

    def silent_ranks(self, seconds: int) -> list[int]:
        """Return the ranks that have given no sign of life for so long."""
        return [rank for rank, silent_for in enumerate(self.silent_for) if silent_for >= seconds]

    # --- each second, in two threads

    def repeat(self, task: Callable):
        """Call the task once a second, until torchrun and its store are gone."""
        while self.store is not None:
            time.sleep(1)
            try:
                task()
            except RuntimeError:                     # The store has closed the connection.
                self.store = None

    def talk(self):
        """Give a sign of life, and read those of all ranks."""
        self.beats += 1
        self.give_sign()
        self.read_signs()
        self.unanswered = 0

    def watch(self):
        """Leave if a rank hangs."""
        self.seconds += 1
        self.unanswered += 1
        self.silent_for = [seconds + 1 for seconds in self.silent_for]
        if self.unanswered >= SILENT_SECONDS:
            self.store = None                        # or leaving would wait for it
            self.leave(f"{self.place()}torchrun's store has not answered for {SILENT_SECONDS} s: "
                       "its machine is cut off or stopped")
        silent = self.silent_ranks(SILENT_SECONDS)
        if silent:
            self.leave(f"{self.place()}{ranks_are(silent)} silent: no sign of life for "
                       f"{SILENT_SECONDS} s, so stopped or cut off from the others")
        if self.state == READING and self.seconds >= SILENT_SECONDS:
            self.leave(f"{self.place()}rank {self.rank} is silent: the thread that reads its "
                       f"examples has brought none for {self.seconds} s")
        has_limit = self.state == IN_STEP and not self.compiles and self.longest is not None
        if has_limit and self.seconds >= SILENT_SECONDS + STEP_FACTOR * self.longest:
            self.leave_if_all_are_in_this_step()

    def give_sign(self):
        sign = f"{self.beats} {self.state} {self.step} {n_collectives()}"
        self.store.set(f"sign {self.rank}", sign)

    def read_signs(self):
        if self.store.check([LEAVING]) and not self.leaves:
            os._exit(RANK_FAILED)
        names = [f"sign {rank}" for rank in range(len(self.signs))]
        for rank, value in enumerate(self.store.multi_get(names)):
            if value.decode() != self.signs[rank]:
                self.signs[rank] = value.decode()
                self.silent_for[rank] = 0

    def leave_if_all_are_in_this_step(self):
        """Leave because of a step that does not end, unless a rank evaluates or saves meanwhile.

        The ranks that hang have begun the fewest collectives: the others wait for them in the next.
        """
        places = [sign.split() for sign in self.signs]
        if any(place[1:3] != [str(IN_STEP), str(self.step)] for place in places):
            return
        counts = [int(count) for *_, count in places]
        behind = [rank for rank, count in enumerate(counts) if count < max(counts)]
        who = f"{ranks_are(behind)} silent" if behind else "all ranks are in it"
        self.leave(f"{self.place()}{who}, and it has taken {self.seconds} s; the longest step "
                   f"before took {self.longest} s")

    def place(self) -> str:
        return f"step {self.step}: " if self.step else ""

    def leave(self, reason: str):
        """Exit without a save; the first rank to do so says why, and the others follow."""
        self.leaves = True
        if self.store is None or self.store.add(LEAVING, 1) == 1:
            advice = "; the last save is intact: --resume continues from it" if self.step else ""
            write_error(f"{self.program}: {reason}{advice}\n")
            time.sleep(2)                            # Let them follow before torchrun ends them.
        os._exit(RANK_FAILED)


def ranks_are(ranks: list[int]) -> str:
    """Return "rank 1 is" or "ranks 1, 2 are"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} is"
    return f"ranks {', '.join(map(str, ranks))} are"


def n_collectives() -> int:
    """Return how many collectives this rank has begun, as far as torch says so.

    torch has no public name for it.
    """
    if not dist.is_initialized():
        return 0
    try:
        return dist.group.WORLD._get_sequence_number_for_group()
    except (AttributeError, RuntimeError):
        return 0
