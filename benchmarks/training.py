"""Whole runs of train.py, and how well generate.py answers with what they leave."""
import random
import shlex
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import generate
import train
from finetune.arguments import number, text
from finetune.demo.make import base_text
from finetune.errors import GAVE_UP
from finetune.exam import Exam
from finetune.folder import METRICS
from finetune.hardware import DTYPES, pick_hardware
from finetune.measures import measures
from finetune.options import DEMO, Options, parse_options
from finetune.pictures import read_metrics
from lora.methods.dylora import set_rank

from .runs import flag_words, output_discarded

HELD_OUT = str(DEMO / "held_out.json")
STEP_EXAMPLES = 32                                   # of an optimizer step, unless a table says


@dataclass(frozen=True)
class Task:
    """The base, the examples and the precision of whole runs; None: train.py's defaults."""
    checkpoint: str | None
    data: str | None
    val_data: str | None
    precision: str | None

    def flags(self) -> list[str]:
        """Return them as flags of train.py."""
        return flag_words(asdict(self))

    @property
    def questions(self) -> str:
        """The file of held-out examples."""
        return self.val_data or HELD_OUT


def add_training_flags(parser):
    """Add the flags of a Task."""
    flag = parser.add_argument
    flag("--checkpoint", metavar="DIR", type=text, help="base (default: the demo's)")
    flag("--data", metavar="FILE", type=text, help="examples (default: the demo's)")
    flag("--val-data", metavar="FILE", type=text, help="held-out examples (default: the demo's)")
    flag("--precision", choices=DTYPES, help="compute dtype (default: train.py's)")


def task_of(args) -> Task:
    """Return the Task of these flags.  Raises ValueError for one of --data and --val-data alone."""
    if bool(args.data) != bool(args.val_data):
        raise ValueError("--data and --val-data go together: the held-out examples are measured")
    return Task(args.checkpoint, args.data, args.val_data, args.precision)


def add_run_flags(parser):
    """Add the flags of `run_flags`."""
    flag = parser.add_argument
    flag("--epochs", metavar="N", type=number(int, 1),
         help="passes over the data (default: train.py's)")
    flag("--batch-size", metavar="N", type=number(int, 1, STEP_EXAMPLES), default=STEP_EXAMPLES,
         help=f"examples per micro-batch; a step has about {STEP_EXAMPLES} (default: "
              f"{STEP_EXAMPLES})")


def run_flags(args, step_examples: int = STEP_EXAMPLES) -> dict:
    """Return train.py's flags for runs with steps of about so many examples."""
    batch_size = min(args.batch_size, step_examples)
    return {"epochs": args.epochs, "batch_size": batch_size,
            "accumulation_steps": max(1, step_examples // batch_size), "share_prefix": True}


def finish_run(argv: list) -> tuple[Options, list]:
    """Run train.py to its end; return its Options and the rows of its metrics.jsonl.

    train.py may have ended early: too many steps with NaN or infinity.  Raises ValueError if it
    refuses.
    """
    options = parse_options(argv)
    try:
        with output_discarded():
            train.main(argv)
    except SystemExit as exit:
        if exit.code != GAVE_UP:
            line = f"train.py {shlex.join(argv)} was refused, see its error above"
            raise ValueError(line) from None
    return options, read_metrics(Path(options.out) / METRICS)


def load_answering_model(flags: list):
    """Return the (model, tokenizer) that generate.py answers with, given these flags."""
    args = generate.parse_args(flags)
    device, precision = pick_hardware(args.device, args.precision)
    saved = generate.read_saved(args)
    model, tokenizer, _ = generate.load(args, saved, device, precision)
    return model, tokenizer


def examine(flags: list, examples: list, rank: int | None = None) -> dict:
    """Return {parameters, and finetune.measures.measures} of generate.py's answers to examples.

    flags: generate.py's.  rank: what a DyLoRA is cut to; None leaves it whole.
    """
    model, tokenizer = load_answering_model(flags)
    if rank:
        set_rank(model, rank)
    columns = Exam(examples, tokenizer, model.args.max_seq_len).score(model)
    return {"parameters": sum(p.numel() for p in model.parameters())} | values_of(columns)


def values_of(columns: dict) -> dict[str, float]:
    """Return the measures of all rows together; columns: {name: a value per row}."""
    values = measures({name: column.sum(0) for name, column in columns.items()})
    return {name: value.item() for name, value in values.items()}


def new_prose(seed: int, n: int) -> list:
    """Return n rows of the kind of text that the demo's base was trained on."""
    return list(islice(base_text(random.Random(seed)), n))
