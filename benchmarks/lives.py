"""Training runs in forked processes, which die, hang or lack disk, and what they leave.

A fork of a process that has torch already begins in milliseconds.  It is safe because this process
itself computes nothing in several threads: all runs, also the undisturbed ones, are forks.
"""
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import train
from finetune import printed
from finetune.folder import ARGS, METRICS, STATE
from finetune.resume import Progress, read_last_save
from llama import ModelArgs, Tokenizer, Transformer, files, save_checkpoint
from llama.files import write_json
from lora import files as adapter_files

from .tables import ROOT, be_killed_first

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):                        # Windows lacks it, and cannot fork either.
    STOP_SIGNALS.append(signal.SIGHUP)
LONGEST_LIFE = 120                                   # seconds; after that a process hangs
POLL_SECONDS = 0.002
TRACEBACK = 99                                       # exit code
PIPE_BYTES = 2 ** 16
TIMED = ("tokens_per_second", "peak_memory_mb")      # columns of metrics.jsonl that no run repeats
WORDS = "blue cold one two three green happy sad yes no".split()


class Lost(Exception):
    """Something is gone, or not as it should be, after a run was disturbed."""


@dataclass(frozen=True)
class Child:
    """A forked process; errors: the pipe from which its stderr is read."""
    pid: int
    errors: int


class Place:
    """A temporary folder with a base and examples, and the processes that run in it.

    It is a context manager: in the end it kills what still runs and removes the folder.
    """

    def __enter__(self):
        self.children = set()
        self.folder = Path(tempfile.mkdtemp(prefix="soak-"))
        write_base(self.folder)
        return self

    def __exit__(self, *_):
        for pid in self.children:
            with suppress(ProcessLookupError, ChildProcessError):    # It has just ended.
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, act: Callable) -> Child:
        """Fork a process that calls act() in the folder, and ends as a command would."""
        read_fd, write_fd = os.pipe()
        # A Ctrl-C right after the fork would leave a process that nobody knows.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        pid = os.fork()
        if pid == 0:
            live(act, self.folder, write_fd)
        self.children.add(pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(write_fd)
        return Child(pid, read_fd)

    def end(self, child: Child, within: float = LONGEST_LIFE) -> tuple:
        """Return a child's exit code, or minus its signal, and what it wrote to stderr.

        Raises Lost if it does not end in so many seconds; it is killed then.
        """
        until = time.monotonic() + within
        is_late = False
        pid = 0
        while not pid:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid and not is_late and time.monotonic() > until:
                is_late = True
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0 if pid else POLL_SECONDS)
        self.children.discard(pid)
        text = os.read(child.errors, PIPE_BYTES).decode(errors="replace")
        os.close(child.errors)
        if is_late:
            raise Lost(f"a process did not end within {within:.0f} s: {text[-300:]}")
        return os.waitstatus_to_exitcode(status), text

    def kill(self, child: Child) -> tuple:
        os.kill(child.pid, signal.SIGKILL)
        return self.end(child)

    def host_store(self) -> int:
        """Start a process that holds the ranks' store, as torchrun does; return its port."""
        read_fd, write_fd = os.pipe()

        def act():
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(write_fd, str(store.port).encode())
            signal.pause()

        self.start(act)
        os.close(write_fd)
        port = os.read(read_fd, 10)
        os.close(read_fd)
        return int(port)


def live(act: Callable, folder: Path, errors: int):
    """Be a forked process: call act() and exit."""
    code = TRACEBACK
    try:
        os.setpgid(0, 0)                             # Ctrl-C is for the parent alone.
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        be_killed_first()
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(errors, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")
        os.chdir(folder)
        torch.cuda.is_available = lambda: False      # A fork of a process cannot use its GPU.
        printed.picture_of = lambda out: "none"      # It would take most of a tiny run's time.
        act()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def write_base(folder: Path):
    """Write a small base and examples for it."""
    tokenizer = Tokenizer(ROOT / "finetune/demo/tokenizer.model")
    torch.manual_seed(0)
    model = Transformer(ModelArgs(vocab_size=tokenizer.vocab_size, dim=32, n_layers=1, n_heads=4,
                                  n_kv_heads=2, multiple_of=16))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    save_checkpoint(model, tokenizer, folder / "base")
    rows = [{"instruction": f"Say {word} {'again ' * (i % 3)}please.", "output": f"{word} {word}"}
            for i, word in enumerate(WORDS)]
    write_json(folder / "data.json", rows)


@dataclass
class Trial:
    """A run that is disturbed again and again, and the same run undisturbed.

    flags: without --out.  n_ranks: processes of a run.  port: of the ranks' store, if there are
    several.
    """
    place: Place
    flags: list
    save_every: int
    n_steps: int
    n_ranks: int = 1
    port: int = 0
    life: int = 0

    @property
    def out(self) -> Path:
        return self.place.folder / "disturbed"

    def start(self, before: Callable = lambda: None, out: str = "disturbed") -> list:
        """Start the run, or go on with it; return its processes."""
        argv = [*self.flags, "--out", out, "--resume"]
        self.life += 1

        def as_rank(rank):
            before()
            if self.n_ranks > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.n_ranks),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port), TORCHELASTIC_RUN_ID="soak",
                    TORCHELASTIC_USE_AGENT_STORE="True",
                    TORCHELASTIC_RESTART_COUNT=str(self.life))
            train.main(argv)

        return [self.place.start(lambda rank=rank: as_rank(rank)) for rank in range(self.n_ranks)]

    def complete(self, out: str = "disturbed"):
        """Let the run come to its end.  Raises Lost if it cannot."""
        for child in self.start(out=out):
            code, errors = self.place.end(child)
            if code:
                raise Lost(f"the run to its end: exit code {code}: {errors[-600:]}")

    def live_a_little(self, children: list, draw):
        """Wait for up to five more steps and a bit; some lives end before their first."""
        more = draw.randrange(6)
        if more == 0:
            time.sleep(draw.uniform(0, 0.3))
            return
        goal = min(n_rows(self.out) + more, self.n_steps)
        until = time.monotonic() + LONGEST_LIFE
        while n_rows(self.out) < goal and all(map(is_alive, children)):
            if time.monotonic() > until:
                raise Lost(f"no step ended within {LONGEST_LIFE} s")
            time.sleep(POLL_SECONDS)
        time.sleep(draw.uniform(0, 0.03))

    def longest_step(self) -> float:
        """Return the seconds of the longest step so far."""
        rows = [json.loads(line) for line in (self.out / METRICS).read_bytes().splitlines()]
        return max(row["tokens"] / row["tokens_per_second"] for row in rows)

    def check(self) -> Progress:
        """Return how far the last save has come.

        Raises Lost unless the folder holds an intact save, and whole rows that belong to it.
        """
        rows = (self.out / METRICS).read_bytes() if (self.out / METRICS).exists() else b""
        if rows[-1:] not in (b"", b"\n"):
            raise Lost(f"{METRICS} ends within a row")
        try:
            save = read_last_save(self.out)
        except ValueError as error:
            raise Lost(str(error)) from None
        if save is None and rows:
            raise Lost(f"{METRICS} has rows, and there is no save")
        if save is None:
            return Progress()
        if save.warning:
            raise Lost(save.warning)
        step = save.progress.step
        if not step <= rows.count(b"\n") <= step + self.save_every:
            raise Lost(f"{METRICS} has {rows.count(10)} rows, and the last save is of step {step}")
        return save.progress

    def finish(self):
        """Let the run come to its end, and compare it with the undisturbed one.  Raises Lost."""
        self.complete()
        self.check()
        self.compare()

    def compare(self):
        """Raise Lost unless the disturbed run has left what the undisturbed one has."""
        whole = leavings(self.place.folder / "whole")
        found = leavings(self.out)
        names = sorted(whole.keys() | found.keys())
        different = [name for name in names if found.get(name) != whole.get(name)]
        if different:
            raise Lost(f"{', '.join(different)}: not what the undisturbed run left")


def n_rows(out: Path) -> int:
    path = out / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_alive(child: Child) -> bool:
    """Return whether a process has not ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def leavings(out: Path) -> dict:
    """Return {name: content} of a run's files, as far as two runs must agree on it."""
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in (ARGS, STATE):                       # They hold paths and times.
        content[name] = name in content
    rows = [json.loads(line) for line in content[METRICS].splitlines()]
    content[METRICS] = [without_times(row) for row in rows]
    return content


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMED}


class DyingSave:
    """Kills its process at the n-th call of a kind within write_whole.

    call: open, write, fsync, replace or unlink.  moment: before, after or within; within a call
    of write half of the bytes are written, and for any other call it is the same as before.
    """

    def __init__(self, call: str, n: int, moment: str):
        self.call = call
        self.calls_left = n
        self.moment = moment

    def install(self):
        for module in (files, adapter_files):        # Their name goes before Python's own.
            module.open = self.opened
        os.fsync = self.around("fsync", os.fsync)
        os.replace = self.around("replace", os.replace)
        Path.unlink = self.around("unlink", Path.unlink)

    def around(self, name: str, function: Callable) -> Callable:
        def dying(*args, **settings):
            dies = self.is_the_one(name)
            if dies and self.moment != "after":
                die()
            try:
                return function(*args, **settings)
            finally:
                if dies:
                    die()

        return dying

    def is_the_one(self, name: str) -> bool:
        self.calls_left -= name == self.call
        return name == self.call and self.calls_left == 0

    def opened(self, path, mode="r", **settings):
        if mode != "wb":
            return open(path, mode, **settings)
        file = self.around("open", DyingFile)(path, mode)
        file.dying_save = self
        return io.BufferedWriter(file)


class DyingFile(io.FileIO):
    """A file, each of whose writes may be the last act of its process."""

    def write(self, data) -> int:
        dies = self.dying_save.is_the_one("write")
        moment = self.dying_save.moment
        if dies and moment == "before":
            die()
        if dies and moment == "within":
            data = memoryview(data)[:len(data) // 2]
        n_bytes = super().write(data)
        if dies:
            die()
        return n_bytes


def die():
    os.kill(os.getpid(), signal.SIGKILL)
