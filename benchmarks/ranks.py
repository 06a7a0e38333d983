"""How good is each r?  A LoRA trained at each, and one DyLoRA trained once and cut to each.

DyLoRA: Valipour et al. 2023, https://arxiv.org/abs/2210.07558.
"""
import tempfile
from dataclasses import dataclass

from finetune.arguments import number
from finetune.examples import read_examples

from .runs import flag_words
from .tables import Table, list_of, markdown, panel, report, run_fresh
from .training import Task, add_training_flags, examine, finish_run, task_of

LORA = "lora, trained at each r"
DYLORA = "dylora, trained once"


@dataclass(frozen=True)
class Training:
    """What all runs of the table have in common."""
    table: Table
    task: Task
    lr: float
    seed: int

    def evaluations(self, method: str, r: int, ranks: list) -> list:
        """Return the evaluations of one run's adapter, cut to each of the ranks; None: whole."""
        argv = [*self.task.flags(),
                *flag_words({"lr": self.lr, "seed": self.seed, "method": method, "r": r})]
        answering = flag_words({"precision": self.task.precision})
        questions = self.task.questions

        def compute():
            return run_fresh(train_and_examine, argv, answering, ranks, questions)

        results = self.table.cell({"flags": argv, "ranks": ranks}, compute)
        losses = ", ".join(f"{result['loss']:.4f}" for result in results)
        report(f"{method}, r {r}: held-out loss {losses}")
        return results


def add_flags(parser):
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--ranks", metavar="N,...", type=list_of(number(int, 1)), default=[1, 2, 4, 8, 16, 32],
         help="values of r (default: 1,2,4,8,16,32)")
    flag("--lr", metavar="F", type=number(float, 0, open_low=True), default=5e-3,
         help="learning rate of every run (default: 0.005)")
    flag("--seed", metavar="N", type=number(int, 0), default=0,
         help="random seed of every run (default: 0)")


def train_and_examine(argv: list, answering: list, ranks: list, questions: str) -> list:
    """Train once; return what `examine` finds with the adapter cut to each of the ranks.

    answering: flags of generate.py.  questions: file of examples.
    """
    examples = read_examples(questions)
    with tempfile.TemporaryDirectory() as out:
        finish_run([*argv, "--out", out, "--overwrite"])
        flags = ["--adapter", f"{out}/adapter.pt", *answering]
        return [examine(flags, examples, rank) for rank in ranks]


def make(args, table: Table) -> list:
    """Train LoRAs and a DyLoRA, and evaluate them at each rank; return lines of Markdown."""
    training = Training(table, task_of(args), args.lr, args.seed)
    read_examples(training.task.questions)           # Refuse a wrong file before the first run.
    loras = []
    for r in args.ranks:
        loras += training.evaluations("lora", r, [None])
    dyloras = training.evaluations("dylora", max(args.ranks), args.ranks)
    lines = {LORA: loras, DYLORA: dyloras}
    table.draw([
        panel_of("Held-out loss by r", "held-out loss", "loss", args.ranks, lines),
        panel_of("Held-out answers right to the letter, by r", "share of answers", "exact_match",
                 args.ranks, lines)])
    header = ["r"]
    for name in lines:
        header += [f"{name}: held-out loss", "right to the letter"]
    rows = []
    for r, lora, dylora in zip(args.ranks, loras, dyloras, strict=True):
        rows.append([str(r), *columns_of(lora), *columns_of(dylora)])
    note = f"(alpha is train.py's default, learning rate {args.lr:g}, seed {args.seed})"
    return [*markdown(header, rows), "", note]


def columns_of(result: dict) -> list:
    return [f"{result['loss']:.4f}", f"{result['exact_match']:.1%}"]


def panel_of(title: str, y: str, measure: str, ranks: list, results: dict):
    """Return a panel of one measure; results: {line: results by rank}."""
    lines = {}
    for name, line in results.items():
        lines[name] = [(r, result[measure]) for r, result in zip(ranks, line, strict=True)]
    return panel(title, "r", y, lines)
