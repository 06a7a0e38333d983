"""Bad luck that a run survives, or explains in one line: disks, clocks, memory, mixed-up files.

Kills, full disks and stopped ranks at random moments are `python -m benchmarks soak`.
"""
import errno
import itertools
import os
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch

import generate
import train
from benchmarks.lives import Place, Trial, leavings
from finetune.run import Run
from llama import Tokenizer, files, save_checkpoint
from lora import files as adapter_files

from .helpers import ROOT, contents, metrics, tiny

SAVE_EVERY = 2
STEPS = 5
FLAGS = ["--checkpoint", "base", "--data", "data.json", "--val-data", "data.json", "--r", "2",
         "--lr", "1e-2", "--dropout", "0.2", "--device", "cpu", "--batch-size", "2",
         "--accumulation-steps", "1", "--epochs", "1", "--save-every", str(SAVE_EVERY)]
INTACT = "; the last save is intact: --resume continues from it"


@pytest.fixture
def trial(monkeypatch):
    """A run of five steps that is about to begin; the undisturbed one is finished, in `whole`."""
    with Place() as place:
        monkeypatch.chdir(place.folder)
        trial = Trial(place, FLAGS, SAVE_EVERY, STEPS)
        trial.complete("whole")
        yield trial


def run(trial, before=lambda: None):
    """Start the run or go on with it; return its exit code and what it wrote to stderr."""
    child, = trial.start(before)
    return trial.place.end(child)


def at(owner, name, misfortune, n=1):
    """Return what lets the misfortune happen before the n-th call of a function."""
    def install():
        function = getattr(owner, name)
        calls = itertools.count(1)

        def unlucky(*args):
            if next(calls) == n:
                misfortune()
            return function(*args)

        setattr(owner, name, unlucky)

    return install


@pytest.fixture
def half(trial):
    """The run died after its save of step 4."""
    assert run(trial, at(train, "save", lambda: os._exit(5)))[0] == 5
    assert trial.check().step == 4
    return trial


def goes_on_as_if_nothing_had_been(trial):
    trial.check()
    trial.finish()


# --- disks


def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def read_only():
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    files.open = refuse
    adapter_files.open = refuse


@pytest.mark.parametrize("misfortune, reason", [
    (full, "File too large"), (read_only, "Read-only file system")])
@pytest.mark.parametrize("owner, name, file", [
    (train, "save", "adapter.pt"), (Run, "finish", "state.pt")])
def test_a_disk_that_fails_at_the_last_save(trial, misfortune, reason, owner, name, file):
    code, errors = run(trial, at(owner, name, misfortune))
    assert errors == f"train.py: disturbed/{file} cannot be written: {reason}{INTACT}\n"
    assert code == 2 and trial.check().step == 4
    goes_on_as_if_nothing_had_been(trial)


def test_the_last_save_fails_where_only_the_one_before_was_left(half):
    """Of step 4's save nothing is left, and the run is at its end before another one is due."""
    os.remove(half.out / "state.pt")
    half.flags = [*FLAGS[:-1], str(STEPS)]
    half.save_every = STEPS                          # The rows are as many as before.
    code, errors = run(half, at(Run, "finish", full))
    assert errors == f"train.py: disturbed/state.pt cannot be written: File too large{INTACT}\n"
    assert code == 2 and half.check().step == 2
    goes_on_as_if_nothing_had_been(half)


@pytest.mark.parametrize("undone", ["both", "the second"])
def test_a_power_cut_that_undoes_renamings(half, undone):
    """Of the save of step 4; the file itself is on disk, under the name that it had first."""
    os.replace(half.out / "state.pt", half.out / "state.pt.tmp")
    if undone == "both":
        os.replace(half.out / "state.previous.pt", half.out / "state.pt")
    half.save_every = STEPS                          # The rows are as many as before.
    assert half.check().step == 2
    goes_on_as_if_nothing_had_been(half)


def test_what_is_on_disk_before_what(trial):
    """Rows before the save that counts them, a file before its name, and that before a removal."""
    log = Path("calls").resolve()

    def install():
        calls = []

        def noted(function, name_of):
            def call(first, *others, **settings):
                calls.append(f"{function.__name__} {name_of(first)}")
                log.write_text("\n".join(calls))
                return function(first, *others, **settings)

            return call

        os.fsync = noted(os.fsync, lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        os.replace = noted(os.replace, lambda path: path.name)
        Path.unlink = noted(Path.unlink, lambda path: path.name)

    assert run(trial, install) == (0, "")
    calls = log.read_text().splitlines()
    start = max(i for i, call in enumerate(calls) if call == "fsync metrics.jsonl")
    assert calls[start:] == [
        "fsync metrics.jsonl", "fsync state.pt.tmp", "replace state.pt.tmp", "fsync disturbed",
        "unlink state.pt.tmp"]


def test_a_folder_whose_names_cannot_be_flushed(tmp_path, monkeypatch):
    """Some file systems cannot, and that is no error; a disk that fails is one."""
    def fails_with(number):
        def fsync(fd):
            if os.path.isdir(f"/proc/self/fd/{fd}"):
                raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    fails_with(errno.EINVAL)
    files.write_text(tmp_path / "a", "a")
    fails_with(errno.EIO)
    with pytest.raises(OSError, match="b cannot be written: Input/output error"):
        files.write_text(tmp_path / "b", "b")


@pytest.mark.parametrize("save_every", ["2", "0"])
def test_a_folder_that_is_removed(trial, save_every):
    """The run ends at its next save, and does not promise one that is gone."""
    trial.flags = [*FLAGS[:-1], save_every]
    before = set(os.listdir())
    code, errors = run(trial, at(Run, "sum_loss", lambda: shutil.rmtree("disturbed"), 2))
    assert code == 2
    file = "best.pt" if save_every == "0" else "state.pt"
    reason = "No such file or directory; no save is in disturbed any more: the run has to start "
    assert errors == f"train.py: disturbed/{file} cannot be written: {reason}again\n"
    assert set(os.listdir()) == before
    trial.complete()
    trial.compare()


# --- memory


ALLOCATOR = ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
             "memory: you tried to allocate 100 bytes. Error code 12 (Cannot allocate memory)")


OUT_OF_MEMORY = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize("error, n", [
    (MemoryError(), 1), (RuntimeError(ALLOCATOR), 3), *((OUT_OF_MEMORY, n) for n in (1, 3, 4, 5))])
def test_memory_that_ends_within_a_save(trial, error, n):
    """Of state.pt, best.pt, adapter.pt and the last state.pt; a part is written by then."""
    def install():
        save = torch.save
        calls = itertools.count(1)

        def unlucky(content, file):
            if next(calls) == n + 1:                 # The first save is before step 1.
                file.write(bytes(1000))
                raise error
            save(content, file)

        torch.save = unlucky

    code, errors = run(trial, install)
    assert code == 3 and errors.count("\n") == 1
    assert errors.startswith("train.py: ") and "--resume continues from the last save" in errors
    goes_on_as_if_nothing_had_been(trial)


# --- clocks


def test_a_clock_that_jumps(trial, monkeypatch, capsys):
    """Back by a day, on by a day, and not at all: no time is negative, and nothing else changes."""
    jumps = itertools.cycle([0, 0, -86400, 86400, 86400, -86400, -86400])
    with monkeypatch.context() as patch:
        now = time.perf_counter()
        patch.setattr(time, "perf_counter", lambda: now + next(jumps))
        patch.setattr(time, "time", time.perf_counter)
        train.main([*FLAGS, "--log-every", "1", "--out", "disturbed"])
    printed = capsys.readouterr().out
    assert len(re.findall(r"\d:\d\d left", printed)) == STEPS - 1
    assert not re.search(r"(\| +|total +)-", printed)
    assert all(row["tokens_per_second"] > 0 for row in metrics(trial.out))
    assert leavings(trial.out) == leavings(Path("whole"))
    trial.check()


# --- files of another run


def refused(trial):
    """Return the line with which the run is refused; nothing in its folder has changed."""
    before = contents(trial.out)
    code, errors = run(trial)
    assert code == 2 and errors.count("\n") == 1
    assert contents(trial.out) == before
    return errors


def test_a_state_of_another_run(half):
    """Of the same flags, with other examples."""
    rows = Path("data.json").read_text()
    Path("data.json").write_text(rows.replace("blue", "red"))
    half.complete("other")
    Path("data.json").write_text(rows)
    os.replace("other/state.pt", "disturbed/state.pt")
    assert "the examples are not those that it was begun with" in refused(half)


@pytest.mark.parametrize("change", [
    lambda rows: re.sub(rb'("loss": \d\.)\d(?=[^\n]*\n\Z)', rb"\g<1>x", rows).replace(b"x", b"5"),
    lambda rows: rows[:-300],
    lambda rows: rows[:-3] + b"[[\n"])
def test_rows_of_another_run(half, change):
    """With as many bytes, or fewer: they were lost, though a save counts them."""
    path = Path("disturbed/metrics.jsonl")
    rows = path.read_bytes()
    kept = b"".join(rows.splitlines(keepends=True)[:4])
    assert rows.startswith(kept) and change(kept) != kept
    path.write_bytes(change(kept))
    line = refused(half)
    assert "metrics.jsonl is not what it was when disturbed/state.pt was saved" in line
    path.write_bytes(rows)
    goes_on_as_if_nothing_had_been(half)


def test_an_adapter_of_another_base(half):
    """A run writes its own over it; a command that reads it refuses it."""
    tokenizer = Tokenizer(ROOT / "finetune/demo/tokenizer.model")
    save_checkpoint(tiny(tokenizer.vocab_size), tokenizer, "other")
    argv = ["--checkpoint", "other", "--adapter", "whole/adapter.pt", "--instruction", "Say"]
    code, errors = half.place.end(half.place.start(lambda: generate.main(argv)))
    assert code == 2 and errors.count("\n") == 1 and "whole/adapter.pt" in errors, errors
    Path("disturbed/adapter.pt").write_bytes(b"of another run")
    goes_on_as_if_nothing_had_been(half)
