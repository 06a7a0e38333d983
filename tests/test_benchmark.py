"""benchmark.py and benchmarks/: cells that are kept, tables, what is counted, and Table 1's arithmetic.

    pytest tests/test_benchmark.py; pytest -m slow tests/test_benchmark.py makes each table at a tiny size.
"""
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as benchmark
import train
from finetune.options import parse_options
from benchmarks import ablation, distill, measure, methods, peers, ranks, roofline, runs, scaling, search, tables
from finetune import convert
from llama import ModelArgs
from finetune.dataset import count_answer
from finetune.batches import pack
from lora import LoRAConfig, add_lora

from . import peers as their_side
from .helpers import ONE_THREAD, ROOT, tiny


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(out=tmp_path, table="tried", on="here", said="`this`")


def test_a_finished_cell_is_kept_and_a_changed_setting_is_another(args):
    made = []

    def compute(result):
        return lambda: made.append(result) or {"value": result}
    assert tables.cell(args, {"n": 1, "flags": ("a",)}, compute(1)) == {"value": 1}
    assert tables.cell(args, {"n": 1, "flags": ["a"]}, compute(2)) == {"value": 1}             # JSON knows no tuples
    assert tables.cell(args, {"n": 2, "flags": ["a"]}, compute(3)) == {"value": 3}
    args.on = "elsewhere"
    assert tables.cell(args, {"n": 1, "flags": ["a"]}, compute(4)) == {"value": 4}
    assert made == [1, 3, 4]
    kept = json.loads((args.out / "tried.json").read_text())["cells"]
    assert [cell["result"]["value"] for cell in kept] == made and kept[0]["command"] == "`this`"


def test_what_holds_no_cells_is_no_table(args):
    for content in {"cells": 1}, {"cells": [1]}, {"cells": [{"settings": {}}]}, {}:
        (args.out / "tried.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="tried.json holds something else than finished cells"):
            tables.cell(args, {}, dict)


def test_what_ends_in_the_middle_goes_on(args):
    done = []

    def run(until):
        def compute(i):
            if i == until:
                raise KeyboardInterrupt
            done.append(i)
            return {"i": i}
        return [tables.cell(args, {"i": i}, lambda: compute(i))["i"] for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run(until=2)
    assert len(json.loads((args.out / "tried.json").read_text())["cells"]) == 2
    assert run(until=None) == [0, 1, 2, 3] and done == [0, 1, 2, 3]


def test_the_code_and_the_files_are_part_of_a_figure(tmp_path):
    (tmp_path / "a").write_text("1")
    before = tables.code(tmp_path / "a")
    assert before == tables.code(tmp_path / "a") != tables.code()
    (tmp_path / "a").write_text("2")
    assert before != tables.code(tmp_path / "a")


def test_markdown():
    assert tables.markdown(["a", "b"], [["1", "2"], ["", "x"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |", "|  | x |"]


def test_memory_that_ends_is_told_from_an_error():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(tables.OutOfMemory):
            tables.within_memory(exec, "raise error", {"error": error})
    with pytest.raises(RuntimeError, match="shapes") as raised:
        tables.within_memory(exec, "raise error", {"error": RuntimeError("shapes do not fit")})
    assert not isinstance(raised.value, ValueError)
    assert tables.within_memory(max, 1, 2) == 2


@pytest.mark.skipif(not measure.CLEAR.exists(), reason="no high-water mark to set back")
def test_peaks_belong_to_their_phase():
    peaks = measure.Peaks(torch.device("cpu"))
    peaks("before")
    torch.ones(2 ** 25).sum()                                    # 128 MiB
    peaks("large")
    peaks("after")
    peaks(None)
    assert set(peaks.mb) == {"before", "large", "after", "process"}
    assert peaks.mb["large"] - peaks.mb["before"] > 100 and peaks.mb["large"] - peaks.mb["after"] > 100
    torch.ones(2 ** 26).sum()
    peaks(None)                                                  # of no phase, but of the process
    assert peaks.mb["process"] > peaks.mb["large"] + 100 and max(peaks.mb.values()) == peaks.mb["process"]


def test_without_a_mark_to_set_back_the_peak_is_the_process_s(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "CLEAR", tmp_path / "no" / "such")
    peaks = measure.Peaks(torch.device("cpu"))
    peaks("forward")
    assert list(peaks.mb) == ["process"] and peaks.mb["process"] > 10


ROWS = [([1, 5, 6, 7, 8, 9, 2], [-100] * 4 + [8, 9, 2]), ([1, 4, 2], [-100, -100, 2])]


def products(model, rows):
    """FLOP of the model's products in one forward pass, by hand: 2 for each weight and token, and attention's two."""
    args, n = model.args, sum(len(tokens) for tokens, _ in rows)
    answers = sum(count_answer(labels) for _, labels in rows)
    attention = sum(2 * 2 * len(tokens) ** 2 * args.dim for tokens, _ in rows) * args.n_layers
    return 2 * n * measure.multiplied(args, answers / n) + attention


def test_flop_counted_is_flop_by_hand():
    """Training everything: backward makes two products for each of forward's, but none for what no gradient goes to."""
    model = tiny(n_kv_heads=2)
    found = measure.counted(model, [pack(ROWS)], contextlib.nullcontext())
    forward = products(model, ROWS)
    assert found["forward"] == forward and found["flop"] == 3 * forward
    model.checkpointing = True                                   # the blocks' forward again, up to before w2's product, whose
    a = model.args                                               # result nothing keeps; not the head's
    spared = 2 * 4 * a.dim * a.vocab_size + a.n_layers * 2 * 10 * a.dim * a.hidden_dim
    assert measure.counted(model, [pack(ROWS)], contextlib.nullcontext())["flop"] == 4 * forward - spared
    model.checkpointing = False
    assert measure.counted(model, [pack(ROWS)] * 2, contextlib.nullcontext())["forward"] == 2 * forward


def test_multiplied_weights_of_the_7b():
    """32 x (4 x 4096^2 + 3 x 4096 x 11008), and the output matrix for those tokens that need it."""
    args, blocks = ModelArgs(), 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008)
    assert measure.multiplied(args, 0) == blocks == 6_476_005_376 and measure.multiplied(args, 1) == blocks + 4096 * 32000
    assert [measure.flop_a_token(10), measure.flop_a_token(10, checkpointing=True), measure.flop_a_token(10, full=True)] == [40, 60, 60]


def test_copies_under_autocast_are_counted_as_such():
    """2 bytes a weight of each matrix that a gradient passes: not of those that read the embedding, which needs none."""
    model = tiny()
    add_lora(model, LoRAConfig(r=2, dropout=0.0))
    assert measure.counted(model, [pack(ROWS)], contextlib.nullcontext())["copies"] == 0
    found = measure.counted(model, [pack(ROWS)], torch.autocast("cpu", torch.bfloat16))
    spared = [f"layers.0.attention.{name}" for name in ("wq.base.weight", "wq.lora_A", "wk.weight", "wv.base.weight", "wv.lora_A")]
    assert found["copies"] == 2 * sum(p.numel() for name, p in model.named_parameters()
                                      if p.dim() == 2 and name not in (*spared, "tok_embeddings.weight"))
    assert all(p.grad is None for p in model.parameters())


def test_rows_as_long_as_alpaca_s():
    """Alpaca's first 200 have 121 tokens on average with LLaMA's tokenizer, 56 of them the answer's."""
    rows = runs.drawn_rows(32000)
    assert rows == runs.drawn_rows(32000) and len(rows) == 200
    answers = [count_answer(labels) for _, labels in rows]
    assert 105 < sum(len(tokens) for tokens, _ in rows) / 200 < 135 and 45 < sum(answers) / 200 < 65
    for tokens, labels in rows:
        prompt = labels.count(-100)
        assert tokens[0] == 1 and tokens[-1] == 2 and labels == [-100] * prompt + tokens[prompt:] and len(tokens) <= 512
    assert len({tuple(tokens[:29]) for tokens, _ in rows}) == 2                               # its two preambles
    assert {(len(tokens), count_answer(labels)) for tokens, labels in runs.drawn_rows(50, 64)} == {(64, 32)}


def test_steps_take_the_rows_in_order_and_repeat_what_is_measured():
    run = dict(warm=1, steps=2, repeats=2)
    steps = [micro for _, micro in runs.in_file_order(range(5), run, SimpleNamespace(batch_size=1, accumulation_steps=2))]
    assert steps == [[[[0], [1]]], [[[2], [3]]], [[[4], [0]]], [[[2], [3]]], [[[4], [0]]]]
    assert runs.in_file_order(range(9), run, SimpleNamespace(batch_size=2, accumulation_steps=1), 2)[0][1] == [[[0, 1]], [[2, 3]]]


def result(parameters=8, gradients=8, optimizer=16, activations=40, forward=2e6, flop=6e6, seconds=1.0):
    return dict(bytes={"parameters": parameters * 2 ** 20, "gradients": gradients * 2 ** 20, "optimizer": optimizer * 2 ** 20,
                       "activations": activations * 2 ** 20}, forward=forward, flop=flop, seconds=seconds, tokens_per_second=10.0,
                peaks={"start": 100.0, "weights": 110.0, "forward": 150.0, "backward": 160.0, "step": 130.0, "process": 160.0}, P=1_000_000,
                estimate={kind: n * 2 ** 20 for kind, n in dict(weights=8, gradients=8, optimizer=16, activations=30, logits=1).items()})


def grid():
    """What the runs of one ablation might have given."""
    found = {key: result() for key in [ablation.PLAIN, *(after for _, after, _ in ablation.CHANGES.values())]}
    found["full", "fp32", True, False] = result(activations=5)
    found["full", "fp32", False, True] = result(activations=4, flop=8e6, seconds=1.05)
    found["full", "autocast", False, False] = result(parameters=12, activations=22, seconds=0.5)
    found["lora", "fp32", False, False] = result(parameters=8.1, gradients=0.1, optimizer=0.2, forward=2.1e6, flop=4.1e6)
    return found


def test_table_1_says_what_changes_and_where_the_report_is_wrong():
    rows, wrong = ablation.changes(grid())
    accumulation, checkpointing, mixed, lora = rows[:4]
    assert accumulation == ["gradient accumulation", "8.0 → 8.0 –", "8.0 → 8.0 –", "16.0 → 16.0 –", "40.0 → 5.0 ↓ (report ↓)",
                            "2.0 → 2.0 –", "6.0 → 6.0 –", "1.00 → 1.00 –"]
    assert checkpointing[4] == "40.0 → 4.0 ↓ (report ↓)" and checkpointing[6] == "6.0 → 8.0 ↑ (report ↑)"
    assert checkpointing[7] == "1.00 → 1.05 –"                   # seconds are no counts: a tenth is noise
    assert mixed[1] == "8.0 → 12.0 ↑ **(report ↓)**" and mixed[3] == "16.0 → 16.0 – (report –)" and mixed[7] == "1.00 → 0.50 ↓"
    assert lora[1:7] == ["8.0 → 8.1 ↑ (report ↑)", "8.0 → 0.1 ↓ (report ↓)", "16.0 → 0.2 ↓ (report ↓)", "40.0 → 40.0 –",
                         "2.0 → 2.1 ↑", "6.0 → 4.1 ↓ (report ↓)"]
    assert wrong[0].startswith("mixed precision, parameters: the report says ↓, here it is ↑: autocast leaves")


def test_table_1_falls_back_on_closed_form_where_memory_ended():
    found = grid()
    for key in ("bytes", "peaks"):
        del found[ablation.PLAIN][key]
    row = ablation.changes(found)[0][1]
    assert row[:5] == ["checkpointing (by estimate)", "8.0 → 8.0 –", "8.0 → 8.0 –", "16.0 → 16.0 –", "31.0 → 31.0 – **(report ↓)**"]
    assert row[6:] == ["6.0 → 8.0 ↑ (report ↑)", ""]


def test_out_of_memory_is_a_row(args, monkeypatch):
    """In the grid, among the peers, along an axis."""
    def killed(function, *_):
        raise tables.OutOfMemory("killed")
    monkeypatch.setattr(tables, "fresh", killed)
    args = benchmark.parse_args(["ablation", "--shape", "135m", "--layers", "1", "--device", "cpu", "--out", str(args.out)])
    args.said = args.on = "this"
    lines = ablation.make(args)
    rows = [line for line in lines if line.startswith(("| full |", "| lora |"))]
    assert len(rows) == 20 and all("out of memory" in row for row in rows)
    assert all(re.search(r"out of memory \| [\d,]{3,} \|", row) for row in rows)              # the estimate stands beside it
    header, row = peers.versus({"ours": [result()], "transformers": [{}]}, False)
    assert row == ["10.0", "160", "out of memory", "", "", ""] and len(header) == len(row)


def test_versus_takes_medians_and_ratios():
    def run(speed, peak, ids):
        return dict(tokens_per_second=speed, peaks={"a": 1.0, "process": peak}, ids=ids)
    header, row = peers.versus({"ours": [run(30, 100, [1]), run(10, 120, [1]), run(20, 110, [1])],
                                    "transformers, KV cache": [run(10, 220, [1]), run(40, 200, [1]), run(5, 230, [1])]}, True)
    assert header == ["ours, tokens/s", "MiB", "transformers, KV cache, tokens/s", "MiB", "speed, ours / theirs", "memory", "same text"]
    assert row == ["20.0", "110", "10.0", "220", "2.00", "0.50", "yes"]


def test_where_both_ran_out_of_memory_no_text_is_the_same():
    header, row = peers.versus({"ours": [{}], "transformers, no cache": [{}]}, True)
    assert dict(zip(header, row))["same text"] == ""


@pytest.mark.parametrize("said, code, expected", [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "exit 1", {}), ("", "kill -9 $$", {}),
    ("KeyError: 'rope_theta'", "exit 1", "transformers: KeyError: 'rope_theta'")])
def test_a_peer_that_ends_says_why(tmp_path, said, code, expected):
    """Out of memory is a row; anything else ends the table in its own last words."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat > {tmp_path}/asked\necho 'Traceback' >&2\necho \"{said}\" >&2\n{code}\n")
    python.chmod(0o755)
    with contextlib.nullcontext() if expected == {} else pytest.raises(ValueError, match=re.escape(expected) + "$"):
        assert peers.theirs(str(python), {"peer": "transformers"}, []) == expected
    assert json.loads((tmp_path / "asked").read_text()) == {"peer": "transformers", "rows": []}


def test_a_peer_s_python_is_found_as_the_shell_finds_it(tmp_path):
    assert peers.peer_python(["true"], "transformers") == shutil.which("true")
    (tmp_path / "python").write_text("#!/bin/sh\n")
    (tmp_path / "python").chmod(0o755)
    assert peers.peer_python(["false", os.path.relpath(tmp_path / "python")], "transformers") == str(tmp_path / "python")


def test_a_peer_ends_with_the_one_that_waits(monkeypatch):
    parents, left = iter([7, 7, 1]), []
    monkeypatch.setattr(their_side, "os", SimpleNamespace(getppid=lambda: next(parents), _exit=left.append))
    monkeypatch.setattr(their_side, "time", SimpleNamespace(sleep=lambda _: None))
    their_side.leave_with(7)
    assert left == [1] and not list(parents)


def test_what_is_generated_is_what_is_counted(base, data, monkeypatch):
    """Twelve prompts, of which two batches of eight and one to warm up take 24; and a model that ends early."""
    run = dict(flags=["--checkpoint", str(base), "--data", str(data), "--device", "cpu", "--precision", "fp32"], data=str(data), length=None,
               batch=8, prompts=2, new=4)
    ids = peers.generated(run)["ids"]
    assert len(ids) == 16 and all(len(answer) == 4 for answer in ids)
    pools = []

    def scripted(model, prompts, new, eos, pool):
        pools.append(dict(pool))
        pool[len(pools),] = [5]
        return ((i, 5) for i in range(len(prompts)) for _ in range(new))
    monkeypatch.setattr(peers, "generate_ids", scripted)
    peers.generated({**run, "batch": 4, "prompts": 3})
    assert pools == [{}, {(1,): [5]}, {(1,): [5], (2,): [5]}, {}]             # a prompt that comes again finds nothing of its answer
    monkeypatch.setattr(peers, "generate_ids", lambda model, prompts, new, eos, pool: ((i, 5) for i in range(len(prompts)) for _ in range(new - 1)))
    with pytest.raises(ValueError, match="too few for these prompts and 4 new ones"):
        peers.generated(run)


@pytest.mark.parametrize("gpus", [1, 2])
def test_ranks_take_a_gpu_each(gpus, monkeypatch, tmp_path):
    """settle() names one GPU; ranks that were told so would both take it, which NCCL refuses."""
    def settle(args):
        args.device, args.precision, args.folder = "cuda:0", "bf16", runs.shape_folder("135m", tmp_path)
    asked = []
    monkeypatch.setattr(runs, "settle", settle)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(scaling, "taken", lambda args, name, run: asked.append(run) or result())
    monkeypatch.setattr(scaling, "picture", lambda *_: None)
    scaling.make(benchmark.parse_args(["scaling", "--out", str(tmp_path)]))
    ranks = [(run["ranks"], parse_options(run["flags"]).device) for run in asked if run["flags"][-2] == "--device"]
    assert ranks == [(n + 1, "cuda") for n in range(gpus)] and {run["ranks"] for run in asked[:-gpus]} == {1}


def test_a_teacher_is_that_of_its_data(base, data, tmp_path, monkeypatch):
    """Students on one file, then on another, then the first again, whose last cell is missing: each by its own teacher."""
    def fresh(function, argv, examples):
        if "--method" not in argv:
            Path(argv[argv.index("--out") + 1]).mkdir(exist_ok=True)
            (Path(argv[argv.index("--out") + 1]) / "adapter.pt").write_text(argv[argv.index("--data") + 1])
        elif "--teacher" in argv:
            taught.append((argv[argv.index("--data") + 1], Path(argv[argv.index("--teacher-adapter") + 1]).read_text()))
        return dict(parameters=1, loss=1.0, exact_match=0.5)
    taught, other = [], tmp_path / "other.json"
    other.write_bytes(data.read_bytes())
    monkeypatch.setattr(distill, "fresh", fresh)
    for path, seeds in (data, [0]), (other, [0]), (data, [0, 1]):
        distill.make(SimpleNamespace(checkpoint=str(base), adapter=None, data=str(path), val_data=str(data), epochs=1, precision=None,
                                     seeds=seeds, lrs=[1e-2], out=tmp_path, table="distill", on="here", said="this"))
    assert len(taught) == 9 and all(read == taught_by for read, taught_by in taught)


def test_figures_of_other_data_are_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(methods, "make", lambda args: [args.on])
    said = []
    for content in "first", "second", "first":
        (tmp_path / "some.json").write_text(content)
        benchmark.main(["methods", "--data", str(tmp_path / "some.json"), "--out", str(tmp_path / "out")])
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] != said[1]


@pytest.mark.parametrize("flags, said", [
    (["peers", "--peer-python", "false", "--out", ""], "--out: is empty"),
    (["ablation", "--shape", "7b", "--checkpoint", "x"], "both name a model"), (["ablation", "--data", "x"], "needs the tokenizer"),
    (["methods", "--data", "x"], "go together"), (["peers", "--repeats", "0"], "at least 1"), (["nothing"], "invalid choice"), ([], "required"),
])
def test_bad_flags_end_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as left:
        benchmark.main(flags)
    assert left.value.code == 2 and re.fullmatch(rf"benchmarks: .*{said}.*\n", capsys.readouterr().err)


def test_what_is_no_transformer_ends_in_one_line(tmp_path, tokenizer, capsys):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / "params.json").write_text('{"rnn": "gru", "dim": 8, "n_layers": 1}')
    for name in "ablation", "scaling", "roofline", "peers":
        with pytest.raises(SystemExit, match="2"):
            benchmark.main([name, "--checkpoint", str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "out")])
        assert capsys.readouterr().err == f"benchmarks: {tmp_path} is no transformer: what is counted here is a transformer's work\n"


def test_cells_and_peers_that_are_not_there(tmp_path, capsys):
    for flags, said in ((["--cells", "nothing"], "is none of: train bf16 batch 4;"), (["--against", "nothing"], "is none of transformers"),
                        (["--peer-python", "false"], "no --peer-python has")):
        with pytest.raises(SystemExit) as left:
            benchmark.main(["peers", "--device", "cpu", "--out", str(tmp_path), *flags])
        assert left.value.code == 2 and said in capsys.readouterr().err


def test_the_best_product_is_a_speed():
    assert 1e6 < measure.matmul_peak(torch.float32, torch.device("cpu"), sizes=(64, 128), repeats=2) < 1e15


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_a_picture_of_numbers_and_of_words(args):
    lines = {name: [(1, 2.0), (16, 3.0)] for name in "abcdefghi"}
    words = {"a": [("one", 1.0), ("two", 2.0)]}
    tables.picture(args, [("numbers", "x", "y", lines), ("words", "", "y", words), ("nothing", "", "", {})])
    assert (args.out / "tried.png").read_bytes().startswith(b"\x89PNG")


def test_search_finds_a_planted_optimum():
    """The loss is how far settings lie from lr 0.02, r 8 and DoRA, and what is left of it after so many steps misleads at first."""
    def loss_after(i, steps):
        one = settings[i]
        spent.append(steps)
        return abs(math.log10(one["lr"] / 0.02)) + abs(math.log2(one["r"] / 8)) + (one["method"] != "dora") + random.Random(i).random() / steps
    spent, settings = [], search.drawn(243, 0, ["lora", "dora", "vera"], [1e-4, 1.0])
    found = search.halved(settings, 7290, loss_after)
    assert [len(ranking) for ranking in found] == [243, 81, 27, 9, 3, 1] and sum(spent) == 7290
    (_, best), = found[-1]
    assert settings[best]["method"] == "dora" and settings[best]["r"] == 8 and 0.5 < settings[best]["lr"] / 0.02 < 2
    assert found == search.halved(settings, 7290, loss_after)


def test_what_is_drawn_depends_on_the_seed_alone():
    few, many = (search.drawn(n, 3, ["lora", "dora"], [1e-3, 1e-2]) for n in (5, 9))
    assert few == many[:5] != search.drawn(5, 4, ["lora", "dora"], [1e-3, 1e-2])
    assert all(1e-3 <= one["lr"] <= 1e-2 and one["alpha"] % one["r"] == 0 for one in many)


@pytest.mark.parametrize("candidates, budget, plan", [
    (27, 1080, [(27, 10), (9, 30), (3, 90), (1, 270)]), (10, 300, [(10, 10), (3, 33), (1, 100)]), (1, 7, [(1, 7)])])
def test_each_round_of_a_search_takes_an_equal_part_of_the_budget(candidates, budget, plan):
    assert search.rounds(candidates, budget) == plan


@pytest.mark.parametrize("flags, said", [
    (["--methods", "lora,nothing"], "--methods nothing is none of lora, "), (["--lrs", "1e-2,1e-3"], "the lower one first"),
    (["--budget", "100"], "--budget 100 leaves 27 candidates no step each; 108 would one"), (["--data", "some.json"], "--data and --val-data go together")])
def test_a_search_that_cannot_be_is_refused(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        benchmark.main(["search", "--out", str(tmp_path), *flags])
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_a_search_in_which_runs_diverge(args, monkeypatch):
    """They come last, drawn as crosses; where none is left nothing is recommended."""
    drawn = []
    monkeypatch.setattr(search, "picture", lambda args, panels: drawn.extend(panels))
    args = benchmark.parse_args(["search", "--candidates", "3", "--budget", "6", "--methods", "lora", "--out", str(args.out)])
    args.said = args.on = "this"
    first = search.drawn(3, 0, ["lora"], args.lrs)[1]
    monkeypatch.setattr(search, "fresh", lambda function, flags: {"held_out_loss": 1.5 if str(first["lr"]) in flags else None})
    lines = search.make(args)
    assert [line.split(" | ")[-1] for line in lines[2:5]] == ["1.5000 |", "diverged |", "diverged |"]
    assert lines[-1].endswith(f"python train.py --method lora --targets {first['targets']} --r {first['r']} --alpha {first['alpha']} --lr {first['lr']})")
    assert sorted(loss is None for _, loss in drawn[0][3]["lora"]) == [False, True, True] and drawn[1][3] == {"best": [(1, 1.5), (3, 1.5)], "median": [(1, None), (3, 1.5)]}
    args.on = "elsewhere"
    monkeypatch.setattr(search, "fresh", lambda function, flags: {"held_out_loss": None})
    assert search.make(args)[-1].endswith("All diverged: try lower --lrs)")


def test_a_method_that_diverges_is_a_row(args, monkeypatch):
    """At every learning rate, or with one seed of several; of a run that diverged nothing is asked, there is no adapter."""
    def fresh(function, flags, *asked):
        if asked:
            return dict(right=0.5, adapter_per_second=1.0, merged_per_second=1.0)
        method, seed = flags[flags.index("--method") + 1], flags[flags.index("--seed") + 1]
        out = Path(flags[flags.index("--out") + 1])
        lost = method == "dora" or method == "vera" and seed == "1"
        if not lost:
            out.mkdir(parents=True)
            (out / "adapter.pt").touch()
        return dict(held_out_loss=None if lost else 1.5, parameters=7, kept_mb=1.0, examples_per_second=1.0)
    monkeypatch.setattr(methods, "fresh", fresh)
    monkeypatch.setattr(methods, "picture", lambda *_: None)
    args = benchmark.parse_args(["methods", "--lrs", "1e-2,1e-1", "--out", str(args.out)])
    args.said = args.on = "this"
    rows = {line.split(" | ")[0]: line for line in methods.make(args)}
    assert rows["| dora"] == "| dora | 0.01 | 7 | diverged, 1 of 1 seeds |  |  |  |  |  |"
    assert rows["| vera"] == "| vera | 0.01 | 7 | diverged, 1 of 2 seeds |  |  |  |  |  |"
    assert rows["| rslora"] == "| rslora | 0.01 | 7 | 1.500 ± 0.000 | 50.0% ± 0.0% | 1 | 1 | 1 | 1.00 |"


def test_a_run_that_leaves_no_adapter_diverged(base, data, tmp_path, monkeypatch):
    """Its last row may have a held-out loss all the same: of weights that no step has moved."""
    row = dict(val_loss=1.5, epoch=1.0, tokens=8, tokens_per_second=4.0, peak_memory_mb=1.0)
    args = parse_options(["--checkpoint", str(base), "--data", str(data), "--out", str(tmp_path)])
    monkeypatch.setattr(methods, "finished", lambda argv: (args, [row]))
    assert methods.trained([])["held_out_loss"] is None
    (tmp_path / "adapter.pt").touch()
    assert methods.trained([])["held_out_loss"] == 1.5


def test_no_table_is_lost_for_a_picture(args, monkeypatch, capsys):
    monkeypatch.setattr(tables, "find_spec", lambda name: True)
    monkeypatch.setattr(tables, "draw", lambda *_: 1 / 0)
    tables.picture(args, [])
    assert capsys.readouterr().err == "no picture: division by zero\n"


# The whole, at a tiny size

@pytest.fixture
def table(monkeypatch, tmp_path, capsys):
    """(table, flags) -> its lines; cells are measured in this process, which takes no time to start."""
    for page in (tables, roofline, methods, search):
        monkeypatch.setattr(page, "fresh", tables.within_memory)
    monkeypatch.setattr(roofline, "matmul_peak", lambda dtype, device: 1e12)

    def made(name, *flags):
        capsys.readouterr()
        benchmark.main([name, "--out", str(tmp_path / "out"), *map(str, flags)])
        said = capsys.readouterr().out
        assert said == (tmp_path / f"out/{name}.md").read_text()
        return said.splitlines()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    yield made
    for number, handler in handlers.items():                     # which starting ranks from this process replaces
        signal.signal(number, handler)


def killed_after_two_cells(name, path, flags):
    """The cells that `benchmark.py name`, a process of its own, leaves in `path`."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", name, "--out", path.parent, *map(str, flags)], cwd=ROOT,
                               env=ONE_THREAD, stderr=subprocess.DEVNULL)
    while not path.exists() or len(json.loads(path.read_text())["cells"]) < 2:
        assert process.poll() is None                            # it must not have ended by itself
        time.sleep(0.1)
    process.kill()
    process.wait()
    return json.loads(path.read_text())["cells"]


@pytest.mark.slow
def test_ablation_to_the_end_and_after_a_kill(base, data, tmp_path, table):
    flags = ["--checkpoint", base, "--data", data, "--device", "cpu", "--repeats", "1"]
    path = tmp_path / "out/ablation.json"
    kept = killed_after_two_cells("ablation", path, flags)
    lines = table("ablation", *flags)
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 20 and cells[:len(kept)] == kept and sum(line.startswith("| lora | ") for line in lines) == 12
    for cell in cells:
        found = cell["result"]
        assert found["tokens_per_second"] > 0 and found["peaks"].keys() >= {"start", "weights", "forward", "backward", "step"}
        assert set(found["bytes"]) == {"parameters", "gradients", "optimizer", "activations"}
    assert not (tmp_path / "out/ablation.json.tmp").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes as Linux lists them")
def test_a_cell_s_process_ends_with_the_one_that_waits():
    script = "import time; from benchmarks.tables import fresh\nif __name__ == '__main__': fresh(time.sleep, 600)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (cells := [pid for pid in children.read_text().split() if "spawn_main" in command_of(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(6)                                                # until it has imported what it needs
    process.kill()
    process.wait()
    while any("spawn_main" in command_of(pid) for pid in cells) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert cells and not any("spawn_main" in command_of(pid) for pid in cells)


def command_of(pid):
    try:
        return open(f"/proc/{pid}/cmdline").read()
    except OSError:
        return ""


@pytest.mark.slow
def test_scaling_and_roofline_to_the_end(base, data, table):
    flags = ["--checkpoint", base, "--data", data, "--device", "cpu", "--repeats", "1"]
    lines = table("scaling", *flags)
    assert {line.split("|")[1].strip() for line in lines if line.startswith("| ")} == {
        "along", "examples a micro-batch", "tokens an example", "layers", "r", "ranks"}
    ranks = [line.split(" | ") for line in lines if line.startswith("| ranks")]
    assert int(ranks[1][2]) > int(ranks[0][2])                   # twice the examples a step
    said = "\n".join(table("roofline", *flags))
    assert said.count("4 P") == said.count("6 P") == 3


@pytest.mark.slow
def test_methods_to_the_end(base, data, table):
    lines = table("methods", "--checkpoint", base, "--data", data, "--val-data", data, "--epochs", "1", "--seeds", "0", "--lrs", "1e-2")
    assert [line.split(" | ")[:2] for line in lines if " | 0.01 | " in line] == [[f"| {name}", "0.01"] for name in methods.FAMILY]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("peft") or not find_spec("transformers"), reason="transformers and peft are not installed")
def test_peers_to_the_end(base, tmp_path, table):
    """In fp32, greedy: the same text as transformers, cache or not."""
    convert.main([str(base), str(tmp_path / "hf"), "--to", "hf"])
    said = "\n".join(table("peers", "--checkpoint", tmp_path / "hf", "--device", "cpu", "--repeats", "1", "--steps", "1",
                           "--cells", "train bf16 batch 32*,generate fp32 64*"))
    assert "| train bf16 batch 32 share-prefix |" in said and said.count("| yes |") == 2 and "| no |" not in said


@pytest.mark.slow
def test_a_killed_search_continues_and_ends_as_if_it_had_not_been(base, data, tmp_path, table):
    flags = ["--checkpoint", base, "--data", data, "--val-data", data, "--candidates", "4", "--budget", "24", "--lrs", "1e-3,1e-1"]
    path = tmp_path / "out/search.json"
    kept = killed_after_two_cells("search", path, flags)
    lines = table("search", *flags)
    assert json.loads(path.read_text())["cells"][:len(kept)] == kept
    shutil.rmtree(tmp_path / "out")
    assert [line.split(" on ")[0] for line in table("search", *flags)] == [line.split(" on ")[0] for line in lines]
    losses = [float(line.split(" | ")[-1].strip(" |")) for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert len(losses) == 4 and losses[1] <= losses[2] <= losses[3] and "(24 steps in all: 4 x 3, 1 x 12." in lines[-1]


@pytest.mark.slow
def test_one_adapter_cut_to_each_rank_beside_one_trained_at_each(tmp_path, capsys):
    """At its whole rank a cut DyLoRA is the adapter as it was saved; a rank is not another's; finished cells are kept."""
    examples = json.loads((ROOT / "finetune/demo/held_out.json").read_text())[:12]
    (tmp_path / "few.json").write_text(json.dumps(examples))
    flags = ["--data", str(tmp_path / "few.json"), "--val-data", str(tmp_path / "few.json")]
    benchmark.main(["ranks", *flags, "--ranks", "1,2,4", "--out", str(tmp_path)])
    rows = [line.split("|")[1:-1] for line in (tmp_path / "ranks.md").read_text().splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["1", "2", "4"]
    run = [*flags, "--lr", "0.005", "--seed", "0", "--method", "dylora", "--r", "4"]
    whole, two = ranks.answered(run, [], [None, 2], examples)
    assert [f"{one['loss']:.4f}" for one in (two, whole)] == [row[3].strip() for row in rows[1:]] and two["loss"] != whole["loss"]
    alone, = ranks.answered([*run[:-4], "--method", "lora", "--r", "2"], [], [None], examples)
    assert [f"{alone['loss']:.4f}", f"{alone['exact_match']:.1%}"] == [cell.strip() for cell in rows[1][1:3]]
    capsys.readouterr()
    benchmark.main(["ranks", *flags, "--ranks", "1,2,4", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-2:] == (tmp_path / "ranks.md").read_text().splitlines()[-2:]
