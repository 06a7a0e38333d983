"""End a run soon, usually within a minute, if one of its ranks hangs; the others would wait for it.

A rank that dies is noticed by torchrun.  One that hangs is not: it is stopped (SIGSTOP), its
machine is cut off, or a thread of it waits for ever.  So each rank writes a sign of life into
torchrun's store once a second, and reads those of the others.  Two threads do this beside the main
thread, which can be blocked in a collective: one talks to the store, and one counts, since the
store can block too.

Time is measured in wake-ups of the counting thread, one per second, so a suspended process counts
nothing.
"""
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from .console import write_error

RANK_FAILED = 1                                      # exit code: another rank died or hangs
SILENT_SECONDS = 45                                  # without a sign of life
SLOWER = 1.25                                        # A step may take so many times the expected.
FIRST_STEP_SECONDS = 600                             # for a first step that does not compile
DEAD_SECONDS = 3                                     # silence of a rank that has broken connections
LEAVING = "leaving"                                  # key in the store: a rank has said why

BETWEEN = 0                                          # The rank loads, evaluates or saves: no limit.
READING = 1                                          # It waits for its examples.
IN_STEP = 2                                          # It computes, or waits for others to.


class Moment(NamedTuple):
    """What a rank does, and since when.

    tick: of the counting thread; clock: time.monotonic(), in seconds.  n_tokens: of the step, on
    all ranks.  compiles: whether the step may take minutes.
    """
    state: int = BETWEEN
    step: int = 0
    tick: int = 0
    clock: float = 0.0
    n_tokens: int = 1
    compiles: bool = False


class Watchdog:
    """What one rank knows of the others, and what it tells them.

    Not connected, as in a single process, it only notes where the run is.
    """

    def __init__(self, program: str = ""):
        self.program = program
        self.rank = 0
        self.store = None
        self.now = Moment()                          # replaced as a whole: three threads read it
        self.tick = 0                                # seconds that this process was awake
        self.together = (0, 0)                       # (step, seconds that all ranks were in it)
        self.longest = None                          # seconds of the longest step; None: none yet
        self.per_token = 0.0                         # the most seconds per token of a step
        self.signs = []                              # of each rank, as it was read last
        self.silent_for = []                         # readings since each sign has changed
        self.beats = 0
        self.unanswered = 0                          # seconds since the store answered
        self.leaves = threading.Lock()               # Only one thread says why.

    def connect(self, store: dist.Store, rank: int, size: int):
        """Write the first sign of life.  Every rank calls this before any of them calls `start`."""
        self.rank = rank
        self.store = store.clone()                   # The main thread can block the other one.
        self.store.delete_key(LEAVING)               # of an earlier start with the same store
        self.signs = [""] * size
        self.silent_for = [0] * size
        self.give_sign()

    def start(self):
        """Begin to watch, in two threads."""
        for task in (self.talk, self.watch):
            threading.Thread(target=self.repeat, args=[task], daemon=True).start()

    # --- called by the main thread

    def begin_reading(self, step: int):
        """Note that this rank waits for the examples of a step."""
        self.now = Moment(READING, step, self.tick)

    def begin_step(self, n_tokens: int, compiles: bool):
        """Note that the computation of the step that was read begins; see Moment."""
        self.now = Moment(IN_STEP, self.now.step, self.tick, time.monotonic(), n_tokens, compiles)

    def end_step(self):
        """Note that all ranks have computed the step, and how long it took.

        The time in which a rank waited for others that were not in the step does not count.
        """
        now = self.now
        step, together = self.together
        seconds = min(time.monotonic() - now.clock, 1 + together if step == now.step else 1)
        if not now.compiles:
            self.longest = max(self.longest or 0, seconds)
            self.per_token = max(self.per_token, seconds / now.n_tokens)
        self.rest()

    def rest(self):
        """Note that this rank is between two steps, or after the last."""
        self.now = Moment(BETWEEN, self.now.step, self.tick)

    def leave_if_a_rank_is_dead(self, error: RuntimeError):
        """Leave with one line if this error of a collective is due to a dead rank; else return."""
        if self.store is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return
        for _ in range(DEAD_SECONDS + 2):
            time.sleep(1)
            if self.silent_ranks(DEAD_SECONDS):
                self.leave(f"{self.place()}{self.suspects()}")

    def place(self) -> str:
        """Return the step as the beginning of a message; nothing before the first one."""
        return f"step {self.now.step}: " if self.now.step else ""

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
        """Give a sign of life and read those of all ranks, or leave if another rank has left."""
        self.beats += 1
        self.give_sign()
        if self.store.check([LEAVING]) and not self.leaves.locked():
            os._exit(RANK_FAILED)
        names = [f"sign {rank}" for rank in range(len(self.signs))]
        for rank, value in enumerate(self.store.multi_get(names)):
            sign = value.decode()
            self.silent_for[rank] = self.silent_for[rank] + 1 if sign == self.signs[rank] else 0
            self.signs[rank] = sign
        self.unanswered = 0

    def give_sign(self):
        sign = f"{self.beats} {self.now.state} {self.now.step} {n_collectives()}"
        self.store.set(f"sign {self.rank}", sign)

    def watch(self):
        """Leave if a rank hangs."""
        self.tick += 1
        self.unanswered += 1
        now = self.now
        seconds = self.tick - now.tick
        where = self.place()
        silent = self.silent_ranks(SILENT_SECONDS)
        if silent:
            self.leave(f"{where}{ranks_are(silent)} silent: no sign of life for "
                       f"{SILENT_SECONDS} s, so stopped or cut off from the others")
        if now.state == READING and seconds >= SILENT_SECONDS:
            self.leave(f"{where}rank {self.rank} is silent: the thread that reads its examples has "
                       f"brought none for {seconds} s")
        if now.state != IN_STEP or now.compiles:
            return
        limit = self.step_limit(now.n_tokens)
        # Without a store, as after Ctrl-Z, which stops torchrun alone, the ranks go on.
        if self.unanswered >= SILENT_SECONDS and seconds >= limit:
            self.leave(f"{where}it does not end, and torchrun's store has not answered for "
                       f"{self.unanswered} s: its machine is cut off or stopped")
        self.count_together(now)
        if self.together[1] >= limit:
            self.leave(f"{where}{self.ranks_behind()}, and it has taken {self.together[1]} s; the "
                       f"longest step before took {self.longest or 0:.0f} s")

    def step_limit(self, n_tokens: int) -> float:
        """Return how many seconds a step of so many tokens may take."""
        if self.longest is None:
            return FIRST_STEP_SECONDS
        return SILENT_SECONDS + SLOWER * max(self.longest, self.per_token * n_tokens)

    def count_together(self, now: Moment):
        """Count the seconds that all ranks have been in this step.

        Before, a rank may still evaluate or save, and the others wait for it.
        """
        step, seconds = self.together
        places = [sign.split()[1:3] for sign in self.signs]
        if any(place != [str(IN_STEP), str(now.step)] for place in places):
            seconds = 0
        elif step == now.step:
            seconds += 1
        else:
            seconds = 1
        self.together = (now.step, seconds)

    def ranks_behind(self) -> str:
        """Say which ranks hang in a step that all are in.

        Such a rank has begun fewer collectives than the others, which wait for it in their latest.
        """
        counts = [int(sign.split()[3]) for sign in self.signs]
        behind = [rank for rank, count in enumerate(counts) if count < max(counts)]
        return f"{ranks_are(behind)} silent" if behind else "all ranks are in it"

    def leave(self, reason: str):
        """Exit without a save; the first rank to do so says why, and the others follow."""
        self.leaves.acquire()                        # It blocks if another thread leaves already.
        store = self.store if self.unanswered < DEAD_SECONDS else None       # It might not answer.
        if store is None or store.add(LEAVING, 1) == 1:
            advice = "; the last save is intact: --resume continues from it"
            write_error(f"{self.program}: {reason}{advice if self.now.step else ''}\n")
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
