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


@pytest.mark.parametrize("flags, message", [
    ("--layers=0", "argument --layers: 0 is out of range, must be at least 1"),
    ("--layers=two", "argument --layers: invalid whole number value: 'two'"),
    ("--layers=3", "so layers must be 1 to 2, not 3"),
    ("--max-seq-len=1", "--max-seq-len: 1 is out of range, must be at least 2"),
    ("--max-seq-len=2", "examples.json: none of 12 examples has an answer token within 2 tokens"),
    ("--val-fraction=1", "must be above 0 and below 1"),
    ("--val-fraction=0.01", "--val-fraction 0.01 of 12 examples leaves one side empty"),
    ("--val-fraction=0.5 --val-data=a.json", "both name held-out examples"),
    ("--val-data=nowhere.json", "no data file at nowhere.json"),
    ("--data=nowhere.json", "no data file at nowhere.json"),
    ("--data=.", "no data file at ."),
    ("--checkpoint=nowhere", "no checkpoint folder at nowhere"),
    ("--checkpoint=examples.json", "no checkpoint folder at examples.json"),
    ("--checkpoint=.", "no params.json in ."),
    ("--seed=-1", "--seed: -1 is out of range"),
    ("--seed=" + "9" * 400, "--seed: 999"),
    ("--method=none", "argument --method: invalid choice: 'none'"),
    ("--r=0", "--r: 0 is out of range, must be at least 1"),
    ("--r=33", "layers.0.attention.wq: r is 33, must be 1 to 32"),
    ("--r=17 --targets=wv", "layers.0.attention.wv: r is 17, must be 1 to 16"),
    ("--alpha=0", "--alpha: 0 is out of range, must be above 0"),
    ("--alpha=nan", "--alpha: nan is out of range"),
    ("--dropout=1", "must be at least 0 and below 1"),
    ("--targets=wq,wz", "no layer named wz to adapt; the model has output, tok_embeddings, w1, w2"),
    ("--targets=norm", "no layer named norm to adapt"),
    ("--targets=", "targets are ('',), must be names of layers"),
    ("--lr=0", "--lr: 0 is out of range, must be above 0"),
    ("--lr=inf", "--lr: inf is out of range, must be above 0 and at most 9007199254740992"),
    ("--weight-decay=-1", "--weight-decay: -1 is out of range"),
    ("--warmup-steps=1.5", "argument --warmup-steps: invalid whole number value: '1.5'"),
    ("--schedule=linear", "argument --schedule: invalid choice"),
    ("--epochs=0", "--epochs: 0 is out of range"),
    ("--max-steps=0", "--max-steps: 0 is out of range"),
    ("--clip-grad-norm=-1", "--clip-grad-norm: -1 is out of range"),
    ("--batch-size=0", "--batch-size: 0 is out of range"),
    ("--accumulation-steps=0", "--accumulation-steps: 0 is out of range"),
    ("--precision=fp8", "argument --precision: invalid choice"),
    ("--device=cuda:99", "--device cuda:99 cannot be used here"),
    ("--device=toaster", "--device toaster cannot be used here"),
    ("--device=meta", "--device meta cannot be used here"),
    ("--device=hpu", "--device hpu cannot be used here"),
    ("--out=examples.json", "cannot write to --out examples.json"),
    ("--out=examples.json/deeper", "cannot write to --out examples.json/deeper"),
    ("--out=/proc/none", "cannot write to --out /proc/none"),
    ("--log-every=0", "--log-every: 0 is out of range"),
    ("--checkpoint=", "argument --checkpoint: is empty"),
    ("--data=", "argument --data: is empty"),
    ("--val-data=", "argument --val-data: is empty"),
    ("--out=", "argument --out: is empty"),
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


ONE = "--adapter=one/adapter.pt"
BASE = "--checkpoint=base"
SCORE = f"{BASE} --score --data=examples.json"
HOT = f"{BASE} --temperature=1"


@pytest.mark.parametrize("flags, message", [
    ("--adapter=nowhere.pt", "no adapter file at nowhere.pt"),
    ("--adapter=.", "no adapter file at ."),
    ("--adapter=examples.json", "examples.json is not an adapter file"),
    (f"{ONE} --layers=2", "one/adapter.pt was trained on another base"),
    (f"{ONE} --checkpoint=other", "one/adapter.pt was trained on another base"),
    (f"{ONE} --layers=3", "so layers must be 1 to 2, not 3"),
    ("--adapter=random/adapter.pt",
     "random/adapter.pt was trained over random weights (--init random), which were not kept"),
    ("--checkpoint=nowhere", "no checkpoint folder at nowhere"),
    (f"{BASE} --adapter=none --merge", "--merge needs an adapter"),
    (f"{BASE} --input=b", "--input needs an --instruction"),
    (f"{BASE} --temperature=-1", "--temperature: -1 is out of range"),
    (f"{BASE} --max-new-tokens=0", "--max-new-tokens: 0 is out of range"),
    (f"{BASE} --seed=" + "9" * 30, "is out of range"),
    (f"{BASE} --adapter=none --instruction=" + "a_" * 5000, "tokens and the model takes 4096"),
    ("--adapter=", "argument --adapter: is empty"),
    ("--instruction=", "argument --instruction: is empty"),
    ("--instruction=\udcff", "argument --instruction: is not UTF-8 text"),
    ("--instruction=a --input=\udcff", "argument --input: is not UTF-8 text"),
    ("--data=nowhere.json", "no data file at nowhere.json"),
    ("--data=other", "no data file at other"),
    ("--data=examples.json --interactive", "--interactive: not allowed with argument --data"),
    ("--data=examples.json --instruction=a", "--instruction: not allowed with argument --data"),
    (f"{BASE} --top-k=3", "--top-k and --top-p need a --temperature above 0"),
    (f"{BASE} --top-p=0.5", "--top-k and --top-p need a --temperature above 0"),
    (f"{HOT} --top-k=-1", "--top-k: -1 is out of range"),
    (f"{HOT} --top-p=0", "--top-p: 0 is out of range, must be above 0 and at most 1"),
    (f"{HOT} --top-p=1.1", "--top-p: 1.1 is out of range"),
    (f"{BASE} --beams=0", "--beams: 0 is out of range"),
    (f"{BASE} --beams=100000", "--beams: 100000 is out of range, must be at least 1"),
    (f"{HOT} --beams=2", "--beams searches and --temperature draws; give only one"),
    (f"{BASE} --no-repeat-ngram=-1", "--no-repeat-ngram: -1 is out of range"),
    ("--score", "--score needs --data, whose outputs are the right answers"),
    ("--choices=a,b", "--choices needs --score"),
    (f"{SCORE} --choices=a", "--choices a: give two answers or more, each once"),
    (f"{SCORE} --choices=a,b,a", "--choices a,b,a: give two answers or more, each once"),
    (f"{SCORE} --choices=a,", "--choices a,: give two answers or more, each once"),
    (f"{SCORE} --choices=a,\udcff", "argument --choices: is not UTF-8 text"),
    (f"{SCORE} --choices=a,b",
     "examples.json, example 1: its output 'blue ' is not one of the choices 'a', 'b'"),
    (f"{SCORE} --beams=2", "--score decodes greedily"),
])
def test_generate(refused, here, flags, message):
    assert message in refused(generate.main, *flags.split(" "))


@pytest.mark.parametrize("content, message", [
    ('[{"instruction": "a", "output": "b"},\n{"instruction" "a"}]',
     "bad.json, line 2, column 16: not JSON"),
    ('[{"instruction": "a"}]', "bad.json, example 1 has no 'output'"),
    ("[]", "bad.json holds no example"),
])
def test_data_that_is_wrong(refused, base, data, tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    for flags in (["--data", "bad.json"], ["--data", str(data), "--val-data", "bad.json"]):
        assert message in refused(train.main, "--checkpoint", str(base), *flags)


def test_a_folder_where_a_file_of_the_run_belongs(refused, base, data, tmp_path):
    flags = ["--checkpoint", str(base), "--data", str(data), "--max-steps", "1"]
    train.main(flags)
    adapter = tmp_path / "out/adapter.pt"
    adapter.unlink()
    adapter.mkdir()
    before = files_in(tmp_path)
    message = "out/adapter.pt is a folder, where a file of the run belongs"
    assert message in refused(train.main, *flags)
    assert files_in(tmp_path) == before


def test_a_base_that_has_moved_is_named(refused, base, data, tmp_path):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1"])
    base.rename(tmp_path / "moved")
    asked = ["--instruction", "a", "--max-new-tokens", "1"]
    assert f"no checkpoint folder at {base}" in refused(generate.main, *asked)
    args = json.loads((tmp_path / "out/args.json").read_text())
    assert args["checkpoint"] == str(base)
    generate.main([*asked, "--checkpoint", "moved"])
