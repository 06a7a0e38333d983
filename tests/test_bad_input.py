"""Bad input to the command lines: one clear line, exit code 2, no traceback, nothing written over.

Wrong files are in test_checkpoint.py, test_formats.py, test_dataset.py and test_hostile.py.
"""
import json
import shutil

import pytest
import torch

import generate
import train
from llama import save_checkpoint

from .helpers import EXAMPLES, files_in, stored, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A folder with base, other (another base), examples.json, and two runs: one/ and random/."""
    folder = tmp_path_factory.mktemp("made")
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, folder / "base")
    shutil.copytree(folder / "base", folder / "other")
    other = {name: tensor * 1.1 for name, tensor in stored(folder / "base").items()}
    torch.save(other, folder / "other/consolidated.00.pth")
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = ["--checkpoint", "base", "--data", "examples.json", "--layers", "1",
                 "--max-steps", "1", "--accumulation-steps", "1"]
        train.main([*flags, "--out", "one"])
        train.main([*flags, "--out", "random", "--init", "random"])
    return folder


@pytest.fixture
def here(made, refused, monkeypatch):
    monkeypatch.chdir(made)
    return made


BASE = "--checkpoint=base"


@pytest.mark.parametrize("flags, message", [
    ("--layers=0", "argument --layers: 0 is out of range, must be at least 1"),
    ("--layers=two", "argument --layers: invalid whole number value: 'two'"),
    ("--layers=3", "so layers must be 1 to 2, not 3"),
    ("--max-seq-len=2", "examples.json: none of 12 examples has an answer token within 2 tokens"),
    ("--val-fraction=0.01", "--val-fraction 0.01 of 12 examples leaves one side empty"),
    ("--val-fraction=0.5 --val-data=a.json", "both name held-out examples"),
    ("--val-data=nowhere.json", "no data file at nowhere.json"),
    ("--data=nowhere.json", "no data file at nowhere.json"),
    ("--checkpoint=nowhere", "no checkpoint folder at nowhere"),
    ("--checkpoint=.", "no params.json in ."),
    ("--seed=" + "9" * 400, "--seed: 999"),
    ("--method=none", "argument --method: invalid choice: 'none'"),
    ("--r=17 --targets=wv", "layers.0.attention.wv: r is 17, must be 1 to 16"),
    ("--alpha=nan", "--alpha: nan is out of range"),
    ("--targets=wq,wz", "no layer named wz to adapt; the model has output, tok_embeddings, w1, w2"),
    ("--lr=inf", "--lr: inf is out of range, must be above 0 and at most 9007199254740992"),
    ("--device=cuda:99", "--device cuda:99 cannot be used here"),
    ("--out=examples.json", "cannot write to --out examples.json"),
    ("--out=examples.json/deeper", "cannot write to --out examples.json/deeper"),
    ("--adapter=one/adapter.pt --method-options=start=pissa",
     "--adapter brings its own settings; leave out --method-options"),
    ("--adapter=one/adapter.pt --r=16 --method=lora", "leave out --method, --r;"),
    ("--adapter=one/adapter.pt --out=one --overwrite", "one holds the adapter to start from"),
    ("--method=full --dropout=0.1 --r=16", "has no adapter; leave out --r, --dropout;"),
    ("--data=", "argument --data: is empty"),
    ("--data=\udcff.json", "argument --data: is not UTF-8 text"),
    ("--lay=1", "unrecognized arguments: --lay=1"),
    ("--checkpoint", "argument --checkpoint: expected one argument"),
])
def test_train(refused, here, flags, message):
    before = files_in(here)
    flags = flags.split(" ")
    given = [flag.partition("=")[0] for flag in flags]
    for flag in ("--checkpoint=base", "--data=examples.json"):
        if flag.partition("=")[0] not in given:
            flags.insert(0, flag)
    assert message in refused(train.main, *flags)
    assert files_in(here) == before


def test_a_file_is_named_once_by_whatever_path(refused, here):
    for names in (["examples.json", "./examples.json"], ["examples.json", "one/../examples.json"]):
        assert "--data names a file twice" in refused(train.main, BASE, "--data", *names)


def test_a_model_in_hugging_faces_layout_is_not_written_over(refused, here):
    folder = here / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for flags in ([], ["--overwrite"], ["--resume"]):
        error = refused(train.main, BASE, "--data=examples.json", "--out=hf", *flags)
        assert "hf holds a model already, and not a run" in error
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("flags", [
    ["--checkpoint=loop", "--data=examples.json"], ["--checkpoint=base", "--data=loop"],
    *([BASE, "--data=examples.json", *more] for more in (
        ["--out=loop"], ["--adapter=loop"], ["--teacher=loop"],
        ["--teacher=base", "--teacher-adapter=loop"]))])
def test_a_link_to_itself(refused, here, flags):
    """Path.resolve() raises a RuntimeError for one, in Python 3.11."""
    (here / "loop").symlink_to("loop")
    try:
        assert "loop" in refused(train.main, *flags)
    finally:
        (here / "loop").unlink()


ONE = "--adapter=one/adapter.pt"
SCORE = f"{BASE} --score --data=examples.json"
HOT = f"{BASE} --temperature=1"


@pytest.mark.parametrize("flags, message", [
    ("--adapter=nowhere.pt", "no adapter file at nowhere.pt"),
    ("--adapter=examples.json", "examples.json is not an adapter file"),
    (f"{ONE} --layers=2", "one/adapter.pt was trained on another base"),
    (f"{ONE} --checkpoint=other", "one/adapter.pt was trained on another base"),
    ("--adapter=random/adapter.pt",
     "random/adapter.pt was trained over random weights (--init random), which were not kept"),
    ("--checkpoint=nowhere", "no checkpoint folder at nowhere"),
    (f"{BASE} --adapter=none --merge", "--merge needs an adapter"),
    (f"{BASE} --input=b", "--input needs an --instruction"),
    (f"{BASE} --adapter=none --instruction=" + "a_" * 5000, "tokens and the model takes 4096"),
    ("--instruction=\udcff", "argument --instruction: is not UTF-8 text"),
    ("--data=nowhere.json", "no data file at nowhere.json"),
    ("--data=examples.json --interactive", "--interactive: not allowed with argument --data"),
    (f"{BASE} --top-k=3", "--top-k and --top-p need a --temperature above 0"),
    (f"{HOT} --top-p=0", "--top-p: 0 is out of range, must be above 0 and at most 1"),
    (f"{HOT} --beams=2", "--beams searches and --temperature draws; give only one"),
    ("--score", "--score needs --data, whose outputs are the right answers"),
    ("--choices=a,b", "--choices needs --score"),
    (f"{SCORE} --choices=a,b,a", "--choices a,b,a: give two answers or more, each once"),
    (f"{SCORE} --choices=a,b",
     "examples.json, example 1: its output 'blue ' is not one of the choices 'a', 'b'"),
    (f"{SCORE} --beams=2", "--score decodes greedily"),
])
def test_generate(refused, here, flags, message):
    assert message in refused(generate.main, *flags.split(" "))
