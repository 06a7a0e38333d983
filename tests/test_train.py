"""train.py: the step's arithmetic through the command line, reproducible to the byte, careful with what is there."""
import json
import math

import pytest
import torch

import generate
import finetune.evaluate
import train
from llama import load_checkpoint
from finetune.batches import DataCollatorForSupervisedDataset
from finetune.dataset import read_examples, SupervisedDataset, load_datasets
from finetune.options import parse_options
from finetune.ranks import SINGLE_PROCESS

from .helpers import EXAMPLES, adapter_tensors, contents, untimed

FIELDS = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "answer_tokens", "tokens_per_second", "peak_memory_mb",
          "loss_scale"]


@pytest.fixture
def watch(monkeypatch):
    """watch(see) has see(model, batch) called before each forward of the run, the pre-flight's left out."""
    def watch(see):
        monkeypatch.setattr(train, "check_gradients", lambda *_: None)
        for place, name in (train, "answer_loss"), (finetune.evaluate, "log_likelihoods"):
            def watched(model, batch, honest=getattr(place, name)):
                return see(model, batch) or honest(model, batch)
            monkeypatch.setattr(place, name, watched)
    return watch


def test_a_step_does_not_depend_on_how_it_is_cut(run, tmp_path):
    """Two epochs of a step over 8 examples and one over the 4 left: as 8, 4 + 4, 8 x 1, or with checkpointing."""
    whole = run("8", "--batch-size", "8", "--accumulation-steps", "1", "--dropout", "0", "--epochs", "2")
    for out, *flags in (("4+4", "--batch-size", "4", "--accumulation-steps", "2"),
                        ("1x8", "--batch-size", "1", "--accumulation-steps", "8"),
                        ("checkpointing", "--batch-size", "8", "--accumulation-steps", "1", "--checkpointing")):
        rows = run(out, *flags, "--dropout", "0", "--epochs", "2")
        assert len(rows) == len(whole) == 4
        for row, other in zip(rows, whole):
            assert [row[key] for key in ("step", "epoch", "tokens", "answer_tokens", "lr")] == \
                   [other[key] for key in ("step", "epoch", "tokens", "answer_tokens", "lr")]
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for name, tensor in adapter_tensors(tmp_path / out).items():
            assert torch.allclose(tensor, adapter_tensors(tmp_path / "8")[name], atol=1e-4), name


def test_metrics_have_every_field_and_count_real_tokens(run, tokenizer):
    rows = run("out", "--batch-size", "5", "--accumulation-steps", "2", "--epochs", "2", "--log-every", "100")
    data = SupervisedDataset(EXAMPLES, tokenizer)
    assert [list(row) for row in rows] == [FIELDS] * 4
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["epoch"] for row in rows] == [0.5, 1.0, 1.5, 2.0]
    for epoch in (rows[:2], rows[2:]):                                  # each example once an epoch, no padding
        assert sum(row["tokens"] for row in epoch) == sum(len(tokens) for tokens, _ in data.rows)
        assert sum(row["answer_tokens"] for row in epoch) == sum(sum(i != -100 for i in labels) for _, labels in data.rows)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_first_loss_is_the_bases(run, base, tokenizer, data):
    """At lr 0 every step's loss is the untrained model's, averaged over answer tokens."""
    model, _ = load_checkpoint(base)
    batch = DataCollatorForSupervisedDataset(2)(SupervisedDataset(EXAMPLES, tokenizer).rows)
    logits = model(batch.tokens)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten())
    row, = run("out", "--batch-size", "5", "--accumulation-steps", "3", "--epochs", "1")
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_same_command_same_bytes(run, tmp_path):
    flags = ("--batch-size", "2", "--accumulation-steps", "2", "--epochs", "2", "--dropout", "0.1")
    first, second, other = run("a", *flags), run("b", *flags), run("c", *flags, "--seed", "1")
    assert untimed(first) == untimed(second)
    assert (tmp_path / "a/adapter.pt").read_bytes() == (tmp_path / "b/adapter.pt").read_bytes()
    assert untimed(first) != untimed(other)


def test_full_fine_tuning_and_random_weights(run, tmp_path, capsys):
    rows = run("full", "--method", "full", "--init", "random", "--epochs", "6", "--accumulation-steps", "1")
    assert rows[0]["loss"] == pytest.approx(math.log(400), rel=0.02) and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert "parameters trained (100.00 %)" in capsys.readouterr().out
    model, _ = load_checkpoint(tmp_path / "full")
    assert model.norm.weight.dtype == torch.float32 and not (tmp_path / "full/adapter.pt").exists()
    again = run("again", "--checkpoint", "full", "--method", "full", "--max-steps", "1", "--lr", "1e-9")
    assert again[0]["loss"] < 1.2 * rows[-1]["loss"]                     # goes on where the saved weights are


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_stays_close_to_fp32(run, method):
    exact, rounded = (run(precision, "--precision", precision, "--method", method, "--dropout", "0", "--epochs", "4",
                          "--lr", "1e-3") for precision in ("fp32", "bf16"))
    assert all(a["loss"] == pytest.approx(b["loss"], rel=0.02) for a, b in zip(exact, rounded))
    assert [row["loss_scale"] for row in rounded] == [1.0] * len(rounded)


def test_what_is_frozen_is_held_in_the_compute_dtype_and_what_is_trained_in_fp32(base):
    for flags, frozen in ((["--precision", "bf16"], {torch.bfloat16}), (["--precision", "fp32"], {torch.float32}),
                          (["--precision", "bf16", "--method", "full"], set())):
        job = train.prepare(parse_options(["--checkpoint", str(base), "--r", "2", *flags]), SINGLE_PROCESS)
        model, _ = train.load_model(job, torch.device("cpu"), "checkpoint")
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == frozen
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_fp16_scales_the_loss_and_a_step_that_overflows_moves_nothing(run, tmp_path, monkeypatch):
    """Infinity planted in the second step: no weight and no schedule moves, and the scale is halved."""
    flags = ("--precision", "fp16", "--epochs", "4", "--dropout", "0", "--batch-size", "4", "--accumulation-steps", "3")
    plain = run("plain", *flags)
    assert [row["loss_scale"] for row in plain] == [65536.0] * 4
    calls, weights = [], []
    honest = train.answer_loss

    def planted(model, batch):
        loss, n = honest(model, batch)
        calls.append(len(calls))
        if len(calls) % 3 == 1:                                          # the first micro-batch of a step
            weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]))
        return loss * (math.inf if len(calls) == 5 else 1), n
    monkeypatch.setattr(train, "answer_loss", planted)
    monkeypatch.setattr(train, "check_gradients", lambda *_: None)
    rows = run("planted", *flags)
    assert [row["loss_scale"] for row in rows] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])
    assert [row["lr"] for row in rows] == [plain[i]["lr"] for i in (0, 1, 1, 2)]


def test_gradients_are_clipped_after_unscaling(run):
    """The norm that is logged and clipped is the true one, whatever the loss scale."""
    exact, scaled = (run(precision, "--precision", precision, "--dropout", "0", "--max-steps", "1", "--clip-grad-norm", "1e-3")
                     for precision in ("fp32", "fp16"))
    assert scaled[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.02)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(run, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def looking(self, *args, **settings):
        seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm().item())
        return step(self, *args, **settings)
    monkeypatch.setattr(torch.optim.AdamW, "step", looking)
    rows = run("clipped", "--clip-grad-norm", "0.01", "--max-steps", "2")
    seen = [norm for norm in seen if norm]                               # without the estimate's trial step
    assert seen == pytest.approx([0.01, 0.01], rel=1e-3) and all(row["grad_norm"] > 0.02 for row in rows)
    run("never", "--clip-grad-norm", "0", "--max-steps", "2")
    run("hardly", "--clip-grad-norm", "1e9", "--max-steps", "2")
    assert (tmp_path / "never/adapter.pt").read_bytes() == (tmp_path / "hardly/adapter.pt").read_bytes()


def test_weight_decay_reaches_the_optimizer(run, tmp_path):
    run("plain", "--max-steps", "2"), run("decayed", "--max-steps", "2", "--weight-decay", "50")
    plain, decayed = (sum(t.norm() for name, t in adapter_tensors(tmp_path / out).items() if name.endswith("_A")) for out in ("plain", "decayed"))
    assert decayed < 0.8 * plain


def test_schedule_and_warmup_flags(run):
    def rates(*flags):
        return [row["lr"] for row in run("rates" + "".join(flags), *flags, "--batch-size", "1", "--accumulation-steps", "1",
                                         "--epochs", "5", "--val-fraction", "0.17")]        # 50 steps
    assert rates("--schedule", "constant", "--warmup-steps", "0") == [1e-2] * 50
    assert rates("--schedule", "constant", "--warmup-steps", "3")[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    default = rates()
    assert default[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2]) and default[-1] < 1e-4        # 3 % of 50 steps is 2


def test_held_out_loss_is_measured_without_dropout_and_training_goes_on_with_it(run, data, watch):
    modes = []
    watch(lambda model, batch: modes.append((model.training, torch.is_grad_enabled())))
    run("out", "--val-data", str(data), "--batch-size", "6", "--accumulation-steps", "2", "--epochs", "2")
    assert modes == ([(False, False)] + [(True, True)] * 2) * 2 + [(False, False)]


def test_each_epoch_has_an_order_of_its_own(run, watch):
    seen = []
    watch(lambda model, batch: seen.append(batch.tokens.tolist()))
    run("out", "--batch-size", "1", "--epochs", "2")
    assert sorted(seen[:12]) == sorted(seen[12:]) and seen[:12] != seen[12:]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_flags_reach_autocast_and_checkpointing(run, watch, precision):
    """Autocast is on where fp32 weights are trained in 16 bit; beside a base that is 16 bit already it has nothing to do."""
    seen = []
    watch(lambda model, batch: seen.append((torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"), model.checkpointing)))
    dtype = {"fp32": False, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for out, *flags in ("plain", ), ("checkpointing", "--checkpointing"), ("full", "--method", "full"):
        run(out, "--precision", precision, "--max-steps", "1", "--batch-size", "12", *flags)
    assert seen == [(False, False), (False, True), (dtype, False)]


def test_the_plans_defaults():
    args = parse_options(["--checkpoint", "somewhere"])
    assert (args.r, args.alpha, args.dropout, args.targets, args.max_seq_len) == (16, 32, 0.05, ("wq", "wv"), 512)
    assert (args.accumulation_steps, args.lr, args.clip_grad_norm, args.weight_decay, args.epochs) == (8, 3e-4, 1.0, 0, 3)
    assert parse_options(["--checkpoint", "somewhere", "--method", "full"]).lr == 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_full_model_is_saved_as_it_was_measured(run, data, tmp_path, capsys, precision):
    """In fp32 whatever it computed in: at 1e-5 a step, bf16 would keep a third of the update."""
    rows = run("full", "--method", "full", "--val-data", str(data), "--precision", precision, "--max-steps", "3", "--lr", "1e-5")
    capsys.readouterr()
    run("next", "--checkpoint", "full", "--method", "full", "--val-data", str(data), "--precision", precision, "--max-steps", "1")
    before = float(capsys.readouterr().out.split("before    held-out loss ")[1].split()[0])
    assert before == pytest.approx(rows[-1]["val_loss"], abs=5e-5)


@pytest.mark.parametrize("flags", [[], ["--method", "full"], ["--init", "random"]])
def test_what_is_printed_next_runs(run, capsys, flags):
    run("named", *flags, "--max-steps", "1")
    said = capsys.readouterr().out.split("saved     ")[1].splitlines()[0]
    if "--init" in flags:
        assert said.endswith("trained over random weights, which are not saved: generate.py cannot use it")
    else:
        generate.main([*said.split("python generate.py ")[1].split(), "--max-new-tokens", "1", "--instruction", "Say"])


def test_the_last_adapter_stays_until_the_next_is_complete(run, base, data, tmp_path, monkeypatch):
    flags = ["--checkpoint", str(base), "--data", str(data), "--max-steps", "2"]
    train.main(flags)
    before = (tmp_path / "out/adapter.pt").read_bytes()
    honest, calls = train.answer_loss, []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(model, batch)
    monkeypatch.setattr(train, "answer_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--method", "full"])
    assert (tmp_path / "out/adapter.pt").read_bytes() == before
    monkeypatch.setattr(train, "answer_loss", honest)
    train.main([*flags, "--method", "full"])
    assert not (tmp_path / "out/adapter.pt").exists() and (tmp_path / "out/params.json").exists()
    train.main(flags)
    assert (tmp_path / "out/adapter.pt").read_bytes() == before and not (tmp_path / "out/params.json").exists()


def test_two_runs_into_one_named_folder(run, tmp_path, monkeypatch, capsys):
    """The second comes while the first still loads its model: one of them must go."""
    honest = train.load_model

    def meanwhile(*args):
        monkeypatch.setattr(train, "load_model", honest)
        run("shared", "--max-steps", "1")
        return honest(*args)
    monkeypatch.setattr(train, "load_model", meanwhile)
    with pytest.raises(SystemExit, match="2"):
        run("shared", "--max-steps", "2")
    assert "another run has just begun in shared" in capsys.readouterr().err
    assert len((tmp_path / "shared/metrics.jsonl").read_text().splitlines()) == 1


def test_metrics_stay_json_when_numbers_do_not(run, tmp_path, monkeypatch):
    honest = train.answer_loss
    monkeypatch.setattr(train, "answer_loss", lambda model, batch: (honest(model, batch)[0] * math.nan, 1))
    monkeypatch.setattr(train, "check_gradients", lambda *_: None)
    run("out", "--max-steps", "3")
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[-1])["loss"] is None


def test_learning_rate_at_its_corners():
    def at(step, schedule="cosine"):
        return train.lr_factor(step, n_steps=100, warmup=10, schedule=schedule)
    assert 0 < at(0) < at(5) < at(9) < at(10) == 1.0
    assert at(55) == pytest.approx(0.5) and 0 < at(99) < 0.001 and at(100) == pytest.approx(0)
    assert at(0, "constant") == at(0) and at(10, "constant") == at(99, "constant") == 1.0
    assert train.lr_factor(0, n_steps=1, warmup=0, schedule="cosine") == 1.0


def test_held_out_loss_is_a_sum_by_a_count(run, watch, base, tokenizer, data):
    sizes = []
    watch(lambda model, asked: isinstance(asked, list) and sizes.append([len(prompt) + len(own) for prompt, (own,), _ in asked]) or None)
    losses = [run(str(n), "--val-data", str(data), "--tokens-per-batch", str(n), "--max-steps", "1", "--lr", "1e-12")[0]["val_loss"]
              for n in (1, 300, 3000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    # Before step 1 and after it; no more at a time than a micro-batch has.
    assert list(map(len, sizes[:24])) == [1] * 24 and list(map(len, sizes[-2:])) == [12, 12]
    assert all(sum(group) <= 300 for group in sizes[24:-2]) and len(sizes[24:-2]) < 24
    model, _ = load_checkpoint(base)
    batch = DataCollatorForSupervisedDataset(2)(SupervisedDataset(read_examples(data), tokenizer).rows)
    logits = model(batch.tokens)[:, :-1].flatten(0, 1)
    assert losses[0] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten()).item(), rel=1e-5)


def test_beginnings_computed_once_change_nothing_but_the_rows(run, watch):
    """Steps of two micro-batches of up to 300 tokens; the examples' first 30 or so are alike."""
    sizes = []
    watch(lambda model, batch: sizes.append(batch.tokens.numel()))
    flags = "--tokens-per-batch", "300", "--accumulation-steps", "2", "--dropout", "0", "--epochs", "2"
    plain, n = run("plain", *flags), len(sizes)
    shared = run("shared", *flags, "--share-prefix")
    assert len(sizes) == 2 * n and max(sizes[:n]) <= 300 and sum(sizes[:n]) == sum(row["tokens"] for row in plain)
    assert all(size <= other for size, other in zip(sizes[n:], sizes)) and sum(sizes[n:]) < 0.9 * sum(sizes[:n])
    for row, other in zip(shared, plain, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5) and row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert [row[key] for key in ("tokens", "answer_tokens", "epoch")] == [other[key] for key in ("tokens", "answer_tokens", "epoch")]


def test_fp32_products_may_round_in_the_run_that_lets_them_alone(run, watch):
    backends, seen = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul), []
    watch(lambda model, batch: seen.append(tuple(backend.fp32_precision for backend in backends)))
    rows = [run(out, "--max-steps", "1", "--accumulation-steps", "1", *flags) for out, *flags in (("no",), ("yes", "--fast-matmul"), ("again",))]
    assert seen == [("ieee", "ieee"), ("bf16", "tf32"), ("ieee", "ieee")]
    assert untimed(rows[0]) == untimed(rows[2]) and rows[1][0]["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-2)


def test_held_out_loss_once_an_epoch_and_at_the_end(run, data, capsys):
    rows = run("out", "--val-fraction", "0.25", "--batch-size", "3", "--accumulation-steps", "1", "--max-steps", "8")
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 6, 8]
    assert " 9 examples, the longest has 123 tokens; every answer ends within --max-seq-len 512\nheld out  examples.json: 3 examples; every answer" in capsys.readouterr().out


def test_held_out_examples_are_not_trained_on(base, data):
    options = parse_options(["--checkpoint", str(base), "--data", str(data), "--val-fraction", "0.25"])
    tokenizer = load_checkpoint(base)[1]
    training, held_out = ([tuple(tokens) for tokens, _ in part.rows] for part in load_datasets(options.data, None, options.val_fraction, 512, 0, tokenizer))
    everything = [tuple(tokens) for tokens, _ in SupervisedDataset(EXAMPLES, tokenizer).rows]
    assert sorted(training + held_out) == sorted(everything)


def test_layers_keeps_the_first_blocks(run, tmp_path):
    run("one", "--layers", "1", "--max-steps", "1")
    assert {name.split(".")[1] for name in adapter_tensors(tmp_path / "one")} == {"0"}


def test_the_default_out_is_replaced_and_a_named_one_is_not(run, base, data, tmp_path, capsys):
    flags = ["--checkpoint", str(base), "--data", str(data), "--max-steps", "1"]
    train.main(flags)
    before = (tmp_path / "out/adapter.pt").read_bytes()
    train.main([*flags, "--seed", "1"])
    assert (tmp_path / "out/adapter.pt").read_bytes() != before
    run("named", "--max-steps", "1")
    before = contents(tmp_path / "named")
    assert before.keys() == {"adapter.pt", "args.json", "metrics.jsonl", "state.pt"}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run("named", "--max-steps", "1")
    assert "named holds a run already: --resume goes on with it, --overwrite replaces it" in capsys.readouterr().err
    assert contents(tmp_path / "named") == before


def test_the_base_is_never_replaced_by_its_own_run(base, data, tmp_path, monkeypatch, capsys):
    """A base that stands in ./out, the default of --out, by whatever way it came there."""
    monkeypatch.chdir(tmp_path)
    base.rename(tmp_path / "out")
    before = contents(tmp_path / "out")
    for flags in (["--checkpoint", "out"], []):
        with pytest.raises(SystemExit, match="2"):
            train.main([*flags, "--data", str(data), "--max-steps", "1"])
        assert contents(tmp_path / "out") == before
    for name in ("args.json", "consolidated.01.pth"):                     # several files are no run's, whatever stands beside
        (tmp_path / "out" / name).touch()
    with pytest.raises(SystemExit, match="2"):
        train.main(["--data", str(data), "--max-steps", "1", "--method", "full"])


def test_bad_input_leaves_the_last_run_in_the_default_out(run, base, data, tmp_path):
    flags = ["--checkpoint", str(base), "--data", str(data), "--max-steps", "1"]
    train.main(flags)
    before = contents(tmp_path / "out")
    for wrong in (["--targets", "wz"], ["--r", "999"], ["--layers", "9"], ["--data", "nowhere.json"]):
        with pytest.raises(SystemExit, match="2"):
            train.main([*flags, *wrong])
    assert contents(tmp_path / "out") == before
