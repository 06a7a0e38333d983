"""lora/: the layers against matrices written out, the switch, merge and unmerge, files; on modules that are no LLaMA too."""
import copy

import pytest
import torch
import torch.nn as nn

from llama import load_checkpoint
from lora import (LoRAConfig, LoRAEmbedding, LoRALinear, add_lora, load_adapter, lora_disabled, lora_state_dict,
                  mark_only_lora_as_trainable, merge_lora, save_adapter, unmerge_lora)
from lora.adapter import lora_layers

from .helpers import Attack, tiny

TOKENS = torch.tensor([[1, 5, 9, 7, 3], [1, 4, 4, 8, 2]])


def adapted(targets="all", r=4, **settings):
    """A tiny model with a LoRA whose tensors are all random, as after training."""
    model = tiny(n_kv_heads=2, **settings)
    add_lora(model, LoRAConfig(r=r, alpha=6, dropout=0.0, targets=targets))
    for tensor in lora_state_dict(model).values():
        nn.init.normal_(tensor, std=0.1)
    return model


class NotALlama(nn.Module):
    """Linear with a bias, an embedding, a name that ends like a target but is another."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
        self.my_wq = nn.Linear(3, 3)

    def forward(self, x):
        return self.my_wq(self.body(self.words(x)))


def test_linear_is_its_equation():
    """y = W x + b + (alpha / r) B A x, gradients of A, B and x included, in fp64."""
    layer = LoRALinear(nn.Linear(7, 5).double(), r=3, alpha=12).train()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    W, b, A, B = layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B
    expected = x @ (W + 12 / 3 * B @ A).T + b
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    g = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * g).sum(), (x, A, B)) for y in (layer(x), expected))
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(ours, theirs))
    assert not W.requires_grad and not b.requires_grad


def test_embedding_is_its_equation():
    layer = LoRAEmbedding(nn.Embedding(11, 5).double(), r=3, alpha=6)
    nn.init.normal_(layer.lora_A)
    one_hot = torch.eye(11, dtype=torch.float64)[TOKENS]
    expected = one_hot @ (layer.base.weight + 6 / 3 * (layer.lora_B @ layer.lora_A).T)
    assert torch.allclose(layer(TOKENS), expected, rtol=1e-12)


def test_an_embedding_adapter_leaves_unseen_tokens_alone():
    layer = LoRAEmbedding(nn.Embedding(11, 5), r=3, alpha=6)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1, weight_decay=0)
    for _ in range(3):
        layer(torch.tensor([3, 4])).square().sum().backward()
        optimizer.step()
    moved = (layer(torch.arange(11)) != layer.base.weight).any(1)
    assert moved.tolist() == [i in (3, 4) for i in range(11)]


@pytest.mark.parametrize("init, spread", [("kaiming", 1 / 64 / 3), ("gaussian", 1 / 8 ** 2)])
def test_start(init, spread):
    """kaiming: uniform within 1/sqrt(d_in), variance a third of its square; gaussian: N(0, 1/r^2); B zero."""
    layer = LoRALinear(nn.Linear(64, 500), r=8, alpha=1, init=init)
    assert abs(layer.lora_A.var().item() / spread - 1) < 0.2
    assert not layer.lora_B.any()
    if init == "kaiming":
        assert layer.lora_A.abs().max() <= 1 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_it_is_the_base_to_the_bit(dtype):
    model = tiny(n_kv_heads=2).to(dtype)
    before = model(TOKENS)
    add_lora(model, LoRAConfig(r=4, targets="all"))
    assert torch.equal(model.train()(TOKENS), before)                              # dropout on, too
    assert all(tensor.dtype == torch.float32 for tensor in lora_state_dict(model).values())


def test_dropout_acts_on_the_adapters_input_alone():
    layer = LoRALinear(nn.Linear(6, 6), r=2, alpha=2, dropout=0.5).train()
    x = torch.ones(1000, 6)
    assert torch.equal(layer(x), layer.base(x))                                    # B is zero: nothing dropped from the base
    nn.init.ones_(layer.lora_A)
    nn.init.eye_(layer.lora_B[:2])
    sums = (layer(x) - layer.base(x))[:, 0]                                        # what is left of six ones
    assert len(sums.round(decimals=3).unique()) == 7                               # a mask for each row: 0 to 6 kept
    assert abs(sums.mean().item() - 6) < 0.3                                       # and scaled up for what is lost
    assert len(layer.eval()(x).unique(dim=0)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_joins_in_the_models_mode(training):
    """A model in eval mode stays so as a whole: else the new layers would drop out while generating."""
    model = tiny().train(training)
    add_lora(model, LoRAConfig(r=4, dropout=0.5, targets="all"))
    assert all(module.training == training for module in model.modules())


def test_gqa_widths():
    model = tiny(n_kv_heads=2)
    add_lora(model, LoRAConfig(r=4, targets=("wq", "wk", "wv")))
    shapes = {name: tuple(t.shape) for name, t in lora_state_dict(model).items() if name.startswith("layers.0") and "_B" in name}
    assert shapes == {"layers.0.attention.wq.lora_B": (32, 4), "layers.0.attention.wk.lora_B": (16, 4),
                      "layers.0.attention.wv.lora_B": (16, 4)}


def test_the_count_for_llama_2_7b():
    from llama import ModelArgs, Transformer
    with torch.device("meta"):
        model = Transformer(ModelArgs())
        assert len(add_lora(model, LoRAConfig(r=8, targets=("wq", "wv")))) == 64
    assert sum(t.numel() for t in lora_state_dict(model).values()) == 4_194_304
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_194_304


def test_after_a_step_only_the_adapter_differs():
    model = adapted(("wq", "w2", "tok_embeddings"))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == lora_state_dict(model).keys()
    assert all(p.grad is None for name, p in model.named_parameters() if name not in changed)


def test_checkpointing_reaches_every_adapter():
    """With the reentrant kind the gradients would be None: the input comes from a frozen embedding."""
    grads = []
    for checkpointing in (False, True):
        model = adapted(("wq", "wv")).double().train()
        model.checkpointing = checkpointing
        model(TOKENS).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads))


def test_disabled_is_the_base_to_the_bit_and_comes_back():
    base, model = tiny(n_kv_heads=2), adapted()
    with_adapter = model(TOKENS)
    assert not torch.allclose(with_adapter, base(TOKENS), atol=1e-3)
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), base(TOKENS))
    with pytest.raises(KeyError), lora_disabled(model):
        raise KeyError
    assert torch.equal(model(TOKENS), with_adapter)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_unmerged_and_unmerge_restores_the_bits(tied):
    base, model = tiny(n_kv_heads=2, tie_embeddings=tied), adapted(tie_embeddings=tied)
    with_adapter = model(TOKENS)
    assert merge_lora(model) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(model(TOKENS), with_adapter, atol=1e-4)
    model.train().eval()                                                            # merges and unmerges nothing
    assert all(layer.merged for layer in lora_layers(model).values())
    unmerge_lora(model)
    for (name, ours), theirs in zip(((n, p) for n, p in model.named_parameters() if "lora_" not in n), base.parameters()):
        assert torch.equal(ours, theirs), name
    assert torch.equal(model(TOKENS), with_adapter)


def test_a_merge_into_a_tied_output_leaves_the_embedding():
    model = adapted("output", tie_embeddings=True)
    before = model.tok_embeddings.weight.clone()
    merge_lora(model)
    assert torch.equal(model.tok_embeddings.weight, before)
    assert not torch.equal(model.output.base.weight, before)


def test_a_thousand_merges_do_not_drift_even_in_bf16():
    model = adapted("wq").bfloat16()
    before = copy.deepcopy(model.state_dict())
    for _ in range(1000):
        merge_lora(model)
        unmerge_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merge_says_what_survives():
    """An update far below half a step of bf16 leaves nothing; one far above keeps nearly all."""
    shares = []
    for size in (1e-5, 1e-2):
        layer = LoRALinear(nn.Linear(64, 64, bias=False).bfloat16(), r=4, alpha=4)
        nn.init.constant_(layer.base.weight, 1.0)
        nn.init.constant_(layer.lora_A, size / 4)
        nn.init.ones_(layer.lora_B)
        model = nn.Sequential(layer)
        shares.append(merge_lora(model))
    assert shares[0] == 0.0 and shares[1] == pytest.approx(1.0, abs=0.3)


def test_calls_out_of_order_are_errors():
    model = adapted("wq")
    for call, message in ((unmerge_lora, "no merged adapter"), (lambda m: add_lora(m, LoRAConfig()), "already has an adapter")):
        with pytest.raises(ValueError, match=message):
            call(model)
    merge_lora(model)
    with pytest.raises(ValueError, match="already merged"):
        merge_lora(model)
    with pytest.raises(ValueError, match="unmerge it first"), lora_disabled(model):
        pass
    for call in (merge_lora, unmerge_lora):
        with pytest.raises(ValueError, match="no adapter|no merged"):
            call(tiny())


def test_a_merge_is_made_in_fp32_where_the_adapter_itself_is_in_less():
    layer = LoRALinear(nn.Linear(64, 64, bias=False), r=4, alpha=4).bfloat16()
    nn.init.normal_(layer.lora_B)
    exact = (layer.lora_B.double() @ layer.lora_A.double())
    assert (layer.delta() - exact).abs().max() < 1e-5 * exact.abs().max()
    own = layer.base.weight.double()
    layer.merge()
    assert torch.equal(layer.base.weight, (own.float() + layer.delta()).bfloat16())


def test_unmerging_follows_a_model_that_was_cast_meanwhile():
    model = adapted("wq")
    merge_lora(model)
    model.bfloat16()
    unmerge_lora(model)
    assert torch.equal(model.layers[0].attention.wq.base.weight, tiny(n_kv_heads=2).layers[0].attention.wq.weight.bfloat16())
    model(TOKENS)


def test_disabled_blocks_nest_and_take_no_merge():
    model = adapted("wq")
    with lora_disabled(model):
        with lora_disabled(model):
            pass
        assert torch.equal(model(TOKENS), tiny(n_kv_heads=2)(TOKENS))
        with pytest.raises(ValueError, match="merge it outside of lora_disabled"):
            merge_lora(model)


def test_a_padding_row_stays_as_it_is():
    layer = LoRAEmbedding(nn.Embedding(11, 5, padding_idx=3), r=2, alpha=2)
    layer(torch.tensor([3, 4])).sum().backward()
    assert layer.lora_A.grad[:, 3].eq(0).all() and layer.lora_A.grad[:, 4].ne(0).any()


def test_targets_are_whole_names():
    model = NotALlama()
    for targets, found in ((("0",), ["body.0"]), ("my_wq", ["my_wq"]), ("all", ["words", "body.0", "body.2", "my_wq"]),
                           (("0", "all"), ["words", "body.0", "body.2", "my_wq"])):
        other = copy.deepcopy(model)
        assert add_lora(other, LoRAConfig(r=2, targets=targets)) == found
        assert torch.equal(other(torch.arange(11)), model(torch.arange(11)))


@pytest.mark.parametrize("config, message", [
    (dict(targets=("wq",)), "no layer named wq to adapt; the model has 0, 2, my_wq, words"),
    (dict(targets=("0", "1")), "no layer named 1 "),
    (dict(targets=("0", "2"), r=4), "body.2: r is 4, must be 1 to 3"),
])
def test_what_cannot_be_added_leaves_the_model_alone(config, message):
    model = NotALlama()
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**config))
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_bare_layer_has_no_place_to_be_swapped_in():
    with pytest.raises(ValueError, match="the model has none"):
        add_lora(nn.Linear(3, 3), LoRAConfig(r=1, targets="all"))


@pytest.mark.parametrize("wrong", [dict(method="none"), dict(r=0), dict(r=2.5), dict(r=True), dict(alpha=0), dict(alpha="32"),
                                   dict(dropout=1), dict(dropout=-0.1), dict(targets=()), dict(targets=("",)), dict(init="ones")])
def test_a_config_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


def test_mark_only_lora_as_trainable():
    model = adapted("wq").requires_grad_(True)
    mark_only_lora_as_trainable(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == lora_state_dict(model).keys()


def test_a_file_brings_the_adapter_back_whole(tmp_path):
    """Scale, targets and tensors: another r and alpha in the model before must not stay."""
    model = adapted(("wq", "tok_embeddings", "output"))
    save_adapter(model, tmp_path / "adapter.pt")
    fresh = tiny(n_kv_heads=2)
    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    other = adapted(("w1",), r=2)
    load_adapter(other, tmp_path / "adapter.pt")
    assert torch.equal(other.eval()(TOKENS), model(TOKENS))
    assert other.lora_config == LoRAConfig(r=4, alpha=6, dropout=0.0, targets=("wq", "tok_embeddings", "output"))
    same = adapted(("wq", "tok_embeddings", "output"))
    layers = lora_layers(same)
    load_adapter(same, tmp_path / "adapter.pt")
    assert torch.equal(same(TOKENS), model(TOKENS)) and lora_layers(same) == layers        # tensors swapped, layers kept


def test_a_file_holds_the_adapter_and_no_base(tmp_path):
    model = adapted("wq")
    save_adapter(model, tmp_path / "a.pt")
    save_adapter(model, tmp_path / "another-name.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another-name.pt").read_bytes()
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["tensors"].keys() == lora_state_dict(model).keys() and len(content["tensors"]) == 4
    assert content["config"]["r"] == 4 and content["config"]["alpha"] == 6
    assert not list(tmp_path.glob("*.tmp"))


def test_an_adapter_for_another_base_is_refused(tmp_path, base):
    model, _ = load_checkpoint(base)
    add_lora(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter.pt")
    load_adapter(load_checkpoint(base, dtype=torch.bfloat16)[0], tmp_path / "adapter.pt")    # another dtype is the same base
    for other in (load_checkpoint(base, layers=1)[0], load_checkpoint(base, init="random")[0], tiny(n_kv_heads=2)):
        with pytest.raises(ValueError, match="was trained on another base: .*base .2 layers, checkpoint"):
            load_adapter(other, tmp_path / "adapter.pt")
        assert not lora_layers(other)


def test_tensors_that_do_not_fit_are_named_and_nothing_changes(tmp_path):
    path = tmp_path / "adapter.pt"
    save_adapter(adapted("wq"), path)
    content = torch.load(path, weights_only=True)
    content["tensors"]["layers.9.attention.wq.lora_A"] = content["tensors"].pop("layers.0.attention.wq.lora_A")
    content["tensors"]["layers.1.attention.wq.lora_B"] = torch.zeros(3, 3)
    torch.save(content, path)
    for model in (adapted("wq"), adapted("w1"), tiny(n_kv_heads=2)):
        before, layers, trainable = model(TOKENS), lora_layers(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError) as caught:
            load_adapter(model, path)
        message = str(caught.value)
        assert "expects layers.0.attention.wq.lora_A (4, 32), layers.1.attention.wq.lora_B (32, 4);" in message
        assert "file has layers.1.attention.wq.lora_B (3, 3), layers.9.attention.wq.lora_A (4, 32)" in message
        assert torch.equal(model(TOKENS), before) and lora_layers(model) == layers
        assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_merged_model_takes_no_adapter(tmp_path):
    model = adapted("wq")
    save_adapter(model, tmp_path / "adapter.pt")
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge it first"):
        load_adapter(model, tmp_path / "adapter.pt")


@pytest.mark.parametrize("content", [None, b"", b"\x80\x02.", {"tensors": {}}, [1], {"config": {"r": 4, "x": 1}, "base": {}, "tensors": {}},
                                     {"config": {"r": "4"}, "base": {}, "tensors": {}}, {"config": {}, "base": {}, "tensors": {"a": 1}},
                                     {"weight": torch.zeros(2)}, {"config": Attack(), "base": {}, "tensors": {}}], ids=str)
def test_files_that_are_no_adapter(tmp_path, content, capsys):
    path = tmp_path / "adapter.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((FileNotFoundError, ValueError), match="no adapter file at|is not an adapter file"):
        load_adapter(tiny(), path)
    assert "the pickle ran" not in capsys.readouterr().out


def test_lora_knows_nothing_of_llama():
    import subprocess
    import sys
    subprocess.run([sys.executable, "-c", "import sys, lora; assert 'llama' not in sys.modules"], check=True)


def test_a_merge_that_keeps_no_base_holds_one_set_of_weights_and_cannot_be_undone():
    model = adapted()
    expected, before = model(TOKENS), [layer.base.weight for layer in lora_layers(model).values()]
    merge_lora(model, keep_base=False)
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    held = {id(tensor) for layer in lora_layers(model).values() for tensor in (layer.base.weight, *layer.original_base)}
    assert not held & {id(tensor) for tensor in before}
    with pytest.raises(ValueError, match="the base's original weights were not kept"):
        unmerge_lora(model)
