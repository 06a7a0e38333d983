"""A run of train.py as a cell: its own loop over rows in file order, from a checkpoint or at a shape with random weights."""
import contextlib
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import generate
import train
from finetune.arguments import add_hardware_flags, number, text
from finetune.batches import example_indices
from finetune.dataset import IGNORE, SupervisedDataset, count_answer, read_examples
from finetune.errors import GAVE_UP
from finetune.evaluate import Exam, measures
from finetune.hardware import DTYPES, pick_hardware
from finetune.loss import answer_loss
from finetune.options import DEMO, parse_options
from finetune.pictures import read_metrics
from finetune.preflight import memory_of_a_step
from finetune.ranks import Ranks, connect
from finetune.run import METRICS, Run
from llama.checkpoint import TOKENIZER, read_params
from llama.files import write_json
from lora.methods.dylora import set_rank

from .measure import Peaks, counted, multiplied
from .tables import OutOfMemory, cell, tried, within_memory

SHAPES = {                                                       # Hugging Face's words, which the peers read too
    "135m": dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                 vocab_size=49152, tie_word_embeddings=True),
    "7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, intermediate_size=11008,
               vocab_size=32000, tie_word_embeddings=False),
    "13b": dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40, intermediate_size=13824,
                vocab_size=32000, tie_word_embeddings=False),
}
SAYS = {"batch_size": "examples a step", "warm": "steps before the first that counts", "steps": "steps that count",
        "repeats": "how often; the median counts"}


def add_flags(parser, **sizes):
    """What is run; sizes: of SAYS, with their defaults."""
    flag = parser.add_argument
    flag("--checkpoint", metavar="DIR", type=text, help="model (default: the --shape)")
    flag("--shape", choices=SHAPES, help="a model of these sizes with random weights (default: 135m)")
    flag("--layers", metavar="N", type=number(int, 1), help="the first N blocks only (default: all)")
    flag("--data", metavar="FILE", type=text, help="examples (default: random ids, as long as Alpaca's)")
    add_hardware_flags(parser)
    for name, default in sizes.items():
        flag("--" + name.replace("_", "-"), metavar="N", type=number(int, name != "warm"), default=default,
             help=f"{SAYS[name]} (default: {default})")


def settle(args):
    """Decide what the flags leave open: device, precision, folder.  Raises ValueError for what contradicts itself."""
    if args.checkpoint and args.shape:
        raise ValueError("--checkpoint and --shape both name a model; give one")
    if args.data and not args.checkpoint:
        raise ValueError("--data needs the tokenizer of a --checkpoint")
    device, args.precision = pick_hardware(args.device, args.precision)
    args.device, args.folder = str(device), args.checkpoint or shape_folder(args.shape or "135m", args.out)
    if not read_params(args.folder)[0].n_heads:
        raise ValueError(f"{args.folder} is no transformer: what is counted here is a transformer's work")


def base_flags(args):
    """train.py's flags for the model, the data and the machine."""
    return ["--checkpoint", str(args.folder), "--init", "checkpoint" if args.checkpoint else "random", "--device", args.device,
            "--precision", args.precision, *(["--layers", str(args.layers)] if args.layers else []),
            *(["--data", args.data] if args.data else [])]


def run_of(args, *flags, **settings):
    """Settings of one run: train.py's flags, and what is done with it."""
    return dict(flags=[*base_flags(args), *flags], autocast=False, data=args.data, length=None, warm=args.warm, steps=args.steps,
                repeats=args.repeats, count=False, ranks=1) | settings


def shape_folder(name, out):
    """A folder of these sizes without weights, with the demo's tokenizer; train.py takes it too, with --init random."""
    folder = out / f"shape-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                                        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
                                        **SHAPES[name]})
    shutil.copyfile(DEMO / TOKENIZER, folder / TOKENIZER)
    return folder


class Rows(list):
    """[(tokens, labels)] as train.py's loop reads a dataset."""

    def __init__(self, rows):
        super().__init__(rows)
        self.rows, self.numbers = rows, range(1, len(rows) + 1)


def drawn_rows(vocab_size, length=None, n=200, seed=0):
    """n rows of random ids, as long as Alpaca's are with LLaMA's tokenizer and with two preambles as there; or all of one
    length, half of it answer."""
    rng, rows = np.random.default_rng(seed), []
    preambles = rng.integers(3, vocab_size, (2, 38)).tolist()
    for _ in range(n):
        alone = int(rng.random() < 0.4)                              # an instruction without an input: the shorter preamble
        own = max(4, round((33, 18)[alone] * rng.lognormal(0, 0.4)))
        prompt = [1, *preambles[alone][:(38, 28)[alone]], *rng.integers(3, vocab_size, own).tolist()]
        answer = min(max(2, round(rng.lognormal(3.4, 1.15))), 340)
        if length:
            prompt, answer = (prompt * length)[:length // 2], length - length // 2
        answer = [*rng.integers(3, vocab_size, answer - 1).tolist(), 2]
        rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    return rows


def rows_of(run):
    """Return the rows that a run reads, in their order."""
    options = parse_options(run["flags"])
    model_args, tokenizer = read_params(options.checkpoint)
    if not run["data"]:
        return Rows(drawn_rows(model_args.vocab_size, run["length"]))
    examples = read_examples(options.data)
    return Rows(SupervisedDataset(examples, tokenizer, options.max_seq_len, options.data).rows)


def in_file_order(rows, run, options, world_size=1):
    """Return steps over the rows in their order, from the first again when they end.

    First the steps of the warm-up, then each repeat's.
    """
    indices = (i % len(rows) for i in count())

    def next_rank():
        return [[next(indices) for _ in range(options.batch_size)]
                for _ in range(options.accumulation_steps)]

    steps = [(0.5, [next_rank() for _ in range(world_size)])
             for _ in range(run["warm"] + run["steps"])]
    return steps[:run["warm"]] + steps[run["warm"]:] * run["repeats"]


def job_of(run, ranks, *flags):
    """Return train.py's Job for a run, over its rows in file order, with sizes for weights.

    run["autocast"]: a frozen base in fp32 under autocast, which train.py itself never does.
    """
    options = parse_options([*run["flags"], *flags])
    job = train.prepare(options, ranks)
    rows = rows_of(run)
    plan = in_file_order(rows, run, options, ranks.size)
    job = replace(job, train_set=rows, val_set=None, plan=plan)
    model, wrapped = load(run, job, train.META, "random")
    if run["autocast"]:
        precision = train.mixed_precision(job.precision.name, job.precision.device, None)
        job = replace(job, precision=precision)
    return replace(job, model=model, wrapped=wrapped)


def load(run, job, device, init):
    """Return train.py's (model, wrapped paths) for a job; with run["autocast"] in fp32."""
    if run["autocast"]:
        fp32 = train.mixed_precision("fp32", job.precision.device, job.lora)
        job = replace(job, precision=fp32)
    return train.load_model(job, device, init)


def measured(run):
    """Run train.py's own loop; return what it took, or None on ranks above 0.

    {tokens_per_second, seconds per step, loss, peaks in MiB by phase, and if run["count"] bytes and
    FLOP by kind}.
    """
    ranks = connect()
    with tempfile.TemporaryDirectory() as out:
        job = job_of(run, ranks, "--out", out)
        device = job.precision.device
        peaks = Peaks(device)
        peaks("start")
        torch.manual_seed(job.options.seed)
        model, wrapped = load(run, job, device, job.options.init)
        peaks("weights")
        with quietly(), phases(model, peaks) as (sizes, loss_fn):
            job = replace(job, model=model, wrapped=wrapped, loss_fn=loss_fn)
            kept = Run.open(job.options, ranks)
            kept.check_same_run(job)
            kept.begin(job)
            train.train(job, kept)
            log = read_metrics(Path(out) / METRICS) if ranks.is_first else []
    if ranks.size > 1:
        dist.destroy_process_group()
    if not ranks.is_first:
        return None
    result = speed_of(run, log) | dict(loss=log[-1]["loss"], peaks=peaks.mb)
    if run["count"]:
        _, (first_rank, *_) = job.plan[-1]
        batches = [job.collate([job.train_set[i] for i in batch]).to(device) for batch in first_rank]
        kinds = counted(model, batches, job.precision.autocast)
        weights = sum(p.nbytes for p in model.parameters())
        result["bytes"] = dict(parameters=weights + kinds["copies"], **sizes,
                               activations=kinds["activations"])
        for kind in ("forward", "flop"):                          # per token
            result[kind] = kinds[kind] / log[-1]["tokens"]
    return result


def speed_of(run, log):
    """Return {tokens_per_second, seconds per step}: the median of the repeats after the warm-up."""
    timed = log[run["warm"]:]
    repeats = [timed[i:i + run["steps"]] for i in range(0, len(timed), run["steps"])]
    tokens = sum(row["tokens"] for row in repeats[0])
    seconds = [sum(row["tokens"] / row["tokens_per_second"] for row in repeat) for repeat in repeats]
    speed = statistics.median(tokens / time for time in seconds)
    return dict(tokens_per_second=speed, seconds=tokens / speed / run["steps"])


@contextlib.contextmanager
def quietly():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def add_training_flags(parser):
    """What whole runs are of."""
    flag = parser.add_argument
    flag("--checkpoint", metavar="DIR", type=text, help="base (default: the demo's)")
    flag("--data", metavar="FILE", type=text, help="examples (default: the demo's)")
    flag("--val-data", metavar="FILE", type=text, help="held-out examples (default: the demo's)")
    flag("--precision", choices=DTYPES, help="compute dtype (default: train.py's)")


def training_flags(args):
    """train.py's flags for that.  Raises ValueError for data without held-out examples, or these alone."""
    if bool(args.data) != bool(args.val_data):
        raise ValueError("--data and --val-data go together: what is held out is measured")
    return [word for flag in ("checkpoint", "data", "val_data", "precision") if getattr(args, flag) is not None
            for word in ("--" + flag.replace("_", "-"), getattr(args, flag))]


def finished(argv):
    """Run train.py to its end; return (Options, rows of metrics.jsonl).

    It may have given up for want of a finite step.  Raises ValueError where train.py refuses.
    """
    options = parse_options(argv)
    try:
        with quietly():
            train.main(argv)
    except SystemExit as exit:
        if exit.code != GAVE_UP:
            raise ValueError(f"train.py {shlex.join(argv)} was refused, as it says above") from None
    return options, read_metrics(Path(options.out) / METRICS)


def examined(flags, examples, rank=None):
    """What generate.py with these flags, and of a DyLoRA this rank, answers to examples: parameters, and evaluate.measures."""
    args = generate.parse_args(flags)
    device, args.precision = generate.pick_hardware(args.device, args.precision)
    model, tokenizer, _ = generate.load(args, device)
    if rank:
        set_rank(model, rank)
    exam = Exam(examples, tokenizer, model.args.max_seq_len)
    found = measures({name: column.sum(0) for name, column in exam.take(model).items()})
    return {"parameters": sum(p.numel() for p in model.parameters()), **{name: value.item() for name, value in found.items()}}


@contextlib.contextmanager
def phases(model, peaks):
    """Tell `peaks` where each phase of train.py's loop ends, by what the loop calls.  Yields a dict that gets the bytes of
    gradients and of the optimizer's state, and the loss_fn for it."""
    last, sizes = "step", {}

    def marked_loss(*batch):
        nonlocal last
        peaks("backward" if last == "forward" else None)
        result = answer_loss(*batch)
        peaks(last := "forward")
        return result

    def before_step(optimizer, *_):
        peaks("backward")
        sizes["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def after_step(optimizer, *_):
        nonlocal last
        peaks(last := "step")
        sizes["optimizer"] = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    hooks = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]
    try:
        yield sizes, marked_loss
    finally:
        for hook in hooks:
            hook.remove()


def estimated(run):
    """Return what is known before any weight is loaded: {estimate: bytes by kind, P}.

    By finetune/preflight.py; P as measure.py has it.
    """
    job = job_of(run, Ranks(size=run["ranks"]))
    kinds, _ = memory_of_a_step(job)
    if run["autocast"] and not job.options.checkpointing:
        # Each frozen matrix once more, in 16 bit, until backward.
        frozen = [p for p in job.model.parameters() if p.dim() == 2 and not p.requires_grad]
        kinds["weights"] += 2 * sum(p.numel() for p in frozen)
    tokens = 0
    answers = 0
    for step in job.plan:
        for i in example_indices(step):
            row_tokens, labels = job.train_set[i]
            tokens += len(row_tokens)
            answers += count_answer(labels)
    return dict(estimate=kinds, P=multiplied(job.model.args, answers / tokens))


def taken(args, name, run):
    """estimated(run) and measured(run) as one dict; without the latter's keys where memory did not suffice."""
    result = cell(args, run, lambda: estimated(run) | tried(measured if run["ranks"] == 1 else on_ranks, run))
    say(name, result)
    return result


def say(name, result):
    speed = f"{result['tokens_per_second']:,.1f} tokens/s, peak {most(result):,.0f} MiB" if "peaks" in result else "out of memory"
    print(f"{name}: {speed}", file=sys.stderr, flush=True)


def rank_of(run):
    try:
        return within_memory(measured, run)
    except OutOfMemory:
        sys.exit(3)


def on_ranks(run):
    """measured(run) in as many processes as run["ranks"], as torchrun starts them: on a thread each, if nothing says otherwise."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(1, 1, run["ranks"], rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="spawn")
    try:
        return elastic_launch(config, rank_of)(run)[0]
    except ChildFailedError as error:
        if any(failure.exitcode in (3, -9) for failure in error.failures.values()):
            raise OutOfMemory(f"{run['ranks']} ranks ran out of memory") from None
        raise ValueError(f"one of {run['ranks']} ranks failed, as it says above") from None


def most(result, phase="process"):
    """MiB at the peak of this phase, or of all."""
    return result["peaks"][phase]


def mib(size):
    return f"{size / 2 ** 20:,.0f}"
