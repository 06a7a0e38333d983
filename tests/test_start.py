"""lora/start.py and lora/loftq.py: starts that know the weight, and files that keep them."""
import json
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import generate
import train
from finetune import convert
from finetune.dataset import IGNORE, encode_example
from finetune.options import DEMO
from finetune.templates import TEMPLATES
from llama import load_checkpoint
from llama.peft import adapter_at
from lora import (LoRAConfig, add_lora, load_adapter, lora_disabled, merge_lora, quantize,
                  read_adapter, save_adapter, start, unmerge_lora)
from lora.adapter import lora_layers, lora_state_dict
from lora.loftq import loftq, quantizer
from lora.start import as_plain_lora, pissa

from .helpers import ROOT, check_linear, close, column, copied_tree, python, torchrun
from .memory import LiveBytes
from .record import SHAPES, ids, ours, peer_model
from .test_methods import TOKENS, Small, trained
from .test_quantize import linear, quantized
from .test_preflight import EVERY_LAYER, adamw, batch_of, built, estimate, two_steps

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FROM_WEIGHT = pytest.mark.parametrize("name", ["pissa", "olora"])
EVERY_METHOD = pytest.mark.parametrize("method", ["lora", "rslora"])
EVERY_KIND = pytest.mark.parametrize("kind", ["int8", "nf4"])
LOFTQ = {"r": 4, "dropout": 0.0, "options": {"start": "loftq"}, "targets": ("wq", "w2")}


def settings(name, **others):
    return {"r": 3, "alpha": 6, "dropout": 0.0, "options": {"start": name}} | others


def started(name, method="lora", model=None, targets=("up", "down"), step=0.0, **others):
    """Return a small model with an adapter that is a random step away from its start."""
    model = model or Small()
    add_lora(model, LoRAConfig(method, targets=targets, **settings(name, **others)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += step * torch.randn_like(parameter)
    return model


# --- the start


@EVERY_METHOD
def test_pissa_takes_the_largest_singular_values(method):
    """The rest of the weight has the others."""
    for layer in lora_layers(started("pissa", method)).values():
        W = layer.base.weight
        values = torch.linalg.eigvalsh(W @ W.T).clamp(min=0).sqrt().flip(0)[:6]
        part = layer.scale * layer.lora_B @ layer.lora_A
        assert close(torch.linalg.svdvals(part)[:3], values[:3], 1e-10)
        assert close(torch.linalg.svdvals(W - part)[:3], values[3:], 1e-7)
        assert close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), 1e-12)


def test_olora_takes_the_first_columns_of_q_and_rows_of_r():
    for layer in lora_layers(started("olora")).values():
        A, B, W = layer.lora_A, layer.lora_B, layer.base.weight
        assert close(B.T @ B, torch.eye(3, dtype=torch.float64), 1e-12)
        assert close(A, B.T @ W, 1e-12) and close(A, A.triu(), 1e-12)


@FROM_WEIGHT
@EVERY_METHOD
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_starts_as_its_base_to_the_bit(name, method, dtype):
    plain = Small(dtype)
    model = started(name, method, Small(dtype), dropout=0.5).train()
    assert torch.equal(model(TOKENS), plain(TOKENS))
    model(TOKENS).float().square().sum().backward()
    assert all(p.grad.any() and p.dtype == p.grad.dtype for p in trained(model).values())


@FROM_WEIGHT
@EVERY_METHOD
def test_it_is_the_papers_layer(name, method):
    """The weight without its part, and that part trained: output, gradients, merged weight."""
    layer = started(name, method, step=0.3).up
    A, A0, B, B0 = layer.lora_A, layer.lora_A0, layer.lora_B, layer.lora_B0
    assert not A0.requires_grad and not B0.requires_grad and not torch.equal(A, A0)
    weight = layer.base.weight + layer.scale * (B @ A - B0 @ A0)
    check_linear(layer, weight, layer.base.bias, [A, B])
    assert close(layer.base.weight + layer.delta(), weight, 1e-12)


def test_16_bits_lose_nothing_of_a_small_step():
    """A part of the weight itself, in bf16, would round a step of a thousandth away."""
    layer = started("pissa", model=nn.Sequential(linear(64, 64)), targets="0", r=8)[0]
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter *= 1 + 1e-3 * torch.rand_like(parameter)
        x = torch.randn(5, 64)
        exact = layer(x) - layer.base(x)
        A, B = (part.bfloat16() for part in layer.factors())
        rounded = layer.scale * F.linear(F.linear(x.bfloat16(), A), B)
    assert close(rounded.float(), exact, 0.02)


# --- what the base keeps


@FROM_WEIGHT
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_and_unmerged_it_is_the_base_to_the_bit(name, kind, dtype):
    plain, model = (quantized(kind, n_kv_heads=2, tie_embeddings=True).to(dtype) for _ in range(2))
    started(name, model=model, targets=("wq", "wk", "w2", "output"), step=0.1)
    before = model(TOKENS)
    assert not torch.equal(before, plain(TOKENS))
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    merge_lora(model)
    assert close(model(TOKENS), before, 1e-4 if dtype == torch.float32 else 0.05)
    unmerge_lora(model)
    assert torch.equal(model(TOKENS), before)
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))


@FROM_WEIGHT
@EVERY_METHOD
def test_a_file_brings_it_back_without_computing_it_again(name, method, tmp_path, monkeypatch):
    model = started(name, method, step=0.1)
    save_adapter(model, tmp_path / "adapter.pt")
    monkeypatch.setattr(start, "FROM_WEIGHT", dict.fromkeys(start.FROM_WEIGHT))
    for fresh in (Small(), started("random")):
        load_adapter(fresh, tmp_path / "adapter.pt")
        assert torch.equal(fresh(TOKENS), model(TOKENS))
        assert fresh.lora_config == model.lora_config
    plain = Small()
    adapter = as_plain_lora(read_adapter(tmp_path / "adapter.pt"))
    assert (adapter["config"].r, adapter["config"].options) == (6, {})
    load_adapter(plain, {**adapter, "config": vars(adapter["config"])})
    assert close(plain(TOKENS), model(TOKENS), 1e-12)
    assert not hasattr(plain.up, "lora_A0")


def test_files_of_other_adapters_do_not_mention_it(tmp_path):
    save_adapter(started("random"), tmp_path / "adapter.pt")
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert content["config"]["options"] == {}
    assert {name[-6:] for name in content["tensors"]} == {"lora_A", "lora_B"}


# --- runs


@pytest.fixture
def trained_adapter(run, tmp_path, monkeypatch, base, data):
    """trained_adapter(*flags) is the file of a run, and of one that was interrupted.

    It goes on to `next`, where nothing moves, and is exported to `hf` and `int8`.
    """
    flags = ["--lr", "1e-3", "--max-steps", "4", "--accumulation-steps", "1", "--save-every", "2"]

    def killed_in_step_3(model, step, loss):
        if step == 3:
            raise RuntimeError("killed")
        return {}

    def trained_adapter(*more):
        rows = run("a", *flags, *more)
        assert rows[-1]["loss"] < rows[0]["loss"]
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(train, "begin_step", killed_in_step_3)
            run("b", *flags, *more)
        run("b", *flags, *more, "--resume")
        adapters = [(tmp_path / out / "adapter.pt").read_bytes() for out in ("a", "b")]
        assert adapters[0] == adapters[1]
        train.main(["--checkpoint", str(base), "--data", str(data), "--adapter", "a/adapter.pt",
                    "--lr", "1e-30", "--max-steps", "1", "--out", "next"])
        for to in (["hf", "--bin"], ["int8"]):
            convert.main([str(base), to[0], "--adapter", "a/adapter.pt", "--to", *to])
        return "a/adapter.pt"

    return trained_adapter


def logits_of(base, kind, path):
    """Return the logits of a base with and without the adapter of a file."""
    content = adapter_at(path, load_checkpoint(base, device="meta")[0].args)
    model, _ = load_checkpoint(base, convert=quantizer(kind, content))
    load_adapter(model.eval(), content)
    with lora_disabled(model):
        plain = model(TOKENS)
    return model(TOKENS), plain


@FROM_WEIGHT
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_train_resume_generate_and_convert(trained_adapter, name, kind, base, answered):
    adapter = trained_adapter("--method-options", f"start={name}", "--quantize", kind)
    before, after = (read_adapter(path)["tensors"] for path in (adapter, "next/adapter.pt"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    convert.main([str(base), "peft", "--to", "peft", "--adapter", adapter, "--bin"])
    model, _ = load_checkpoint(base, convert=quantizer(kind))
    saved = adapter_at("peft", model.args)
    assert (saved["config"]["r"], saved["config"].get("options")) == (8, None)
    expected, _ = logits_of(base, kind, adapter)
    plain = model.eval()(TOKENS)
    for path, off in (("next/adapter.pt", 0), ("peft", 1e-4), ("int8/adapter.pt", 0.03)):
        logits, disabled = logits_of(base, kind, path)
        assert torch.equal(disabled, plain)
        assert (logits - expected).norm() <= off * (expected - plain).norm()
    merged = load_checkpoint("hf")[0].eval()(TOKENS)
    assert (merged - expected).norm() <= 1e-4 * (expected - plain).norm()
    assert answered("--adapter", adapter).out == answered("--adapter", adapter, "--merge").out


@FROM_WEIGHT
def test_a_run_from_an_adapter_does_not_factor_the_weights_again(
        trained_adapter, name, base, data, monkeypatch):
    """All SVDs of a 7B take minutes, and the file's values replace them."""
    adapter = trained_adapter("--method-options", f"start={name}")
    monkeypatch.setattr(start, "FROM_WEIGHT", dict.fromkeys(start.FROM_WEIGHT))      # Not called.
    train.main(["--checkpoint", str(base), "--data", str(data), "--adapter", adapter,
                "--max-steps", "1", "--out", "further"])


@pytest.mark.parametrize("flags, message", [
    (["--method-options", "start=best"], "start is 'best', must be random, pissa, olora or loftq"),
    (["--method", "dora", "--method-options", "start=pissa"], "dora: unknown option 'start'"),
    (["--method", "vera", "--method-options", "start=pissa"], "vera: unknown option 'start'"),
    (["--method", "full", "--method-options", "start=pissa"],
     "--method full trains the base and has no adapter; leave out"),
    (["--method-options", "start=pissa", "--targets", "tok_embeddings"],
     "tok_embeddings: unknown option 'start'"),
    (["--method-options", "start=pissa", "--targets", "all"], "all means the embeddings too"),
    (["--method-options", "start=loftq"], "start=loftq needs a base that is quantised for it"),
    (["--method-options", "start=loftq", "--quantize", "nf4", "--targets", "output"],
     "output: start=loftq needs a base that is quantised for it"),
])
def test_what_has_no_meaning_is_refused(refused, base, data, flags, message):
    files = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--dry-run"]
    assert message in refused(train.main, *files, *flags)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("precision, kind, name", [
    ("fp32", "none", "pissa"), ("bf16", "none", "olora"), ("bf16", "nf4", "pissa")])
def test_the_estimate_of_memory(checkpointing, precision, kind, name):
    """Both starts have the same tensors."""
    batch = batch_of(4, 64, 24)
    lora = {"dropout": 0, "targets": EVERY_LAYER, "options": {"start": name}}
    sketch = built(precision, lora, checkpointing, "meta", kind)
    kinds, _ = estimate(*sketch, batch, precision)
    model, _ = built(precision, lora, checkpointing, quantize=kind)
    optimizer = adamw(model)
    with LiveBytes([list(model.parameters()), list(model.buffers()), *batch[:2]]) as memory:
        two_steps(model, batch, precision, lora, optimizer)
    print(f"\nestimate {sum(kinds.values())}, peak {memory.peak}")
    assert sum(kinds.values()) == pytest.approx(memory.peak, rel=0.12)


# --- LoftQ


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loftq_repairs_a_part_of_the_error(kind, dtype):
    """As far as rank 8 of 80 can: at the start the layer is nearer to W than q(W) is."""
    layer = linear(96, 80, dtype)
    plain = quantize.quantizer(kind)(layer)
    config = LoRAConfig(targets="0", **settings("loftq", r=8))
    model = nn.Sequential(quantizer(kind, config)(layer, "0"))
    Q = model[0].dequantize(torch.float32)
    assert type(model[0]) is type(plain) and model[0].dtype_holder.dtype == dtype
    add_lora(model, config)
    adapter = model[0]
    W = layer.weight.float()
    error = (plain.dequantize(torch.float32) - W).norm()
    started_error = (Q + adapter.delta() - W).norm().item()
    print(f"\n{kind}: {started_error / error:.3f} of the error is left")
    assert started_error < 0.9 * error
    # The start is the best of rank r for these codes.
    best = torch.linalg.svdvals(W - Q)[8:].norm()
    assert started_error == pytest.approx(best.item(), rel=1e-4)
    # What LoftQ quantised is the weight without the start of the adapter.
    product = (adapter.lora_B0.double() @ adapter.lora_A0.double()).float()
    layer.float().weight -= product
    assert close(Q, quantize.quantizer(kind)(layer).weight, 0.02)
    assert not hasattr(adapter.base, "loftq_rest")


def test_loftqs_factors_follow_a_base_that_has_moved():
    config = LoRAConfig(targets="0", **settings("loftq", r=8))
    model = nn.Sequential(quantizer("nf4", config)(linear(96, 80), "0")).to("meta")
    add_lora(model, config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_file_with_the_default_rank_need_not_name_it(base):
    content = {"config": {"method": "lora", "options": {"start": "loftq"}}, "base": {},
               "tensors": {}}
    model, _ = load_checkpoint(base, convert=quantizer("nf4", content))
    assert isinstance(model.layers[0].attention.wq, quantize.NF4Linear)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_builds_loftqs_base_again_to_the_bit(base, kind, dtype, tmp_path):
    config = LoRAConfig(**LOFTQ)
    model, _ = load_checkpoint(base, dtype=dtype, convert=quantizer(kind, config))
    model.eval()
    add_lora(model, config)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.01 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter.pt")
    content = adapter_at(tmp_path / "adapter.pt")
    fresh, _ = load_checkpoint(base, dtype=dtype, convert=quantizer(kind, content))
    load_adapter(fresh.eval(), content)
    expected = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    with lora_disabled(model):
        disabled = model(TOKENS)
    merge_lora(model)
    unmerge_lora(model)
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), disabled)
    plain, _ = load_checkpoint(base, dtype=dtype, convert=quantizer(kind))
    with pytest.raises(ValueError, match="start=loftq needs a base that is quantised for it"):
        load_adapter(plain, content)
    tensors = content["tensors"]
    starts = {name for name in tensors if name.endswith("0")}
    random = {"config": content["config"] | {"options": {}},
              "tensors": {name: tensors[name] for name in tensors.keys() - starts}}
    with pytest.raises(ValueError, match="layers.0.attention.wq: the base was quantised for an"):
        load_adapter(model, content | random)
    for changes in ({"method": "dora"}, {"method": "dora", "targets": ["wk"]},
                    {"targets": ["wq"], "options": {"start": "loftq"}}):
        other = adapted(base, LoRAConfig(**{"r": 4, "targets": config.targets} | changes), kind)
        with pytest.raises(ValueError, match="the base was quantised for an adapter with start=l"):
            load_adapter(model, other)
    # All layers keep their values, also where the last alone does not fit.
    last = [name for name in tensors if name.endswith("lora_B0")][-1]
    other = {name: 2 * tensor if name == last or not name.endswith("0") else tensor
             for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match="the base was quantised for another adapter"):
        load_adapter(model, content | {"tensors": other})
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def adapted(base, config, kind):
    """Return the content of a file with this adapter over the quantised base."""
    model, _ = load_checkpoint(base, convert=quantizer(kind, config))
    add_lora(model, config)
    return {"path": "other", "config": vars(config), "base": None,
            "tensors": lora_state_dict(model)}


@EVERY_KIND
def test_the_model_starts_nearer_to_its_base(base, kind):
    config = LoRAConfig(**LOFTQ | {"targets": EVERY_LAYER, "r": 8})
    whole, _ = load_checkpoint(base)
    plain, _ = load_checkpoint(base, convert=quantizer(kind))
    model, _ = load_checkpoint(base, convert=quantizer(kind, config))
    add_lora(model, config)
    expected = whole.eval()(TOKENS)
    assert (model.eval()(TOKENS) - expected).norm() < 0.8 * (plain.eval()(TOKENS) - expected).norm()


def far_from(expected, model, rows):
    """Return (nats per token between a model and the logits `expected`, loss per answer token)."""
    distance = n_tokens = loss = n_answer = 0
    for (tokens, labels), logits in zip(rows, expected, strict=True):
        right = logits.log_softmax(-1)
        log_p = model(torch.tensor([tokens])).log_softmax(-1)
        distance += F.kl_div(log_p, right, log_target=True, reduction="sum").item()
        n_tokens += len(tokens)
        answer = torch.tensor([*labels[1:], IGNORE])
        loss += F.nll_loss(log_p[0], answer, ignore_index=IGNORE, reduction="sum").item()
        n_answer += (answer != IGNORE).sum().item()
    return distance / n_tokens, loss / n_answer


@pytest.mark.slow
@torch.no_grad()
def test_the_demo_starts_nearer_to_its_base_with_loftq():
    """At all tokens of the held-out examples; prints the figures of docs/methods.md."""
    def demo(kind, **given):
        config = LoRAConfig(targets=EVERY_LAYER, dropout=0.0, **given) if given else None
        model, tokenizer = load_checkpoint(DEMO, dtype=torch.float32,
                                           convert=quantizer(kind, config))
        if config:
            add_lora(model, config)
        return model.eval(), tokenizer

    whole, tokenizer = demo("none")
    examples = json.loads((DEMO / "held_out.json").read_text())
    rows = [encode_example(each, tokenizer, TEMPLATES["alpaca"]) for each in examples]
    expected = [whole(torch.tensor([tokens])) for tokens, _ in rows]
    _, loss = far_from(expected, whole, rows)
    print(f"\nwhole: held-out loss {loss:.4f}")
    for kind in ("int8", "nf4"):
        distances = []
        for r in (0, 16, 64):
            given = {"r": r, "alpha": 2 * r, "options": {"start": "loftq"}} if r else {}
            distance, loss = far_from(expected, demo(kind, **given)[0], rows)
            print(f"{kind}, LoftQ of rank {r}: {distance:.2e} nats per token, loss {loss:.4f}")
            distances.append(distance)
        assert distances == sorted(distances, reverse=True)
        assert distances[1] < 0.8 * distances[0]


@EVERY_KIND
def test_a_run_with_loftq(trained_adapter, kind, base, answered, refused):
    adapter = trained_adapter("--quantize", kind, "--targets", ",".join(EVERY_LAYER),
                              "--method-options", "start=loftq")
    expected, _ = logits_of(base, kind, adapter)
    assert torch.equal(logits_of(base, kind, "next/adapter.pt")[0], expected)
    assert close(logits_of(base, kind, "int8/adapter.pt")[0], expected, 0.02)
    assert close(load_checkpoint("hf")[0].eval()(TOKENS), expected, 1e-5)
    answered("--adapter", adapter, "--merge")
    error = refused(convert.main, str(base), "new", "--to", "peft", "--bin", "--adapter", adapter)
    assert "an adapter with start=loftq belongs to a base that was quantised for it" in error
    error = refused(generate.main, "--adapter", adapter, "--quantize", "none")
    assert "start=loftq needs a base that is quantised for it" in error


# --- PEFT


def peft_layers(model, **config):
    peft = pytest.importorskip("peft", reason="needs peft: pip install -r tests/requirements.txt")
    return peft.get_peft_model(model, peft.LoraConfig(lora_dropout=0.0, **config))


@FROM_WEIGHT
@EVERY_METHOD
def test_the_start_is_pefts(name, method):
    """Up to the signs of singular vectors: so B A is compared, and the base that PEFT keeps."""
    model = started(name, method, Small(torch.float32))
    twin = peft_layers(Small(torch.float32), r=3, lora_alpha=6, init_lora_weights=name,
                       use_rslora=method == "rslora", target_modules=["up", "down"])
    for path, layer in lora_layers(model).items():
        other = twin.base_model.model.get_submodule(path)
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        assert close(layer.lora_B @ layer.lora_A, B @ A, 1e-5)
        assert close(layer.lora_A.abs(), A.abs(), 1e-5)
        residual = layer.base.weight - layer.scale * layer.lora_B0 @ layer.lora_A0
        assert close(residual, other.base_layer.weight, 1e-5)


def test_loftqs_svd_is_pefts():
    pytest.importorskip("peft", reason="needs peft: pip install -r tests/requirements.txt")
    from peft.utils.loftq_utils import _low_rank_decomposition

    layer = linear(96, 80)
    Q = loftq(layer, 8, quantize.quantizer("nf4"))
    A, B = Q.loftq_rest
    parts = _low_rank_decomposition(layer.weight - Q.dequantize(torch.float32), reduced_rank=8)
    assert close(B @ A, parts["L"] @ parts["R"], 1e-5)


@FROM_WEIGHT
@pytest.mark.parametrize("is_converted", [False, True], ids=["as it is", "converted"])
def test_a_folder_of_peft_gives_its_logits(name, is_converted, tmp_path):
    """Saved over the residual base, or by PEFT converted to plain LoRA of rank 2 r."""
    pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    model = ours(**SHAPES["GQA"])
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith((".wq", ".wk", ".w2")):
                # The three largest singular values twice: with a clear gap behind them, two SVDs of
                # the same weight agree on every CPU.
                A, B = pissa(module.weight, 3, 1.0)
                module.weight += B @ A
    tokens = ids(2, 37, 53)
    plain = model(tokens)
    twin = peft_layers(peer_model(model), r=3, lora_alpha=6, init_lora_weights=name,
                       target_modules=["q_proj", "k_proj", "down_proj"])
    convert_from = {}
    if is_converted:
        twin.peft_config["default"].init_lora_weights = True
        twin.save_pretrained(tmp_path / "start")
        twin.peft_config["default"].init_lora_weights = name
        convert_from = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")}
    with torch.no_grad():
        torch.manual_seed(3)
        for each, parameter in twin.named_parameters():
            if "lora_" in each:
                parameter += 0.05 * torch.randn_like(parameter)
        expected = twin(tokens).logits
    twin.save_pretrained(tmp_path / "peft", safe_serialization=False, **convert_from)
    load_adapter(model, adapter_at(tmp_path / "peft", model.args))
    assert model.lora_config.options == ({} if is_converted else {"start": name})
    with torch.no_grad():
        assert (model(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not close(plain, expected, 0.01)
        with lora_disabled(model):
            assert torch.equal(model(tokens), plain)


@FROM_WEIGHT
def test_an_adapter_after_one_that_leaves_out_blocks(name):
    """Both as PEFT's readers return them: without A0 and B0, the first for one layer of two.

    One of our own had other A0 and B0: over a quantised base, say.
    """
    def as_peft(model, layers):
        tensors = {each: tensor for each, tensor in lora_state_dict(model).items()
                   if each.startswith(layers) and not each.endswith("0")}
        return {"path": name, "config": vars(model.lora_config), "base": None, "tensors": tensors,
                "from_base": ("lora_A0", "lora_B0"), "skips_blocks": True}

    first = as_peft(started(name, step=0.1), "up")
    expected = started(name, step=0.2)
    second = as_peft(expected, ("up", "down"))
    own = Small()
    own.up.weight.data *= 2
    own = as_peft(started(name, model=own), ()) | {
        "tensors": lora_state_dict(own), "from_base": (), "skips_blocks": False}
    model = Small()
    for source in (second, first, first, own, second):
        load_adapter(model, source)
    assert close(model(TOKENS), expected(TOKENS), 1e-6)


# --- several ranks, and without this page


@pytest.mark.slow
def test_two_ranks_and_a_cut_base(base, data, tmp_path, monkeypatch):
    """Whole or cut over the ranks, the run is the same to the bit, and near one process's."""
    monkeypatch.chdir(tmp_path)
    kinds = {"pissa": "none", "olora": "nf4", "loftq": "nf4"}
    for name, kind in kinds.items():
        flags = ["--method-options", f"start={name}", "--quantize", kind, "--checkpoint", "base",
                 "--data", "examples.json", "--r", "4", "--lr", "1e-3", "--dropout", "0",
                 "--max-steps", "3", "--accumulation-steps", "1", "--seed", "1"]
        runs = []
        for out, more in (("whole", []), ("cut", ["--shard"])):
            done = torchrun(tmp_path, ROOT / "train.py", *flags, *more, "--batch-size", "2",
                            "--out", f"{name}-{out}")
            assert done.returncode == 0, done.stderr
            folder = tmp_path / f"{name}-{out}"
            runs.append((column(folder, "loss"), (folder / "adapter.pt").read_bytes()))
        assert runs[0] == runs[1]
        train.main([*flags, "--batch-size", "4", "--out", name])
        assert runs[0][0] == pytest.approx(column(tmp_path / name, "loss"), rel=1e-5)


@pytest.mark.slow
def test_the_page_can_be_deleted(base, data, tmp_path):
    """In a copy without its two files and the lines that name them, a run works as before."""
    copied_tree(tmp_path)
    for name in ("start", "loftq"):
        (tmp_path / f"lora/{name}.py").unlink()
    for path in [*tmp_path.glob("*.py"), *tmp_path.glob("*/**/*.py")]:
        code = path.read_text()
        code = re.sub(r"from lora.loftq import .*quantizer", "from lora.quantize import quantizer",
                      code)
        code = re.sub(r"quantizer\((\S*quantize), .*?\)", r"quantizer(\1)", code)
        code = re.sub(r"start\.offered_by\((.*?)\)", r"\1", code)
        named = r"import start|import as_plain_lora|as_plain_lora\(|check_export\("
        code = re.sub(rf".*({named}).*\n", "", code)
        path.write_text(code)
    flags = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--max-steps", "2"]
    script = f"""
import train, generate
from finetune import convert
train.main([*{flags!r}, "--quantize", "nf4", "--out", "out"])
generate.main(["--adapter", "out/adapter.pt", "--instruction", "Hi.", "--max-new-tokens", "2"])
convert.main([{str(base)!r}, "peft", "--to", "peft", "--adapter", "out/adapter.pt", "--bin"])
convert.main([{str(base)!r}, "int8", "--to", "int8", "--adapter", "out/adapter.pt"])
"""
    done = python(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
