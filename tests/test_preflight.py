"""llama/preflight.py: what cannot learn is stopped before step 1, and the estimate is what a step then allocates."""
import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from llama import ModelArgs, Transformer
from finetune.batches import Batch
from finetune.dataset import IGNORE
from finetune.loss import answer_loss
from finetune.preflight import Size, check_gradients, estimate_memory, optimizer_state_bytes
from lora import LoRAConfig, add_lora, begin_step, follow_optimizer
from lora.adapter import METHODS, remove_lora
from lora.quantize import quantizer

from .helpers import EXAMPLES, ROOT, tiny
from .memory import LiveBytes, saved_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def built(precision, lora, checkpointing=False, device="cpu", **sizes):
    """(model, wrapped) as train.py holds them: frozen in the compute dtype, trained in fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(ModelArgs(**{**dict(dim=128, n_layers=3, n_heads=4, vocab_size=1280, multiple_of=32), **sizes}))
    model.checkpointing = checkpointing
    return model, add_lora(model.to(DTYPES[precision]), LoRAConfig(r=8, **lora)) if lora else []


def batch_of(B, T, answer):
    tokens = torch.arange(B * T).view(B, T) % 1280
    labels = tokens.clone()
    labels[:, :T - answer] = IGNORE
    return Batch(tokens, labels, B * answer)


def two_steps(model, batch, precision, lora, optimizer):
    """Two optimizer steps of two micro-batches each; bytes of the gradients."""
    device = batch.tokens.device.type
    for step in (1, 2):
        begin_step(model, step)
        for _ in range(2):
            with torch.autocast(device, DTYPES[precision], enabled=not lora and precision != "fp32"):
                loss = answer_loss(model, batch)[0]
            loss.backward()
            del loss
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad(set_to_none=True)
    return gradients


def precision_of(name, device="cpu"):
    return train.mixed_precision(name, torch.device(device), LoRAConfig())


def size_of(batch):
    return Size(batch.tokens.numel(), batch.n_answer, 0)


def estimated(precision, lora, checkpointing, batch, device="cpu", **sizes):
    sketch, wrapped = built(precision, lora, checkpointing, "meta", **sizes)
    return estimate_memory(sketch, wrapped, size_of(batch), precision_of(precision, device))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("lora", [dict(dropout=0), dict(dropout=0.1), dict(dropout=0, targets="all"), dict(dropout=0, targets="output"), None],
                         ids=["lora", "dropout", "all", "output", "full"])
@pytest.mark.parametrize("sizes, batch", [({}, (4, 64, 24)), (dict(n_layers=1, n_kv_heads=1), (4, 200, 20)),
                                          (dict(vocab_size=16000, n_layers=2), (1, 64, 8))], ids=["both", "block", "head"])
def test_the_estimate_is_what_two_steps_allocate(precision, checkpointing, lora, sizes, batch):
    batch = batch_of(*batch)
    kinds, _ = estimated(precision, lora, checkpointing, batch, **sizes)
    model, _ = built(precision, lora, checkpointing, **sizes)
    model.init_weights()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    with LiveBytes([list(model.parameters()), *batch[:2]]) as memory:
        gradients = two_steps(model, batch, precision, lora, optimizer)
    assert kinds["gradients"] == gradients + max(p.nbytes for p in trained)
    assert kinds["optimizer"] == sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim() > 0)
    if lora:
        assert kinds["weights"] == sum(p.nbytes for p in model.parameters())
    assert sum(kinds.values()) == pytest.approx(memory.peak, rel=0.12)


@pytest.mark.parametrize("dropout, checkpointing", [
    (0.1, False), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((0, False), (0, True), (0.1, True)))])
@pytest.mark.parametrize("method", METHODS)
def test_the_estimate_of_every_method(method, dropout, checkpointing):
    """What a method keeps beside LoRA's, its file says itself; over a quantised base too, where there can be one."""
    if method == "delta-lora" and dropout:
        pytest.skip("delta-lora can have no dropout")
    batch, every = batch_of(4, 64, 24), ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    for kind in ("none", "nf4") if method != "delta-lora" else ("none",):
        def built_so(device):
            model, _ = built("bf16", None, checkpointing, device)
            for path, layer in list(model.bfloat16().layers.named_modules()):
                if isinstance(layer, torch.nn.Linear) and kind != "none":
                    model.layers.set_submodule(path, quantizer(kind)(layer))
            return model, add_lora(model, LoRAConfig(method, r=8, dropout=dropout, targets=every))
        kinds, _ = estimate_memory(*built_so("meta"), size_of(batch), precision_of("bf16"))
        model, _ = built_so("cpu")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        follow_optimizer(model, optimizer)
        with LiveBytes([list(model.parameters()), list(model.buffers()), *batch[:2]]) as memory:
            two_steps(model, batch, "bf16", True, optimizer)
        assert sum(kinds.values()) == pytest.approx(memory.peak, rel=0.12), kind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("lora", [dict(dropout=0.05), dict(dropout=0, targets="all"), None], ids=["dropout", "all", "full"])
def test_the_estimate_is_what_cuda_allocates(checkpointing, lora):
    """Within 15 % of the allocator's peak, at sizes where its blocks of 512 bytes and workspaces do not count."""
    sizes, batch = dict(dim=1024, n_layers=8, n_heads=8, vocab_size=32000), batch_of(8, 512, 200)
    kinds, _ = estimated("bf16", lora, checkpointing, batch, "cuda", **sizes)
    model, _ = built("bf16", lora, checkpointing, "cuda", **sizes)
    model.init_weights()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    two_steps(model, batch._replace(tokens=batch.tokens.cuda(), labels=batch.labels.cuda()), "bf16", lora, optimizer)
    print(f"\nestimate {sum(kinds.values()) / 2 ** 20:,.0f} MiB, CUDA's peak {torch.cuda.max_memory_allocated() / 2 ** 20:,.0f} MiB")
    assert sum(kinds.values()) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


@pytest.mark.parametrize("precision", DTYPES)
def test_activations_are_what_autograd_keeps(precision):
    batch = batch_of(2, 48, 40)
    for lora in dict(dropout=0), dict(dropout=0, targets=("wo", "w1", "w2")):
        model, wrapped = built(precision, lora, n_layers=6)
        model.init_weights()
        kinds, where = estimate_memory(model, wrapped, size_of(batch), precision_of(precision))
        _, kept = saved_bytes(model, lambda: answer_loss(model, batch)[0])
        assert where == "at the logits"
        logits = batch.n_answer * 1280 * DTYPES[precision].itemsize
        assert kinds["activations"] + logits == pytest.approx(kept, rel=0.05)


def test_ranks_hold_their_gradients_twice():
    model, wrapped = built("fp32", dict(dropout=0))
    one, two = (estimate_memory(model, wrapped, Size(8, 4, 0), precision_of("fp32"), n)[0] for n in (1, 2))
    adapter = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert two["gradients"] - one["gradients"] == adapter and two["optimizer"] == one["optimizer"] == 2 * adapter


def test_llama_2_7b_by_arithmetic():
    """6.74 G weights in bf16 and 8.39 M adapter parameters in fp32 with a gradient and two moments each."""
    with torch.device("meta"):
        model = Transformer(ModelArgs()).bfloat16()
        wrapped = add_lora(model, LoRAConfig())
    kinds, _ = estimate_memory(model, wrapped, Size(512, 200, 0), precision_of("bf16", "cuda"))
    assert kinds["weights"] == 2 * 6_738_415_616 + 4 * 8_388_608
    assert kinds["gradients"] == 4 * (8_388_608 + 16 * 4096) and kinds["optimizer"] == 8 * 8_388_608
    dropped = 2 * (2 + 1) * 4096                                         # two targets; a copy in bf16 and a mask of a byte
    norms, attention, swiglu = 2 * 2 * 4096, 4 * 2 * 4096 + 4 * 32, 3 * 2 * 11008
    assert kinds["activations"] == 32 * 512 * (norms + attention + swiglu + dropped + 2 * 2 * 16) and kinds["logits"] == (2 * 2 * 200 + 12 * 128) * 32000


@pytest.fixture
def no_weights(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    next(base.glob("consolidated*")).unlink()
    return ["--checkpoint", str(base), "--data", str(data), "--dry-run"]


def test_a_dry_run_needs_no_weights_and_writes_nothing(no_weights, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    train.main([*no_weights, "--r", "4", "--batch-size", "3", "--accumulation-steps", "2", "--out", "not/yet"])
    said, error = capsys.readouterr()
    assert "12 examples, the longest has 123 tokens; every answer ends within --max-seq-len 512" in said
    assert " on wq,wv: 4 adapters, " in said and "checked   one backward pass: 4 adapters, each with a gradient" in said
    assert "3 examples x 2 micro-batches x 1 rank = 6 examples per step; 6 steps, 3 epochs" in said
    assert "MiB of tensors" in said and said.endswith("nothing was trained, nothing was written\n") and error == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags, says", [
    (["--layers", "3"], "has 2 layers, so layers must be 1 to 2, not 3"),
    (["--targets", "wq,wx"], "no layer named wx to adapt"),
    (["--r", "17"], "layers.0.attention.wv: r is 17, must be 1 to 16"),
    (["--max-seq-len", "100"], "no answer ends within 100 tokens, so eos is never a target"),
    (["--max-seq-len", "20"], "none of 12 examples has an answer token within 20 tokens")])
def test_a_dry_run_finds_what_a_run_would_stumble_over(no_weights, capsys, flags, says):
    if "100" in flags:                                                   # answers that are cut, none whole
        Path(no_weights[3]).write_text(json.dumps([{**EXAMPLES[0], "output": "blue " * 100}] * 2))
    with pytest.raises(SystemExit) as stopped:
        train.main([*no_weights, *flags])
    assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_what_is_printed_for_the_demo_is_what_its_step_takes(tmp_path, monkeypatch, capsys):
    """The printed total against every tensor that train.py has alive, data and optimizer and all."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "finetune/demo/train.json", "data.json")
    Path("held_out.json").write_text(json.dumps(json.loads(Path("data.json").read_text())[:40]))
    with LiveBytes() as memory:
        train.main(["--data", "data.json", "--val-data", "held_out.json", "--max-steps", "1", "--batch-size", "32", "--accumulation-steps", "2"])
    printed = float(capsys.readouterr().out.split("memory    about ")[1].split()[0].replace(",", ""))
    assert printed == pytest.approx(memory.peak / 2 ** 20, rel=0.1)


def test_the_estimate_counts_long_answers_that_stand_in_shorter_rows(no_weights, capsys):
    """The longest rows answer in a word, others at length: the head's part must not be taken from the former."""
    long, telling = dict(EXAMPLES[0], input="blue " * 60, output="no"), dict(EXAMPLES[0], output="blue " * 60)
    printed = []
    for examples in [long] * 4, [telling] * 4, [long, telling] * 4:
        Path(no_weights[3]).write_text(json.dumps(examples))
        train.main([*no_weights, "--checkpointing", "--batch-size", "1"])
        printed.append(float(capsys.readouterr().out.split("memory    about ")[1].split()[0]))
    assert printed[2] >= max(printed[:2]) > 1.1 * min(printed[:2])


def test_the_check_of_gradients_leaves_everything_as_it_was():
    model = tiny()
    wrapped = add_lora(model, LoRAConfig(r=2, dropout=0.5, targets="all"))
    model.train()
    held = {name: torch.full_like(p, 7) for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in held.items():
        model.get_parameter(name).grad = grad
    state, before = torch.get_rng_state(), {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = Batch(torch.arange(8).view(1, 8), torch.arange(8).view(1, 8), 7)
    check_gradients(model, wrapped, lambda: answer_loss(model, batch)[0])
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is held.get(name) and torch.equal(parameter, before[name])
        assert parameter.grad is None or (parameter.grad == 7).all()


def test_an_adapter_without_gradient_and_a_loss_that_is_no_number_are_stopped():
    model = tiny()
    wrapped = add_lora(model, LoRAConfig(r=2))
    tokens = torch.arange(8).view(1, 8)
    honest = model.layers[1].forward
    model.layers[1].forward = lambda h, *rest: honest(h.detach(), *rest)   # as a forgotten .detach() or no_grad would
    with pytest.raises(ValueError, match=r"no gradient reaches layers\.0\.attention\.wq, layers\.0\.attention\.wv$"):
        check_gradients(model, wrapped, lambda: model(tokens).sum())
    remove_lora(model)
    model.requires_grad_(True)                                           # --method full
    with pytest.raises(ValueError, match=r"no gradient reaches tok_embeddings\.weight, layers\.0\..* and others$"):
        check_gradients(model, [], lambda: model(tokens).sum())
    model.output.weight.data.zero_()
    model.layers[1].forward = honest
    with pytest.raises(ValueError, match="every gradient is zero before the first step"):
        check_gradients(model, [], lambda: (model(tokens) * 0).sum())
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the loss is nan before the first step"):
        check_gradients(model, [], lambda: model(tokens).sum())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("build, expected", [
    (lambda groups: torch.optim.AdamW(groups, fused=True), 8), (lambda groups: torch.optim.SGD(groups), 0),
    (lambda groups: torch.optim.SGD(groups, momentum=0.9), 4), (lambda groups: torch.optim.Adagrad(groups), 4)])
def test_the_memory_line_counts_the_optimizer_that_is_there(build, expected):
    assert optimizer_state_bytes(build) == expected
