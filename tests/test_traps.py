"""The ways in which fine-tuning code goes silently wrong, each as a short test.

docs/traps.md has the same sentences, and where each trap bit others.  Where the wrong way is short,
it fails beside the right one.  tests/test_mutations.py puts each trap back into our code and sees
its test fail (pytest -m slow).
"""
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import finetune.job
import generate
import train
from finetune.batches import Batch, DataCollatorForSupervisedDataset
from finetune.dataset import (IGNORE, SupervisedDataset, count_answer, encode_example,
                              encode_prompt, truncate)
from finetune.templates.alpaca import format_prompt
from finetune.distill import Distillation
from finetune.exam import Exam
from finetune.loss import answer_loss
from finetune.measures import measures
from finetune.options import parse_options
from finetune.ranks import SINGLE_PROCESS
from llama import load_checkpoint
from llama.sampling import stream
from lora import (LoRAConfig, LoRALinear, add_lora, load_adapter, merge_lora, save_adapter,
                  unmerge_lora)

from .helpers import (EXAMPLES, ROOT, Attack, GivenLogits, adapt, adapter_tensors, column,
                      epoch_windows, given_once, lay_out, metrics, stored, tiny, torchrun)
from .memory import saved_bytes

FLAGS = ["--r", "4", "--lr", "1e-2", "--dropout", "0", "--batch-size", "2",
         "--accumulation-steps", "4", "--epochs", "2", "--clip-grad-norm", "0"]
TOKENS = torch.arange(8).view(1, 8)
MASKED = Batch(TOKENS, torch.full_like(TOKENS, IGNORE), 0)


def adapted(targets=("wq", "wv"), **sizes):
    return adapt(tiny(**sizes), r=2, alpha=8, targets=targets)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture
def run(base, data, tmp_path, monkeypatch):
    """run(*flags) is metrics.jsonl's rows: 12 examples in windows of 8 and 4, two epochs."""
    monkeypatch.chdir(tmp_path)
    names = iter(["run0", "run1", "run2"])

    def run(*flags):
        out = next(names)
        files = ["--checkpoint", str(base), "--data", str(data), "--out", out]
        train.main(given_once([*files, *FLAGS, *flags]))
        return metrics(tmp_path / out)

    return run


@pytest.fixture
def first_gradient(base, tokenizer):
    """first_gradient(weigh) is the first step's norm, where weigh(sums, counts) is the loss."""
    def first_gradient(weigh, window=0):
        torch.manual_seed(0)
        model, _ = load_checkpoint(base, max_seq_len=512)
        add_lora(model, LoRAConfig(r=4, dropout=0))
        rows = SupervisedDataset(EXAMPLES, tokenizer)
        step = epoch_windows(rows, DataCollatorForSupervisedDataset(2), 2, 4)[window]
        sums, counts = zip(*[answer_loss(model, batch) for batch in step.batches], strict=True)
        weigh(torch.stack(sums), torch.tensor(counts)).backward()
        return math.sqrt(sum(p.grad.square().sum().item() for p in trainable(model)))

    return first_gradient


def mean_over_tokens(sums, counts):
    return sums.sum() / counts.sum()


# --- what is minimised


def test_mean_of_means(run, first_gradient):
    """The mean of micro-batch means gives tokens of short batches more weight: another gradient
    than the batch's."""
    ours = run("--max-steps", "1")[0]["grad_norm"]
    assert ours == pytest.approx(first_gradient(mean_over_tokens), rel=1e-4)
    wrong = first_gradient(lambda sums, counts: (sums / counts).mean())
    assert ours != pytest.approx(wrong, rel=1e-2)


def test_divided_twice(run, first_gradient):
    """Dividing by the tokens and by the accumulation steps as well makes every gradient too
    small."""
    right = first_gradient(mean_over_tokens)
    wrong = first_gradient(lambda sums, counts: mean_over_tokens(sums, counts) / 4)
    assert right == pytest.approx(4 * wrong, rel=1e-4)
    assert run("--max-steps", "1")[0]["grad_norm"] == pytest.approx(right, rel=1e-4)


def test_not_divided(run, first_gradient):
    """Summing the micro-batches' means without dividing multiplies the learning rate by their
    number."""
    ours = run("--max-steps", "1")[0]["grad_norm"]
    assert ours < 0.5 * first_gradient(lambda sums, counts: (sums / counts).sum())
    assert ours == pytest.approx(first_gradient(mean_over_tokens), rel=1e-4)


def test_leftover_window(run, first_gradient, tmp_path):
    """The smaller window at an epoch's end is dropped, divided by the full count, or leaks into the
    next epoch."""
    steps = run("--lr", "1e-30")                     # No step moves anything.
    assert [row["epoch"] for row in steps] == [0.5, 1.0, 1.5, 2.0]
    right = first_gradient(mean_over_tokens, window=1)
    assert steps[1]["grad_norm"] == pytest.approx(right, rel=1e-4)
    n_answer = [row["answer_tokens"] for row in steps]
    assert sum(n_answer[:2]) == sum(n_answer[2:])


def test_schedule_counts_windows(run):
    """A schedule stepped per micro-batch, or sized by a floor division, ends early or never."""
    shares = [0.5, 1, 0.5 * (1 + math.cos(math.pi / 3)), 0.5 * (1 + math.cos(2 * math.pi / 3))]
    lr = [row["lr"] for row in run("--warmup-steps", "1")]
    assert lr == pytest.approx([1e-2 * share for share in shares])


def test_no_answer_in_the_batch():
    """A batch whose labels are all masked has a mean of 0/0, and one such batch makes every weight
    NaN."""
    model = adapted()
    assert F.cross_entropy(model(TOKENS)[0], MASKED.labels[0]).isnan()
    loss, n = answer_loss(model, MASKED)
    assert loss.item() == 0 and n == 0


def test_loss_without_a_graph():
    """A constant in the place of an empty batch's loss has no backward pass, and the other ranks
    wait for it."""
    model = adapted()
    answer_loss(model, MASKED)[0].backward()
    assert not any(p.grad.any() for p in trainable(model))


def test_validation_by_batches(run, data):
    """A mean of batch means over held-out data changes with the batch size; a sum by a count does
    not."""
    flags = ["--val-data", str(data), "--max-steps", "1", "--lr", "1e-30", "--batch-size"]
    one, = run(*flags, "1")
    five, = run(*flags, "5")
    assert one["val_loss"] == pytest.approx(five["val_loss"], rel=1e-6)


def test_accuracy_of_free_text(tokenizer):
    """Asked to write a class, a base that has not learnt to answer scores 0 to the letter, whatever
    it holds likelier."""
    questions = []
    for thing in ("grass", "sky", "blue"):
        asked = f"Is {thing} happy or sad?"
        questions += [{"instruction": asked, "output": word} for word in ("happy", "sad")]
    columns = Exam(questions, tokenizer, 512, ["happy", "sad"]).score(tiny())
    right = measures({name: column.sum(0) for name, column in columns.items()})
    # Each question comes with either answer.
    assert right["exact_match"] == 0 and right["accuracy"] == 0.5


def test_shift_by_one(tokenizer):
    """Labels shifted twice or not at all train the model to repeat a token, or to skip one."""
    model = tiny()
    tokens, labels = encode_example(EXAMPLES[0], tokenizer)
    batch = Batch(torch.tensor([tokens]), torch.tensor([labels]), count_answer(labels))
    loss, n = answer_loss(model, batch)
    log_p = model(batch.tokens)[0].log_softmax(-1)
    by_hand = [-log_p[t - 1, tokens[t]].item() for t in range(len(tokens)) if labels[t] != IGNORE]
    assert (loss.item(), n) == (pytest.approx(sum(by_hand), rel=1e-5), len(by_hand))


def test_prompt_is_no_target(tokenizer):
    """By default many recipes train on the prompt too, most of whose tokens are the template's."""
    n = len(encode_prompt(EXAMPLES[0], tokenizer))
    tokens, labels = encode_example(EXAMPLES[0], tokenizer)
    assert labels == [IGNORE] * n + tokens[n:]


# --- tokens and data


def test_eos_is_a_target(tokenizer):
    """Where eos is never a target, because it is also the pad id that gets masked, the model never
    stops."""
    rows = [encode_example(example, tokenizer) for example in EXAMPLES]
    batch = DataCollatorForSupervisedDataset(tokenizer.pad_id)(rows)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert ((batch.labels == tokenizer.eos_id).sum(1) == 1).all()


def test_eos_as_text(tokenizer):
    """"</s>" written into the text is four characters to sentencepiece and no eos at all."""
    assert tokenizer.eos_id not in tokenizer.encode("hi</s>")
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert encode_example(EXAMPLES[0], tokenizer)[1][-1] == tokenizer.eos_id


def test_eos_after_a_cut(tokenizer):
    """An eos put behind an answer that was cut teaches the model to stop in the middle of a
    sentence."""
    tokens, labels = encode_example(EXAMPLES[3], tokenizer)
    for length in range(1, len(tokens)):
        cut = truncate((tokens, labels), length)
        assert cut == (tokens[:length], labels[:length]) and tokenizer.eos_id not in cut[0]


class Wider:
    """A tokenizer with a piece for ":-"."""

    eos_id = 2

    def encode(self, text, bos=False, eos=False):
        ids = [ord(c) for c in text.replace(":-", "\u2237")]
        return [1] * bos + ids + [2] * eos


def test_prompt_boundary(tokenizer):
    """Encoded as one text, the prompt's last piece and the answer's first can be one piece: part
    prompt, part answer."""
    example = {"instruction": "List two things.", "output": "- a list - of things"}
    prompt = encode_prompt(example, Wider())
    as_one_text = Wider().encode(format_prompt(example) + example["output"], bos=True)
    assert as_one_text[:len(prompt)] != prompt
    assert encode_example(example, Wider())[0][:len(prompt)] == prompt


def test_answer_cut_away(tokenizer):
    """A row whose answer lies behind the cut has nothing to learn from, and alone in a batch it
    divides by zero."""
    lengths = sorted(len(encode_prompt(example, tokenizer)) for example in EXAMPLES)
    data = SupervisedDataset(EXAMPLES, tokenizer, max_seq_len=lengths[6])
    assert 0 < len(data) < 12 and data.dropped == 12 - len(data)
    assert all(count_answer(labels) > 0 for _, labels in data.rows)


def test_double_bos(tokenizer):
    """A second bos, from the template or from the tokenizer, is a prompt the base has never
    seen."""
    for example in EXAMPLES:
        assert encode_example(example, tokenizer)[0].count(tokenizer.bos_id) == 1
        assert encode_prompt(example, tokenizer).count(tokenizer.bos_id) == 1


def test_token_by_token_decoding(tokenizer):
    """A piece decoded alone loses the space before it, so streamed text runs together."""
    ids = tokenizer.encode("The sky is blue")
    assert "".join(tokenizer.decode([i]) for i in ids) != "The sky is blue"
    assert "".join(stream(tokenizer, ids)) == "The sky is blue"


def test_pad_id_of_minus_one(tokenizer):
    """LLaMA's tokenizer has no pad id and says -1, which is no row of an embedding."""
    rows = [([1, 5, 2], [IGNORE, 5, 2]), ([1, 2], [IGNORE, 2])]
    batch = DataCollatorForSupervisedDataset(tokenizer.pad_id)(rows)
    assert tokenizer.sp.pad_id() == -1 and batch.tokens.min() >= 0
    assert tiny()(batch.tokens).isfinite().all()


def order_of(epoch):
    """Return the second tokens of an epoch's rows, as they come."""
    rows = [([1, i], [IGNORE, i]) for i in range(50)]
    order = []
    for window in epoch_windows(rows, DataCollatorForSupervisedDataset(0), 4, 2, 0, epoch):
        for batch in window.batches:
            order += batch.tokens[:, 1].tolist()
    return order


def test_order_without_coverage():
    """Rows drawn anew for each batch never make an epoch: some come twice and some not at all."""
    assert sorted(order_of(0)) == sorted(order_of(1)) == list(range(50))


def test_each_epoch_in_the_same_order():
    """A sampler that is not told the epoch deals the same order every time."""
    assert order_of(0) != order_of(1) and order_of(0) == order_of(0)


def test_template_at_inference(base, tokenizer, monkeypatch):
    """A prompt that ends otherwise than in training ("### Response:" and a newline, say) is
    answered worse."""
    asked = []

    def noting(model, prompts, *rest, **settings):
        asked.extend(prompts)
        return iter([])

    monkeypatch.setattr("finetune.answers.generate", noting)
    generate.main(["--checkpoint", str(base), "--adapter", "none",
                   "--instruction", EXAMPLES[0]["instruction"]])
    tokens, labels = encode_example({**EXAMPLES[0], "input": ""}, tokenizer)
    assert asked == [tokens[:labels.count(IGNORE)]]


# --- adapters


def test_alpha_over_r():
    """The update is scaled by alpha / r; by alpha alone, a larger rank learns faster and nothing
    fits the paper."""
    layer = LoRALinear(nn.Linear(8, 8), r=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 8)
    expected = 2 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x) - layer.base(x), expected, atol=1e-5)


def test_alpha_and_r_lost(tmp_path):
    """An adapter file without its alpha and r loads with somebody's defaults and computes another
    function."""
    model = adapted()
    save_adapter(model, tmp_path / "adapter.pt")
    other = tiny()
    load_adapter(other, tmp_path / "adapter.pt")
    assert torch.equal(other.eval()(TOKENS), model.eval()(TOKENS))
    assert (other.lora_config.r, other.lora_config.alpha) == (2, 8)


def test_merge_in_16_bit():
    """In bf16 a small update is lost as the merged weight is stored, and no one says so; even more
    is lost if the sum is in 16 bit."""
    layer = LoRALinear(nn.Linear(64, 64, bias=False).bfloat16(), r=4, alpha=4)
    nn.init.normal_(layer.lora_B, std=1e-3)
    before = layer.base.weight.double()
    exact = before + layer.delta().double()
    share = merge_lora(nn.Sequential(layer))
    assert torch.equal(layer.base.weight, exact.bfloat16())      # rounded once
    moved = layer.base.weight.double() - before
    kept = (moved * (exact - before)).sum() / (exact - before).square().sum()
    assert share == pytest.approx(kept.item(), rel=1e-4)
    assert moved.eq(0).double().mean() > 0.5                     # Most weights did not move.


def test_merge_drift():
    """Merged for each evaluation and unmerged by subtraction, the base walks away: a library
    measured two thirds of its size in bf16."""
    model = adapted("wq").bfloat16()
    layer = model.layers[0].attention.wq
    before = layer.base.weight.clone()
    wrong = before.clone()
    for _ in range(300):
        merge_lora(model)
        unmerge_lora(model)
        wrong += layer.delta().bfloat16()
        wrong -= layer.delta().bfloat16()
    assert torch.equal(layer.base.weight, before) and not torch.equal(wrong, before)


def test_double_merge():
    """Merged twice, or merged and still added in forward, the update counts double."""
    model = adapted()
    expected = model(TOKENS)
    merge_lora(model)
    assert torch.allclose(model(TOKENS), expected, atol=1e-4)
    with pytest.raises(ValueError, match="a second merge would add it twice"):
        model.layers[0].attention.wq.merge()


def test_adapter_silently_not_loaded(tmp_path):
    """With strict=False an adapter whose names do not fit loads nothing, and the answers are the
    base's."""
    save_adapter(adapted(), tmp_path / "adapter.pt")
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    tensors = {f"base_model.{name}": tensor for name, tensor in content["tensors"].items()}
    torch.save(content | {"tensors": tensors}, tmp_path / "adapter.pt")
    model = tiny()
    assert model.load_state_dict(tensors, strict=False).missing_keys     # and no error
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(model, tmp_path / "adapter.pt")


def test_adapter_file_that_holds_the_base(tmp_path):
    """An adapter file that is empty, or that carries 13 GB of base along, because state_dict was
    the wrong one."""
    save_adapter(adapted(), tmp_path / "adapter.pt")
    tensors = adapter_tensors(tmp_path)
    assert len(tensors) == 8 and all(tensor.any() for tensor in tensors.values())
    assert all(name.endswith(("lora_A", "lora_B")) for name in tensors)
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors.values()]
    assert sum(sizes) == 2 * 4 * 4 * 2 * 32


def test_misspelt_target():
    """A target that matches nothing is passed over as long as another matches."""
    with pytest.raises(ValueError, match="no layer named q_proj to adapt; the model has"):
        add_lora(tiny(), LoRAConfig(r=2, targets=("q_proj", "wv")))


def test_dropout_on_the_base_path():
    """Dropout belongs to the adapter's input: on the base's it damages the model, on A's columns it
    drops the same features for all rows."""
    layer = LoRALinear(nn.Linear(64, 64), r=4, alpha=4, dropout=0.5).train()
    x = torch.ones(2, 64)
    assert torch.equal(layer(x), layer.base(x))      # B is zero.
    nn.init.normal_(layer.lora_B)
    assert not torch.allclose(*layer(x))


def test_gqa_adapter_width():
    """Under grouped queries wk and wv are narrower than wq, and an adapter sized by n_heads does
    not fit."""
    model = adapted(("wq", "wk", "wv"), n_kv_heads=2)
    attention = model.layers[0].attention
    shapes = [tuple(layer.lora_B.shape) for layer in (attention.wq, attention.wk, attention.wv)]
    assert shapes == [(32, 2), (16, 2), (16, 2)]
    assert model(TOKENS).shape == (1, 8, 400)


def test_tied_embeddings():
    """A merge into an output matrix that is the embedding too changes what goes in as well as what
    comes out."""
    model = adapted(("output",), tie_embeddings=True)
    before = model.tok_embeddings.weight.clone()
    merge_lora(model)
    assert torch.equal(model.tok_embeddings.weight, before)
    assert not torch.equal(model.output.base.weight, before)


def test_adapter_in_16_bit():
    """Kept in bf16, an adapter's small steps are rounded away and it hardly learns."""
    layer = LoRALinear(nn.Linear(64, 64).bfloat16(), r=4, alpha=4)
    shares = []
    for factor in (layer.lora_A, nn.Parameter(layer.lora_A.detach().bfloat16())):
        before = factor.detach().double()
        optimizer = torch.optim.AdamW([factor], lr=1e-5, weight_decay=0)
        for _ in range(10):
            factor.grad = torch.ones_like(factor)
            optimizer.step()
        shares.append((factor.detach().double() - before).abs().mean() / 1e-4)
    assert shares[0] == pytest.approx(1, rel=0.05) and shares[1] < 0.8


def test_adapter_before_the_seed(run, tmp_path):
    """An adapter that is drawn before the seed is set differs from run to run."""
    for _ in range(2):
        run("--max-steps", "1")
        torch.rand(7)                                # whatever happened before
    one, other = (adapter_tensors(tmp_path / name) for name in ("run0", "run1"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- precision and memory


def test_reentrant_checkpointing():
    """Reentrant checkpointing of a block whose input needs no gradient gives its adapters none,
    with a warning at most."""
    model = adapted()
    model.checkpointing = True
    model.train()(TOKENS).sum().backward()
    assert all(p.grad.any() for p in trainable(model))


def bf16_job(base):
    options = parse_options(["--checkpoint", str(base), "--r", "2", "--precision", "bf16"])
    job = finetune.job.prepare(options, SINGLE_PROCESS, train.build_optimizer)
    return job, finetune.job.load_model(job, torch.device("cpu"), "checkpoint")[0]


def test_copies_of_frozen_weights(base):
    """Under autocast a frozen fp32 weight is copied to 16 bit at each use and kept until backward:
    LoRA takes more memory."""
    job, model = bf16_job(base)
    wrong, _ = load_checkpoint(base, dtype=torch.float32)
    add_lora(wrong, LoRAConfig(r=2))

    def kept(model, autocast):
        with autocast:
            return saved_bytes(model, lambda: model(TOKENS[:, :4]).sum())[1]

    weights = [p for p in model.parameters() if p.dim() == 2 and not p.requires_grad]
    n_frozen = sum(p.numel() for p in weights) - model.tok_embeddings.weight.numel()
    difference = kept(wrong, torch.autocast("cpu", torch.bfloat16))
    difference -= kept(model, job.precision.autocast)
    assert difference > 1.8 * n_frozen               # 2 bytes for nearly each of them


def test_norms_under_autocast(base):
    """CUDA's autocast gives norms out in fp32, so what an adapter reads is held twice as wide for
    nothing."""
    job, model = bf16_job(base)
    for device in ("cpu", "cuda"):                   # No GPU is asked for anything.
        precision = finetune.job.mixed_precision("bf16", torch.device(device), job.lora)
        assert not precision.autocast._enabled
    seen = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear | LoRALinear):
            layer.register_forward_pre_hook(lambda layer, x: seen.add(x[0].dtype))
    with job.precision.autocast:
        model(TOKENS)
    assert seen == {torch.bfloat16}


def test_unscaling_fp16_gradients(run):
    """Adapters held in fp16 have gradients in fp16, which GradScaler refuses to unscale."""
    scaler = torch.amp.GradScaler("cpu")
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.AdamW([half])
    scaler.scale(half.sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    assert len(run("--precision", "fp16", "--max-steps", "1")) == 1


def test_clip_before_unscale(run):
    """Clipped before the loss scale is taken out again, a gradient is shrunk some 65,536 times."""
    flags = ["--max-steps", "1", "--clip-grad-norm", "1e-3", "--precision"]
    plain, = run(*flags, "fp32")
    scaled, = run(*flags, "fp16")
    assert scaled["loss_scale"] == 65536
    assert scaled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.02)


def test_schedule_on_skipped_steps(run, monkeypatch):
    """A step that fp16 skips for an overflow moves no weight, yet the schedule moves on."""
    flags = ["--precision", "fp16", "--epochs", "1", "--warmup-steps", "1"]
    right = [row["lr"] for row in run(*flags)]
    answer_loss = finetune.job.answer_loss
    calls = []

    def overflowing(model, batch):
        loss, n = answer_loss(model, batch)
        calls.append(n)                              # The first call is the pre-flight's.
        return loss * (math.inf if len(calls) == 2 else 1), n

    monkeypatch.setattr(finetune.job, "answer_loss", overflowing)
    assert [row["lr"] for row in run(*flags)] == [right[0], right[0]] != right


def test_rope_tables_in_16_bit():
    """Positions past 256 cannot be told apart in bf16, and `.half()` casts a table that is a
    buffer."""
    assert torch.tensor(256.0).bfloat16() == torch.tensor(257.0).bfloat16()
    model = tiny(n_layers=1)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]))
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)(torch.zeros(1, 300, dtype=torch.long))
    assert torch.equal(seen[0], seen[1])


def test_norm_overflow_in_fp16():
    """The square of 256 is infinite in fp16, and a norm that multiplies by zero from there on gives
    nothing."""
    norm = tiny(n_layers=1).norm.half()
    x = torch.full((1, 32), 300.0, dtype=torch.float16)
    assert x.square().mean().isinf()
    assert torch.allclose(norm(x), norm.weight, rtol=1e-2)


def test_stream_promoted_to_fp32():
    """A norm that returns fp32 makes the whole residual stream fp32 behind it, twice the memory."""
    model = adapted().bfloat16()
    seen = set()
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, x, h: seen.add(h.dtype))
    assert model(TOKENS).dtype == torch.bfloat16 and seen == {torch.bfloat16}


def test_logits_of_all_positions():
    """Logits of prompt and padding, in fp32 and then thrown away, are the largest tensors of the
    whole step."""
    model = tiny()
    seen = []
    model.output.register_forward_hook(lambda layer, x, logits: seen.append(logits.shape))
    tokens = torch.arange(20).view(2, 10)
    labels = torch.where(torch.arange(10) < 7, IGNORE, tokens)
    answer_loss(model, Batch(tokens, labels, 6))
    assert seen == [(6, 400)]


def test_optimizer_given_frozen_weights(run, monkeypatch):
    """An optimizer over model.parameters() breaks on resuming once what is frozen changes, and
    decays what it should not."""
    optimizers = []
    build_optimizer = train.build_optimizer

    def noting(groups, options):
        optimizers.append(build_optimizer(groups, options))
        return optimizers[-1]

    monkeypatch.setattr(train, "build_optimizer", noting)
    run("--max-steps", "1")
    group, = optimizers[-1].param_groups             # Before it came the estimate's trial.
    assert len(group["params"]) == 8 and all(p.requires_grad for p in group["params"])


# --- files


def test_stale_key_and_strictness(base):
    """Meta's files hold rope.freqs, which is not a weight; loading with strict=False for its sake
    hides real errors."""
    path = base / "consolidated.00.pth"
    state = stored(base)
    torch.save(state | {"rope.freqs": torch.ones(4)}, path)
    load_checkpoint(base)
    torch.save(state | {"layers.0.attention.wqkv.weight": torch.ones(4)}, path)
    with pytest.raises(ValueError, match="unexpected: layers.0.attention.wqkv.weight"):
        load_checkpoint(base)


def test_shards_along_the_wrong_side(base):
    """Shards are cut by rows for some matrices and by columns for others; joined along the wrong
    side they fit nothing."""
    whole = stored(base)
    for i in (0, 1):
        shard = {}
        for name, tensor in whole.items():
            by_columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            pieces = tensor.chunk(2, int(by_columns)) if tensor.dim() > 1 else [tensor, tensor]
            shard[name] = pieces[i].clone()
        torch.save(shard, base / f"consolidated.{i:02}.pth")
    model, _ = load_checkpoint(base)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_a_pickle_in_a_file(base, tmp_path, capsys, what):
    """A checkpoint or an adapter is a pickle, and a pickle that someone shared can run a program as
    it loads."""
    path = tmp_path / "adapter.pt"
    torch.save({"norm.weight": Attack()}, base / "consolidated.00.pth")
    torch.save({"config": {}, "base": {}, "tensors": {"lora_A": Attack()}}, path)
    with pytest.raises(ValueError, match="is not a"):
        load_checkpoint(base) if what == "checkpoint" else load_adapter(tiny(), path)
    assert "the pickle ran" not in capsys.readouterr().out


# --- several ranks: one real run of two processes, looked at from all sides

NOTING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from finetune import shard
notes = open(f"notes{{os.environ['RANK']}}", "w")
class Noting(shard.DistributedDataParallel):
    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.register_comm_hook(None, self.reduce)
    @staticmethod
    def reduce(state, bucket):
        print("reduced", file=notes, flush=True)
        reduced = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True)
        return reduced.get_future().then(lambda future: future.value()[0])
shard.DistributedDataParallel = Noting
evaluate = train.evaluate
def noting_evaluate(model, *rest):
    print("evaluated", type(model).__name__, file=notes, flush=True)
    return evaluate(model, *rest)
train.evaluate = noting_evaluate
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tokenizer):
    """A folder with `two`, a run of two ranks that took notes, and `one`, of a single process."""
    folder = tmp_path_factory.mktemp("ranks")
    lay_out(folder, tokenizer, n_examples=12, n_held_out=12)
    (folder / "launch.py").write_text(NOTING)
    flags = ["--checkpoint", "base", "--data", "data.json", "--val-data", "held_out.json", *FLAGS]
    two = given_once([*flags, "--accumulation-steps", "2", "--out", "two"])
    done = torchrun(folder, folder / "launch.py", *two)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*flags, "--out", "one"])
    return folder


def test_mean_of_rank_means(two_ranks):
    """DDP averages over ranks: each divided by its own tokens, the ranks' gradients are a mean of
    means again."""
    for name, off in (("grad_norm", 1e-4), ("loss", 1e-5)):
        one = column(two_ranks / "one", name)
        assert column(two_ranks / "two", name) == pytest.approx(one, rel=off)


def test_no_sync_placement(two_ranks):
    """no_sync takes effect in forward: around backward alone, or on the wrong micro-batch, every
    one is reduced, or none."""
    for rank in (0, 1):
        n_steps = (two_ranks / f"notes{rank}").read_text().count("reduced")
        assert n_steps == 4
    one = column(two_ranks / "one", "grad_norm")
    assert column(two_ranks / "two", "grad_norm") == pytest.approx(one, rel=1e-4)


def test_freeze_after_wrapping(two_ranks):
    """DDP waits for a gradient of all that was trainable as it wrapped; frozen afterwards, the
    second step fails."""
    assert len(metrics(two_ranks / "two")) == 4


def test_evaluation_through_the_wrapper(two_ranks):
    """Held-out loss taken through DDP's wrapper, on one rank or on uneven shares, waits for ranks
    that never come."""
    for rank in (0, 1):
        notes = (two_ranks / f"notes{rank}").read_text()
        assert set(re.findall("evaluated (.*)", notes)) == {"Transformer"}
    one = column(two_ranks / "one", "val_loss")
    assert len(one) == 2
    assert column(two_ranks / "two", "val_loss") == pytest.approx(one, rel=1e-5)


# --- distillation

ONE_ANSWER = Batch(torch.tensor([[1, 3, 0, 2, 2, 2]]),
                   torch.tensor([[IGNORE, IGNORE, 0, 2, IGNORE, IGNORE]]), 2)
RANDOM_LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) / 10


def taught(logits, **settings):
    """Return the gradient at a student's logits, all 0, of distillation from these."""
    student = GivenLogits(torch.zeros_like(logits))
    Distillation(GivenLogits(logits), **settings)(student, ONE_ANSWER)[0].backward()
    return student.logits.grad


def test_soft_targets_grow_faint():
    """Softened by T, the teacher's gradients shrink as 1 / T^2: without that factor the answers
    alone are learnt at a high T."""
    mild, hot = (taught(RANDOM_LOGITS, temperature=T, weight=1.0).norm() for T in (2.0, 20.0))
    assert hot == pytest.approx(mild.item(), rel=0.1)


def test_soft_targets_of_padding():
    """A KL over all positions also trains on the prompt and padding, and more so in longer
    batches."""
    moved = taught(RANDOM_LOGITS, weight=1.0).any(-1)
    assert moved.tolist() == [False, True, True, False, False, False]


def test_a_word_that_the_teacher_rules_out():
    """A log-probability of -inf times its probability, 0, is NaN, and so is every gradient then."""
    logits = torch.zeros(6, 4)
    logits[:, 3] = -torch.inf
    log_p = torch.zeros(6, 4).log_softmax(-1)
    log_q = logits.log_softmax(-1)
    assert F.kl_div(log_p, log_q, log_target=True, reduction="sum").isnan()
    gradient = taught(logits, temperature=1.0, weight=1.0)[1]
    expected = torch.tensor([-1 / 12, -1 / 12, -1 / 12, 1 / 4], dtype=torch.float64)
    assert torch.allclose(gradient, expected)
