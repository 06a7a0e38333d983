"""The best learning rate of LoRA beside full fine-tuning's, by rank, matrices and batch.

The claims are those of "LoRA Without Regret" (Schulman and Thinking Machines Lab 2025,
https://thinkingmachines.ai/blog/lora/): LoRA's best rate is about 10 times that of full
fine-tuning, it hardly depends on the rank, adapters on all matrices do better than on attention
alone, and large batches cost LoRA more.
"""
from dataclasses import dataclass

from finetune.arguments import number
from finetune.options import DEMO

from . import sweep
from .paper import check_ranks, matrices_of
from .sweep import Curve, Sweep, difference, forgotten, losses_panel, quality
from .tables import ROOT, Table, list_of, markdown
from .training import STEP_EXAMPLES, run_flags

FILES = [ROOT / "benchmarks/sweep.py", ROOT / "benchmarks/claims.py"]
PAIR = "wq,wv"
ALL = "wq,wk,wv,wo,w1,w2,w3"
PUBLISHED_FACTOR = 10                                # LoRA's best rate / full fine-tuning's


@dataclass(frozen=True)
class Setting:
    """A row of the table.  targets and r: None for full fine-tuning.  batch: examples per step."""
    targets: str | None
    r: int | None
    batch: int

    @property
    def name(self) -> str:
        return f"r {self.r} on {self.place}" if self.r else "full"

    @property
    def place(self) -> str:
        return "all seven" if self.targets == ALL else self.targets or ""

    def curve(self, runs: Sweep, args) -> Curve:
        flags = {"targets": self.targets, "r": self.r} if self.r else {"method": "full"}
        return runs.curve(f"{self.name}, batch {self.batch}", run_flags(args, self.batch) | flags)


def add_flags(parser):
    sweep.add_flags(parser, seeds=[0, 1, 2])
    flag = parser.add_argument
    flag("--ranks", metavar="N,...", type=list_of(number(int, 1)), default=[1, 4, 16, 64],
         help="ranks to compare (default: 1,4,16,64)")
    flag("--batches", metavar="N,...", type=list_of(number(int, 1)), default=[8, 32, 128],
         help="examples per optimizer step to compare, with LoRA on all seven matrices at the "
              f"middle rank; all else has {STEP_EXAMPLES} (default: 8,32,128)")


def make(args, table: Table) -> list:
    """Sweep the learning rates of each setting; return lines of Markdown."""
    for batch in args.batches:
        if batch % min(args.batch_size, batch):
            raise ValueError(f"--batches {batch} is no multiple of --batch-size {args.batch_size}")
    ranks = sorted(set(args.ranks))
    check_ranks(ranks, matrices_of(args.checkpoint or DEMO), ALL, "--ranks")
    middle = ranks[len(ranks) // 2]
    by_rank = [Setting(None, None, STEP_EXAMPLES)]
    for targets in (PAIR, ALL):
        by_rank += [Setting(targets, r, STEP_EXAMPLES) for r in ranks]
    by_batch = []
    for batch in sorted(set(args.batches)):
        by_batch += [Setting(None, None, batch), Setting(ALL, middle, batch)]
    with sweep.sweeping(args, table) as runs:
        base_loss = runs.base_loss()
        curves = {}
        for setting in dict.fromkeys(by_rank + by_batch):
            curves[setting] = setting.curve(runs, args)
    table.draw(panels_of(curves, by_rank, by_batch))
    return [*table_of(curves, by_rank, base_loss), "", *table_of(curves, by_batch, base_loss), "",
            note(args)]


def table_of(curves: dict, settings: list, base_loss: float | None) -> list:
    """Return the table of these settings, each beside full fine-tuning with the same batch."""
    header = ["matrices", "r", "examples per step", "trained", "best rate", "held-out loss",
              "right to the letter", "forgotten, nats per token", "best rate / full's",
              "loss, difference to full [95 %]"]
    rows = []
    for setting in settings:
        curve = curves[setting]
        full = curves[Setting(None, None, setting.batch)]
        row = [setting.place or "(full)", str(setting.r or ""), str(setting.batch),
               f"{curve.best[0]['parameters']:,}", curve.rate_text, *quality(curve.best),
               forgotten(curve.best, base_loss)]
        row.append(factor(curve, full) if setting.r else "")
        row.append(difference(curve.best, full.best) if setting.r else "")
        rows.append(row)
    return markdown(header, rows)


def factor(curve: Curve, full: Curve) -> str:
    """Return the quotient of two best rates as text, if both have worse ones on either side."""
    if not (curve.is_bracketed and full.is_bracketed):
        return ""
    return f"{curve.rate / full.rate:.2g}"


def panels_of(curves: dict, by_rank: list, by_batch: list) -> list:
    """Return the pictures: held-out loss by learning rate, for ranks and for batches."""
    panels = []
    of_rank = {setting.name: curves[setting].losses for setting in by_rank
               if setting.targets in (None, ALL)}
    of_batch = {f"{setting.name}, {setting.batch} per step": curves[setting].losses
                for setting in by_batch}
    for title, lines in (("ranks on all seven", of_rank), ("examples per step", of_batch)):
        panels.append(losses_panel(f"Held-out loss by learning rate: {title}", lines))
    return panels


def note(args) -> str:
    return (f"({sweep.note(args)}; neighbouring rates differ by 2 to 2.5; alpha is 32 at every r; "
            "all batches see the same epochs, so large ones take fewer steps. Published: LoRA's "
            f"best rate is about {PUBLISHED_FACTOR} times full fine-tuning's, 15 times in runs of "
            "less than 100 steps)")
