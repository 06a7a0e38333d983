"""--score --also: the loss on other text, of base and adapter, against plain cross-entropy."""
import json

import pytest
import torch
import torch.nn.functional as F

import generate
from finetune.forgetting import ROW_TOKENS, OtherText
from llama import load_checkpoint
from lora import load_adapter, lora_disabled, save_adapter

from .helpers import EXAMPLES, adapt

TEXTS = ["The sky is blue and the grass is green.", "Count to three: one, two, three.",
         "Blue cold happy sad. " * 80]               # The last one needs several rows.


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    return path


@pytest.fixture
def adapter(base, tmp_path):
    model, _ = load_checkpoint(base)
    save_adapter(adapt(model, r=4), tmp_path / "adapter.pt")
    return tmp_path / "adapter.pt"


def plain_loss(model, rows):
    """Return the mean negative log-likelihood per target, one row at a time."""
    nats = n = 0
    with torch.no_grad():
        for tokens, labels in rows:
            logits = model(torch.tensor([tokens]))[0, :-1]
            nats += F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
            n += sum(label != -100 for label in labels[1:])
    return nats / n, n


def test_the_losses_are_plain_cross_entropy(base, adapter, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.json").write_text(json.dumps(EXAMPLES[:3]))
    argv = ["--adapter", str(adapter), "--data", "held_out.json", "--score"]
    generate.main(argv)
    without = json.loads(capsys.readouterr().out)
    generate.main([*argv, "--also", str(other)])
    line = json.loads(capsys.readouterr().out)
    also = line.pop("also")
    assert line == without
    model, tokenizer = load_checkpoint(base)
    load_adapter(model.eval(), str(adapter))
    rows = OtherText(str(other), tokenizer, model.args.max_seq_len).rows
    assert len(rows) > len(TEXTS) and max(len(tokens) for tokens, _ in rows) <= ROW_TOKENS
    loss, n = plain_loss(model, rows)
    with lora_disabled(model):
        base_loss, _ = plain_loss(model, rows)
    assert (also["data"], also["rows"], also["tokens"]) == (str(other), len(rows), n)
    assert also["adapter"]["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert also["base"]["loss"][0] == pytest.approx(base_loss, rel=1e-5)
    value, low, high = also["difference"]["loss"]
    assert value == pytest.approx(loss - base_loss, rel=1e-4) and low <= value <= high


def test_what_is_refused(refused, adapter, other, base):
    argv = ["--adapter", str(adapter), "--data", "x.json"]
    assert "--also needs --score" in refused(generate.main, *argv, "--also", str(other))
    (other.parent / "x.json").write_text(json.dumps(EXAMPLES[:3]))
    argv += ["--score", "--also"]
    assert "no data file at nowhere" in refused(generate.main, *argv, "nowhere")
    line = refused(generate.main, *argv, str(other.parent / "x.json"))
    assert "has no 'text'" in line
