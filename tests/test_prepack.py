"""lora/prepack.py: the same weights and products in another layout, whatever stands over them."""
import weakref

import pytest
import torch
import torch.nn as nn

import generate
from llama import load_checkpoint, sampling
from lora import LoRAConfig, add_lora, lora_disabled, merge_lora, save_adapter, unmerge_lora
from lora.adapter import METHODS
from lora.layers import lora_layers
from lora.prepack import PrepackedLinear, prepack
from lora.quantize import Int8Linear, QuantizedLinear

from .helpers import tiny
from .test_quantize import linear, quantized

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_BF16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="torch is built without oneDNN")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="no bf16 on this CPU")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (5, 7), (1, 1), (3, 65), (130, 63)])
def test_products_and_weights_are_the_same(shape, bias, dtype):
    layer = linear(*shape, dtype, bias=bias)
    packed = PrepackedLinear(layer)
    assert packed.dequantize(dtype).equal(layer.weight) and packed.weight.dtype == dtype
    for tokens in (1, 2, 31, 128, 300):
        x = torch.randn(1, tokens, shape[1]).to(dtype)
        y = packed(x)
        parts = [x, layer.weight, *([layer.bias] if bias else [])]
        exact = nn.functional.linear(*[part.double() for part in parts])
        largest = nn.functional.linear(*[part.double().abs() for part in parts])
        assert y.shape == exact.shape and y.dtype == dtype
        # Rounding is a share of the largest that a sum could be.
        off = (y.double() - exact).abs()
        assert (off <= 8 * torch.finfo(dtype).eps * largest).all()


def test_what_is_packed_is_not_held_twice_and_what_cannot_be_stays():
    model = tiny(n_layers=1)
    plain = weakref.ref(model.layers[0].feed_forward.w1.weight)
    prepack(model)
    assert plain() is None and not any(type(layer) is nn.Linear for layer in model.modules())
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"weight"}
    assert all("norm" in name or "tok_embeddings" in name for name, _ in model.named_parameters())
    models = [tiny(n_layers=1), tiny(n_layers=1), quantized("nf4", n_layers=1)]
    for kept in (models[0].double(), models[1].to("meta"), models[2].double()):
        before = list(kept.modules())
        prepack(kept)
        assert all(a is b for a, b in zip(before, kept.modules(), strict=True))


def test_a_machine_without_it_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = tiny(n_layers=1)
    prepack(model)
    assert not any(isinstance(layer, PrepackedLinear) for layer in model.modules())
    monkeypatch.undo()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for dtype in torch.bfloat16, torch.float32:
        prepack(model.to(dtype))
        kinds = {type(layer) for layer in model.modules()}
        assert (PrepackedLinear in kinds) == (dtype == torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_adapters_over_it(method):
    """On, off, merged and taken out again, the logits are those over the plain weights."""
    tokens, logits = torch.arange(12)[None], []
    for packed in False, True:
        model = tiny().eval()
        if packed:
            prepack(model)
        torch.manual_seed(1)
        add_lora(model, LoRAConfig(method, r=2))
        assert not any(layer.training for layer in model.modules())
        for layer in lora_layers(model).values():
            for name, factor in layer.named_parameters(recurse=False):
                generator = torch.Generator().manual_seed(len(name))
                factor += 0.1 * torch.randn(factor.shape, generator=generator)
        own = [model(tokens)]
        with lora_disabled(model):
            own.append(model(tokens))
        merge_lora(model)
        if packed:
            prepack(model)
        own.append(model(tokens))
        unmerge_lora(model)
        logits.append([*own, model(tokens)])
    assert (logits[0][0] - logits[0][1]).abs().max() > 1e-3
    for right, found in zip(*logits, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def load(args):
    """Return the model that generate.py answers with, given its arguments."""
    model, *_ = generate.load(args, generate.read_saved(args), torch.device("cpu"), "fp32")
    return model


def test_generate_py_answers_with_packed_weights(base, tokenizer, tmp_path):
    args = generate.parse_args(["--checkpoint", str(base), "--adapter", "none",
                                "--precision", "fp32"])
    packed = load(args)
    assert any(isinstance(layer, PrepackedLinear) for layer in packed.modules())
    assert not any(type(layer) is nn.Linear for layer in packed.modules())
    plain, _ = load_checkpoint(base, dtype=torch.float32)
    prompts = [tokenizer.encode(text, bos=True) for text in ("Say blue please.", "Name a colour.")]
    answers = [list(sampling.generate(each.eval(), prompts, 12, -1)) for each in (packed, plain)]
    assert answers[0] == answers[1]
    args.quantize = "int8"
    fewer = load(args)
    kinds = {type(layer) for layer in fewer.modules() if isinstance(layer, QuantizedLinear)}
    assert kinds == {Int8Linear, PrepackedLinear}
    model, _ = load_checkpoint(base, dtype=torch.float32)
    add_lora(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter.pt")
    args = generate.parse_args(["--adapter", str(tmp_path / "adapter.pt"), "--merge",
                                "--precision", "fp32"])
    merged = load(args)
    assert lora_layers(merged) and not any(type(layer) is nn.Linear for layer in merged.modules())
