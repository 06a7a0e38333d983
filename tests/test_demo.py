"""The embedded default: what `python train.py` and `python generate.py` promise on a fresh clone.

pytest tests/test_demo.py             one layer
pytest -s -m slow tests/test_demo.py  the whole demo, and the accuracy on held-out examples
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate as command
import train
from finetune.dataset import encode_prompt
from finetune.examples import read_examples
from llama import load_checkpoint
from llama.sampling import generate
from lora import load_adapter, lora_disabled

from .helpers import ONE_THREAD, ROOT, metrics

DEMO = ROOT / "finetune" / "demo"


def python(folder, *command):
    """Return what a command prints, run in a folder on one thread."""
    done = subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True,
                          text=True, env=ONE_THREAD)
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, printed text, rows of metrics, seconds) of `python train.py` with no argument."""
    folder = tmp_path_factory.mktemp("demo")
    began = time.perf_counter()
    printed = python(folder, ROOT / "train.py")
    return folder, printed, metrics(folder / "out"), time.perf_counter() - began


def learning(rows):
    """Return the mean loss over the last fifth of the steps by that over the first."""
    n = max(1, len(rows) // 5)
    return sum(row["loss"] for row in rows[-n:]) / sum(row["loss"] for row in rows[:n])


def answers(model, tokenizer, examples):
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    ids = [[] for _ in examples]
    for i, token in generate(model, prompts, 16, tokenizer.eos_id):
        ids[i].append(token)
    return [tokenizer.decode(answer).strip() for answer in ids]


def test_one_layer_is_enough_to_debug_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--layers", "1", "--epochs", "1"])
    assert "saved     out/adapter.pt" in capsys.readouterr().out
    assert learning(metrics(tmp_path / "out")) < 0.7
    command.main([])
    assert capsys.readouterr().out.count("###") >= 4


@pytest.mark.slow
def test_it_learns_in_under_a_minute_and_says_where_the_adapter_is(trained):
    folder, printed, rows, seconds = trained
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    before = float(printed.split("before    held-out loss ")[1].split()[0])
    assert seconds < 60
    assert learning(rows) < 0.7 and held_out[-1] < 0.7 * before
    assert "saved     out/adapter.pt" in printed and (folder / "out/adapter.pt").is_file()


@pytest.mark.slow
def test_the_adapter_answers_what_the_base_does_not(trained):
    """To the letter, also about words and sentences that it was never asked about."""
    model, tokenizer = load_checkpoint(DEMO)
    load_adapter(model.eval(), trained[0] / "out/adapter.pt")
    examples = read_examples(DEMO / "held_out.json")
    with lora_disabled(model):
        base = answers(model, tokenizer, examples)
    n_right = []
    for texts in (base, answers(model, tokenizer, examples)):
        pairs = zip(texts, examples, strict=True)
        n_right.append(sum(text == example["output"] for text, example in pairs))
    print(f"\nheld-out answers exactly right: base {n_right[0]} of {len(examples)}, "
          f"base + adapter {n_right[1]} of {len(examples)}")
    assert n_right[0] <= 0.05 * len(examples) and n_right[1] >= 0.7 * len(examples)


@pytest.mark.slow
def test_the_adapter_feels_what_the_base_does_not(trained, monkeypatch, capsys):
    """Happy or sad: the base is right by chance, and what it writes is no answer."""
    monkeypatch.chdir(trained[0])
    feelings = []
    for example in read_examples(DEMO / "held_out.json"):
        if example.get("input") and example["output"] in ("happy", "sad"):
            feelings.append(example)
    Path("feelings.json").write_text(json.dumps(feelings))
    capsys.readouterr()
    command.main(["--data", "feelings.json", "--score"])
    scores = json.loads(capsys.readouterr().out)
    base, adapter, difference = (scores[name] for name in ("base", "adapter", "difference"))
    print(f"\nhappy or sad, {len(feelings)} sentences: accuracy {base['accuracy'][0]:.0%} by the "
          f"base, {adapter['accuracy'][0]:.0%} with the adapter")
    assert len(feelings) == 20
    assert base["accuracy"][0] <= 0.7 and adapter["accuracy"][0] >= 0.9
    assert base["exact_match"][0] == 0 and adapter["exact_match"][0] >= 0.9
    assert difference["accuracy"][1] > 0 and difference["mcc"][1] > 0 and difference["loss"][2] < 0


def test_held_out_examples_are_not_among_the_training_examples():
    """Nor is a question in other words: what is held out is a word or a sentence."""
    questions = []
    for name in ("train.json", "held_out.json"):
        examples = read_examples(DEMO / name)
        questions.append({(each["instruction"], each.get("input", "")) for each in examples})
    training, held_out = questions
    assert not training & held_out
    assert 400 <= len(training) <= 1000 and 100 <= len(held_out) <= 300
    shown = {(each["instruction"], each.get("input", "")) for each in command.INSTRUCTIONS}
    assert shown <= held_out


@pytest.mark.slow
def test_the_documented_commands_make_the_demo_again(tmp_path):
    """The same data and tokenizer to the byte; a tenth of the base's training shows it learn."""
    make = [sys.executable, "-m", "finetune.demo.make"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "usage: python -m finetune.demo.make DIR\n"
    subprocess.run([*make, tmp_path / "world"], cwd=ROOT, check=True)
    for name in ("train.json", "held_out.json", "tokenizer.model", "params.json"):
        assert (tmp_path / "world" / name).read_bytes() == (DEMO / name).read_bytes(), name
    page = (DEMO / "make.py").read_text()
    flags = page.split("python train.py ")[1].split("\n    python -c")[0].replace("\\\\", "")
    python(tmp_path, ROOT / "train.py", *flags.split(), "--max-steps", "300")
    rows = metrics(tmp_path / "base")
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    code = page.split('python -c "')[1].split('"\n')[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    made = tmp_path / "demo/consolidated.00.pth"
    assert made.stat().st_size == (DEMO / "consolidated.00.pth").stat().st_size
    model, tokenizer = load_checkpoint(tmp_path / "base")
    assert len(answers(model.eval(), tokenizer, command.INSTRUCTIONS[:1])[0]) > 3
