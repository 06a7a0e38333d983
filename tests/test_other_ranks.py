"""A run goes on with another number of ranks: the same steps, dealt out anew, and the same losses.

pytest tests/test_other_ranks.py             the plan, 1 -> 2 ranks, and what is refused
pytest -m slow tests/test_other_ranks.py     1 -> 2 -> 3 -> 1, with --tokens-per-batch and --shard
"""
from pathlib import Path

import pytest
import torch

import finetune.job
import train
from finetune import printed
from finetune.batches import example_indices, indices_as_dealt_to, plan_epoch
from finetune.options import parse_options
from finetune.ranks import Ranks

from .helpers import adapter_tensors, given_once, lay_out, metrics
from .test_resume import ended, main, start_ranks, stop, stopped_in

FLAGS = ["--checkpoint", "base", "--data", "data.json", "--val-data", "held_out.json", "--r", "4",
         "--lr", "1e-2", "--dropout", "0", "--batch-size", "2", "--accumulation-steps", "2",
         "--epochs", "4"]                            # 12 steps, of 4, 4 and 3 examples
SKIPPED = 4                                          # the step with a loss that is not finite
EQUAL = ("step", "epoch", "lr", "tokens", "answer_tokens", "skipped", "examples")
CLOSE = ("loss", "grad_norm", "val_loss")


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A folder with a base, 11 examples and 4 held-out ones; ranks draw no picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(printed, "picture_of", lambda out: "none")
    lay_out(tmp_path, tokenizer, n_examples=11, n_held_out=4)


@pytest.fixture
def sitting(place, monkeypatch):
    """sitting(n_ranks, flags, until=step, life=n) starts ranks and waits until all have ended.

    They are told to stop in step `until`; life is torchrun's count of restarts.  In step SKIPPED
    the loss is infinite.
    """
    steps = {"now": 0, "until": None}
    begin_step = train.begin_step
    answer_loss = finetune.job.answer_loss

    def noting(model, step, loss):
        steps["now"] = step
        if step == steps["until"]:
            stop()
        return begin_step(model, step, loss)

    def loss_of(model, batch):
        loss, n = answer_loss(model, batch)
        if model.training and steps["now"] == SKIPPED:
            loss = loss * float("inf")
        return loss, n

    def sitting(n_ranks, flags, until=None, life=0):
        steps["until"] = until
        argv = given_once([*FLAGS, *flags])
        code = 130 if until else 0
        pids = start_ranks(argv, life, n_ranks=n_ranks)
        assert [ended(pid) for pid in pids] == [code] * n_ranks

    monkeypatch.setattr(train, "begin_step", noting)
    monkeypatch.setattr(finetune.job, "answer_loss", loss_of)
    return sitting


def check_same(folder, whole):
    """Check that two runs have the same steps, and losses that differ by rounding alone.

    `pytest -s` shows each step: its loss, that of the whole run, and their relative difference.
    """
    rows = metrics(Path(folder))
    for row, expected in zip(rows, metrics(Path(whole)), strict=True):
        if row["loss"] is not None:
            off = abs(row["loss"] - expected["loss"]) / expected["loss"]
            print(f"{row['step']:2}  {row['loss']:.8f}  {expected['loss']:.8f}  {off:.1e}")
        assert row.keys() == expected.keys()
        for name in EQUAL:
            assert row.get(name) == expected.get(name)
        for name in CLOSE:
            if expected.get(name) is None:
                assert row.get(name) is None
            else:
                assert row[name] == pytest.approx(expected[name], rel=1e-6), (row["step"], name)
    return rows


# --- the plan


@pytest.mark.parametrize("now", [1, 2, 3, 7])
@pytest.mark.parametrize("begun_with", [1, 2, 3])
@pytest.mark.parametrize("settings", [{"batch_size": 2, "accumulation_steps": 2},
                                      {"batch_size": 1, "accumulation_steps": 3},
                                      {"batch_size": 1, "accumulation_steps": 2,
                                       "tokens_per_batch": 60}], ids=str)
def test_a_plan_deals_the_same_steps_to_any_number_of_ranks(settings, begun_with, now):
    """103 examples, so the last step is smaller.  The fingerprint is that of the beginning."""
    lengths = [10 + i % 23 for i in range(103)]
    whole_batches = "tokens_per_batch" in settings
    begun = plan_epoch(lengths, seed=0, epoch=1, world_size=begun_with, **settings)
    plan = plan_epoch(lengths, seed=0, epoch=1, world_size=now, begun_with=begun_with, **settings)
    assert now != begun_with or plan == begun
    for step, expected in zip(plan, begun, strict=True):
        indices = example_indices((0, expected))
        assert sorted(example_indices((0, step))) == sorted(indices)
        assert indices_as_dealt_to(begun_with, (0, step), whole_batches) == indices
        assert len(step) == now
        n_batches = [len(batches) for batches in step]
        assert max(n_batches) - min(n_batches) <= 1
        for batches in step:
            for batch in batches:
                assert whole_batches or len(batch) <= settings["batch_size"]


def test_memory_is_estimated_for_the_ranks_that_there_are(place):
    """On more ranks a micro-batch of the same flags can be smaller: 4 examples in parts of 2."""
    flags = given_once([*FLAGS, "--batch-size", "4", "--accumulation-steps", "1"])
    for n_ranks, n_examples in ((1, 4), (2, 2)):
        job = finetune.job.prepare(parse_options(flags), Ranks(0, n_ranks, begun_with=1),
                                 train.build_optimizer)
        _, step = job.plan[0]
        assert len(step) == n_ranks
        for batches in step:
            assert [len(batch) for batch in batches] == [n_examples]


# --- on real ranks


def test_a_run_of_one_process_goes_on_with_two_ranks(sitting, capfd):
    """With a skipped step behind it; rank 1 has no random numbers in the save."""
    sitting(1, ["--out", "whole"])
    sitting(1, ["--out", "more"], until=6)
    capfd.readouterr()
    sitting(2, ["--out", "more", "--resume"])
    printed_lines = capfd.readouterr().out
    assert "ranks     2 instead of 1: the same steps, dealt out anew\n" in printed_lines
    assert "2 examples x 2 micro-batches x 1 rank (now 2) = 4 examples per step" in printed_lines
    rows = check_same("more", "whole")
    assert [row["step"] for row in rows if "skipped" in row] == [SKIPPED]
    for name, tensor in adapter_tensors(Path("more")).items():
        assert torch.allclose(tensor, adapter_tensors(Path("whole"))[name], atol=1e-5)
    save = torch.load("more/state.pt", weights_only=True)
    assert save["about"]["ranks"] == 1 and len(save["random"]) == 2


def test_what_is_said_of_other_ranks(sitting, capsys):
    """By a dry run, which needs no other process: dropout, and ranks without an example."""
    sitting(1, ["--out", "drops", "--dropout", "0.1"], until=2)
    flags = [*FLAGS, "--out", "drops", "--dropout", "0.1", "--resume", "--dry-run"]
    main(flags)
    assert "\nranks  " not in capsys.readouterr().out
    main([*flags, "--shard", "6"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ranks  ")]
    assert len(lines) == 3
    assert "6 instead of 1" in lines[0]
    assert "2 of 6 ranks" in lines[1]
    assert "dropout now drops other elements" in lines[2]


@pytest.mark.parametrize("change, message", [
    (lambda save: save["about"].update(ranks=0), "its number of ranks is 0"),
    (lambda save: save["about"].update(ranks=True), "its number of ranks is True"),
    (lambda save: save["about"].pop("ranks"), "its number of ranks is None"),
    (lambda save: save["about"].update(ranks=2 ** 40), "its steps would not hold the same"),
    (lambda save: save["random"].clear(), "it has no random numbers"),
])
def test_a_save_with_impossible_ranks_is_refused(place, refused, change, message):
    flags = given_once([*FLAGS, "--out", "odd"])
    assert stopped_in(flags, 1) == 130
    Path("odd/state.previous.pt").unlink()           # It would be used in place of a damaged one.
    save = torch.load("odd/state.pt", weights_only=True)
    change(save)
    torch.save(save, "odd/state.pt")
    assert message in refused(train.main, *flags, "--resume")


CHAIN = ((1, 3), (2, 6), (3, 9), (1, None))          # (ranks, the step in which they are stopped)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    "", "--tokens-per-batch 60 --batch-size 1", "--method full --lr 1e-3",
    "--method dylora --method-options rank_by=chance", "--share-prefix --checkpointing"])
def test_a_chain_of_ranks_gives_the_uninterrupted_run(sitting, settings):
    flags = settings.split()
    sitting(1, [*flags, "--out", "whole"])
    for n_ranks, until in CHAIN:                     # --resume may stand there from the first.
        sitting(n_ranks, [*flags, "--out", "chain", "--resume"], until)
    rows = check_same("chain", "whole")
    assert [row["step"] for row in rows if "skipped" in row] == [SKIPPED]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["--method lora", "--method full --lr 1e-3"])
def test_a_cut_base_goes_on_whole_and_cut_over_other_ranks(sitting, method):
    """2 ranks with --shard, one process without, 3 ranks with --shard, 2 without."""
    flags = method.split()
    sitting(2, [*flags, "--out", "whole"])
    for n_ranks, until, shard in ((2, 2, "--shard 2"), (1, 3, ""), (3, 5, "--shard 3"),
                                  (2, None, "")):
        sitting(n_ranks, [*flags, *shard.split(), "--out", "cut", "--resume"], until)
    check_same("cut", "whole")


@pytest.mark.slow
def test_torchrun_restarts_with_other_ranks(sitting, capfd):
    """Without --resume, as an elastic torchrun does when machines leave or come back."""
    sitting(2, ["--out", "whole"])
    for life, (n_ranks, until) in enumerate(((2, 2), (1, 4), (3, None))):
        sitting(n_ranks, ["--out", "elastic"], until, life)
    assert "ranks     3 instead of 1" in capfd.readouterr().out
    check_same("elastic", "whole")
