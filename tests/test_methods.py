"""The LoRA family: each method against PEFT or a case worked out by hand, and what all of them promise alike."""
import copy
import math
import re
import shutil
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import generate
import train
from finetune.options import parse_options
from llama import ModelArgs, Transformer
from lora import (LoRAConfig, LoRALinear, add_lora, begin_step, follow_optimizer, load_adapter, lora_disabled, lora_state_dict,
                  mark_only_lora_as_trainable, merge_lora, read_adapter, save_adapter, unmerge_lora)
from lora.adapter import METHODS, lora_layers

from .helpers import ONE_THREAD, ROOT, metrics, tiny, torchrun
from .memory import saved_bytes

TOKENS = torch.tensor([[1, 5, 9, 7, 3], [1, 4, 4, 8, 2]])
EMBEDS = [method for method, kinds in METHODS.items() if nn.Embedding in kinds]


class Small(nn.Module):
    """An embedding, a square layer with a bias and a wide one without: `up` and `down` share what VeRA shares, cut."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        return self.down(torch.tanh(self.up(self.words(tokens))))


def adapted(method, targets=("up", "down"), dtype=torch.float64, r=3, alpha=6, dropout=0.0, moved=True, model=None, **options):
    """A small model with an adapter whose tensors are those of one in the midst of its training."""
    model = Small(dtype) if model is None else model
    add_lora(model, LoRAConfig(method, r=r, alpha=alpha, dropout=dropout, targets=targets, options=options))
    if moved:
        with torch.no_grad():
            for tensor in lora_state_dict(model).values():
                tensor += 0.3 * torch.randn_like(tensor)
    return model


def alone(method, d_in, d_out, bias=True, **settings):
    """(layer, its forward's model): one adapted linear layer in fp64."""
    model = nn.Sequential(OrderedDict(only=nn.Linear(d_in, d_out, bias=bias).double()))
    adapted(method, "only", model=model, **settings)
    return model.only


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def close(one, other, share=1e-6):
    """Equal to `share` of the norm."""
    return (one - other).norm() <= share * other.norm()


# Each method against an independent value

def weight_by_hand(method, layer):
    """The weight that the layer stands for, written from the papers' equations, and differentiable."""
    W, s = layer.base.weight, layer.alpha / layer.r
    if method == "vera":
        A, B = layer.shared[0].lora_A[:, :W.shape[1]], layer.shared[0].lora_B[:W.shape[0]]
        return W + torch.diag(layer.lora_b) @ B @ torch.diag(layer.lora_d) @ A
    A, B = layer.lora_A, layer.lora_B
    if method == "rslora":
        return W + layer.alpha / layer.r ** 0.5 * B @ A
    if method == "dora":
        V = W + s * B @ A
        return torch.diag(layer.lora_magnitude / V.detach().square().sum(1).sqrt()) @ V
    return (layer.lora_W if method == "delta-lora" else W) + s * B @ A


@pytest.mark.parametrize("method", METHODS)
def test_forward_gradients_and_merged_weight_are_the_equations(method):
    for bias in (True, False):
        layer = alone(method, 7, 5, bias)
        x = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
        weight = weight_by_hand(method, layer)
        expected = F.linear(x, weight, layer.base.bias)
        assert close(layer(x), expected, 1e-12)
        g, parameters = torch.randn_like(expected), [x, *trained(layer).values()]
        for ours, theirs in zip(*(torch.autograd.grad((y * g).sum(), parameters) for y in (layer(x), expected))):
            assert close(ours, theirs, 1e-12)
        assert close(layer.base.weight + layer.delta(), weight, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_by_finite_differences(method):
    layer = alone(method, 4, 3, r=2)
    if method == "dora":
        norm = layer.norm()
        layer.norm = lambda: norm                                # frozen, as its gradient takes it to be
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained(layer).values()))


@pytest.mark.parametrize("method", EMBEDS)
def test_embeddings_are_their_equations(method):
    model = adapted(method, "words")
    layer, s = model.words, {"rslora": 6 / 3 ** 0.5}.get(method, 2.0)
    expected = F.embedding(TOKENS, layer.base.weight + s * (layer.lora_B @ layer.lora_A).T)
    assert close(layer(TOKENS), expected, 1e-12) and set(trained(model)) == {"words.lora_A", "words.lora_B"}


def peft_twin(model, config, tensors):
    """PEFT's adapter on the same base, its tensors set to `tensors`, {PEFT's name: ours}."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install -r tests/requirements.txt")
    base = Small()
    twin = peft.get_peft_model(base, getattr(peft, config.pop("kind"))(target_modules=["up", "down"], **config)).double()
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[f"base_model.model.{name}"].copy_(tensor)
    return twin, named


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("method", ["rslora", "dora", "vera"])
def test_it_is_what_peft_has(method, dropout):
    """Forward, gradients and merged weight to 1e-6 of the norm; with dropout, the same elements dropped."""
    model = adapted(method, dropout=dropout).train()
    mapped = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "lora_d": "vera_lambda_d.default",
              "lora_b": "vera_lambda_b.default", "lora_magnitude": "lora_magnitude_vector.default.weight"}
    names = {name: f"{name.rpartition('.')[0]}.{mapped[name.rpartition('.')[2]]}" for name in trained(model)}
    config = dict(kind="VeraConfig", r=3, vera_dropout=dropout) if method == "vera" else dict(
        kind="LoraConfig", r=3, lora_alpha=6, lora_dropout=dropout, use_rslora=method == "rslora", use_dora=method == "dora")
    twin, named = peft_twin(model, config, {theirs: trained(model)[ours] for ours, theirs in names.items()})
    torch.manual_seed(1)
    ours = model(TOKENS)
    torch.manual_seed(1)
    theirs = twin.train()(TOKENS)
    assert close(ours, theirs)
    ours.square().sum().backward(), theirs.square().sum().backward()
    for mine, other in names.items():
        assert close(trained(model)[mine].grad, named[f"base_model.model.{other}"].grad), mine
    with torch.no_grad():
        assert close(model.eval()(TOKENS), twin.eval()(TOKENS))
        merge_lora(model)
        for name, weight in twin.merge_and_unload().named_parameters():
            assert close(model.get_parameter(name if "words" in name else name.replace(".", ".base.")), weight), name


@pytest.mark.parametrize("seed", [0, 3])
def test_veras_pair_is_pefts_for_the_same_seed(seed):
    """To the bit: so that an adapter of either needs no pair in its file to be read by the other."""
    model = adapted("vera", dtype=torch.float32, moved=False, seed=seed)
    twin, _ = peft_twin(model, dict(kind="VeraConfig", r=3, projection_prng_key=seed), {})
    pair, = model.up.shared
    assert model.up.lora_d.tolist() == twin.base_model.up.vera_lambda_d["default"].tolist() and not model.up.lora_b.any()
    for name in ("A", "B"):
        assert torch.equal(getattr(pair, f"lora_{name}").double(), getattr(twin.base_model, f"vera_{name}")["default"])


def test_doras_magnitude_counts_in_bf16():
    """0.3 % longer rows: m / norm(V) itself would round to 1."""
    model = nn.Sequential(OrderedDict(only=nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)))
    layer = adapted("dora", "only", model=model, moved=False).only
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    before = layer(x).float()
    layer.lora_magnitude.data *= 1.003
    longer = ((layer(x).float() * before).sum() / before.square().sum() - 1).item()
    assert longer == pytest.approx(0.003, rel=0.2)


def test_delta_lora_by_hand():
    """One step of SGD at 0.1 on the sum of y: s 2, A (1, 2), x (1, 1), so dB is 6 in each row and dA is 0."""
    layer = alone("delta-lora", 2, 2, bias=False, r=1, alpha=2, moved=False, ratio=0.5, start=0)
    layer.lora_A.data = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    layer.lora_W.data = torch.eye(2, dtype=torch.float64)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    follow_optimizer(layer, optimizer), begin_step(layer, 1)
    layer(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.lora_B, torch.tensor([[-0.6], [-0.6]], dtype=torch.float64))
    assert torch.allclose(layer.lora_W, torch.tensor([[0.4, -1.2], [-0.6, -0.2]], dtype=torch.float64))


def test_dylora_by_hand():
    """r 2, alpha 4, x (1, 1): rank 1 is 4/1 (1, 2) 3; rank 2 adds the second pair, and halves the scale."""
    from lora.methods.dylora import set_rank
    model = nn.Sequential(OrderedDict(only=nn.Linear(2, 2, bias=False).double()))
    layer = adapted("dylora", "only", model=model, r=2, alpha=4, moved=False).only
    layer.base.weight.data.zero_()
    layer.lora_A.data = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=torch.float64)
    layer.lora_B.data = torch.tensor([[1.0, 7.0], [2.0, 7.0]], dtype=torch.float64)
    x = torch.ones(1, 2, dtype=torch.float64)
    assert layer(x).tolist() == [[2 * (3 + 210), 2 * (6 + 210)]]
    set_rank(model, 1)
    y = layer(x)
    assert y.tolist() == [[12, 24]] and layer.delta().tolist() == [[4, 8], [8, 16]]
    y.sum().backward()
    assert layer.lora_A.grad.tolist() == [[12, 12], [0, 0]] and layer.lora_B.grad.tolist() == [[12, 0], [12, 0]]


def test_lora_fa_by_hand():
    layer = alone("lora-fa", 2, 1, bias=False, r=1, alpha=2, moved=False)
    layer.lora_A.data = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    layer(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    assert layer.lora_B.grad.tolist() == [[6]] and layer.lora_A.grad is None


# Counts and bytes

def count(config, **sizes):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**sizes))
        add_lora(model, config)
    return sum(p.numel() for p in trained(model).values())


@pytest.mark.parametrize("method, r8, r16", [("lora", 4_194_304, 8_388_608), ("rslora", 4_194_304, 8_388_608),
                                             ("lora-fa", 2_097_152, 4_194_304), ("vera", 262_656, 263_168),
                                             ("delta-lora", 4_194_304, 8_388_608), ("dora", 4_456_448, 8_650_752),
                                             ("dylora", 4_194_304, 8_388_608)])
def test_counts_for_llama_2_7b(method, r8, r16):
    """64 layers of 4096 x 4096: 2 r d each for A and B, r d for B alone, r + d for VeRA, d more for DoRA's magnitude."""
    assert [count(LoRAConfig(method, r=r)) for r in (8, 16)] == [r8, r16]
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\| {method} \|.*\| {r16:,} \|", readme, re.M)


def test_veras_figures():
    """The paper's instruction tuning, all linear layers but the output: 7B 1.6M and 13B 2.4M at r 1024, LoRA at r 64 159.9M and
    250.3M; 1.4M at r 256 in its first version.  And layers x (d + r) for query and value of RoBERTa and GPT-3, table 1."""
    linear = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    large = dict(dim=5120, n_layers=40, n_heads=40)
    figures = [count(LoRAConfig(method, r=r, targets=linear), **sizes) for method, r, sizes in
               (("vera", 1024, {}), ("vera", 1024, large), ("lora", 64, {}), ("lora", 64, large), ("vera", 256, {}))]
    assert figures == [1_589_248, 2_416_640, 159_907_840, 250_347_520, 1_417_216]
    for d, n, figures in ((768, 12, {1: 18_456, 16: 18_816, 256: 24_576}), (1024, 24, {1: 49_200, 256: 61_440}),
                          (12288, 96, {1: 2_359_488, 16: 2_362_368})):
        for r, expected in figures.items():
            assert count(LoRAConfig("vera", r=r), dim=d, n_layers=n, n_heads=1, multiple_of=4, vocab_size=8) == expected


def test_lora_fa_keeps_the_projection_alone_for_backward():
    """Bytes that autograd keeps because of the adapter, parameters and their casts apart: at least 80 % less than LoRA's."""
    kept = {}
    for method in ("lora", "lora-fa"):
        for dtype in (torch.float32, torch.bfloat16):
            model = nn.Sequential(OrderedDict(only=nn.Linear(256, 256, bias=False, dtype=dtype)))
            add_lora(model, LoRAConfig(method, r=16, dropout=0, targets="only"))
            x = torch.randn(4, 32, 256, dtype=dtype, requires_grad=True)
            saved = {}

            def pack(tensor):
                saved[tensor.untyped_storage().data_ptr()] = tensor
                return tensor
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = model(x)
            sizes = [t.numel() * t.element_size() for t in saved.values() if t.numel() in (4 * 32 * 256, 4 * 32 * 16)]
            assert sum(t.numel() not in (256 * 256, 256 * 16) for t in saved.values()) == len(sizes)      # all else is weights
            kept[method, dtype] = sum(sizes)
            assert (x.untyped_storage().data_ptr() in saved) == (method == "lora")
            y.sum().backward()
    for dtype in (torch.float32, torch.bfloat16):
        assert kept["lora-fa", dtype] == 4 * 32 * 16 * dtype.itemsize                        # the projection, r wide
        assert kept["lora-fa", dtype] <= 0.2 * kept["lora", dtype]


def test_chunks_or_checkpointing_of_the_adapter_alone_save_next_to_nothing(monkeypatch, capsys):
    """Whatever is done inside the adapter's branch, its input x stays for backward; only recomputing the block drops it."""
    model, tokens = tiny(dim=256, n_layers=4, multiple_of=64), torch.arange(64).view(1, 64)
    add_lora(model, LoRAConfig(r=8, dropout=0, targets=("wq", "wk", "wv", "w1", "w3")))

    def branch(layer, x):
        return layer.scale * F.linear(F.linear(x, layer.lora_A), layer.lora_B)

    def chunked(layer, x):
        return layer.base(x) + torch.cat([branch(layer, part) for part in x.split(16, dim=1)], dim=1)

    def checkpointed(layer, x):
        return layer.base(x) + checkpoint(branch, layer, x, use_reentrant=False)
    _, plain = saved_bytes(model, lambda: model(tokens).sum())
    kept = {}
    for name, forward in (("in chunks", chunked), ("checkpointed alone", checkpointed)):
        with monkeypatch.context() as patch:
            patch.setattr(LoRALinear, "forward", forward)
            kept[name] = saved_bytes(model, lambda: model(tokens).sum())[1] / plain
    model.checkpointing = True
    kept["with its block"] = saved_bytes(model, lambda: model(tokens).sum())[1] / plain
    print(f"\nkept for backward, of what is kept otherwise: {', '.join(f'{name} {share:.1%}' for name, share in kept.items())}")
    assert kept["in chunks"] > 0.99 and kept["checkpointed alone"] > 0.97 and kept["with its block"] < 0.2


# What every method promises

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_its_base_to_the_bit_in_every_dtype(method, dtype):
    """With dropout on, too, and without autocast; what is trained is in fp32 at least, the output in the base's dtype."""
    plain = Small(dtype)
    model = adapted(method, "all", dtype, dropout=0.0 if method == "delta-lora" else 0.5, moved=False).train()
    y = model(TOKENS)
    assert y.dtype == dtype and torch.equal(y, plain(TOKENS))
    y.float().square().sum().backward()
    assert {p.dtype for p in trained(model).values()} == {torch.promote_types(dtype, torch.float32)}
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trained(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(TOKENS).dtype == (dtype if dtype == torch.float64 else torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_stays_close_to_fp32(method):
    exact, rounded = Small(torch.float32), Small(torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in rounded.state_dict().items()})
    for model in (exact, rounded):
        adapted(method, "all", model=model, moved=False)
    with torch.no_grad():
        for tensor in lora_state_dict(exact).values():
            tensor += 0.1 * torch.randn_like(tensor)
    rounded.load_state_dict(lora_state_dict(exact), strict=False)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert close(rounded(TOKENS).float(), exact(TOKENS), 0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged_and_what_is_undone_leaves_no_trace(method, dtype):
    plain, model = Small(dtype), adapted(method, "all", dtype)
    before = model(TOKENS)
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    kept = merge_lora(model)
    assert close(model(TOKENS), before, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype])
    assert kept == pytest.approx(1, abs=1e-3 if dtype == torch.bfloat16 else 1e-6)
    unmerge_lora(model)
    assert torch.equal(model(TOKENS), before)
    for name, weight in plain.named_parameters():
        name = name if name in dict(model.named_parameters()) else name.replace(".", ".base.")
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_stays_so(method):
    model = adapted(method, "all")
    before, names = copy.deepcopy(model.state_dict()), set(trained(model))
    mark_only_lora_as_trainable(model.requires_grad_(True))
    assert set(trained(model)) == names
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == names


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_gradient(method):
    """Backward computes each block again, with the same dropout and, for dylora, at the same rank."""
    grads = []
    for checkpointing in (False, True):
        model = adapted(method, ("wq", "w2"), model=tiny(n_kv_heads=2).double(), dropout=0.0 if method == "delta-lora" else 0.3).train()
        model.checkpointing = checkpointing
        begin_step(model, 1)
        torch.manual_seed(2)
        model(TOKENS).square().mean().backward()
        grads.append([p.grad for p in trained(model).values()])
    assert len(grads[0]) >= 4 and all(torch.equal(a, b) and a.any() for a, b in zip(*grads))


@pytest.mark.parametrize("method", METHODS)
def test_a_file_brings_it_back_with_its_hyper_parameters(method, tmp_path):
    options = {"vera": dict(seed=5), "dylora": dict(rank=2), "delta-lora": dict(start=7)}.get(method, {})
    model = adapted(method, "all", **options)
    save_adapter(model, tmp_path / "adapter.pt")
    for fresh in (Small(), adapted("lora"), adapted(method, "all")):
        load_adapter(fresh, tmp_path / "adapter.pt")
        assert torch.equal(fresh(TOKENS), model(TOKENS))
        assert fresh.lora_config == model.lora_config and fresh.lora_config.options.items() >= options.items()
    torch.testing.assert_close(read_adapter(tmp_path / "adapter.pt")["tensors"], lora_state_dict(model), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_train_and_generate(run, method, data, tmp_path, capsys):
    """The same command gives the same bytes, bf16 runs, the loss falls, and generate.py needs no flag to go on."""
    flags = ["--method", method, "--epochs", "6", "--accumulation-steps", "1", "--val-data", str(data)]
    rows, again = run("a", *flags), run("b", *flags)
    assert (tmp_path / "a/adapter.pt").read_bytes() == (tmp_path / "b/adapter.pt").read_bytes()
    assert [row["loss"] for row in rows] == [row["loss"] for row in again] and rows[-1]["val_loss"] < rows[2]["val_loss"]
    assert [list(row) for row in rows if "val_loss" not in row] == [
        ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "answer_tokens", "tokens_per_second", "peak_memory_mb",
         "loss_scale"] + ["rank"] * (method == "dylora")] * 12
    assert all(math.isfinite(row["loss"]) for row in run("bf16", *flags, "--precision", "bf16", "--max-steps", "2"))
    answers = []
    for more in ([], ["--merge"]):
        capsys.readouterr()
        generate.main(["--adapter", "a/adapter.pt", "--instruction", "Say blue please.", "--max-new-tokens", "4", *more])
        said = capsys.readouterr()
        assert f"adapter a/adapter.pt, {method} r 4 on wq,wv" in said.err
        answers.append(said.out)
    assert answers[0] == answers[1]


def test_the_seed_reaches_what_a_method_draws(run):
    rows = {seed: run(seed, "--method", "dylora", "--seed", seed, "--epochs", "4") for seed in ("1", "2")}
    assert [row["rank"] for row in rows["1"]] != [row["rank"] for row in rows["2"]]
    args = parse_options(["--method", "vera", "--seed", "3", "--method-options", "d_init=0.2"])
    assert args.method_options == {"seed": 3, "d_init": 0.2, "stored": False}
    assert parse_options(["--method", "vera", "--seed", "3", "--method-options", "seed=4"]).method_options["seed"] == 4


@pytest.mark.slow
def test_every_method_under_ddp(base, data, tmp_path, monkeypatch):
    """Two ranks x 2 examples give the losses of one process's 4 to 1e-6: no parameter unused, what moves moves alike on both."""
    monkeypatch.chdir(tmp_path)
    own = {"delta-lora": ["--method-options", "start=2"], "dylora": ["--method-options", "rank_by=loss"]}
    runs = {method: ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--lr", "1e-2", "--dropout", "0", "--epochs", "3",
                     "--accumulation-steps", "1", "--method", method, *own.get(method, [])] for method in METHODS}
    for method, flags in runs.items():
        train.main([*flags, "--batch-size", "4", "--out", f"{method}-1"])
    (tmp_path / "launch.py").write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import contextlib, train
from finetune.ranks import connect
from torch import distributed
ranks = connect()
train.connected_ranks = lambda: contextlib.nullcontext(ranks)                              # one job for all of them
for method, flags in {runs!r}.items():
    train.main([*flags, "--batch-size", "2", "--out", method + "-2"])
distributed.barrier()
sys.stdout.flush()
os._exit(0)
""")
    done = torchrun(tmp_path, "launch.py")
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        one, two = (metrics(tmp_path / f"{method}-{n}") for n in (1, 2))
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6), method
        assert [row.get("rank") for row in two] == [row.get("rank") for row in one] and len(one) == 9
        tensors = [read_adapter(tmp_path / f"{method}-{n}/adapter.pt")["tensors"] for n in (1, 2)]
        assert all(close(tensors[1][name], tensor, 1e-3) for name, tensor in tensors[0].items()), method


# What is one method's own

def steps(model, optimizer, numbers, loss=None):
    """Optimizer steps on a made-up loss, as train.py takes them; returns what the methods noted."""
    noted = []
    for step in numbers:
        noted.append(begin_step(model, step, loss and loss(step)))
        (model(TOKENS) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return noted


def test_delta_loras_weight_telescopes():
    """W = W0 + ratio s (B A - B_start A_start), whatever the optimizer and its decay did: an update of rank 2 r at most."""
    model = adapted("delta-lora", r=2, alpha=6, moved=False, ratio=0.7, start=3)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05, weight_decay=0.1, fused=True)
    follow_optimizer(model, optimizer)
    steps(model, optimizer, range(1, 4))
    held = {path: layer.product().detach() for path, layer in lora_layers(model).items()}
    for layer in lora_layers(model).values():
        assert torch.equal(layer.lora_W, layer.base.weight)                              # nothing moves before start
    steps(model, optimizer, range(4, 9))
    for path, layer in lora_layers(model).items():
        moved = layer.lora_W - layer.base.weight
        assert close(moved, 0.7 * (layer.product() - held[path]), 1e-12) and moved.norm() > 0.01
        assert torch.linalg.matrix_rank(layer.delta(), rtol=1e-10) == 4
        assert not layer.lora_W.requires_grad and layer.lora_W.grad is None


def test_delta_loras_weight_would_not_follow_in_bf16():
    """Thirty steps at a usual rate, added up in bf16 beside lora_W: more than half of the way is lost."""
    model = nn.Sequential(OrderedDict(only=nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)))
    nn.init.normal_(model.only.weight, std=0.02)
    layer = adapted("delta-lora", "only", model=model, r=16, alpha=32, moved=False, start=0).only
    optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-5)
    follow_optimizer(model, optimizer)
    low = layer.lora_W.bfloat16()
    for step in range(1, 31):
        before = layer.lora_W.clone()
        begin_step(model, step)
        model(torch.randn(64, 256).bfloat16()).float().square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
        low = (low.float() + layer.lora_W - before).bfloat16()
    assert layer.lora_W.dtype == torch.float32
    assert (low.float() - layer.lora_W).norm() > 0.5 * (layer.lora_W - layer.base.weight).norm()


def test_delta_loras_weight_moves_in_a_run_and_is_in_its_file(run, base, tmp_path):
    weights = torch.load(base / "consolidated.00.pth", weights_only=True)
    for start, moves in ((0, True), (1, True), (2, False)):
        run(str(start), "--method", "delta-lora", "--method-options", f"start={start}", "--max-steps", "2")
        tensors = read_adapter(tmp_path / f"{start}/adapter.pt")["tensors"]
        for name in ("layers.0.attention.wq", "layers.1.attention.wv"):
            assert torch.equal(tensors[f"{name}.lora_W"], weights[f"{name}.weight"]) != moves


def test_an_overflow_moves_nothing_after_the_optimizer_either():
    """A fused AdamW is called even for a step that GradScaler skips, and so are its hooks."""
    model = adapted("delta-lora", dtype=torch.float32, start=0)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1, fused=True)
    follow_optimizer(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    for share, moves in ((math.inf, False), (1, True)):
        begin_step(model, 1)
        scaler.scale(model(TOKENS).square().sum() * share).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        assert torch.equal(model.up.lora_W, before["up.lora_W"]) != moves
        assert torch.equal(model.up.lora_B, before["up.lora_B"]) != moves


def test_dyloras_rank_is_drawn_from_seed_and_step_alone():
    model = adapted("dylora", r=6, targets="all", seed=1, rank_min=2).train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    ranks = [noted["rank"] for noted in steps(model, optimizer, range(1, 501))]
    assert all(70 <= ranks.count(rank) <= 130 for rank in range(2, 7)) and set(ranks) == set(range(2, 7))
    torch.manual_seed(9)
    again = adapted("dylora", r=6, seed=1, rank_min=2)
    assert [begin_step(again, step)["rank"] for step in range(101, 501)] == ranks[100:]  # as a run that was resumed
    other = adapted("dylora", r=6, seed=2, rank_min=2)
    assert [begin_step(other, step)["rank"] for step in range(1, 501)] != ranks
    assert all(layer.rank == ranks[-1] for layer in lora_layers(model).values())         # one for all layers
    assert all(layer.rank == 6 for layer in lora_layers(model.eval()).values())          # held-out loss is at the whole


def test_any_smaller_rank_works_afterwards(tmp_path):
    """On a target of rank 6 each rank does better than the one below it, and any but the whole better than LoRA cut to it."""
    from lora.methods.dylora import set_rank
    torch.manual_seed(0)
    goal, x = torch.randn(8, 6) @ torch.randn(6, 8) / 8, torch.randn(64, 8)
    error = {}
    for method in ("lora", "dylora"):
        torch.manual_seed(1)
        model = nn.Sequential(OrderedDict(only=nn.Linear(8, 8, bias=False)))
        nn.init.zeros_(model.only.weight)
        add_lora(model, LoRAConfig(method, r=6, alpha=6, dropout=0, targets="only"))
        optimizer = torch.optim.AdamW(trained(model.train()).values(), lr=0.01, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 1000)
        for step in range(1, 1001):
            begin_step(model, step)
            (model(x) - x @ goal.T).square().mean().backward()
            optimizer.step(), optimizer.zero_grad(), schedule.step()
        model.eval()
        if method == "lora":
            save_adapter(model, tmp_path / "adapter.pt")
            content = torch.load(tmp_path / "adapter.pt", weights_only=True)
            content["config"] |= dict(method="dylora")
            with open(tmp_path / "adapter.pt", "wb") as file:
                torch.save(content, file)
            load_adapter(model, tmp_path / "adapter.pt")
        for rank in range(1, 7):
            set_rank(model, rank)
            error[method, rank] = (model(x) - x @ goal.T).square().mean().item()
    dylora = [error["dylora", rank] for rank in range(1, 7)]
    assert dylora == sorted(dylora, reverse=True)
    assert all(error["dylora", rank] < 0.6 * error["lora", rank] for rank in range(1, 6))


def test_a_chosen_rank_is_merged_saved_and_refused_out_of_range(tmp_path):
    from lora.methods.dylora import set_rank
    model = adapted("dylora", "all", r=3)
    set_rank(model, 2)
    save_adapter(model, tmp_path / "adapter.pt")
    fresh = Small()
    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and fresh.up.rank == 2 and fresh.up.lora_A.shape[0] == 3
    assert torch.linalg.matrix_rank(model.up.delta()) == 2
    set_rank(fresh, 3)
    assert not close(fresh(TOKENS), model(TOKENS), 1e-3) and model.up.rank == 2
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"rank is {rank}, must be 1 to 3"):
            set_rank(model, rank)
    merge_lora(model)
    with pytest.raises(ValueError, match="unmerge it first"):
        set_rank(model, 1)
    with pytest.raises(ValueError, match="no dylora adapter"):
        set_rank(adapted("lora"), 1)


def test_a_merge_in_the_midst_of_training_is_of_the_chosen_rank():
    """Not of the rank that the last step happened to draw."""
    from lora.methods.dylora import set_rank
    model = adapted("dylora", r=3).train()
    begin_step(model, 5)
    set_rank(model, 2)
    expected = model.eval()(TOKENS)
    model.train()
    begin_step(model, 6)
    merge_lora(model)
    assert close(model(TOKENS), expected, 1e-9)


def test_the_controller_by_hand():
    """From 4 down: the mean 10, then 9.9, then 9.89, which 9.95 is above; at the bound twice; nan says nothing."""
    from lora.methods.active_rank import RankByLoss
    control, path = RankByLoss(2, 4), []
    for step, loss in enumerate([None, 10, 9, 9.8, 9.95, 9, 9, 20, math.nan, 20, 20], 1):
        path.append(control.next_rank(step, loss))
        assert control.next_rank(step, loss) == path[-1]                                 # once a step, not once a layer
    assert path == [4, 4, 3, 2, 3, 2, 2, 3, 3, 4, 4]
    model = adapted("dylora", r=4, rank_by="loss", rank_min=2).train()
    noted = steps(model, torch.optim.SGD(trained(model).values(), lr=1e-3), range(1, 4), {1: None, 2: 10, 3: 9}.get)
    assert [n["rank"] for n in noted] == [4, 4, 3] and model.lora_config.options["rank"] == 3
    assert model.eval().up.rank == model.down.rank == 3


def test_the_controllers_path_is_in_the_log_and_its_end_in_the_file(run, tmp_path):
    from lora.methods.active_rank import RankByLoss
    rows = run("out", "--method", "dylora", "--method-options", "rank_by=loss,rank_min=2", "--epochs", "10", "--accumulation-steps", "1")
    control, loss = RankByLoss(2, 4), None
    for step, row in enumerate(rows, 1):
        assert row["rank"] == control.next_rank(step, loss)
        loss = row["loss"]
    assert len({row["rank"] for row in rows}) == 3
    assert read_adapter(tmp_path / "out/adapter.pt")["config"].options["rank"] == rows[-1]["rank"]


def test_veras_pair_is_one_for_all_layers_and_in_the_file_only_where_asked(tmp_path):
    for stored in (False, True):
        model = adapted("vera", stored=stored, seed=2)
        pair, = model.up.shared
        assert model.down.shared[0] is pair and pair.lora_A.shape == (3, 6) and pair.lora_B.shape == (9, 3)
        if stored:
            pair.lora_A.fill_(0.5)                                                       # no seed would give this
        save_adapter(model, tmp_path / "adapter.pt")
        names = {name.rpartition(".")[2] for name in read_adapter(tmp_path / "adapter.pt")["tensors"]}
        assert names == ({"lora_d", "lora_b", "lora_A", "lora_B"} if stored else {"lora_d", "lora_b"})
        fresh = Small()
        load_adapter(fresh, tmp_path / "adapter.pt")
        assert torch.equal(fresh(TOKENS), model(TOKENS))
        for moved in (copy.deepcopy(fresh), fresh.float()):
            assert moved.up.shared[0] is moved.down.shared[0] and moved.up.shared[0] is moved.up.pair
        assert fresh.up.pair.lora_A.dtype == torch.float32
    assert torch.equal(adapted("vera", seed=2, moved=False)(TOKENS), Small()(TOKENS))
    pairs = [adapted("vera", dtype=dtype, seed=seed).up.pair.lora_B for dtype, seed in ((torch.float64, 1), (torch.bfloat16, 1), (torch.float64, 2))]
    assert torch.equal(pairs[0].bfloat16(), pairs[1]) and not torch.equal(pairs[0], pairs[2])
    assert adapted("vera", r=20).up.lora_d.shape == (20,)                                # wider than the layer


def test_a_merged_vera_leaves_no_pair_in_a_checkpoint(tmp_path, base):
    from llama import load_checkpoint, save_checkpoint
    model, tokenizer = load_checkpoint(base)
    add_lora(model, LoRAConfig("vera", options=dict(stored=True)))
    merge_lora(model)
    save_checkpoint(model, tokenizer, tmp_path / "merged")
    load_checkpoint(tmp_path / "merged")


def test_lora_plus_sets_b_of_linear_layers_apart():
    from lora.methods.lora_plus import lora_plus_groups
    for method in ("lora", "rslora", "delta-lora", "dora", "dylora"):
        model = adapted(method, "all")
        slow, fast = lora_plus_groups(model, 0.01, 16)
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)] for p in fast["params"]} == {"up.lora_B", "down.lora_B"} and fast["lr"] == 0.16 and "lr" not in slow
        assert sorted(names[id(p)] for p in slow["params"] + fast["params"]) == sorted(trained(model))
        assert [len(group["params"]) for group in lora_plus_groups(model, 0.01, 1)] == [len(trained(model))]
    for model in (adapted("vera"), adapted("lora-fa"), adapted("lora", "words"), Small()):
        with pytest.raises(ValueError, match="LoRA\\+ needs a method that trains both lora_A and lora_B"):
            lora_plus_groups(model, 0.01, 16)


def test_lora_plus_in_a_run(run, tmp_path, capsys):
    """Adam's first step is lr in each number whatever the gradient: B's is the ratio times as long, the log has A's."""
    rows = run("out", "--lora-plus-ratio", "4", "--max-steps", "1", "--warmup-steps", "0", "--targets", "wq,tok_embeddings")
    tensors = read_adapter(tmp_path / "out/adapter.pt")["tensors"]
    assert rows[0]["lr"] == 0.01
    assert tensors["layers.0.attention.wq.lora_B"].abs().median() == pytest.approx(0.04, rel=1e-3)
    assert tensors["tok_embeddings.lora_A"].abs().max() == pytest.approx(0.01, rel=1e-3)
    for flags in (["--method", "vera"], ["--method", "lora-fa"], ["--method", "full"]):
        with pytest.raises(SystemExit, match="2"):
            run("refused", *flags, "--lora-plus-ratio", "4")
        assert "train.py: LoRA+ needs a method that trains both" in capsys.readouterr().err and not (tmp_path / "refused/args.json").exists()


# Errors, old files, and a family of which any one can leave

@pytest.mark.parametrize("method", sorted(METHODS.keys() - EMBEDS))
def test_a_layer_that_the_method_has_no_form_for(method):
    model = Small()
    with pytest.raises(ValueError, match=f"^{method} cannot adapt words, an nn.Embedding$"):
        add_lora(model, LoRAConfig(method, r=2, targets=("up", "words")))
    assert not lora_layers(model) and len(trained(model)) == 4
    assert add_lora(model, LoRAConfig(method, r=2, targets="all")) == ["up", "down"]


@pytest.mark.parametrize("method, wrong, message", [
    ("lora", dict(options=dict(seed=1)), "lora: unknown option 'seed'; the method's options: none"),
    ("vera", dict(options=dict(sead=1)), "vera: unknown option 'sead'; the method's options: seed, d_init, stored"),
    ("vera", dict(options=dict(seed=1.5)), "vera: seed is 1.5, must be a whole number"),
    ("vera", dict(options=dict(seed=True)), "vera: seed is True, must be a whole number"),
    ("vera", dict(options=dict(stored=1)), "vera: stored is 1, must be true or false"),
    ("vera", dict(options=dict(seed=-1)), "vera: seed is -1, must be from 0 to below 2^63"),
    ("vera", dict(options=dict(d_init=math.inf)), "vera: d_init is inf, must be finite and not 0"),
    ("vera", dict(options=dict(d_init=0.0)), "vera: d_init is 0.0, must be finite and not 0"),
    ("dylora", dict(options=dict(rank_by="mood")), "dylora: rank_by is 'mood', must be chance or loss"),
    ("dylora", dict(r=4, options=dict(rank_min=5)), "dylora: rank_min is 5, must be 1 to r, 4"),
    ("dylora", dict(r=4, options=dict(rank=5)), "dylora: rank is 5, must be 0 to r, 4"),
    ("delta-lora", dict(dropout=0.1), "delta-lora: dropout is 0.1, must be 0"),
    ("delta-lora", dict(options=dict(start=-1)), "delta-lora: start is -1, must be at least 0"),
    ("delta-lora", dict(options=dict(ratio=math.nan)), "delta-lora: ratio is nan, must be finite"),
    ("lora", dict(options=[]), "options are [], must be a dict"),
])
def test_settings_that_a_method_does_not_have(method, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRAConfig(method, **wrong)


@pytest.mark.parametrize("flags, message", [
    (["--method", "dylora", "--method-options", "rank_min"], "'rank_min' is not NAME=VALUE"),
    (["--method", "dylora", "--method-options", "rank=1,rank=2"], "rank is given twice"),
    (["--method", "dylora", "--method-options", "rank_min=x"], "dylora: rank_min is 'x', must be a whole number"),
    (["--method", "lora", "--method-options", "rank=1"], "lora: unknown option 'rank'; the method's options: none"),
    (["--method", "delta-lora", "--dropout", "0.1"], "delta-lora: dropout is 0.1, must be 0"),
    (["--method", "vera", "--targets", "tok_embeddings"], "vera cannot adapt tok_embeddings, an nn.Embedding"),
    (["--lora-plus-ratio", "0"], "must be above 0"),
])
def test_bad_settings_end_in_one_line(run, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        run("out", *flags)
    assert message in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_the_config_that_is_given_stays_as_it_is():
    """Two models from one config: the rank of one is not the other's."""
    from lora.methods.dylora import set_rank
    config = LoRAConfig("dylora", r=3, targets=("up",))
    one, other = Small(), Small()
    add_lora(one, config), add_lora(other, config)
    set_rank(one, 1)
    assert config.options["rank"] == 0 and other.up.rank == 3 and one.up.rank == 1


def test_files_from_before_there_were_options_load(tmp_path):
    model = adapted("lora")
    save_adapter(model, tmp_path / "adapter.pt")
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert content["config"].pop("options") == {}
    torch.save(content, tmp_path / "adapter.pt")
    fresh = Small()
    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and fresh.lora_config == model.lora_config


def test_layers_say_nothing_of_methods():
    """The shared page, the injector and train.py's loop name none; the registry has one import and one line each."""
    words = re.compile(r"rslora|lora.fa\b|vera\b|delta.lora|dora\b|dylora", re.I)
    for name in ("layers.py", "lora_layer.py", "adapter.py"):
        assert not words.search((ROOT / "lora" / name).read_text()), name
    assert not words.search(re.search(r"^def train.*?^def ", (ROOT / "train.py").read_text(), re.M | re.S)[0])


@pytest.mark.slow
@pytest.mark.parametrize("gone", [*(method for method in METHODS if method != "lora"), "lora-plus"])
def test_any_method_can_be_deleted(gone, tmp_path, base, data):
    """In a copy of the tree without its file and the lines that name it (LoRA+: those of train.py) all others run."""
    for room in ("lora", "llama", "finetune"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    program = tmp_path / "train.py"
    code = (ROOT / "train.py").read_text()
    name = gone.replace("-", "_")
    (tmp_path / f"lora/methods/{name}.py").unlink()
    if gone == "lora-plus":
        call = "groups = lora_plus_groups(model, options.lr, options.lora_plus_ratio)"
        assert call in code
        code = code.replace(call, 'groups = [{"params": trainable}]')
        code = re.sub(r".*lora_plus.*\n", "", code)
    else:
        registry = tmp_path / "lora/methods/__init__.py"
        lines = registry.read_text().splitlines(keepends=True)
        others = [line for line in lines if not re.search(rf"\b{name}\b", line)]
        assert len(others) == len(lines) - 2
        registry.write_text("".join(others))
    program.write_text(code)
    flags = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--max-steps", "2"]
    script = f"""
import train
from lora.methods import METHODS
assert {gone!r} not in METHODS
for method in METHODS:
    train.main([*{flags!r}, "--method", method, "--out", method])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/adapter.pt"))) == len(METHODS) - (gone != "lora-plus")