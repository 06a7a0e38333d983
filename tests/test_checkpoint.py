"""llama/checkpoint.py: Meta's folder in and out, the first N blocks alone, every misfit named."""
import json
import subprocess
import sys

import pytest
import torch

from llama import load_checkpoint, save_checkpoint
from llama.checkpoint import fingerprint
from lora import LoRAConfig, add_lora, lora_state_dict, merge_lora

from .helpers import PEAK, ROOT, contents, stored, tiny

TOKENS = torch.tensor([[1, 5, 9, 7, 3]])


def rewrite(folder, change=None, **params):
    """Change a checkpoint's tensors and params.json in place."""
    state = stored(folder)
    if change:
        change(state)
    torch.save(state, folder / "consolidated.00.pth")
    old = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({k: v for k, v in {**old, **params}.items() if v != "drop"}))


def test_what_was_saved_comes_back(base, tokenizer):
    model, loaded_tokenizer = load_checkpoint(base)
    assert torch.equal(model.eval()(TOKENS), tiny(tokenizer.vocab_size, n_kv_heads=2)(TOKENS))
    assert loaded_tokenizer.model == tokenizer.model
    assert model.origin["folder"] == str(base) and model.origin["layers"] == 2


def test_saving_gives_metas_layout_and_the_same_bytes_anywhere(base, tmp_path):
    model, tokenizer = load_checkpoint(base)
    save_checkpoint(model, tokenizer, tmp_path / "deep" / "copy")
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        assert (tmp_path / "deep/copy" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(path.name for path in base.iterdir()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    assert json.loads((base / "params.json").read_text()) == dict(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=400, multiple_of=16, ffn_dim_multiplier=None,
        norm_eps=1e-5, rope_theta=10000.0)
    assert stored(base).keys() == {
        "tok_embeddings.weight", "norm.weight", "output.weight",
        *(f"layers.{i}.{name}.weight" for i in range(2) for name in (
            "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
            "feed_forward.w3", "attention_norm", "ffn_norm"))}


def test_metas_own_habits(base):
    """rope.freqs in the weights, vocab_size -1 and no n_kv_heads in params.json."""
    expected = load_checkpoint(base)[0].eval()(TOKENS)
    rewrite(base, lambda state: state.update({"rope.freqs": torch.ones(4)}), vocab_size=-1)
    assert torch.equal(load_checkpoint(base)[0].eval()(TOKENS), expected)
    rewrite(base, rope_theta="drop", norm_eps="drop", ffn_dim_multiplier="drop")
    assert torch.equal(load_checkpoint(base)[0].eval()(TOKENS), expected)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path, tokenizer):
    save_checkpoint(tiny(tie_embeddings=True), tokenizer, tmp_path)
    assert "output.weight" not in stored(tmp_path)
    model, _ = load_checkpoint(tmp_path, dtype=torch.float64)
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.allclose(model.eval()(TOKENS), tiny(tie_embeddings=True).double()(TOKENS))


def test_a_merged_adapter_is_saved_under_metas_names(base, tmp_path):
    model, tokenizer = load_checkpoint(base)
    add_lora(model, LoRAConfig(r=4, targets="all"))
    for tensor in lora_state_dict(model).values():
        torch.nn.init.normal_(tensor, std=0.1)
    with pytest.raises(ValueError, match="merge the adapter first"):
        save_checkpoint(model, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_lora(model)
    save_checkpoint(model, tokenizer, tmp_path / "merged")
    assert torch.equal(load_checkpoint(tmp_path / "merged")[0].eval()(TOKENS), model.eval()(TOKENS))


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
    """One of 24 layers of 260 MiB, in a fresh process: the peak grows by what is kept, not by the files."""
    save_checkpoint(tiny(dim=512, n_heads=8, n_layers=24, multiple_of=64), tokenizer, tmp_path)
    split(tmp_path, shards)
    code = f"""{PEAK}
from llama import load_checkpoint
load_checkpoint({str(tmp_path)!r}, layers=1, init="random")
before = peak()
model, _ = load_checkpoint({str(tmp_path)!r}, layers=1)
kept = sum(p.numel() * 4 for p in model.parameters()) / 2 ** 20
print(peak() - before, kept)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    grown, kept = map(float, out.split())
    file = sum(path.stat().st_size for path in tmp_path.glob("*.pth")) / 2 ** 20
    assert file > 190 and kept < 15 and grown < 40, (file, kept, grown)


def split(folder, n):
    """Cut consolidated.00.pth into n shards as Meta does for n GPUs."""
    by_rows, by_columns = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2", "tok_embeddings")
    state, shards = stored(folder), [{"rope.freqs": torch.ones(4)} for _ in range(n)]
    for name, tensor in state.items():
        kind = name.split(".")[-2]
        dim = 0 if kind in by_rows else 1 if kind in by_columns else None
        for i, shard in enumerate(shards):
            shard[name] = tensor if dim is None else tensor.chunk(n, dim)[i].clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize("n, shape", [(2, dict(n_heads=8, n_kv_heads=2)), (8, dict(n_heads=8, n_kv_heads=8)), (8, dict(n_heads=16, n_kv_heads=8)),
                                      (2, dict(n_heads=8, tie_embeddings=True))])
def test_shards_are_joined_to_the_bit(tmp_path, tokenizer, n, shape):
    save_checkpoint(tiny(dim=64, **shape), tokenizer, tmp_path)
    whole, _ = load_checkpoint(tmp_path)
    split(tmp_path, n)
    model, _ = load_checkpoint(tmp_path)
    for (name, one), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert model.origin == whole.origin
    assert torch.equal(load_checkpoint(tmp_path, layers=1, dtype=torch.bfloat16)[0].layers[0].attention.wo.weight,
                       whole.layers[0].attention.wo.weight.bfloat16())


def test_shards_that_do_not_belong_together(tmp_path, tokenizer):
    save_checkpoint(tiny(dim=64, n_heads=8), tokenizer, tmp_path)
    split(tmp_path, 4)
    with pytest.raises(ValueError, match="holds a checkpoint in several files; write to another folder"):
        save_checkpoint(tiny(), tokenizer, tmp_path)
    (tmp_path / "consolidated.100.pth").touch()
    (tmp_path / "consolidated.00.pth.bak").touch()
    load_checkpoint(tmp_path)                                             # other names are no shards
    other = torch.load(tmp_path / "consolidated.03.pth", weights_only=True)
    torch.save({**other, "norm.weight": other["norm.weight"] + 1}, tmp_path / "consolidated.03.pth")
    with pytest.raises(ValueError, match="the shards differ where they should be alike"):
        load_checkpoint(tmp_path)
    torch.save(other, tmp_path / "consolidated.03.pth")
    (tmp_path / "consolidated.02.pth").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="no consolidated.02.pth in"):
        load_checkpoint(tmp_path)
    (tmp_path / "consolidated.03.pth").rename(tmp_path / "consolidated.02.pth")
    with pytest.raises(ValueError, match=r"of another shape: layers.0.attention.wk.weight \(16, 64\) \+ .* for \(64, 64\)"):
        load_checkpoint(tmp_path)
    torch.save({"norm.weight": torch.ones(64)}, tmp_path / "consolidated.03.pth")
    with pytest.raises(ValueError, match="do not hold the same tensors: layers.0.attention.wk.weight, .* and "):
        load_checkpoint(tmp_path)


def test_random_weights_need_no_weights_file_and_follow_the_seed(base):
    (base / "consolidated.00.pth").unlink()
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_checkpoint(base, init="random")[0])
    logits = [model(TOKENS) for model in models]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert models[0].origin["fingerprint"] == models[1].origin["fingerprint"] != models[2].origin["fingerprint"]


def test_fingerprint_is_the_same_in_any_dtype_and_differs_with_anything_else(base):
    model, _ = load_checkpoint(base)
    norm, embeddings = model.norm.weight.detach().bfloat16(), model.tok_embeddings.weight.detach().bfloat16()
    prints = {fingerprint(model.args, norm.to(dtype), embeddings.to(dtype))
              for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
    assert prints == {model.origin["fingerprint"]}
    assert load_checkpoint(base, layers=1)[0].origin["fingerprint"] not in prints
    assert fingerprint(model.args, norm, embeddings + 0.01) not in prints
    rewrite(base, rope_theta=500000.0)
    assert load_checkpoint(base)[0].origin["fingerprint"] not in prints


def without(key):
    return lambda state: state.pop(key)


@pytest.mark.parametrize("change, params, message", [
    (without("layers.1.ffn_norm.weight"), {}, "missing: layers.1.ffn_norm.weight"),
    (without("tok_embeddings.weight"), {}, "missing: tok_embeddings.weight"),
    (lambda state: state.update(bias=torch.zeros(1)), {}, "unexpected: bias"),
    (lambda state: state.update({"norm.weight": torch.zeros(32, dtype=torch.int64)}), {}, "not hold a dict of floating-point tensors"),
    (lambda state: state.update(iteration=7), {}, "not hold a dict of floating-point tensors"),
    (None, dict(n_layers=1), "unexpected: layers.1.attention.wk.weight, layers.1"),
    (None, dict(n_layers=3), "missing: layers.2.attention.wk.weight"),
    (None, dict(n_kv_heads=4), r"of another shape: layers.0.attention.wk.weight \(16, 32\) for \(32, 32\)"),
    (None, dict(multiple_of=64), "of another shape: layers.0.feed_forward.w1.weight"),
    (None, dict(dim="drop"), r"lacks \['dim'\]"),
    (None, dict(dim="32"), "dim is '32', not a number of the right kind"),
    (None, dict(n_layers=True), "n_layers is True"),
    (None, dict(n_heads=5), "params.json: dim 32 must be n_heads 5 times an even head width"),
    (None, dict(vocab_size=399), "vocab_size 399 is less than the tokenizer's 400"),
    (None, dict(use_scaled_rope=True), "has 'use_scaled_rope', which this model does not support"),
])
def test_what_does_not_fit_is_named(base, change, params, message):
    rewrite(base, change, **params)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(base)


@pytest.mark.parametrize("name, content, message", [
    ("params.json", None, "no params.json in"),
    ("params.json", b"{", "params.json is not JSON"),
    ("params.json", b"\xff", "params.json is not JSON"),
    ("params.json", b"[]", "params.json holds a list"),
    ("tokenizer.model", None, "no tokenizer at"),
    ("tokenizer.model", b"", "tokenizer.model is empty"),
    ("consolidated.00.pth", None, "no consolidated.00.pth in"),
    ("consolidated.00.pth", b"", "consolidated.00.pth is not a checkpoint"),
    ("consolidated.00.pth", b"PK\x03\x04" + bytes(100), "consolidated.00.pth is not a checkpoint"),
])
def test_files_that_are_missing_or_something_else(base, name, content, message):
    (base / name).unlink()
    if content is not None:
        (base / name).write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_checkpoint(base)


def test_a_truncated_checkpoint_and_one_with_a_program_in_it(base, capsys):
    whole = (base / "consolidated.00.pth").read_bytes()
    (base / "consolidated.00.pth").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="is not a checkpoint of tensors"):
        load_checkpoint(base)

    class Attack:
        def __reduce__(self):
            return print, ("the pickle ran",)
    torch.save({"a": Attack()}, base / "consolidated.00.pth")
    with pytest.raises(ValueError, match="is not a checkpoint of tensors"):
        load_checkpoint(base)
    assert "the pickle ran" not in capsys.readouterr().out


def test_layers_out_of_range_and_a_folder_that_is_not_there(base, tmp_path):
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"has 2 layers, so layers must be 1 to 2, not {layers}"):
            load_checkpoint(base, layers=layers)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at .*params.json"):
        load_checkpoint(base / "params.json")


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
