"""--shard: a base that ranks share computes what a whole one does, and each rank holds its part.

pytest tests/test_shard.py             one launch of two gloo ranks, and arithmetic
pytest -m slow tests/test_shard.py     every method and quantisation, more ranks, mutations
"""
import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import finetune.job
import generate
import train
from finetune.options import parse_options
from finetune.memory import Size, estimate_memory, memory_advice
from finetune.ranks import Ranks
from finetune.shard import RANKS_OF_MACHINE, Sharding, cut_bytes, share_like
from llama import ModelArgs, Transformer, load_checkpoint, save_checkpoint
from llama.rnn import RNN, RNNArgs
from lora import LoRAConfig, add_lora
from lora.adapter import METHODS
from lora.matrices import gathered_weights
from lora.quantize import quantizer

from .helpers import (EXAMPLES, ONE_THREAD, ROOT, given_once, launcher, metrics, python, stored,
                      tiny, torchrun, untimed)
from .test_mutations import mutated, mutated_copy

# Several runs in one pair of processes, because starting them takes longer than a run.  A run that
# hangs is killed: no process may outlive the test.
LAUNCH = f"""
import gc, json, os, signal, sys, time
from contextlib import contextmanager, redirect_stdout
sys.path.insert(0, {str(ROOT)!r})
import torch
import finetune.job
import generate
import train
from finetune import printed, ranks, run
connected = ranks.connect()
rank = connected.rank
if rank:
    sys.stdout = open(os.devnull, "w")
@contextmanager
def stays_connected(*_):
    yield connected
train.connected_ranks = generate.connected_ranks = stays_connected
printed.picture_of = lambda out: "none"
class Killed(BaseException):
    pass
exec(open("change.py").read())
seconds = int(os.environ.get("SECONDS_PER_RUN", 60))
for argv in json.load(open("runs.json")):
    signal.alarm(240 if "--compile" in argv else seconds)
    try:
        train.main(argv)
    except Killed:
        pass
    torch.distributed.barrier()                      # Rank 0 has written what the next run reads.
for i, argv in enumerate(json.load(open("questions.json"))):
    signal.alarm(seconds)
    with redirect_stdout(open(f"answers{{i}}.{{rank}}", "w")):
        generate.main(argv)
connected.exit_together(0)
"""
# After loading, and after training: the bytes of all tensors that have come to life since before.
COUNT_BYTES = """
load_weights, train_run = train.load_weights, train.train
gc.collect()
gc.freeze()                                          # What torch itself keeps takes long to pass.
def live_bytes():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor,
               torch.nn.Parameter) and not thing.is_meta]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
def counted_load(job):
    global before
    before = live_bytes()
    job = load_weights(job)
    note(job, "loaded")
    return job
def counted_train(job, run):
    train_run(job, run)
    note(job, "trained")
def note(job, when):
    out = job.options.out
    if "killed" in out:
        return
    # A thread of gloo may hold a tensor of the last collective for a moment longer.
    counts = [time.sleep(seconds) or live_bytes() for seconds in (0, 0.05, 0.15)]
    json.dump(min(counts) - before, open(f"{out}.{when}.{rank}", "w"))
train.load_weights, train.train = counted_load, counted_train
"""
# Runs whose folder has "killed" in its name end after their second step, without a chance to save.
KILL = """
end_step = run.Run.end_step
def killing(self):
    is_last = end_step(self)
    if "killed" in str(self.out) and self.progress.step == 2:
        raise Killed
    return is_last
run.Run.end_step = killing
"""
COMMON = ["--checkpoint", "base", "--data", "data.json", "--val-data", "held_out.json", "--lr",
          "1e-2", "--batch-size", "2", "--accumulation-steps", "2", "--epochs", "2",
          "--save-every", "1"]
CUT = ["--shard"]
SMALL = 1000                                         # bytes of counters and the like


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with bases, a teacher and 11 examples: the last step of two ranks is uneven."""
    place = tmp_path_factory.mktemp("shard")
    sizes = {"vocab_size": tokenizer.vocab_size, "n_kv_heads": 2, "n_layers": 3}
    save_checkpoint(tiny(**sizes), tokenizer, place / "base")
    save_checkpoint(tiny(**sizes, tie_embeddings=True), tokenizer, place / "tied")
    save_checkpoint(tiny(tokenizer.vocab_size, dim=48), tokenizer, place / "teacher")
    (place / "data.json").write_text(json.dumps(EXAMPLES[:11]))
    (place / "held_out.json").write_text(json.dumps(EXAMPLES[:1]))
    return place


def launch(place, runs, n_ranks=2, change="", questions=()):
    """Run train.main once per list of flags in processes of torchrun; return the finished ones.

    questions: lists of flags for generate.main, whose answers go to files.
    """
    (place / "questions.json").write_text(json.dumps(questions))
    (place / "launch.py").write_text(LAUNCH)
    (place / "change.py").write_text(change)
    flags = [given_once([*COMMON, *run]) for run in runs]
    (place / "runs.json").write_text(json.dumps(flags))
    return torchrun(place, place / "launch.py", ranks=n_ranks)


def message(done):
    """Return the end of what a process wrote on stderr, before torchrun's own report."""
    return done.stderr.partition("torch/distributed/elastic")[0][-4000:]


def pairs(settings, flag=CUT):
    """Return the flags of each setting without and with --shard."""
    runs = []
    for i, setting in enumerate(settings):
        runs.append([*setting.split(), "--overwrite", "--out", f"whole{i}"])
        runs.append([*setting.split(), "--overwrite", "--out", f"cut{i}", *flag])
    return runs


def result(folder):
    """Return what a run computed: its metrics, and its adapters or model, each as bytes."""
    names = ("adapter.pt", "best.pt", "consolidated.00.pth")
    files = [folder / name for name in names if (folder / name).exists()]
    return untimed(metrics(folder)), [file.read_bytes() for file in files]


def check_equal(place, settings, n_ranks=2, flag=CUT, change=""):
    """Run each setting with and without --shard; the results must be equal to the bit."""
    done = launch(place, pairs(settings, flag), n_ranks, change)
    assert done.returncode == 0, message(done)
    for i, setting in enumerate(settings):
        assert result(place / f"whole{i}") == result(place / f"cut{i}"), setting


def check_close(one, other):
    """Check that two runs of --method full differ by rounding alone."""
    for row, second in zip(metrics(one), metrics(other), strict=True):
        for name in ("loss", "grad_norm", "val_loss"):
            assert row.get(name, 0) == pytest.approx(second.get(name, 0), rel=1e-6)
    first = stored(one)
    second = stored(other)
    assert first.keys() == second.keys()
    # Not element by element: AdamW divides by the size of a gradient, so rounding moves a weight
    # whose gradient is almost zero by more (1 of 62,688 by 1.9e-6 on one machine).
    for name in first:
        assert (first[name] - second[name]).norm() <= 1e-6 * first[name].norm(), name


# --- on two ranks

MAIN = ["--method lora --checkpointing",
        "--method dora --quantize nf4 --precision bf16 --targets all --tokens-per-batch 60"]
FULL = ["--method", "full", "--lr", "1e-3"]
ANSWER = ["--adapter", "cut0/adapter.pt", "--max-new-tokens", "12"]
OTHER_ANSWERS = {"drawn": [*ANSWER, "--temperature", "0.8", "--seed", "3"],
                 "data": [*ANSWER, "--data", "data.json", "--beams", "2"],
                 "score": [*ANSWER, "--data", "data.json", "--score"]}


@pytest.fixture(scope="module")
def two_ranks(place):
    """Runs of two ranks: those of MAIN and of FULL, whole and cut, and one that was killed."""
    runs = pairs(MAIN)
    runs += [[*FULL, "--out", "full"], [*FULL, "--out", "cut-full", *CUT]]
    runs += [["--out", "killed-lora"], ["--out", "killed-lora", "--resume", *CUT]]
    questions = [[*ANSWER, "--shard"]]
    done = launch(place, runs, change=COUNT_BYTES + KILL, questions=questions)
    assert done.returncode == 0, message(done)
    return place


@pytest.mark.parametrize("i", range(len(MAIN)), ids=MAIN)
def test_a_cut_base_gives_the_same_run_to_the_bit(two_ranks, i):
    """Also with an uneven last step, and with one held-out example."""
    assert result(two_ranks / f"whole{i}") == result(two_ranks / f"cut{i}")


def test_full_fine_tuning_differs_by_rounding_alone(two_ranks):
    check_close(two_ranks / "full", two_ranks / "cut-full")


def bytes_saved(place, whole, cut, when, rank):
    """Return how many bytes less live in a cut run than in a whole one."""
    counts = [json.loads((place / f"{out}.{when}.{rank}").read_text()) for out in (whole, cut)]
    return counts[0] - counts[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["loaded", "trained"])
@pytest.mark.parametrize("i, quantize, dtype", [
    (0, None, torch.float32), (1, "nf4", torch.bfloat16)])
def test_a_rank_holds_its_share(two_ranks, i, quantize, dtype, when, rank):
    """Counted on all tensors that live after loading, and when the training has ended."""
    base, _ = load_checkpoint(two_ranks / "base", dtype=dtype, convert=quantizer(quantize))
    expected = cut_bytes(base, 2, False)
    assert expected.whole / 2 <= expected.share < 0.51 * expected.whole
    less = bytes_saved(two_ranks, f"whole{i}", f"cut{i}", when, rank)
    assert less == pytest.approx(expected.whole - expected.share, abs=SMALL)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when, n", [("loaded", 1), ("trained", 3)])
def test_a_rank_holds_its_share_of_weights_and_moments(two_ranks, when, n, rank):
    """AdamW's two moments are cut as the weights are, so three tensors of their size are."""
    base, _ = load_checkpoint(two_ranks / "base")
    expected = cut_bytes(base, 2, True)
    less = bytes_saved(two_ranks, "full", "cut-full", when, rank)
    assert less == pytest.approx(n * (expected.whole - expected.share), abs=SMALL)


def test_a_killed_run_goes_on_to_the_bit_also_if_shard_has_changed(two_ranks):
    assert result(two_ranks / "killed-lora") == result(two_ranks / "whole0")


def test_the_record_says_how_many_ranks_share_a_base(two_ranks):
    """As a number also if --shard had none, since a resumed run names what has changed."""
    for out, expected in (("whole0", None), ("cut0", 2)):
        assert json.loads((two_ranks / out / "args.json").read_text())["shard"] == expected


def test_saves_are_those_of_a_whole_base(two_ranks):
    """Names, shapes and values; a cut model is saved whole."""
    one, other = (torch.load(two_ranks / out / "state.pt", weights_only=True)["parts"]
                  for out in ("full", "cut-full"))
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert type(other["model"][name]) is torch.Tensor
        assert torch.allclose(tensor, other["model"][name], atol=1e-6)
    for i, state in one["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.allclose(tensor, other["optimizer"]["state"][i][name], atol=1e-6)


def check_answers(place, i, flags, capsys):
    """Check that both ranks gave the answers of a single process over the whole base."""
    generate.main(flags)
    alone = capsys.readouterr().out
    assert alone
    for rank in (0, 1):
        assert (place / f"answers{i}.{rank}").read_text() == alone


def test_ranks_that_share_a_base_answer_as_one_process_does(two_ranks, capsys, monkeypatch):
    monkeypatch.chdir(two_ranks)
    check_answers(two_ranks, 0, ANSWER, capsys)


@pytest.mark.slow
def test_ranks_that_share_a_base_draw_read_a_file_and_score(two_ranks, capsys, monkeypatch):
    monkeypatch.chdir(two_ranks)
    questions = [[*flags, "--shard"] for flags in OTHER_ANSWERS.values()]
    done = launch(two_ranks, [], questions=questions)
    assert done.returncode == 0, message(done)
    for i, flags in enumerate(OTHER_ANSWERS.values()):
        check_answers(two_ranks, i, flags, capsys)


# --- without other processes


def test_what_cannot_be_cut_is_refused(refused, base, data, tmp_path, tokenizer):
    flags = ["--checkpoint", str(base), "--data", str(data)]
    for more in (["--shard"], ["--shard", "2"], ["--shard", "--dry-run"]):
        assert "torchrun --nproc_per_node=N" in refused(train.main, *flags, *more)
    assert "--shard: 1 is out of range" in refused(train.main, *flags, "--shard", "1")
    args = RNNArgs(dim=16, n_layers=1, rnn="gru", vocab_size=tokenizer.vocab_size)
    save_checkpoint(RNN(args), tokenizer, tmp_path / "rnn")
    flags = ["--checkpoint", str(tmp_path / "rnn"), "--data", str(data), "--targets", "output"]
    assert "recurrent" in refused(train.main, *flags, "--shard", "2", "--dry-run")


@pytest.mark.parametrize("size, n_ranks, words", [
    (3, 4, "--shard 3 does not divide the 4 ranks"), (8, 4, "--shard 8 does not divide"),
    (RANKS_OF_MACHINE, 4, "give --shard 4")])
def test_copies_are_whole(monkeypatch, size, n_ranks, words):
    """Without N it is the ranks of a machine: here one on each of four machines."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=words):
        Sharding.planned(size, Ranks(0, n_ranks), ModelArgs(vocab_size=400))


def test_a_dry_run_needs_sizes_and_tokenizer_only(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (base / "consolidated.00.pth").unlink()
    flags = ["--checkpoint", str(base), "--data", str(data), "--dry-run", "--shard", "8"]
    train.main(flags)
    lora = capsys.readouterr().out
    assert "x 8 ranks" in lora and "MiB of tensors per rank" in lora and ", gathered " in lora
    assert "1 copy of the base, cut over 8 ranks\n" in lora
    train.main([*flags, "--method", "full"])
    assert "in rank 0's main memory, 0." in capsys.readouterr().out
    train.main(["--dry-run", "--shard", "8"])
    assert "about 12.8 MiB of tensors per rank, " in capsys.readouterr().out       # as in docs


def test_a_layer_gets_its_part_back_also_after_an_error():
    layer = torch.nn.Linear(2, 4, bias=False)
    part = layer.weight
    part.full_tensor = lambda: torch.zeros(8, 2)
    with pytest.raises(ValueError), gathered_weights(layer):
        assert layer.weight.shape == (8, 2)
        raise ValueError
    assert layer.weight is part


def test_shard_is_advised_where_memory_ends():
    """On the demo, whose base has four blocks: two of them are gathered at a time."""
    job = finetune.job.prepare(parse_options([]), Ranks(0, 8), train.build_optimizer)
    advice = dict(memory_advice(job, finetune.job.estimate_step_bytes))
    base = cut_bytes(job.model, 8, False)
    assert advice["--shard 8"] == base.whole - base.share - base.gathered > 0


SIZES = {"7B": {},
         "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
         "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8,
                 "ffn_dim_multiplier": 1.3, "multiple_of": 4096}}
# GB of a rank, activations aside, with LoRA of r 16 on wq and wv.
FITS = [("7B", "bf16", 1, 13.6), ("7B", "bf16", 2, 7.9), ("7B", "bf16", 4, 4.7),
        ("7B", "bf16", 8, 3.1), ("7B", "full", 1, 108), ("7B", "full", 8, 19),
        ("13B", "bf16", 4, 8.5), ("13B", "full", 8, 34), ("70B", "bf16", 1, 138),
        ("70B", "bf16", 2, 73.5), ("70B", "bf16", 8, 22.1), ("70B", "bf16", 64, 7.27),
        ("70B", "full", 8, 156), ("70B", "full", 64, 35), ("7B", "nf4", 2, 2.84),
        pytest.param("70B", "nf4", 8, 8.41, marks=pytest.mark.slow)]


def planned(size, method):
    """Return (model, paths of its adapters) on the meta device, as a dry run has them."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(vocab_size=32000, **SIZES[size]))
    if method == "full":
        return model, []
    model.to(torch.bfloat16)
    if method == "nf4":
        for path, layer in list(model.layers.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.layers.set_submodule(path, quantizer("nf4")(layer).to(torch.bfloat16))
    return model, add_lora(model, LoRAConfig())


@pytest.mark.parametrize("size, method, n, gigabytes", FITS)
def test_what_fits_where(size, method, n, gigabytes):
    """The table of docs/sharding.md."""
    model, wrapped = planned(size, method)
    precision = finetune.job.mixed_precision("fp32" if method == "full" else "bf16",
                                      torch.device("cuda"), LoRAConfig())
    kinds, _ = estimate_memory(model, wrapped, Size(1, 1, 0), precision, n)
    kinds = Sharding(Ranks(size=n), n, method == "full").bytes_of_rank(kinds, model)
    total = sum(kinds.values()) - kinds["activations"] - kinds["logits"]
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_a_resumed_rank_keeps_only_its_part_of_a_saved_tensor():
    """A view would keep the whole tensor alive."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8,))
        cut = distribute_tensor(torch.zeros(64, 100), mesh, [Shard(0)], src_data_rank=None)
        saved = torch.arange(6400.0).view(64, 100)
        part = share_like(saved, cut).to_local()
        assert part.equal(saved[8:16])
        assert part.untyped_storage().nbytes() == saved.nbytes // 8
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("n", [8, 64])
@pytest.mark.parametrize("method", ["bf16", "full"])
def test_fsdp_cuts_a_70b_as_planned(n, method):
    """Cut by FSDP itself, over ranks that are only pretended: a rank's bytes are the plan's."""
    model, _ = planned("70B", "full")
    if method == "bf16":
        model.to(torch.bfloat16)
    expected = cut_bytes(model, n, method == "full")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        sharding = Sharding(Ranks(size=n), n, method == "full").connected(torch.device("cpu"))
        for block in model.layers:
            sharding.cut(block)
        cut = model.layers
        if method == "full":
            sharding.cut_root(model)
            cut = model
        parts = [parameter.to_local() for parameter in cut.parameters()]
        assert sum(part.nbytes for part in parts) == expected.share
    finally:
        dist.destroy_process_group()


# --- more ranks, and every method

QUANTIZED = ("none", "int8", "nf4")
CASES = {}
for method in METHODS:
    kinds = ("none",) if method == "delta-lora" else QUANTIZED
    CASES[method] = [f"--method {method} --quantize {kind}" for kind in kinds]
OTHERS = ["--method lora", "--precision bf16", "--precision fp16", "--share-prefix",
          "--tokens-per-batch 60", "--targets all", "--lora-plus-ratio 4", "--init random",
          "--early-stop 1", "--teacher teacher --checkpointing",
          "--method dylora --quantize int8 --teacher teacher --tokens-per-batch 60",
          "--checkpoint tied",
          "--teacher base --teacher-adapter whole0/adapter.pt --quantize nf4",
          "--adapter whole0/adapter.pt --quantize nf4"]
FULLS = {"bf16": ["--precision", "bf16"], "tied": ["--checkpoint", "tied"],
         "teacher": ["--teacher", "teacher"], "checkpointing": ["--checkpointing"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_every_method(place, method):
    checkpointed = [f"{setting} --checkpointing" for setting in CASES[method]]
    check_equal(place, CASES[method] + checkpointed)


@pytest.mark.slow
def test_other_options(place):
    check_equal(place, OTHERS)


@pytest.mark.slow
def test_compiled_blocks(place):
    check_equal(place, ["--compile --max-steps 2"])


@pytest.mark.slow
def test_full_fine_tuning_with_other_options(place):
    runs = []
    for name, flags in FULLS.items():
        runs.append([*FULL, *flags, "--out", f"full-{name}"])
        runs.append([*FULL, *flags, "--out", f"cut-{name}", *CUT])
    done = launch(place, runs)
    assert done.returncode == 0, message(done)
    for name in FULLS:
        check_close(place / f"full-{name}", place / f"cut-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks, size", [(3, 3), (4, 2)])
def test_more_ranks_and_copies(place, n_ranks, size):
    """Rows that three ranks cannot share evenly; two copies on two ranks each."""
    cut = ["--shard", str(size)]
    settings = ["--method lora", "--method dora --quantize nf4 --targets all"]
    check_equal(place, settings, n_ranks, cut)
    runs = [[*FULL, "--out", f"full{n_ranks}"], [*FULL, "--out", f"cut-full{n_ranks}", *cut]]
    done = launch(place, runs, n_ranks)
    assert done.returncode == 0, message(done)
    check_close(place / f"full{n_ranks}", place / f"cut-full{n_ranks}")


@pytest.mark.slow
def test_rank_0_alone_prints_and_refusals_are_one_line(place, tmp_path):
    flags = ["--checkpoint", place / "base", "--adapter", "none", "--max-new-tokens", "4"]
    done = torchrun(tmp_path, ROOT / "generate.py", *flags, "--shard")
    assert done.returncode == 0 and done.stdout.count("### Name the place.") == 1
    assert done.stderr.count(", 3 layers, fp32") == 1
    for more in ([], ["--shard", "--interactive"]):
        done = torchrun(tmp_path, ROOT / "generate.py", *flags, *more)
        assert done.returncode != 0 and done.stderr.count("generate.py: ") == 1
        assert "Traceback (most recent call last):\n  File \"/" not in done.stderr.split("E1")[0]


@pytest.mark.slow
def test_memory_that_one_rank_lacks_for_an_answer_ends_all(place, tmp_path):
    """The other one waits for its next forward, and would for half an hour."""
    (tmp_path / "launch.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import generate
from llama import sampling
next_logits = sampling.next_logits
calls = []
def lacking(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return next_logits(*args)
sampling.next_logits = lacking
generate.main(sys.argv[1:])
""")
    done = python(tmp_path, *launcher(2), tmp_path / "launch.py", "--checkpoint", place / "base",
                  "--adapter", "none", "--shard")
    assert done.returncode != 0
    assert done.stderr.count("generate.py: CUDA out of memory.\n") == 1
    assert "Traceback (most recent call last):\n  File \"/" not in done.stderr.split("E1")[0]


@pytest.mark.slow
def test_201_examples(place):
    examples = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(201)]
    (place / "many.json").write_text(json.dumps(examples))
    check_equal(place, ["--data many.json --epochs 1"])
    assert len(metrics(place / "cut0")) == 26


# Both ranks die in a forward of step 3, whose second micro-batch is the sixth with the check's.
KILL_BOTH = """
answer_loss = finetune.job.answer_loss
calls = []
def dying_loss(model, batch):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer_loss(model, batch)
finetune.job.answer_loss = dying_loss
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [[], CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("method", [["--method", "lora"], FULL], ids=["lora", "full"])
def test_a_run_whose_ranks_are_killed_goes_on_with_and_without_shard(place, method, before):
    """By SIGKILL, which leaves no time to save; the last save is that of step 2."""
    run = [*method, *before]
    done = launch(place, [[*run, "--overwrite", "--out", "dead"]], change=KILL_BOTH)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert len(metrics(place / "dead")) == 2
    runs = [[*run, "--overwrite", "--out", "alone"]]
    for out, after in (("goes-on-whole", []), ("goes-on-cut", CUT)):
        shutil.copytree(place / "dead", place / out, dirs_exist_ok=True)
        runs.append([*method, *after, "--out", out, "--resume"])
    done = launch(place, runs)
    assert done.returncode == 0, message(done)
    for out, after in (("goes-on-whole", []), ("goes-on-cut", CUT)):
        if method == FULL and after != before:
            check_close(place / "alone", place / out)
        else:
            assert result(place / "alone") == result(place / out)


OVERFLOW = """
answer_loss = finetune.job.answer_loss
calls = []
def changed_loss(model, batch):
    calls.append(1)
    loss, n = answer_loss(model, batch)
    return loss * float("inf") if rank == 1 and len(calls) == 3 else loss, n
finetune.job.answer_loss = changed_loss
check_gradients = finetune.job.check_gradients
def first_check(*given):
    calls.clear()
    check_gradients(*given)
finetune.job.check_gradients = first_check
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(place, method):
    done = launch(place, pairs([f"--method {method} --precision fp16 --lr 1e-3"]), change=OVERFLOW)
    assert done.returncode == 0, message(done)
    whole, cut = (metrics(place / out) for out in ("whole0", "cut0"))
    assert [row["loss_scale"] for row in cut] == [row["loss_scale"] for row in whole]
    assert [row["lr"] for row in cut] == [row["lr"] for row in whole]
    assert any(row["loss"] is None for row in cut)


FAILING = {
    "a block": """
from llama.checkpoint import StoredWeights
fill = StoredWeights.fill
def broken(self, layer, path, *rest):
    if rank == 1 and path == "layers.1.attention.wv":
        raise ValueError("planted")
    fill(self, layer, path, *rest)
StoredWeights.fill = broken
""",
    "the adapter": """
load_adapter = finetune.job.load_adapter
def broken(*given):
    if rank == 1:
        raise ValueError("planted")
    load_adapter(*given)
finetune.job.load_adapter = broken
""",
    "a missing file": """
from llama import checkpoint
read_tensors = checkpoint.read_tensors
def broken(path):
    if rank == 1:
        raise FileNotFoundError("planted")
    return read_tensors(path)
checkpoint.read_tensors = broken
"""}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILING)
def test_an_error_on_one_rank_ends_all_in_one_line(place, what):
    """A rank waits for none that has failed, in a gathered block or in a forward."""
    run = ["--out", "fails", "--method", "dora", *CUT]
    if what == "the adapter":
        launch(place, [["--out", "first"]])
        run = ["--out", "fails", "--adapter", "first/adapter.pt", *CUT]
    done = launch(place, [run], change=FAILING[what])
    assert done.returncode != 0
    assert done.stderr.count("train.py: planted") == 1 and "SIGALRM" not in done.stderr


# --- traps: each is put into a copy of the code, and a test must fail

MUTATIONS = {
    "uneven forwards in training": ("finetune/batches.py",
        "max(map(len, ranks)) - len(batches)", "1 - len(batches)"),
    "uneven forwards in evaluation": ("finetune/evaluate.py",
        "max(n_forwards) - n_forwards[rank]", "0"),
    "DDP copies rank 0's tensors": ("finetune/shard.py",
        "init_sync=self.mesh is None", "init_sync=True"),
    "state_dict on one rank": ("finetune/run.py",
        "states = states_of(self.parts, keeps=self.ranks.is_first)",
        """
        if self.ranks.is_first:
            states = states_of(self.parts, keeps=self.ranks.is_first)
        """),
    "codes stay buffers": ("finetune/shard.py", "buffers_to_parameters(block)", "pass"),
    "blocks stay gathered": ("finetune/shard.py",
        "fully_shard(block, mesh=self.mesh_to_cut(), reshard_after_forward=True, "
        "ignored_params=uncut)",
        "fully_shard(block, mesh=self.mesh_to_cut(), reshard_after_forward=False, "
        "ignored_params=uncut)"),
    "magnitudes of a part": ("lora/methods/dora.py",
        """
        with gathered_weights(base):
            self.lora_magnitude = nn.Parameter(self.norm())
        """,
        "self.lora_magnitude = nn.Parameter(self.norm())"),
}


@pytest.mark.slow
@pytest.mark.parametrize("trap", MUTATIONS)
def test_a_mutation_is_caught(trap, tmp_path):
    path, before, after = MUTATIONS[trap]
    _, n_places = mutated((ROOT / path).read_text(), before, after)
    assert n_places == 1
    folder = mutated_copy(tmp_path / "copy", path, before, after)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "tests/test_shard.py"]
    # Some of these faults let ranks wait for ever.
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**ONE_THREAD, "SECONDS_PER_RUN": "20"})
    assert done.returncode == 1, done.stdout[-2000:]
