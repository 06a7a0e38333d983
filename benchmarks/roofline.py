"""The machine's best matrix products, and what share of that training reaches."""
import torch

from finetune.hardware import DTYPES, pick_hardware

from . import runs
from .measure import flop_a_token, matmul_peak
from .runs import run_of, taken
from .tables import cell, fresh, markdown, picture


def add_flags(parser):
    runs.add_flags(parser, batch_size=8, warm=1, steps=1, repeats=3)


def peak_cell(dtype, fast, device):
    pick_hardware(device, None, 0, fast)
    return dict(flop_per_second=matmul_peak(DTYPES[dtype], torch.device(device)))


def make(args):
    runs.settle(args)
    rows, lines = [], {}
    for precision, fast in [("fp32", False), ("fp32", True), ("bf16", False)]:
        name = precision + " --fast-matmul" * fast
        best = cell(args, {"peak": precision, "fast": fast, "device": args.device},
                    lambda: fresh(peak_cell, precision, fast, args.device))["flop_per_second"]
        for checkpointing in (False, True):
            result = taken(args, f"{name}{', checkpointing' * checkpointing}", run_of(
                args, "--precision", precision, "--batch-size", str(args.batch_size), "--accumulation-steps", "1",
                *["--fast-matmul"] * fast, *["--checkpointing"] * checkpointing, count=True))
            row = [name, f"{best / 1e9:,.0f}", "yes" if checkpointing else "no", f"{result['P'] / 1e6:,.1f}"]
            if "bytes" not in result:
                rows.append([*row, "", "out of memory", "", "", ""])
                continue
            flop = flop_a_token(result["P"], False, checkpointing)
            reached = result["tokens_per_second"] * flop
            rows.append([*row, f"{4 + 2 * checkpointing} P = {flop / 1e6:,.0f}", f"{result['flop'] / 1e6:,.0f}",
                         f"{result['tokens_per_second']:,.0f}", f"{reached / 1e9:,.0f}", f"{reached / best:.0%}"])
            lines.setdefault("with checkpointing" if checkpointing else "without checkpointing", []).append((name, reached / 1e9))
        lines.setdefault("the machine's best product", []).append((name, best / 1e9))
    picture(args, [("matrix products reached", "", "GFLOP/s", lines)])
    return [*markdown(["precision", "best product, GFLOP/s", "checkpointing", "P, million", "MFLOP a token", "counted",
                       "tokens/s", "reached, GFLOP/s", "share"], rows), "",
            "(P: the weights that a token multiplies, those of the blocks and, for the share of tokens that predict an answer's, "
            "of the output matrix. A LoRA takes 2 P forward and 2 P back to the activations, and 2 P again with checkpointing, of "
            "which torch leaves out what nothing needs. Counted: by torch, as the operations ran, with adapters and attention)"]
