"""README.md and docs/*.md: commands parse, links resolve, what is named exists, snippets run."""
import ast
import importlib.util
import re
import shlex

import pytest

import generate
import train
from benchmarks import __main__ as benchmark
from benchmarks import front
from finetune import convert
from finetune.examples import read_examples
from finetune.options import parse_options

from .helpers import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
RECIPES = "docs/changing-it.md"    # tests/test_changing_it.py runs its commands in a changed tree.
PARSERS = {
    "train.py": parse_options,
    "generate.py": generate.parse_args,
    "-m finetune.convert": convert.parse_args,
    "-m benchmarks": benchmark.parse_args,
}
COMMAND = re.compile(r"(python|pytest|torchrun|pip) ")
READ = ("checkpoint", "data", "val_data", "adapter", "teacher", "teacher_adapter", "source")
WRITTEN = ("out", "target")


def blocks(page):
    """Return the code blocks of a page, each as its lines with continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", page, re.M | re.S)
    return [block.replace("\\\n", " ").splitlines() for block in found]


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)


def paragraphs(page):
    """Return the paragraphs, list items and table rows of a page, without its code blocks."""
    parts = re.split(r"\n\s*\n|\n(?=[|-])", without_blocks(page))
    return [part.replace("\n", " ") for part in parts]


def inline_code(page):
    """Return [(code, the paragraph it stands in)] of a page."""
    spans = []
    for paragraph in paragraphs(page):
        for code in re.findall(r"`([^`]+)`", paragraph):
            spans.append((re.sub(r"\s+", " ", code), paragraph))
    return spans


def commands(page):
    """Return [(command, what stands beside it)] of a page: lines of code blocks and inline code."""
    listed = []
    for block in blocks(page):
        for line in block:
            if COMMAND.match(line):
                listed.append((line.split("#")[0].strip(), "\n".join(block)))
    listed += [(code, beside) for code, beside in inline_code(page) if COMMAND.match(code)]
    return listed


def split_command(command):
    """Return (program, arguments) of a command that one of PARSERS reads, else (None, None)."""
    command = command.split(" > ")[0].split("<<")[0]
    for program in PARSERS:
        match = re.fullmatch(rf"(?:.*&& )?(?:python|torchrun .*--) {program}(?: (.*))?", command)
        if match:
            return program, shlex.split(match[1] or "")
    return None, None


def defined(path):
    """Return the names of a file's functions, classes and values, and CLASS.METHOD."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        for target in getattr(node, "targets", ()):
            if isinstance(target, ast.Name):
                names.add(target.id)
        names.add(getattr(node, "name", None))
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                names.add(f"{node.name}.{getattr(inner, 'name', None)}")
    return names


def anchors(page):
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_known(path, written):
    """Whether a reader has the file or folder: from this tree, or written by a command before."""
    path = str(path)
    if path == "none" or path.isupper() or (ROOT / path).exists():
        return True
    return any(path == folder or path.startswith(folder + "/") for folder in written)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses_and_says_what_it_needs(page):
    """A command of ours parses; where it reads what a reader may lack, "needs" stands beside it."""
    written = {"out"}
    for command, beside in commands(PAGES[page]):
        made = re.fullmatch(r"python -m finetune\.demo\.make (\S+)", command)
        if made:
            written.add(made[1])
        program, arguments = split_command(command)
        if program is None or page == RECIPES:
            continue
        args = PARSERS[program](arguments)
        for name in READ:
            paths = getattr(args, name, None) or ()
            for path in (paths,) if isinstance(paths, str) else paths:
                assert is_known(path, written) or "needs" in beside, (command, path)
        for name in WRITTEN:
            if getattr(args, name, None):
                written.add(str(getattr(args, name)))


def test_each_program_has_its_commands():
    programs = []
    for page in PAGES.values():
        programs += [split_command(command)[0] for command, _ in commands(page)]
    for program in PARSERS:
        assert programs.count(program) >= 4, program


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_name_what_is_there(page):
    """pytest's files and words, Python's modules, and pip's lists."""
    for command, _ in commands(PAGES[page]):
        for module in re.findall(r"python -m ([\w.]+)", command):
            assert importlib.util.find_spec(module), command
        for path in re.findall(r"pip install -r (\S+)", command):
            assert (ROOT / path).is_file(), command
        for path, word in re.findall(r"(tests/\w+\.py)(?: -k (\w+))?", command):
            tests = [name for name in defined(path) if name and name.startswith("test")]
            assert [name for name in tests if word in name], command


def test_ci_runs_the_two_commands_of_the_first_screen():
    ci = (ROOT / ".ci/run").read_text()
    install = "pip install -r requirements.txt && "
    for command in (install + "python train.py --layers 1", install + "pytest"):
        assert command in README[:1500] and command in ci


def test_the_first_screen_is_what_the_command_prints(monkeypatch, capsys):
    """The lines that no machine changes, from a run that stops before its first step."""
    monkeypatch.chdir(ROOT)
    train.main(["--layers", "1", "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    shown = [line for line in README.splitlines() if re.match(r"(base|data|lora|steps) {4}", line)]
    assert len(shown) == 4
    for line in shown:
        assert line in printed


@pytest.mark.parametrize("page", PAGES)
def test_files_symbols_and_tests_are_there(page):
    new = set(re.findall(r"^`([\w/.]+)`, a new file:", PAGES[page], re.M))
    for code, _ in inline_code(PAGES[page]):
        named = re.fullmatch(r"([\w/]+\.py)(?:::?([\w.]+))?", code)
        if named and named[1] not in new:
            path, symbol = named.groups()
            assert (ROOT / path).is_file(), path
            assert not symbol or symbol in defined(path), (path, symbol)
        if re.fullmatch(r"[\w/]+/", code) and code != "out/":
            assert (ROOT / code).is_dir(), code


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(PAGES[page])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(PAGES[str(target.relative_to(ROOT))]), link


def test_the_readme_leads_to_every_page():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README.split("## All pages")[1], page


def test_the_tour_leads_from_equations_to_lines_to_tests():
    """Every row has a formula or says what it is, a place, and a test.

    Formulas are what GitHub renders: no |, no backslash before and no bracket with an underscore
    behind, which Markdown would take for its own.
    """
    tour = re.search(r"^\| idea \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGES["docs/equations.md"], re.M)
    where = r"`[\w/]+\.py:[\w.]+`"
    test = r"`tests/test_\w+\.py::test_\w+`"
    row = re.compile(rf"\| (.+?) \| (.+?) \| {where} \| {test} \|")
    rows = [row.fullmatch(line) for line in tour[1].splitlines()]
    assert all(rows) and len(rows) >= 30
    for _, equation in (match.groups() for match in rows):
        assert equation.count("$") % 2 == 0 and equation.count("{") == equation.count("}"), equation
        assert not re.search(r"\\[^a-zA-Z]|[)}\]]_|\|", equation), equation


def rows_of_traps():
    """Return [(sentence, test)] of tests/test_traps.py's docstrings."""
    code = (ROOT / "tests/test_traps.py").read_text(encoding="utf-8")
    docstring = r'^def test_(\w+)\([^\n]*\):\n    """(.*?)"""$'
    rows = []
    for name, sentence in re.findall(docstring, code, re.M | re.S):
        rows.append((" ".join(sentence.split()), f"`test_{name}`"))
    return rows


def test_the_table_of_traps_is_what_the_tests_say():
    row = r"^\| (.+?) \| \[\S+\]\(https://\S+\) \| (`test_\w+`) \|$"
    rows = re.findall(row, PAGES["docs/traps.md"], re.M)
    assert rows == rows_of_traps() and len(rows) > 50
    assert f"| {len(rows)} known traps" in README


def test_results_are_those_of_the_pages_they_link_to():
    results = README.split("## Results\n")[1].split("\n## ")[0]
    for line in results.split("\n- "):
        page = PAGES[re.search(r"\]\((docs/[\w-]+\.md)", line)[1]]
        for number in re.findall(r"\d[\d,.]*\d", line.partition("[")[0]):
            assert number in page, (number, line)


def test_pictures_are_there_and_small():
    shown = set()
    for page, text in PAGES.items():
        for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            shown.add(((ROOT / page).parent / path).resolve())
    assert shown == set((ROOT / "docs/pictures").iterdir())
    for path in shown:
        assert path.stat().st_size < 80_000, path


def test_the_front_picture_reads_the_table_of_peers():
    peers = front.beside_peers(PAGES["docs/performance.md"])
    assert peers[0] == ("bf16", 1.94, 0.63) and len({name for name, _, _ in peers}) == 7
    with pytest.raises(ValueError, match="no table of training"):
        front.beside_peers(README)


def test_the_front_picture_names_the_machine_of_the_peers_figures():
    machine = front.machine_of_peers(PAGES["docs/performance.md"])
    assert machine == "two cores of an AMD EPYC (Linux, torch 2.13.0, CPU)"
    with pytest.raises(ValueError, match="from which machine"):
        front.machine_of_peers(README)


def test_requirements_are_four_and_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = [line.partition("==")[0] for line in lines]
    assert names == ["torch", "sentencepiece", "numpy", "pytest"]
    assert all("==" in line for line in lines)


def test_the_library_snippet_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "finetune").symlink_to(ROOT / "finetune")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {})
    assert capsys.readouterr().out == "1.0\n"


def test_the_conversion_of_cola_runs(tmp_path, monkeypatch):
    """Four columns: source, label, author's mark, sentence.  No header; quotes are text."""
    parts = {
        "train": ["gj04\t1\t\tThe sailors rode the breeze.", 'ks08\t0\t*\t"Me saw," he said.'],
        "dev": ["c_13\t1\t\tÉmile ran."],
    }
    for part, lines in parts.items():
        path = tmp_path / f"in_domain_{part}.tsv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["-", "."])
    exec(re.search(r"<<'END'\n(.*?)^END", PAGES["docs/evaluation.md"], re.S | re.M)[1], {})
    asked = "Is this sentence grammatical English? Answer yes or no."
    assert read_examples("cola_train.json") == [
        {"instruction": asked, "input": "The sailors rode the breeze.", "output": "yes"},
        {"instruction": asked, "input": '"Me saw," he said.', "output": "no"}]
    assert read_examples("cola_dev.json") == [
        {"instruction": asked, "input": "Émile ran.", "output": "yes"}]
