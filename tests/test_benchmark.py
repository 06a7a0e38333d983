"""benchmarks/: what the published figures rest on: what is measured, saved, continued, compared.

pytest -m slow tests/test_benchmark.py makes each table at a tiny size.
"""
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import (ablation, distill, measure, methods, peers, ranks, roofline, runs, search,
                        study, sweep, tables)
from benchmarks.request import Request
from finetune import convert
from finetune.batches import pack
from finetune.dataset import count_answer
from finetune.options import parse_options
from llama import ModelArgs
from lora import LoRAConfig, add_lora

from .helpers import ROOT, tiny

MIB = 2 ** 20
NO_AUTOCAST = contextlib.nullcontext()


@pytest.fixture
def table(tmp_path):
    return tables.Table("tried", tmp_path, "here", "`this`")


def saved_cells(path):
    return json.loads(path.read_text())["cells"]


def rows_in(lines, first):
    """Return the cells of a table's rows whose first column is `first`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [row for row in rows if row and row[0] == first]


def make(name, out, *flags):
    """Return the lines of a table of these flags, measured under conditions that stay the same."""
    args = benchmark.parse_args([name, "--out", str(out), *flags])
    return benchmark.PAGES[name].make(args, tables.Table(name, out, "here", "`this`"))


# Cells: saved, continued, and measured again where they would differ


def test_a_cell_is_measured_once_for_its_settings_and_conditions(table):
    """A killed table goes on; JSON does not know tuples."""
    measured = []

    def cell(table, settings, value):
        def compute():
            if value == "killed":
                raise KeyboardInterrupt
            measured.append(value)
            return value

        return table.cell(settings, compute)

    assert cell(table, {"n": 1, "flags": ("a",)}, 1) == 1
    with pytest.raises(KeyboardInterrupt):
        cell(table, {"n": 2, "flags": ["a"]}, "killed")
    assert cell(table, {"n": 1, "flags": ["a"]}, 2) == 1
    assert cell(table, {"n": 2, "flags": ["a"]}, 3) == 3
    assert cell(replace(table, conditions="elsewhere"), {"n": 1, "flags": ["a"]}, 4) == 4
    saved = saved_cells(table.out / "tried.json")
    assert [cell["result"] for cell in saved] == measured == [1, 3, 4]
    assert saved[0]["command"] == "`this`"


def test_figures_depend_on_all_code_that_runs_and_on_page_and_examples(tmp_path, monkeypatch):
    hashed = set()
    for pattern in tables.CODE:
        hashed |= set(ROOT.glob(pattern))
    for name, module in sys.modules.items():
        is_ours = name.partition(".")[0] in ("train", "generate", "llama", "lora", "finetune")
        if is_ours and module.__file__:              # finetune.demo is a folder without one.
            assert Path(module.__file__) in hashed
    data = tmp_path / "data.json"
    args = benchmark.parse_args(["methods", "--data", str(data)])
    conditions = []
    for content in ("first", "second", "first"):
        data.write_text(content)
        conditions.append(benchmark.make_table(args, methods, []).conditions)
    assert conditions[0] == conditions[2] != conditions[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_text("what stands beside it")
    assert benchmark.make_table(args, methods, []).conditions == conditions[2]
    assert benchmark.make_table(args, search, []).conditions != conditions[2]


@pytest.mark.parametrize("name", ["adapter.pt", "peft"])
def test_figures_depend_on_the_content_of_an_adapter(tmp_path, name):
    """A teacher that was trained again is another one; PEFT's adapter is a folder."""
    path = tmp_path / name
    file = path
    if name == "peft":
        path.mkdir()
        file = path / "adapter_config.json"
    args = benchmark.parse_args(["distill", "--checkpoint", "base", "--adapter", str(path)])
    conditions = []
    for content in ("first", "second"):
        file.write_text(content)
        conditions.append(benchmark.make_table(args, distill, []).conditions)
    assert conditions[0] != conditions[1]


def test_no_cell_sets_the_next_ones_limits(table, monkeypatch):
    """A plan sets oneDNN's in the environment, which each process takes from its parent."""
    monkeypatch.setattr(runs, "run_fresh", lambda function, *_: {"estimate": function.__name__})
    monkeypatch.setattr(runs, "try_fresh", lambda function, *_: {"measured": function.__name__})
    workload = runs.Workload([], None, warm=0, steps=1, repeats=1)
    assert runs.measure_cell(table, "cell", workload) == {
        "estimate": "estimate_costs", "measured": "measure_run"}


# Memory


@pytest.mark.skipif(not measure.RESET_MARK.exists(), reason="there is no high-water mark to reset")
def test_peaks_belong_to_their_phase():
    peaks = measure.Peaks(torch.device("cpu"))
    peaks.end("before")
    torch.ones(2 ** 25).sum()                        # 128 MiB
    peaks.end("large")
    peaks.end("after")
    assert set(peaks.mib) == {"before", "large", "after", "process"}
    assert peaks.mib["large"] - peaks.mib["before"] > 100
    assert peaks.mib["large"] - peaks.mib["after"] > 100
    torch.ones(2 ** 26).sum()
    peaks.end(None)                                  # It belongs to no phase, but to the process.
    assert peaks.mib["process"] > peaks.mib["large"] + 100


# Bytes and FLOP

ROWS = [([1, 5, 6, 7, 8, 9, 2], [-100] * 4 + [8, 9, 2]), ([1, 4, 2], [-100, -100, 2])]


def flop_by_hand(model):
    """Return a forward pass's FLOP: 2 per weight and token, and attention's two products."""
    args = model.args
    n = sum(len(tokens) for tokens, _ in ROWS)
    answers = sum(count_answer(labels) for _, labels in ROWS)
    squares = sum(len(tokens) ** 2 for tokens, _ in ROWS)
    attention = args.n_layers * 2 * 2 * squares * args.dim
    return 2 * n * measure.multiplied_weights(args, answers / n) + attention


def test_flop_counted_are_flop_by_hand():
    """Backward makes two products for each of forward's where everything is trained."""
    model = tiny(n_kv_heads=2)
    forward = flop_by_hand(model)
    work = measure.count_work(model, [pack(ROWS)], NO_AUTOCAST)
    assert work["forward"] == forward
    assert work["flop"] == 3 * forward
    two = measure.count_work(model, [pack(ROWS)] * 2, NO_AUTOCAST)
    assert two["forward"] == 2 * forward


def test_multiplied_weights_of_the_7b():
    """32 x (4 x 4096^2 + 3 x 4096 x 11008), and the output matrix for tokens that need it."""
    assert measure.multiplied_weights(ModelArgs(), 0) == 6_476_005_376
    assert measure.multiplied_weights(ModelArgs(), 1) == 6_476_005_376 + 4096 * 32000
    assert [measure.flop_per_token(10, full) for full in (False, True)] == [40, 60]
    assert measure.flop_per_token(10, checkpointing=True) == 60


def test_copies_under_autocast_are_counted_as_such():
    """2 bytes per weight of each matrix that a gradient passes: not what reads the embedding."""
    model = tiny()
    add_lora(model, LoRAConfig(r=2, dropout=0.0))
    assert measure.count_work(model, [pack(ROWS)], NO_AUTOCAST)["copies"] == 0
    work = measure.count_work(model, [pack(ROWS)], torch.autocast("cpu", torch.bfloat16))
    first = [f"layers.0.attention.{name}" for name in ("wq.", "wk.", "wv.")]
    n_copied = 0
    for name, weight in model.named_parameters():
        reads_embedding = name.startswith(tuple(first)) and not name.endswith("lora_B")
        if weight.dim() == 2 and name != "tok_embeddings.weight" and not reads_embedding:
            n_copied += weight.numel()
    assert work["copies"] == 2 * n_copied
    assert all(p.grad is None for p in model.parameters())


# Rows and steps


def test_random_rows_are_as_long_as_alpaca_s():
    """Alpaca's first 200 have 121 tokens on average with LLaMA's tokenizer, of which 56 answer."""
    rows = runs.random_rows(32000)
    assert rows == runs.random_rows(32000) and len(rows) == 200
    assert 105 < sum(len(tokens) for tokens, _ in rows) / 200 < 135
    assert 45 < sum(count_answer(labels) for _, labels in rows) / 200 < 65
    for tokens, labels in rows:
        n_prompt = labels.count(-100)
        assert (tokens[0], tokens[-1], len(tokens) <= 512) == (1, 2, True)
        assert labels == [-100] * n_prompt + tokens[n_prompt:]
    assert len({tuple(tokens[:29]) for tokens, _ in rows}) == 2  # the two preambles
    of_one_length = runs.random_rows(50, 64)
    assert {(len(row[0]), count_answer(row[1])) for row in of_one_length} == {(64, 32)}


def test_steps_take_the_rows_in_order_and_repeat_what_is_measured():
    workload = runs.Workload([], None, warm=1, steps=2, repeats=2)
    options = parse_options(["--batch-size", "1", "--accumulation-steps", "2"])
    plan = runs.plan_in_file_order(5, workload, options)
    measured = [[[[2], [3]]], [[[4], [0]]]]
    assert [batches for _, batches in plan] == [[[[0], [1]]], *measured, *measured]
    options = parse_options(["--batch-size", "2", "--accumulation-steps", "1"])
    _, batches = runs.plan_in_file_order(9, workload, options, n_ranks=2)[0]
    assert batches == [[[0, 1]], [[2, 3]]]


# What is made of results


def test_table_1_tells_what_changes_and_where_the_report_is_wrong():
    n_bytes = dict.fromkeys(["parameters", "gradients", "optimizer", "activations"], 40 * MIB)
    run = {"forward": 2e6, "flop": 6e6, "seconds": 1.0, "P": 10 ** 6, "peaks": {"process": 1.0},
           "bytes": n_bytes, "estimate": dict.fromkeys(["weights", *n_bytes, "logits"], 16 * MIB)}
    results = {ablation.FULL: run}
    for change in ablation.CHANGES.values():
        results[change.after] = run
    checkpointing = ablation.CHANGES["checkpointing"].after
    autocast = ablation.CHANGES["mixed precision (autocast)"].after
    results[checkpointing] = run | {"flop": 8e6, "seconds": 1.05}
    results[autocast] = run | {"bytes": n_bytes | {"parameters": 60 * MIB}}
    rows, differences = ablation.make_table_1(results)
    assert rows[1][6:] == ["6.0 → 8.0 ↑ (report ↑)", "1.00 → 1.05 –"]
    assert rows[2][1] == "40.0 → 60.0 ↑ **(report ↓)**"
    expected = "mixed precision, parameters: the report says ↓, here it is ↑"
    assert any(sentence.startswith(expected) for sentence in differences)


def test_out_of_memory_is_a_row(base, data, tmp_path, monkeypatch):
    def killed(function, *_):
        raise tables.OutOfMemory("killed")

    monkeypatch.setattr(tables, "run_fresh", killed)
    # The estimates, of which each would take a process of 4 s.
    monkeypatch.setattr(runs, "run_fresh", lambda function, *arguments: function(*arguments))
    lines = make("ablation", tmp_path, "--checkpoint", str(base), "--data", str(data), "--device",
                 "cpu")
    rows = [line for line in lines if line.startswith(("| full |", "| lora |"))]
    assert len(rows) == 20
    assert all(re.search(r"out of memory \| [\d.]+ \|", row) for row in rows)   # the estimate


def test_sides_are_compared_by_medians_and_ratios():
    def side(speeds, peaks, ids):
        return [{"tokens_per_second": speed, "peaks": {"process": peak}, "ids": ids}
                for speed, peak in zip(speeds, peaks, strict=True)]

    ours = side([30, 10, 20], [100, 120, 110], [1])
    theirs = side([10, 40, 5], [220, 200, 230], [1])
    header, row = peers.versus({"ours": ours, "transformers": theirs}, compares_text=True)
    assert header[3:] == ["MiB", "speed, ours / theirs", "memory, ours / theirs", "same text"]
    assert row == ["20.0", "110", "10.0", "220", "2.00", "0.50", "yes"]
    other_text = side([10], [200], [2])
    assert peers.versus({"ours": ours, "transformers": other_text}, True)[1][-1] == "no"
    out_of_memory = peers.versus({"ours": ours, "transformers": [{}]}, True)[1]
    assert out_of_memory == ["20.0", "110", "out of memory", "", "", "", ""]


# The peers

REQUEST = Request("transformers", "folder", False, None, "cpu", "fp32", 4, 1, 1)


@pytest.mark.parametrize("last_line, ending, expected", [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "exit 1", {}),
    ("", "kill -9 $$", {}),
    ("KeyError: 'rope_theta'", "exit 1", "transformers: KeyError: 'rope_theta'")])
def test_a_peer_that_fails_is_out_of_memory_or_says_why(tmp_path, last_line, ending, expected):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho Traceback >&2\necho \"{last_line}\" >&2\n{ending}\n")
    python.chmod(0o755)
    if expected == {}:
        assert peers.ask_peer(str(python), REQUEST, []) == {}
    else:
        with pytest.raises(ValueError, match=re.escape(expected) + "$"):
            peers.ask_peer(str(python), REQUEST, [])


def test_both_sides_do_the_same(base):
    """Layers, dropout and the number of tokens of a request are those of our own workload."""
    setup = runs.Setup(str(base), "checkpoint", 1, None, "cpu", "fp32", warm=2, steps=4, repeats=1)
    asked = []

    def ask(python, request, rows):
        asked.append((request, rows))

    pythons = {"transformers": ("python", "packages")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "ask_peer", ask)
        patch.setattr(peers, "try_fresh", lambda function, *arguments: arguments)
        comparison = peers.Comparison("bf16", 2, dropout=0.05, checkpointing=True)
        sides = peers.contestants_of(comparison, setup, 2, pythons, Path("out"))
        workload, = sides["ours"].measure()
        sides["transformers, padded"].measure()
    request, rows = asked[0]
    options = workload.options()
    assert rows == runs.rows_of(workload)
    assert (request.layers, request.dropout, request.precision, request.checkpointing) == (
        options.layers, options.dropout, options.precision, options.checkpointing)
    assert (request.batch, options.accumulation_steps) == (options.batch_size, 1)
    assert (request.warm, request.steps) == (workload.warm, workload.steps) == (2, 8)


@pytest.mark.parametrize("peer, batchings", [
    ("transformers", ["padded", "padding-free"]),
    ("trl", ["padded", "padding-free", "packing"])])
def test_peers_train_with_and_without_padding(peer, batchings):
    training = peers.variants_of(peer, peers.Comparison("bf16", 4))
    assert [fields["batching"] for _, fields in training] == batchings


def test_trl_does_not_answer():
    assert peers.variants_of("trl", peers.Comparison("bf16", 1, new=64)) == []


def test_a_cell_names_the_peers_packages(tmp_path):
    """An upgraded peer is measured again."""
    python = tmp_path / "python"
    digests = []
    for version in ("5.23.0", "5.24.0", "5.24.0"):
        python.write_text(f"#!/bin/sh\necho transformers {version}\n")
        python.chmod(0o755)
        path, digest = peers.peer_python([str(python)], "transformers")
        assert path == str(python)
        digests.append(digest)
    assert digests[0] != digests[1] == digests[2]


def test_what_is_generated_is_what_is_counted(base, data, monkeypatch):
    """Twelve prompts, of which two batches of eight, and one to warm up, take 24."""
    flags = ["--checkpoint", str(base), "--data", str(data), "--device", "cpu", "--precision",
             "fp32"]
    workload = runs.Workload(flags, str(data), warm=0, steps=1, repeats=1)
    ids = peers.time_generation(workload, batch=8, n_batches=2, new=4)["ids"]
    assert [len(answer) for answer in ids] == [4] * 16

    def scripted(n_missing):
        def generate(model, prompts, new, eos, pool):
            pools.append(dict(pool.followers))
            pool.put([len(pools)], [5])
            for i in range(len(prompts)):
                for _ in range(new - n_missing):
                    yield i, 5

        return generate

    pools = []
    monkeypatch.setattr(peers, "generate_ids", scripted(0))
    peers.time_generation(workload, batch=4, n_batches=3, new=4)
    # When the prompts come again, nothing of their answers is known.
    assert pools == [{}, {(1,): [5]}, {(1,): [5], (2,): [5]}, {}]
    monkeypatch.setattr(peers, "generate_ids", scripted(1))
    with pytest.raises(ValueError, match="too few for these prompts and 4 new ones"):
        peers.time_generation(workload, batch=8, n_batches=2, new=4)


# Search, methods, students

def test_search_finds_a_planted_optimum():
    """The loss is the distance from lr 0.02, r 8 and DoRA, with noise that fades with the steps."""
    choices = ["lora", "dora", "vera"], [1e-4, 1.0]
    candidates = search.draw_candidates(243, 0, *choices)
    assert search.draw_candidates(5, 0, *choices) == candidates[:5]
    assert search.draw_candidates(5, 1, *choices) != candidates[:5]
    assert all(1e-4 <= candidate.lr <= 1.0 for candidate in candidates)
    spent = []

    def loss_after(i, steps):
        spent.append(steps)
        candidate = candidates[i]
        distance = abs(math.log10(candidate.lr / 0.02)) + abs(math.log2(candidate.r / 8))
        return distance + (candidate.method != "dora") + random.Random(i).random() / steps

    rankings = search.successive_halving(243, 7290, loss_after)
    assert [len(ranking) for ranking in rankings] == [243, 81, 27, 9, 3, 1]
    assert sum(spent) == 7290
    best = candidates[rankings[-1][0][1]]
    assert (best.method, best.r) == ("dora", 8)
    assert 0.5 < best.lr / 0.02 < 2


# A planted best rate; the first seed is misled to the rate above it.
@pytest.mark.parametrize("best, tried, near", [
    (5e-3, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2], [2e-3, 5e-3, 1e-2, 2e-2]),
    (0.1, [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5], [5e-2, 0.1, 0.2, 0.5]),
    (2e-4, [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2], [1e-4, 2e-4, 5e-4, 1e-3]),
])
def test_a_sweep_goes_on_until_the_best_rate_is_between_worse_ones(monkeypatch, best, tried, near):
    def results(self, name, flags, rates, seeds):
        found = {}
        for rate in rates:
            losses = [abs(math.log(rate / best) - 0.6 * (seed == 0)) for seed in seeds]
            found[rate] = [{"loss": loss} for loss in losses]
        return found

    monkeypatch.setattr(sweep.Sweep, "results", results)
    rates = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
    curve = sweep.Sweep(None, None, rates, [0, 1, 2], None, None, 1).curve("lora", {})
    assert list(curve.survey) == tried and list(curve.near) == near
    assert curve.rate == best and curve.rate_text == f"{best:g}"
    assert all(len(results) == 3 for results in curve.near.values())
    assert [rate for rate, _ in curve.losses] == tried


def test_a_sweep_does_not_follow_rates_that_diverge(monkeypatch):
    """Nothing is tried below rates that all diverge; a falling loss ends at MOST_RATES rates."""
    falling = {rate: [{"loss": rate}] for rate in (1e-3, 2e-3)}
    assert sweep.rates_to_add(falling) == [5e-4]
    more = {rate: [{"loss": rate}] for rate in range(1, sweep.MOST_RATES + 1)}
    assert sweep.rates_to_add(more) == []
    assert sweep.Curve({}, more).rate_text == "1 (at an end)"
    diverged = {rate: [{"loss": None, "exact_match": None}] for rate in (1e-3, 2e-3)}
    assert sweep.rates_to_add(diverged) == []
    assert sweep.share_right(diverged[1e-3]) is None
    assert sweep.quality(diverged[1e-3]) == ["diverged, 1 of 1 seeds", ""]
    assert sweep.rates_to_add({1e-2: [{"loss": 1.0}]}) == [5e-3, 2e-2]


@pytest.mark.slow
def test_runs_side_by_side_are_kept_and_not_run_again(table, tmp_path, capsys):
    """The second one fails while the first runs: this one is kept, and the third not begun."""
    log = tmp_path / "begun"
    first, second, third = (tables.CellRun(f"run {x}", {"x": x}, inverse, (x, log))
                            for x in (4, 0, 2))
    with tables.worker_processes(2) as pool:
        with pytest.raises(ValueError, match="^run 0: nothing to divide by$"):
            tables.measure_side_by_side(table, [first, second, third], pool, 2)
        assert sorted(log.read_text()) == ["0", "4"]
        tables.measure_side_by_side(table, [first, third], pool, 2)
    assert sorted(log.read_text()) == ["0", "2", "4"]
    assert [cell["result"]["loss"] for cell in saved_cells(table.path)] == [0.25, 0.5]
    assert capsys.readouterr().err.count("run 4: held-out loss 0.2500") == 1


def inverse(x, log):
    with log.open("a") as file:
        file.write(str(x))
    if x == 0:
        raise ValueError("nothing to divide by")
    while "0" not in log.read_text():
        time.sleep(0.1)
    time.sleep(1)                                    # until that failure has arrived
    return {"loss": 1 / x}


WAITS = """
from finetune.console import run_command
import signal
import time
from benchmarks.tables import run_within_memory, worker_processes
signal.signal(signal.SIGINT, signal.default_int_handler)     # also if pytest ignores it

def main():
    with worker_processes(2) as pool:
        runs = [pool.submit(run_within_memory, time.sleep, 600) for _ in range(2)]
        print("begun", flush=True)
        for run in runs:
            run.result()

if __name__ == "__main__":
    run_command(main, "benchmarks", "interrupted")
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay, gap, signalled", [
    (0.5, 0, os.killpg), (8, 0, os.killpg), (8, 0.3, os.killpg), (8, 0.3, os.kill)])
def test_ctrl_c_twice_ends_all_processes_without_a_traceback(tmp_path, delay, gap, signalled):
    """`timeout -s INT` signals twice.  The processes may still be starting; with `kill -INT` they
    get no signal."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": ROOT},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(delay)
        for _ in range(2):
            signalled(process.pid, signal.SIGINT)
            time.sleep(gap)
        _, errors = process.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # The second one may also come when Python's own handler is gone already.
    assert process.returncode in (130, -signal.SIGINT)
    assert errors == "benchmarks: interrupted\n"


@pytest.mark.slow
def test_where_ctrl_c_is_ignored_it_stays_so(tmp_path):
    """As for a command that a script began with `&`."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS.replace("600", "10").replace("default_int_handler", "SIG_IGN"))
    process = subprocess.Popen(
        [sys.executable, script], env=os.environ | {"PYTHONPATH": ROOT}, stdout=subprocess.PIPE,
        text=True, start_new_session=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(6)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0


def test_every_row_of_the_family_is_a_run():
    configs = [parse_options(runs.flag_words(flags)) for flags in methods.FAMILY.values()]
    named = [(c.lora_config.method, c.lora_config.options.get("start"), c.lora_plus_ratio)
             for c in configs]
    assert len(set(named)) == len(named) == 10 and ("lora", "olora", 1) in named


def test_differences_are_taken_seed_by_seed():
    """By hand: 0.1 and 0.3, mean 0.2, standard deviation 0.1414, 12.706 x 0.1 to either side."""
    results = [{"loss": 1.1}, {"loss": 2.3}]
    reference = [{"loss": 1.0}, {"loss": 2.0}]
    assert sweep.difference(results, reference) == "+0.200 [-1.071, +1.471]"
    assert sweep.difference([{"loss": None}], [{"loss": 1.0}]) == ""
    assert sweep.forgotten([{"other_loss": 0.5}, {"other_loss": 0.7}], 0.2) == "0.400 ± 0.100"


def test_students_learn_from_the_teacher_of_their_data(base, data, tmp_path, monkeypatch):
    """On one file, on another, then on the first with a cell missing: each by its own teacher."""
    taught = []

    def run_fresh(function, argv, questions):
        flags = dict(zip(argv, argv[1:], strict=False))
        if function is distill.train_and_examine:
            Path(flags["--out"]).mkdir(exist_ok=True)
            (Path(flags["--out"]) / "adapter.pt").write_text(flags["--data"])
        elif "--teacher" in argv:
            taught.append((flags["--data"], Path(flags["--teacher-adapter"]).read_text()))
        return {"parameters": 1, "loss": 1.0, "exact_match": 0.5}

    monkeypatch.setattr(distill, "run_fresh", run_fresh)
    other = tmp_path / "other.json"
    other.write_bytes(data.read_bytes())
    for path, seeds in ((data, "0"), (other, "0"), (data, "0,1")):
        make("distill", tmp_path, "--checkpoint", str(base), "--data", str(path), "--val-data",
             str(data), "--seeds", seeds, "--lrs", "1e-2")
    assert len(taught) == 9
    assert all(data_file == teacher_s for data_file, teacher_s in taught)


# Every table, at a tiny size


@pytest.fixture
def tabulate(monkeypatch, tmp_path, capsys):
    """Return a function (table, flags) -> its lines.

    Cells are measured in this process, but for runs side by side.
    """
    for page in (tables, runs, roofline, methods, sweep, search, ranks, distill, study):
        monkeypatch.setattr(page, "run_fresh", tables.run_within_memory)
    monkeypatch.setattr(roofline, "matmul_peak", lambda dtype, device: 1e12)

    def lines_of(name, *flags):
        capsys.readouterr()
        benchmark.main([name, "--out", str(tmp_path / "out"), *map(str, flags)])
        printed = capsys.readouterr().out
        assert printed == (tmp_path / f"out/{name}.md").read_text()
        return printed.splitlines()

    # Starting ranks from this process replaces its handlers.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield lines_of
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("name, expected", [
    ("ablation", {"lora": 12}),
    ("scaling", {"examples per micro-batch": 5, "tokens per example": 4, "layers": 2, "ranks": 2}),
    ("roofline", {}),
    ("growth", {"the limit that train.py sets": 1}),
    ("methods", {"lora": 2, "vera": 2}),
    ("rates", {"(full)": 2, "wq,wv": 1, "all seven": 2}),
    ("distill", {}),
    ("search", {"1": 1}),
    ("paper", {"wq": 1, "wq,wv": 3, "w1,w2,w3": 1, "Int4": 1, "wv, r 1: amplification factor": 1}),
])
def test_a_table_to_the_end(base, data, tmp_path, tabulate, monkeypatch, name, expected):
    monkeypatch.setattr(sweep, "MOST_RATES", 2)
    monkeypatch.setattr(methods, "FAMILY", {m: methods.FAMILY[m] for m in ("lora", "vera")})
    flags = ["--checkpoint", base, "--data", data]
    also = tmp_path / "also.jsonl"
    also.write_text(json.dumps({"text": "Mia ran to the house."}))
    if name == "search":
        flags += ["--val-data", data, "--candidates", "4", "--budget", "24", "--lrs", "1e-3,1e-1"]
    elif name == "paper":
        flags += ["--val-data", data, "--epochs", "1", "--seeds", "0,1,2", "--r", "1", "--ranks",
                  "1,2", "--processes", "2"]
    elif name in ("methods", "rates"):
        flags += ["--val-data", data, "--epochs", "1", "--seeds", "0", "--lrs", "1e-2", "--also",
                  also]
        flags += ["--ranks", "1", "--batches", "32"] if name == "rates" else []
    elif name == "distill":
        flags += ["--val-data", data, "--epochs", "1", "--seeds", "0", "--lrs", "1e-2"]
    elif name == "growth":
        flags += ["--precision", "fp32", "--steps", "3"]
    else:
        flags += ["--device", "cpu", "--repeats", "1"]
    lines = tabulate(name, *flags)
    assert {first: len(rows_in(lines, first)) for first in expected} == expected
    results = [cell["result"] for cell in saved_cells(tmp_path / f"out/{name}.json")]
    if name == "ablation":
        assert len(results) == 20
        assert all(result["tokens_per_second"] > 0 for result in results)
    if name == "paper":
        # 8 places for the budget and 2 ranks, of which one is the budget's own; 5 data types.
        assert len(results) == (8 + 2 - 1) * 3 + 5 + 2
        about_claims = "\n".join(line for line in lines if not line.startswith("| w1,w2,w3 "))
        verdicts = re.findall(r"\| (holds|fails|can't be told apart) ", about_claims)
        assert len(verdicts) == 6 * 2 + 2 + 5 + 6 + 6
    if name == "distill":                            # The teacher, then each student in both ways.
        losses = [result["loss"] for result in results[1:]]
        assert len(losses) == 6 and all(losses[i] != losses[i + 1] for i in (0, 2, 4))
    assert tabulate(name, *flags) == lines           # from the saved cells


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("peft") or not find_spec("transformers"),
                    reason="transformers and peft are not installed")
def test_peers_to_the_end(base, tmp_path, tabulate):
    """In fp32, greedy: the same text as transformers, with its cache or without."""
    convert.main([str(base), str(tmp_path / "hf"), "--to", "hf"])
    text = "\n".join(tabulate(
        "peers", "--checkpoint", tmp_path / "hf", "--device", "cpu", "--repeats", "1", "--steps",
        "1", "--cells", "train bf16 batch 32*,generate fp32 64*"))
    assert "| train bf16 batch 32 share-prefix |" in text
    assert text.count("| yes |") == 2 and "| no |" not in text


@pytest.mark.slow
def test_an_adapter_is_cut_to_each_rank_beside_one_trained_at_each(tmp_path, tabulate):
    """At its whole rank a cut DyLoRA is the adapter as it was saved; a rank is not another's."""
    questions = tmp_path / "few.json"
    examples = json.loads((ROOT / "finetune/demo/held_out.json").read_text())[:12]
    questions.write_text(json.dumps(examples))
    flags = ["--data", str(questions), "--val-data", str(questions)]
    lines = tabulate("ranks", *flags, "--ranks", "1,2,4")
    one_run = [*flags, "--lr", "0.005", "--seed", "0"]
    dylora = [*one_run, "--method", "dylora", "--r", "4"]
    whole, cut = ranks.train_and_examine(dylora, [], [None, 2], str(questions))
    lora = [*one_run, "--method", "lora", "--r", "2"]
    alone, = ranks.train_and_examine(lora, [], [None], str(questions))
    assert whole["loss"] != cut["loss"]
    expected = [*ranks.columns_of(alone), *ranks.columns_of(cut)]
    assert rows_in(lines, "2")[0][1:] == expected
    assert rows_in(lines, "4")[0][3:] == ranks.columns_of(whole)
