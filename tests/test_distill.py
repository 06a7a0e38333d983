"""finetune/distill.py and llama/rnn.py: soft targets by the paper's equation, a teacher that stays as it is, a student that is no
transformer."""
import copy
import json
import math
import os
import shutil
import signal

import pytest
import torch

import generate
import train
from finetune import convert
from llama import ModelArgs, Tokenizer, Transformer, load_checkpoint, save_checkpoint
from finetune.batches import Batch, DataCollatorForSupervisedDataset
from finetune.dataset import IGNORE
from finetune.distill import Distillation
from finetune.evaluate import score_answers
from finetune.loss import answer_loss, CHUNK
from finetune.batches import pack
from finetune.dataset import load_datasets
from finetune.preflight import Size, estimate_memory
from llama.rnn import KINDS, RNN, RNNArgs
from lora import LoRAConfig, add_lora, merge_lora

from .helpers import metrics, tiny, torchrun
from .memory import LiveBytes
from .test_layout import drawn
from .test_resume import left, stopped_in


class Said(torch.nn.Module):
    """A model whose logits (R, V) are given, whatever it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.output = torch.nn.Parameter(torch.tensor(logits, dtype=torch.float64)), torch.nn.Identity()

    def forward(self, tokens, rows=None, layout=None):
        return self.output(self.logits)


def teacher():
    """Other weights and sizes than the student's, who is tiny(n_kv_heads=2)."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(dim=48, n_layers=1, n_heads=2, vocab_size=400, multiple_of=16))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def rnn(kind, **sizes):
    torch.manual_seed(0)
    model = RNN(RNNArgs(**{**dict(rnn=kind, dim=24, n_layers=2, vocab_size=400), **sizes}))
    model.init_weights()
    for name, weight in model.named_parameters():
        if not name.startswith("layers"):
            torch.nn.init.normal_(weight, std=0.5)
    return model


def gradient(batches, loss_fn, model=None):
    """(sum of the losses, gradient of their mean over answer tokens) in fp64."""
    model = (model or tiny(n_kv_heads=2)).double()
    losses = [loss_fn(model, batch)[0] for batch in batches]
    (sum(losses) / sum(batch.n_answer for batch in batches)).backward()
    return sum(losses).item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def padded(some):
    return DataCollatorForSupervisedDataset(0)(some)


def test_two_tokens_of_three_words_by_hand():
    """T = 2, w = 1/4, with q = softmax(z / 2):

    token 1, target 1: z_s = (0, 0, 0), so p_s = q_s = (1/3, 1/3, 1/3); z_t = (2 ln 2, 0, 0), so q_t = (1/2, 1/4, 1/4)
        CE = ln 3;  KL = 1/2 ln(3/2) + 2/4 ln(3/4) = 1/2 ln(9/8)
    token 2, target 0: z_s = (2 ln 3, 0, 0), so p_s = (9, 1, 1) / 11, q_s = (3, 1, 1) / 5; z_t = (0, 0, 2 ln 2), so q_t = (1, 1, 2) / 4
        CE = ln(11/9);  KL = 1/4 ln(5/12) + 1/4 ln(5/4) + 1/2 ln(5/2) = 1/4 ln(625/192)
    L = 3/4 CE + 1/4 4 KL;  dL/dz_s = 3/4 (p_s - onehot) + 1/4 2 (q_s - q_t)
    """
    student = Said([[0, 0, 0], [2 * math.log(3), 0, 0]])
    batch = Batch(torch.tensor([[2, 1, 0]]), torch.tensor([[IGNORE, 1, 0]]), 2)
    loss, n = Distillation(Said([[2 * math.log(2), 0, 0], [0, 0, 2 * math.log(2)]]), temperature=2, weight=1 / 4)(student, batch)
    loss.backward()
    by_hand = 3 / 4 * (math.log(3) + math.log(11 / 9)) + 1 / 4 * (2 * math.log(9 / 8) + math.log(625 / 192))
    assert n == 2 and loss.item() == pytest.approx(by_hand, rel=1e-14)
    assert torch.allclose(student.logits.grad, torch.tensor([
        [3 / 4 * 1 / 3 - 1 / 2 * 1 / 6, -3 / 4 * 2 / 3 + 1 / 2 * 1 / 12, 3 / 4 * 1 / 3 + 1 / 2 * 1 / 12],
        [-3 / 4 * 2 / 11 + 1 / 2 * 7 / 20, 3 / 4 * 1 / 11 - 1 / 2 * 1 / 20, 3 / 4 * 1 / 11 - 1 / 2 * 3 / 10]], dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("temperature, weight", [(1, 1), (2, 0.5), (7.5, 0.9)])
def test_the_gradient_is_the_losss(temperature, weight):
    torch.manual_seed(0)
    logits, theirs = 3 * torch.randn(5, 7, dtype=torch.float64).requires_grad_(), Said(3 * torch.randn(5, 7).numpy())
    loss_fn = Distillation(theirs, temperature, weight)
    assert torch.autograd.gradcheck(lambda z: loss_fn.loss(z, torch.tensor([0, 6, 2, 2, 5]), theirs.logits), logits)


def test_the_corners_of_temperature_and_weight():
    """w 0 is the plain loss to the bit; w 1, T 1 has the gradient p_s - p_t; a high T matches logits, each less its mean:
    T^2 KL -> |z_s - z_t|^2 / 2V (the paper's section 2.1)."""
    torch.manual_seed(0)
    batches = [padded(drawn(5)), padded(drawn(3, seed=1))]
    plain, ours = gradient(batches, answer_loss), gradient(batches, Distillation(teacher().double(), 3, 0))
    assert ours[0] == plain[0] and torch.equal(ours[1], plain[1])
    z_s, z_t = torch.randn(2, 1, 9, dtype=torch.float64)
    z_s, z_t = (3 * (z - z.mean()) for z in (z_s, z_t))
    z_s.requires_grad_()
    Distillation(Said(z_t.numpy()), 1, 1).loss(z_s, torch.tensor([4]), z_t).backward()
    assert torch.allclose(z_s.grad, z_s.softmax(-1) - z_t.softmax(-1), rtol=1e-12)
    high = Distillation(Said(z_t.numpy()), 1e4, 1).loss(z_s, torch.tensor([4]), z_t)
    assert high.item() == pytest.approx(((z_s - z_t) ** 2).sum().item() / 18, rel=1e-3)


def test_equal_to_the_equation_written_out_at_answer_tokens_alone():
    batch, T, w = padded(drawn(6)), 3.0, 0.7
    student, guide = tiny(n_kv_heads=2).double(), teacher().double()
    z_s, z_t, expected = student(batch.tokens), guide(batch.tokens), 0.0
    for b, t in (batch.labels[:, 1:] != IGNORE).nonzero().tolist():              # position t predicts token t + 1
        q_s, q_t = ((z[b, t] / T).softmax(-1) for z in (z_s, z_t))
        expected += -(1 - w) * z_s[b, t].log_softmax(-1)[batch.labels[b, t + 1]] + w * T ** 2 * (q_t * (q_t / q_s).log()).sum()
    ours, n = Distillation(guide, T, w)(student, batch)
    assert torch.allclose(ours, expected, rtol=1e-12) and n == batch.n_answer


def test_however_it_is_cut_packed_or_checkpointed_the_gradient_is_the_same():
    guide, rows = Distillation(teacher().double(), 2, 0.5), drawn(8)
    recomputing = tiny(n_kv_heads=2)
    recomputing.checkpointing = True
    whole, at_once = gradient([padded(rows)], guide)
    for batches, model in (([padded(rows[:4]), padded(rows[4:])], None), ([padded(rows[:3]), padded(rows[3:])], None),
                           ([pack(rows)], None), ([pack(rows, share_prefix=True)], None), ([pack(rows[:5], True), pack(rows[5:])], recomputing)):
        loss, other = gradient(batches, guide, model)
        assert loss == pytest.approx(whole, rel=1e-12) and (other - at_once).norm() <= 1e-12 * at_once.norm()


def test_a_batch_without_answer_tokens_is_zero_and_connected():
    batch = padded(drawn(2))
    model = tiny()
    loss, n = Distillation(teacher())(model, batch._replace(labels=torch.full_like(batch.labels, IGNORE), n_answer=0))
    loss.backward()
    assert loss.item() == n == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("lora", [None, dict(r=2, dropout=0.5, targets="all")], ids=["full", "lora"])
def test_the_teacher_stays_as_it_is_and_gives_its_logits_by_chunks(lora):
    guide, seen = teacher().bfloat16(), []
    if lora:
        add_lora(guide, LoRAConfig(**lora))
    before = copy.deepcopy(guide.state_dict())
    loss_fn = Distillation(guide.train())
    loss_fn.head.register_forward_hook(lambda module, args, logits: seen.append(logits))
    model, batch = tiny().bfloat16(), padded(drawn(5) * 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        loss, _ = loss_fn(model.train(), batch)
        loss.backward()
        optimizer.step()
    after = {**guide.state_dict(), **{f"output.{name}": tensor for name, tensor in loss_fn.head.state_dict().items()}}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for part in (guide, loss_fn.head) for p in part.parameters()) and not guide.training
    assert guide(batch.tokens).shape[-1] == 48                                   # what its last layer reads, and no logits
    assert batch.n_answer > 2 * CHUNK and len(seen) == 2 * 2 * -(-batch.n_answer // CHUNK)       # again in backward
    assert all(logits.shape[0] <= CHUNK and logits.dtype == torch.bfloat16 and not logits.requires_grad for logits in seen)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("sizes, batch", [((48, 400), (4, 64, 24)), ((256, 400), (4, 200, 4)), ((32, 8000), (2, 64, 30))],
                         ids=["both", "the teacher's forward", "head"])
def test_the_estimate_is_what_two_steps_allocate(sizes, batch):
    (dim, vocab), (B, T, answers) = sizes, batch
    tokens = torch.arange(B * T).view(B, T) % 400
    labels = tokens.clone()
    labels[:, :T - answers] = IGNORE
    guide = Distillation(Transformer(ModelArgs(dim=dim, n_layers=2, n_heads=2, vocab_size=vocab, multiple_of=32)))
    model = tiny(vocab_size=vocab)
    wrapped = add_lora(model, LoRAConfig(r=2, dropout=0))
    kinds, _ = estimate_memory(model, wrapped, Size(B * T, B * answers, 0), train.mixed_precision("fp32", torch.device("cpu"), None))
    kinds |= guide.memory(B * T, B * answers, 4, kinds["activations"] + kinds["logits"])
    with LiveBytes([list(part.parameters()) for part in (model, guide.teacher, guide.head)] + [tokens, labels]) as memory:
        for _ in range(2):
            guide(model, Batch(tokens, labels, B * answers))[0].backward()
    assert sum(kinds.values()) == pytest.approx(memory.peak, rel=0.12)


@pytest.fixture
def run(run, tmp_path, tokenizer):
    """conftest's, with teacher/ in tmp_path; the flags that name it are run.teacher."""
    save_checkpoint(teacher_of(tokenizer), tokenizer, tmp_path / "teacher")
    run.teacher = ["--teacher", "teacher"]
    return run


def teacher_of(tokenizer):
    return tiny(tokenizer.vocab_size, dim=48, n_layers=1)


def test_a_run_with_a_teacher(run, tmp_path, monkeypatch, capsys):
    """Weight 0 is the run without a teacher, to the bit; an adapter makes it another; first layers, full, everything at once."""
    plain, none = run("plain", "--max-steps", "2"), run("none", *run.teacher, "--distill-weight", "0", "--max-steps", "2")
    assert (tmp_path / "plain/adapter.pt").read_bytes() == (tmp_path / "none/adapter.pt").read_bytes()
    assert [row["loss"] for row in plain] == [row["loss"] for row in none]
    capsys.readouterr()
    half = run("half", *run.teacher, "--max-steps", "2")
    assert "teacher   teacher: 1 layer, fp32; temperature 2, 50 % of the loss" in (said := capsys.readouterr().out)
    estimate = float(said.split("teacher ")[-1].split()[0].rstrip(";"))
    assert estimate >= (tmp_path / "teacher/consolidated.00.pth").stat().st_size / 2 ** 20 - 0.1
    own = run("own", "--teacher", "base", "--teacher-adapter", "plain/adapter.pt", "--max-steps", "2")
    bare = run("bare", "--teacher", "base", "--max-steps", "2")
    assert len({rows[0]["loss"] for rows in (plain, half, own, bare)}) == 4
    every = run("every", *run.teacher, "--layers", "1", "--method", "full", "--precision", "bf16", "--checkpointing", "--share-prefix",
                "--tokens-per-batch", "512", "--accumulation-steps", "1", "--max-steps", "6", "--distill-weight", "1", "--val-fraction", "0.2")
    assert every[-1]["loss"] < 0.8 * every[0]["loss"] and "val_loss" in every[-1]
    train.main(["--checkpoint", "base", "--teacher", "base", "--teacher-adapter", "plain/adapter.pt", "--dry-run"])      # no weight is read


def test_a_run_with_a_teacher_goes_on_to_the_byte_and_with_no_other(run, tmp_path, capsys):
    run("trained", "--max-steps", "1")
    flags = ["--checkpoint", "base", "--data", str(tmp_path / "examples.json"), "--r", "4", "--lr", "1e-2", "--batch-size", "4",
             "--accumulation-steps", "1", "--epochs", "2"]
    taught = ["--teacher", "base", "--teacher-adapter", "trained/adapter.pt"]
    train.main([*flags, *taught, "--out", "whole"])
    assert stopped_before(4, [*flags, *taught, "--out", "part"]) == 130
    shutil.copytree("base", "moved")
    for other, why in (["--teacher", "base"], "it was begun with another teacher"), (["--teacher", "teacher"], "another teacher"), \
            ([], "--distill-weight 0.5, now None"), ([*taught, "--distill-temperature", "3"], "--distill-temperature 2.0, now 3.0"):
        with pytest.raises(SystemExit, match="2"):
            train.main([*flags, *other, "--out", "part", "--resume"])
        assert why in capsys.readouterr().err
    train.main([*flags, "--teacher", "moved", *taught[2:], "--out", "part", "--resume"])
    assert left("part") == left("whole")


def stopped_before(step, argv):
    """Exit code of a run that is told to stop within that step: test_state's, through a teacher's loss_fn."""
    honest, calls = Distillation.__call__, []

    def told(self, model, batch):
        if model.training:
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, model, batch)
    Distillation.__call__ = told
    try:
        return stopped_in(argv, math.inf)
    finally:
        Distillation.__call__ = honest


def test_what_cannot_teach_ends_in_one_line(run, tmp_path, capsys, tokenizer):
    save_checkpoint(tiny(tokenizer.vocab_size + 3), tokenizer, tmp_path / "wider")
    longest = max((tokenizer.sp.id_to_piece(i).encode() for i in range(tokenizer.vocab_size)), key=len)
    save_checkpoint(teacher_of(tokenizer), Tokenizer(tokenizer.model.replace(longest, b"Z" * len(longest))), tmp_path / "other")
    (tmp_path / "teacher/args.json").write_text("{}")                            # as if a run had made it
    for flags, why in ((["--teacher", "other"], "400, with other texts: distillation compares token by token"), (["--teacher", "wider"], "with the same texts"),
                       (["--distill-weight", "0.5"], "need a --teacher"), (["--teacher-adapter", "a.pt"], "need a --teacher"),
                       (["--teacher", "nowhere"], "no checkpoint folder at nowhere"), (["--teacher", "base", "--teacher-adapter", "no.pt"], "no.pt"),
                       ([*run.teacher, "--distill-temperature", "1e-40"], "at least 0.01 and at most 1000"), ([*run.teacher, "--distill-weight", "1.1"], "at most 1"),
                       ([*run.teacher, "--out", "teacher", "--overwrite"], "teacher holds the teacher")):
        before = (tmp_path / "teacher/consolidated.00.pth").read_bytes()
        with pytest.raises(SystemExit, match="2"):
            run("refused", *flags)
        err = capsys.readouterr().err
        assert why in err and len(err.splitlines()) == 1
        assert (tmp_path / "teacher/consolidated.00.pth").read_bytes() == before
    assert not (tmp_path / "refused/metrics.jsonl").exists()
    (tmp_path / "inside").mkdir()
    os.chdir("inside")                                           # above where it is called: no teacher's folder for that
    train.main(["--checkpoint", "../base", "--data", str(tmp_path / "examples.json"), "--teacher", "../teacher", "--out", "..", "--dry-run"])


def test_a_merged_adapter_or_another_scale_makes_another_teacher(base, tokenizer, tmp_path):
    """The merged one's norm and embedding, all that a base's fingerprint is of, are the base's own."""
    def loaded(folder, alpha=None):
        model = load_checkpoint(folder)[0]
        if alpha:
            add_lora(model, LoRAConfig(r=2, alpha=alpha, dropout=0))
            for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
                torch.nn.init.constant_(weight, 0.1)
        return model
    merged = loaded(base, 2)
    merge_lora(merged)
    save_checkpoint(merged, tokenizer, tmp_path / "merged")
    assert loaded(tmp_path / "merged").origin["fingerprint"] == merged.origin["fingerprint"]
    known = [Distillation(loaded(*of)).fingerprint() for of in ([base], [tmp_path / "merged"], [base, 2], [base, 4], [base, 2])]
    assert len(set(known)) == 4 and known[2] == known[4]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(run, base, data, tmp_path):
    flags = ["--checkpoint", base, "--data", data, "--r", "4", "--lr", "1e-2", "--dropout", "0", *run.teacher, "--epochs", "3"]
    train.main([*map(str, flags), "--batch-size", "8", "--accumulation-steps", "1", "--out", "one"])
    done = torchrun(tmp_path, train.__file__, *flags, "--batch-size", "2", "--accumulation-steps", "2", "--out", "two")
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5)


# ---- the student that is not a transformer

@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_student_takes_packed_rows_as_it_takes_each_alone(kind):
    """Logits to 1e-12, with what examples share too; loss and gradients are the padded ones."""
    model, rows = rnn(kind).double(), drawn(6)
    for share_prefix in False, True:
        batch = pack(rows, share_prefix)
        packed = model(batch.tokens, layout=batch.layout)
        assert packed.shape == (1, batch.tokens.numel(), 400)
        begin = 0
        for i, (length, context) in enumerate(batch.layout.segments):
            spans = [slice(sum(n for n, _ in batch.layout.segments[:j]), sum(n for n, _ in batch.layout.segments[:j + 1])) for j in (*context, i)]
            alone = model(torch.cat([batch.tokens[:, span] for span in spans], 1))[:, -length:]
            assert torch.allclose(packed[:, begin:begin + length], alone, atol=1e-12)
            begin += length
    for loss_fn in answer_loss, Distillation(teacher().double()):
        recomputing = rnn(kind)
        recomputing.checkpointing = True
        loss, at_once = gradient([padded(rows)], loss_fn, rnn(kind))
        for batches, student in (([pack(rows)], rnn(kind)), ([pack(rows, True)], rnn(kind)), ([pack(rows[:4], True), pack(rows[4:])], recomputing)):
            other, own = gradient(batches, loss_fn, student)
            assert other == pytest.approx(loss, rel=1e-12) and (own - at_once).norm() <= 1e-11 * at_once.norm()


def test_rows_pick_logits_and_the_state_reads_from_left_to_right():
    model, tokens = rnn("lstm"), torch.arange(12).view(2, 6)
    logits, mask = model(tokens), torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(model(tokens, rows=mask), logits[mask])
    assert torch.equal(model(tokens, rows=mask.flatten().nonzero().flatten()), logits[mask])
    changed = tokens.clone()
    changed[0, 3] = 99
    apart = (model(changed) != logits).any(-1)
    assert apart.tolist() == [[False] * 3 + [True] * 3, [False] * 6]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_can_be_had_in_eval_mode(kind):
    """As the check before step 1 has it: cuDNN refuses that of an rnn which is not in training mode."""
    model = rnn(kind).train().eval()
    assert not model.training and all(module.training for module in model.modules() if isinstance(module, torch.nn.RNNBase))


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_of_a_recurrent_student(kind):
    model, tokens = rnn(kind, dim=64, n_layers=3), torch.arange(400).view(10, 40)
    labels = tokens.clone()
    labels[:, :32] = IGNORE
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with LiveBytes([list(model.parameters()), tokens, labels]) as memory:
        for _ in range(2):
            answer_loss(model, Batch(tokens, labels, 80))[0].backward()
            answer_loss(model, Batch(tokens, labels, 80))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    kinds, _ = estimate_memory(model, [], Size(400, 80, 0), train.mixed_precision("fp32", torch.device("cpu"), None))
    assert sum(kinds.values()) == pytest.approx(memory.peak, rel=0.12)


@pytest.fixture
def lstm(tmp_path, tokenizer):
    (tmp_path / "lstm").mkdir()
    (tmp_path / "lstm/tokenizer.model").write_bytes(tokenizer.model)
    (tmp_path / "lstm/params.json").write_text(json.dumps({"rnn": "lstm", "dim": 32, "n_layers": 2}))
    return ["--checkpoint", "lstm", "--init", "random", "--method", "full", "--lr", "3e-2", "--accumulation-steps", "1", "--batch-size", "12"]


def test_a_recurrent_student_is_trained_saved_asked_and_goes_on(run, lstm, tmp_path, data):
    flags = ["--data", str(data), "--val-data", str(data), *lstm, *run.teacher, "--distill-weight", "0.1", "--epochs", "10"]
    train.main([*flags, "--out", "whole", "--dry-run"])           # no weight is read, so there is nothing to compute with
    train.main([*flags, "--out", "whole"])
    rows = metrics(tmp_path / "whole")
    assert rows[-1]["val_loss"] < 0.7 * rows[0]["loss"]
    assert stopped_before(8, [*flags, "--out", "part"]) == 130
    train.main([*flags, "--out", "part", "--resume"])
    assert left("part") == left("whole")
    model, tokenizer = load_checkpoint("whole")
    assert isinstance(model, RNN) and model.origin["fingerprint"] != load_checkpoint("teacher")[0].origin["fingerprint"]
    columns = score_answers(model, load_datasets([str(data)], None, None, 512, 0, tokenizer)[0].rows)
    assert (columns["nats"].sum() / columns["tokens"].sum()).item() == pytest.approx(rows[-1]["val_loss"], rel=1e-5)
    assert load_checkpoint("whole", layers=1)[0].args.n_layers == 1
    generate.main(["--checkpoint", "whole", "--adapter", "none", "--instruction", "Say cold.", "--max-new-tokens", "3"])


def test_what_is_no_recurrent_student_ends_in_one_line(run, lstm, tmp_path, capsys):
    whole = {"rnn": "lstm", "dim": 32, "n_layers": 2}
    for params, why in ((whole | {"rnn": "elman"}, "must be gru or lstm"), (whole | {"n_heads": 4}, "'n_heads', which this model does not support"),
                        ({"rnn": "lstm", "dim": 32}, "lacks ['n_layers']"), (whole | {"rnn": 3}, "rnn is 3"), (whole | {"dim": 0}, "dim is 0"),
                        (whole, "no layer named wq, wv to adapt; the model has output, tok_embeddings")):
        (tmp_path / "lstm/params.json").write_text(json.dumps(params))
        with pytest.raises(SystemExit, match="2"):
            run("refused", "--checkpoint", "lstm", "--init", "random")
        err = capsys.readouterr().err
        assert why in err and len(err.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        run("refused", "--checkpoint", "lstm", "--init", "random", "--targets", "output", "--quantize", "nf4")
    assert capsys.readouterr().err == "train.py: lstm is not a transformer: its blocks cannot be quantised to nf4\n"
    run("made", *lstm, "--max-steps", "1")
    for layout in "hf", "peft":
        with pytest.raises(SystemExit, match="2"):
            convert.main(["made", "converted", "--to", layout, *["--adapter", "a.pt"] * (layout == "peft")])
        assert "made is not a transformer" in capsys.readouterr().err
