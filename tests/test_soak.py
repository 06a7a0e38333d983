"""python -m benchmarks soak: it tries what it says, finds what is lost, and cleans up."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmark
from benchmarks import lives, soak
from benchmarks.tables import Table
from finetune import resume

from .helpers import ONE_THREAD, ROOT


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(soak, "N_LIVES", 4)
    monkeypatch.setattr(soak, "N_STEPS", 30)
    monkeypatch.setattr(soak, "N_FILES", 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in soak.KINDS if kind != "hangs"])
def test_a_batch_loses_nothing(small, kind):
    result = soak.try_one(kind, 0)
    assert result["lost"] is None and result["tried"] > 0


@pytest.mark.slow
def test_a_rank_that_hangs_is_left(small):
    result = soak.try_one("hangs", 0)
    assert result["lost"] is None and 3 < result["left after"] < 65


def write_in_place(path, write, previous=None):
    path.unlink(missing_ok=True)                     # This process may have it mapped.
    with vars(lives.files).get("open", open)(path, "wb") as file:
        write(file)


@pytest.mark.slow
def test_a_save_that_is_not_written_whole_is_found(small, monkeypatch):
    monkeypatch.setattr(resume, "write_whole", write_in_place)
    monkeypatch.setattr(soak, "VARIANTS", ["--method lora"])
    lost = [soak.try_one("kills in saves", seed)["lost"] for seed in range(3)]
    messages = ("is not a whole save of a run", f"{soak.METRICS} has rows, and there is no save")
    assert any(line and any(message in line for message in messages) for line in lost)


@pytest.mark.slow
def test_a_lost_byte_is_found(small, monkeypatch):
    """Random numbers that a resumed run does not get back change what dropout drops."""
    monkeypatch.setattr(resume, "set_random_state", lambda *_: None)
    monkeypatch.setattr(soak, "VARIANTS", ["--method lora --dropout 0.5"])
    lost = soak.try_one("kills alone", 0)["lost"]
    assert "adapter.pt, " in lost and lost.endswith("not what the undisturbed run left")


def test_a_run_that_gives_up_in_many_lines_is_found(small, monkeypatch):
    monkeypatch.setattr(soak.Run, "append", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in soak.try_one("full disks", 0)["lost"]


# --- the table


@pytest.fixture
def batches(monkeypatch):
    """What was tried, with nothing done; `lost` is what the next batches lose."""
    tried = []
    lost = []

    def try_one(kind, seed):
        tried.append((kind, seed))
        return {"tried": 5, "lost": lost[0] if lost else None, "seconds": 5.0}

    monkeypatch.setattr(soak, "try_one", try_one)
    monkeypatch.setattr(soak.signal, "signal", lambda *_: None)
    return tried, lost


def make(out, *flags, conditions="here"):
    args = benchmark.parse_args(["soak", "--out", str(out), *flags])
    return soak.make(args, Table("soak", out, conditions, "`this`"))


def test_a_soak_goes_on_with_the_next_seed_and_counts_its_own_code_alone(
        batches, tmp_path, monkeypatch):
    tried, _ = batches
    times = itertools.chain([0, *[0] * 3, 10 ** 6] * 2, itertools.repeat(0))
    monkeypatch.setattr(soak.time, "monotonic", lambda: next(times))
    make(tmp_path, "--only", "full disks")
    lines = make(tmp_path, "--only", "full disks")
    assert tried == [("full disks", seed) for seed in range(6)]
    assert "| full disks | 6 | 30 full disks | 0 | 0.5 |  |" in lines
    assert len(make(tmp_path, "--hours", "0", conditions="other code")) == 2
    assert len(make(tmp_path, "--hours", "0")) == 3


def test_each_kind_gets_its_share_of_the_time():
    spent = []
    for _ in range(1000):
        kind = soak.next_kind(list(soak.KINDS), spent, 1000)
        spent.append(({"kind": kind, "seed": 0}, {"seconds": soak.KINDS[kind].seconds}))
    for name, kind in soak.KINDS.items():
        seconds = sum(result["seconds"] for settings, result in spent if settings["kind"] == name)
        total = sum(result["seconds"] for _, result in spent)
        assert seconds / total == pytest.approx(kind.share, abs=0.02)
    assert soak.next_kind(list(soak.KINDS), spent, 15) not in ("hangs", "damaged files", None)
    assert soak.next_kind(list(soak.KINDS), spent, 1) is None


def test_a_loss_is_printed_with_its_seed_and_ends_with_exit_code_1(batches, tmp_path, capsys):
    tried, lost = batches
    lost.append("adapter.pt")
    argv = ["soak", "--only", "kills alone", "--seed", "7", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        benchmark.main(argv)
    assert caught.value.code == 1 and tried == [("kills alone", 7)]
    printed = capsys.readouterr().out
    assert "Lost: kills alone, seed 7: adapter.pt." in printed
    assert "`python -m benchmarks soak --only 'kills alone' --seed 7`" in printed
    assert not (tmp_path / "soak.json").exists()
    lost.clear()
    benchmark.main(argv)


@pytest.mark.parametrize("flags, gone, message", [
    (["--seed", "1"], (), "say of which kind with --only"),
    ([], ("fork",), "soak forks its runs, which this system cannot")])
def test_what_cannot_be_tried_is_refused(tmp_path, monkeypatch, capsys, flags, gone, message):
    for name in gone:
        monkeypatch.delattr(os, name)
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["soak", "--out", str(tmp_path), *flags])
    line, = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and message in line


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_soak_leaves_no_process_and_no_folder(tmp_path, number, code):
    command = [sys.executable, "-m", "benchmarks", "soak", "--only", "kills of a rank", "--out",
               str(tmp_path / "out")]
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**ONE_THREAD, "TMPDIR": str(tmp_path / "tmp")})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 60
    while len(pids := children.read_text().split()) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.endswith("benchmarks: interrupted; the same command goes on from here\n")
    assert not list((tmp_path / "tmp").iterdir())
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    path = tmp_path / "out/soak.json"
    assert not path.exists() or json.loads(path.read_text())
