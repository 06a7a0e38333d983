"""lora/: the layers against matrices written out, the switch, merge and unmerge, and files."""

import re

import pytest
import torch
import torch.nn as nn

from llama import load_checkpoint
from lora import (LoRAConfig, LoRAEmbedding, LoRALinear, add_lora, load_adapter, lora_disabled,
                  merge_lora, save_adapter, unmerge_lora)
from lora.adapter import lora_layers

from .helpers import Attack, adapt, contents, saved, spoil, tiny

TOKENS = torch.tensor([[1, 5, 9, 7, 3], [1, 4, 4, 8, 2]])
THREE = ("wq", "tok_embeddings", "output")


def adapted(targets="all", r=4, **sizes):
    return adapt(tiny(n_kv_heads=2, **sizes), r=r, alpha=6, targets=targets)


class NotALlama(nn.Module):
    """Linear with a bias, an embedding, a name that ends like a target but is another."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
        self.my_wq = nn.Linear(3, 3)

    def forward(self, x):
        return self.my_wq(self.body(self.words(x)))


# --- the layers; every method's equations, counts and promises are in test_methods.py


def test_embedding_is_its_equation():
    layer = LoRAEmbedding(nn.Embedding(11, 5).double(), r=3, alpha=6)
    nn.init.normal_(layer.lora_A)
    one_hot = torch.eye(11, dtype=torch.float64)[TOKENS]
    expected = one_hot @ (layer.base.weight + 6 / 3 * (layer.lora_B @ layer.lora_A).T)
    assert torch.allclose(layer(TOKENS), expected, rtol=1e-12)


def test_an_embedding_adapter_leaves_unseen_tokens_and_padding_alone():
    layer = LoRAEmbedding(nn.Embedding(11, 5, padding_idx=7), r=3, alpha=6)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, weight_decay=0)
    for _ in range(3):
        layer(torch.tensor([3, 4, 7])).square().sum().backward()
        optimizer.step()
    moved = (layer(torch.arange(11)) != layer.base.weight).any(1)
    assert moved.tolist() == [i in (3, 4) for i in range(11)]


@pytest.mark.parametrize("init, spread", [("kaiming", 1 / 64 / 3), ("gaussian", 1 / 8 ** 2)])
def test_start(init, spread):
    """kaiming: uniform within 1/sqrt(d_in), variance a third of that squared; gaussian: 1/r^2."""
    layer = LoRALinear(nn.Linear(64, 500), r=8, alpha=1, init=init)
    assert abs(layer.lora_A.var().item() / spread - 1) < 0.2
    assert init == "gaussian" or layer.lora_A.abs().max() <= 1 / 8
    assert not layer.lora_B.any()


def test_dropout_acts_on_the_adapters_input_alone():
    layer = LoRALinear(nn.Linear(6, 6), r=2, alpha=2, dropout=0.5).train()
    x = torch.ones(1000, 6)
    nn.init.ones_(layer.lora_A)
    nn.init.eye_(layer.lora_B[:2])
    sums = (layer(x) - layer.base(x))[:, 0]          # what is left of six ones
    assert len(sums.round(decimals=3).unique()) == 7             # a mask per row: 0 to 6 kept
    assert abs(sums.mean().item() - 6) < 0.3                     # scaled up for what is lost
    y = layer.eval()(x)
    assert torch.allclose(y, y[:1], atol=1e-5)


# --- off, merged, and back


def test_disabled_is_the_base_to_the_bit_and_comes_back():
    base = tiny(n_kv_heads=2)
    model = adapted()
    with_adapter = model(TOKENS)
    assert not torch.allclose(with_adapter, base(TOKENS), atol=1e-3)
    with pytest.raises(KeyError), lora_disabled(model):
        with lora_disabled(model):
            pass
        assert torch.equal(model(TOKENS), base(TOKENS))
        with pytest.raises(ValueError, match="merge it outside of lora_disabled"):
            merge_lora(model)
        raise KeyError
    assert torch.equal(model(TOKENS), with_adapter)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(tied):
    base = tiny(n_kv_heads=2, tie_embeddings=tied)
    model = adapted(tie_embeddings=tied)
    with_adapter = model(TOKENS)
    assert merge_lora(model) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(model(TOKENS), with_adapter, atol=1e-4)
    model.train().eval()                             # merges and unmerges nothing
    assert all(layer.merged for layer in lora_layers(model).values())
    unmerge_lora(model)
    weights = [p for name, p in model.named_parameters() if "lora_" not in name]
    for weight, original in zip(weights, base.parameters(), strict=True):
        assert torch.equal(weight, original)
    assert torch.equal(model(TOKENS), with_adapter)


def test_a_merge_that_an_error_ends_can_be_undone(monkeypatch):
    model = adapted()
    with_adapter = model(TOKENS)
    last = list(lora_layers(model).values())[-1]

    def fail(keep_base):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(last, "merge", fail)
        with pytest.raises(torch.OutOfMemoryError):
            merge_lora(model)
    unmerge_lora(model)
    assert torch.equal(model(TOKENS), with_adapter)
    assert merge_lora(model) == pytest.approx(1.0, abs=1e-6)


def test_a_merge_under_autocast_is_that_without():
    model, other = adapted(), adapted()
    merge_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(other)
    assert torch.equal(model(TOKENS), other(TOKENS))


def test_an_unmerged_base_is_in_the_mode_of_its_model():
    """Else the next adapter's dropout would be on in evaluation."""
    model = adapted().train()
    merge_lora(model)
    model.eval()
    unmerge_lora(model)
    assert not any(module.training for module in model.modules())


def test_a_merge_that_keeps_no_base_holds_one_set_of_weights_and_cannot_be_undone():
    model = adapted()
    expected = model(TOKENS)
    layers = lora_layers(model).values()
    before = [layer.base.weight for layer in layers]
    merge_lora(model, keep_base=False)
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    for layer, weight in zip(layers, before, strict=True):
        assert layer.base.weight is not weight and layer.original_base == (None,)
    with pytest.raises(ValueError, match="the base's original weights were not kept"):
        unmerge_lora(model)


def test_calls_out_of_order_are_errors(tmp_path):
    model = adapted("wq")
    save_adapter(model, tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="no merged adapter"):
        unmerge_lora(model)
    with pytest.raises(ValueError, match="already has an adapter"):
        add_lora(model, LoRAConfig())
    merge_lora(model)
    with pytest.raises(ValueError, match="already merged"):
        merge_lora(model)
    with pytest.raises(ValueError, match="unmerge it first"), lora_disabled(model):
        pass
    with pytest.raises(ValueError, match="unmerge it first"):
        load_adapter(model, tmp_path / "adapter.pt")
    for call in (merge_lora, unmerge_lora):
        with pytest.raises(ValueError, match="no adapter|no merged"):
            call(tiny())


# --- targets and settings


@pytest.mark.parametrize("targets, wrapped", [
    (("0",), ["body.0"]),
    ("my_wq", ["my_wq"]),
    ("all", ["words", "body.0", "body.2", "my_wq"]),
    (("0", "all"), ["words", "body.0", "body.2", "my_wq"]),
])
def test_targets_are_whole_names(targets, wrapped):
    model = NotALlama()
    before = model(torch.arange(11))
    assert add_lora(model, LoRAConfig(r=2, targets=targets)) == wrapped
    assert torch.equal(model(torch.arange(11)), before)


@pytest.mark.parametrize("model, config, message", [
    (NotALlama(), {"targets": ("wq",)}, "no layer named wq to adapt; the model has 0, 2, my_wq"),
    (NotALlama(), {"targets": ("0", "2"), "r": 4}, "body.2: r is 4, must be 1 to 3"),
])
def test_what_cannot_be_added_leaves_the_model_alone(model, config, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**config))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name, value", [
    ("method", "none"), ("r", 0), ("r", 2.5), ("r", True), ("alpha", 0), ("alpha", "32"),
    ("dropout", 1), ("dropout", -0.1), ("targets", ()), ("targets", ("",)), ("init", "ones"),
])
def test_a_config_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        LoRAConfig(**{name: value})


# --- files


def test_a_file_brings_the_adapter_back_whole(tmp_path):
    """Scale, targets and tensors: another r and alpha in the model before must not stay."""
    model = adapted(THREE)
    save_adapter(model, tmp_path / "adapter.pt")
    save_adapter(model, tmp_path / "another-name.pt")
    one, other = contents(tmp_path).values()
    assert one == other
    same = adapted(THREE)
    layers = lora_layers(same)
    for other in (tiny(n_kv_heads=2), adapted(("w1",), r=2), same):
        load_adapter(other, tmp_path / "adapter.pt")
        assert torch.equal(other.eval()(TOKENS), model(TOKENS))
        assert other.lora_config == LoRAConfig(r=4, alpha=6, dropout=0.0, targets=THREE)
    assert lora_layers(same) == layers               # Tensors are swapped, layers stay.


def test_an_adapter_for_another_base_is_refused(tmp_path, base):
    path = tmp_path / "adapter.pt"
    save_adapter(adapt(load_checkpoint(base)[0], r=2), path)
    load_adapter(load_checkpoint(base, dtype=torch.bfloat16)[0], path)   # the same base
    one_layer, _ = load_checkpoint(base, layers=1)
    for other in (one_layer, load_checkpoint(base, init="random")[0], tiny(n_kv_heads=2)):
        with pytest.raises(ValueError, match="on another base: .*base .2 layers, checkpoint"):
            load_adapter(other, path)
        assert not lora_layers(other)


def test_tensors_that_do_not_fit_are_named_and_nothing_changes(tmp_path):
    path = tmp_path / "adapter.pt"
    save_adapter(adapted("wq"), path)
    content = torch.load(path, weights_only=True)
    tensors = content["tensors"]
    tensors["layers.9.attention.wq.lora_A"] = tensors.pop("layers.0.attention.wq.lora_A")
    tensors["layers.1.attention.wq.lora_B"] = torch.zeros(3, 3)
    torch.save(content, path)
    message = re.escape(
        "expects layers.0.attention.wq.lora_A (4, 32), layers.1.attention.wq.lora_B (32, 4); "
        "the file has layers.1.attention.wq.lora_B (3, 3), layers.9.attention.wq.lora_A (4, 32)")
    for model in (adapted("wq"), adapted("w1"), tiny(n_kv_heads=2)):
        before = model(TOKENS)
        layers = lora_layers(model)
        trainable = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            load_adapter(model, path)
        assert torch.equal(model(TOKENS), before) and lora_layers(model) == layers
        assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize("content", [
    None,
    b"",
    {"weight": torch.zeros(2)},
    {"config": {"r": 4, "x": 1}, "base": {}, "tensors": {}},
    {"config": {"r": "4"}, "base": {}, "tensors": {}},
    {"config": Attack(), "base": {}, "tensors": {}},
], ids=str)
def test_files_that_are_no_adapter(tmp_path, content, capsys):
    path = tmp_path / "adapter.pt"
    spoil(path, saved(content) if isinstance(content, dict) else content)
    message = "no adapter file at|is not an adapter file"
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_adapter(tiny(), path)
    assert "the pickle ran" not in capsys.readouterr().out
