"""README.md: its commands parse, its symbols and tests are true, its two commands are what CI runs."""
import ast
import re
import shlex

import pytest

from benchmarks import __main__ as benchmark
import generate
import train
from finetune import convert
from finetune.dataset import read_examples

from .conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)).replace("\\\n", " ")


def commands(program):
    return [line.split(program, 1)[1].split("#")[0].split("&&")[0].split(" > ")[0] for line in BLOCKS.splitlines()
            if re.match(rf"(pip install \S+ \S+ && )?(python|torchrun [^|]*?) ?{program}", line)]


@pytest.mark.parametrize("program, parse", [("train.py", train.parse_args), ("generate.py", generate.parse_args),
                                            ("-m finetune.convert", convert.parse_args), ("-m benchmarks", benchmark.parse_args)])
def test_every_command_parses(program, parse):
    assert len(commands(program)) >= 2
    for command in commands(program):
        parse(shlex.split(command))


def test_ci_runs_the_two_commands_of_the_first_screen():
    ci = (ROOT / ".ci/run").read_text()
    for command in ("pip install -r requirements.txt && python train.py --layers 1", "pip install -r requirements.txt && pytest"):
        assert command in README[:3500] and command in ci


def defined(path):
    """Names of a file's functions, classes and values, and CLASS.METHOD."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        names |= {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)} | {getattr(node, "name", None)}
        names |= {f"{node.name}.{inner.name}" for inner in getattr(node, "body", ()) if isinstance(node, ast.ClassDef) and hasattr(inner, "name")}
    return names


def test_symbols_are_where_the_readme_says():
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
    assert len(named) >= 30
    for path, symbol in named:
        assert symbol in defined(path), (path, symbol)


def test_the_tour_leads_from_equations_to_lines_to_tests():
    """Every row has a formula or says what it is, a place, and a test that is there; formulas are what GitHub renders: no |,
    no backslash before and no bracket with an underscore behind, which Markdown would take for its own."""
    table = re.search(r"^## From equation to line\n.*?\n\|---.*?\n(.*?)\n\n", README, re.M | re.S)[1].splitlines()
    rows = [re.fullmatch(r"\| (.+?) \| (.+?) \| `[\w/]+\.py:[\w.]+` \| `(tests/test_\w+\.py)::(test_\w+)` \|", line) for line in table]
    assert all(rows) and len(rows) >= 30
    for _, equation, path, test in (row.groups() for row in rows):
        assert test in defined(path), (path, test)
        assert equation.count("$") % 2 == 0 and equation.count("{") == equation.count("}"), equation
        assert not re.search(r"\\[^a-zA-Z]|[)}\]]_|\|", equation), equation


def test_the_table_of_traps_is_what_the_tests_say():
    """Each row is a test's docstring: its sentence, its link, its name."""
    rows = re.findall(r"^\| (.+?) \| \[\S+\]\((\S+)\) \| `test_(\w+)` \|$", README, re.M)
    docs = re.findall(r'^def test_(\w+)\(.*?\):\n    """(.*?)\n    (https://\S+)"""$', (ROOT / "tests/test_traps.py").read_text(), re.M | re.S)
    assert rows == [(" ".join(sentence.split()), link, name) for name, sentence, link in docs] and len(rows) > 50


def test_pictures_are_there_and_small():
    short_path = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert short_path and {ROOT / path for path in short_path} == set((ROOT / "docs/pictures").iterdir())
    assert all((ROOT / path).stat().st_size < 80_000 for path in short_path)


def test_requirements_are_four_and_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in lines] == ["torch", "sentencepiece", "numpy", "pytest"] and all("==" in l for l in lines)


def test_the_library_snippet_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {})
    assert capsys.readouterr().out == "1.0\n"


def test_the_conversion_of_cola_runs(tmp_path, monkeypatch):
    """Four columns: source, label, the author's own mark, sentence, which may hold quotes; no header."""
    for part, lines in ("train", ["gj04\t1\t\tThe sailors rode the breeze.", 'ks08\t0\t*\t"Me saw," he said.']), ("dev", ["c_13\t1\t\tÉmile ran."]):
        (tmp_path / f"in_domain_{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["-", "."])
    exec(re.search(r"<<'END'\n(.*?)^END", README, re.S | re.M)[1], {})
    asked = "Is this sentence grammatical English? Answer yes or no."
    assert read_examples("cola_train.json") == [
        {"instruction": asked, "input": "The sailors rode the breeze.", "output": "yes"},
        {"instruction": asked, "input": '"Me saw," he said.', "output": "no"}]
    assert read_examples("cola_dev.json") == [{"instruction": asked, "input": "Émile ran.", "output": "yes"}]
