"""Bad input to the command lines: one clear line (what, where), exit code 2, no traceback, nothing written over."""
import json
import random
import re

import pytest
import torch

import generate
import train
from llama import load_checkpoint
from lora import read_adapter

from .helpers import Attack, given_once, saved


@pytest.mark.parametrize("flags, message", [
    (["--layers", "0"], "argument --layers: 0 is out of range, must be at least 1"),
    (["--layers", "two"], "argument --layers: invalid whole number value: 'two'"),
    (["--layers", "3"], "so layers must be 1 to 2, not 3"),
    (["--max-seq-len", "1"], "--max-seq-len: 1 is out of range, must be at least 2"),
    (["--max-seq-len", "2"], "examples.json: none of 12 examples has an answer token within 2 tokens"),
    (["--val-fraction", "1"], "must be above 0 and below 1"),
    (["--val-fraction", "0.01"], "--val-fraction 0.01 of 12 examples leaves one side empty"),
    (["--val-fraction", "0.5", "--val-data", "a.json"], "both name held-out examples"),
    (["--val-data", "nowhere.json"], "no data file at nowhere.json"),
    (["--data", "nowhere.json"], "no data file at nowhere.json"),
    (["--data", "."], "no data file at ."),
    (["--checkpoint", "nowhere"], "no checkpoint folder at nowhere"),
    (["--checkpoint", "examples.json"], "no checkpoint folder at examples.json"),
    (["--checkpoint", "."], "no params.json in ."),
    (["--seed", "-1"], "--seed: -1 is out of range"),
    (["--seed", "9" * 400], "--seed: 999"),
    (["--method", "none"], "argument --method: invalid choice: 'none'"),
    (["--r", "0"], "--r: 0 is out of range, must be at least 1"),
    (["--r", "33"], "layers.0.attention.wq: r is 33, must be 1 to 32"),
    (["--r", "17", "--targets", "wv"], "layers.0.attention.wv: r is 17, must be 1 to 16"),
    (["--alpha", "0"], "--alpha: 0 is out of range, must be above 0"),
    (["--alpha", "nan"], "--alpha: nan is out of range"),
    (["--dropout", "1"], "must be at least 0 and below 1"),
    (["--targets", "wq,wz"], "no layer named wz to adapt; the model has output, tok_embeddings, w1, w2, w3, wk, wo, wq, wv"),
    (["--targets", "norm"], "no layer named norm to adapt"),
    (["--targets", ""], "targets are ('',), must be names of layers"),
    (["--lr", "0"], "--lr: 0 is out of range, must be above 0"),
    (["--lr", "inf"], "--lr: inf is out of range, must be above 0 and at most 9007199254740992"),
    (["--weight-decay", "-1"], "--weight-decay: -1 is out of range"),
    (["--warmup-steps", "1.5"], "argument --warmup-steps: invalid whole number value: '1.5'"),
    (["--schedule", "linear"], "argument --schedule: invalid choice"),
    (["--epochs", "0"], "--epochs: 0 is out of range"),
    (["--max-steps", "0"], "--max-steps: 0 is out of range"),
    (["--clip-grad-norm", "-1"], "--clip-grad-norm: -1 is out of range"),
    (["--batch-size", "0"], "--batch-size: 0 is out of range"),
    (["--accumulation-steps", "0"], "--accumulation-steps: 0 is out of range"),
    (["--precision", "fp8"], "argument --precision: invalid choice"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    (["--device", "toaster"], "--device toaster cannot be used here"),
    (["--out", "examples.json"], "cannot write to --out examples.json"),
    (["--out", "examples.json/deeper"], "cannot write to --out examples.json/deeper"),
    (["--out", "/proc/none"], "cannot write to --out /proc/none"),
    (["--log-every", "0"], "--log-every: 0 is out of range"),
    (["--checkpoint", ""], "argument --checkpoint: is empty"),
    (["--data", ""], "argument --data: is empty"),
    (["--val-data", " "], "argument --val-data: is empty"),
    (["--out", ""], "argument --out: is empty"),
    (["--device", "meta"], "--device meta cannot be used here"),
    (["--device", "hpu"], "--device hpu cannot be used here"),
    (["--data", "\udcff.json"], "argument --data: is not UTF-8 text"),
    (["--lay", "1"], "unrecognized arguments: --lay 1"),
    (["--checkpoint"], "argument --checkpoint: expected one argument"),
])
def test_train(refused, base, data, tmp_path, flags, message):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = given_once(["--checkpoint", str(base), "--data", str(data), *flags])
    assert message in refused(train.main, *flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content, message", [
    ('[{"instruction": "a", "output": "b"},\n{"instruction" "a"}]', "bad.json, line 2, column 16: not JSON"),
    ('[{"instruction": "a"}]', "bad.json, example 1 has no 'output'"),
    ('[{"instruction": "a", "output": ["b"]}]', "bad.json, example 1: 'output' is a list, not text"),
    ("[]", "bad.json holds no example"),
])
def test_data_that_is_wrong(refused, base, tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    for flag in ("--data", "--val-data"):
        flags = ["--data", "bad.json"] if flag == "--data" else ["--data", str(tmp_path / "good.json"), "--val-data", "bad.json"]
        (tmp_path / "good.json").write_text('[{"instruction": "a", "output": "b"}]')
        assert message in refused(train.main, "--checkpoint", str(base), *flags)


@pytest.mark.parametrize("flags, message", [
    (["--adapter", "nowhere.pt"], "no adapter file at nowhere.pt"),
    (["--adapter", "."], "no adapter file at ."),
    (["--adapter", "examples.json"], "examples.json is not an adapter file"),
    (["--adapter", "one/adapter.pt", "--layers", "2"], "one/adapter.pt was trained on another base"),
    (["--adapter", "one/adapter.pt", "--checkpoint", "other"], "one/adapter.pt was trained on another base"),
    (["--adapter", "one/adapter.pt", "--layers", "3"], "so layers must be 1 to 2, not 3"),
    (["--adapter", "random/adapter.pt"], "random/adapter.pt was trained over random weights (--init random), which were not kept"),
    (["--checkpoint", "nowhere"], "no checkpoint folder at nowhere"),
    (["--adapter", "none", "--merge"], "--merge needs an adapter"),
    (["--input", "b"], "--input needs an --instruction"),
    (["--temperature", "-1"], "--temperature: -1 is out of range"),
    (["--max-new-tokens", "0"], "--max-new-tokens: 0 is out of range"),
    (["--seed", "9" * 30], "is out of range"),
    (["--instruction", "a " * 5000, "--adapter", "none"], "tokens and the model takes 4096"),
    (["--adapter", ""], "argument --adapter: is empty"),
    (["--instruction", ""], "argument --instruction: is empty"),
    (["--instruction", "\udcff"], "argument --instruction: is not UTF-8 text"),
    (["--instruction", "a", "--input", "\udcff"], "argument --input: is not UTF-8 text"),
    (["--beams", "100000"], "--beams: 100000 is out of range, must be at least 1 and at most 256"),
    (["--data", "nowhere.json"], "no data file at nowhere.json"),
    (["--data", "other"], "no data file at other"),
    (["--data", "examples.json", "--interactive"], "argument --interactive: not allowed with argument --data"),
    (["--data", "examples.json", "--instruction", "a"], "argument --instruction: not allowed with argument --data"),
    (["--top-k", "3"], "--top-k and --top-p need a --temperature above 0"),
    (["--top-p", "0.5"], "--top-k and --top-p need a --temperature above 0"),
    (["--top-k", "-1", "--temperature", "1"], "--top-k: -1 is out of range"),
    (["--top-p", "0", "--temperature", "1"], "--top-p: 0 is out of range, must be above 0 and at most 1"),
    (["--top-p", "1.1", "--temperature", "1"], "--top-p: 1.1 is out of range"),
    (["--beams", "0"], "--beams: 0 is out of range"),
    (["--beams", "2", "--temperature", "1"], "--beams searches and --temperature draws; give only one"),
    (["--no-repeat-ngram", "-1"], "--no-repeat-ngram: -1 is out of range"),
    (["--score"], "--score needs --data, whose outputs are the right answers"),
    (["--choices", "a,b"], "--choices needs --score"),
    (["--score", "--data", "examples.json", "--choices", "a"], "--choices a: give two answers or more, each once"),
    (["--score", "--data", "examples.json", "--choices", "a,b,a"], "--choices a,b,a: give two answers or more, each once"),
    (["--score", "--data", "examples.json", "--choices", "a, "], "--choices a, : give two answers or more, each once"),
    (["--score", "--data", "examples.json", "--choices", "a,\udcff"], "argument --choices: is not UTF-8 text"),
    (["--score", "--data", "examples.json", "--choices", "a,b"], "examples.json, example 1: its output 'blue ' is not one of the choices 'a', 'b'"),
    (["--score", "--data", "examples.json", "--beams", "2"], "--score decodes greedily"),
])
def test_generate(refused, base, data, tmp_path, flags, message):
    common = ["--checkpoint", str(base), "--data", str(data), "--layers", "1", "--max-steps", "1", "--accumulation-steps", "1"]
    train.main([*common, "--out", "one"])
    train.main([*common, "--out", "random", "--init", "random"])
    (tmp_path / "other").mkdir()
    for path in base.iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    state = torch.load(base / "consolidated.00.pth", weights_only=True)
    torch.save({name: tensor * 1.1 for name, tensor in state.items()}, tmp_path / "other/consolidated.00.pth")
    flags = flags if "--checkpoint" in flags or flags[0] == "--adapter" and flags[1] != "none" else [*flags, "--checkpoint", str(base)]
    assert message in refused(generate.main, *flags)


def test_a_folder_where_a_file_of_the_run_belongs(refused, base, data, tmp_path):
    flags = ["--checkpoint", str(base), "--data", str(data), "--max-steps", "1"]
    train.main(flags)
    (tmp_path / "out/adapter.pt").unlink()
    (tmp_path / "out/adapter.pt").mkdir()
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    assert "out/adapter.pt is a folder, where a file of the run belongs" in refused(train.main, *flags)
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_changed_at_random_in_checkpoints_and_adapters(base, data, tmp_path, monkeypatch):
    """200 files with a few bytes changed or the end cut off: each loads or is a ValueError, whatever the pickle hits."""
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out", "run", "--r", "1", "--targets", "wv"])
    draw = random.Random(0)
    for path, load in ((base / "consolidated.00.pth", lambda: load_checkpoint(base, layers=1)),
                       (tmp_path / "run/adapter.pt", lambda: read_adapter("run/adapter.pt"))):
        whole = path.read_bytes()
        pickled = whole.index(b"data.pkl")
        for _ in range(100):
            broken = bytearray(whole if draw.random() < 0.8 else whole[:draw.randrange(len(whole))])
            for _ in range(draw.randint(1, 4)):
                broken[min(len(broken) - 1, pickled + draw.randrange(2000))] = draw.randrange(256)
            path.write_bytes(broken)
            try:
                load()
            except ValueError:
                pass
        path.write_bytes(whole)


def test_an_adapter_file_that_names_its_base_by_nonsense(refused, base, data, tmp_path):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out", "run"])
    content = torch.load("run/adapter.pt", weights_only=True)
    for wrong in (dict(folder=5), dict(layers="x"), dict(layers=[1])):
        torch.save({**content, "base": {**content["base"], **wrong}}, "run/adapter.pt")
        message = refused(generate.main, "--adapter", "run/adapter.pt")
        assert re.search("adapter file: (it names its base by|what it says of its base)", message)


def test_a_base_that_has_moved_is_named(refused, base, data, tmp_path):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out", "run"])
    base.rename(tmp_path / "moved")
    assert f"no checkpoint folder at {base}" in refused(generate.main, "--adapter", "run/adapter.pt", "--instruction", "a")
    assert json.loads((tmp_path / "run/args.json").read_text())["checkpoint"] == str(base)
    generate.main(["--adapter", "run/adapter.pt", "--instruction", "a", "--checkpoint", "moved", "--max-new-tokens", "1"])


@pytest.mark.parametrize("name, content, message", [
    ("params.json", b"", "params.json is not JSON"),
    ("params.json", b"\xff\xfe", "params.json is not JSON"),
    ("params.json", b"[" * 100_000, "params.json is not JSON"),
    ("params.json", b"null", "params.json holds a NoneType"),
    ("params.json", b"{}", "params.json lacks ['dim', 'n_heads', 'n_layers']"),
    ("params.json", dict(dim="32"), "params.json: dim is '32', not a number of the right kind"),
    ("params.json", dict(dim=32.0), "params.json: dim is 32.0, not a number of the right kind"),
    ("params.json", dict(n_layers=None), "params.json: n_layers is None"),
    ("params.json", dict(n_layers=10 ** 9), "params.json: n_layers is 1000000000, must be 1 to"),
    ("params.json", dict(n_layers=-1), "params.json: n_layers is -1"),
    ("params.json", dict(dim=10 ** 30), "params.json: dim is 1000"),
    ("params.json", dict(vocab_size=0), "params.json: vocab_size 0 is less than the tokenizer's 400"),
    ("params.json", dict(norm_eps=-1), "params.json: norm_eps is -1"),
    ("params.json", dict(rope_theta=float("nan")), "params.json: rope_theta is nan"),
    ("params.json", dict(ffn_dim_multiplier=float("inf")), "params.json: ffn_dim_multiplier is inf"),
    ("params.json", dict(rope_scaling={"factor": 2}), "has 'rope_scaling', which this model does not support"),
    ("params.json", dict(n_kv_heads=4), "of another shape: layers.0.attention.wk.weight"),
    ("params.json", "folder", "no params.json in"),
    ("tokenizer.model", b"", "tokenizer.model is empty"),
    ("tokenizer.model", b"{}", "tokenizer.model is not a sentencepiece model"),
    ("tokenizer.model", "folder", "no tokenizer at"),
    ("consolidated.00.pth", b"", "consolidated.00.pth is not a checkpoint of tensors"),
    ("consolidated.00.pth", b"PK\x03\x04", "consolidated.00.pth is not a checkpoint of tensors"),
    ("consolidated.00.pth", b"\x80\x04N.", "consolidated.00.pth is not a checkpoint of tensors"),
    ("consolidated.00.pth", saved([torch.ones(2)]), "does not hold a dict of floating-point tensors"),
    ("consolidated.00.pth", saved({"model": {"norm.weight": torch.ones(2)}}), "does not hold a dict of floating-point tensors"),
    ("consolidated.00.pth", saved({7: torch.ones(2)}), "does not hold a dict of floating-point tensors"),
    ("consolidated.00.pth", saved({"norm.weight": torch.ones(32).to_sparse()}), "it calls torch._utils._rebuild_sparse_tensor"),
    ("consolidated.00.pth", saved({"norm.weight": torch.ones(32, device="meta")}), "it calls torch._utils._rebuild_meta_tensor_no_storage"),
    ("consolidated.00.pth", saved({"a": Attack()}), "consolidated.00.pth is not a checkpoint of tensors"),
    ("consolidated.00.pth", saved({"norm.weight": torch.ones(32)}), "missing: layers.0.attention.wk.weight"),
    ("consolidated.00.pth", "folder", "consolidated.00.pth is not a checkpoint of tensors"),
    ("consolidated.02.pth", saved({"norm.weight": torch.ones(32)}), "no consolidated.01.pth in"),
])
def test_a_checkpoint_that_is_wrong(refused, base, data, tmp_path, name, content, message, capsys):
    path = base / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content}).encode()
    path.unlink(missing_ok=True)
    path.mkdir() if content == "folder" else path.write_bytes(content)
    assert message in refused(train.main, "--checkpoint", str(base), "--data", str(data))
    assert message in refused(generate.main, "--checkpoint", str(base), "--adapter", "none")
    assert not (tmp_path / "out" / "args.json").exists()
