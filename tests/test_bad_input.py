"""Bad input to the command lines: one clear line (what, where), exit code 2, no traceback, nothing written over."""
import json

import pytest
import torch

import generate
import train


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def refused(main, *flags):
        with pytest.raises(SystemExit) as caught:
            main(list(flags))
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error, error
        return error
    return refused


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
    (["--targets", "wq,wz"], "no layer named wz to adapt; there is output, tok_embeddings, w1, w2, w3, wk, wo, wq, wv"),
    (["--targets", "norm"], "no layer named norm to adapt"),
    (["--targets", ""], "targets are ('',), must be names of layers"),
    (["--lr", "0"], "--lr: 0 is out of range, must be above 0"),
    (["--lr", "inf"], "--lr: inf is out of range"),
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
    (["--lay", "1"], "unrecognized arguments: --lay 1"),
    (["--checkpoint"], "argument --checkpoint: expected one argument"),
])
def test_train(refused, base, data, tmp_path, flags, message):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert message in refused(train.main, "--checkpoint", str(base), "--data", str(data), *flags)
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


def test_a_base_that_has_moved_is_named(refused, base, data, tmp_path):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out", "run"])
    base.rename(tmp_path / "moved")
    assert f"no checkpoint folder at {base}" in refused(generate.main, "--adapter", "run/adapter.pt", "--instruction", "a")
    assert json.loads((tmp_path / "run/args.json").read_text())["checkpoint"] == str(base)
    generate.main(["--adapter", "run/adapter.pt", "--instruction", "a", "--checkpoint", "moved", "--max-new-tokens", "1"])
