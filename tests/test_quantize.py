"""lora/quantize.py: levels and errors by their derivations, and no weight kept for backward."""
import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import train
from finetune import convert
from llama import load_checkpoint, save_checkpoint
from lora import (LoRAConfig, add_lora, lora_disabled, lora_state_dict, merge_lora, read_adapter,
                  unmerge_lora)
from lora.adapter import METHODS
from lora.quantize import (KINDS, Int8Linear, NF4Linear, dequantize, in_int8, nf4_levels,
                           quantizer, scaled_levels)

from .helpers import ROOT, adapt, check_linear, close, column, tiny, torchrun

# QLoRA, appendix E.
PUBLISHED = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
             0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
SHAPES = [(1, 1), (3, 65), (130, 63)]                # odd ones, and no whole blocks
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# Methods that leave the base where it is.
EVERY_METHOD = pytest.mark.parametrize("method", [m for m in METHODS if m != "delta-lora"])
STEPS = ("--max-steps", "4")
TOKENS = torch.arange(1, 13).view(2, 6)


def linear(d_out, d_in, dtype=torch.float32, bias=False):
    torch.manual_seed(d_out + d_in)
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight)
    return layer.to(dtype).requires_grad_(False)


def quantized(kind, **sizes):
    """Return a tiny model whose blocks' matrices are in fewer bits, unless kind is None."""
    model = tiny(**sizes)
    for path, layer in list(model.layers.named_modules()):
        if kind and isinstance(layer, nn.Linear):
            model.layers.set_submodule(path, quantizer(kind)(layer))
    return model


# --- levels, errors and bits


def test_levels_are_the_published_ones():
    assert nf4_levels().tolist() == pytest.approx(PUBLISHED, abs=1e-4) and nf4_levels()[7] == 0


@EVERY_SHAPE
def test_int8_is_off_by_half_a_step_at_most(shape):
    layer = linear(*shape)
    weight = Int8Linear(layer).weight
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert weight.shape == layer.weight.shape
    assert ((weight - layer.weight).abs() <= step * 0.5001).all()
    largest = layer.weight.abs().argmax(1, keepdim=True)
    assert torch.allclose(weight.gather(1, largest), layer.weight.gather(1, largest), rtol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@EVERY_SHAPE
def test_nf4_takes_the_nearest_level(shape, double):
    """Each weight over its block's largest magnitude goes to the nearest of the 16 levels."""
    layer = linear(*shape)
    packed = NF4Linear(layer, double)
    levels = torch.tensor(PUBLISHED)
    expected = []
    blocks = layer.weight.flatten().split(64)
    for block, scale in zip(blocks, packed.scales(), strict=True):
        largest = block.abs().max()
        assert scale == pytest.approx(largest.item(), rel=0.02 if double else 0)
        nearest = ((block / largest)[:, None] - levels).abs().argmin(1)
        expected.append(levels[nearest] * scale)
    assert torch.allclose(packed.weight.flatten(), torch.cat(expected), atol=1e-5)


def test_round_trip_error_is_what_the_normal_distribution_says():
    """Of normal weights, as a share of their norm.

    NF4's by integrating over its cells under the law of a block's maximum, int8's by a step's
    variance of 1/12.
    """
    layer = linear(512, 512)
    levels = torch.tensor(PUBLISHED).double()
    edges = (levels[1:] + levels[:-1]) / 2
    z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    torch.manual_seed(1)
    errors = []
    for largest in torch.randn(400, 64, dtype=torch.float64).abs().amax(1):
        weight = density * (z.abs() <= largest)
        error = (levels[torch.bucketize(z / largest, edges)] * largest - z).square()
        errors.append((error * weight).sum() / weight.sum())
    of_nf4 = torch.stack(errors).mean().sqrt().item()
    steps = layer.weight.abs().amax(1) / 127
    of_int8 = (steps.square().mean() / 12).sqrt().item()
    for packed, derived, off in ((NF4Linear(layer, False), of_nf4, 0.02),
                                 (NF4Linear(layer, True), of_nf4, 0.03),
                                 (Int8Linear(layer), of_int8, 0.02)):
        error = ((packed.weight - layer.weight).norm() / layer.weight.norm()).item()
        assert error == pytest.approx(derived, rel=off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_a_weight(dtype):
    """8 and a scale a row; 4 + 8/64 + 32/(64 x 256), or 4 + 32/64 without double quantisation."""
    layer = linear(1024, 2048, dtype)

    def bits(packed):
        stored = [b for name, b in packed.named_buffers() if b.dim() > 0 and name != "pairs"]
        return 8 * sum(b.nbytes for b in stored) / layer.weight.numel()

    assert bits(Int8Linear(layer)) == 8 + 32 / 2048
    assert bits(NF4Linear(layer)) == 4 + 8 / 64 + 32 / (64 * 256)
    assert bits(NF4Linear(layer, double=False)) == 4.5


@pytest.mark.parametrize("double, stated", [(True, 3.87e9), (False, 4.17e9)])
def test_llama_2_7b_in_nf4(double, stated):
    """32 blocks, and embedding, output and norms in 16 bit."""
    sizes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    block = 2 * 2 * 4096
    for d_out, d_in in sizes:
        layer = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16)
        block += sum(b.nbytes for b in NF4Linear(layer, double).buffers())
    assert 32 * block + 2 * (2 * 32000 * 4096 + 4096) == pytest.approx(stated, rel=0.01)


def test_an_adapter_in_int8_is_off_by_half_a_scale_at_most():
    torch.manual_seed(0)
    tensors = {"a.lora_A": torch.randn(4, 30), "a.lora_B": torch.randn(20, 4),
               "a.lora_magnitude": torch.randn(20)}
    small, scales = in_int8(tensors)
    assert small["a.lora_A"].dtype == torch.int8
    assert small["a.lora_magnitude"] is tensors["a.lora_magnitude"]
    for name, scale in scales.items():
        assert ((small[name] * scale - tensors[name]).abs() <= 0.5001 * scale).all()


# --- forward, backward, merge


@EVERY_KIND
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(kind, bias):
    layer = quantizer(kind)(linear(48, 40, bias=bias))
    check_linear(layer, layer.weight, layer.bias, share=1e-6)


@EVERY_KIND
@EVERY_METHOD
def test_adapters_over_it_have_the_gradients_of_adapters_over_its_weight(kind, method):
    results = []
    for is_dense in (False, True):
        model = quantized(kind, n_kv_heads=2)
        if is_dense:
            dequantize(model)
            assert not any(isinstance(layer, KINDS[kind]) for layer in model.modules())
        torch.manual_seed(1)
        add_lora(model, LoRAConfig(method, r=2, dropout=0, targets=("wq", "wv", "w2")))
        for tensor in lora_state_dict(model).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
        logits = model(TOKENS)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in model.parameters() if p.requires_grad]))
    (logits, gradients), (right_logits, right) = results
    assert torch.allclose(logits, right_logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, right, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-9


@EVERY_KIND
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_is_kept_for_backward(kind, checkpointing):
    """No dequantised matrix is among the tensors that autograd saves."""
    model = quantized(kind, dim=64, n_layers=3).bfloat16()
    add_lora(model, LoRAConfig(r=2, dropout=0))
    model.checkpointing = checkpointing
    layers = [layer for layer in model.modules() if isinstance(layer, KINDS[kind])]
    sizes = {(layer.out_features, layer.in_features) for layer in layers}
    seen = set()

    def pack(tensor):
        seen.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(TOKENS).sum()
    assert len(sizes) == 3 and not seen & (sizes | {size[::-1] for size in sizes})
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@EVERY_KIND
@EVERY_METHOD
def test_merged_is_the_dequantised_weight_plus_the_update(kind, method):
    model = quantized(kind)
    base = model(TOKENS)
    adapt(model, method=method, r=2)
    adapted = model.eval()(TOKENS)
    merge_lora(model)
    layer = model.layers[0].attention.wq
    assert type(layer.base) is nn.Linear
    assert torch.allclose(model(TOKENS), adapted, atol=1e-3 * adapted.abs().max().item())
    unmerge_lora(model)
    assert isinstance(layer.base, KINDS[kind]) and torch.equal(model(TOKENS), adapted)
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), base)


# --- from a file, and in a run


@EVERY_KIND
def test_the_whole_base_is_never_there_in_16_bit(base, kind):
    """When a matrix of the file is converted, those before it are gone already."""
    weights = []

    def convert(layer, path):
        assert all(weight() is None for weight in weights)
        weights.append(weakref.ref(layer.weight))
        return quantizer(kind)(layer)

    model, _ = load_checkpoint(base, convert=convert)
    assert len(weights) == 14 and type(model.output) is nn.Linear
    for path in ("attention.wq", "feed_forward.w2"):
        assert isinstance(model.layers[1].get_submodule(path), KINDS[kind])
    assert model.origin["fingerprint"] == load_checkpoint(base)[0].origin["fingerprint"]


@EVERY_KIND
def test_codes_are_of_what_the_file_holds_whatever_it_is_computed_in(base, kind):
    """An adapter trained in bf16 meets the same base in fp32; bf16 rounds that base once."""
    layers = []
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = load_checkpoint(base, dtype=dtype, convert=quantizer(kind))
        assert model.origin["quantize"] == kind
        layers.append(model.layers[0].attention.wq)
    narrow, wide = layers
    for one, other in zip(narrow.buffers(), wide.buffers(), strict=True):
        assert one.dim() == 0 or torch.equal(one, other)
    assert torch.equal(narrow.weight, wide.weight.bfloat16())


@EVERY_KIND
def test_train_generate_merge_and_go_on(run, base, data, capsys, answered, kind):
    """The file says how the base was quantised; all that reads it follows."""
    plain = run("plain", *STEPS)
    rows = run(kind, *STEPS, "--quantize", kind, "--checkpointing", "--precision", "bf16")
    assert 0 < abs(rows[0]["loss"] - plain[0]["loss"]) < 0.1 * plain[0]["loss"]
    adapter = f"{kind}/adapter.pt"
    answer, error = answered("--adapter", adapter)
    assert f"fp32 and {kind} on cpu" in error
    for to in (["meta"], ["hf", "--bin"]):
        convert.main([str(base), to[0], "--adapter", adapter, "--dtype", "fp32", "--to", *to])
        assert "% of the update survives in float32" in capsys.readouterr().out
        assert answered("--checkpoint", to[0], "--adapter", "none").out == answer
    train.main(["--checkpoint", str(base), "--data", str(data), "--adapter", adapter,
                "--max-steps", "1", "--out", "second"])
    assert f"fp32 and {kind} on cpu" in capsys.readouterr().out
    for path in (adapter, "second/adapter.pt"):
        assert read_adapter(path)["base"]["quantize"] == kind


@pytest.mark.slow
def test_two_ranks_over_nf4_give_the_run_of_one(run, base, data, tmp_path):
    flags = [*STEPS, "--quantize", "nf4", "--checkpointing", "--dropout", "0",
             "--accumulation-steps", "2", "--batch-size"]
    run("one", *flags, "4")
    done = torchrun(tmp_path, ROOT / "train.py", "--checkpoint", base, "--data", data, "--r", "4",
                    "--lr", "1e-2", *flags, "2", "--out", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    losses = column(tmp_path / "two", "loss")
    assert losses == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-5) and len(losses) == 4


def test_the_adapter_itself_in_int8(run, base, capsys, answered):
    run("plain", *STEPS)
    convert.main([str(base), "small", "--to", "int8", "--adapter", "plain/adapter.pt"])
    assert "int8: logits of up to" in capsys.readouterr().out
    whole, small = (read_adapter(f"{name}/adapter.pt")["tensors"] for name in ("plain", "small"))
    assert whole.keys() == small.keys()
    for name, tensor in whole.items():
        assert close(small[name], tensor, 0.01)
    assert "adapter small/adapter.pt, lora r 4" in answered("--adapter", "small/adapter.pt").err


def test_what_cannot_be_quantised_is_refused(base, tmp_path, refused):
    with pytest.raises(ValueError, match="wq: delta-lora moves the weight itself, so the base"):
        add_lora(quantized("nf4"), LoRAConfig("delta-lora", r=2))
    error = refused(train.main, "--method", "full", "--quantize", "nf4")
    assert "--quantize nf4 needs a frozen base" in error
    model, tokenizer = load_checkpoint(base, convert=quantizer("nf4"))
    with pytest.raises(ValueError, match="dequantize the model first"):
        save_checkpoint(model, tokenizer, tmp_path / "new")


@pytest.mark.slow
@EVERY_KIND
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_compiled_layers_keep_no_dequantised_weight(kind, checkpointing):
    """torch.compile would keep what backward dequantises again: 256 KiB for each matrix here."""
    layers = nn.Sequential(*[KINDS[kind](nn.Linear(256, 256, bias=False)) for _ in range(3)])
    x = torch.randn(4, 256, requires_grad=True)
    expected, = torch.autograd.grad(layers(x).square().sum(), x)
    compiled = torch.compile(layers, dynamic=True)
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = checkpoint(compiled, x, use_reentrant=False) if checkpointing else compiled(x)
    assert sum(kept.values()) < 4 * 256 * 256
    gradient, = torch.autograd.grad(y.square().sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@EVERY_KIND
def test_autocast_may_round_the_product_and_its_gradient(kind):
    layer = quantizer(kind)(linear(24, 64))
    x = torch.randn(5, 64, requires_grad=True)
    expected, = torch.autograd.grad(layer(x).sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    gradient, = torch.autograd.grad(y.float().sum(), x)
    assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.01 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_compiled_is_the_same_to_the_bit(dtype):
    """What CUDA computes in one kernel: each weight is one product, which is rounded once."""
    layer = NF4Linear(nn.Linear(192, 64))
    compiled = torch.compile(scaled_levels, dynamic=True)
    parts = (layer.codes, layer.pairs, layer.scales(), dtype)
    assert torch.equal(compiled(*parts), scaled_levels(*parts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_on_a_gpu_is_the_same_to_the_bit(dtype):
    layer = NF4Linear(nn.Linear(192, 64))
    expected = layer.dequantize(dtype)
    assert torch.equal(layer.cuda().dequantize(dtype).cpu(), expected)
