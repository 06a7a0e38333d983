"""train.py under torchrun: two real gloo processes against one, uneven ranks, and bad endings."""
import json
import time

import pytest
import torch

import train

from .helpers import EXAMPLES, ROOT, adapter_tensors, given_once, metrics, torchrun

EXACT = ("step", "epoch", "lr", "tokens", "answer_tokens")
COUNT_REDUCTIONS = """
reduced_file = open(f"reduced{rank}", "w")
class Counting(shard.DistributedDataParallel):
    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.register_comm_hook(None, self.count)
    @staticmethod
    def count(state, bucket):
        print("reduced", file=reduced_file, flush=True)
        reduced = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True)
        return reduced.get_future().then(lambda future: future.value()[0])
shard.DistributedDataParallel = Counting
"""
NOTE_EXAMPLES = """
seen_file = open(f"seen{rank}", "w")
windows = train.windows
def noting_windows(data, collate, *rest):            # The pre-flight's batch is none of the run's.
    def noting(batch):
        for tokens, labels in batch:
            if labels[-1] != -100:
                print(*tokens, file=seen_file, flush=True)
        return collate(batch)
    return windows(data, noting, *rest)
train.windows = noting_windows
"""
CHANGE_LOSS = """
import finetune.job
answer_loss = finetune.job.answer_loss
calls = []
def changed_loss(model, batch):
    calls.append(1)
    loss, n = answer_loss(model, batch)
    return change(loss, len(calls)), n
finetune.job.answer_loss = changed_loss
finetune.job.check_gradients = lambda *_: None
"""


@pytest.fixture
def flags(base, data):
    return ["--checkpoint", str(base), "--data", str(data), "--r", "4", "--lr", "1e-2",
            "--dropout", "0"]


@pytest.fixture
def launch(tmp_path):
    """launch(code, *flags) is the process of two ranks that run the code, then train.main."""
    def launch(code, *flags):
        script = tmp_path / "launch.py"
        script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                          "import torch, train\nfrom finetune import shard\nargv = sys.argv[1:]\n"
                          f"rank = int(os.environ['RANK'])\n{code}\ntrain.main(argv)\n")
        return torchrun(tmp_path, script, *given_once(flags))

    return launch


def test_one_process_and_two_ranks_give_the_same_run(flags, data, tmp_path):
    """8 at once, 4 x 2, 2 ranks x 2 x 2 with checkpointing; of 12 examples, so steps differ."""
    flags += ["--epochs", "3", "--val-data", str(data)]
    for out, batch_size, steps in (("8", "8", "1"), ("4x2", "4", "2")):
        train.main([*flags, "--batch-size", batch_size, "--accumulation-steps", steps,
                    "--out", str(tmp_path / out)])
    done = torchrun(tmp_path, ROOT / "train.py", *flags, "--batch-size", "2",
                    "--accumulation-steps", "2", "--out", "2x2x2", "--checkpointing")
    assert done.returncode == 0, done.stderr
    plan = "2 examples x 2 micro-batches x 2 ranks = 8 examples per step; 6 steps"
    assert plan in done.stdout
    # One rank speaks.
    assert done.stdout.count("\nstep 1/6 | ") == done.stdout.count("\nsaved     ") == 1
    one = metrics(tmp_path / "8")
    tensors = adapter_tensors(tmp_path / "8")
    for out in ("4x2", "2x2x2"):
        for row, other in zip(one, metrics(tmp_path / out), strict=True):
            assert [row[key] for key in EXACT] == [other[key] for key in EXACT]
            for key, off in (("loss", 1e-6), ("grad_norm", 1e-5), ("val_loss", 1e-6)):
                assert (key in row) == (key in other)
                assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=off)
        for name, tensor in adapter_tensors(tmp_path / out).items():
            assert torch.allclose(tensor, tensors[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation, steps", [(4, 13), (2, 26)])
def test_uneven_ranks_see_every_example_once_and_gradients_are_reduced_once_a_step(
        flags, tmp_path, launch, accumulation, steps):
    """The last step of 201 examples has 9 of 16; of 8 it has 1, and rank 1 has none."""
    examples = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(201)]
    (tmp_path / "many.json").write_text(json.dumps(examples))
    done = launch(COUNT_REDUCTIONS + NOTE_EXAMPLES, *flags, "--data", "many.json", "--epochs", "1",
                  "--batch-size", "2", "--accumulation-steps", str(accumulation))
    assert done.returncode == 0, done.stderr
    seen = []
    for rank in (0, 1):
        seen += (tmp_path / f"seen{rank}").read_text().splitlines()
        n_reduced = len((tmp_path / f"reduced{rank}").read_text().splitlines())
        assert n_reduced == steps == len(metrics(tmp_path / "out"))
    assert len(seen) == len(set(seen)) == 201


@pytest.mark.slow
@pytest.mark.parametrize("code, message", [
    ("change('--r', '0')", "--r: 0 is out of range"),
    ("change('--lr', str(0.1 + rank))", "the ranks were not started alike"),
    ("if rank == 1: change('--data', 'nowhere.json')", "no data file at nowhere.json"),
])
def test_bad_input_on_any_rank_ends_all_with_one_line(flags, launch, tmp_path, code, message):
    change = "def change(flag, value): argv[argv.index(flag) + 1] = value\n"
    began = time.perf_counter()
    done = launch(change + code, *flags)
    assert done.returncode != 0 and time.perf_counter() - began < 60
    line, = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert message in line and f'File "{ROOT}' not in done.stderr
    assert not (tmp_path / "out/args.json").exists()


@pytest.mark.slow
def test_infinity_on_one_rank_skips_the_step_on_all_and_each_rank_drops_other_elements(
        flags, launch, tmp_path):
    """In fp16, infinity on rank 1 in step 2; --method full, more ranks than held-out examples."""
    (tmp_path / "one.json").write_text(json.dumps(EXAMPLES[:1]))
    code = CHANGE_LOSS + """
def change(loss, n_calls):
    open(f"seed{rank}", "w").write(str(torch.initial_seed()))
    return loss * float("inf") if rank == 1 and n_calls == 2 else loss
"""
    done = launch(code, *flags, "--method", "full", "--precision", "fp16", "--val-data",
                  "one.json", "--batch-size", "3", "--accumulation-steps", "1", "--epochs", "2",
                  "--warmup-steps", "3")
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "out")
    assert [row["loss_scale"] for row in rows] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert [row["lr"] for row in rows] == pytest.approx([2.5e-3, 5e-3, 5e-3, 7.5e-3])
    assert done.stdout.count("not finite, step skipped") == 1
    assert (tmp_path / "seed0").read_text() != (tmp_path / "seed1").read_text()


