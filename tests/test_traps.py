"""The ways in which fine-tuning code goes silently wrong, each as a short test: what it is, where it bit others, and,
where that is short, the wrong way failing beside ours.  docs/traps.md's table is made of these docstrings;
tests/test_mutations.py puts each trap back into our code and sees its test fail (pytest -m slow)."""
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import generate
import train
from llama import load_checkpoint, save_checkpoint
from finetune.batches import Batch, DataCollatorForSupervisedDataset
from finetune.dataset import count_answer, encode_example, encode_prompt, IGNORE, SupervisedDataset, truncate
from finetune.templates.alpaca import format_prompt
from finetune.distill import Distillation
from finetune.evaluate import Exam, measures
from finetune.loss import answer_loss
from finetune.options import parse_options
from finetune.ranks import SINGLE_PROCESS
from llama.sampling import stream
from lora import (LoRAConfig, LoRALinear, add_lora, load_adapter, lora_state_dict, merge_lora, save_adapter, unmerge_lora)

from .helpers import EXAMPLES, ROOT, adapter_tensors, epoch_windows, given_once, metrics, tiny, torchrun
from .memory import saved_bytes

FLAGS = ["--r", "4", "--lr", "1e-2", "--dropout", "0", "--batch-size", "2", "--accumulation-steps", "4", "--epochs", "2", "--clip-grad-norm", "0"]


def adapted(targets=("wq", "wv"), size=0.1, dropout=0.0, **sizes):
    """A tiny model with an adapter that does something."""
    model = tiny(**sizes)
    add_lora(model, LoRAConfig(r=2, alpha=8, dropout=dropout, targets=targets))
    for tensor in lora_state_dict(model).values():
        nn.init.normal_(tensor, std=size)
    return model


@pytest.fixture
def run(base, data, tmp_path, monkeypatch):
    """run(*flags) -> rows of metrics.jsonl: 12 examples in windows of 8 and 4, two epochs, unless told otherwise."""
    monkeypatch.chdir(tmp_path)
    names = iter(range(9))

    def run(*flags):
        out = tmp_path / f"run{next(names)}"
        base_and_data = ["--checkpoint", str(base), "--data", str(data)]
        train.main(given_once([*base_and_data, *FLAGS, *flags, "--out", str(out)]))
        return metrics(out)
    return run


@pytest.fixture
def first_gradient(base, tokenizer):
    """first_gradient(weigh) -> norm of the first step's gradient, weigh(sums, counts) making one loss of its micro-batches'."""
    def first_gradient(weigh, window=0):
        torch.manual_seed(0)
        model, _ = load_checkpoint(base, max_seq_len=512)
        add_lora(model, LoRAConfig(r=4, dropout=0))
        steps = list(epoch_windows(SupervisedDataset(EXAMPLES, tokenizer), DataCollatorForSupervisedDataset(2), 2, 4, 0, 0))
        sums, counts = zip(*(answer_loss(model, batch) for batch in steps[window].batches))
        weigh(torch.stack(sums), torch.tensor(counts)).backward()
        return math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    return first_gradient


# --- what is minimised ---

def test_mean_of_means(run, first_gradient):
    """The mean of micro-batch means weighs a token by how few its neighbours are: another gradient than the batch's.
    https://github.com/huggingface/transformers/issues/34191"""
    ours = run("--max-steps", "1")[0]["grad_norm"]
    assert ours == pytest.approx(first_gradient(lambda sums, counts: sums.sum() / counts.sum()), rel=1e-4)
    assert ours != pytest.approx(first_gradient(lambda sums, counts: (sums / counts).mean()), rel=1e-2)


def test_divided_twice(run, first_gradient):
    """Dividing by the tokens and by the accumulation steps as well makes every gradient too small.
    https://github.com/huggingface/transformers/issues/35438"""
    right = first_gradient(lambda sums, counts: sums.sum() / counts.sum())
    assert right == pytest.approx(4 * first_gradient(lambda sums, counts: sums.sum() / counts.sum() / 4), rel=1e-4)
    assert run("--max-steps", "1")[0]["grad_norm"] == pytest.approx(right, rel=1e-4)


def test_not_divided(run, first_gradient):
    """Summing the micro-batches' means without dividing multiplies the learning rate by their number.
    https://github.com/Lightning-AI/lit-llama/issues/357"""
    ours = run("--max-steps", "1")[0]["grad_norm"]
    assert ours < 0.5 * first_gradient(lambda sums, counts: (sums / counts).sum())
    assert ours == pytest.approx(first_gradient(lambda sums, counts: sums.sum() / counts.sum()), rel=1e-4)


def test_leftover_window(run, first_gradient, tmp_path):
    """The smaller window at an epoch's end is dropped, divided by the full count, or leaks into the next epoch.
    https://github.com/tracel-ai/burn/issues/5695"""
    steps = run("--lr", "1e-30")                                         # no step moves anything: gradients can be compared
    assert [row["epoch"] for row in steps] == [0.5, 1.0, 1.5, 2.0]              # 8 and 4 of 12, twice
    assert steps[1]["grad_norm"] == pytest.approx(first_gradient(lambda sums, counts: sums.sum() / counts.sum(), window=1), rel=1e-4)
    assert sum(row["answer_tokens"] for row in steps[:2]) == sum(row["answer_tokens"] for row in steps[2:])


def test_schedule_counts_windows(run):
    """A schedule stepped per micro-batch, or sized by a floor division, ends early or never.
    https://github.com/NVIDIA-NeMo/Automodel/pull/2257"""
    assert [row["lr"] for row in run("--warmup-steps", "1")] == pytest.approx(
        [1e-2 * share for share in (0.5, 1, 0.5 * (1 + math.cos(math.pi / 3)), 0.5 * (1 + math.cos(2 * math.pi / 3)))])


def test_no_answer_in_the_batch():
    """A batch whose labels are all masked has a mean of 0/0, and one such batch makes every weight NaN.
    https://github.com/MakazhanAlpamys/Soup/issues/532"""
    model, tokens = adapted(), torch.arange(8).view(1, 8)
    masked = Batch(tokens, torch.full_like(tokens, IGNORE), 0)
    assert F.cross_entropy(model(tokens)[0], masked.labels[0]).isnan()
    loss, n = answer_loss(model, masked)
    assert loss.item() == 0 and n == 0


def test_loss_without_a_graph():
    """A constant in the place of an empty batch's loss has no backward pass, and the other ranks wait for it.
    https://github.com/huggingface/trl/issues/5826"""
    model, tokens = adapted(), torch.arange(8).view(1, 8)
    answer_loss(model, Batch(tokens, torch.full_like(tokens, IGNORE), 0))[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_validation_by_batches(run, data):
    """A mean of batch means over held-out data changes with the batch size; a sum by a count does not.
    https://github.com/pytorch/torchtitan/issues/4167"""
    held_out = [run("--val-data", str(data), "--max-steps", "1", "--lr", "1e-30", "--batch-size", size)[0]["val_loss"] for size in "15"]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)


def test_accuracy_of_free_text(tokenizer):
    """Asked to write a class, a base that has not learnt to answer scores 0 to the letter, whatever it holds likelier.
    https://github.com/OptimalScale/LMFlow/issues/210"""
    model, words = tiny(), ("happy", "sad")
    asked = [{"instruction": f"Is {thing} happy or sad?", "output": word} for thing in ("grass", "sky", "blue") for word in words]
    right = measures({name: column.sum(0) for name, column in Exam(asked, tokenizer, 512, list(words)).score(model).items()})
    assert right["exact_match"] == 0 and right["accuracy"] == 0.5                # of either word for the same question


def test_shift_by_one(tokenizer):
    """Labels shifted twice or not at all train the model to repeat a token, or to skip one.
    https://github.com/tloen/alpaca-lora/issues/306"""
    model, (tokens, labels) = tiny(), encode_example(EXAMPLES[0], tokenizer)
    loss, n = answer_loss(model, Batch(torch.tensor([tokens]), torch.tensor([labels]), count_answer(labels)))
    log_p = model(torch.tensor([tokens]))[0].log_softmax(-1)
    by_hand = [-log_p[t - 1, tokens[t]].item() for t in range(1, len(tokens)) if labels[t] != IGNORE]
    assert (loss.item(), n) == (pytest.approx(sum(by_hand), rel=1e-5), len(by_hand))


def test_prompt_is_no_target(tokenizer):
    """By default many recipes train on the prompt too, most of whose tokens are the template's.
    https://github.com/huggingface/trl/issues/1507"""
    prompt = encode_prompt(EXAMPLES[0], tokenizer)
    tokens, labels = encode_example(EXAMPLES[0], tokenizer)
    assert labels[:len(prompt)] == [IGNORE] * len(prompt) and labels[len(prompt):] == tokens[len(prompt):]


# --- tokens and data ---

def test_eos_is_a_target(tokenizer):
    """Where eos is never a target, because it is also the pad id that gets masked, the model never stops.
    https://github.com/mlabonne/llm-course/issues/33"""
    batch = DataCollatorForSupervisedDataset(tokenizer.pad_id)([encode_example(example, tokenizer) for example in EXAMPLES])
    assert tokenizer.pad_id == tokenizer.eos_id
    assert ((batch.labels == tokenizer.eos_id).sum(1) == 1).all()


def test_eos_as_text(tokenizer):
    """"</s>" written into the text is four characters to sentencepiece and no eos at all.
    https://github.com/johnsmith0031/alpaca_lora_4bit/issues/35"""
    assert tokenizer.eos_id not in tokenizer.encode("hi</s>") and tokenizer.decode([tokenizer.eos_id]) == ""
    assert encode_example(EXAMPLES[0], tokenizer)[1][-1] == tokenizer.eos_id


def test_eos_after_a_cut(tokenizer):
    """An eos put behind an answer that was cut teaches the model to stop in the middle of a sentence.
    https://github.com/tloen/alpaca-lora/issues/439"""
    tokens, labels = encode_example(EXAMPLES[3], tokenizer)
    for length in range(1, len(tokens)):
        cut, cut_labels = truncate(encode_example(EXAMPLES[3], tokenizer), length)
        assert cut == tokens[:length] and cut_labels == labels[:length] and tokenizer.eos_id not in cut


def test_prompt_boundary(tokenizer):
    """Encoded as one text, the prompt's last piece and the answer's first can be one piece: part prompt, part answer.
    https://github.com/pytorch/torchtitan/issues/4504"""
    example = {"instruction": "List two things.", "output": "- a list - of things"}
    wider = SimpleNamespace(eos_id=2, encode=lambda text, bos=False, eos=False:            # a tokenizer with a piece ":-"
                            [1] * bos + [ord(c) for c in text.replace(":-", "\u2237")] + [2] * eos)
    prompt = encode_prompt(example, wider)
    assert wider.encode(format_prompt(example) + example["output"], bos=True)[:len(prompt)] != prompt
    assert encode_example(example, wider)[0][:len(prompt)] == prompt


def test_answer_cut_away(tokenizer):
    """A row whose answer lies behind the cut has nothing to learn from, and alone in a batch it divides by zero.
    https://github.com/huggingface/trl/issues/1053"""
    lengths = sorted(len(encode_prompt(example, tokenizer)) for example in EXAMPLES)
    data = SupervisedDataset(EXAMPLES, tokenizer, max_seq_len=lengths[6])
    assert 0 < len(data) < 12 and data.dropped == 12 - len(data)
    assert all(count_answer(labels) > 0 for _, labels in data.rows)


def test_double_bos(tokenizer):
    """A second bos, from the template or from the tokenizer, is a prompt the base has never seen.
    https://github.com/Lightning-AI/litgpt/issues/1565"""
    for example in EXAMPLES:
        assert encode_example(example, tokenizer)[0].count(tokenizer.bos_id) == 1 == encode_prompt(example, tokenizer).count(1)


def test_token_by_token_decoding(tokenizer):
    """A piece decoded alone loses the space before it, so streamed text runs together.
    https://github.com/huggingface/transformers/issues/22710"""
    ids = tokenizer.encode("The sky is blue")
    assert "".join(tokenizer.decode([i]) for i in ids) != "The sky is blue"
    assert "".join(stream(tokenizer, ids)) == "The sky is blue"


def test_pad_id_of_minus_one(tokenizer):
    """LLaMA's tokenizer has no pad id and says -1, which is no row of an embedding.
    https://github.com/meta-llama/llama/blob/main/llama/tokenizer.py"""
    batch = DataCollatorForSupervisedDataset(tokenizer.pad_id)([([1, 5, 2], [IGNORE, 5, 2]), ([1, 2], [IGNORE, 2])])
    assert tokenizer.sp.pad_id() == -1 and batch.tokens.min() >= 0
    assert tiny()(batch.tokens).isfinite().all()


def test_order_without_coverage():
    """Rows drawn anew for each batch never make an epoch: some come twice and some not at all.
    https://github.com/Lightning-AI/lit-llama/blob/main/finetune/lora.py"""
    data = [([1, i], [IGNORE, i]) for i in range(50)]
    for epoch in 0, 1:
        seen = [row[1].item() for window in epoch_windows(data, DataCollatorForSupervisedDataset(0), 4, 2, 0, epoch)
                for batch in window.batches for row in batch.tokens]
        assert sorted(seen) == list(range(50))


def test_each_epoch_in_the_same_order():
    """A sampler that is not told the epoch deals the same order every time.
    https://github.com/pytorch/pytorch/issues/31771"""
    data = [([1, i], [IGNORE, i]) for i in range(50)]
    orders = [[batch.tokens[:, 1].tolist() for window in epoch_windows(data, DataCollatorForSupervisedDataset(0), 4, 2, 0, epoch)
               for batch in window.batches] for epoch in (0, 1, 0)]
    assert orders[0] != orders[1] and orders[0] == orders[2]


def test_template_at_inference(base, tokenizer, tmp_path, monkeypatch):
    """A prompt that ends otherwise than in training ("### Response:" and a newline, say) is answered worse.
    https://github.com/tloen/alpaca-lora/issues/524"""
    asked, honest = [], generate.generate
    monkeypatch.setattr(generate, "generate", lambda model, prompts, *rest, **settings:
                        asked.extend(prompts) or honest(model, prompts, *rest, **settings))
    monkeypatch.chdir(tmp_path)
    generate.main(["--checkpoint", str(base), "--adapter", "none", "--instruction", EXAMPLES[0]["instruction"], "--max-new-tokens", "1"])
    tokens, labels = encode_example({**EXAMPLES[0], "input": ""}, tokenizer)
    assert asked == [[token for token, label in zip(tokens, labels) if label == IGNORE]]


# --- adapters ---

def test_alpha_over_r():
    """The update is scaled by alpha / r; by alpha alone, a larger rank learns faster and nothing fits the paper.
    https://github.com/rasbt/LLMs-from-scratch/issues/821"""
    layer, x = LoRALinear(nn.Linear(8, 8), r=4, alpha=8), torch.randn(3, 8)
    nn.init.normal_(layer.lora_B)
    assert torch.allclose(layer(x) - layer.base(x), 2 * x @ layer.lora_A.T @ layer.lora_B.T, atol=1e-5)


def test_alpha_and_r_lost(tmp_path):
    """An adapter file without its alpha and r loads with somebody's defaults and computes another function.
    https://github.com/Blaizzy/mlx-vlm/issues/841"""
    model, tokens = adapted(), torch.arange(8).view(1, 8)
    save_adapter(model, tmp_path / "adapter.pt")
    other = tiny()
    load_adapter(other, tmp_path / "adapter.pt")
    assert torch.equal(other.eval()(tokens), model.eval()(tokens))
    assert (other.lora_config.r, other.lora_config.alpha) == (2, 8)


def test_merge_in_16_bit():
    """In bf16 a small update is lost as the merged weight is stored, and no one says so; summed in 16 bit, more of it.
    https://github.com/meta-pytorch/torchtune/issues/1101"""
    layer = LoRALinear(nn.Linear(64, 64, bias=False).bfloat16(), r=4, alpha=4)
    nn.init.normal_(layer.lora_B, std=1e-3)
    before, exact = layer.base.weight.double(), layer.base.weight.double() + layer.delta().double()
    share = merge_lora(nn.Sequential(layer))
    assert torch.equal(layer.base.weight, exact.bfloat16())                          # rounded once
    moved, wanted = layer.base.weight.double() - before, exact - before
    assert share == pytest.approx(((moved * wanted).sum() / wanted.square().sum()).item(), rel=1e-4)
    assert moved.eq(0).double().mean() > 0.5                                         # most weights did not move at all


def test_merge_drift():
    """Merged for each evaluation and unmerged by subtraction, the base walks away: a library measured two thirds of its size in bf16.
    https://github.com/huggingface/trl/issues/6688"""
    model = adapted("wq").bfloat16()
    layer = model.layers[0].attention.wq
    before, wrong = layer.base.weight.clone(), layer.base.weight.clone()
    for _ in range(1000):
        merge_lora(model)
        unmerge_lora(model)
        wrong += layer.delta().bfloat16()
        wrong -= layer.delta().bfloat16()
    assert torch.equal(layer.base.weight, before) and not torch.equal(wrong, before)


def test_double_merge():
    """Merged twice, or merged and still added in forward, the update counts double.
    https://github.com/jingyaogong/minimind/issues/598"""
    model, tokens = adapted(), torch.arange(8).view(1, 8)
    expected = model(tokens)
    merge_lora(model)
    assert torch.allclose(model(tokens), expected, atol=1e-4)
    with pytest.raises(ValueError, match="a second merge would add it twice"):
        model.layers[0].attention.wq.merge()


def test_adapter_silently_not_loaded(tmp_path):
    """With strict=False an adapter whose names do not fit loads nothing, and the answers are the base's.
    https://github.com/huggingface/peft/issues/793"""
    save_adapter(adapted(), tmp_path / "adapter.pt")
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    content["tensors"] = {f"base_model.{name}": tensor for name, tensor in content["tensors"].items()}
    torch.save(content, tmp_path / "adapter.pt")
    model = tiny()
    assert model.load_state_dict(content["tensors"], strict=False).missing_keys      # and no error
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(model, tmp_path / "adapter.pt")


def test_adapter_file_that_holds_the_base(tmp_path):
    """An adapter file that is empty, or that carries 13 GB of base along, because state_dict was the wrong one.
    https://github.com/tloen/alpaca-lora/issues/446"""
    save_adapter(adapted(), tmp_path / "adapter.pt")
    tensors = adapter_tensors(tmp_path)
    assert len(tensors) == 8 and all(name.endswith(("lora_A", "lora_B")) and tensor.any() for name, tensor in tensors.items())
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) == 2 * 4 * 4 * 2 * 32


def test_misspelt_target():
    """A target that matches nothing is passed over as long as another matches.
    https://github.com/huggingface/peft/issues/1959"""
    with pytest.raises(ValueError, match="no layer named q_proj to adapt; the model has"):
        add_lora(tiny(), LoRAConfig(r=2, targets=("q_proj", "wv")))


def test_dropout_on_the_base_path():
    """Dropout belongs to the adapter's input: on the base's it damages the model, on A's columns all rows lose alike.
    https://github.com/changjonathanc/minLoRA/blob/main/minlora/model.py"""
    layer, x = LoRALinear(nn.Linear(64, 64), r=4, alpha=4, dropout=0.5).train(), torch.ones(2, 64)
    assert torch.equal(layer(x), layer.base(x))                                      # B is zero: the base is untouched
    nn.init.normal_(layer.lora_B)
    one, other = layer(x)
    assert not torch.allclose(one, other)


def test_gqa_adapter_width():
    """Under grouped queries wk and wv are narrower than wq, and an adapter sized by n_heads does not fit.
    https://github.com/Lightning-AI/litgpt/issues/357"""
    model = adapted(("wq", "wk", "wv"), n_kv_heads=2)
    assert [tuple(model.layers[0].attention.get_submodule(name).lora_B.shape) for name in ("wq", "wk", "wv")] == [(32, 2), (16, 2), (16, 2)]
    assert model(torch.arange(8).view(1, 8)).shape == (1, 8, 400)


def test_tied_embeddings():
    """A merge into an output matrix that is the embedding too changes what goes in as well as what comes out.
    https://github.com/huggingface/peft/issues/2018"""
    model = adapted(("output",), tie_embeddings=True)
    before = model.tok_embeddings.weight.clone()
    merge_lora(model)
    assert torch.equal(model.tok_embeddings.weight, before) and not torch.equal(model.output.base.weight, before)


def test_adapter_in_16_bit():
    """Kept in bf16, an adapter's small steps are rounded away and it hardly learns.
    https://github.com/keras-team/keras-hub/issues/2629"""
    layer = LoRALinear(nn.Linear(64, 64).bfloat16(), r=4, alpha=4)
    short = nn.Parameter(layer.lora_A.detach().bfloat16())
    for factor in layer.lora_A, short:
        before, optimizer = factor.detach().double(), torch.optim.AdamW([factor], lr=1e-5, weight_decay=0)
        for _ in range(10):
            factor.grad = torch.ones_like(factor)
            optimizer.step()
        moved = (factor.detach().double() - before).abs().mean() / 1e-4
        assert moved == pytest.approx(1, rel=0.05) if factor is layer.lora_A else moved < 0.8


def test_adapter_before_the_seed(run, tmp_path):
    """An adapter that is drawn before the seed is set differs from run to run.
    https://github.com/meta-pytorch/torchtune/issues/2335"""
    for _ in range(2):
        run("--max-steps", "1")
        torch.rand(7)                                                    # whatever happened before
    one, other = (adapter_tensors(tmp_path / name) for name in ("run0", "run1"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- precision and memory ---

def test_reentrant_checkpointing():
    """Reentrant checkpointing of a block whose input needs no gradient gives its adapters none, with a warning at most.
    https://github.com/huggingface/peft/issues/1142"""
    model = adapted()
    model.checkpointing = True
    model.train()(torch.arange(8).view(1, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_copies_of_frozen_weights(base):
    """Under autocast a frozen fp32 weight is copied to 16 bit at each use and kept until backward: LoRA takes more memory.
    https://github.com/MakazhanAlpamys/Soup/issues/339"""
    job = train.prepare(parse_options(["--checkpoint", str(base), "--r", "2", "--precision", "bf16"]), SINGLE_PROCESS)
    ours, _ = train.load_model(job, torch.device("cpu"), "checkpoint")
    wrong = load_checkpoint(base, dtype=torch.float32)[0]
    add_lora(wrong, LoRAConfig(r=2))
    kept = {}
    for model in ours, wrong:
        with torch.autocast("cpu", torch.bfloat16) if model is wrong else job.precision.autocast:
            kept[model] = saved_bytes(model, lambda: model(torch.arange(4).view(1, 4)).sum())[1]
    matrices = sum(p.numel() for name, p in ours.named_parameters() if p.dim() == 2 and "lora" not in name and "tok" not in name)
    assert kept[wrong] > kept[ours] + 1.8 * matrices                     # 2 bytes for nearly each of them


def test_norms_under_autocast(base):
    """CUDA's autocast gives norms out in fp32, so what an adapter reads is held twice as wide for nothing.
    https://github.com/AgileRL/AgileRL/issues/623"""
    job = train.prepare(parse_options(["--checkpoint", str(base), "--r", "2", "--precision", "bf16"]), SINGLE_PROCESS)
    model, _ = train.load_model(job, torch.device("cpu"), "checkpoint")
    for device in "cpu", "cuda":                                         # entered, no GPU is asked for anything
        assert not train.mixed_precision("bf16", torch.device(device), job.lora).autocast._enabled
    seen = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear | LoRALinear):
            layer.register_forward_pre_hook(lambda layer, x: seen.add(x[0].dtype))
    with job.precision.autocast:
        model(torch.arange(4).view(1, 4))
    assert seen == {torch.bfloat16}


def test_unscaling_fp16_gradients(run):
    """Adapters held in fp16 have gradients in fp16, which GradScaler refuses to unscale.
    https://github.com/huggingface/peft/issues/341"""
    scaler, half = torch.amp.GradScaler("cpu"), nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.AdamW([half])
    scaler.scale(half.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    assert len(run("--precision", "fp16", "--max-steps", "1")) == 1


def test_clip_before_unscale(run):
    """Clipped before the loss scale is taken out again, a gradient is shrunk some 65,536 times.
    https://github.com/Lightning-AI/pytorch-lightning/issues/9599"""
    plain, scaled = (run("--precision", precision, "--max-steps", "2", "--clip-grad-norm", "1e-3") for precision in ("fp32", "fp16"))
    assert scaled[0]["loss_scale"] == 65536 and scaled[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.05)


def test_schedule_on_skipped_steps(run, monkeypatch):
    """A step that fp16 skips for an overflow moves no weight, yet the schedule moves on.
    https://github.com/pytorch/pytorch/issues/44511"""
    flags, calls, honest = ["--precision", "fp16", "--epochs", "1", "--warmup-steps", "1"], [], train.answer_loss
    right = [row["lr"] for row in run(*flags)]

    def overflowing(model, batch):
        loss, n = honest(model, batch)
        calls.append(n)
        return loss * (math.inf if len(calls) == 2 else 1), n            # in the first step; call 1 is the pre-flight's
    monkeypatch.setattr(train, "answer_loss", overflowing)
    assert [row["lr"] for row in run(*flags)] == [right[0], right[0]] != right


def test_rope_tables_in_16_bit():
    """Positions past 256 cannot be told apart in bf16, and `.half()` casts a table that is a buffer.
    https://github.com/huggingface/transformers/issues/29285"""
    assert torch.tensor(256.0).bfloat16() == torch.tensor(257.0).bfloat16()
    model = tiny(n_layers=1)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]))
    for dtype in torch.float32, torch.bfloat16:
        model.to(dtype)(torch.zeros(1, 300, dtype=torch.long))
    assert torch.equal(seen[0], seen[1])


def test_norm_overflow_in_fp16():
    """The square of 256 is infinite in fp16, and a norm that multiplies by zero from there on gives nothing.
    https://github.com/meta-llama/llama/issues/1048"""
    norm, x = tiny(n_layers=1).norm.half(), torch.full((1, 32), 300.0, dtype=torch.float16)
    assert x.square().mean().isinf()
    assert torch.allclose(norm(x), norm.weight, rtol=1e-2)


def test_stream_promoted_to_fp32():
    """A norm that returns fp32 makes the whole residual stream fp32 behind it, twice the memory.
    https://github.com/huggingface/transformers/issues/30236"""
    model = adapted().bfloat16()
    seen = set()
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, x, h: seen.add(h.dtype))
    assert model(torch.arange(8).view(1, 8)).dtype == torch.bfloat16 and seen == {torch.bfloat16}


def test_logits_of_all_positions():
    """Logits of prompt and padding, in fp32 and then thrown away, are the largest tensors of the whole step.
    https://github.com/meta-pytorch/torchtune/issues/1046"""
    model, seen = tiny(), []
    model.output.register_forward_hook(lambda layer, x, logits: seen.append(tuple(logits.shape)))
    tokens = torch.arange(20).view(2, 10)
    labels = torch.where(torch.arange(10) < 7, IGNORE, tokens)
    answer_loss(model, Batch(tokens, labels, 6))
    assert seen == [(6, 400)]


def test_optimizer_given_frozen_weights(run, monkeypatch):
    """An optimizer over model.parameters() breaks on resuming once what is frozen changes, and decays what it should not.
    https://github.com/Lightning-AI/lit-llama/blob/main/finetune/lora.py"""
    given, AdamW = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **rest: given.append([p for group in groups for p in group["params"]]) or AdamW(groups, **rest))
    run("--max-steps", "1")
    _, given = given                                                     # the first was the estimate's trial
    assert len(given) == 8 and all(parameter.requires_grad for parameter in given)


# --- files ---

def test_stale_key_and_strictness(base):
    """Meta's files hold rope.freqs, which is not a weight; loading with strict=False for its sake hides real errors.
    https://github.com/karpathy/llama2.c/issues/266"""
    path = next(base.glob("*.pth"))
    state = torch.load(path, weights_only=True)
    torch.save({**state, "rope.freqs": torch.ones(4)}, path)
    load_checkpoint(base)
    torch.save({**state, "layers.0.attention.wqkv.weight": torch.ones(4)}, path)
    with pytest.raises(ValueError, match="unexpected: layers.0.attention.wqkv.weight"):
        load_checkpoint(base)


def test_shards_along_the_wrong_side(base):
    """Shards are cut by rows for some matrices and by columns for others; joined along the wrong side they fit nothing.
    https://github.com/okuvshynov/slowllama/issues/16"""
    path = next(base.glob("*.pth"))
    whole = torch.load(path, weights_only=True)
    by_columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    for i in 0, 1:
        torch.save({name: tensor if tensor.dim() == 1 else tensor.chunk(2, int(name.endswith(by_columns)))[i].clone()
                    for name, tensor in whole.items()}, base / f"consolidated.{i:02}.pth")
    model, _ = load_checkpoint(base)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


class Program:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_a_pickle_in_a_file(base, tmp_path, monkeypatch, what):
    """A checkpoint or an adapter is a pickle, and a pickle that someone shared can run a program as it loads.
    https://github.com/Lightning-AI/litgpt/issues/2189"""
    monkeypatch.chdir(tmp_path)
    if what == "checkpoint":
        torch.save({"norm.weight": Program()}, next(base.glob("*.pth")))
    else:
        torch.save({"config": {}, "base": {}, "tensors": {"lora_A": Program()}}, "adapter.pt")
    with pytest.raises(ValueError, match="is not a"):
        load_checkpoint(base) if what == "checkpoint" else load_adapter(tiny(), "adapter.pt")
    assert not (tmp_path / "ran").exists()


# --- several ranks: one real run of two processes, looked at from all sides ---

@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tokenizer):
    """(folder of a run by two ranks, of one by a single process): 12 examples in windows of 8 and 4, held-out loss too."""
    folder = tmp_path_factory.mktemp("ranks")
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, folder / "base")
    (folder / "data.json").write_text(json.dumps(EXAMPLES))
    (folder / "launch.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
notes = open(f"notes{{os.environ['RANK']}}", "w")
class Noting(train.DistributedDataParallel):
    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.register_comm_hook(None, self.reduce)
    @staticmethod
    def reduce(state, bucket):
        print("reduced", file=notes, flush=True)
        return torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])
evaluate, train.DistributedDataParallel = train.evaluate, Noting
def noted(model, *rest):
    print("evaluated", type(model).__name__, file=notes, flush=True)
    return evaluate(model, *rest)
train.evaluate = noted
train.main(sys.argv[1:])
""")
    flags = ["--checkpoint", "base", "--data", "data.json", "--val-data", "data.json", *FLAGS]
    argv = given_once([*flags, "--accumulation-steps", "2", "--out", "two"])
    done = torchrun(folder, folder / "launch.py", *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*flags, "--out", "one"])
    return folder


def test_mean_of_rank_means(two_ranks):
    """DDP averages over ranks: each divided by its own tokens, the ranks' gradients are a mean of means again.
    https://github.com/huggingface/transformers/issues/34242"""
    one, two = (metrics(two_ranks / out) for out in ("one", "two"))
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)


def test_no_sync_placement(two_ranks):
    """no_sync takes effect in forward: around backward alone, or on the wrong micro-batch, every one is reduced, or none.
    https://github.com/baidu-baige/LoongForge/issues/163"""
    for rank in 0, 1:
        assert (two_ranks / f"notes{rank}").read_text().count("reduced") == 4        # steps
    one, two = (metrics(two_ranks / out) for out in ("one", "two"))
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)


def test_freeze_after_wrapping(two_ranks):
    """DDP waits for a gradient of all that was trainable as it wrapped; frozen afterwards, the second step fails.
    https://github.com/huggingface/peft/issues/1612"""
    assert len(metrics(two_ranks / "two")) == 4


def test_evaluation_through_the_wrapper(two_ranks):
    """Held-out loss taken through DDP's wrapper, on one rank or on uneven shares, waits for ranks that never come.
    https://github.com/FareedKhan-dev/train-llm-from-scratch/issues/32"""
    for rank in 0, 1:
        assert set(re.findall("evaluated (.*)", (two_ranks / f"notes{rank}").read_text())) == {"Transformer"}
    one, two = ([row["val_loss"] for row in metrics(two_ranks / out) if "val_loss" in row] for out in ("one", "two"))
    assert len(one) == 2 and two == pytest.approx(one, rel=1e-5)


class Said(nn.Module):
    """A model whose logits at each row are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.output = nn.Parameter(logits.double()), nn.Identity()

    def forward(self, tokens, rows, layout=None):
        return self.output(self.logits[rows])


def taught(batch, teacher, **settings):
    """The gradient at a student's logits, which are all 0, of distillation from these."""
    student = Said(torch.zeros_like(teacher))
    Distillation(Said(teacher), **settings)(student, batch)[0].backward()
    return student.logits.grad


ONE_ANSWER = Batch(torch.tensor([[1, 3, 0, 2, 2, 2]]), torch.tensor([[IGNORE, IGNORE, 0, 2, IGNORE, IGNORE]]), 2)


def test_soft_targets_grow_faint():
    """Softened by T, the teacher's gradients shrink as 1 / T^2: without that factor the answers alone are learnt at a high T.
    https://github.com/IntelLabs/distiller/issues/122"""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) / 10
    mild, hot = (taught(ONE_ANSWER, logits, temperature=T, weight=1.0).norm() for T in (2.0, 20.0))
    assert hot == pytest.approx(mild.item(), rel=0.1)


def test_soft_targets_of_padding():
    """A KL over all positions, prompt and padding with them, teaches what no answer holds, and more of it in longer batches.
    https://github.com/peremartra/optipfair/issues/34"""
    moved = taught(ONE_ANSWER, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), weight=1.0).any(-1)
    assert moved.tolist() == [False, True, True, False, False, False]


def test_a_word_that_the_teacher_rules_out():
    """A log-probability of -inf times its probability, 0, is NaN, and so is every gradient then.
    https://github.com/huggingface/trl/issues/5594"""
    logits = torch.zeros(6, 4)
    logits[:, 3] = -torch.inf
    log_q = logits.log_softmax(-1)
    assert F.kl_div(torch.zeros(6, 4).log_softmax(-1), log_q, log_target=True, reduction="sum").isnan()
    gradient = taught(ONE_ANSWER, logits, temperature=1.0, weight=1.0)[1]
    assert torch.allclose(gradient, torch.tensor([-1 / 12, -1 / 12, -1 / 12, 1 / 4], dtype=torch.float64))
