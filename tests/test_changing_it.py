"""docs/changing-it.md: each recipe, applied to a copy of the tree, trains and does what it says.

The recipes run with `pytest -m slow tests/test_changing_it.py`.
"""
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from .helpers import ONE_THREAD, ROOT, adapter_tensors, metrics

PAGE = (ROOT / "docs/changing-it.md").read_text(encoding="utf-8")
SHIPPED = ("train.py", "generate.py", "llama", "lora", "finetune")
NEW_FILE = re.compile(r"^`(\S+)`, a new file:\n\n```python\n(.*?)^```", re.M | re.S)
DIFF = re.compile(r"^```diff\n--- a/(\S+)\n\+\+\+ .*?\n(.*?)^```", re.M | re.S)


def recipes():
    """Return {title: text} of the page's sections that change something."""
    parts = re.split(r"^##+ (.+)$", PAGE, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {title: text for title, text in sections.items() if "```diff\n" in text}


RECIPES = recipes()


def copy_tree(folder):
    """Copy what is shipped to `folder`, without caches."""
    folder.mkdir()
    caches = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=caches)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def apply(recipe, folder):
    """Write the recipe's new files, and replace what its diffs replace: each must be there once."""
    for path, code in NEW_FILE.findall(recipe):
        assert not (folder / path).exists(), path
        (folder / path).write_text(code, encoding="utf-8")
    for path, hunks in DIFF.findall(recipe):
        changed = (folder / path).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@\n", hunks, flags=re.M)[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] != "+")
            after = "".join(line[1:] for line in lines if line[0] != "-")
            times = changed.count(before)
            assert times == 1, f"{path} holds this {times} times:\n{before}"
            changed = changed.replace(before, after)
        (folder / path).write_text(changed, encoding="utf-8")


def run(folder, command):
    """Return what a command of the page prints, run in `folder`."""
    words = shlex.split(command)
    assert words[0] == "python"
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True,
                          env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return done.stdout


def optimizer_groups(folder):
    """Return the parameter groups of the optimizer in the run's last save."""
    state = torch.load(folder / "out/state.pt", weights_only=True)
    return state["parts"]["optimizer"]["param_groups"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(rows of metrics.jsonl, printed text) of the same two steps in an unchanged tree."""
    folder = copy_tree(tmp_path_factory.mktemp("plain") / "tree")
    printed = run(folder, "python train.py --layers 1 --max-steps 2")
    return metrics(folder / "out"), printed


def losses(rows):
    return [row["loss"] for row in rows]


def before_training(printed):
    """Return the printed line of the held-out loss before the first step."""
    return re.search(r"^before .*", printed, re.M)[0]


def changed_method(folder, rows, printed, plain_rows, plain_printed):
    tensors = adapter_tensors(folder / "out")
    assert all(name.endswith("lora_l") for name in tensors) and len(tensors) == 2
    assert losses(rows)[0] == losses(plain_rows)[0]             # Both begin as the base.
    assert losses(rows)[1] != losses(plain_rows)[1]


def changed_prompt(folder, rows, printed, plain_rows, plain_printed):
    assert rows[0]["answer_tokens"] == plain_rows[0]["answer_tokens"]
    assert rows[0]["tokens"] != plain_rows[0]["tokens"]
    content = torch.load(folder / "out/adapter.pt", weights_only=True)
    assert content["base"]["template"] == "vicuna"


def changed_to_sgd(folder, rows, printed, plain_rows, plain_printed):
    assert losses(rows)[0] == losses(plain_rows)[0] and losses(rows)[1] != losses(plain_rows)[1]
    assert optimizer_groups(folder)[0]["momentum"] == 0.9


def changed_to_muon(folder, rows, printed, plain_rows, plain_printed):
    assert losses(rows)[0] == losses(plain_rows)[0] and losses(rows)[1] != losses(plain_rows)[1]
    assert optimizer_groups(folder)[0]["ns_steps"] == 5


def changed_logger(folder, rows, printed, plain_rows, plain_printed):
    logged = (folder / "out/loss.csv").read_text(encoding="utf-8").splitlines()
    assert logged == [f"{row['step']},{row['loss']}" for row in rows]
    assert losses(rows) == losses(plain_rows)


def changed_loss(folder, rows, printed, plain_rows, plain_printed):
    assert losses(rows)[0] != losses(plain_rows)[0]
    assert before_training(printed) == before_training(plain_printed)    # Held-out loss stays.


EFFECTS = {
    "Another LoRA method": changed_method,
    "Another template": changed_prompt,
    "SGD with momentum": changed_to_sgd,
    "Muon": changed_to_muon,
    "Another logger": changed_logger,
    "Another loss": changed_loss,
}


def test_the_page_has_these_recipes():
    assert RECIPES.keys() == EFFECTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_works_in_a_copy_of_the_tree(title, tmp_path, plain):
    folder = copy_tree(tmp_path / "tree")
    apply(RECIPES[title], folder)
    commands = re.findall(r"^python .+$", RECIPES[title], re.M)
    assert commands[0].startswith("python train.py --layers 1 --max-steps 2")
    printed = "".join(run(folder, command) for command in commands)
    rows = metrics(folder / "out")
    assert len(rows) == 2
    EFFECTS[title](folder, rows, printed, *plain)
