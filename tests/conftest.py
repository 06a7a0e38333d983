"""Fixtures: a tokenizer trained in memory and a tiny checkpoint, so that nothing is downloaded."""
import io
import json
import os

GPU_TESTS = os.environ.get("GPU_TESTS") == "1"
if not GPU_TESTS:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""          # before torch looks for GPUs

import pytest
import sentencepiece as spm
import torch

import generate
import train
from finetune import printed
from llama import Tokenizer, save_checkpoint

from .helpers import CORPUS, EXAMPLES, given_once, metrics, tiny

torch.set_num_threads(1)  # For tensors this small, threads only wait for each other.


def pytest_collection_modifyitems(config, items):
    """Skip the tests that need a GPU; with GPU_TESTS=1 run these, and only these."""
    on_gpus = [item for item in items if item.get_closest_marker("gpu")]
    if GPU_TESTS:
        config.hook.pytest_deselected(items=[item for item in items if item not in on_gpus])
        items[:] = on_gpus
    for item in on_gpus:
        if not GPU_TESTS:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: GPU_TESTS=1 pytest"))


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Runs leave no picture: where matplotlib is installed, it takes most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(printed, "picture_of", lambda out: "none")
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A 400-piece BPE with Llama 2's special ids: unk 0, bos 1, eos 2, no pad."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, model_type="bpe", vocab_size=400,
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return Tokenizer(out.getvalue())


@pytest.fixture
def base(tmp_path, tokenizer):
    """A folder with a checkpoint in Meta's layout: 2 layers of GQA, fp32."""
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    """A file of 12 examples in Alpaca's format."""
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(EXAMPLES))
    return path


@pytest.fixture
def run(base, data, tmp_path, monkeypatch):
    """run("out", *flags) trains in tmp_path and returns the rows of metrics.jsonl."""
    monkeypatch.chdir(tmp_path)

    def run(out, *flags):
        common = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--lr", "1e-2"]
        train.main(given_once([*common, "--out", out, *flags]))
        return metrics(tmp_path / out)
    return run


@pytest.fixture
def answered(capsys):
    """answered(*flags) returns what generate.py writes to stdout, and to stderr."""
    def answered(*flags):
        capsys.readouterr()
        generate.main(["--instruction", "Say blue please.", "--max-new-tokens", "4", *flags])
        return capsys.readouterr()
    return answered


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """refused(main, *flags) returns the one line of an error with exit code 2."""
    monkeypatch.chdir(tmp_path)

    def refused(main, *flags):
        with pytest.raises(SystemExit) as caught:
            main(list(flags))
        output, error = capsys.readouterr()
        assert "the pickle ran" not in output
        assert caught.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
        return error
    return refused
