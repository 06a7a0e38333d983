"""finetune/run.py, resume.py, signals.py: a run that is killed, told to stop, out of room or out of luck goes on as if nothing had been.

    pytest tests/test_resume.py             kills aimed inside a save, in forked processes
    pytest -m slow tests/test_resume.py     kills at random moments, and under torchrun
"""
import ctypes
import functools
import json
import math
import os
import pathlib
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

import numpy as np
import pytest
import torch

import train
from finetune import signals
from finetune.options import parse_options
from finetune.ranks import Ranks
from finetune.resume import read_last_save
from finetune.run import Run
from llama import save_checkpoint
from finetune.preflight import OutOfMemoryAdvice, memory_advice

from .helpers import EXAMPLES, ONE_THREAD, ROOT, contents, given_once, tiny, untimed

EXAMPLES = EXAMPLES[:6]                                    # two epochs of three steps of two


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a base, examples, and `whole`: the run that was never interrupted."""
    place = tmp_path_factory.mktemp("state")
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, place / "base")
    (place / "examples.json").write_text(json.dumps(EXAMPLES))
    (place / "held_out.json").write_text(json.dumps(EXAMPLES[:2]))
    return place


@pytest.fixture
def flags(place, monkeypatch):
    monkeypatch.chdir(place)
    flags = ["--checkpoint", "base", "--data", "examples.json", "--val-data", "held_out.json", "--layers", "1", "--r", "4",
             "--lr", "1e-2", "--dropout", "0.2", "--batch-size", "2", "--accumulation-steps", "1", "--epochs", "2", "--save-every", "1"]
    if not os.path.exists("whole"):
        train.main([*flags, "--out", "whole"])
    return flags


def left(folder):
    """What a run leaves, the fields of time and memory aside; every line of metrics.jsonl has to be one."""
    *rows, end = open(f"{folder}/metrics.jsonl").read().split("\n")
    rows = untimed([json.loads(line) for line in rows])
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and end == ""
    names = sorted(name for name in os.listdir(folder) if name.endswith((".pt", ".pth")) and name != "state.pt")
    return rows, {name: open(f"{folder}/{name}", "rb").read() for name in names}


def start(argv, before=lambda: None):
    """Process id of train.main(argv), forked: a process like any other, without the seconds of its imports."""
    if (pid := os.fork()) == 0:
        code = 99
        signal.signal(signal.SIGTERM, signal.SIG_DFL)           # whatever an earlier test's launcher left in this process
        try:
            before()
            train.main(given_once(argv))
            code = 0
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def ended(pid, within=120):
    """Its exit code, or minus the signal that killed it, which is ours if it takes longer than so many seconds."""
    (kill := threading.Timer(within, os.kill, (pid, signal.SIGKILL))).start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        kill.cancel()


def child(argv, before=lambda: None):
    return ended(start(argv, before))


def stopped_in(argv, step, then=lambda: os.kill(os.getpid(), signal.SIGTERM)):
    """Exit code of train.main(argv) in this process, where `then` is called within that step, counted from here on."""
    honest, calls = train.answer_loss, []

    def loss(model, batch):
        if torch.is_grad_enabled() and model.training:
            calls.append(1)
            if len(calls) == step:
                then()
        return honest(model, batch)
    train.answer_loss = loss
    try:
        train.main(argv)
    except SystemExit as left:
        return left.code
    finally:
        train.answer_loss = honest
    return 0


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def of_state(fd):
    return os.readlink(f"/proc/self/fd/{fd}").endswith("state.pt.tmp")


def begun(content, file):
    file.write(bytes(1000))
    file.flush()


MOMENTS = {                                                 # within a save: in which call, and what of it is still done
    "writing": (torch, "save", lambda content, file: of_state(file.fileno()), begun),
    "written": (os, "fsync", of_state, lambda fd: None),
    "flushed": (os, "fsync", of_state, os.fsync),
    "between the renames": (os, "replace", lambda source, target: source.name == "state.pt.tmp", lambda source, target: None),
    "renamed": (os, "replace", lambda source, target: source.name == "state.pt.tmp", os.replace),
}


def dying_in_a_save(moment, n):
    """What kills a process at that moment of its n-th save; a run that begins makes one before its first step."""
    def before():
        owner, name, matches, last = MOMENTS[moment]
        honest, calls = getattr(owner, name), []

        def instead(*args):
            calls.append(bool(matches(*args)))
            if calls[-1] and sum(calls) == n:
                last(*args)
                die()
            return honest(*args)
        setattr(owner, name, instead)
    return before


def test_killed_within_a_save_and_resumed_each_time(flags, capfd):
    """One run, killed once in each part of a save: its third, then step 2's again and again, that of step 1 being the last whole one."""
    argv, n = [*flags, "--out", "killed"], 3
    for moment in MOMENTS:
        assert child(argv, dying_in_a_save(moment, n)) == -signal.SIGKILL, moment
        argv, n = [*flags, "--out", "killed", "--resume"], 1
        assert os.path.exists("killed/state.pt") != (moment == "between the renames"), moment
    assert child(argv) == 0
    assert re.findall("resume    killed/(.*): (.) of 6 steps are done", capfd.readouterr().out) == [
        ("state.pt", "1")] * 3 + [("state.previous.pt", "1"), ("state.pt", "2")]
    assert left("killed") == left("whole")
    assert sorted(os.listdir("killed")) == ["adapter.pt", "args.json", "best.pt", "metrics.jsonl", "state.pt"]


def goes_on(flags, step, number=signal.SIGTERM):
    """The run of these flags, and the same told to stop in that step and resumed; rows and files of both."""
    name = "".join(flags).replace("/", "")[-40:]
    train.main([*flags, "--out", "a" + name])
    assert stopped_in([*flags, "--out", "b" + name], step, lambda: os.kill(os.getpid(), number)) == 130
    assert len(open(f"b{name}/metrics.jsonl").readlines()) == step
    torch.manual_seed(1), random.seed(1)                    # whatever a new process has
    train.main([*flags, "--out", "b" + name, "--resume"])
    return left("a" + name), left("b" + name)


@pytest.mark.parametrize("own", [
    ["--method", "dylora", "--method-options", "rank_by=loss"], ["--method", "full"],
    *(pytest.param(own.split(), marks=pytest.mark.slow) for own in (
        "--method delta-lora --method-options start=1 --dropout 0", "--method lora --precision bf16 --lora-plus-ratio 4", "--method dora --checkpointing", "--method dylora", "--method vera",
        "--method lora-fa --quantize nf4", "--method rslora --targets all --tokens-per-batch 200 --epochs 4", "--method full --init random --precision fp16"))])
def test_what_a_method_moves_goes_on(flags, own):
    one, other = goes_on(given_once([*flags, *own, "--save-every", "0"]), 4)
    assert one == other
    if "rank_by=loss" in own:
        assert len({row["rank"] for row in one[0][3:]}) > 1


OPTIMIZERS = {
    "SGD": lambda groups, options: torch.optim.SGD(groups, lr=options.lr, momentum=0.9),
    "Adagrad": lambda groups, options: torch.optim.Adagrad(groups, lr=options.lr),       # which has its state before a step
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda groups, options: torch.optim.Muon(groups, lr=options.lr)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_killed_and_goes_on(flags, monkeypatch, capsys, name):
    """By a change of build_optimizer alone.  What another optimizer saved is refused in one line."""
    adamw = train.build_optimizer
    monkeypatch.setattr(train, "build_optimizer", OPTIMIZERS[name])
    train.main([*flags, "--out", name])
    assert child([*flags, "--out", f"{name}-killed"], dying_in_a_save("renamed", 4)) == -signal.SIGKILL
    assert rows_in(f"{name}-killed") == 3
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_optimizer", adamw)
        line = refused([*flags, "--out", f"{name}-killed", "--resume"], capsys)
        assert "it was saved by another optimizer, or one with other settings" in line
    train.main([*flags, "--out", f"{name}-killed", "--resume"])
    assert left(f"{name}-killed") == left(name) != left("whole")


@pytest.fixture
def half(flags, tmp_path):
    """half() copies the folder of a run that was told to stop, by Ctrl-C, in its third step; with what it printed."""
    if not os.path.exists("half"):
        assert stopped_in([*flags, "--out", "half"], 3, lambda: os.kill(os.getpid(), signal.SIGINT)) == 130

    return lambda: os.path.relpath(shutil.copytree("half", tmp_path / str(len(os.listdir(tmp_path)))))


def refused(argv, capsys, code=2):
    """The one line with which train.main(argv) ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        train.main(argv)
    assert left.value.code == code
    line, = capsys.readouterr().err.splitlines()
    return line


def test_what_may_change_while_a_run_goes_on(flags, half, capsys):
    """Arguments are listed, refused where they would make it another run; so are other examples, another base, more ranks."""
    folder = half()
    before = contents(folder)
    argv = [*flags, "--out", folder, "--resume"]
    line = refused(given_once([*argv, "--lr", "0.02", "--epochs", "3", "--log-every", "5"]), capsys)
    assert f"{folder} was begun with --epochs 2, now 3; --lr 0.01, now 0.02: a resumed run cannot change this" in line
    assert "its steps would not hold the same examples" in refused(given_once([*argv, "--batch-size", "1"]), capsys)
    open("other.json", "w").write(json.dumps(EXAMPLES[1:] + EXAMPLES[:1]))
    assert "the examples are not those" in refused(given_once([*argv, "--data", "other.json"]), capsys)
    shutil.copytree("base", "other", dirs_exist_ok=True)
    weights = torch.load("base/consolidated.00.pth")
    torch.save({**weights, "norm.weight": 2 * weights["norm.weight"]}, "other/consolidated.00.pth")
    assert "it was begun over another base" in refused(given_once([*argv, "--checkpoint", "other"]), capsys)
    content = torch.load(f"{folder}/state.pt", weights_only=True)
    torch.save({**content, "about": {**content["about"], "ranks": 2}}, f"{folder}/state.pt")
    assert "each rank has its own random numbers; start as many as it was begun with (ranks 2, now 1)" in refused(argv, capsys)
    open(f"{folder}/state.pt", "wb").write(before["state.pt"])
    after = contents(folder)
    assert {**after, "args.json": None} == {**before, "args.json": None}
    shutil.copy("examples.json", "moved.json")
    changes = ["--data", "moved.json", "--log-every", "5", "--batch-size", "1", "--accumulation-steps", "2"]
    train.main(given_once([*argv, *changes, "--checkpointing"]))
    said = capsys.readouterr().out
    assert f"resume    {folder}/state.pt: 3 of 6 steps are done\n" in said and "before    " not in said
    assert re.findall("changed   (.*)", said) == ["--accumulation-steps 1, now 2", "--batch-size 2, now 1", "--checkpointing False, now True",
                                                  "--data examples.json, now moved.json", "--log-every 10, now 5", f"--out half, now {folder}"]
    assert [row["tokens"] for row in left(folder)[0]] == [row["tokens"] for row in left("whole")[0]]


def test_a_finished_run_changes_nothing(flags, capsys):
    before = {name: (os.stat(f"whole/{name}").st_mtime_ns, data) for name, data in contents("whole").items()}
    train.main([*flags, "--out", "whole", "--resume"])
    said = capsys.readouterr().out
    assert "resume    whole is finished, after step 6: nothing is left to do, nothing was changed\n" in said
    assert before == {name: (os.stat(f"whole/{name}").st_mtime_ns, data) for name, data in contents("whole").items()}


def test_a_torn_save_is_passed_over(flags, half, capsys):
    """Cut short, emptied, one bit turned, of another kind: the one before it is used; where that is no better, a line says so."""
    folder = half()
    data = open(f"{folder}/state.pt", "rb").read()
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("payload",)
    torch.save(Payload(), "payload.pt")
    for n, torn in enumerate((b"", data[:100], data[:-1], data[:len(data) // 2], open("whole/adapter.pt", "rb").read(), b'{"step": 1}',
                              open("payload.pt", "rb").read(), *(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:] for i in (80, 5000, len(data) // 2)))):
        open(f"{folder}/state.pt", "wb").write(torn)
        save = read_last_save(pathlib.Path(folder))
        assert save.path.name == "state.previous.pt" and save.progress.step == 2 and "is not a whole save of a run" in save.warning, n
    train.main([*flags, "--out", folder, "--resume"])
    assert "is not a whole save of a run" in (said := capsys.readouterr().out) and "the one before it is used" in said
    assert left(folder) == left("whole") and not os.path.exists("payload")
    folder = half()
    for name in "state.pt", "state.previous.pt":
        open(f"{folder}/{name}", "wb").write(data[:1000])
    assert "no save can be read, --overwrite starts again" in refused([*flags, "--out", folder, "--resume"], capsys)


def rows_of_another_run(path):
    path.write_bytes(path.read_bytes().replace(b'{"step": 1,', b'{"step": 1, "note": "x",'))


@pytest.mark.parametrize("name, change, said", [
    ("metrics.jsonl", os.remove, "metrics.jsonl is not what it was when"),
    ("metrics.jsonl", lambda path: os.truncate(path, 10), "metrics.jsonl is not what it was when"),
    ("metrics.jsonl", lambda path: path.write_bytes(bytes(10_000)), "metrics.jsonl is not what it was when"),
    ("metrics.jsonl", rows_of_another_run, "metrics.jsonl is not what it was when"),
    *((name, put, f"{name} is a device, where a file of the run belongs") for name in ("state.pt", "metrics.jsonl") for put in (
        lambda path: (path.unlink(), os.mkfifo(path)), lambda path: (path.unlink(), path.symlink_to("/dev/zero")))),
    ("state.pt", lambda path: (path.unlink(), path.mkdir()), "state.pt is a folder, where a file of the run belongs"),
])
def test_what_does_not_go_with_a_save(flags, half, capfd, name, change, said):
    """One line and nothing changed; a pipe is not waited for, and /dev/zero has an end."""
    folder = pathlib.Path(half())
    change(folder / name)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert ended(start([*flags, "--out", str(folder), "--resume"]), within=10) == 2
    line, = capfd.readouterr().err.splitlines()
    assert f"{folder}/{said}" in line
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("keys, value, said", [
    (("counters", "step"), 7, "claims step 7 of 6"), (("counters", "step"), -1, "claims step -1 of 6"),
    (("counters", "seconds"), math.inf, "seconds is inf"), (("counters", "worse"), 10 ** 400, "worse is 1000"),
    (("args",), {1: 2}, "was begun with --1 2, now None"), (("args", "log_every"), torch.ones(2), "is not a whole save of a run"),
    (("args", "data"), "\x1b[2J", None), (("about", "ranks"), torch.ones(2), "start as many"), (("about",), {}, "start as many"),
    (("metrics",), -1, "metrics.jsonl is not what it was"), (("random",), [], "does not fit this run"),
    (("parts", "optimizer", "param_groups", 0, "amsgrad"), True, "it was saved by another optimizer, or one with other settings"),
    (("parts", "optimizer", "param_groups", 0, "betas"), "x", "it was saved by another optimizer"),
    (("parts", "optimizer", "state", 0, "exp_avg"), torch.ones(3), "optimizer, exp_avg does not match this run"),
    (("parts", "optimizer", "state", 9), {}, "a parameter that is not trained here"), (("parts", "optimizer", "state", 0, "exp_avg"), None, "optimizer, exp_avg does not match"),
    (("parts", "model", "tensors", "layers.0.attention.wq.lora_B"), torch.full((32, 4), math.nan), "model, tensors, layers.0.attention.wq.lora_B"),
    (("counters", "updates"), 4, "claims step 3 of 6, and that 4 moved the weights"), (("counters", "updates"), 2 ** 60, "updates is 1152921504606846976"),
    (("counters", "finished"), 1, "finished is 1"), (("parts", "scaler"), {"scale": 1.0}, "scaler does not match this run"),
])
def test_a_save_that_lies(flags, half, capfd, keys, value, said):
    """Whole, with its checksums right, and of nonsense: nothing of it is used, or what is quoted of it can be seen."""
    folder = half()
    content = inner = torch.load(f"{folder}/state.pt", weights_only=True)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    torch.save(content, f"{folder}/state.pt")
    os.remove(f"{folder}/state.previous.pt")
    code, (out, error) = child([*flags, "--out", folder, "--resume"]), capfd.readouterr()
    assert "\x1b" not in out + error
    if said:
        line, = error.splitlines()
        assert code == 2 and said in line and not os.path.exists(f"{folder}/adapter.pt")
    else:
        assert code == 0 and left(folder) == left("whole")


def test_two_runs_in_one_folder(flags, half, capsys):
    """The second waits for nobody: it is refused, with nothing changed, while the first is at work."""
    folder, seen = half(), []

    def meanwhile():
        before = contents(folder)
        seen.append((child([*flags, "--out", folder, "--resume"]), contents(folder) == before))
    assert stopped_in([*flags, "--out", folder, "--resume"], 2, meanwhile) == 0
    assert seen == [(2, True)] and left(folder) == left("whole")


def test_a_second_ctrl_c_ends_at_once(flags, half, monkeypatch):
    folder, now = half(), [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])

    def impatient():
        for now[0] in (5.0, 5.5, 7.0):                                 # the second comes too soon: a shell passed one on twice
            os.kill(os.getpid(), signal.SIGINT)
            assert now[0] < 7
    with pytest.raises(KeyboardInterrupt):
        stopped_in([*flags, "--out", folder, "--resume"], 2, impatient)
    train.main([*flags, "--out", folder, "--resume"])
    assert left(folder) == left("whole")


def test_a_row_is_never_torn_nor_there_twice(flags, half):
    """What follows the last save in metrics.jsonl goes; a save that another run left is not gone on with."""
    folder = half()
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train.main([*flags, "--out", folder, "--resume"])
    assert left(folder) == left("whole")


def test_a_folder_that_holds_a_run(flags, half, capsys):
    folder = half()
    line = refused([*flags, "--out", folder], capsys)
    assert line.endswith(f"{folder} holds a run already: --resume goes on with it, --overwrite replaces it, and --out names another folder")
    assert "give one" in refused([*flags, "--out", folder, "--resume", "--overwrite"], capsys)
    assert child([*flags, "--out", folder, "--overwrite"], dying_in_a_save("writing", 2)) == -signal.SIGKILL       # before its first row
    assert not os.path.exists(f"{folder}/state.previous.pt")
    train.main([*flags, "--out", folder, "--resume"])
    assert left(folder) == left("whole") and ": 0 of 6 steps are done" in capsys.readouterr().out
    for name in ("state.pt", "metrics.jsonl"):
        os.remove(f"{folder}/{name}")
    assert "holds a run but no state.pt to go on from, --overwrite replaces it" in refused([*flags, "--out", folder, "--resume"], capsys)
    os.remove(f"{folder}/args.json")
    assert "holds a model already" in refused([*flags, "--out", folder, "--overwrite"], capsys)


def test_a_step_that_is_not_finite_is_skipped_and_named(flags, capsys, monkeypatch):
    """NaN from one example, met once in each epoch: nothing moves, the schedule waits, the log says which examples it was among."""
    honest, seen = train.answer_loss, []

    def planted(model, batch):
        loss, n = honest(model, batch)
        if model.training:
            seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return loss * (math.nan if len(seen) in (2, 4) else 1), n
    monkeypatch.setattr(train, "answer_loss", planted)
    monkeypatch.setattr(train, "check_gradients", lambda *_: None)
    train.main([*flags, "--out", "nan"])
    rows, said = left("nan")[0], capsys.readouterr().out
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2, None, None] and rows[1]["loss"] is None
    assert [row["lr"] for row in rows] == pytest.approx([left("whole")[0][i]["lr"] for i in (0, 1, 1, 2, 2, 3)])
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2])) and all(p.isfinite().all() for p in seen[-1])
    step = sorted((np.random.default_rng((0, 0)).permutation(6)[2:4] + 1).tolist())         # the second of epoch 0
    assert rows[1]["examples"] == step
    assert f" | not finite, step skipped, 1 in a row, 1 in all: examples {', '.join(map(str, rows[1]['examples']))}\n" in said


def test_too_many_bad_steps_end_the_run(flags, capsys, monkeypatch):
    honest = train.answer_loss
    monkeypatch.setattr(train, "answer_loss", lambda model, batch: (honest(model, batch)[0] * (math.inf if model.training else 1), 1))
    line = refused([*flags, "--out", "bad", "--max-bad-steps", "2"], capsys, 3)
    assert line.startswith("train.py: no finite loss and gradient in 2 steps in a row, the last at step 2: try a lower --lr")
    assert len(left("bad")[0]) == 2 and not os.path.exists("bad/adapter.pt")
    monkeypatch.setattr(train, "answer_loss", honest)


def test_out_of_memory_ends_in_one_line(flags, half, capsys, monkeypatch):
    """Which names the knobs in order of effect, as the estimate has it; the last save stands."""
    folder = half()
    def full(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.80 GiB")
    monkeypatch.setattr(train, "check_gradients", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(train, "answer_loss", full)
        line = refused([*flags, "--out", folder, "--resume"], capsys, 3)
    assert line.startswith("train.py: CUDA out of memory. Tried to allocate 20.00 GiB; try --")
    less = [float(size) for size in re.findall(r"by estimate ([\d.]+) MiB less", line)]
    assert less == sorted(less, reverse=True) and less[0] > 0
    assert all(flag in line for flag in ("--batch-size 1 --accumulation-steps 2 (by", "--precision bf16 (by")) and "--resume continues" in line
    train.main([*flags, "--out", folder, "--resume"])
    assert left(folder) == left("whole")


@pytest.mark.parametrize("error, said", [
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "CUDA error: out of memory"), (MemoryError(), "out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "[enforce fail]"),
    (RuntimeError("shapes cannot be multiplied"), None)])
def test_memory_runs_out_by_many_names(error, said, capsys):
    job = train.prepare(parse_options(["--precision", "bf16"]), Ranks())
    with pytest.raises(SystemExit if said else RuntimeError), OutOfMemoryAdvice(job, lambda job, **changes: 0):
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith(f"train.py: {said}") and "; try a smaller base or a larger device; --resume" in line for line in lines] == [True] * bool(said)


def test_the_advice_is_in_order_of_effect():
    """By an estimate that says what each saves; of a batch its largest part is taken, so that a step's examples stay the same."""
    job = train.prepare(parse_options(["--batch-size", "6", "--accumulation-steps", "2", "--method", "full"]), Ranks())

    def estimate(job, checkpointing=False, batch_size=6, precision="fp32", **others):
        return 100 * (1 + (not checkpointing)) + 10 * batch_size + 5 * (precision == "fp32")
    assert memory_advice(job, estimate) == [("--checkpointing", 100), ("--batch-size 3 --accumulation-steps 4", 30), ("--precision bf16", 5)]


def test_best_and_last(flags, monkeypatch, capsys):
    """best.pt is the adapter of the lowest held-out loss, adapter.pt the last; --early-stop ends after so many without a better one."""
    losses = iter([5.0, 4.0, 3.0, 3.5, math.nan, 2.0])                 # before the first step, then each epoch's
    saved, honest = [], train.save_adapter
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses)})
    monkeypatch.setattr(train, "save_adapter", lambda model, path: (saved.append(path.name), honest(model, path)))
    argv = given_once([*flags, "--out", "early", "--epochs", "9", "--early-stop", "2"])
    train.main(argv)
    rows, kept = left("early")
    assert [row.get("val_loss") for row in rows if "val_loss" in row] == [4.0, 3.0, 3.5, None] and len(rows) == 12
    assert saved == ["best.pt", "best.pt", "adapter.pt"] and kept["best.pt"] != kept["adapter.pt"]
    said = capsys.readouterr().out
    assert "stopped   after step 12 of 27: no better held-out loss in 2 measurements\n" in said
    assert "best      early/best.pt: held-out loss 3.0000, after step 6; adapter.pt is from step 12, the last; to use the best: python generate.py --adapter early/best.pt\n" in said
    train.main([*argv, "--resume"])
    assert "is finished" in capsys.readouterr().out


def test_a_full_disk(flags, capfd):
    """No room for a save, for best.pt, for half of a row: one line, exit 2, and with room again nothing is lost."""
    honest = Run.sum_loss
    for step, room, said in ((2, lambda: 3_000, "full/state.pt cannot be written: File too large"),
                             (3, lambda: 3_000, "full/best.pt cannot be written: File too large"),
                             (4, lambda: os.path.getsize("full/metrics.jsonl") + 100, "full/metrics.jsonl cannot be written: No space left")):
        def less_room(run, loss):
            if run.progress.step == step - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room(),) * 2)
            return honest(run, loss)
        assert child([*flags, "--out", "full", *["--resume"] * (step > 2)], lambda: setattr(Run, "sum_loss", less_room)) == 2
        line, = capfd.readouterr().err.splitlines()
        assert line.startswith(f"train.py: {said}") and line.endswith("; the last save is intact: --resume continues from it")
        assert len(left("full")[0]) == (2 if step == 2 else step - 1)
    assert child([*flags, "--out", "full", "--resume"]) == 0
    assert left("full") == left("whole")


def test_a_rank_that_waits_for_one_that_is_gone_leaves_all_the_same(flags, monkeypatch):
    """Told to stop, a main thread that never comes back from a call into a library runs no handler."""
    lock = ctypes.create_string_buffer(64)                             # a mutex of libc, taken twice: NCCL's wait, in short
    pid = os.fork()
    if pid == 0:
        signals.GRACE_SECONDS = 0.1
        run = Run(parse_options([*flags, "--out", "stuck"]), Ranks(0, 2), pathlib.Path("stuck"), None, False)
        with signals.stop_after_step_on_signals(run):
            while True:
                ctypes.CDLL(None).pthread_mutex_lock(lock)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid, within=5) == 1


def rows_in(folder):
    try:
        with open(f"{folder}/metrics.jsonl") as file:
            return len(file.readlines())
    except FileNotFoundError:
        return 0


def wait_for(rows, folder, alive):
    """Until the run has logged so many steps."""
    until = time.monotonic() + 60
    while rows_in(folder) < rows:
        assert alive() and time.monotonic() < until
        time.sleep(0.001)


def alive(pid):
    return os.waitpid(pid, os.WNOHANG) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_25_signals_at_random_moments(flags, number):
    """Every step is saved, so that a life's few steps stay; some lives end before their first."""
    flags += ["--epochs", "200"]                            # more than 25 lives can reach on any machine
    train.main(given_once([*flags, "--out", f"long{number}"]))
    chance, argv, folder = random.Random(number), [*flags, "--out", f"often{number}"], f"often{number}"
    for _ in range(25):
        pid = start(argv)
        if more := chance.randrange(6):
            wait_for(rows_in(folder) + more, folder, lambda: alive(pid))
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, number)
        assert ended(pid) in (-number, 130)
        argv = [*flags, "--out", folder, "--resume"]
    assert 25 < rows_in(folder) < 600
    assert child(argv) == 0
    assert left(folder) == left(f"long{number}")


def start_ranks(argv, life, before=lambda rank: None):
    """Two forked ranks, as torchrun would start them: their process ids."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def as_rank(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                          TORCHELASTIC_RUN_ID="here", TORCHELASTIC_RESTART_COUNT=str(life))
        before(rank)
    return [start(argv, functools.partial(as_rank, rank)) for rank in (0, 1)]


@pytest.mark.slow
def test_nan_on_one_of_two_ranks_is_skipped_by_both(flags):
    """Of the second step one micro-batch, rank 1's, by its value alone; by its gradient in every step, and both end with exit 3."""
    honest = train.answer_loss

    def planted(rank, steps, plus=0, times=1):
        calls = []

        def loss(model, batch):
            calls.append(1)
            here = rank == 1 and len(calls) in steps
            return honest(model, batch)[0] * (times if here else 1) + (plus if here else 0), batch.n_answer
        train.check_gradients, train.answer_loss = lambda *_: None, loss
    flags += ["--batch-size", "1", "--epochs", "4"]
    assert [ended(pid) for pid in start_ranks([*flags, "--out", "nan2"], 0, lambda rank: planted(rank, (2, ), plus=math.inf))] == [0, 0]
    rows, kept = left("nan2")
    assert [row.get("skipped") for row in rows] == [None, 1] + [None] * 10 and len(rows[1]["examples"]) == 2
    assert all(tensor.isfinite().all() for tensor in torch.load("nan2/adapter.pt")["tensors"].values())
    pids = start_ranks([*flags, "--out", "bad2", "--max-bad-steps", "3"], 0, lambda rank: planted(rank, range(4, 99), times=math.nan))
    assert [ended(pid) for pid in pids] == [3, 3] and rows_in("bad2") == 6


@pytest.mark.slow
def test_25_kills_of_one_of_two_ranks_at_random_moments(flags):
    """The other is told so by SIGTERM, as torchrun does, and must leave; then both are started again."""
    flags += ["--epochs", "300"]
    assert [ended(pid) for pid in start_ranks([*flags, "--out", "long2"], 0)] == [0, 0]
    chance = random.Random(2)
    for life in range(25):
        pids = start_ranks([*flags, "--out", "often2"], life)
        if more := chance.randrange(6):
            wait_for(rows_in("often2") + more, "often2", lambda: all(map(alive, pids)))
        time.sleep(chance.uniform(0, 0.05))
        gone = pids.pop(chance.randrange(2))
        os.kill(gone, signal.SIGKILL)
        assert ended(gone) == -signal.SIGKILL
        began = time.monotonic()
        os.kill(pids[0], signal.SIGTERM)
        assert ended(pids[0]) != 0 and time.monotonic() - began < 30
    assert 25 < rows_in("often2") < 600
    assert [ended(pid) for pid in start_ranks([*flags, "--out", "often2"], 25)] == [0, 0]
    assert left("often2") == left("long2")


def torchrun(*command, **settings):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, **settings)


@pytest.fixture(scope="module")
def two_ranks(place):
    """Flags of a run of two ranks, and its folder."""
    flags = ["--checkpoint", "base", "--data", "examples.json", "--val-data", "held_out.json", "--layers", "1", "--r", "4", "--lr", "1e-2",
             "--dropout", "0.2", "--batch-size", "1", "--accumulation-steps", "2", "--epochs", "30", "--save-every", "1"]
    done = torchrun("--", ROOT / "train.py", *flags, "--out", "torchrun", cwd=place)
    out, error = done.communicate(timeout=120)
    assert done.returncode == 0, error
    return flags


@pytest.mark.slow
def test_torchrun_starts_again_by_itself(two_ranks, place, monkeypatch):
    """Rank 1 is killed between two micro-batches; then rank 0 within a save; then rank 1 during one: three lives to finish."""
    monkeypatch.chdir(place)
    (place / "dying.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from tests.test_resume import die, dying_in_a_save
life = os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"]
losses, gathers, loss, gather = [], [], train.answer_loss, torch.distributed.all_gather_object
def dying(model, batch):
    losses.append(1)
    return die() if life == "10" and len(losses) == 20 else loss(model, batch)
def dying_too(*args):
    gather(*args)
    gathers.append(1)
    if life == "12" and len(gathers) == 11:
        die()
train.answer_loss, torch.distributed.all_gather_object = dying, dying_too
if life == "01":
    dying_in_a_save("between the renames", 5)()
train.main(sys.argv[1:])
""")
    done = torchrun("--max-restarts=3", "--", "dying.py", *two_ranks, "--out", "again")
    out, error = done.communicate(timeout=120)
    assert done.returncode == 0, error
    (first, _), (second, step), (third, last) = re.findall(r"resume    again/(\S+): (\d+) of 60", out)
    assert (first, second, third) == ("state.pt", "state.previous.pt", "state.pt") and int(step) < int(last), out
    assert left("again") == left("torchrun")


@pytest.mark.slow
def test_torchrun_told_to_stop(two_ranks, place, monkeypatch):
    """SIGTERM to torchrun, to one rank alone, and SIGKILL to all: ranks agree on the step, and nothing is lost."""
    monkeypatch.chdir(place)
    argv = ["--", ROOT / "train.py", *two_ranks, "--out", "told"]
    for n, blow in enumerate(("torchrun", "one rank", "all")):
        done = torchrun(*argv, start_new_session=True)
        wait_for(rows_in("told") + 5, "told", lambda: done.poll() is None)
        if blow == "torchrun":
            done.terminate()
        elif blow == "one rank":
            os.kill(int(open(f"/proc/{done.pid}/task/{done.pid}/children").read().split()[1]), signal.SIGTERM)
        else:
            os.killpg(done.pid, signal.SIGKILL)
        out, error = done.communicate(timeout=40)
        assert done.returncode != 0 and (blow == "all" or "told/state.pt; the same command with --resume continues" in out), error
        argv += ["--resume"] * (n == 0)
    done = torchrun(*argv)
    out, error = done.communicate(timeout=60)
    assert done.returncode == 0, error
    assert left("told") == left("torchrun")


@pytest.mark.slow
def test_one_of_two_ranks_killed_ends_the_other_within_30_seconds(two_ranks, place, monkeypatch):
    monkeypatch.chdir(place)
    done = torchrun("--", ROOT / "train.py", *two_ranks, "--out", "lost")
    wait_for(5, "lost", lambda: done.poll() is None)
    ranks = [int(pid) for pid in open(f"/proc/{done.pid}/task/{done.pid}/children").read().split()]
    os.kill(ranks[-1], signal.SIGKILL)
    began = time.monotonic()
    done.communicate(timeout=40)
    assert done.returncode != 0 and time.monotonic() - began < 30
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks) and not os.path.exists("lost/adapter.pt")
