"""The machine's fastest matrix products, and the share of that speed which training reaches."""
from dataclasses import dataclass

import torch

from finetune.hardware import DTYPES, pick_hardware

from . import runs
from .measure import flop_per_token, matmul_peak
from .runs import Setup, completed, make_setup, measure_cell
from .tables import Table, markdown, panel, run_fresh

HEADER = ["precision", "fastest product, GFLOP/s", "checkpointing", "P, million", "MFLOP per token",
          "MFLOP counted", "tokens/s", "reached, GFLOP/s", "share"]
NOTE = ("(P: the weights that a token is multiplied with: those of the blocks and, for the share "
        "of tokens that predict an answer token, of the output matrix. A LoRA takes 2 P forward "
        "and 2 P back to the activations, and with checkpointing 2 P again, of which torch leaves "
        "out what nothing needs. Counted: by torch, as the operations ran, with adapters and "
        "attention)")


@dataclass(frozen=True)
class Mode:
    """A precision, and whether fp32 products may round their factors."""
    precision: str
    fast_matmul: bool = False

    def __str__(self):
        return f"{self.precision} --fast-matmul" if self.fast_matmul else self.precision


MODES = (Mode("fp32"), Mode("fp32", fast_matmul=True), Mode("bf16"))


def add_flags(parser):
    runs.add_flags(parser, batch_size=8, warm=1, steps=1, repeats=3)


def make(args, table: Table) -> list:
    """Measure products and training in each mode; return lines of Markdown."""
    setup = make_setup(args, table.out)
    rows = []
    lines = {"training": [], "training with checkpointing": [], "the fastest product": []}
    for mode in MODES:
        peak = product_speed(table, mode, setup.device)
        for checkpointing in (False, True):
            result = measure_training(table, setup, args.batch_size, mode, checkpointing)
            rows.append(row_of(mode, peak, checkpointing, result))
            if completed(result):
                name = "training with checkpointing" if checkpointing else "training"
                lines[name].append((str(mode), flop_per_second(result, checkpointing) / 1e9))
        lines["the fastest product"].append((str(mode), peak / 1e9))
    lines = {name: points for name, points in lines.items() if points}
    table.draw([panel("Speed of matrix products, alone and in training", "", "GFLOP/s", lines)])
    return [*markdown(HEADER, rows), "", NOTE]


def product_speed(table: Table, mode: Mode, device: str) -> float:
    """Return the FLOP/s of the machine's fastest product, as a cell of the table."""
    settings = {"product": str(mode), "device": device}
    cell = table.cell(settings, lambda: run_fresh(measure_product, mode, device))
    return cell["flop_per_second"]


def measure_product(mode: Mode, device: str) -> dict:
    pick_hardware(device, None, fast_matmul=mode.fast_matmul)
    return {"flop_per_second": matmul_peak(DTYPES[mode.precision], torch.device(device))}


def measure_training(table: Table, setup: Setup, batch_size: int, mode: Mode, checkpointing: bool):
    flags = {"precision": mode.precision, "fast_matmul": mode.fast_matmul,
             "batch_size": batch_size, "accumulation_steps": 1, "checkpointing": checkpointing}
    name = f"{mode}, checkpointing" if checkpointing else mode
    return measure_cell(table, name, setup.workload(flags, count=True))


def flop_per_second(result: dict, checkpointing: bool) -> float:
    """Return the FLOP/s that training reached, by the rule of thumb for FLOP per token."""
    return result["tokens_per_second"] * flop_per_token(result["P"], False, checkpointing)


def row_of(mode: Mode, peak: float, checkpointing: bool, result: dict) -> list:
    """Return the row of HEADER for a mode; peak: FLOP/s of the fastest product."""
    row = [str(mode), f"{peak / 1e9:,.0f}", "yes" if checkpointing else "no",
           f"{result['P'] / 1e6:,.1f}"]
    if not completed(result):
        return [*row, "", "out of memory", "", "", ""]
    flop = flop_per_token(result["P"], False, checkpointing)
    reached = flop_per_second(result, checkpointing)
    return [*row, f"{flop // result['P']} P = {flop / 1e6:,.0f}", f"{result['flop'] / 1e6:,.0f}",
            f"{result['tokens_per_second']:,.0f}", f"{reached / 1e9:,.0f}", f"{reached / peak:.0%}"]
