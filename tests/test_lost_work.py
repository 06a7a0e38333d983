"""A run outlives its terminal, and every command ends without a traceback: real processes.

    pytest tests/test_lost_work.py              a hang-up, a closed pipe, a finished run
    pytest -m slow tests/test_lost_work.py      nohup, odd consoles, two ranks under torchrun
"""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import train
from finetune.console import through_outlet
from finetune.resume import read_last_save

from .helpers import ONE_THREAD, ROOT, given_once, metrics

FLAGS = ["--layers", "1", "--batch-size", "1", "--accumulation-steps", "1", "--log-every", "1"]
DEMO = [sys.executable, str(ROOT / "train.py"), *FLAGS]
LATIN = {**ONE_THREAD, "PYTHONIOENCODING": "cp1252", "LC_ALL": "C"}


def start(folder, command, env=ONE_THREAD, before=None):
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=before)


def wait_for_rows(n, folder, process):
    until = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < n:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def ignore_hang_up():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_hang_up_saves_and_ends(tmp_path):
    """Also a second one.  Its terminal is gone by then: nobody reads what it prints."""
    process = start(tmp_path, [*DEMO, "--max-steps", "2000"])
    wait_for_rows(2, tmp_path / "out", process)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 130
    assert read_last_save(tmp_path / "out").progress.step == len(metrics(tmp_path / "out")) < 2000


@pytest.mark.slow
def test_a_hang_up_stays_ignored_under_nohup(tmp_path):
    process = start(tmp_path, [*DEMO, "--max-steps", "40"], before=ignore_hang_up)
    wait_for_rows(2, tmp_path / "out", process)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == b"" and len(metrics(tmp_path / "out")) == 40


@pytest.mark.slow
def test_a_hang_up_of_two_ranks(tmp_path):
    """To both ranks and torchrun at once, as the kernel sends it when an SSH session ends."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "--", *DEMO[1:], "--max-steps", "600"]
    process = start(tmp_path, command, before=os.setsid)
    wait_for_rows(3, tmp_path / "out", process)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode != 0
    n_steps = read_last_save(tmp_path / "out").progress.step
    assert n_steps == len(metrics(tmp_path / "out")) < 600
    resumed = start(tmp_path, [*command, "--resume"])
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0 and f"{n_steps} of 600 steps are done".encode() in output


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """Folder and result of a run in a folder of Greek letters, whose output is a closed pipe."""
    folder = tmp_path_factory.mktemp("αβγ")
    process = start(folder, [*DEMO, "--max-steps", "20", "--out", "λ"], env=LATIN)
    assert process.stdout.readline().startswith(b"base ")
    process.stdout.close()                           # `| head -1`
    error = process.stderr.read()
    return folder, process.wait(60), error


def test_a_closed_pipe_does_not_end_a_run(odd_run):
    folder, code, error = odd_run
    assert code == 0 and len(metrics(folder / "λ")) == 20
    assert error == (b"train.py: standard output cannot be written any more (Broken pipe); the run "
                     b"goes on without printing\n")


@pytest.mark.slow
def test_a_console_that_lacks_a_character(odd_run):
    """train.py and finetune.pictures print escapes; generate.py prints UTF-8 on any console."""
    folder, _, _ = odd_run
    again = [*DEMO, "--max-steps", "20", "--out", "λ", "--resume"]
    done = subprocess.run(again, cwd=folder, env=LATIN, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"\\u03bb is finished" in done.stdout
    typed = b"What is \xff?\n:adapter \xce\xbb/no\n"
    ask = [sys.executable, str(ROOT / "generate.py"), "--adapter", "λ/adapter.pt",
           "--max-new-tokens", "2", "--interactive"]
    done = subprocess.run(ask, cwd=folder, env=LATIN, capture_output=True, input=typed)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"adapter \\u03bb/adapter.pt" in done.stderr and done.stdout.count(b"### ") == 3


@pytest.mark.slow
@pytest.mark.parametrize("redirect, code, message", [
    ("| true", 1, ""),
    ("> /dev/full", 2, "standard output cannot be written: No space left on device\n"),
    (">&- 2>&- <&-", 0, ""),
    ("--interactive <&-", 0, "\n"),
])
def test_what_generate_does_without_a_terminal(odd_run, redirect, code, message):
    folder, _, _ = odd_run
    ask = f"{sys.executable} {ROOT}/generate.py --layers 1 --adapter none --max-new-tokens 1"
    done = subprocess.run(["bash", "-c", f"{ask} {redirect}; exit ${{PIPESTATUS[0]}}"], cwd=folder,
                          env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == code and done.stderr.endswith(message), done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_terminal_that_another_program_made_non_blocking():
    """What is printed waits until there is room, as on any other terminal."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    text = "a line of a run\n" * 20_000             # more than a pipe holds
    received = []

    def read_slowly():
        time.sleep(0.2)
        with open(read_fd) as file:
            received.append(file.read())

    reader = threading.Thread(target=read_slowly)
    reader.start()
    with open(write_fd, "w") as raw, through_outlet(raw, "train.py", stops=False) as stream:
        stream.write(text)
        stream.flush()
    reader.join()
    assert received == [text]


def test_ctrl_c_while_torch_loads(tmp_path):
    """A stand-in for torch gets the signal in its import, where the real one takes seconds."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = {**ONE_THREAD, "PYTHONPATH": str(tmp_path)}
    for command in ([f"{ROOT}/train.py"], ["-m", "benchmarks"], ["-m", "finetune.convert"]):
        code = ("import os, runpy, sys; sys.argv = sys.argv[1:]; "
                f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; "
                "sys.argv[0] == '-m' and runpy.run_module(sys.argv[1], run_name='__main__') or "
                "runpy.run_path(sys.argv[0], run_name='__main__')")
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, env=env,
                              capture_output=True)
        assert (done.returncode, done.stderr) == (130, b""), command


def test_a_finished_run_refuses_to_be_another(tmp_path, monkeypatch, refused, capsys):
    argv = [*FLAGS, "--max-steps", "2", "--out", "done"]
    train.main(argv)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "done").iterdir()}
    for flag, value in (("--max-steps", "3"), ("--lr", "0.5"), ("--epochs", "9")):
        line = refused(train.main, *given_once([*argv, flag, value, "--resume"]))
        assert flag in line and f", now {value}" in line
        assert "to train on from its result: --adapter done/adapter.pt, another --out" in line
    assert before == {path: path.read_bytes() for path in (tmp_path / "done").iterdir()}
    train.main(given_once([*argv, "--adapter", "done/adapter.pt", "--out", "more"]))
    assert len(metrics(tmp_path / "more")) == 2


def test_a_run_that_stopped_early_goes_on_with_more_patience(run, data, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": 1.0})
    argv = ["early", "--val-data", str(data), "--epochs", "3", "--batch-size", "6",
            "--accumulation-steps", "1"]
    assert len(run(*argv, "--early-stop", "1")) == 4
    run(*argv, "--early-stop", "1", "--resume")
    assert "is finished, after step 4" in capsys.readouterr().out
    assert len(run(*argv, "--early-stop", "5", "--resume")) == 6


def test_a_save_of_the_version_before_is_read(tmp_path, monkeypatch, capsys):
    """It called the count of updates `taken`, had one file of data, and no templates."""
    monkeypatch.chdir(tmp_path)
    train.main([*FLAGS, "--max-steps", "2", "--out", "old"])
    content = torch.load("old/state.pt", weights_only=True)
    content["counters"]["taken"] = content["counters"].pop("updates")
    del content["args"]["template"]
    content["args"]["data"] = content["args"]["data"][0]
    torch.save(content, "old/state.pt")
    save = read_last_save(tmp_path / "old")
    assert save.progress.updates == 2
    train.main([*FLAGS, "--max-steps", "2", "--out", "old", "--resume"])
    printed = capsys.readouterr().out
    assert "is finished" in printed and "\nchanged " not in printed
