"""The plan of the house: who may import whom and how long things may be.

    pytest -m house

Plain `pytest` leaves these out, so that nobody's edit turns red for a line count.
"""

import ast
import re
import subprocess
import sys

import pytest

from .helpers import ROOMS, ROOT, shipped

pytestmark = pytest.mark.house

STANDARD = set(sys.stdlib_module_names)
MAY_IMPORT = {  # {beginning of a file's path: packages that it may import}
    "llama/": {"llama", "torch", "sentencepiece", "numpy"},
    "lora/": {"lora", "torch"},
    "finetune/": {"finetune", "llama", "lora", "torch", "sentencepiece", "numpy"},
    "train.py": {"finetune", "llama", "lora", "torch", "sentencepiece", "numpy"},
    "generate.py": {"finetune", "llama", "lora", "torch", "sentencepiece", "numpy"},
    "benchmarks/": {"train", "generate", *ROOMS, "torch", "sentencepiece", "numpy"},
    "llama/model.py": {"torch"},
}
OPTIONAL = {"llama/": {"safetensors"}, "finetune/": {"matplotlib", "PIL"}}  # below the top alone
CORE = ("llama/model.py", "lora/layers.py", "lora/lora_layer.py", "train.py")


def tree(path):
    return ast.parse((ROOT / path).read_text())


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def n_lines(node):
    return node.end_lineno - node.lineno + 1


def imported(node, path):
    """Return the packages that a node imports, a relative import as the file's own room."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {path.partition("/")[0]} if node.level else {node.module.partition(".")[0]}
    return set()


def new_modules(first, code):
    """Return the packages that `code` brings into a fresh interpreter which has `first` already."""
    before = f"import sys, {', '.join(first)}\nbefore = set(sys.modules)"
    script = f"{before}\n{code}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


# --- who imports whom


@pytest.mark.parametrize("path", shipped())
def test_a_file_imports_what_its_room_may(path):
    """At the top of a file, or anywhere else; optional packages only where they are used."""
    allowed = [packages for start, packages in MAY_IMPORT.items() if path.startswith(start)]
    optional = [packages for start, packages in OPTIONAL.items() if path.startswith(start)]
    allowed = STANDARD.union(set.intersection(*allowed))
    parsed = tree(path)
    for node in ast.walk(parsed):
        at_the_top = node in parsed.body
        wrong = imported(node, path) - allowed.union(*() if at_the_top else optional)
        assert not wrong, f"{path}:{node.lineno} imports {', '.join(wrong)}"


@pytest.mark.parametrize(
    "room, knows",
    [("llama", {"llama"}), ("lora", {"lora"}), ("finetune", {"finetune", "llama", "lora"})],
)
def test_a_room_in_a_fresh_interpreter(room, knows):
    """All its modules are imported, and with them neither another room nor an optional package."""
    modules = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in shipped(room)
    ]
    others = {*ROOMS, "train", "generate"}.union(*OPTIONAL.values()) - knows
    assert not new_modules(["torch"], f"import {', '.join(modules)}") & others


def test_the_model_alone_needs_torch_alone():
    """Without the package around it: whoever copies this one file has a LLaMA that runs."""
    code = """import runpy
model = runpy.run_path('llama/model.py', run_name='model')
args = model['ModelArgs'](dim=8, n_layers=1, n_heads=1, vocab_size=9)
model['Transformer'](args)(torch.zeros(1, 2, dtype=torch.long))"""
    assert new_modules(["torch"], code) - STANDARD <= {"torch"}


def test_no_file_is_a_bag():
    assert not [path for path in shipped() if re.search(r"(util|helper)s?\.py$", path)]


def test_no_framework_in_what_is_shipped():
    for path in shipped():
        frameworks = r"^\s*(import|from) (transformers|peft|litgpt|accelerate|lightning|datasets)\b"
        assert not re.search(frameworks, (ROOT / path).read_text(), re.M), path


# --- how long things may be


@pytest.mark.parametrize("path", shipped("llama", "finetune"))
def test_a_file_is_read_in_one_sitting(path):
    assert len((ROOT / path).read_text().splitlines()) <= 500


def test_each_method_is_a_page():
    for path in (ROOT / "lora/methods").glob("*.py"):
        if path.name != "__init__.py":
            assert 20 <= len(path.read_text().splitlines()) <= 95, path


def n_statements(path):
    """Docstrings included, so that width buys nothing."""
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree(path)))


def test_the_core_is_444_statements_and_what_makes_a_job_144():
    counts = {path: n_statements(path) for path in CORE}
    assert sum(counts.values()) <= 444, counts
    assert n_statements("finetune/job.py") <= 144


def test_the_step_loop_is_60_lines():
    """The loop over steps in `train`, and `accumulate_gradients`, which a step calls."""
    named = {function.name: function for function in functions("train.py")}
    assert {"train", "accumulate_gradients"} <= named.keys()
    loops = [n for n in ast.walk(named["train"]) if isinstance(n, ast.For | ast.While)]
    counts = n_lines(max(loops, key=n_lines)), n_lines(named["accumulate_gradients"])
    assert sum(counts) <= 60, counts


@pytest.mark.parametrize("path", shipped())
def test_a_function_is_60_lines(path):
    for function in functions(path):
        assert n_lines(function) <= 60, f"{path}: {function.name} has {n_lines(function)} lines"


def test_train_has_48_flags():
    """As its own help lists them: a switch with its --no- form is one."""
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", done.stdout, re.M)
    assert len([flag for flag in flags if flag != "--help"]) == 48
