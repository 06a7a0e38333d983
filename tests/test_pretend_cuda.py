"""Our programs on a pretended CUDA device (pretend_cuda.py): what a GPU refuses or waits for."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import gpu, on_gpu, tables
from lora.methods import METHODS

from .helpers import ONE_THREAD, ROOT
from .test_mutations import mutated, mutated_copy

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own"),
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                       reason="the pretended device needs a C++ compiler"),
]
TRAIN = ["train", "--layers", "1", "--max-steps", "1", "--accumulation-steps", "2", "--overwrite"]
ANSWER = ["generate", "--adapter", "none", "--instruction", "Say", "--max-new-tokens", "4"]
SHAPE = "shape_7b"
# A micro-batch of 32 examples in 7B's shape launches at most so many kernels.
MOST_KERNELS = 3200
MOST_SHARED = 3400
MOST_NF4 = 6800
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FLAGS = {
    "fp16": ["--precision", "fp16", "--checkpointing"],
    "nf4": ["--quantize", "nf4", "--share-prefix"],
}
SLOW_FLAGS = {
    "bf16": [],
    "fp32": ["--precision", "fp32", "--share-prefix"],
    "int8": ["--quantize", "int8", "--checkpointing"],
    "every matrix": ["--targets", "all", "--share-prefix", "--checkpointing"],
    "embeddings": ["--targets", "tok_embeddings,wq,output"],
    "tokens": ["--tokens-per-batch", "300"],
    "lora+": ["--lora-plus-ratio", "16"],
    "teacher": ["--teacher", "finetune/demo", "--distill-weight", "0.5"],
    "dylora by loss": ["--method", "dylora", "--method-options", "rank_by=loss"],
}


@pytest.fixture(scope="session")
def pretended(tmp_path_factory):
    """pretended(line, line, ..., root=ROOT) runs command lines; it returns what each has asked."""
    stub = tmp_path_factory.mktemp("stub") / "stub.so"

    def pretended(*lines, root=ROOT):
        words = []
        for line in lines:
            folder = tmp_path_factory.mktemp("out") / "run"
            is_named = line[0] != "train" or "--out" in line
            out = [] if is_named else ["--out", str(folder)]
            words += ["--", *line, *out]
        done = subprocess.run(
            [sys.executable, "-m", "tests.pretend_cuda", *words[1:]],
            cwd=root,
            capture_output=True,
            text=True,
            env={**ONE_THREAD, "PRETEND_CUDA": str(stub)},
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        results = [json.loads(text) for text in done.stdout.splitlines()]
        assert len(results) == len(lines), done.stderr
        return results

    return pretended


def faults(result, line):
    """Return what a GPU would complain of, or wait for, in the run of a command line."""
    precision = line[line.index("--precision") + 1] if "--precision" in line else "bf16"
    found = [f"exit {result['exit']}"] if result["exit"] else []
    found += [result["error"]] if result["error"] else []
    found += [f"waits for {wait}" for wait in result["waits"]]
    for dtype, number in result["products"].items():
        if dtype != PRECISIONS[precision]:
            found.append(f"{number} products in {dtype}")
    if line[0] != "generate" and not result["kernels"]:
        found.append("no micro-batch")
    return found


def shape(*flags, layers):
    return [SHAPE, "--layers", str(layers), *flags]


def in_32_blocks(one, two):
    """Return the kernels of a micro-batch in 32 blocks, from those of one block and of two."""
    return one["kernels"][0] + 31 * (two["kernels"][0] - one["kernels"][0])


def test_training_and_generation_run_and_wait_for_nothing(pretended):
    """Without a device mismatch, a wait in a micro-batch, or a product in another dtype.

    Greedy answers bring the likeliest tokens to the CPU, and no
    row of logits.
    """
    lines = [[*TRAIN, *flags] for flags in FLAGS.values()]
    lines += [ANSWER, [*ANSWER, "--temperature", "0.8", "--top-k", "20", "--top-p", "0.9"]]
    results = pretended(*lines)
    for line, result in zip(lines, results, strict=True):
        assert not faults(result, line), line
    logits = 4 * 24 * 1000                           # bytes: fp32, guesses, vocabulary
    assert 0 < results[len(FLAGS)]["bytes"] < logits / 10


@pytest.mark.slow
def test_more_kinds_of_training(pretended):
    lines = [[*TRAIN, *flags] for flags in SLOW_FLAGS.values()]
    for name, result, line in zip(SLOW_FLAGS, pretended(*lines), lines, strict=True):
        assert not faults(result, line), name


@pytest.mark.slow
def test_every_method(pretended):
    """And the whole model, under autocast."""
    names = [*METHODS, "full"]
    lines = [[*TRAIN, "--method", name] for name in names]
    for name, result, line in zip(names, pretended(*lines), lines, strict=True):
        assert not faults(result, line), name


@pytest.mark.slow
def test_more_kinds_of_answers(pretended, tmp_path):
    adapter = str(tmp_path / "adapter.pt")
    lines = [
        [*TRAIN, "--quantize", "nf4", "--out", str(tmp_path)],
        ["generate", "--adapter", adapter, "--instruction", "Say", "--max-new-tokens", "2"],
        ["generate", "--adapter", adapter, "--instruction", "Say", "--merge"],
        [*ANSWER, "--beams", "3"],
        [*ANSWER, "--no-repeat-ngram", "2"],
        [*ANSWER, "--precision", "fp32"],
        ["generate", "--adapter", "none", "--data", "finetune/demo/held_out.json", "--score"],
    ]
    for line, result in zip(lines, pretended(*lines), strict=True):
        assert not faults(result, line), line


@pytest.mark.slow
@pytest.mark.parametrize("flags, most", [
    ([], MOST_KERNELS),
    (["--share-prefix"], MOST_SHARED),
    (["--quantize", "nf4", "--checkpointing"], MOST_NF4),
])
def test_kernels_of_a_micro_batch_in_7b_s_shape(pretended, flags, most):
    """By the real number of blocks, and by what two blocks say of it."""
    lines = [[SHAPE, *flags], shape(*flags, layers=1), shape(*flags, layers=2)]
    whole, *parts = pretended(*lines)
    assert not faults(whole, lines[0])
    assert whole["kernels"][0] == pytest.approx(in_32_blocks(*parts), rel=0.01)
    assert 2000 < whole["kernels"][0] <= most


# fault: (file, code, what stands there with the fault, command lines), as in test_mutations.py.
SHAPES = [shape(layers=1), shape(layers=2)]
SHAPES_NF4 = [shape("--quantize", "nf4", "--checkpointing", layers=n) for n in (1, 2)]
PLANTED = {
    "tokens stay on the CPU": ("finetune/batches.py",
        "tokens=copy_to(self.tokens, device)", "tokens=self.tokens", [TRAIN]),
    "positions stay on the CPU": ("llama/layout.py",
        "other.positions = copy_of(self.positions)", "other.positions = self.positions", [TRAIN]),
    "rows stay on the CPU": ("finetune/loss.py",
        "rows = to_device(rows, batch.tokens.device)", "pass", [TRAIN]),
    "labels on the device": ("finetune/batches.py",
        "self._replace(tokens=copy_to(self.tokens, device), layout=layout)",
        "self._replace(tokens=self.tokens.to(device), labels=self.labels.to(device), "
        "layout=layout)", [TRAIN]),
    "the loss is read": ("train.py",
        "total += loss_share.detach()", "total += loss_share.item()", [TRAIN]),
    "angles on the CPU": ("llama/model.py",
        "rope = rope[layout.positions]", "rope = rope.cpu()[layout.positions]", [TRAIN]),
    "an adapter in fp32": ("lora/layers.py",
        "inner = F.linear(self.dropout(x), A.to(x.dtype))",
        "inner = F.linear(self.dropout(x).float(), A).to(x.dtype)", [TRAIN]),
    "a base in fp32": ("finetune/job.py",
        "job.precision.dtype if job.lora else torch.float32", "torch.float32", [TRAIN]),
    "masks on the CPU": ("llama/layout.py",
        "torch.zeros_like(visible, dtype=keys.dtype)",
        "torch.zeros(visible.shape, dtype=keys.dtype)",
        [[*TRAIN, "--precision", "fp32", "--share-prefix"]]),
    "masks in fp32": ("llama/layout.py",
        "torch.zeros_like(visible, dtype=keys.dtype)",
        "torch.zeros_like(visible, dtype=torch.float32)",
        [ANSWER]),
    "cuDNN's plans": ("finetune/hardware.py",
        "torch.backends.cuda.enable_cudnn_sdp(False)", "pass",
        [[*TRAIN, "--precision", "fp32"]]),
    "a prompt on the CPU": ("llama/sampling.py",
        "tokens = torch.tensor([packed_tokens], device=device)",
        "tokens = torch.tensor([packed_tokens])", [ANSWER]),
    "a call per segment": ("llama/layout.py",
        "not self.trees and takes_one_call(q, k)", "False", SHAPES),
    "nf4 in seven kernels": ("lora/quantize.py",
        "unpack = compiled_levels(self.codes.device)", "pass", SHAPES_NF4),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_finds_its_place(fault):
    path, before, after, _ = PLANTED[fault]
    code, n_places = mutated((ROOT / path).read_text(), before, after)
    assert n_places == 1
    compile(code, path, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, pretended, tmp_path):
    path, before, after, lines = PLANTED[fault]
    folder = mutated_copy(tmp_path / "copy", path, before, after)
    results = pretended(*lines, root=folder)
    found = faults(results[0], lines[0])
    if len(lines) == 2:
        most = MOST_NF4 if lines is SHAPES_NF4 else MOST_KERNELS
        assert not found and in_32_blocks(*results) > most
    else:
        assert found
        assert not any(slip in found[0] for slip in ("NameError", "SyntaxError", "Attribute"))


# The day with a GPU, as a command


def test_the_day_names_what_it_measures():
    assert {*gpu.CELLS} == {*on_gpu.CELLS, "peers"}


def test_a_cell_that_failed_is_tried_again_and_others_are_kept(tmp_path, monkeypatch):
    table = tables.Table("gpu", tmp_path, "here", "`this`")
    measured = []

    def measure(name, is_pretended, table):
        measured.append(name)
        if name == "interruptions" and measured.count(name) == 1:
            raise gpu.CellFailed("stopped after 120 seconds")
        return {"tokens/s": 17000.0}

    monkeypatch.setattr(gpu, "measure", measure)
    args = benchmark.parse_args(["gpu", "--pretend", "--cells", "7b? plain,interruptions"])
    first, again = (gpu.make(args, table) for _ in range(2))
    assert measured == ["7b, plain", "interruptions", "interruptions"]
    assert "| 7b, plain | tokens/s | 17,000 | 18,000 |" in first
    assert "| interruptions | failed | stopped after 120 seconds |  |" in first
    assert "| interruptions | tokens/s | 17,000 |  |" in again


def test_a_cell_ends_with_its_time_limit(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.CELLS, "7b, plain", gpu.Cell(0.1, {}))
    with pytest.raises(gpu.CellFailed, match="stopped after 0.1 seconds"):
        gpu.measure("7b, plain", False, tables.Table("gpu", tmp_path, "here", "`this`"))


def test_without_a_gpu_the_day_is_refused(refused):
    assert "no GPU here" in refused(benchmark.main, "gpu")


@pytest.mark.slow
def test_every_cell_of_the_day_runs_on_a_pretended_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--pretend", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**ONE_THREAD, "PRETEND_CUDA": str(tmp_path / "stub.so")},
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {row[0].removeprefix("| ") for row in rows[1:]} == {*gpu.CELLS}
    assert not [row for row in rows if row[1] == "failed"]
