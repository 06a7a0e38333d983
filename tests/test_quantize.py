"""lora/quantize.py: levels and errors by their derivations, gradients through them, and no weight kept for backward."""
import math
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import generate
import train
from finetune import convert
from llama import load_checkpoint, save_checkpoint
from lora import LoRAConfig, add_lora, lora_disabled, lora_state_dict, merge_lora, read_adapter, unmerge_lora
from lora.adapter import METHODS
from lora.quantize import KINDS, Int8Linear, NF4Linear, dequantize, in_int8, nf4_levels, quantizer

from .helpers import ROOT, metrics, tiny, torchrun

PUBLISHED = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
             0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]     # QLoRA, appendix E
SHAPES = [(64, 64), (5, 7), (1, 1), (3, 65), (130, 63)]               # odd ones, and no multiples of a block
BASED = [method for method in METHODS if method != "delta-lora"]      # those that leave the base where it is
STEPS = ("--max-steps", "4")


def linear(d_out, d_in, dtype=torch.float32, std=1.0, bias=False):
    torch.manual_seed(d_out + d_in)
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    return layer.to(dtype).requires_grad_(False)


def quantized(kind, **sizes):
    """A tiny model whose blocks' matrices are in fewer bits."""
    model = tiny(**sizes)
    for path, layer in list(model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            model.layers.set_submodule(path, quantizer(kind)(layer))
    return model


def test_levels_are_the_published_ones():
    assert nf4_levels().tolist() == pytest.approx(PUBLISHED, abs=1e-4) and nf4_levels()[7] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_half_a_step_at_most(shape):
    layer = linear(*shape)
    found, step = Int8Linear(layer).weight, layer.weight.abs().amax(1, keepdim=True) / 127
    assert found.shape == layer.weight.shape and ((found - layer.weight).abs() <= step * 0.5001).all()
    largest = layer.weight.abs().argmax(1, keepdim=True)
    assert torch.allclose(found.gather(1, largest), layer.weight.gather(1, largest), rtol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_takes_the_nearest_level(shape, double):
    """Written out: each weight over its block's largest magnitude goes to the nearest of the 16 levels."""
    layer = linear(*shape)
    packed = NF4Linear(layer, double)
    weights, levels = layer.weight.flatten(), torch.tensor(PUBLISHED)
    expected = []
    for start in range(0, len(weights), 64):
        block = weights[start:start + 64]
        nearest = levels[((block / block.abs().max())[:, None] - levels).abs().argmin(1)]
        expected.append(nearest * packed.scales()[start // 64])
        assert packed.scales()[start // 64] == pytest.approx(block.abs().max().item(), rel=0 if not double else 0.02)
    assert torch.allclose(packed.weight.flatten(), torch.cat(expected), atol=1e-5)


def test_round_trip_error_is_what_the_normal_distribution_says():
    """Of normal weights: NF4's error by integrating over its cells under the law of a block's maximum, int8's by a step's
    variance of 1/12, both of the weights' norm."""
    layer = linear(512, 512)
    levels = torch.tensor(PUBLISHED).double()
    edges = (levels[1:] + levels[:-1]) / 2
    torch.manual_seed(1)
    maxima = torch.randn(2000, 64, dtype=torch.float64).abs().amax(1)                   # what a block is divided by
    z = torch.linspace(-6, 6, 24001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    errors = []
    for top in maxima[:400]:
        inside = z.abs() <= top
        error = (levels[torch.bucketize(z / top, edges)] * top - z).square()
        errors.append((error * density * inside).sum() / (density * inside).sum())
    derived = torch.stack(errors).mean().sqrt().item()
    for double, tolerance in ((False, 0.02), (True, 0.03)):
        found = ((NF4Linear(layer, double).weight - layer.weight).norm() / layer.weight.norm()).item()
        assert found == pytest.approx(derived, rel=tolerance)
    steps = layer.weight.abs().amax(1) / 127
    derived = (steps.square().mean() / 12).sqrt().item()
    assert ((Int8Linear(layer).weight - layer.weight).norm() / layer.weight.norm()).item() == pytest.approx(derived, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_one_large_weight(kind):
    layer = linear(4, 64)
    layer.weight.zero_()
    assert not quantizer(kind)(layer).weight.any()
    layer.weight[2, 3] = 1e4
    assert quantizer(kind)(layer).weight[2, 3] == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_a_weight(dtype):
    """8 and a scale a row; 4 + 8/64 + 32/(64 x 256), or 4 + 32/64 without double quantisation."""
    layer = linear(1024, 2048, dtype)

    def bits(packed):
        return 8 * sum(b.nbytes for name, b in packed.named_buffers() if name not in ("dtype_holder", "pairs", "mean")) / layer.weight.numel()
    assert bits(Int8Linear(layer)) == 8 + 32 / 2048
    assert bits(NF4Linear(layer)) == 4 + 8 / 64 + 32 / (64 * 256) and bits(NF4Linear(layer, double=False)) == 4.5


def test_llama_2_7b_in_nf4():
    """One block of the 7B, times 32, and embedding, output and norms in 16 bit: 3.87 GB; 4.17 without double quantisation."""
    sizes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    for double, stated in ((True, 3.87e9), (False, 4.17e9)):
        block = 0
        for d_out, d_in in sizes:
            packed = NF4Linear(nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16), double)
            block += sum(b.nbytes for b in packed.buffers())
        assert 32 * (block + 2 * 2 * 4096) + 2 * (2 * 32000 * 4096 + 4096) == pytest.approx(stated, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(kind, bias):
    layer = quantizer(kind)(linear(48, 40, bias=bias))
    x = torch.randn(3, 5, 40, requires_grad=True)
    y, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((z * g).sum(), x)[0] for z in (y, expected))
    assert torch.equal(y, expected) or torch.allclose(y, expected, atol=1e-6)
    assert (ours - theirs).norm() / theirs.norm() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", BASED)
def test_adapters_over_it_have_the_gradients_of_adapters_over_its_weight(kind, method):
    torch.manual_seed(0)
    tokens, results = torch.arange(1, 13).view(2, 6), []
    for dense in (False, True):
        model = quantized(kind, n_kv_heads=2)
        if dense:
            dequantize(model)
            assert not any(isinstance(layer, KINDS[kind]) for layer in model.modules())
        torch.manual_seed(1)
        add_lora(model, LoRAConfig(method, r=2, dropout=0, targets=("wq", "wv", "w2")))
        for tensor in lora_state_dict(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).mul(0.1))
        logits = model(tokens)
        logits.square().sum().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (one, ours), (other, theirs) = results
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5) and ours.keys() == theirs.keys() and ours
    assert all((ours[name] - theirs[name]).norm() <= 1e-6 * theirs[name].norm() + 1e-9 for name in ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_is_kept_for_backward(kind, checkpointing):
    """Saved tensors and what lives between forward and backward: no dequantised matrix among them."""
    model = quantized(kind, dim=64, n_layers=3).bfloat16()
    add_lora(model, LoRAConfig(r=2, dropout=0))
    model.checkpointing = checkpointing
    sizes = {(layer.out_features, layer.in_features) for layer in model.layers.modules() if isinstance(layer, KINDS[kind])}
    seen = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.add(tuple(t.shape)), t)[1], lambda t: t):
        loss = model(torch.arange(8).view(1, 8)).sum()
    assert len(sizes) == 3 and not seen & (sizes | {size[::-1] for size in sizes})
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", BASED)
def test_merged_is_the_dequantised_weight_plus_the_update(kind, method):
    model, tokens = quantized(kind), torch.arange(8).view(1, 8)
    base = model(tokens)
    add_lora(model, LoRAConfig(method, r=2, dropout=0))
    for tensor in lora_state_dict(model).values():
        nn.init.normal_(tensor, std=0.1)
    adapted = model.eval()(tokens)
    merge_lora(model)
    layer = model.layers[0].attention.wq
    assert type(layer.base) is nn.Linear and torch.allclose(model(tokens), adapted, atol=1e-3 * adapted.abs().max().item())
    unmerge_lora(model)
    assert isinstance(model.layers[0].attention.wq.base, KINDS[kind]) and torch.equal(model(tokens), adapted)
    with lora_disabled(model):
        assert torch.equal(model(tokens), base)


def test_what_moves_its_base_is_refused():
    with pytest.raises(ValueError, match="layers.0.attention.wq: delta-lora moves the weight itself, so the base cannot be quantised"):
        add_lora(quantized("nf4"), LoRAConfig("delta-lora", r=2))
    with pytest.raises(ValueError, match="unknown quantisation 'int4', must be none, int8 or nf4"):
        quantizer("int4")


def test_an_adapter_in_int8_is_off_by_half_a_scale_at_most():
    torch.manual_seed(0)
    tensors = {"a.lora_A": torch.randn(4, 30), "a.lora_B": torch.randn(20, 4), "a.lora_magnitude": torch.randn(20)}
    small, scales = in_int8(tensors)
    assert {name: tuple(scale.shape) for name, scale in scales.items()} == {"a.lora_A": (4, 1), "a.lora_B": (1, 4)}
    assert small["a.lora_A"].dtype == torch.int8 and small["a.lora_magnitude"] is tensors["a.lora_magnitude"]
    for name, scale in scales.items():
        assert ((small[name] * scale - tensors[name]).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("kind", KINDS)
def test_train_generate_merge(run, base, tmp_path, capsys, kind):
    """The file says what the base was held in; generate.py follows it, and a merged folder gives what it gave."""
    plain = run("plain", *STEPS)
    rows = run(kind, *STEPS, "--quantize", kind, "--checkpointing", "--precision", "bf16")
    assert 0 < abs(rows[0]["loss"] - plain[0]["loss"]) < 0.1 * plain[0]["loss"]
    adapter = str(tmp_path / kind / "adapter.pt")
    assert read_adapter(adapter)["base"]["quantize"] == kind
    capsys.readouterr()
    generate.main(["--adapter", adapter, "--instruction", "Say blue.", "--max-new-tokens", "8"])
    answer, said = capsys.readouterr()
    assert f"fp32 and {kind} on cpu" in said
    for to in "meta", "hf":
        convert.main([str(base), f"{kind}-{to}", "--to", to, "--adapter", adapter, "--dtype", "fp32", *["--bin"] * (to == "hf")])
        assert "% of the update survives in float32" in capsys.readouterr().out
        generate.main(["--checkpoint", f"{kind}-{to}", "--adapter", "none", "--instruction", "Say blue.", "--max-new-tokens", "8"])
        assert capsys.readouterr().out == answer
    generate.main(["--adapter", adapter, "--instruction", "Say blue.", "--max-new-tokens", "8", "--quantize", "none"])
    assert kind not in capsys.readouterr().err.split("adapter")[0]


@pytest.mark.slow
def test_two_ranks_over_nf4_give_the_run_of_one(run, base, data, tmp_path):
    """With accumulation and checkpointing as ever."""
    flags = ("--quantize", "nf4", "--checkpointing", "--dropout", "0", "--accumulation-steps", "2")
    one = run("one", *STEPS, *flags, "--batch-size", "4")
    done = torchrun(tmp_path, ROOT / "train.py", "--checkpoint", base, "--data", data, "--r", "4", "--lr", "1e-2", *STEPS,
                    *flags, "--batch-size", "2", "--out", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    two = metrics(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5) and len(two) == 4


def test_the_adapter_itself_in_int8(run, base, tmp_path, capsys):
    run("plain", *STEPS)
    convert.main([str(base), "small", "--to", "int8", "--adapter", "plain/adapter.pt"])
    assert "int8: logits of up to" in capsys.readouterr().out
    whole, small = (read_adapter(tmp_path / name / "adapter.pt")["tensors"] for name in ("plain", "small"))
    assert whole.keys() == small.keys()
    assert all((whole[name] - small[name]).norm() < 0.01 * whole[name].norm() for name in whole)
    generate.main(["--adapter", "small/adapter.pt", "--instruction", "Say blue.", "--max-new-tokens", "4"])
    assert "adapter small/adapter.pt, lora r 4" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_base_is_never_there_in_16_bit(base, kind):
    """When a matrix of the file is converted, those before it are gone already."""
    read = []

    def convert(layer):
        assert all(weight() is None for weight in read)
        read.append(weakref.ref(layer.weight))
        return quantizer(kind)(layer)
    model, _ = load_checkpoint(base, convert=convert)
    assert len(read) == 14 and all(isinstance(model.layers[1].get_submodule(path), KINDS[kind]) for path in ("attention.wq", "feed_forward.w2"))
    assert type(model.output) is nn.Linear and model.origin["fingerprint"] == load_checkpoint(base)[0].origin["fingerprint"]


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_of_what_the_file_holds_whatever_it_is_computed_in(base, kind):
    """So an adapter trained in bf16 meets the same base in fp32; and a forward in bf16 rounds that base once."""
    (narrow, _), (wide, _) = (load_checkpoint(base, dtype=dtype, convert=quantizer(kind)) for dtype in (torch.bfloat16, torch.float32))
    for one, other in zip(narrow.layers[0].attention.wq.buffers(), wide.layers[0].attention.wq.buffers()):
        assert one.dim() == 0 or torch.equal(one, other)
    assert torch.equal(narrow.layers[0].attention.wq.weight, wide.layers[0].attention.wq.weight.bfloat16())
    assert narrow.origin["quantize"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_in_bf16_rounds_once(base, kind):
    model, _ = load_checkpoint(base, dtype=torch.bfloat16, convert=quantizer(kind))
    add_lora(model, LoRAConfig(r=2, dropout=0))
    for tensor in lora_state_dict(model).values():
        nn.init.normal_(tensor, std=0.1)
    layer = model.layers[0].attention.wq
    exact = layer.base.dequantize(torch.float64) + layer.delta().double()
    merge_lora(model)
    assert torch.equal(layer.base.weight, exact.bfloat16()) or (layer.base.weight != exact.bfloat16()).double().mean() < 1e-3


def test_a_quantised_model_is_not_written(base, tmp_path):
    model, tokenizer = load_checkpoint(base, convert=quantizer("nf4"))
    with pytest.raises(ValueError, match="dequantize the model first"):
        save_checkpoint(model, tokenizer, tmp_path / "new")
    dequantize(model)
    save_checkpoint(model, tokenizer, tmp_path / "new")


def test_train_goes_on_over_the_base_that_the_adapter_was_trained_over(run, base, data, tmp_path, capsys):
    run("first", *STEPS, "--quantize", "nf4")
    capsys.readouterr()
    train.main(["--checkpoint", str(base), "--data", str(data), "--adapter", "first/adapter.pt", "--max-steps", "1", "--out", "second"])
    said = capsys.readouterr().out
    assert "fp32 and nf4 on cpu" in said and read_adapter("second/adapter.pt")["base"]["quantize"] == "nf4"
    n = sum(p.numel() for p in load_checkpoint(base)[0].parameters())
    assert f" of {n + sum(t.numel() for t in read_adapter('second/adapter.pt')['tensors'].values()):,} parameters trained" in said


def test_full_fine_tuning_takes_no_quantised_base(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--method", "full", "--quantize", "nf4"])
    assert stopped.value.code == 2 and "--quantize nf4 needs a frozen base" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_model_leaves_codes_and_scales(kind):
    layer = quantizer(kind)(linear(48, 40))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.half().bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and layer(torch.ones(1, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
