"""The embedded default: what `python train.py` and `python generate.py` promise on a fresh clone, without a network.

    pytest -s tests/test_demo.py        prints the accuracy on held-out examples, base against base + adapter
"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate as command
from llama import load_checkpoint
from finetune.dataset import encode_prompt, read_examples
from llama.sampling import generate
from lora import load_adapter, lora_disabled

from .helpers import ONE_THREAD, ROOT, metrics

DEMO = ROOT / "finetune" / "demo"


def python(folder, *command):
    # One thread is nearly as fast for this, and two wait for each other on a busy machine.
    return subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True, text=True, env=ONE_THREAD).stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, printed lines, rows of metrics, seconds) of `python train.py` with no argument."""
    folder, began = tmp_path_factory.mktemp("demo"), time.perf_counter()
    printed = python(folder, ROOT / "train.py")
    rows = metrics(folder / "out")
    return folder, printed, rows, time.perf_counter() - began


def fifths(rows):
    """Mean loss over the last fifth of the steps by that over the first."""
    n = max(1, len(rows) // 5)
    return sum(row["loss"] for row in rows[-n:]) / sum(row["loss"] for row in rows[:n])


def answers(model, tokenizer, examples):
    ids = [[] for _ in examples]
    for i, token in generate(model, [encode_prompt(example, tokenizer) for example in examples], 16, tokenizer.eos_id):
        ids[i].append(token)
    return [tokenizer.decode(answer).strip() for answer in ids]


def test_it_learns_in_under_a_minute_and_says_where_the_adapter_is(trained):
    folder, printed, rows, seconds = trained
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    before = float(printed.split("before    held-out loss ")[1].split()[0])
    assert seconds < 60
    assert fifths(rows) < 0.7 and held_out[-1] < 0.7 * before
    assert "saved     out/adapter.pt" in printed and (folder / "out/adapter.pt").is_file()


def test_the_adapter_answers_what_the_base_does_not(trained):
    """The base knows its small world as prose and writes prose whatever it is asked; instruction tuning makes it
    answer, also about words and sentences that it was never asked about.  Right means right to the letter."""
    model, tokenizer = load_checkpoint(DEMO)
    load_adapter(model.eval(), trained[0] / "out/adapter.pt")
    examples = read_examples(DEMO / "held_out.json")
    with lora_disabled(model):
        base = answers(model, tokenizer, examples)
    adapted = answers(model, tokenizer, examples)
    right = [sum(answer == example["output"] for answer, example in zip(said, examples)) for said in (base, adapted)]
    print(f"\nheld-out answers exactly right: base {right[0]} of {len(examples)}, base + adapter {right[1]} of {len(examples)}")
    assert right[0] <= 0.05 * len(examples) and right[1] >= 0.7 * len(examples)


def test_the_adapter_feels_what_the_base_does_not(trained, monkeypatch, capsys):
    """Happy or sad, about sentences that neither has seen: chance by the base's likelihoods, and what it writes is no answer."""
    monkeypatch.chdir(trained[0])
    feelings = [example for example in read_examples(DEMO / "held_out.json") if example.get("input") and example["output"] in ("happy", "sad")]
    Path("feelings.json").write_text(json.dumps(feelings))
    capsys.readouterr()
    command.main(["--data", "feelings.json", "--score"])
    found = json.loads(capsys.readouterr().out)
    base, adapter, difference = (found[name] for name in ("base", "adapter", "difference"))
    print(f"\nhappy or sad, {len(feelings)} sentences: accuracy {base['accuracy'][0]:.0%} by the base, {adapter['accuracy'][0]:.0%} "
          f"with the adapter (difference {difference['accuracy'][1]:.0%} to {difference['accuracy'][2]:.0%}); majority {found['majority']['accuracy']:.0%}")
    assert len(feelings) == 20 and base["accuracy"][0] <= 0.7 and adapter["accuracy"][0] >= 0.9
    assert difference["accuracy"][1] > 0 and difference["mcc"][1] > 0 and difference["loss"][2] < 0
    assert base["exact_match"][0] == 0 and adapter["exact_match"][0] >= 0.9


def test_generate_shows_it(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])

    def said(*flags):
        command.main(list(flags))
        return capsys.readouterr().out
    with_adapter, base = said(), said("--adapter", "none")
    assert with_adapter != base and with_adapter.count("###") == base.count("###") >= 4
    assert with_adapter == said("--merge") == python(trained[0], ROOT / "generate.py")


def test_one_layer_is_enough_to_debug_with(tmp_path, monkeypatch, capsys):
    printed = python(tmp_path, ROOT / "train.py", "--layers", "1", "--epochs", "2")
    rows = metrics(tmp_path / "out")
    assert fifths(rows) < 0.7 and "saved     out/adapter.pt" in printed
    monkeypatch.chdir(tmp_path)
    command.main([])
    assert capsys.readouterr().out.count("###") >= 4


def test_held_out_examples_are_not_among_the_training_examples():
    """Nor is a question that differs by its wording alone: what is held out is a word or a sentence."""
    training, held_out = ({(e["instruction"], e.get("input", "")) for e in read_examples(DEMO / name)}
                          for name in ("train.json", "held_out.json"))
    assert not training & held_out and 400 <= len(training) <= 1000 and 100 <= len(held_out) <= 300
    assert all((e["instruction"], e.get("input", "")) in held_out for e in command.INSTRUCTIONS)


@pytest.mark.slow
def test_the_documented_commands_make_the_demo_again(tmp_path):
    """The same data and tokenizer to the byte; a tenth of the base's training is enough to see it learn."""
    subprocess.run([sys.executable, "-m", "finetune.demo.make", tmp_path / "world"], cwd=ROOT, check=True)
    for name in ("train.json", "held_out.json", "tokenizer.model", "params.json"):
        assert (tmp_path / "world" / name).read_bytes() == (DEMO / name).read_bytes(), name
    flags = (DEMO / "make.py").read_text().split("python train.py ")[1].split("\n    python -c")[0].replace("\\\\", "").split()
    python(tmp_path, ROOT / "train.py", *flags, "--max-steps", "300")
    rows = metrics(tmp_path / "base")
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    code = (DEMO / "make.py").read_text().split('python -c "')[1].split('"\n')[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (tmp_path / "demo/consolidated.00.pth").stat().st_size == (DEMO / "consolidated.00.pth").stat().st_size
    model, tokenizer = load_checkpoint(tmp_path / "base")
    assert len(answers(model.eval(), tokenizer, command.INSTRUCTIONS[:1])[0]) > 3


def test_making_the_demo_wants_a_folder():
    done = subprocess.run([sys.executable, "-m", "finetune.demo.make"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "usage: python -m finetune.demo.make DIR\n"
