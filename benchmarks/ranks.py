"""How good is which r?  A LoRA trained at each, and one DyLoRA (Valipour et al. 2023) trained once and cut to each."""
import sys
import tempfile

from finetune.options import DEMO
from finetune.arguments import number
from finetune.dataset import read_examples

from .runs import add_training_flags, examined, finished, training_flags
from .tables import cell, fresh, listed, markdown, picture


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--ranks", metavar="N,...", type=listed(number(int, 1)), default=[1, 2, 4, 8, 16, 32], help="r (default: 1,2,4,8,16,32)")
    flag("--lr", metavar="F", type=number(float, 0, open_low=True), default=5e-3, help="learning rate of every run (default: 0.005)")
    flag("--seed", metavar="N", type=number(int, 0), default=0, help="of every run (default: 0)")


def answered(argv, left, ranks, examples):
    """[what generate.py's answers to examples are worth] after one run, its adapter cut to each of the ranks (None: as it is)."""
    with tempfile.TemporaryDirectory() as out:
        finished([*argv, "--out", out, "--overwrite"])
        return [examined(["--adapter", out + "/adapter.pt", *left], examples, rank) for rank in ranks]


def make(args):
    base, left = training_flags(args), ["--precision", args.precision] * bool(args.precision)
    base += ["--lr", str(args.lr), "--seed", str(args.seed)]
    examples = read_examples(args.val_data or DEMO / "held_out.json")

    def known(ranks, *flags):
        found = cell(args, dict(flags=[*base, *flags], ranks=ranks), lambda: fresh(answered, [*base, *flags], left, ranks, examples))
        print(f"{' '.join(flags)}: held-out loss {', '.join('{:.4f}'.format(one['loss']) for one in found)}", file=sys.stderr, flush=True)
        return found
    lines = {"lora, trained at each": [known([None], "--method", "lora", "--r", str(r))[0] for r in args.ranks],
             "dylora, trained once": known(args.ranks, "--method", "dylora", "--r", str(max(args.ranks)))}
    picture(args, [(title, "r", title, {name: [(r, one[key]) for r, one in zip(args.ranks, found)] for name, found in lines.items()})
                   for title, key in (("held-out loss", "loss"), ("right to the letter", "exact_match"))])
    return [*markdown(["r", *(f"{name}: {what}" for name in lines for what in ("held-out loss", "right to the letter"))], [
        [str(r), *(form for one in both for form in (f"{one['loss']:.4f}", f"{one['exact_match']:.1%}"))]
        for r, both in zip(args.ranks, zip(*lines.values()))]), "", f"(alpha as train.py has it, learning rate {args.lr:g}, seed {args.seed})"]
