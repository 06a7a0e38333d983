"""train.py under torchrun: two real gloo processes against one, uneven ranks, a rank with bad input, a rank that dies."""
import json
import time

import pytest
import torch

import train

from .helpers import EXAMPLES, ROOT, adapter_tensors, given_once, metrics, torchrun

FLAGS = ["--r", "4", "--lr", "1e-2", "--dropout", "0"]


@pytest.fixture
def flags(base, data):
    return ["--checkpoint", str(base), "--data", str(data), *FLAGS]


@pytest.fixture
def launcher(tmp_path):
    """launcher(code) writes a script that runs `code` with `train` imported, then train.main of its arguments."""
    def write(code):
        (tmp_path / "launch.py").write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, train\n"
                                            f"rank, argv = int(os.environ['RANK']), sys.argv[1:]\n{code}\ntrain.main(argv)\n")
        return tmp_path / "launch.py"
    return write


def test_one_process_and_two_ranks_give_the_same_run(flags, data, tmp_path):
    """8 at once, 4 x 2, and 2 ranks x 2 x 2, with checkpointing too: losses to 1e-6, adapters alike; of 12 examples, so
    that every second step is smaller."""
    flags += ["--epochs", "3", "--val-data", str(data)]
    for out, *cut in (("8", "--batch-size", "8", "--accumulation-steps", "1"), ("4x2", "--batch-size", "4", "--accumulation-steps", "2")):
        train.main([*flags, *cut, "--out", str(tmp_path / out)])
    done = torchrun(tmp_path, ROOT / "train.py", *flags, "--batch-size", "2", "--accumulation-steps", "2", "--out", "2x2x2", "--checkpointing")
    assert done.returncode == 0, done.stderr
    assert "2 examples x 2 micro-batches x 2 ranks = 8 examples per step; 6 steps" in done.stdout
    assert done.stdout.count("\nstep 1/6 | ") == done.stdout.count("\nsaved     ") == 1            # one rank speaks
    one = metrics(tmp_path / "8")
    for out in ("4x2", "2x2x2"):
        other = metrics(tmp_path / out)
        for key in ("step", "epoch", "lr", "tokens", "answer_tokens"):
            assert [row[key] for row in other] == [row[key] for row in one]
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], rel=1e-6)
        assert [row["grad_norm"] for row in other] == pytest.approx([row["grad_norm"] for row in one], rel=1e-5)
        assert [row["val_loss"] for row in other if "val_loss" in row] == pytest.approx([row["val_loss"] for row in one if "val_loss" in row], rel=1e-6)
        tensors = [adapter_tensors(tmp_path / name) for name in ("8", out)]
        assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-5) for name in tensors[0])


@pytest.mark.parametrize("accumulation, steps", [(4, 13), pytest.param(2, 26, marks=pytest.mark.slow)])
def test_uneven_ranks_see_every_example_once_and_gradients_are_reduced_once_a_step(flags, tmp_path, launcher, accumulation, steps):
    """201 examples in steps of 2 x 4 x 2: the last step has 9; in steps of 8 1 is left, and rank 1 has none of it."""
    examples = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(201)]
    (tmp_path / "many.json").write_text(json.dumps(examples))
    script = launcher("""
reduced_file = open(f"reduced{rank}", "w")
class Counting(train.DistributedDataParallel):
    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.register_comm_hook(None, self.count)
    @staticmethod
    def count(state, bucket):
        print("reduced", file=reduced_file, flush=True)
        return torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])
train.DistributedDataParallel = Counting
seen_file = open(f"seen{rank}", "w")
def seen(data, collate, *rest):                          # the pre-flight's batch is none of the run's
    def noted(batch):
        for tokens, labels in batch:
            if labels[-1] != -100:
                print(*tokens, file=seen_file, flush=True)
        return collate(batch)
    return windows(data, noted, *rest)
windows, train.windows = train.windows, seen
""")
    few = ["--batch-size", "2", "--accumulation-steps", str(accumulation), "--epochs", "1"]
    done = torchrun(tmp_path, script, *given_once([*flags, "--data", "many.json", *few]))
    assert done.returncode == 0, done.stderr
    seen = [line for rank in (0, 1) for line in (tmp_path / f"seen{rank}").read_text().splitlines()]
    assert len(seen) == len(set(seen)) == 201
    for rank in (0, 1):
        assert len((tmp_path / f"reduced{rank}").read_text().splitlines()) == steps == len(metrics(tmp_path / "out"))


def test_bad_input_on_one_rank_ends_all_with_one_line(flags, launcher, tmp_path):
    began = time.perf_counter()
    done = torchrun(tmp_path, launcher("if rank == 1: argv += ['--data', 'nowhere.json']"), *flags)
    assert done.returncode != 0 and time.perf_counter() - began < 60
    assert sum(line.startswith("train.py: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert 'File "' + str(ROOT) not in done.stderr and not (tmp_path / "out" / "args.json").exists()


@pytest.mark.slow
def test_bad_flags_on_all_ranks_end_in_one_line(flags, tmp_path):
    done = torchrun(tmp_path, ROOT / "train.py", *given_once([*flags, "--r", "0"]))
    assert done.returncode != 0 and sum(line.startswith("train.py: ") for line in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.slow
def test_ranks_that_were_not_started_alike_are_refused(flags, launcher, tmp_path):
    done = torchrun(tmp_path, launcher("argv[argv.index('--lr') + 1] = str(0.1 + rank)"), *flags)
    assert done.returncode != 0 and "train.py: the ranks were not started alike" in done.stderr


def test_overflow_on_one_rank_skips_the_step_on_all_and_each_rank_drops_other_elements(flags, launcher, tmp_path):
    """fp16 over four steps, infinity planted on rank 1 in its second; --method full, more ranks than held-out examples."""
    script = launcher("""
honest, calls = train.answer_loss, []
def planted(model, batch):
    calls.append(1)
    loss, n = honest(model, batch)
    open(f"seed{rank}", "w").write(str(torch.initial_seed()))
    return loss * (float("inf") if rank == 1 and len(calls) == 2 else 1), n
train.answer_loss, train.check_gradients = planted, lambda *_: None
""")
    (tmp_path / "one.json").write_text(json.dumps(EXAMPLES[:1]))
    done = torchrun(tmp_path, script, *flags, "--method", "full", "--precision", "fp16", "--val-data", "one.json",
                    "--batch-size", "3", "--accumulation-steps", "1", "--epochs", "2", "--warmup-steps", "3")
    assert done.returncode == 0, done.stderr
    assert [row["loss_scale"] for row in metrics(tmp_path / "out")] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert [row["lr"] for row in metrics(tmp_path / "out")] == pytest.approx([2.5e-3, 5e-3, 5e-3, 7.5e-3])
    assert done.stdout.count("overflow, step skipped") == 1
    assert (tmp_path / "seed0").read_text() != (tmp_path / "seed1").read_text()


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_job_down_in_seconds(flags, launcher, tmp_path):
    script = launcher("""
honest, calls = train.answer_loss, []
def dying(model, batch):
    calls.append(1)
    if rank == 1 and len(calls) == 5:
        os.kill(os.getpid(), 9)
    return honest(model, batch)
train.answer_loss = dying
""")
    began = time.perf_counter()
    done = torchrun(tmp_path, script, *flags, "--epochs", "100")
    assert done.returncode != 0 and time.perf_counter() - began < 30
    assert not (tmp_path / "out/adapter.pt").exists()
