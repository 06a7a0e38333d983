"""llama/checkpoint.py: Meta's folder in and out, the first N blocks alone, every misfit named."""
import json
import re
import subprocess
import sys

import pytest
import torch

from llama import load_checkpoint, save_checkpoint
from llama.checkpoint import fingerprint
from llama.rnn import RNN, RNNArgs
from lora import merge_lora

from .helpers import (DROP, PEAK, ROOT, Attack, adapt, contents, files_in, saved, spoil, stored,
                      tiny)

TOKENS = torch.tensor([[1, 5, 9, 7, 3]])
BY_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
BY_COLUMNS = ("wo", "w2", "tok_embeddings")


def logits(folder, **settings):
    return load_checkpoint(folder, **settings)[0].eval()(TOKENS)


def test_what_was_saved_comes_back_in_metas_layout_and_the_same_bytes(base, tmp_path, tokenizer):
    model, loaded_tokenizer = load_checkpoint(base)
    assert torch.equal(model.eval()(TOKENS), tiny(tokenizer.vocab_size, n_kv_heads=2)(TOKENS))
    assert loaded_tokenizer.model == tokenizer.model
    assert model.origin["folder"] == str(base) and model.origin["layers"] == 2
    save_checkpoint(model, tokenizer, tmp_path / "deep" / "copy")
    assert contents(tmp_path / "deep/copy") == contents(base)
    assert contents(base).keys() == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert json.loads((base / "params.json").read_text()) == {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 400,
        "multiple_of": 16, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "rope_theta": 10000.0}
    names = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for kind in ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm",
                 "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "ffn_norm"):
        names |= {f"layers.0.{kind}.weight", f"layers.1.{kind}.weight"}
    assert stored(base).keys() == names


def test_metas_own_habits(base):
    """rope.freqs in the weights, vocab_size -1, and keys that params.json leaves out."""
    expected = logits(base)
    spoil(base / "consolidated.00.pth", saved(stored(base) | {"rope.freqs": torch.ones(4)}))
    for changes in ({"vocab_size": -1}, dict.fromkeys(["rope_theta", "norm_eps"], DROP),
                    {"ffn_dim_multiplier": DROP}):
        spoil(base / "params.json", changes)
        assert torch.equal(logits(base), expected)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path, tokenizer):
    save_checkpoint(tiny(tie_embeddings=True), tokenizer, tmp_path)
    assert "output.weight" not in stored(tmp_path)
    model, _ = load_checkpoint(tmp_path, dtype=torch.float64)
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.allclose(model.eval()(TOKENS), tiny(tie_embeddings=True).double()(TOKENS))


def test_a_merged_adapter_is_saved_under_metas_names(base, tmp_path):
    model, tokenizer = load_checkpoint(base)
    adapt(model, r=4, targets="all")
    with pytest.raises(ValueError, match="merge the adapter first"):
        save_checkpoint(model, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_lora(model)
    save_checkpoint(model, tokenizer, tmp_path / "merged")
    assert torch.equal(logits(tmp_path / "merged"), model.eval()(TOKENS))


@pytest.mark.parametrize("first, second", [("meta", "hf"), ("hf", "meta")])
def test_a_folder_holds_one_layout(tmp_path, tokenizer, first, second):
    """A reader of either layout could take the weights of the other with the new tokenizer."""
    model = tiny(tokenizer.vocab_size)
    save_checkpoint(model, tokenizer, tmp_path, first, ".bin")
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match="holds a model in the other layout"):
        save_checkpoint(model, tokenizer, tmp_path, second, ".bin")
    assert files_in(tmp_path) == before


def test_a_recurrent_model_has_no_hugging_face_layout(tmp_path, tokenizer):
    model = RNN(RNNArgs(dim=16, n_layers=1, rnn="gru", vocab_size=tokenizer.vocab_size))
    with pytest.raises(ValueError, match="layout is for transformers"):
        save_checkpoint(model, tokenizer, tmp_path / "hf", "hf", ".bin")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_layers_and_dtype(base, dtype):
    whole, _ = load_checkpoint(base)
    model, _ = load_checkpoint(base, layers=1, dtype=dtype)
    assert model.args.n_layers == len(model.layers) == 1
    for name, weight in model.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 4])
def test_loading_holds_no_more_than_it_keeps(tmp_path, tokenizer, shards):
    """One of 24 layers of 260 MiB, in a fresh process: the peak grows by what is kept."""
    save_checkpoint(tiny(dim=512, n_heads=8, n_layers=24, multiple_of=64), tokenizer, tmp_path)
    split(tmp_path, shards)
    code = f"""{PEAK}
from llama import load_checkpoint
load_checkpoint({str(tmp_path)!r}, layers=1, init="random")
before = peak()
model, _ = load_checkpoint({str(tmp_path)!r}, layers=1)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True,
                          text=True)
    n_bytes = sum(path.stat().st_size for path in tmp_path.glob("*.pth"))
    assert n_bytes > 190 * 2 ** 20 and float(done.stdout) < 40


def split(folder, n):
    """Cut consolidated.00.pth into n shards as Meta does for n GPUs."""
    shards = [{"rope.freqs": torch.ones(4)} for _ in range(n)]
    for name, tensor in stored(folder).items():
        kind = name.split(".")[-2]
        pieces = [tensor] * n
        if kind in BY_ROWS + BY_COLUMNS:
            pieces = tensor.chunk(n, int(kind in BY_COLUMNS))
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize("n, shape", [
    (2, {"n_heads": 8, "n_kv_heads": 2}),
    (8, {"n_heads": 8, "n_kv_heads": 8}),
    (8, {"n_heads": 16, "n_kv_heads": 8}),
    (2, {"n_heads": 8, "tie_embeddings": True}),
])
def test_shards_are_joined_to_the_bit(tmp_path, tokenizer, n, shape):
    save_checkpoint(tiny(dim=64, **shape), tokenizer, tmp_path)
    whole, _ = load_checkpoint(tmp_path)
    split(tmp_path, n)
    model, _ = load_checkpoint(tmp_path)
    for (name, one), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert model.origin == whole.origin
    first, _ = load_checkpoint(tmp_path, layers=1, dtype=torch.bfloat16)
    wo = whole.layers[0].attention.wo.weight
    assert torch.equal(first.layers[0].attention.wo.weight, wo.bfloat16())


def test_shards_that_do_not_belong_together(tmp_path, tokenizer):
    save_checkpoint(tiny(dim=64, n_heads=8), tokenizer, tmp_path)
    split(tmp_path, 4)
    second, third = (tmp_path / f"consolidated.0{i}.pth" for i in (2, 3))
    with pytest.raises(ValueError, match="holds a checkpoint in several files; write to another"):
        save_checkpoint(tiny(), tokenizer, tmp_path)
    (tmp_path / "consolidated.100.pth").touch()
    (tmp_path / "consolidated.00.pth.bak").touch()
    load_checkpoint(tmp_path)                        # Other names are no shards.
    shard = stored(tmp_path, third.name)
    torch.save(shard | {"norm.weight": shard["norm.weight"] + 1}, third)
    with pytest.raises(ValueError, match="the shards differ where they should be alike"):
        load_checkpoint(tmp_path)
    torch.save(shard, third)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="no consolidated.02.pth in"):
        load_checkpoint(tmp_path)
    third.rename(second)
    with pytest.raises(ValueError, match=r"shape: layers.0.attention.wk.weight \(16, 64\) \+ "):
        load_checkpoint(tmp_path)
    torch.save({"norm.weight": torch.ones(64)}, third)
    with pytest.raises(ValueError, match="not hold the same tensors: layers.0.attention.wk.weight"):
        load_checkpoint(tmp_path)


def test_random_weights_need_no_weights_file_and_follow_the_seed(base):
    (base / "consolidated.00.pth").unlink()
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_checkpoint(base, init="random")[0])
    first, same, other = [model(TOKENS) for model in models]
    assert torch.equal(first, same) and not torch.equal(first, other)
    first, same, other = [model.origin["fingerprint"] for model in models]
    assert first == same != other


def test_fingerprint_is_the_same_in_any_dtype_and_differs_with_anything_else(base):
    model, _ = load_checkpoint(base)
    norm = model.norm.weight.detach().bfloat16()
    embeddings = model.tok_embeddings.weight.detach().bfloat16()
    expected = model.origin["fingerprint"]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert fingerprint(model.args, norm.to(dtype), embeddings.to(dtype)) == expected
    assert load_checkpoint(base, layers=1)[0].origin["fingerprint"] != expected
    assert fingerprint(model.args, norm, embeddings + 0.01) != expected
    spoil(base / "params.json", {"rope_theta": 500000.0})
    assert load_checkpoint(base)[0].origin["fingerprint"] != expected


@pytest.mark.parametrize("name, tensor, message", [
    ("layers.1.ffn_norm.weight", DROP, "missing: layers.1.ffn_norm.weight"),
    ("bias", torch.zeros(1), "unexpected: bias"),
    ("norm.weight", torch.zeros(32, dtype=torch.int64), "a dict of floating-point tensors"),
    ("model", {"norm.weight": torch.ones(2)}, "a dict of floating-point tensors"),
    ("norm.weight", torch.ones(32).to_sparse(), "it calls torch._utils._rebuild_sparse_tensor"),
    ("norm.weight", Attack(), "consolidated.00.pth is not a checkpoint of tensors"),
])
def test_tensors_that_do_not_fit_are_named(base, capsys, name, tensor, message):
    state = stored(base) | {name: tensor}
    if tensor is DROP:
        del state[name]
    spoil(base / "consolidated.00.pth", saved(state))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(base)
    assert "the pickle ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name, content, message", [
    ("params.json", {"n_layers": 1}, "unexpected: layers.1.attention.wk.weight, layers.1"),
    ("params.json", {"n_layers": 3}, "missing: layers.2.attention.wk.weight"),
    ("params.json", {"multiple_of": 64}, "of another shape: layers.0.feed_forward.w1.weight"),
    ("params.json", {"dim": DROP}, "lacks ['dim']"),
    ("params.json", {"dim": "32"}, "dim is '32', not a number of the right kind"),
    ("params.json", {"n_layers": 10 ** 9}, "n_layers is 1000000000, must be 1 to"),
    ("params.json", {"n_heads": 5}, "dim 32 must be n_heads 5 times an even head width"),
    ("params.json", {"vocab_size": 399}, "vocab_size 399 is less than the tokenizer's 400"),
    ("params.json", {"rope_theta": float("nan")}, "rope_theta is nan"),
    ("params.json", {"use_scaled_rope": True}, "has 'use_scaled_rope', which this model does not"),
    ("params.json", None, "no params.json in"),
    ("params.json", b"{", "params.json is not JSON"),
    ("params.json", b"[]", "params.json holds a list"),
    ("tokenizer.model", None, "no tokenizer at"),
    ("tokenizer.model", b"", "tokenizer.model is empty"),
    ("consolidated.00.pth", None, "no consolidated.00.pth in"),
    ("consolidated.00.pth", b"", "consolidated.00.pth is not a checkpoint of tensors"),
    ("consolidated.00.pth", saved([torch.ones(2)]), "a dict of floating-point tensors"),
    ("consolidated.02.pth", saved({"norm.weight": torch.ones(32)}), "no consolidated.01.pth in"),
])
def test_files_that_are_missing_or_wrong_are_named(base, name, content, message):
    spoil(base / name, content)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(message)):
        load_checkpoint(base)


def test_a_write_that_fails_leaves_what_was_there(base, monkeypatch):
    model, tokenizer = load_checkpoint(base)
    before = contents(base)

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(model, tokenizer, base)
    assert contents(base) == before
