"""The flags of train.py: what each means, their checks and defaults, and the Options they make."""
import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from lora import LoRAConfig, method_options
from lora.methods import METHODS
from lora.quantize import KINDS as QUANTIZED

from .arguments import Parser, add_hardware_flags, as_flag, named_values, names, number, text
from .shard import RANKS_OF_MACHINE
from .templates import TEMPLATES

DEMO = Path(__file__).parent / "demo"
TEMPERATURE = 2.0                                    # of distillation
WEIGHT = 0.5                                         # of the teacher in the loss
# Settings of an adapter.  --adapter brings its own, and --method full has none.
ADAPTER_SETTINGS = ("r", "alpha", "dropout", "targets", "method_options")


@dataclass(frozen=True)
class Options:
    """What the command line asks of a run, checked; the parser's help explains each field.

    None: decided later (template, device, precision, quantize), or not given.
    """
    # model and data
    checkpoint: str
    init: str
    layers: int | None
    data: tuple[str, ...]
    template: str | None
    max_seq_len: int
    val_data: tuple[str, ...] | None
    val_fraction: float | None
    out: str | None
    seed: int
    dry_run: bool
    # training
    method: str
    adapter: str | None
    r: int
    alpha: float
    dropout: float | None
    targets: tuple
    method_options: dict
    lora_plus_ratio: float
    lr: float
    weight_decay: float
    warmup_steps: int | None
    schedule: str
    epochs: int
    max_steps: int | None
    clip_grad_norm: float
    neftune_alpha: float | None
    # distillation
    teacher: str | None
    teacher_adapter: str | None
    distill_temperature: float | None
    distill_weight: float | None
    # memory and speed
    batch_size: int
    accumulation_steps: int
    tokens_per_batch: int | None
    share_prefix: bool
    compile: bool
    fast_matmul: bool
    checkpointing: bool
    quantize: str | None
    shard: int | None
    device: str | None
    precision: str | None
    log_every: int
    # saving and resuming
    save_every: int
    resume: bool
    overwrite: bool
    max_bad_steps: int
    early_stop: int | None

    @property
    def lora_config(self) -> LoRAConfig | None:
        """The adapter's configuration according to the flags; None for --method full."""
        return make_lora_config(self)


def parse_options(argv=None, description=None) -> Options:
    """Return the Options of a command line.  Raises ValueError for flags that contradict."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    check_combinations(args, parser)
    settle_defaults(args)
    return Options(**vars(args))


def make_lora_config(options) -> LoRAConfig | None:
    """Return the LoRAConfig that the flags describe; None for --method full.

    Raises ValueError for settings that the method cannot have.
    """
    if options.method == "full":
        return None
    settings = dict(options.method_options)
    if "seed" in method_options(options.method):
        settings.setdefault("seed", options.seed)
    return LoRAConfig(options.method, options.r, options.alpha, options.dropout, options.targets,
                      options=settings)


def check_combinations(args, parser):
    """Raise ValueError for flags that contradict each other."""
    has_held_out = args.val_data is not None or args.val_fraction is not None
    is_demo_data = args.data is None
    if args.val_data is not None and args.val_fraction is not None:
        parser.error("--val-data and --val-fraction both name held-out examples; give one")
    if args.early_stop and not has_held_out and not is_demo_data:
        parser.error("--early-stop watches the held-out loss: give --val-data or --val-fraction")
    files = [os.path.realpath(path) for path in args.data or ()]
    if len(set(files)) < len(files):
        parser.error("--data names a file twice; give each once")
    if args.resume and args.overwrite:
        parser.error("--resume continues a run, --overwrite replaces it; give one")
    flags = given_flags(parser, ("method", *ADAPTER_SETTINGS))
    if args.adapter and flags:
        parser.error(f"--adapter brings its own settings; leave out {flags}")
    if args.method == "full" and args.quantize not in (None, "none"):
        parser.error(f"--quantize {args.quantize} needs a frozen base, and --method full trains "
                     "the base")
    flags = given_flags(parser, ADAPTER_SETTINGS)
    if args.method == "full" and flags:
        parser.error(f"--method full trains the base and has no adapter; leave out {flags}")
    teacher_flags = (args.teacher_adapter, args.distill_temperature, args.distill_weight)
    if not args.teacher and any(value is not None for value in teacher_flags):
        parser.error("--teacher-adapter, --distill-temperature and --distill-weight need a "
                     "--teacher; name its folder")


def given_flags(parser, names: tuple) -> str:
    """Return those of these settings whose flags stand on the command line, as one text."""
    return ", ".join(as_flag(name, True) for name in names if name in parser.given)


def is_demo(folder: str) -> bool:
    """Return whether a folder is the demo's base, by whatever path."""
    return os.path.realpath(folder) == os.path.realpath(DEMO)


def settle_defaults(args):
    """Fill in the defaults that depend on other flags."""
    args.checkpoint = args.checkpoint or str(DEMO)
    over_demo = is_demo(args.checkpoint)
    if args.data is None and args.val_data is None and args.val_fraction is None:
        args.val_data = (str(DEMO / "held_out.json"),)
    if args.lr is None:
        if args.method == "full":
            args.lr = 1e-5
        else:
            args.lr = 5e-3 if over_demo else 3e-4
    if args.epochs is None:
        args.epochs = 4 if over_demo else 3
    args.data = tuple(args.data or (str(DEMO / "train.json"),))
    args.val_data = tuple(args.val_data) if args.val_data else None
    if args.teacher and args.distill_temperature is None:
        args.distill_temperature = TEMPERATURE
    if args.teacher and args.distill_weight is None:
        args.distill_weight = WEIGHT
    config = make_lora_config(args)                  # checks the settings, and fills in defaults
    if config:
        args.dropout = config.dropout
        args.method_options = config.options


def make_parser(description=None):
    """Return the parser of train.py's flags."""
    parser = Parser(prog="train.py", description=description)
    add_data_flags(parser.add_argument_group("model and data"))
    add_learning_flags(parser.add_argument_group("training"))
    add_teacher_flags(parser.add_argument_group("distillation"))
    add_cost_flags(parser.add_argument_group("memory and speed"))
    add_saving_flags(parser.add_argument_group("saving and resuming"))
    return parser


def add_data_flags(group):
    flag = group.add_argument
    flag("--checkpoint", metavar="DIR", type=text,
         help="base model, a folder in Meta's or Hugging Face's layout (default: the demo's)")
    flag("--init", choices=("checkpoint", "random"), default="checkpoint",
         help="random: random weights, with only sizes and tokenizer from --checkpoint (default: "
              "checkpoint)")
    flag("--layers", metavar="N", type=number(int, 1),
         help="keep the first N blocks only (default: all)")
    flag("--data", metavar="FILE", type=text, nargs="+", action="extend",
         help="examples as JSON, a list or one per line; several files are joined (default: the "
              "demo's)")
    flag("--template", choices=TEMPLATES,
         help="prompt format, a page in finetune/templates/ (default: the --adapter's, else "
              "alpaca)")
    flag("--max-seq-len", metavar="N", type=number(int, 2), default=512,
         help="maximum tokens per row; longer examples are truncated, plain text goes on in "
              "another row (default: 512)")
    flag("--val-data", metavar="FILE", type=text, nargs="+", action="extend",
         help="held-out examples (default: the demo's if --data is the demo's, else none)")
    flag("--val-fraction", metavar="F", type=number(float, 0, 1, open_low=True, open_high=True),
         help="hold out this share of --data instead")
    flag("--out", metavar="DIR", type=text,
         help="folder of the run (default: out, where it replaces the last run)")
    flag("--seed", metavar="N", type=number(int, 0), default=0,
         help="random seed for weights, order of examples and dropout (default: 0)")
    flag("--dry-run", action="store_true",
         help="check everything that can be checked without the weights, then stop")


def add_learning_flags(group):
    flag = group.add_argument
    flag("--method", choices=("full", *METHODS), default="lora",
         help="what is trained (default: lora)")
    flag("--adapter", metavar="PATH", type=text,
         help="start from this adapter, an adapter.pt or a PEFT folder, with its settings")
    flag("--r", metavar="N", type=number(int, 1), default=16, help="rank (default: 16)")
    flag("--alpha", metavar="F", type=number(float, 0, open_low=True), default=32.0,
         help="the update is scaled by alpha / r, unless the method's file in lora/methods/ says "
              "otherwise (default: 32)")
    flag("--dropout", metavar="P", type=number(float, 0, 1, open_high=True),
         help="dropout on the adapter's input (default: 0.05; lora-fa and delta-lora: 0)")
    flag("--targets", metavar="NAMES", type=names, default=("wq", "wv"),
         help="layers to adapt: some of wq,wk,wv,wo,w1,w2,w3,output,tok_embeddings, or all "
              "(default: wq,wv)")
    flag("--method-options", metavar="NAME=VALUE,...", type=named_values, default={},
         help="the method's own settings, which its file in lora/methods/ lists")
    flag("--lora-plus-ratio", metavar="F", type=number(float, 0, open_low=True), default=1.0,
         help="LoRA+: learning rate of lora_B divided by that of lora_A (default: 1)")
    flag("--lr", metavar="F", type=number(float, 0, open_low=True),
         help="peak learning rate (default: 3e-4; full: 1e-5; over the demo's tiny base: 5e-3)")
    flag("--weight-decay", metavar="F", type=number(float, 0), default=0.0,
         help="AdamW's weight decay (default: 0)")
    flag("--warmup-steps", metavar="N", type=number(int, 0),
         help="optimizer steps of warm-up (default: 3 %% of all)")
    flag("--schedule", choices=("cosine", "constant"), default="cosine",
         help="learning rate after the warm-up (default: cosine, to 0)")
    flag("--epochs", metavar="N", type=number(int, 1),
         help="passes over the data (default: 3; over the demo's base: 4)")
    flag("--max-steps", metavar="N", type=number(int, 1),
         help="stop after N optimizer steps, if the epochs have more")
    flag("--clip-grad-norm", metavar="F", type=number(float, 0), default=1.0,
         help="largest gradient norm; 0: never clip (default: 1.0)")
    flag("--neftune-alpha", metavar="F", type=number(float, 0, open_low=True),
         help="NEFTune: strength of random noise on the embeddings while training; 5 is usual "
              "(default: none)")


def add_teacher_flags(group):
    flag = group.add_argument
    flag("--teacher", metavar="DIR", type=text,
         help="learn from this model's logits as well as from the answers; it needs the same "
              "tokenizer")
    flag("--teacher-adapter", metavar="PATH", type=text,
         help="the teacher's adapter, an adapter.pt or a PEFT folder")
    flag("--distill-temperature", metavar="F", type=number(float, 0.01, 1000),
         help=f"divides both models' logits (default: {TEMPERATURE:g})")
    flag("--distill-weight", metavar="W", type=number(float, 0, 1),
         help=f"the teacher's share of the loss; the answers have the rest (default: {WEIGHT:g})")


def add_cost_flags(group):
    flag = group.add_argument
    flag("--batch-size", metavar="N", type=number(int, 1), default=4,
         help="examples per micro-batch (default: 4)")
    flag("--accumulation-steps", metavar="N", type=number(int, 1), default=8,
         help="micro-batches per optimizer step (default: 8)")
    flag("--tokens-per-batch", metavar="N", type=number(int, 1),
         help="fill each micro-batch up to N tokens, instead of --batch-size examples")
    flag("--share-prefix", action="store_true",
         help="compute a beginning that several examples share once per micro-batch")
    flag("--compile", action="store_true",
         help="compile the blocks, for GPUs; on a CPU it takes minutes and gains nothing")
    flag("--fast-matmul", action="store_true",
         help="fp32 matrix products may round to bf16 on a CPU, to TF32 on CUDA; all else stays "
              "fp32")
    flag("--checkpointing", action=argparse.BooleanOptionalAction, default=False,
         help="recompute blocks in backward instead of keeping them: less memory, up to 75 %% "
              "more time (default: no)")
    flag("--quantize", choices=("none", *QUANTIZED),
         help="hold the blocks' frozen matrices in 8 or 4 bits (default: none, or as --adapter was "
              "trained)")
    flag("--shard", metavar="N", type=number(int, 2), nargs="?", const=RANKS_OF_MACHINE,
         help="cut the base over N ranks of torchrun, which together hold one copy; with --dry-run "
              "also without torchrun (default without N: the ranks of a machine)")
    add_hardware_flags(group)
    flag("--log-every", metavar="N", type=number(int, 1), default=10,
         help="print a line every N optimizer steps (default: 10)")


def add_saving_flags(group):
    flag = group.add_argument
    flag("--save-every", metavar="N", type=number(int, 0), default=100,
         help="save every N optimizer steps, and with each best.pt; 0: only at the end and on "
              "SIGTERM, SIGHUP or Ctrl-C (default: 100)")
    flag("--resume", action="store_true",
         help="continue the run in --out from its last save; start it if there is none")
    flag("--overwrite", action="store_true", help="replace the run in --out")
    flag("--max-bad-steps", metavar="N", type=number(int, 1), default=10,
         help="end after N steps in a row whose loss or gradient is not finite (default: 10)")
    flag("--early-stop", metavar="N", type=number(int, 1),
         help="end after N held-out losses in a row without a better one")
