"""Run train.py's own loop as a cell: over rows in file order, with given or random weights."""
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import train
from finetune.arguments import add_hardware_flags, number, text
from finetune.batches import example_indices
from finetune.dataset import IGNORE, SupervisedDataset, count_answer, read_examples
from finetune.folder import METRICS
from finetune.hardware import pick_hardware
from finetune.job import META, Job, load_model, mixed_precision, prepare
from finetune.loss import answer_loss
from finetune.options import DEMO, Options, parse_options
from finetune.pictures import read_metrics
from finetune.memory import memory_of_a_step
from finetune.ranks import Ranks, connect
from finetune.run import Run
from llama.checkpoint import TOKENIZER, read_params
from llama.files import write_json

from .measure import Peaks, count_work, multiplied_weights
from .tables import Table, report, run_fresh, try_fresh

# In the words of Hugging Face's config.json, which the peers read too.
SHAPES = {
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
             "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
           "tie_word_embeddings": False},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "intermediate_size": 13824, "vocab_size": 32000,
            "tie_word_embeddings": False},
}
SHAPE_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096}
SIZE_HELP = {
    "batch_size": "examples per step",
    "warm": "steps to warm up, which do not count",
    "steps": "steps per repeat",
    "repeats": "repeats, of which the median counts",
}


@dataclass(frozen=True)
class Workload:
    """A run of train.py's loop to be measured.

    flags: train.py's.  data: file of examples; None for random rows, all of `length` tokens, or as
    long as Alpaca's if that is None.  warm: steps before the first that counts.  steps: per repeat.
    autocast: use autocast although the base is frozen in fp32; train.py never does this.
    count: whether bytes and FLOP are counted by kind.
    """
    flags: list
    data: str | None
    warm: int
    steps: int
    repeats: int
    length: int | None = None
    autocast: bool = False
    count: bool = False
    ranks: int = 1

    def options(self, *flags) -> Options:
        """Return train.py's Options of the workload's flags and these."""
        return parse_options([*self.flags, *flags])


@dataclass(frozen=True)
class Setup:
    """The model, the data, the hardware and the steps of all workloads of a table.

    folder: of the model, in which init "random" needs no weights.  data: None for random rows.
    """
    folder: str
    init: str
    layers: int | None
    data: str | None
    device: str
    precision: str
    warm: int
    steps: int
    repeats: int

    def workload(self, flags: dict, **changes) -> Workload:
        """Return a Workload of this setup with more flags of train.py, and with fields changed."""
        flags = {"checkpoint": self.folder, "init": self.init, "device": self.device,
                 "precision": self.precision, "layers": self.layers, "data": self.data} | flags
        workload = Workload(flag_words(flags), self.data, self.warm, self.steps, self.repeats)
        return replace(workload, **changes)


def add_flags(parser, **sizes):
    """Add the flags of what is run; sizes: names in SIZE_HELP, with their defaults."""
    flag = parser.add_argument
    flag("--checkpoint", metavar="DIR", type=text, help="model (default: the --shape)")
    flag("--shape", choices=SHAPES,
         help="a model of these sizes with random weights (default: 135m)")
    flag("--layers", metavar="N", type=number(int, 1),
         help="the first N blocks only (default: all)")
    flag("--data", metavar="FILE", type=text,
         help="examples (default: random ids, as long as Alpaca's)")
    add_hardware_flags(parser)
    for name, default in sizes.items():
        lowest = 0 if name == "warm" else 1
        flag("--" + name.replace("_", "-"), metavar="N", type=number(int, lowest), default=default,
             help=f"{SIZE_HELP[name]} (default: {default})")


def make_setup(args, out: Path) -> Setup:
    """Return the Setup of these flags, with device, precision and folder decided.

    The folder of a shape is made in `out`.  Raises ValueError for flags that contradict each other
    and for a model that is not a transformer.
    """
    if args.checkpoint and args.shape:
        raise ValueError("--checkpoint and --shape both name a model; give one")
    if args.data and not args.checkpoint:
        raise ValueError("--data needs the tokenizer of a --checkpoint")
    device, precision = pick_hardware(args.device, args.precision)
    folder = args.checkpoint or shape_folder(args.shape or "135m", out)
    model_args, _ = read_params(folder)
    if not model_args.n_heads:
        raise ValueError(f"{folder} is not a transformer: this table counts a transformer's work")
    init = "checkpoint" if args.checkpoint else "random"
    return Setup(str(folder), init, args.layers, args.data, str(device), precision, args.warm,
                 args.steps, args.repeats)


def shape_folder(name: str, out: Path) -> str:
    """Make a folder of these sizes without weights, with the demo's tokenizer; return its path."""
    folder = out / f"shape-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", SHAPE_CONFIG | SHAPES[name])
    shutil.copyfile(DEMO / TOKENIZER, folder / TOKENIZER)
    return str(folder)


def flag_words(settings: dict) -> list[str]:
    """Return settings as words of a command line; None and False are left out."""
    words = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


@dataclass(frozen=True)
class Rows:
    """Rows of (tokens, labels) as train.py's loop reads a dataset."""
    rows: list

    @property
    def numbers(self) -> range:
        return range(1, len(self.rows) + 1)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def random_rows(vocab_size: int, length: int | None = None, n: int = 200, seed: int = 0) -> list:
    """Return n rows of random ids.

    They are as long as Alpaca's are with LLaMA's tokenizer, with two preambles as there; or all of
    one length, half of it answer.
    """
    rng = np.random.default_rng(seed)
    preambles = rng.integers(3, vocab_size, (2, 38)).tolist()
    rows = []
    for _ in range(n):
        has_input = rng.random() >= 0.4              # Without one Alpaca's preamble is shorter.
        preamble = preambles[0] if has_input else preambles[1][:28]
        mean = 33 if has_input else 18
        n_question = max(4, round(mean * rng.lognormal(0, 0.4)))
        prompt = [1, *preamble, *rng.integers(3, vocab_size, n_question).tolist()]
        n_answer = min(max(2, round(rng.lognormal(3.4, 1.15))), 340)
        if length:
            n_answer = length - length // 2
            prompt = list(islice(cycle(prompt), length // 2))
        answer = [*rng.integers(3, vocab_size, n_answer - 1).tolist(), 2]
        rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    return rows


def rows_of(workload: Workload) -> list:
    """Return the rows that a workload reads, in their order."""
    options = workload.options()
    model_args, tokenizer = read_params(options.checkpoint)
    if not workload.data:
        return random_rows(model_args.vocab_size, workload.length)
    examples = read_examples(workload.data)
    return SupervisedDataset(examples, tokenizer, options.max_seq_len, workload.data).rows


def plan_in_file_order(n_rows: int, workload: Workload, options: Options, n_ranks: int = 1) -> list:
    """Return a plan over the rows in their order, from the first again when they end.

    First the steps of the warm-up, then each repeat's, which are the same rows every time.
    """
    indices = cycle(range(n_rows))
    steps = []
    for _ in range(workload.warm + workload.steps):
        ranks = [next_batches(indices, options) for _ in range(n_ranks)]
        # 0.5: never an epoch's end, so the loop does not evaluate.
        steps.append((0.5, ranks))
    warm_up = steps[:workload.warm]
    repeat = steps[workload.warm:]
    return warm_up + repeat * workload.repeats


def next_batches(indices: Iterator, options: Options) -> list:
    """Return the next micro-batches of one rank for one step, as lists of indices."""
    batches = []
    for _ in range(options.accumulation_steps):
        batches.append(list(islice(indices, options.batch_size)))
    return batches


def job_of(workload: Workload, ranks: Ranks, *flags) -> Job:
    """Return train.py's Job for a workload, with shapes in place of weights.

    Its rows are in file order, and nothing is held out.
    """
    options = workload.options(*flags)
    job = prepare(options, ranks, train.build_optimizer)
    rows = Rows(rows_of(workload))
    plan = plan_in_file_order(len(rows), workload, options, ranks.size)
    job = replace(job, train_set=rows, val_set=None, plan=plan)
    model, adapter_paths = load(workload, job, META, "random")
    if workload.autocast:
        precision = mixed_precision(job.precision.name, job.precision.device, None)
        job = replace(job, precision=precision)
    return replace(job, model=model, adapter_paths=adapter_paths)


def load(workload: Workload, job: Job, device: torch.device, init: str):
    """Return train.py's (model, paths of its adapter layers); with autocast the base is fp32."""
    if workload.autocast:
        fp32 = mixed_precision("fp32", job.precision.device, job.lora)
        job = replace(job, precision=fp32)
    return load_model(job, device, init)


def measure_run(workload: Workload) -> dict | None:
    """Run train.py's own loop; return what it took, or None on ranks above 0.

    {tokens_per_second, seconds: per step, loss, peaks: MiB by phase}, and with workload.count
    {bytes: by kind, forward, flop: per token}.
    """
    ranks = connect()
    with tempfile.TemporaryDirectory() as out:
        job = job_of(workload, ranks, "--out", out)
        device = job.precision.device
        peaks = Peaks(device)
        peaks.end("start")
        torch.manual_seed(job.options.seed)
        model, adapter_paths = load(workload, job, device, job.options.init)
        peaks.end("weights")
        with output_discarded(), LoopPhases(model, peaks) as phases:
            job = replace(job, model=model, adapter_paths=adapter_paths, loss_fn=phases.loss)
            run = Run.open(job.options, ranks)
            run.check_same_run(job)
            run.begin(job)
            train.train(job, run)
        log = read_metrics(Path(out) / METRICS) if ranks.is_first else []
    if ranks.size > 1:
        dist.destroy_process_group()
    if not ranks.is_first:
        return None
    result = speed_of(workload, log) | {"loss": log[-1]["loss"], "peaks": peaks.mib}
    if workload.count:
        result |= counts_of(job, phases.n_bytes, log[-1]["tokens"])
    return result


def speed_of(workload: Workload, log: list) -> dict:
    """Return {tokens_per_second, seconds: per step}, the median of the repeats after the warm-up.

    log: rows of metrics.jsonl.
    """
    timed = log[workload.warm:]
    repeats = [timed[i:i + workload.steps] for i in range(0, len(timed), workload.steps)]
    n_tokens = sum(row["tokens"] for row in repeats[0])
    speed = statistics.median(n_tokens / seconds_of(repeat) for repeat in repeats)
    return {"tokens_per_second": speed, "seconds": n_tokens / speed / workload.steps}


def seconds_of(rows: list) -> float:
    """Return the seconds that these steps of a metrics.jsonl took."""
    return sum(row["tokens"] / row["tokens_per_second"] for row in rows)


def counts_of(job: Job, n_bytes: dict, n_tokens: int) -> dict:
    """Return bytes by kind, and FLOP per token, of the first rank's last step.

    n_bytes: those of gradients and optimizer.  n_tokens: of all ranks in that step.
    """
    _, ranks = job.plan[-1]
    batches = []
    for indices in ranks[0]:
        batch = job.collate([job.train_set[i] for i in indices])
        batches.append(batch.to(job.precision.device))
    work = count_work(job.model, batches, job.precision.autocast)
    weights = sum(p.nbytes for p in job.model.parameters())
    by_kind = {"parameters": weights + work["copies"], **n_bytes,
               "activations": work["activations"]}
    return {"bytes": by_kind, "forward": work["forward"] / n_tokens,
            "flop": work["flop"] / n_tokens}


@contextmanager
def output_discarded():
    """Discard what is printed on stdout within the block."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


class LoopPhases:
    """Within the block, tell `peaks` where the phases of train.py's loop end.

    It sees them by what the loop calls: `loss`, which must be its loss_fn, and the optimizer.
    n_bytes: {gradients, optimizer: bytes} of the last step.
    """

    def __init__(self, model, peaks: Peaks):
        self.model = model
        self.peaks = peaks
        self.last_phase = "step"
        self.n_bytes = {}
        self.hooks = []

    def __enter__(self):
        self.hooks = [register_optimizer_step_pre_hook(self.before_step),
                      register_optimizer_step_post_hook(self.after_step)]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def loss(self, model, batch):
        # If the last phase was a forward pass, its backward pass has just ended.
        self.peaks.end("backward" if self.last_phase == "forward" else None)
        result = answer_loss(model, batch)
        self.peaks.end("forward")
        self.last_phase = "forward"
        return result

    def before_step(self, *_):
        self.peaks.end("backward")
        trained = [p for p in self.model.parameters() if p.grad is not None]
        self.n_bytes["gradients"] = sum(p.grad.nbytes for p in trained)

    def after_step(self, optimizer, *_):
        self.peaks.end("step")
        self.last_phase = "step"
        tensors = []
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        self.n_bytes["optimizer"] = sum(tensor.nbytes for tensor in tensors)


def estimate_costs(workload: Workload) -> dict:
    """Return {estimate: bytes by kind, P}, which need no weights.

    The estimate is finetune/memory.py's, and P is multiplied_weights.
    """
    job = job_of(workload, Ranks(size=workload.ranks))
    bytes_by_kind, _ = memory_of_a_step(job)
    if workload.autocast and not job.options.checkpointing:
        # Until backward each frozen matrix is there once more, in 16 bit.
        frozen = [p for p in job.model.parameters() if p.dim() == 2 and not p.requires_grad]
        bytes_by_kind["weights"] += 2 * sum(p.numel() for p in frozen)
    n_tokens = 0
    n_answer = 0
    for step in job.plan:
        for i in example_indices(step):
            tokens, labels = job.train_set[i]
            n_tokens += len(tokens)
            n_answer += count_answer(labels)
    return {"estimate": bytes_by_kind,
            "P": multiplied_weights(job.model.args, n_answer / n_tokens)}


def measure_cell(table: Table, name: str, workload: Workload,
                 measure: Callable = measure_run) -> dict:
    """Return the cell of a workload: what is estimated, and what measure(workload) returns.

    If memory is too small, only the estimate.
    """
    def compute():
        # Both in new processes: the plan of the first cell would set oneDNN's limit for all.
        return run_fresh(estimate_costs, workload) | try_fresh(measure, workload)

    result = table.cell(asdict(workload), compute)
    report_speed(name, result)
    return result


def completed(result: dict) -> bool:
    """Return whether a workload ran to its end; if not, memory was not enough."""
    return "peaks" in result


def report_speed(name: str, result: dict):
    if completed(result):
        speed = f"{result['tokens_per_second']:,.1f} tokens/s"
        report(f"{name}: {speed}, peak {peak_of(result):,.0f} MiB")
    else:
        report(f"{name}: out of memory")


def peak_of(result: dict, phase: str = "process") -> float:
    """Return the MiB at the peak of a phase, by default of the whole process."""
    return result["peaks"][phase]
