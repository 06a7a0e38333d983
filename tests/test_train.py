"""train.py: the step's arithmetic through the command line, careful with what is there.

That a step does not depend on how it is cut is in test_distributed.py.
"""
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import finetune.evaluate
import finetune.job
import generate
import train
from finetune.arguments import as_flag
from finetune.batches import DataCollatorForSupervisedDataset
from finetune.dataset import SupervisedDataset, load_datasets
from finetune.hardware import pick_hardware
from finetune.options import DEMO, parse_options
from finetune.ranks import SINGLE_PROCESS
from llama import load_checkpoint

from .helpers import EXAMPLES, adapter_tensors, contents, given_once, untimed

FIELDS = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "answer_tokens",
          "tokens_per_second", "peak_memory_mb", "loss_scale"]


@pytest.fixture
def watch(monkeypatch):
    """watch(see) has see(model, batch) called before each forward but the pre-flight's.

    It returns the list of what `see` returned.
    """
    def watch(see):
        seen = []

        def watched(function, model, batch):
            seen.append(see(model, batch))
            return function(model, batch)

        monkeypatch.setattr(finetune.job, "check_gradients", lambda *_: None)
        for module, name in ((finetune.job, "answer_loss"), (finetune.evaluate, "log_likelihoods")):
            monkeypatch.setattr(module, name, partial(watched, getattr(module, name)))
        return seen

    return watch


def same_adapters(*folders):
    """Tell whether runs in these folders left the same adapter, to the byte."""
    return len({Path(folder, "adapter.pt").read_bytes() for folder in folders}) == 1


def column(rows, name):
    return [row[name] for row in rows]


def base_loss(base, tokenizer):
    """Return the base's mean loss over the answer tokens of EXAMPLES."""
    model, _ = load_checkpoint(base)
    rows = SupervisedDataset(EXAMPLES, tokenizer).rows
    batch = DataCollatorForSupervisedDataset(2)(rows)
    logits = model(batch.tokens)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch.labels[:, 1:].flatten()).item()


# --- what a run computes and logs


def test_metrics_have_every_field_and_count_real_tokens(run, tokenizer):
    """Each example counts once per epoch, without padding."""
    rows = run("out", "--batch-size", "5", "--accumulation-steps", "2", "--epochs", "2",
               "--log-every", "100")
    data = SupervisedDataset(EXAMPLES, tokenizer).rows
    assert [list(row) for row in rows] == [FIELDS] * 4
    assert column(rows, "step") == [1, 2, 3, 4]
    assert column(rows, "epoch") == [0.5, 1.0, 1.5, 2.0]
    n_tokens = sum(len(tokens) for tokens, _ in data)
    n_prompt = sum(labels.count(-100) for _, labels in data)
    for epoch in (rows[:2], rows[2:]):
        assert sum(column(epoch, "tokens")) == n_tokens
        assert sum(column(epoch, "answer_tokens")) == n_tokens - n_prompt
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_first_loss_is_the_bases(run, base, tokenizer):
    row, = run("out", "--batch-size", "5", "--accumulation-steps", "3", "--epochs", "1")
    assert row["loss"] == pytest.approx(base_loss(base, tokenizer), rel=1e-5)


def test_held_out_loss_is_a_sum_by_a_count(run, watch, base, tokenizer, data):
    """No more tokens at a time than a micro-batch has."""
    seen = watch(lambda model, batch: batch)
    for n_tokens, n_groups in ((1, 24), (300, None), (3000, 2)):
        seen.clear()
        row, = run(str(n_tokens), "--val-data", str(data), "--tokens-per-batch", str(n_tokens),
                   "--max-steps", "1", "--lr", "1e-12")
        assert row["val_loss"] == pytest.approx(base_loss(base, tokenizer), rel=1e-5)
        groups = [batch for batch in seen if isinstance(batch, list)]
        # Before step 1 and after it.
        assert sum(map(len, groups)) == 24 and len(groups) == (n_groups or len(groups))
        for group in groups:
            size = sum(len(each.prompt) + len(each.answers[0]) for each in group)
            assert size <= n_tokens or len(group) == 1


def test_held_out_loss_is_measured_without_dropout_and_training_goes_on_with_it(run, data, watch):
    modes = watch(lambda model, batch: (model.training, torch.is_grad_enabled()))
    run("out", "--val-data", str(data), "--batch-size", "6", "--accumulation-steps", "2",
        "--epochs", "2")
    assert modes == ([(False, False)] + [(True, True)] * 2) * 2 + [(False, False)]


def test_held_out_loss_once_an_epoch_and_at_the_end(run, capsys):
    rows = run("out", "--val-fraction", "0.25", "--batch-size", "3", "--accumulation-steps", "1",
               "--max-steps", "8")
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6, 8]
    printed = capsys.readouterr().out
    assert " 9 examples, " in printed and "held out  examples.json: 3 examples" in printed


def test_what_is_held_out_and_trained_on_too_is_counted(run, data, tmp_path, capsys):
    half = json.loads(data.read_text())[:6]
    other = {"instruction": "Say nothing of this.", "output": "fine"}
    (tmp_path / "half.json").write_text(json.dumps([*half, other]))
    run("out", "--val-data", "half.json", "--max-steps", "1")
    assert "held out  half.json: 7 examples;" in (printed := capsys.readouterr().out)
    assert "; 6 of them are trained on too" in printed


def test_plain_text_is_counted_in_documents_and_rows(run, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("the cat sat on the mat " * 40)
    run("out", "--data", "book.txt", "--template", "text", "--max-seq-len", "32", "--max-steps",
        "1")
    line, = re.findall("data      (.*)", capsys.readouterr().out)
    assert re.fullmatch(r"book.txt: 1 document in \d+ rows, the longest has 32 tokens; rows of at "
                        r"most --max-seq-len 32", line)


def test_held_out_examples_are_not_trained_on(data, tokenizer):
    training, held_out = load_datasets([str(data)], None, 0.25, 512, 0, tokenizer)
    everything = SupervisedDataset(EXAMPLES, tokenizer).rows
    assert sorted([*training.rows, *held_out.rows]) == sorted(everything) and len(held_out) == 3


def test_beginnings_computed_once_change_nothing_but_the_rows(run, watch):
    """Steps of two micro-batches of up to 300 tokens; the first 30 or so are alike."""
    sizes = watch(lambda model, batch: batch.tokens.numel())
    flags = ["--tokens-per-batch", "300", "--accumulation-steps", "2", "--dropout", "0",
             "--epochs", "2"]
    plain = run("plain", *flags)
    n = len(sizes)
    shared = run("shared", *flags, "--share-prefix")
    assert max(sizes[:n]) <= 300 and sum(sizes[:n]) == sum(column(plain, "tokens"))
    assert all(size <= other for size, other in zip(sizes[n:], sizes[:n], strict=True))
    assert sum(sizes[n:]) < 0.9 * sum(sizes[:n])
    for row, other in zip(shared, plain, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert all(row[key] == other[key] for key in ("tokens", "answer_tokens", "epoch"))


def test_same_command_same_bytes(run):
    flags = ["--batch-size", "2", "--accumulation-steps", "2", "--epochs", "2", "--dropout", "0.1"]
    first = run("a", *flags)
    assert untimed(first) == untimed(run("b", *flags))
    assert untimed(first) != untimed(run("c", *flags, "--seed", "1"))
    assert same_adapters("a", "b")


# --- precision


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_stays_close_to_fp32(run, method):
    flags = ["--method", method, "--dropout", "0", "--epochs", "4", "--lr", "1e-3", "--precision"]
    exact = run("fp32", *flags, "fp32")
    rounded = run("bf16", *flags, "bf16")
    assert column(rounded, "loss") == pytest.approx(column(exact, "loss"), rel=0.02)
    assert set(column(rounded, "loss_scale")) == {1.0}


@pytest.mark.parametrize("flags, frozen", [
    (["--precision", "bf16"], {torch.bfloat16}),
    (["--precision", "fp32"], {torch.float32}),
    (["--precision", "bf16", "--method", "full"], set()),
])
def test_what_is_frozen_is_held_in_the_compute_dtype_and_what_is_trained_in_fp32(base, flags,
                                                                                 frozen):
    options = parse_options(given_once(["--checkpoint", str(base), "--r", "2", *flags]))
    job = finetune.job.prepare(options, SINGLE_PROCESS, train.build_optimizer)
    model, _ = finetune.job.load_model(job, torch.device("cpu"), "checkpoint")
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == frozen
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_fp16_scales_the_loss_and_a_step_that_overflows_moves_nothing(run, monkeypatch):
    """Infinity in the second step: no weight and no schedule moves, and the scale is halved."""
    flags = ["--precision", "fp16", "--epochs", "4", "--dropout", "0", "--batch-size", "4",
             "--accumulation-steps", "3"]
    plain = run("plain", *flags)
    assert column(plain, "loss_scale") == [65536.0] * 4
    answer_loss = finetune.job.answer_loss
    weights = []

    def planted(model, batch):
        loss, n = answer_loss(model, batch)
        parameters = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        weights.append(torch.cat(parameters))
        return loss * math.inf if len(weights) == 5 else loss, n

    monkeypatch.setattr(finetune.job, "answer_loss", planted)
    monkeypatch.setattr(finetune.job, "check_gradients", lambda *_: None)
    rows = run("planted", *flags)
    assert column(rows, "loss_scale") == [65536.0, 65536.0, 32768.0, 32768.0]
    first, second, third, fourth = weights[::3]
    assert torch.equal(second, third)
    assert not torch.equal(first, second) and not torch.equal(third, fourth)
    lr = column(plain, "lr")
    assert column(rows, "lr") == [lr[0], lr[1], lr[1], lr[2]]


@pytest.mark.parametrize("precision, dtype", [
    ("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_flags_reach_autocast_and_checkpointing(run, watch, precision, dtype):
    """Beside a base that is 16 bit already autocast has nothing to do."""
    def see(model, batch):
        is_enabled = torch.is_autocast_enabled("cpu")
        return torch.get_autocast_dtype("cpu") if is_enabled else None, model.checkpointing

    seen = watch(see)
    flags = ["--precision", precision, "--max-steps", "1", "--batch-size", "12"]
    run("plain", *flags)
    run("checkpointing", *flags, "--checkpointing")
    run("full", *flags, "--method", "full")
    assert seen == [(None, False), (None, True), (dtype, False)]


def test_fp32_products_may_round_in_the_run_that_lets_them_alone(run, watch):
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    seen = watch(lambda model, batch: [backend.fp32_precision for backend in backends])
    flags = ["--max-steps", "1", "--accumulation-steps", "1"]
    before = run("before", *flags)
    fast = run("fast", *flags, "--fast-matmul")
    assert untimed(run("after", *flags)) == untimed(before)
    assert seen == [["ieee", "ieee"], ["bf16", "tf32"], ["ieee", "ieee"]]
    assert fast[0]["loss"] == pytest.approx(before[0]["loss"], rel=1e-2)


def test_attention_never_takes_cudnn(run):
    """It makes a plan for each pair of lengths, and packed rows bring new ones in each batch."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    run("out", "--max-steps", "1")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_numbered_gpu_is_for_one_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="--device cuda:1 puts all ranks on one GPU: use --device"):
        pick_hardware("cuda:1", "bf16", local_rank=1)
    assert pick_hardware("cpu", None, local_rank=1) == (torch.device("cpu"), "fp32")


# --- optimizer and schedule


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(run, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **settings):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
        return step(self, *args, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    rows = run("clipped", "--clip-grad-norm", "0.01", "--max-steps", "2")
    norms = [norm for norm in norms if norm]         # without the estimate's trial step
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(column(rows, "grad_norm")) > 0.02
    run("never", "--clip-grad-norm", "0", "--max-steps", "2")
    run("hardly", "--clip-grad-norm", "1e9", "--max-steps", "2")
    assert same_adapters("never", "hardly")


def test_weight_decay_reaches_the_optimizer(run, tmp_path):
    sizes = []
    for out, decay in (("plain", "0"), ("decayed", "50")):
        run(out, "--max-steps", "2", "--weight-decay", decay)
        tensors = adapter_tensors(tmp_path / out)
        sizes.append(sum(t.norm() for name, t in tensors.items() if name.endswith("_A")))
    assert sizes[1] < 0.8 * sizes[0]


def test_schedule_and_warmup_flags(run):
    """By default 3 % of the steps warm up: of 50 it is 2."""
    flags = ["--batch-size", "1", "--accumulation-steps", "1", "--epochs", "5",
             "--val-fraction", "0.17"]
    rows = run("constant", *flags, "--schedule", "constant", "--warmup-steps", "3")
    assert column(rows, "lr") == pytest.approx([2.5e-3, 5e-3, 7.5e-3, *[1e-2] * 47])
    default = column(run("default", *flags), "lr")
    assert default[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2]) and default[-1] < 1e-4


def test_learning_rate_at_its_corners():
    def at(step, schedule="cosine"):
        return train.lr_factor(step, n_steps=100, warmup=10, schedule=schedule)

    assert 0 < at(0) < at(5) < at(9) < at(10) == 1.0
    assert at(55) == pytest.approx(0.5) and 0 < at(99) < 0.001 and at(100) == pytest.approx(0)
    assert at(0, "constant") == at(0) and at(10, "constant") == at(99, "constant") == 1.0
    assert train.lr_factor(0, n_steps=1, warmup=0, schedule="cosine") == 1.0


def test_the_plans_defaults():
    options = parse_options(["--checkpoint", "somewhere"])
    assert (options.r, options.alpha, options.dropout) == (16, 32, 0.05)
    assert (options.targets, options.max_seq_len) == (("wq", "wv"), 512)
    assert (options.accumulation_steps, options.lr, options.clip_grad_norm) == (8, 3e-4, 1.0)
    assert (options.weight_decay, options.epochs) == (0, 3)
    assert parse_options(["--checkpoint", "somewhere", "--method", "full"]).lr == 1e-5
    demo = parse_options(["--checkpoint", f"{DEMO}/"])
    assert (demo.lr, demo.epochs) == (5e-3, 4)       # as without --checkpoint


@pytest.mark.parametrize("name, value, words", [
    ("lr", 0.0, "--lr 0.0"), ("epochs", 1, "--epochs 1"), ("max_steps", None, "no --max-steps"),
    ("compile", True, "--compile"), ("checkpointing", False, "no --checkpointing"),
    ("targets", ["wq", "wv"], "--targets wq,wv"), ("data", ["a", "b"], "--data a b"),
    ("method_options", {"start": "pissa"}, "--method-options start=pissa"),
])
def test_a_setting_as_it_stands_on_the_command_line(name, value, words):
    assert as_flag(name, value) == words


# --- what is saved, and what is there already


def test_full_fine_tuning_and_random_weights(run, tmp_path, capsys):
    """The next run goes on where the saved weights are."""
    rows = run("full", "--method", "full", "--init", "random", "--epochs", "6",
               "--accumulation-steps", "1")
    assert rows[0]["loss"] == pytest.approx(math.log(400), rel=0.02)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert "parameters trained (100.00 %)" in capsys.readouterr().out
    model, _ = load_checkpoint(tmp_path / "full")
    assert model.norm.weight.dtype == torch.float32
    assert not (tmp_path / "full/adapter.pt").exists()
    again = run("again", "--checkpoint", "full", "--method", "full", "--max-steps", "1",
                "--lr", "1e-9")
    assert again[0]["loss"] < 1.2 * rows[-1]["loss"]


def test_a_full_model_is_saved_as_it_was_measured(run, data, capsys):
    """In fp32 whatever it computed in: at 1e-5 a step, bf16 would keep a third of the update."""
    flags = ["--method", "full", "--val-data", str(data), "--precision", "bf16"]
    rows = run("full", *flags, "--max-steps", "3", "--lr", "1e-5")
    capsys.readouterr()
    run("next", *flags, "--checkpoint", "full", "--max-steps", "1")
    before = capsys.readouterr().out.split("before    held-out loss ")[1].split()[0]
    assert float(before) == pytest.approx(rows[-1]["val_loss"], abs=5e-5)


@pytest.mark.parametrize("flags", [[], ["--method", "full"]])
def test_what_is_printed_next_runs(run, capsys, flags):
    run("named", *flags, "--max-steps", "1")
    command = capsys.readouterr().out.split("python generate.py ")[1].splitlines()[0].split()
    generate.main([*command, "--max-new-tokens", "1", "--instruction", "Say"])


@pytest.fixture
def flags(base, data, tmp_path, monkeypatch):
    """The flags of a run of one step whose --out is the default, ./out."""
    monkeypatch.chdir(tmp_path)
    return ["--checkpoint", str(base), "--data", str(data), "--max-steps", "1"]


def test_the_last_adapter_stays_until_the_next_is_complete(flags, monkeypatch):
    flags = [*flags[:-1], "2"]
    train.main(flags)
    adapter = Path("out/adapter.pt")
    before = adapter.read_bytes()

    def interrupted(updates, *_):
        if updates == 1:
            raise KeyboardInterrupt
        return 1.0

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_factor", interrupted)
        train.main([*flags, "--method", "full"])
    assert adapter.read_bytes() == before
    train.main([*flags, "--method", "full"])
    assert not adapter.exists() and Path("out/params.json").exists()
    train.main(flags)
    assert adapter.read_bytes() == before and not Path("out/params.json").exists()


def test_the_default_out_is_replaced_but_by_no_run_that_is_refused(flags):
    train.main(flags)
    first = contents("out")
    train.main([*flags, "--seed", "1"])
    before = contents("out")
    assert before["adapter.pt"] != first["adapter.pt"]
    for wrong in (["--targets", "wz"], ["--r", "999"], ["--layers", "9"], ["--data", "nowhere"]):
        with pytest.raises(SystemExit, match="2"):
            train.main([*flags, *wrong])
    assert contents("out") == before


def test_the_base_is_never_replaced_by_its_own_run(flags, base):
    """A base that stands in ./out, the default of --out, by whatever way it came there."""
    base.rename("out")
    before = contents("out")
    for words in (["--checkpoint", "out", *flags[2:]], flags[2:]):
        with pytest.raises(SystemExit, match="2"):
            train.main(words)
        assert contents("out") == before
