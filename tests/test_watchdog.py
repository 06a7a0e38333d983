"""A rank that hangs ends the run: who is named, and what is no hang.

    pytest tests/test_watchdog.py
    pytest -m slow tests/test_watchdog.py       real ranks under torchrun, stopped or stuck

Time is counted in calls of `watch`, one a second in a run;
the fast tests make the calls themselves.
"""
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from finetune import signals, watchdog
from finetune.errors import one_line_errors
from finetune.ranks import Ranks
from finetune.resume import read_last_save
from finetune.watchdog import (BETWEEN, FIRST_STEP_SECONDS, IN_STEP, READING, SILENT_SECONDS,
                               SLOWER, Moment, Watchdog)

from .helpers import ONE_THREAD, ROOT, launcher, metrics, python


class HasLeft(Exception):
    pass


@pytest.fixture
def dogs(monkeypatch):
    """The watchdogs of three ranks, which share a store.  To leave raises HasLeft."""
    def leave(code):
        raise HasLeft(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    store = dist.HashStore()
    three = [Watchdog("train.py") for _ in range(3)]
    for rank, dog in enumerate(three):
        dog.connect(store, rank, 3)
    return three


clock = [0.0]                                        # of all ranks, in seconds


def live(dogs, seconds):
    """Let the threads of these ranks do what they do each second."""
    for _ in range(seconds):
        clock[0] += 1
        for dog in dogs:
            dog.talk()
        for dog in dogs:
            dog.watch()


def begin(dogs, step, n_tokens=100, compiles=False):
    for dog in dogs:
        dog.begin_reading(step)
        dog.begin_step(n_tokens, compiles)


def end(dogs):
    """End the step; return how long the longest one took, as each rank has it."""
    for dog in dogs:
        dog.end_step()
    return [dog.longest for dog in dogs]


def take_step(dogs, step, seconds, n_tokens=100):
    """Let the ranks compute a step that takes so many seconds."""
    begin(dogs, step, n_tokens)
    live(dogs, seconds)
    end(dogs)


def line_of(capfd):
    line, = capfd.readouterr().err.splitlines()
    return line


def test_a_rank_that_is_stopped_is_named_and_all_others_leave(dogs, capfd):
    """In any state of the run, also while it loads: the step is named where there is one."""
    live(dogs, 2)
    live(dogs[::2], SILENT_SECONDS - 1)
    with pytest.raises(HasLeft, match="1"):
        live(dogs[::2], 1)
    assert line_of(capfd) == (f"train.py: rank 1 is silent: no sign of life for {SILENT_SECONDS} "
                              "s, so stopped or cut off from the others")
    with pytest.raises(HasLeft, match="1"):
        live(dogs[:1], 1)                            # It sees that another has left.
    assert capfd.readouterr().err == ""


def test_two_silent_ranks_in_a_step(dogs, capfd):
    take_step(dogs, 1, 1)
    begin(dogs, 2)
    with pytest.raises(HasLeft):
        live(dogs[2:], SILENT_SECONDS + 1)
    assert line_of(capfd).startswith("train.py: step 2: ranks 0, 1 are silent: ")


def test_nothing_counts_while_all_are_suspended(dogs):
    """A day with the laptop closed is no second here, and makes no later limit longer."""
    take_step(dogs, 1, 1)
    begin(dogs, 2)
    live(dogs, 2)
    clock[0] += 86400
    live(dogs, 2)
    assert max(end(dogs)) <= 5


def test_a_thread_that_brings_no_examples(dogs, capfd):
    take_step(dogs, 1, 1)
    dogs[1].begin_reading(2)
    begin(dogs[::2], 2)
    with pytest.raises(HasLeft):
        live(dogs, SILENT_SECONDS)
    assert line_of(capfd).startswith("train.py: step 2: rank 1 is silent: the thread that reads")


@pytest.mark.parametrize("begun, who", [([7, 6, 7], "rank 1 is silent"),
                                        ([7, 7, 7], "all ranks are in it")])
def test_a_step_that_does_not_end(dogs, capfd, monkeypatch, begun, who):
    """All answer.  The one that hangs has begun fewer collectives; torch does not always say."""
    take_step(dogs, 1, 4)
    take_step(dogs, 2, 2)
    counts = iter(begun * 10 ** 3)
    monkeypatch.setattr(watchdog, "n_collectives", lambda: next(counts))
    begin(dogs, 3)
    limit = int(SILENT_SECONDS + SLOWER * 4)
    live(dogs, limit - 1)
    with pytest.raises(HasLeft):
        live(dogs, 1)
    assert line_of(capfd) == (
        f"train.py: step 3: {who}, and it has taken {limit} s; the longest step before took 4 s; "
        "the last save is intact: --resume continues from it")


def test_a_step_that_compiles_has_no_limit_and_makes_none(dogs):
    begin(dogs, 1, compiles=True)
    live(dogs, 2000)
    assert end(dogs) == [None] * 3


def test_a_first_step_may_take_longer_than_later_ones(dogs):
    begin(dogs, 1)
    live(dogs, FIRST_STEP_SECONDS - 1)
    with pytest.raises(HasLeft):
        live(dogs, 1)


def test_waiting_for_a_rank_that_saves_is_no_part_of_a_step(dogs):
    """The others are in the next step already, for ten minutes; then it takes 4 seconds."""
    take_step(dogs, 1, 4)
    begin(dogs[1:], 2)                               # Rank 0 saves.
    live(dogs, 600)
    begin(dogs[:1], 2)
    live(dogs, 4)
    assert all(4 <= longest <= 5 for longest in end(dogs))


def test_a_larger_step_may_take_longer(dogs):
    """The first one was the small last step of an epoch."""
    take_step(dogs, 1, 1, n_tokens=10)
    begin(dogs, 2, n_tokens=1000)
    live(dogs, 140)
    with pytest.raises(HasLeft):
        live(dogs, 40)


def test_a_store_that_does_not_answer(dogs, capfd):
    """Its machine is cut off: nobody can be asked, and silence of the store is none of the ranks.

    While steps still end, the ranks go on: Ctrl-Z stops torchrun alone.
    """
    take_step(dogs, 1, 1)
    for step in range(2, 80):
        begin(dogs, step)
        clock[0] += 1
        dogs[1].watch()
        dogs[1].end_step()
    begin(dogs, 80)
    dogs[1].store = object()                         # Asking it anything would fail.
    dogs[1].silent_for[0] = 3
    with pytest.raises(HasLeft):
        for _ in range(SILENT_SECONDS + 3):
            dogs[1].watch()
    assert "step 80: it does not end, and torchrun's store has not answered" in line_of(capfd)


def test_what_an_earlier_start_left_in_the_store(dogs):
    """torchrun keeps its store when it starts ranks again."""
    dogs[0].store.add(watchdog.LEAVING, 1)
    again = Watchdog("train.py")
    again.connect(dogs[0].store, 0, 3)
    again.talk()


@pytest.mark.parametrize("error, leaves", [("[gloo/transport/tcp/pair.cc] Connection closed", True),
                                           ("The size of tensor a must match", False)])
def test_an_error_of_this_rank_is_its_own(dogs, error, leaves):
    dogs[1].silent_for[0] = 4
    with pytest.raises(HasLeft) if leaves else nullcontext():
        dogs[1].leave_if_a_rank_is_dead(RuntimeError(error))


@pytest.mark.parametrize("meet", [Ranks.exchange, lambda ranks: ranks.exit_together(0)],
                         ids=["while it loads", "before all leave"])
def test_a_rank_that_dies_outside_a_step(dogs, monkeypatch, capfd, meet):
    """The others wait for it."""
    def fail(values, value):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(dist, "all_gather_object", fail)
    dogs[1].silent_for[0] = 4
    with pytest.raises(HasLeft):
        meet(Ranks(1, 3, 1, dogs[1]))
    assert line_of(capfd) == "train.py: rank 0 is silent"


def test_a_rank_that_dies_in_another_collective(dogs, capfd):
    """In the backward pass that is tried before step 1, say."""
    dogs[1].silent_for[0] = 4
    with pytest.raises(HasLeft), one_line_errors("train.py", Ranks(1, 3, 1, dogs[1])):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert line_of(capfd) == "train.py: rank 0 is silent"


def test_a_rank_that_lacks_memory_waits_for_no_other(dogs, monkeypatch, capfd):
    """The others may be in a collective, where they wait for it."""
    def wait(values, value):
        raise AssertionError("it waits")

    monkeypatch.setattr(dist, "all_gather_object", wait)
    with pytest.raises(SystemExit) as left, one_line_errors("x", Ranks(1, 3, 1, dogs[1])):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert left.value.code == 2 and line_of(capfd) == "x: CUDA out of memory."


@pytest.mark.parametrize("moments, silent_for, leaves_after", [
    ([Moment(IN_STEP, 3)] * 40, 0, 21),
    ([Moment(IN_STEP, 3)] * 15 + [Moment(BETWEEN, 3)] * 40 + [Moment(IN_STEP, 4)] * 15, 0, None),
    ([Moment(BETWEEN, 3)] * 40 + [Moment(READING, 4)] * 5 + [Moment(IN_STEP, 4)] * 30, 0, 61),
    ([Moment(BETWEEN, 3)] * 40, 30, 20),
], ids=["a step hangs", "a step and a save end", "the next step hangs", "a rank is dead"])
def test_after_a_signal_a_step_must_end_in_time_and_a_save_need_not(moments, silent_for,
                                                                    leaves_after):
    """moments: where the run is in each second after the signal; then it ends."""
    dog = Watchdog()
    dog.silent_for = [0, silent_for]
    seconds = iter(moments)
    passed = []

    def wait(_):
        dog.now = next(seconds, None)
        passed.append(dog.now)
        return dog.now is None

    def leave(reason):
        raise HasLeft(reason)

    dog.leave = leave
    if leaves_after is None:
        signals.leave_if_a_step_hangs(dog, SimpleNamespace(wait=wait))
    else:
        with pytest.raises(HasLeft, match=r"told to stop, but step \d does not end: "):
            signals.leave_if_a_step_hangs(dog, SimpleNamespace(wait=wait))
        assert len(passed) == leaves_after


def test_a_store_that_is_gone_ends_the_watch(dogs):
    """torchrun was killed.  Its ranks go on, as they always did."""
    class Gone:
        def set(self, name, value):
            raise dist.DistNetworkError("Connection reset by peer")

    dogs[0].store = Gone()
    dogs[0].repeat(dogs[0].talk)
    assert dogs[0].store is None


# --- real ranks

HANGS = {                                            # what rank 1 does, what is printed of it
    "is stopped": ("train.begin_step = stop_at(train.begin_step, os.kill, os.getpid(), 19)",
                   "rank 1 is silent: no sign of life for "),
    "has no examples": ("train.windows = windows_that_end_in_sleep",
                        "rank 1 is silent: the thread that reads its examples has brought "),
    "computes for ever": ("train.begin_step = stop_at(train.begin_step, time.sleep, 10 ** 6)",
                          "rank 1 is silent, and it has taken "),
    "has a segmentation fault": (
        "train.begin_step = stop_at(train.begin_step, ctypes.string_at, 0)", "rank 1 is silent; "),
}
SCRIPT = f"""
import ctypes, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from finetune import watchdog
watchdog.SILENT_SECONDS = 6
hangs = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
def stop_at(begin_step, hang, *args):
    def begin(model, step, loss):
        if step == 4:
            hang(*args)
        return begin_step(model, step, loss)
    return begin
def windows_that_end_in_sleep(*args, windows=train.windows):
    for step, window in enumerate(windows(*args), 1):
        if step == 4:
            time.sleep(10 ** 6)
        yield window
if hangs:
    HANG
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", HANGS)
def test_a_rank_that_hangs(tmp_path, kind):
    """The other leaves with one line; torchrun starts both again, and the run ends well."""
    hang, message = HANGS[kind]
    (tmp_path / "launch.py").write_text(SCRIPT.replace("HANG", hang))
    done = python(tmp_path, *launcher(2, "--max-restarts=1"), "launch.py", "--layers", "1",
                  "--max-steps", "6", "--save-every", "1", timeout=150)
    assert done.returncode == 0, done.stderr
    line, = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert f"step 4: {message}" in line
    assert "resume    out/state.pt: 3 of 6 steps are done" in done.stdout
    assert len(metrics(tmp_path / "out")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks, stopped", [(2, 0), (3, 2)])
def test_the_others_leave_within_a_minute(tmp_path, n_ranks, stopped):
    """With the limits that users have, and rank 0 stopped, which prints and saves."""
    command = [sys.executable, *launcher(n_ranks), str(ROOT / "train.py"), "--layers", "1",
               "--epochs", "1000", "--save-every", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (tmp_path / "out/metrics.jsonl").exists() or len(metrics(tmp_path / "out")) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    ranks = ranks_of(process)
    os.kill(ranks[stopped], signal.SIGSTOP)
    began = time.monotonic()
    others = [pid for rank, pid in ranks.items() if rank != stopped]
    while any(map(is_running, others)):
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.kill(ranks[stopped], signal.SIGKILL)      # torchrun would, 30 s later.
    _, error = process.communicate(timeout=60)
    line, = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert re.match(rf"train.py: step \d+: rank {stopped} is silent: no sign of life", line)
    assert process.returncode == 1
    n_steps = read_last_save(tmp_path / "out").progress.step
    assert len(metrics(tmp_path / "out")) - n_steps in (0, 1, 2)


def ranks_of(process) -> dict:
    """Return {rank: process id} of the ranks that a torchrun has started."""
    ranks = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank, = [item.split(b"=")[1] for item in environment if item.startswith(b"RANK=")]
        ranks[int(rank)] = int(pid)
    return ranks


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False
