"""A run that is killed, told to stop, out of memory or of luck goes on as if nothing had been.

pytest tests/test_resume.py             kills aimed inside a save, in forked processes
pytest -m slow tests/test_resume.py     kills at random moments, and under torchrun
"""
import ctypes
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune.job
import train
from finetune import signals
from finetune.options import parse_options
from finetune.ranks import Ranks
from finetune.resume import read_last_save, restarted_by_torchrun
from finetune.run import Run

from . import helpers
from .helpers import (EXAMPLES, ONE_THREAD, ROOT, Attack, column, contents, given_once, launcher,
                      lay_out, metrics, saved, stored, untimed)

COMMON = ["--checkpoint", "base", "--data", "data.json", "--val-data", "held_out.json",
          "--layers", "1", "--r", "4", "--lr", "1e-2", "--dropout", "0.2", "--save-every", "1"]
# Two epochs of three steps of two examples.
FLAGS = [*COMMON, "--batch-size", "2", "--accumulation-steps", "1", "--epochs", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a base, examples, and `whole`: the run that was never interrupted."""
    place = tmp_path_factory.mktemp("state")
    lay_out(place, tokenizer, n_examples=6, n_held_out=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main([*FLAGS, "--out", "whole"])
    return place


@pytest.fixture
def flags(place, monkeypatch):
    monkeypatch.chdir(place)
    return list(FLAGS)


def left(folder):
    """Return what a run leaves, time and memory aside; each line of metrics.jsonl is whole."""
    folder = Path(folder)
    files = contents(folder)
    rows = untimed(metrics(folder))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert files["metrics.jsonl"].endswith(b"}\n")
    names = {name for name in files if name.endswith((".pt", ".pth"))} - {"state.pt"}
    return rows, {name: files[name] for name in names}


def main(argv):
    """Run train.main, each flag with the last of its values."""
    train.main(given_once(argv))


def start(argv, before=lambda: None):
    """Fork a process that runs train.main; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        signal.signal(signal.SIGTERM, signal.SIG_DFL)            # whatever an earlier test left
        try:
            before()
            main(argv)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid, within=120):
    """Return a process's exit code, or minus the signal that killed it: ours, if it takes long."""
    kill = threading.Timer(within, os.kill, (pid, signal.SIGKILL))
    kill.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        kill.cancel()


def child(argv, before=lambda: None):
    return ended(start(argv, before))


def refused(argv, capsys, code=2):
    """Return the one line with which train.main ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == code
    line, = capsys.readouterr().err.splitlines()
    return line


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def changed_loss(change):
    """Return an answer_loss whose loss is change(loss, number of the training call, model)."""
    answer_loss = finetune.job.answer_loss
    calls = []

    def loss_of(model, batch):
        loss, n = answer_loss(model, batch)
        if torch.is_grad_enabled() and model.training:
            calls.append(1)
            loss = change(loss, len(calls), model)
        return loss, n

    return loss_of


def stopped_in(argv, step, then=stop):
    """Return the exit code of train.main, where `then` is called within that step."""
    def change(loss, n_calls, model):
        if n_calls == step:
            then()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.job, "answer_loss", changed_loss(change))
        try:
            main(argv)
        except SystemExit as error:
            return error.code
    return 0


# --- killed within a save

OTHER_OPTIMIZER = "it was saved by another optimizer, or one with other settings"


def is_of_state(fd):
    return os.readlink(f"/proc/self/fd/{fd}").endswith("state.pt.tmp")


def write_a_part(content, file):
    file.write(bytes(1000))
    file.flush()


def replaces_state(source, target):
    return source.name == "state.pt.tmp"


# Within a save: (module, function, whether a call is of state.pt, what of it is still done).
MOMENTS = {
    "writing": (torch, "save", lambda _, file: is_of_state(file.fileno()), write_a_part),
    "written": (os, "fsync", is_of_state, lambda fd: None),
    "flushed": (os, "fsync", is_of_state, os.fsync),
    "between the renames": (os, "replace", replaces_state, lambda *_: None),
    "renamed": (os, "replace", replaces_state, os.replace),
}


def dying_in_a_save(moment, n):
    """Return what kills a process at that moment of its n-th save; the first is before step 1."""
    def before():
        module, name, matches, last_act = MOMENTS[moment]
        function = getattr(module, name)
        saves = []

        def dying(*args):
            if matches(*args):
                saves.append(1)
                if len(saves) == n:
                    last_act(*args)
                    die()
            return function(*args)

        setattr(module, name, dying)

    return before


def test_killed_within_a_save_and_resumed_each_time(flags, capfd):
    """Killed in its third save, then in step 2's again and again."""
    argv = [*flags, "--out", "killed"]
    n = 3
    for moment in MOMENTS:
        assert child(argv, dying_in_a_save(moment, n)) == -signal.SIGKILL, moment
        assert os.path.exists("killed/state.pt") != (moment == "between the renames"), moment
        argv = [*flags, "--out", "killed", "--resume"]
        n = 1
    assert child(argv) == 0
    resumed = re.findall("resume    killed/(.*): (.) of 6 steps are done", capfd.readouterr().out)
    assert resumed == [("state.pt", "1")] * 3 + [("state.previous.pt", "1"), ("state.pt", "2")]
    assert left("killed") == left("whole")
    assert contents("killed").keys() == {"adapter.pt", "args.json", "best.pt", "metrics.jsonl",
                                         "state.pt"}


# --- told to stop


SLOW = pytest.mark.slow


@pytest.mark.parametrize("settings", [
    "--method dylora --method-options rank_by=loss",
    "--method full",
    pytest.param("--method delta-lora --method-options start=1 --dropout 0", marks=SLOW),
    pytest.param("--method dora --checkpointing", marks=SLOW),
    pytest.param("--method vera", marks=SLOW),
    pytest.param("--method lora-fa --quantize nf4", marks=SLOW),
    pytest.param("--method rslora --targets all --tokens-per-batch 200 --epochs 4", marks=SLOW),
])
def test_what_a_method_moves_goes_on(flags, tmp_path, settings):
    flags += [*settings.split(), "--save-every", "0", "--out"]
    main([*flags, str(tmp_path / "a")])
    assert stopped_in([*flags, str(tmp_path / "b")], 4) == 130
    assert n_rows(tmp_path / "b") == 4
    torch.manual_seed(1)                             # whatever a new process has
    random.seed(1)
    main([*flags, str(tmp_path / "b"), "--resume"])
    rows, files = left(tmp_path / "a")
    assert left(tmp_path / "b") == (rows, files)
    assert "rank_by" not in settings or len({row["rank"] for row in rows[3:]}) > 1


# Adagrad has its state before a step, and an older torch has no Muon.
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "Adagrad": {}, "Muon": {}}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if hasattr(torch.optim, name)])
def test_any_optimizer_is_killed_and_goes_on(flags, monkeypatch, capsys, name):
    """By a change of build_optimizer alone.  What another optimizer saved is refused."""
    killed = f"{name}-killed"
    adamw = train.build_optimizer

    def other(groups, options):
        return getattr(torch.optim, name)(groups, lr=options.lr, **OPTIMIZERS[name])

    monkeypatch.setattr(train, "build_optimizer", other)
    main([*flags, "--out", name])
    assert child([*flags, "--out", killed], dying_in_a_save("renamed", 4)) == -signal.SIGKILL
    assert n_rows(killed) == 3
    resuming = [*flags, "--out", killed, "--resume"]
    monkeypatch.setattr(train, "build_optimizer", adamw)
    assert OTHER_OPTIMIZER in refused(resuming, capsys)
    monkeypatch.setattr(train, "build_optimizer", other)
    main(resuming)
    assert left(killed) == left(name) != left("whole")


@pytest.fixture
def half(flags, tmp_path):
    """half() copies the folder of a run that was told to stop in its third step."""
    if not os.path.exists("half"):
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)

        assert stopped_in([*flags, "--out", "half"], 3, interrupt) == 130
    names = iter("abc")
    return lambda: os.path.relpath(shutil.copytree("half", tmp_path / next(names)))


def test_what_may_change_while_a_run_goes_on(flags, half, capsys):
    """Refused is what would make it another run: other examples, base or steps."""
    folder = half()
    argv = [*flags, "--out", folder, "--resume"]
    Path("other.json").write_text(json.dumps(EXAMPLES[5::-1]))
    shutil.copytree("base", "other", dirs_exist_ok=True)
    weights = stored(Path("base"))
    weights["norm.weight"] *= 2
    torch.save(weights, "other/consolidated.00.pth")
    before = contents(folder)
    for changes, message in (
            (["--lr", "0.02", "--epochs", "3", "--log-every", "5"],
             f"{folder} was begun with --epochs 2, now 3; --lr 0.01, now 0.02: a resumed run"),
            (["--batch-size", "1"], "its steps would not hold the same examples"),
            (["--tokens-per-batch", "60"], "begun with no --tokens-per-batch, now 60: a resumed"),
            (["--data", "other.json"], "the examples are not those"),
            (["--checkpoint", "other"], "it was begun over another base")):
        assert message in refused([*argv, *changes], capsys)
    assert contents(folder) | {"args.json": b""} == before | {"args.json": b""}
    shutil.copy("data.json", "moved.json")
    main([*argv, "--data", "moved.json", "--log-every", "5", "--batch-size", "1",
          "--accumulation-steps", "2", "--checkpointing"])
    printed = capsys.readouterr().out
    assert f"resume    {folder}/state.pt: 3 of 6 steps are done\n" in printed
    assert "before    " not in printed
    assert "--batch-size 2, now 1" in re.findall("changed   (.*)", printed)
    assert column(Path(folder), "tokens") == column(Path("whole"), "tokens")


def test_torchrun_goes_on_with_what_its_own_launch_saved(half, monkeypatch):
    """Or begins anew where a rank died before the first save."""
    folder = Path(half())
    save = read_last_save(folder)
    rows, none = folder / "metrics.jsonl", folder / "none.jsonl"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert not restarted_by_torchrun(None, none)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted_by_torchrun(None, none) and not restarted_by_torchrun(None, rows)
    assert not restarted_by_torchrun(save, rows)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", save.launch)
    assert restarted_by_torchrun(save, rows)


def test_a_finished_run_changes_nothing(flags, capsys):
    before = contents("whole")
    main([*flags, "--out", "whole", "--resume"])
    assert "resume    whole is finished, after step 6: nothing" in capsys.readouterr().out
    assert before == contents("whole")


# --- a folder that is not as it was


def test_a_torn_save_is_passed_over(flags, half, capsys):
    """The one before it is used; where that is no better, a line says so."""
    folder = Path(half())
    path = folder / "state.pt"
    data = path.read_bytes()
    torn = [b"", data[:-1], data[:len(data) // 2], Path("whole/adapter.pt").read_bytes(),
            saved(Attack()), data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]]
    for content in torn:
        path.write_bytes(content)
        save = read_last_save(folder)
        assert save.path.name == "state.previous.pt" and save.progress.step == 2
        assert "is not a whole save of a run" in save.warning
    argv = [*flags, "--out", str(folder), "--resume"]
    main(argv)
    printed = capsys.readouterr().out
    assert "is not a whole save of a run" in printed and "the one before it is used" in printed
    assert left(folder) == left("whole") and "the pickle ran" not in printed
    for name in ("state.pt", "state.previous.pt"):
        (folder / name).write_bytes(data[:1000])
    assert "no save can be read, --overwrite starts again" in refused(argv, capsys)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name, change, message", [
    ("metrics.jsonl", os.remove, "metrics.jsonl is not what it was when"),
    ("metrics.jsonl", pipe, "metrics.jsonl is a device, where a file of the run belongs"),
    ("state.pt", device, "state.pt is a device, where a file of the run belongs"),
])
def test_what_does_not_go_with_a_save(flags, half, capfd, name, change, message):
    """One line and nothing changed; a pipe is not waited for, and /dev/zero has an end."""
    folder = Path(half())
    change(folder / name)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert ended(start([*flags, "--out", str(folder), "--resume"]), within=10) == 2
    line, = capfd.readouterr().err.splitlines()
    assert f"{folder}/{message}" in line
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


LORA_B = "layers.0.attention.wq.lora_B"


@pytest.mark.parametrize("keys, value, message", [
    ("counters step", 7, "claims step 7 of 6"),
    ("counters updates", 4, "claims step 3 of 6, and that 4 moved the weights"),
    ("args", {1: 2}, "was begun with --1 2, now not given"),
    ("args data", "\x1b[2J", None),
    ("args targets", [["wq"]], "was begun with --targets ['wq'], now"),
    ("about", {}, "its number of ranks is None"),
    ("random", [], "does not fit this run"),
    ("random", [torch.ones(2, 2)], "random numbers do not match this run"),
    ("random 0 python", [torch.ones(2)], "random numbers, python does not match this run"),
    ("random 0 numpy", ["MT19937"], "random numbers, numpy does not match this run"),
    ("parts optimizer param_groups 0 amsgrad", True, OTHER_OPTIMIZER),
    ("parts optimizer state 0 exp_avg", torch.ones(3), "optimizer, exp_avg does not match"),
    (f"parts model tensors {LORA_B}", torch.full((32, 4), math.nan), f"model, tensors, {LORA_B}"),
    ("parts scaler", {"scale": 1.0}, "scaler does not match this run"),
])
def test_a_save_that_lies(flags, half, capfd, keys, value, message):
    """Nothing of it is used, and what is quoted of it can be seen."""
    folder = half()
    content = torch.load(f"{folder}/state.pt", weights_only=True)
    *outer, last = (int(key) if key.isdigit() else key for key in keys.split())
    inner = functools.reduce(lambda inner, key: inner[key], outer, content)
    inner[last] = value
    torch.save(content, f"{folder}/state.pt")
    os.remove(f"{folder}/state.previous.pt")
    code = child([*flags, "--out", folder, "--resume"])
    printed, error = capfd.readouterr()
    assert "\x1b" not in printed + error
    if message is None:
        assert code == 0 and left(folder) == left("whole")
    else:
        line, = error.splitlines()
        assert code == 2 and message in line and not os.path.exists(f"{folder}/adapter.pt")


def test_two_runs_in_one_folder(flags, half):
    """The second is refused at once, with nothing changed, while the first is at work."""
    folder = half()
    argv = [*flags, "--out", folder, "--resume"]
    seen = []

    def meanwhile():
        before = contents(folder)
        seen.append((child(argv), contents(folder) == before))

    assert stopped_in(argv, 2, meanwhile) == 0
    assert seen == [(2, True)] and left(folder) == left("whole")


def test_a_folder_that_holds_a_run(flags, half, capsys):
    folder = half()
    argv = [*flags, "--out", folder]
    assert refused(argv, capsys).endswith(
        f"{folder} holds a run already: --resume goes on with it, --overwrite replaces it, "
        "and --out names another folder")
    assert "give one" in refused([*argv, "--resume", "--overwrite"], capsys)
    # Killed before its first row.
    assert child([*argv, "--overwrite"], dying_in_a_save("writing", 2)) == -signal.SIGKILL
    assert not os.path.exists(f"{folder}/state.previous.pt")
    main([*argv, "--resume"])
    assert ": 0 of 6 steps are done" in capsys.readouterr().out
    assert left(folder) == left("whole")
    # Killed before its first save, and with the last one: it can go on, and leaves nothing more.
    shutil.rmtree(folder)
    os.mkdir(folder)
    Path(folder, "metrics.jsonl").touch()
    assert "--resume goes on with it" in refused(argv, capsys)
    assert child([*argv, "--resume"], dying_in_a_save("renamed", 7)) == -signal.SIGKILL
    assert not os.path.exists(f"{folder}/state.previous.pt")
    main([*argv, "--resume"])
    assert "is finished, after step 6" in capsys.readouterr().out
    assert left(folder) == left("whole")
    for name in ("state.pt", "metrics.jsonl"):
        os.remove(f"{folder}/{name}")
    message = "holds a run but no state.pt to go on from, --overwrite replaces it"
    assert message in refused([*argv, "--resume"], capsys)


# --- out of patience, of luck, of memory, of disk


def test_a_second_ctrl_c_ends_at_once(flags, half, monkeypatch):
    """Within a second it is a shell that passed one on twice."""
    folder = half()
    with open(f"{folder}/metrics.jsonl", "a") as file:           # What follows the last save goes.
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])

    def impatient():
        for seconds in (5.0, 5.5, 7.0):
            now[0] = seconds
            os.kill(os.getpid(), signal.SIGINT)
            assert seconds < 7

    with pytest.raises(KeyboardInterrupt):
        stopped_in([*flags, "--out", folder, "--resume"], 2, impatient)
    main([*flags, "--out", folder, "--resume"])
    assert left(folder) == left("whole")


def test_a_step_that_is_not_finite_is_skipped_and_named(flags, capsys, monkeypatch):
    """NaN once in each epoch: nothing moves, the schedule waits, the log names the examples."""
    seen = []

    def change(loss, n_calls, model):
        seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return loss * math.nan if n_calls in (2, 4) else loss

    monkeypatch.setattr(finetune.job, "answer_loss", changed_loss(change))
    monkeypatch.setattr(finetune.job, "check_gradients", lambda *_: None)
    main([*flags, "--out", "nan"])
    rows, _ = left("nan")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2, None, None]
    assert rows[1]["loss"] is None
    lr = column(Path("whole"), "lr")
    assert [row["lr"] for row in rows] == pytest.approx([lr[i] for i in (0, 1, 1, 2, 2, 3)])
    assert all(torch.equal(one, other) for one, other in zip(seen[1], seen[2], strict=True))
    assert all(p.isfinite().all() for p in seen[-1])
    second_step = np.random.default_rng((0, 0)).permutation(6)[2:4] + 1
    assert rows[1]["examples"] == sorted(second_step.tolist())
    numbers = ", ".join(map(str, rows[1]["examples"]))
    message = f" | not finite, step skipped, 1 in a row, 1 in all: examples {numbers}\n"
    assert message in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_no_overflow(flags, capsys, monkeypatch):
    """In fp16 either one makes gradients that are not finite."""
    monkeypatch.setattr(finetune.job, "answer_loss", changed_loss(
        lambda loss, n_calls, _: loss * math.nan if n_calls == 2 else loss))
    monkeypatch.setattr(finetune.job, "check_gradients", lambda *_: None)
    main([*flags, "--out", "nan16", "--precision", "fp16"])
    line, = re.findall("step 2/6.*", capsys.readouterr().out)
    assert "loss nan" in line and " | not finite, step skipped, 1 in a row" in line


def test_too_many_bad_steps_end_the_run(flags, capsys, monkeypatch):
    monkeypatch.setattr(finetune.job, "answer_loss", changed_loss(lambda loss, *_: loss * math.inf))
    monkeypatch.setattr(finetune.job, "check_gradients", lambda *_: None)
    line = refused([*flags, "--out", "bad", "--max-bad-steps", "2"], capsys, 3)
    assert line.startswith("train.py: no finite loss and gradient in 2 steps in a row, the last at "
                           "step 2: try a lower --lr")
    assert n_rows("bad") == 2 and not os.path.exists("bad/adapter.pt")


def test_out_of_memory_ends_in_one_line(flags, half, capsys, monkeypatch):
    """Which names the knobs in order of effect; the last save stands."""
    argv = [*flags, "--out", half(), "--resume"]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    with monkeypatch.context() as patch:
        patch.setattr(finetune.job, "check_gradients", lambda *_: None)
        patch.setattr(finetune.job, "answer_loss", full)
        line = refused(argv, capsys, 3)
    assert line.startswith("train.py: CUDA out of memory. Tried to allocate 20.00 GiB; try --")
    sizes = [float(size) for size in re.findall(r"by estimate ([\d.]+) MiB less", line)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    assert "--batch-size 1 --accumulation-steps 2 (by" in line and "--precision bf16 (by" in line
    assert "--resume continues" in line
    main(argv)
    assert left(argv[-2]) == left("whole")


def test_less_memory_for_the_same_tokens_a_step(flags, capsys, monkeypatch):
    """Half of --tokens-per-batch comes with twice the micro-batches."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(finetune.job, "answer_loss", full)
    line = refused([*flags, "--out", "tokens", "--tokens-per-batch", "200"], capsys, 3)
    assert "--tokens-per-batch 100 --accumulation-steps 2 (by estimate" in line


def test_best_and_last(flags, monkeypatch, capsys):
    """best.pt has the lowest held-out loss, adapter.pt is the last; --early-stop ends a run."""
    flags += ["--out", "early", "--epochs", "9", "--early-stop", "2"]
    losses = iter([5.0, 4.0, 3.0, 3.5, math.nan, 2.0])           # before step 1, then each epoch's
    names = []
    save_adapter = train.save_adapter

    def noted(model, path, write):
        names.append(path.name)
        save_adapter(model, path, write)

    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    monkeypatch.setattr(train, "save_adapter", noted)
    main(flags)
    rows, files = left("early")
    assert column(Path("early"), "val_loss") == [4.0, 3.0, 3.5, None] and len(rows) == 12
    assert names == ["best.pt", "best.pt", "adapter.pt"]
    assert files["best.pt"] != files["adapter.pt"]
    printed = capsys.readouterr().out
    assert "stopped   after step 12 of 27: no better held-out loss in 2 measurements\n" in printed
    assert "best      early/best.pt: held-out loss 3.0000, after step 6" in printed
    main([*flags, "--resume"])
    assert "is finished" in capsys.readouterr().out


def test_a_save_knows_of_best(flags, monkeypatch, capsys):
    """Also where the run is killed before the next save is due."""
    losses = iter([5.0, 4.0, 3.0])                               # before step 1, then each epoch's
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    flags += ["--out", "known", "--epochs", "9", "--save-every", "1000"]
    with pytest.raises(StopIteration):
        main(flags)
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": 3.5})
    main([*flags, "--resume"])
    printed = capsys.readouterr().out
    assert "resume    known/state.pt: 6 of 27 steps are done\n" in printed
    assert "best      known/best.pt: held-out loss 3.0000, after step 6" in printed


def test_a_full_disk(flags, capfd):
    """No room for a save, for best.pt, for half of a row: with room again nothing is lost."""
    sum_loss = Run.sum_loss

    def metrics_and_a_bit():
        return os.path.getsize("full/metrics.jsonl") + 100

    for step, limit, n_left, message in (
            (2, lambda: 3000, 2, "full/state.pt cannot be written: File too large"),
            (3, lambda: 3000, 2, "full/best.pt cannot be written: File too large"),
            (4, metrics_and_a_bit, 3, "full/metrics.jsonl cannot be written: No space left")):
        def limited(run, loss, step=step, limit=limit):
            if run.progress.step == step - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit(), limit()))
            return sum_loss(run, loss)

        argv = [*flags, "--out", "full", *(["--resume"] if step > 2 else [])]
        assert child(argv, functools.partial(setattr, Run, "sum_loss", limited)) == 2
        line, = capfd.readouterr().err.splitlines()
        assert line.startswith(f"train.py: {message}")
        assert line.endswith("; the last save is intact: --resume continues from it")
        assert len(left("full")[0]) == n_left
    assert child([*flags, "--out", "full", "--resume"]) == 0
    assert left("full") == left("whole")


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_is_gone_leaves_all_the_same(flags):
    """A main thread that never comes back from a call into a library runs no handler."""
    mutex = ctypes.create_string_buffer(64)          # taken twice: NCCL's wait, in short
    pid = os.fork()
    if pid == 0:
        signals.GRACE_SECONDS = 0.1
        options = parse_options([*flags, "--out", "stuck"])
        run = Run(options, Ranks(0, 2), Path("stuck"), None, False)
        run.ranks.watchdog.begin_step(1, compiles=False)
        with signals.stop_after_step_on_signals(run):
            while True:
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, within=5) == 1


# --- at random moments, and with ranks


def n_rows(folder):
    path = Path(folder, "metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(rows, folder, is_alive):
    """Wait until the run has logged so many steps."""
    until = time.monotonic() + 60
    while n_rows(folder) < rows:
        assert is_alive() and time.monotonic() < until
        time.sleep(0.001)


def is_alive(pid):
    return os.waitpid(pid, os.WNOHANG) == (0, 0)


def live_a_little(pids, folder, chance):
    """Wait for up to five more steps and a bit; some lives end before their first."""
    more = chance.randrange(6)
    if more:
        wait_for(n_rows(folder) + more, folder, lambda: all(map(is_alive, pids)))
    time.sleep(chance.uniform(0, 0.05))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_25_signals_at_random_moments(flags, number):
    flags += ["--epochs", "200"]                     # more than 25 lives can reach on any machine
    whole, folder = f"long{number}", f"often{number}"
    main([*flags, "--out", whole])
    chance = random.Random(number)
    argv = [*flags, "--out", folder]
    for _ in range(25):
        pid = start(argv)
        live_a_little([pid], folder, chance)
        os.kill(pid, number)
        assert ended(pid) in (-number, 130)
        argv = [*flags, "--out", folder, "--resume"]
    assert 25 < n_rows(folder) < 600
    assert child(argv) == 0
    assert left(folder) == left(whole)


def start_ranks(argv, life, before=lambda rank: None, n_ranks=2):
    """Fork ranks as torchrun would start them; return their process ids."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def as_rank(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="here",
                          TORCHELASTIC_RESTART_COUNT=str(life))
        before(rank)

    return [start(argv, functools.partial(as_rank, rank)) for rank in range(n_ranks)]


@pytest.mark.slow
def test_25_kills_of_one_of_two_ranks_at_random_moments(flags):
    """The other is told so by SIGTERM, as torchrun does, and must leave; both start again."""
    flags += ["--epochs", "300"]
    assert [ended(pid) for pid in start_ranks([*flags, "--out", "long2"], 0)] == [0, 0]
    chance = random.Random(2)
    for life in range(25):
        pids = start_ranks([*flags, "--out", "often2"], life)
        live_a_little(pids, "often2", chance)
        killed = pids.pop(chance.randrange(2))
        os.kill(killed, signal.SIGKILL)
        assert ended(killed) == -signal.SIGKILL
        began = time.monotonic()
        os.kill(pids[0], signal.SIGTERM)
        assert ended(pids[0]) != 0 and time.monotonic() - began < 30
    assert 25 < n_rows("often2") < 600
    assert [ended(pid) for pid in start_ranks([*flags, "--out", "often2"], 25)] == [0, 0]
    assert left("often2") == left("long2")


def torchrun(*command, flags=(), **settings):
    """Start `torchrun --nproc_per_node=2 FLAGS -- COMMAND`; return the process."""
    return subprocess.Popen([sys.executable, *launcher(2, *flags), *map(str, command)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD,
                            **settings)


def children(process):
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


@pytest.fixture(scope="module")
def two_ranks(place):
    """Flags of a run of two ranks in the folder `torchrun`."""
    flags = [*COMMON, "--batch-size", "1", "--accumulation-steps", "2", "--epochs", "30"]
    done = helpers.torchrun(place, ROOT / "train.py", *flags, "--out", "torchrun")
    assert done.returncode == 0, done.stderr
    return flags


@pytest.mark.slow
def test_torchrun_starts_again_by_itself(two_ranks, place, monkeypatch):
    """Rank 1 is killed between two micro-batches, rank 0 within a save, rank 1 during one."""
    monkeypatch.chdir(place)
    Path("dying.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import finetune.job, torch, train
from tests.test_resume import changed_loss, die, dying_in_a_save
life = os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"]
def change(loss, n_calls, model):
    return die() if life == "10" and n_calls == 20 else loss
gathers = []
gather = torch.distributed.all_gather_object
def dying_gather(*args):
    gather(*args)
    gathers.append(1)
    if life == "12" and len(gathers) == 11:
        die()
finetune.job.answer_loss = changed_loss(change)
torch.distributed.all_gather_object = dying_gather
if life == "01":
    dying_in_a_save("between the renames", 5)()
train.main(sys.argv[1:])
""")
    process = torchrun("dying.py", *two_ranks, "--out", "again", flags=["--max-restarts=3"])
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    lives = re.findall(r"resume    again/(\S+): (\d+) of 60", printed)
    assert [name for name, _ in lives] == ["state.pt", "state.previous.pt", "state.pt"]
    assert int(lives[1][1]) < int(lives[2][1])
    assert left("again") == left("torchrun")


@pytest.mark.slow
def test_torchrun_told_to_stop(two_ranks, place, monkeypatch):
    """SIGTERM to torchrun, to one rank alone, SIGKILL to one and to all: nothing is lost."""
    monkeypatch.chdir(place)
    argv = [ROOT / "train.py", *two_ranks, "--out", "told"]
    for target in ("torchrun", "one rank", "one rank at once", "all at once"):
        process = torchrun(*argv, start_new_session=True)
        wait_for(n_rows("told") + 5, "told", lambda process=process: process.poll() is None)
        ranks = children(process)
        if target == "torchrun":
            process.terminate()
        elif target == "all at once":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(ranks[1], signal.SIGKILL if "at once" in target else signal.SIGTERM)
        printed, error = process.communicate(timeout=30)
        message = "told/state.pt; the same command with --resume continues"
        assert process.returncode != 0 and ("at once" in target or message in printed), error
        if target == "one rank at once":
            assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
        argv = [ROOT / "train.py", *two_ranks, "--out", "told", "--resume"]
    done = helpers.torchrun(place, *argv)
    assert done.returncode == 0, done.stderr
    assert left("told") == left("torchrun")
