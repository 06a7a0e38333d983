"""The LoRA family: each method against PEFT or a case by hand, and what all of them promise."""
import copy
import math
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import train
from finetune.options import parse_options
from llama import ModelArgs, Transformer
from lora import (LoRAConfig, LoRALinear, add_lora, begin_step, follow_optimizer, load_adapter,
                  lora_disabled, lora_state_dict, mark_only_lora_as_trainable, merge_lora,
                  read_adapter, save_adapter, unmerge_lora)
from lora.adapter import METHODS, lora_layers
from lora.methods.active_rank import RankByLoss
from lora.methods.dylora import set_rank
from lora.methods.lora_plus import lora_plus_groups

from .helpers import (ROOT, adapter_tensors, check_linear, close, column, copied_tree, python, tiny,
                      torchrun)
from .memory import saved_bytes

TOKENS = torch.tensor([[1, 5, 9, 7, 3], [1, 4, 4, 8, 2]])
EMBEDS = [method for method, kinds in METHODS.items() if nn.Embedding in kinds]
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
# What PEFT calls our tensors, after the layer's path.
PEFT_NAMES = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight",
              "lora_d": "vera_lambda_d.default", "lora_b": "vera_lambda_b.default",
              "lora_magnitude": "lora_magnitude_vector.default.weight"}


class Small(nn.Module):
    """An embedding, a square layer with a bias, and a wide one; two of them share VeRA's pair."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 9, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        return self.down(torch.tanh(self.up(self.words(tokens))))


def adapted(method, targets=("up", "down"), model=None, moved=True, **settings):
    """Return a small model whose adapter is, if `moved`, one in the midst of its training."""
    model = model or Small()
    settings = {"r": 3, "alpha": 6, "dropout": 0.0, "targets": targets} | settings
    add_lora(model, LoRAConfig(method, **settings))
    if moved:
        with torch.no_grad():
            for tensor in lora_state_dict(model).values():
                tensor += 0.3 * torch.randn_like(tensor)
    return model


def alone(method, d_in, d_out, bias=True, dtype=torch.float64, **settings):
    """Return one adapted linear layer."""
    model = nn.Sequential(OrderedDict(only=nn.Linear(d_in, d_out, bias=bias, dtype=dtype)))
    return adapted(method, "only", model=model, **settings).only


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- each method against an independent value


def weight_by_hand(method, layer):
    """Return the weight that the layer stands for, by the papers' equations, differentiable."""
    W = layer.base.weight
    if method == "vera":
        A = layer.shared[0].lora_A[:, :W.shape[1]]
        B = layer.shared[0].lora_B[:W.shape[0]]
        return W + torch.diag(layer.lora_b) @ B @ torch.diag(layer.lora_d) @ A
    s = layer.alpha / (layer.r ** 0.5 if method == "rslora" else layer.r)
    V = (layer.lora_W if method == "delta-lora" else W) + s * layer.lora_B @ layer.lora_A
    if method != "dora":
        return V
    return torch.diag(layer.lora_magnitude / V.detach().square().sum(1).sqrt()) @ V


@pytest.mark.parametrize("bias", [True, False])
@EVERY_METHOD
def test_forward_gradients_and_merged_weight_are_the_equations(method, bias):
    layer = alone(method, 7, 5, bias)
    weight = weight_by_hand(method, layer)
    check_linear(layer, weight, layer.base.bias, trained(layer).values())
    assert close(layer.base.weight + layer.delta(), weight, 1e-12)


def peft_twin(kind, tensors, **config):
    """Return (model, {name: parameter}) of PEFT on the same base, set to {PEFT's name: tensor}."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install -r tests/requirements.txt")
    config = getattr(peft, kind)(r=3, target_modules=["up", "down"], **config)
    twin = peft.get_peft_model(Small(), config).double()
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[f"base_model.model.{name}"].copy_(tensor)
    return twin, named


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("method", ["rslora", "dora", "vera"])
def test_it_is_what_peft_has(method, dropout):
    """Forward, gradients and merged weight to 1e-6 of the norm; the same elements are dropped."""
    model = adapted(method, dropout=dropout).train()
    tensors = {}
    for name, parameter in trained(model).items():
        path, _, kind = name.rpartition(".")
        tensors[f"{path}.{PEFT_NAMES[kind]}"] = parameter
    if method == "vera":
        twin, named = peft_twin("VeraConfig", tensors, vera_dropout=dropout)
    else:
        twin, named = peft_twin("LoraConfig", tensors, lora_alpha=6, lora_dropout=dropout,
                                use_rslora=method == "rslora", use_dora=method == "dora")
    outputs = []
    for each in (model, twin.train()):
        torch.manual_seed(1)
        outputs.append(each(TOKENS))
        outputs[-1].square().sum().backward()
    assert close(*outputs)
    for name, parameter in tensors.items():
        assert close(parameter.grad, named[f"base_model.model.{name}"].grad), name
    with torch.no_grad():
        assert close(model.eval()(TOKENS), twin.eval()(TOKENS))
        merge_lora(model)
        for name, weight in twin.merge_and_unload().named_parameters():
            name = name if "words" in name else name.replace(".", ".base.")
            assert close(model.get_parameter(name), weight), name


@pytest.mark.parametrize("seed", [0, 3])
def test_veras_pair_is_pefts_for_the_same_seed(seed):
    """To the bit, so that an adapter of either needs no pair in its file."""
    model = adapted("vera", model=Small(torch.float32), moved=False, options={"seed": seed})
    twin, _ = peft_twin("VeraConfig", {}, projection_prng_key=seed)
    pair, = model.up.shared
    assert model.up.lora_d.tolist() == twin.base_model.up.vera_lambda_d["default"].tolist()
    assert not model.up.lora_b.any()
    assert torch.equal(pair.lora_A.double(), twin.base_model.vera_A["default"])
    assert torch.equal(pair.lora_B.double(), twin.base_model.vera_B["default"])


def test_doras_magnitude_counts_in_bf16():
    """0.3 % longer rows: m / norm(V) itself would round to 1."""
    layer = alone("dora", 256, 256, bias=False, dtype=torch.bfloat16, moved=False)
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    before = layer(x).float()
    layer.lora_magnitude.data *= 1.003
    longer = ((layer(x).float() * before).sum() / before.square().sum() - 1).item()
    assert longer == pytest.approx(0.003, rel=0.2)


def test_delta_lora_by_hand():
    """SGD at 0.1 on the sum of y: s 2, A (1, 2), x (1, 1), so dB is 6 in each row and dA is 0."""
    layer = alone("delta-lora", 2, 2, bias=False, r=1, alpha=2, moved=False,
                  options={"ratio": 0.5, "start": 0})
    layer.lora_A.data = fp64([[1, 2]])
    layer.lora_W.data = torch.eye(2, dtype=torch.float64)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    follow_optimizer(layer, optimizer)
    begin_step(layer, 1)
    layer(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert torch.allclose(layer.lora_B, fp64([[-0.6], [-0.6]]))
    assert torch.allclose(layer.lora_W, fp64([[0.4, -1.2], [-0.6, -0.2]]))


def test_dylora_by_hand():
    """r 2, alpha 4, x (1, 1): rank 1 is 4/1 (1, 2) 3; rank 2 adds the second pair at half scale."""
    layer = alone("dylora", 2, 2, bias=False, r=2, alpha=4, moved=False)
    layer.base.weight.data.zero_()
    layer.lora_A.data = fp64([[1, 2], [10, 20]])
    layer.lora_B.data = fp64([[1, 7], [2, 7]])
    x = torch.ones(1, 2, dtype=torch.float64)
    assert layer(x).tolist() == [[2 * (3 + 210), 2 * (6 + 210)]]
    set_rank(nn.Sequential(layer), 1)
    y = layer(x)
    assert y.tolist() == [[12, 24]] and layer.delta().tolist() == [[4, 8], [8, 16]]
    y.sum().backward()
    assert layer.lora_A.grad.tolist() == [[12, 12], [0, 0]]
    assert layer.lora_B.grad.tolist() == [[12, 0], [12, 0]]


# --- counts and bytes


def count(method, r, targets=("wq", "wv"), **sizes):
    with torch.device("meta"):
        model = Transformer(ModelArgs(**sizes))
        add_lora(model, LoRAConfig(method, r=r, targets=targets))
    return sum(p.numel() for p in trained(model).values())


COUNTS = {"lora-fa": (2_097_152, 4_194_304), "vera": (262_656, 263_168),
          "dora": (4_456_448, 8_650_752)}


@EVERY_METHOD
def test_counts_for_llama_2_7b(method):
    """64 layers of 4096 x 4096: 2 r d for A and B, r d for B, r + d for VeRA, d for a magnitude."""
    r8, r16 = COUNTS.get(method, (4_194_304, 8_388_608))
    assert [count(method, 8), count(method, 16)] == [r8, r16]
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\| {method} \|.*\| {r16:,} \|", readme, re.M)


def test_veras_figures():
    """Of the paper's instruction tuning, and layers x (d + r) of RoBERTa and GPT-3 in table 1."""
    linear = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    sizes_13b = {"dim": 5120, "n_layers": 40, "n_heads": 40}
    assert count("vera", 1024, linear) == 1_589_248
    assert count("lora", 64, linear, **sizes_13b) == 250_347_520
    for d, n, r, expected in ((768, 12, 256, 24_576), (12288, 96, 16, 2_362_368)):
        sizes = {"dim": d, "n_layers": n, "n_heads": 1, "multiple_of": 4, "vocab_size": 8}
        assert count("vera", r, **sizes) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_fa_keeps_the_projection_alone_for_backward(dtype):
    """Bytes kept because of the adapter, its weights apart: at least 80 % fewer than LoRA's."""
    kept = {}
    x = torch.randn(128, 256, dtype=dtype, requires_grad=True)
    for method in ("lora", "lora-fa"):
        layer = alone(method, 256, 256, bias=False, dtype=dtype, r=16)
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        # All else is weights, of 256 or 16 rows.
        kept[method] = [t.nbytes for t in saved.values() if t.shape[0] not in (256, 16)]
        assert (x.data_ptr() in saved) == (method == "lora")
    assert kept["lora-fa"] == [128 * 16 * dtype.itemsize]        # the projection, r wide
    assert sum(kept["lora-fa"]) <= 0.2 * sum(kept["lora"])


def test_chunks_or_checkpointing_of_the_adapter_alone_save_next_to_nothing(monkeypatch):
    """The branch's input stays for backward; only recomputing the whole block drops it."""
    model = tiny(dim=256, n_layers=4, multiple_of=64)
    tokens = torch.arange(64).view(1, 64)
    add_lora(model, LoRAConfig(r=8, dropout=0, targets=("wq", "wk", "wv", "w1", "w3")))

    def branch(layer, x):
        return layer.scale * F.linear(F.linear(x, layer.lora_A), layer.lora_B)

    def chunked(layer, x):
        return layer.base(x) + torch.cat([branch(layer, part) for part in x.split(16, dim=1)], 1)

    def checkpointed(layer, x):
        return layer.base(x) + checkpoint(branch, layer, x, use_reentrant=False)

    def kept():
        return saved_bytes(model, lambda: model(tokens).sum())[1]

    plain = kept()
    for way, forward, least in (("in chunks", chunked, 0.99), ("checkpointed", checkpointed, 0.97)):
        with monkeypatch.context() as patch:
            patch.setattr(LoRALinear, "forward", forward)
            share = kept() / plain
        print(f"\n{way}: {share:.1%} is kept for backward")
        assert share > least
    model.checkpointing = True
    print(f"\ncheckpointed with its block: {kept() / plain:.1%}")
    assert kept() / plain < 0.2


# --- what every method promises


def with_dropout(method, dropout):
    return 0.0 if method == "delta-lora" else dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@EVERY_METHOD
def test_it_starts_as_its_base_to_the_bit_in_every_dtype(method, dtype):
    """With dropout, and without autocast; what is trained is in fp32 at least."""
    plain = Small(dtype)
    dropout = with_dropout(method, 0.5)
    model = adapted(method, "all", Small(dtype), moved=False, dropout=dropout).train()
    y = model(TOKENS)
    assert y.dtype == dtype and torch.equal(y, plain(TOKENS))
    y.float().square().sum().backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert all(p.dtype == p.grad.dtype == wide for p in trained(model).values())
    assert method != "delta-lora" or model.up.lora_W.dtype == wide
    with torch.autocast("cpu", torch.bfloat16):
        expected = dtype if dtype == torch.float64 else torch.bfloat16
        assert model(TOKENS).dtype == expected


@EVERY_METHOD
def test_bf16_stays_close_to_fp32(method):
    rounded = Small(torch.bfloat16)
    exact = copy.deepcopy(rounded).float()
    for model in (exact, rounded):
        adapted(method, "all", model, moved=False)
    with torch.no_grad():
        for tensor in lora_state_dict(exact).values():
            tensor += 0.1 * torch.randn_like(tensor)
    rounded.load_state_dict(lora_state_dict(exact), strict=False)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert close(rounded(TOKENS).float(), exact(TOKENS), 0.02)


@pytest.mark.parametrize("dtype, off, lost", [
    (torch.float64, 1e-12, 1e-6),
    (torch.float32, 1e-5, 1e-6),
    (torch.bfloat16, 0.02, 1e-3),
])
@EVERY_METHOD
def test_merged_equals_unmerged_and_what_is_undone_leaves_no_trace(method, dtype, off, lost):
    plain = Small(dtype)
    model = adapted(method, "all", Small(dtype))
    before = model(TOKENS)
    with lora_disabled(model):
        assert torch.equal(model(TOKENS), plain(TOKENS))
    kept = merge_lora(model)
    assert close(model(TOKENS), before, off)
    assert kept == pytest.approx(1, abs=lost)
    unmerge_lora(model)
    assert torch.equal(model(TOKENS), before)
    for name, weight in plain.named_parameters():
        if name not in dict(model.named_parameters()):
            name = name.replace(".", ".base.")
        assert torch.equal(model.get_parameter(name), weight), name


@EVERY_METHOD
def test_what_is_frozen_stays_so(method):
    model = adapted(method, "all")
    before = copy.deepcopy(model.state_dict())
    names = set(trained(model))
    mark_only_lora_as_trainable(model.requires_grad_(True))
    assert set(trained(model)) == names
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == names
    assert all(p.grad is None for name, p in model.named_parameters() if name not in names)


@EVERY_METHOD
def test_checkpointing_changes_no_gradient(method):
    """Backward computes each block again, with the same dropout and at the same rank."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny().double().train()
        adapted(method, ("wq", "w2"), model, dropout=with_dropout(method, 0.3))
        model.checkpointing = checkpointing
        begin_step(model, 1)
        torch.manual_seed(2)
        model(TOKENS).square().mean().backward()
        gradients.append([p.grad for p in trained(model).values()])
    assert len(gradients[0]) >= 4
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other) and one.any()


@EVERY_METHOD
def test_a_file_brings_it_back_with_its_hyper_parameters(method, tmp_path):
    path = tmp_path / "adapter.pt"
    given = {"vera": {"seed": 5}, "dylora": {"rank": 2}, "delta-lora": {"start": 7}}
    model = adapted(method, "all", options=given.get(method, {}))
    save_adapter(model, path)
    for fresh in (Small(), adapted("lora"), adapted(method, "all")):
        load_adapter(fresh, path)
        assert torch.equal(fresh(TOKENS), model(TOKENS))
        assert fresh.lora_config == model.lora_config
        assert fresh.lora_config.options.items() >= given.get(method, {}).items()
    tensors = read_adapter(path)["tensors"]
    torch.testing.assert_close(tensors, lora_state_dict(model), rtol=0, atol=0)


@EVERY_METHOD
def test_train_and_generate(run, method, data, tmp_path, answered):
    """The same command gives the same bytes, and generate.py needs no flag to go on."""
    flags = ["--method", method, "--epochs", "3", "--accumulation-steps", "1"]
    rows = run("a", *flags, "--val-data", str(data))
    held_out = column(tmp_path / "a", "val_loss")
    assert held_out[-1] < held_out[0]
    assert ("rank" in rows[0]) == (method == "dylora")
    run("b", *flags)
    adapters = [(tmp_path / out / "adapter.pt").read_bytes() for out in ("a", "b")]
    assert adapters[0] == adapters[1]
    answer, error = answered("--adapter", "a/adapter.pt")
    assert f"adapter a/adapter.pt, {method} r 4 on wq,wv" in error
    assert answered("--adapter", "a/adapter.pt", "--merge").out == answer


def test_the_seed_reaches_what_a_method_draws():
    flags = ["--method", "vera", "--seed", "3", "--method-options"]
    options = parse_options([*flags, "d_init=0.2"]).method_options
    assert options == {"seed": 3, "d_init": 0.2, "stored": False}
    assert parse_options([*flags, "seed=4"]).method_options["seed"] == 4


@pytest.mark.slow
def test_every_method_under_ddp(base, data, tmp_path, monkeypatch):
    """Two ranks x 2 examples give the losses and adapters of one process's 4."""
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--lr", "1e-2",
              "--dropout", "0", "--epochs", "3", "--accumulation-steps", "1", "--method"]
    runs = {method: [*common, method] for method in METHODS}
    runs["delta-lora"] += ["--method-options", "start=2"]
    runs["dylora"] += ["--method-options", "rank_by=loss"]
    for method, flags in runs.items():
        train.main([*flags, "--batch-size", "4", "--out", f"{method}-1"])
    (tmp_path / "launch.py").write_text(f"""import contextlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from finetune.ranks import connect
from torch import distributed
ranks = connect()
train.connected_ranks = lambda: contextlib.nullcontext(ranks)    # one job for all of them
for method, flags in {runs!r}.items():
    train.main([*flags, "--batch-size", "2", "--out", method + "-2"])
distributed.barrier()
sys.stdout.flush()
os._exit(0)
""")
    done = torchrun(tmp_path, "launch.py")
    assert done.returncode == 0, done.stderr
    for method in METHODS:
        one, two = (tmp_path / f"{method}-{n}" for n in (1, 2))
        losses = column(one, "loss")
        assert column(two, "loss") == pytest.approx(losses, rel=1e-6) and len(losses) == 9, method
        assert column(two, "rank") == column(one, "rank")
        tensors = [read_adapter(f"{method}-{n}/adapter.pt")["tensors"] for n in (1, 2)]
        for name, tensor in tensors[0].items():
            assert close(tensors[1][name], tensor, 1e-3), (method, name)


# --- Delta-LoRA


def steps(model, optimizer, numbers, loss=None):
    """Take steps on a made-up loss as train.py takes them; return what the methods noted."""
    noted = []
    for step in numbers:
        noted.append(begin_step(model, step, loss and loss(step)))
        (model(TOKENS) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return noted


def test_delta_loras_weight_telescopes():
    """W = W0 + ratio s (B A - B_start A_start), whatever the optimizer did: rank 2 r at most."""
    model = adapted("delta-lora", r=2, moved=False, options={"ratio": 0.7, "start": 3})
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05, weight_decay=0.1, fused=True)
    follow_optimizer(model, optimizer)
    steps(model, optimizer, range(1, 4))
    layers = lora_layers(model)
    products = {path: layer.product().detach() for path, layer in layers.items()}
    for layer in layers.values():
        assert torch.equal(layer.lora_W, layer.base.weight)      # Nothing moves before start.
    steps(model, optimizer, range(4, 9))
    for path, layer in layers.items():
        moved = layer.lora_W - layer.base.weight
        assert close(moved, 0.7 * (layer.product() - products[path]), 1e-12)
        assert moved.norm() > 0.01
        assert torch.linalg.matrix_rank(layer.delta(), rtol=1e-10) == 4
        assert not layer.lora_W.requires_grad and layer.lora_W.grad is None


def test_an_overflow_moves_nothing_after_the_optimizer_either():
    """A fused AdamW is called even for a step that GradScaler skips, and so are its hooks."""
    model = adapted("delta-lora", model=Small(torch.float32), options={"start": 0})
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1, fused=True)
    follow_optimizer(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    for share, moves in ((math.inf, False), (1, True)):
        begin_step(model, 1)
        scaler.scale(model(TOKENS).square().sum() * share).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for tensor, name in ((model.up.lora_W, "up.lora_W"), (model.up.lora_B, "up.lora_B")):
            assert torch.equal(tensor, before[name]) != moves


# --- DyLoRA


def test_dyloras_rank_is_drawn_from_seed_and_step_alone():
    model = adapted("dylora", "all", r=6, options={"seed": 1, "rank_min": 2}).train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    ranks = [noted["rank"] for noted in steps(model, optimizer, range(1, 501))]
    assert set(ranks) == set(range(2, 7))
    assert all(70 <= ranks.count(rank) <= 130 for rank in range(2, 7))
    torch.manual_seed(9)
    for seed in (1, 2):
        resumed = adapted("dylora", r=6, options={"seed": seed, "rank_min": 2})
        same = [begin_step(resumed, step)["rank"] for step in range(101, 501)] == ranks[100:]
        assert same == (seed == 1)
    assert all(layer.rank == ranks[-1] for layer in lora_layers(model).values())
    # Held-out loss is at the whole rank.
    assert all(layer.rank == 6 for layer in lora_layers(model.eval()).values())


def test_any_smaller_rank_works_afterwards(tmp_path):
    """On a target of rank 6 each rank beats the one below it, and LoRA cut to it."""
    torch.manual_seed(0)
    target = torch.randn(8, 6) @ torch.randn(6, 8) / 8
    x = torch.randn(64, 8)
    errors = {"lora": [], "dylora": []}
    for method in errors:
        torch.manual_seed(1)
        model = nn.Sequential(OrderedDict(only=nn.Linear(8, 8, bias=False)))
        nn.init.zeros_(model.only.weight)
        adapted(method, "only", model, r=6, moved=False)
        optimizer = torch.optim.AdamW(trained(model.train()).values(), lr=0.01, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 600)
        for step in range(1, 601):
            begin_step(model, step)
            (model(x) - x @ target.T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        if method == "lora":                         # In dylora's layers its rank can be cut.
            rewrite_adapter(model, tmp_path / "adapter.pt", "method", "dylora")
            load_adapter(model, tmp_path / "adapter.pt")
        for rank in range(1, 7):
            set_rank(model, rank)
            errors[method].append((model(x) - x @ target.T).square().mean().item())
    assert errors["dylora"] == sorted(errors["dylora"], reverse=True)
    assert all(errors["dylora"][i] < 0.6 * errors["lora"][i] for i in range(5))


def rewrite_adapter(model, path, key, value):
    """Save the model's adapter with another setting, or without it for None."""
    save_adapter(model, path)
    content = torch.load(path, weights_only=True)
    content["config"] |= {key: value}
    if value is None:
        del content["config"][key]
    torch.save(content, path)


def test_a_chosen_rank_is_merged_saved_and_refused_out_of_range(tmp_path):
    config = LoRAConfig("dylora", r=3, alpha=6, dropout=0.0, targets="all")
    model, other, fresh = (Small() for _ in range(3))
    add_lora(model, config)
    add_lora(other, config)
    nn.init.normal_(model.up.lora_B)
    set_rank(model, 2)
    # The rank of one model is not that of another of the same config.
    assert config.options["rank"] == 0 and other.up.rank == 3
    save_adapter(model, tmp_path / "adapter.pt")
    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    assert fresh.up.rank == 2 and fresh.up.lora_A.shape[0] == 3
    assert torch.linalg.matrix_rank(model.up.delta()) == 2
    with pytest.raises(ValueError, match="rank is 4, must be 1 to 3"):
        set_rank(model, 4)
    expected = model(TOKENS)
    begin_step(model.train(), 6)                     # which draws a rank of its own
    merge_lora(model)
    assert close(model(TOKENS), expected, 1e-9)
    with pytest.raises(ValueError, match="unmerge it first"):
        set_rank(model, 1)


def test_the_controller_by_hand():
    """From 4 down: the mean 10, then 9.9, then 9.89, which 9.95 is above; nan says nothing."""
    control = RankByLoss(2, 4)
    path = []
    for step, loss in enumerate([None, 10, 9, 9.8, 9.95, 9, 9, 20, math.nan, 20, 20], 1):
        path.append(control.next_rank(step, loss))
        assert control.next_rank(step, loss) == path[-1]         # once a step, not once a layer
    assert path == [4, 4, 3, 2, 3, 2, 2, 3, 3, 4, 4]
    model = adapted("dylora", r=4, options={"rank_by": "loss", "rank_min": 2}).train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    noted = steps(model, optimizer, range(1, 4), {1: None, 2: 10, 3: 9}.get)
    assert [each["rank"] for each in noted] == [4, 4, 3]
    assert model.lora_config.options["rank"] == 3
    assert model.eval().up.rank == model.down.rank == 3


# --- VeRA and LoRA+


@pytest.mark.parametrize("is_stored", [False, True])
def test_veras_pair_is_one_for_all_layers_and_in_the_file_only_where_asked(tmp_path, is_stored):
    model = adapted("vera", options={"stored": is_stored, "seed": 2})
    pair, = model.up.shared
    assert model.down.shared[0] is pair
    assert pair.lora_A.shape == (3, 6) and pair.lora_B.shape == (9, 3)
    if is_stored:
        pair.lora_A.fill_(0.5)                       # No seed would give this.
    save_adapter(model, tmp_path / "adapter.pt")
    tensors = read_adapter(tmp_path / "adapter.pt")["tensors"]
    kinds = {name.rpartition(".")[2] for name in tensors}
    assert kinds == {"lora_d", "lora_b"} | ({"lora_A", "lora_B"} if is_stored else set())
    fresh = Small()
    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    for moved in (copy.deepcopy(fresh), fresh.float()):
        assert moved.up.shared[0] is moved.down.shared[0] is moved.up.pair
    assert fresh.up.pair.lora_A.dtype == torch.float32


def test_veras_pair_is_of_its_seed_in_any_dtype():
    one, narrow, other = (
        adapted("vera", model=Small(dtype), options={"seed": seed}).up.pair.lora_B
        for dtype, seed in ((torch.float64, 1), (torch.bfloat16, 1), (torch.float64, 2)))
    assert torch.equal(one.bfloat16(), narrow) and not torch.equal(one, other)
    assert adapted("vera", r=20).up.lora_d.shape == (20,)        # wider than the layer


def test_lora_plus_sets_b_of_linear_layers_apart():
    for method in ("lora", "rslora", "delta-lora", "dora", "dylora"):
        model = adapted(method, "all")
        names = {id(p): name for name, p in model.named_parameters()}
        slow, fast = lora_plus_groups(model, 0.01, 16)
        assert {names[id(p)] for p in fast["params"]} == {"up.lora_B", "down.lora_B"}
        assert fast["lr"] == 0.16 and "lr" not in slow
        both = [names[id(p)] for p in slow["params"] + fast["params"]]
        assert sorted(both) == sorted(trained(model))
        whole, = lora_plus_groups(model, 0.01, 1)
        assert len(whole["params"]) == len(trained(model))
    for model in (adapted("vera"), adapted("lora-fa"), adapted("lora", "words"), Small()):
        with pytest.raises(ValueError, match="LoRA\\+ needs a method that trains both"):
            lora_plus_groups(model, 0.01, 16)


def test_lora_plus_in_a_run(run, tmp_path):
    """Adam's first step is lr in each number: B's is the ratio times as long, the log has A's."""
    rows = run("out", "--lora-plus-ratio", "4", "--max-steps", "1", "--warmup-steps", "0",
               "--targets", "wq,tok_embeddings")
    tensors = adapter_tensors(tmp_path / "out")
    assert rows[0]["lr"] == 0.01
    lengths = tensors["layers.0.attention.wq.lora_B"].abs().median()
    assert lengths == pytest.approx(0.04, rel=1e-3)
    assert tensors["tok_embeddings.lora_A"].abs().max() == pytest.approx(0.01, rel=1e-3)


# --- errors, old files, and a family of which any one can leave


@pytest.mark.parametrize("method", sorted(METHODS.keys() - EMBEDS))
def test_a_layer_that_the_method_has_no_form_for(method):
    model = Small()
    with pytest.raises(ValueError, match=f"^{method} cannot adapt words, an nn.Embedding$"):
        add_lora(model, LoRAConfig(method, r=2, targets=("up", "words")))
    assert not lora_layers(model) and len(trained(model)) == 4
    assert add_lora(model, LoRAConfig(method, r=2, targets="all")) == ["up", "down"]


@pytest.mark.parametrize("method, settings, message", [
    ("lora-fa", {"options": {"seed": 1}}, "unknown option 'seed'; options of LoRAFALinear: none"),
    ("vera", {"options": {"sead": 1}},
     "unknown option 'sead'; options of VeRALinear: seed, d_init"),
    ("vera", {"options": {"seed": 1.5}}, "seed is 1.5, must be a whole number"),
    ("vera", {"options": {"d_init": 0.0}}, "d_init is 0.0, must be finite and not 0"),
    ("dylora", {"options": {"rank_by": "mood"}}, "rank_by is 'mood', must be chance or loss"),
    ("dylora", {"r": 4, "options": {"rank_min": 5}}, "rank_min is 5, must be 1 to r, 4"),
    ("delta-lora", {"dropout": 0.1}, "dropout is 0.1, must be 0"),
])
def test_settings_that_a_method_does_not_have(method, settings, message):
    with pytest.raises(ValueError, match=re.escape(f"{method}: {message}")):
        LoRAConfig(method, **settings)


def test_files_from_before_there_were_options_load(tmp_path):
    model = adapted("lora")
    rewrite_adapter(model, tmp_path / "adapter.pt", "options", None)
    fresh = Small()
    load_adapter(fresh, tmp_path / "adapter.pt")
    assert torch.equal(fresh(TOKENS), model(TOKENS)) and fresh.lora_config == model.lora_config


def test_layers_say_nothing_of_methods():
    """The shared pages and train.py's loop name none."""
    words = re.compile(r"rslora|lora.fa\b|vera\b|delta.lora|dora\b|dylora", re.I)
    for name in ("layers.py", "lora_layer.py", "adapter.py", "files.py"):
        assert not words.search((ROOT / "lora" / name).read_text()), name
    loop = re.search(r"^def train.*?^def ", (ROOT / "train.py").read_text(), re.M | re.S)
    assert not words.search(loop[0])


@pytest.mark.slow
def test_dylora_is_compiled_once_for_all_ranks():
    """Ten ranks take no more graphs than the first few do."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted("dylora", ("wq", "wv"), tiny(n_layers=1).train(), r=16)
    model.layers[0].compile(dynamic=True)
    graphs = []
    for rank in (3, 12, 7, 5, 14, 4, 9, 10, 6, 11):
        for layer in lora_layers(model).values():
            layer.step_rank = rank
        model(torch.arange(8)[None]).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] and graphs[1] == graphs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("gone", [*(method for method in METHODS if method != "lora"), "lora-plus"])
def test_any_method_can_be_deleted(gone, tmp_path, base, data):
    """In a copy of the tree without its file and the lines that name it, all others run."""
    copied_tree(tmp_path)
    name = gone.replace("-", "_")
    (tmp_path / f"lora/methods/{name}.py").unlink()
    if gone == "lora-plus":
        call = "groups = lora_plus_groups(model, options.lr, options.lora_plus_ratio)"
        assert call in (tmp_path / "train.py").read_text()
        for page in (tmp_path / "train.py", tmp_path / "finetune/job.py"):
            code = page.read_text().replace(call, 'groups = [{"params": trainable}]')
            page.write_text(re.sub(r".*lora_plus.*\n", "", code))
    else:
        page = tmp_path / "lora/methods/__init__.py"
        code, n_lines = re.subn(rf".*\b{name}\b.*\n", "", page.read_text())
        assert n_lines == 2                          # one import, one entry
        page.write_text(code)
    flags = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--max-steps", "2"]
    script = f"""
import train
from lora.methods import METHODS
assert {gone!r} not in METHODS
for method in METHODS:
    train.main([*{flags!r}, "--method", method, "--out", method])
"""
    done = python(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/adapter.pt")} == METHODS.keys() - {gone}
