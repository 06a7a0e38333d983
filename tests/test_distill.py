"""Soft targets by the paper's equation, a teacher that stays as it is, a recurrent student."""
import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import finetune.job
import generate
import train
from finetune.batches import Batch, DataCollatorForSupervisedDataset, pack
from finetune.dataset import IGNORE, load_datasets
from finetune.distill import Distillation
from finetune.evaluate import score_answers
from finetune.folder import prepare_folder
from finetune.loss import CHUNK, answer_loss
from finetune.options import parse_options
from llama import ModelArgs, Tokenizer, Transformer, load_checkpoint, save_checkpoint
from llama.rnn import KINDS, RNN, RNNArgs
from lora import LoRAConfig, add_lora, merge_lora

from .helpers import GivenLogits, adapt, given_once, metrics, tiny, torchrun
from .memory import LiveBytes
from .test_layout import drawn
from .test_preflight import batch_of, estimate
from .test_resume import left, stop

def teacher():
    """Return a model of other weights and sizes than the student's, tiny(n_kv_heads=2)."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(dim=48, n_layers=1, n_heads=2, vocab_size=400, multiple_of=16))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def rnn(kind, **sizes):
    torch.manual_seed(0)
    model = RNN(RNNArgs(rnn=kind, **({"dim": 24, "n_layers": 2, "vocab_size": 400} | sizes)))
    model.init_weights()
    for name, weight in model.named_parameters():
        if not name.startswith("layers"):
            torch.nn.init.normal_(weight, std=0.5)
    return model


def gradient(batches, loss_fn, model, checkpointing=False):
    """Return (sum of the losses, gradient of their mean over answer tokens) in fp64."""
    model.double().checkpointing = checkpointing
    total = sum(loss_fn(model, batch)[0] for batch in batches)
    (total / sum(batch.n_answer for batch in batches)).backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def padded(rows):
    return DataCollatorForSupervisedDataset(0)(rows)


def fp64(rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- the equation


def test_two_tokens_of_three_words_by_hand():
    """T = 2, w = 1/4, with q = softmax(z / 2):

    token 1, target 1: z_s = (0, 0, 0), so p_s = q_s = (1/3, 1/3, 1/3);
        z_t = (2 ln 2, 0, 0), so q_t = (1/2, 1/4, 1/4)
        CE = ln 3;  KL = 1/2 ln(3/2) + 2/4 ln(3/4) = 1/2 ln(9/8)
    token 2, target 0: z_s = (2 ln 3, 0, 0), so p_s = (9, 1, 1) / 11, q_s = (3, 1, 1) / 5;
        z_t = (0, 0, 2 ln 2), so q_t = (1, 1, 2) / 4
        CE = ln(11/9);  KL = 1/4 ln(5/12) + 1/4 ln(5/4) + 1/2 ln(5/2) = 1/4 ln(625/192)
    L = 3/4 CE + 1/4 4 KL;  dL/dz_s = 3/4 (p_s - onehot) + 1/4 2 (q_s - q_t)
    """
    student = GivenLogits([[0, 0, 0], [2 * math.log(3), 0, 0], [0, 0, 0]])
    guide = GivenLogits([[2 * math.log(2), 0, 0], [0, 0, 2 * math.log(2)], [0, 0, 0]])
    batch = Batch(torch.tensor([[2, 1, 0]]), torch.tensor([[IGNORE, 1, 0]]), 2)
    loss, n = Distillation(guide, temperature=2, weight=1 / 4)(student, batch)
    loss.backward()
    hard = math.log(3) + math.log(11 / 9)
    soft = 2 * math.log(9 / 8) + math.log(625 / 192)
    assert n == 2 and loss.item() == pytest.approx(3 / 4 * hard + 1 / 4 * soft, rel=1e-14)
    p_minus_target = fp64([[1 / 3, -2 / 3, 1 / 3], [-2 / 11, 1 / 11, 1 / 11]])
    q_minus_q = fp64([[-1 / 6, 1 / 12, 1 / 12], [7 / 20, -1 / 20, -3 / 10]])
    expected = 3 / 4 * p_minus_target + 1 / 2 * q_minus_q
    assert torch.allclose(student.logits.grad[:2], expected, rtol=1e-13)


def test_the_corners_of_temperature_and_weight():
    """w 0 is the plain loss to the bit; w 1, T 1 has the gradient p_s - p_t; a high T matches
    logits, each less its mean: T^2 KL -> |z_s - z_t|^2 / 2V (the paper's section 2.1)."""
    torch.manual_seed(0)
    batches = [padded(drawn(5)), padded(drawn(3, seed=1))]
    plain = gradient(batches, answer_loss, tiny(n_kv_heads=2))
    unweighted = gradient(batches, Distillation(teacher().double(), 3, 0), tiny(n_kv_heads=2))
    assert unweighted[0] == plain[0] and torch.equal(unweighted[1], plain[1])
    z_s, z_t = torch.randn(2, 1, 9, dtype=torch.float64)
    z_s = (3 * (z_s - z_s.mean())).requires_grad_()
    z_t = 3 * (z_t - z_t.mean())
    target = torch.tensor([4])
    Distillation(GivenLogits(z_t), 1, 1).loss(z_s, target, z_t).backward()
    assert torch.allclose(z_s.grad, z_s.softmax(-1) - z_t.softmax(-1), rtol=1e-12)
    high = Distillation(GivenLogits(z_t), 1e4, 1).loss(z_s, target, z_t)
    assert high.item() == pytest.approx(((z_s - z_t) ** 2).sum().item() / 18, rel=1e-3)


def test_equal_to_the_equation_written_out_at_answer_tokens_alone():
    batch = padded(drawn(6))
    T = 3.0
    w = 0.7
    student = tiny(n_kv_heads=2).double()
    guide = teacher().double()
    z_s = student(batch.tokens)
    z_t = guide(batch.tokens)
    expected = 0.0
    for b, t in (batch.labels[:, 1:] != IGNORE).nonzero().tolist():      # t predicts token t + 1
        q_s = (z_s[b, t] / T).softmax(-1)
        q_t = (z_t[b, t] / T).softmax(-1)
        hard = -z_s[b, t].log_softmax(-1)[batch.labels[b, t + 1]]
        expected += (1 - w) * hard + w * T ** 2 * (q_t * (q_t / q_s).log()).sum()
    loss, n = Distillation(guide, T, w)(student, batch)
    assert torch.allclose(loss, expected, rtol=1e-12) and n == batch.n_answer


@pytest.mark.parametrize("loss_fn, kind, off", [
    (None, None, 1e-12),
    (None, "gru", 1e-11), (None, "lstm", 1e-11),
    (answer_loss, "gru", 1e-11), (answer_loss, "lstm", 1e-11),
])
def test_however_it_is_cut_packed_or_checkpointed_the_gradient_is_the_same(loss_fn, kind, off):
    """By distillation or the plain loss, of a transformer and of recurrent students."""
    student = partial(rnn, kind) if kind else partial(tiny, n_kv_heads=2)
    loss_fn = loss_fn or Distillation(teacher().double(), 2, 0.5)
    rows = drawn(8)
    loss, expected = gradient([padded(rows)], loss_fn, student())
    for batches, checkpointing in (
            ([padded(rows[:3]), padded(rows[3:])], False),
            ([pack(rows)], False),
            ([pack(rows, share_prefix=True)], False),
            ([pack(rows[:5], share_prefix=True), pack(rows[5:])], True)):
        other_loss, other = gradient(batches, loss_fn, student(), checkpointing)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        assert (other - expected).norm() <= off * expected.norm()


def test_a_batch_without_answer_tokens_is_zero_and_connected():
    model = tiny()
    batch = padded(drawn(2))
    masked = Batch(batch.tokens, torch.full_like(batch.labels, IGNORE), 0)
    loss, n = Distillation(teacher())(model, masked)
    loss.backward()
    assert loss.item() == n == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


# --- the teacher


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_teacher_stays_as_it_is_and_gives_its_logits_by_chunks(method):
    guide = teacher().bfloat16()
    if method == "lora":
        add_lora(guide, LoRAConfig(r=2, dropout=0.5, targets="all"))
    before = copy.deepcopy(guide.state_dict())
    loss_fn = Distillation(guide.train())
    seen = []
    loss_fn.head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    model = tiny().bfloat16().train()
    batch = padded(drawn(5) * 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        loss, _ = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
    head = {f"output.{name}": tensor for name, tensor in loss_fn.head.state_dict().items()}
    after = guide.state_dict() | head
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    parameters = [*guide.parameters(), *loss_fn.head.parameters()]
    assert not any(p.requires_grad for p in parameters) and not guide.training
    assert guide(batch.tokens).shape[-1] == 48       # what its last layer reads, and no logits
    n_chunks = math.ceil(batch.n_answer / CHUNK)
    assert n_chunks > 2 and len(seen) == 2 * 2 * n_chunks        # in backward again
    for logits in seen:
        assert logits.shape[0] <= CHUNK and logits.dtype == torch.bfloat16
        assert not logits.requires_grad
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dim, vocab, batch", [
    (48, 400, (4, 64, 24)), (256, 400, (4, 200, 4)), (32, 8000, (2, 64, 30))],
    ids=["both", "the teacher's forward", "head"])
def test_the_estimate_is_what_two_steps_allocate(dim, vocab, batch):
    batch = batch_of(*batch)
    args = ModelArgs(dim=dim, n_layers=2, n_heads=2, vocab_size=vocab, multiple_of=32)
    guide = Distillation(Transformer(args))
    model = tiny(vocab_size=vocab)
    kinds, _ = estimate(model, add_lora(model, LoRAConfig(r=2, dropout=0)), batch, "fp32")
    kinds |= guide.memory(batch.tokens.numel(), batch.n_answer, 4,
                          kinds["activations"] + kinds["logits"])
    weights = [list(part.parameters()) for part in (model, guide.teacher, guide.head)]
    with LiveBytes([*weights, *batch[:2]]) as memory:
        for _ in range(2):
            guide(model, batch)[0].backward()
    assert sum(kinds.values()) == pytest.approx(memory.peak, rel=0.12)


def test_a_merged_adapter_or_another_scale_makes_another_teacher(base, tokenizer, tmp_path):
    """Its norm and embedding, all that a base's fingerprint is of, may be the base's own."""
    def adapted(alpha):
        model, _ = load_checkpoint(base)
        torch.manual_seed(0)
        return adapt(model, r=2, alpha=alpha)

    merged = adapted(2)
    merge_lora(merged)
    save_checkpoint(merged, tokenizer, tmp_path / "merged")
    plain, _ = load_checkpoint(base)
    loaded, _ = load_checkpoint(tmp_path / "merged")
    assert loaded.origin["fingerprint"] == plain.origin["fingerprint"]
    models = (plain, loaded, adapted(2), adapted(4), adapted(2))
    prints = [Distillation(model).fingerprint() for model in models]
    assert len(set(prints)) == 4 and prints[2] == prints[4]


# --- runs with a teacher


@pytest.fixture
def run(run, tmp_path, tokenizer):
    """conftest's, with teacher/ in tmp_path."""
    guide = tiny(tokenizer.vocab_size, dim=48, n_layers=1)
    save_checkpoint(guide, tokenizer, tmp_path / "teacher")
    return run


TAUGHT = ["--teacher", "teacher"]


def stop_within(step, run, *flags):
    """Run into part/ until a signal stops it within a step."""
    begin_step = train.begin_step

    def stopping(model, number, *rest):
        if number == step:
            stop()
        return begin_step(model, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "begin_step", stopping)
        with pytest.raises(SystemExit, match="130"):
            run("part", *flags)


def test_a_run_with_a_teacher(run, tmp_path, capsys):
    """Weight 0 is the run without a teacher, to the bit; an adapter makes it another."""
    two = ("--max-steps", "2")
    plain = run("plain", *two)
    unweighted = run("unweighted", *TAUGHT, "--distill-weight", "0", *two)
    adapters = [(tmp_path / out / "adapter.pt").read_bytes() for out in ("plain", "unweighted")]
    assert adapters[0] == adapters[1] and plain[0]["loss"] == unweighted[0]["loss"]
    capsys.readouterr()
    half = run("half", *TAUGHT, *two)
    printed = capsys.readouterr().out
    assert "teacher   teacher: 1 layer, fp32; temperature 2, 50 % of the loss" in printed
    itself = ["--teacher", "base"]
    adapted = run("adapted", *itself, "--teacher-adapter", "plain/adapter.pt", *two)
    bare = run("bare", *itself, *two)
    assert len({rows[0]["loss"] for rows in (plain, half, adapted, bare)}) == 4
    every = run("every", *TAUGHT, "--layers", "1", "--method", "full", "--precision", "bf16",
                "--checkpointing", "--share-prefix", "--tokens-per-batch", "512",
                "--accumulation-steps", "1", "--max-steps", "6", "--distill-weight", "1",
                "--val-fraction", "0.2")
    assert every[-1]["loss"] < 0.8 * every[0]["loss"] and "val_loss" in every[-1]
    # Of a dry run no weight is read.
    dry = ["--checkpoint", "base", *itself, "--teacher-adapter", "plain/adapter.pt", "--dry-run"]
    capsys.readouterr()
    train.main(dry)
    assert "warning" not in capsys.readouterr().out
    train.main([*dry, "--template", "llama2"])
    line = ("warning   the teacher's adapter was trained with the template 'alpaca', and this run "
            "has 'llama2'\n")
    assert line in capsys.readouterr().out


def test_a_run_with_a_teacher_goes_on_to_the_byte_and_with_no_other(run, capsys):
    run("trained", "--max-steps", "1")
    flags = ["--batch-size", "4", "--accumulation-steps", "1", "--epochs", "2"]
    adapter = ["--teacher-adapter", "trained/adapter.pt"]
    taught = ["--teacher", "base", *adapter]
    run("whole", *flags, *taught)
    stop_within(4, run, *flags, *taught)
    shutil.copytree("base", "moved")
    for other, message in (
            (["--teacher", "base"], "it was begun with another teacher"),
            ([*taught, "--distill-temperature", "3"], "--distill-temperature 2.0, now 3.0")):
        with pytest.raises(SystemExit, match="2"):
            run("part", *flags, *other, "--resume")
        assert message in capsys.readouterr().err
    run("part", *flags, "--teacher", "moved", *adapter, "--resume")
    assert left("part") == left("whole")


def test_what_cannot_teach_ends_in_one_line(run, tmp_path, data, tokenizer, refused):
    names = [tokenizer.sp.id_to_piece(i).encode() for i in range(tokenizer.vocab_size)]
    longest = max(names, key=len)
    other = Tokenizer(tokenizer.model.replace(longest, b"Z" * len(longest)))
    save_checkpoint(tiny(tokenizer.vocab_size), other, tmp_path / "other")
    (tmp_path / "teacher/args.json").write_text("{}")            # as if a run had made it
    before = (tmp_path / "teacher/consolidated.00.pth").read_bytes()
    common = ["--checkpoint", "base", "--data", str(data)]
    for flags, message in (
            ("--teacher other", "400, with other texts: distillation compares token by token"),
            ("--distill-weight 0.5", "need a --teacher"),
            ("--teacher teacher --out teacher --overwrite", "teacher holds the teacher")):
        assert message in refused(train.main, *common, *flags.split())
    assert (tmp_path / "teacher/consolidated.00.pth").read_bytes() == before
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_run_may_replace_what_no_teacher_needs(tmp_path, monkeypatch):
    """A folder of PEFT is the teacher's adapter itself; a file stands in the folder of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/peft").mkdir(parents=True)
    for adapter, out in (("out/peft", "out/peft"), ("out/adapter.pt", "out")):
        flags = ["--teacher", "teacher", "--teacher-adapter", adapter, "--overwrite", "--out", out]
        with pytest.raises(ValueError, match=f"{out} holds the teacher"):
            prepare_folder(parse_options(flags), Path(out), resumes=False)
    flags = ["--teacher", "teacher", "--teacher-adapter", "out/peft", "--out", "out"]
    prepare_folder(parse_options(flags), Path("out"), resumes=False)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(run, base, data, tmp_path):
    flags = ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--lr", "1e-2",
             "--dropout", "0", *TAUGHT, "--epochs", "3"]
    train.main([*flags, "--batch-size", "8", "--accumulation-steps", "1", "--out", "one"])
    done = torchrun(tmp_path, train.__file__, *flags, "--batch-size", "2",
                    "--accumulation-steps", "2", "--out", "two")
    assert done.returncode == 0, done.stderr
    pairs = zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True)
    for one, two in pairs:
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


# --- the student that is not a transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share_prefix", [False, True])
def test_a_recurrent_student_takes_packed_rows_as_it_takes_each_alone(kind, share_prefix):
    model = rnn(kind).double()
    batch = pack(drawn(6), share_prefix)
    packed = model(batch.tokens, layout=batch.layout)
    assert packed.shape == (1, batch.tokens.numel(), 400)
    pieces = batch.tokens.split([length for length, _ in batch.layout.segments], dim=1)
    begin = 0
    for i, (length, context) in enumerate(batch.layout.segments):
        row = torch.cat([pieces[j] for j in (*context, i)], 1)
        alone = model(row)[:, -length:]
        assert torch.allclose(packed[:, begin:begin + length], alone, atol=1e-12)
        begin += length


def test_rows_pick_logits_and_the_state_reads_from_left_to_right():
    model = rnn("lstm")
    tokens = torch.arange(12).view(2, 6)
    logits = model(tokens)
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    for rows in (mask, mask.flatten().nonzero().flatten()):
        assert torch.equal(model(tokens, rows=rows), logits[mask])
    changed = tokens.clone()
    changed[0, 3] = 99
    differ = (model(changed) != logits).any(-1)
    assert differ.tolist() == [[False] * 3 + [True] * 3, [False] * 6]


LSTM = {"rnn": "lstm", "dim": 32, "n_layers": 2}


@pytest.fixture
def lstm(tmp_path, tokenizer):
    """Flags of a run from a folder without weights, lstm/."""
    (tmp_path / "lstm").mkdir()
    (tmp_path / "lstm/tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / "lstm/params.json").write_text(json.dumps(LSTM))
    return ["--checkpoint", "lstm", "--init", "random", "--method", "full", "--lr", "3e-2",
            "--accumulation-steps", "1", "--batch-size", "12"]


def test_a_recurrent_student_is_trained_saved_asked_and_goes_on(run, lstm, data, tokenizer):
    flags = ["--val-data", str(data), *lstm, *TAUGHT, "--distill-weight", "0.1", "--epochs", "6"]
    train.main([*flags, "--data", str(data), "--out", "whole", "--dry-run"])
    rows = run("whole", *flags)
    assert rows[-1]["val_loss"] < 0.7 * rows[0]["loss"]
    stop_within(4, run, *flags)
    run("part", *flags, "--resume")
    assert left("part") == left("whole")
    model, _ = load_checkpoint("whole")
    assert isinstance(model, RNN)
    held_out, _ = load_datasets([str(data)], None, None, 512, 0, tokenizer)
    columns = score_answers(model, held_out.rows)
    loss = (columns["nats"].sum() / columns["tokens"].sum()).item()
    assert loss == pytest.approx(rows[-1]["val_loss"], rel=1e-5)
    generate.main(["--checkpoint", "whole", "--adapter", "none", "--instruction", "Say cold.",
                   "--max-new-tokens", "3"])
    noisy = run("noisy", *flags, "--neftune-alpha", "5")
    assert noisy[-1]["val_loss"] < 0.8 * rows[0]["loss"] and noisy[0]["loss"] != rows[0]["loss"]


@pytest.mark.parametrize("flags", [[], ["--method", "lora", "--targets", "output"]])
def test_a_recurrent_student_out_of_memory_ends_in_one_line(lstm, data, tmp_path, monkeypatch,
                                                            capsys, flags):
    """Which offers only what an RNN can use."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune.job, "answer_loss", full)
    with pytest.raises(SystemExit) as left:
        train.main(given_once([*lstm, "--data", str(data), *flags]))
    line = capsys.readouterr().err
    assert left.value.code == 3 and line.count("\n") == 1
    assert "--batch-size 6 --accumulation-steps 2 (by" in line
    assert "--method" not in line and "nf4" not in line


@pytest.mark.parametrize("params, message", [
    (LSTM | {"rnn": "elman"}, "must be gru or lstm"),
    (LSTM | {"n_heads": 4}, "'n_heads', which this model does not"),
    (LSTM, "no layer named wq, wv to adapt; the model has output, tok_embeddings"),
])
def test_what_is_no_recurrent_student_ends_in_one_line(refused, lstm, tmp_path, data, params,
                                                       message):
    (tmp_path / "lstm/params.json").write_text(json.dumps(params))
    random = ["--checkpoint", "lstm", "--init", "random", "--data", str(data)]
    assert message in refused(train.main, *random)
