"""Accumulation x precision x LoRA x checkpointing, and what each does to memory and computation by kind."""
import statistics
from itertools import product

from . import runs
from .measure import flop_a_token
from .runs import most, run_of, taken
from .tables import markdown, picture

REPORT = {                                                       # of the course report's Table 1, what it has arrows for
    "gradient accumulation": {"activations": "↓"},
    "checkpointing": {"activations": "↓", "FLOP a token": "↑"},
    "mixed precision": {"parameters": "↓", "optimizer": "–", "activations": "↓", "FLOP a token": "↓"},
    "LoRA": {"parameters": "↑", "gradients": "↓", "optimizer": "↓", "FLOP a token": "↓"},
}
PLAIN, OVER_LORA = ("full", "fp32", False, False), ("lora", "fp32", False, False)
CHANGES = {                                                      # what it is: from, to, whose arrows
    "gradient accumulation": (PLAIN, ("full", "fp32", True, False), "gradient accumulation"),
    "checkpointing": (PLAIN, ("full", "fp32", False, True), "checkpointing"),
    "mixed precision (autocast)": (PLAIN, ("full", "autocast", False, False), "mixed precision"),
    "LoRA": (PLAIN, OVER_LORA, "LoRA"),
    "mixed precision (autocast) over LoRA": (OVER_LORA, ("lora", "autocast", False, False), "mixed precision"),
    "frozen weights in 16 bit under LoRA": (OVER_LORA, ("lora", "16 bit", False, False), "mixed precision"),
}
WHY = {
    ("mixed precision", "parameters", "↑"): ": autocast leaves fp32 weights as they are and keeps a 16-bit copy of each matrix until "
                                            "backward; a frozen base can be held in 16 bit instead",
    ("mixed precision", "FLOP a token", "–"): ": as many products, each faster where the hardware has 16-bit units",
}
KINDS = {kind: ("MiB", 2 ** 20, ",.1f", 0.001) for kind in ("parameters", "gradients", "optimizer", "activations")}
KINDS |= {kind: ("MFLOP", 1e6, ",.1f", 0.001) for kind in ("forward", "FLOP a token")} | {"a step": ("s", 1, ",.2f", 0.1)}


def kinds_of(key, result, counted):
    """{kind: amount} for Table 1: counted as it ran, or in closed form."""
    if counted:
        return result["bytes"] | {"forward": result["forward"], "FLOP a token": result["flop"], "a step": result["seconds"]}
    estimate = result["estimate"]
    return {"parameters": estimate["weights"], "gradients": estimate["gradients"], "optimizer": estimate["optimizer"],
            "activations": estimate["activations"] + estimate["logits"], "forward": 2 * result["P"],
            "FLOP a token": flop_a_token(result["P"], key[0] == "full", key[3])}


def changes(results):
    """(rows, sentences) of Table 1 from {(method, precision, accumulation, checkpointing): result}: what each technique does
    to each kind, and where the report's arrow is wrong.  In closed form where one of the two runs found no memory."""
    rows, wrong = [], {}
    for name, (before, after, report) in CHANGES.items():
        counted = "bytes" in results[before] and "bytes" in results[after]
        old, new = (kinds_of(key, results[key], counted) for key in (before, after))
        row = [name + " (by estimate)" * (not counted)]
        for kind, (unit, size, form, slack) in KINDS.items():
            if kind not in old:
                row.append("")
                continue
            arrow = "↑" if new[kind] > old[kind] * (1 + slack) else "↓" if new[kind] < old[kind] * (1 - slack) else "–"
            said = REPORT[report].get(kind)
            mark = "" if said is None else f" (report {said})" if said == arrow else f" **(report {said})**"
            row.append(f"{old[kind] / size:{form}} → {new[kind] / size:{form}} {arrow}{mark}")
            if said not in (None, arrow):
                wrong[f"{report}, {kind}: the report says {said}, here it is {arrow}" + WHY.get((report, kind, arrow), "")] = True
        rows.append(row)
    return rows, list(wrong)


def add_flags(parser):
    runs.add_flags(parser, batch_size=4, warm=1, steps=1, repeats=3)


def make(args):
    runs.settle(args)
    low, results, rows = "fp16" if args.precision == "fp16" else "bf16", {}, []
    peaks, speeds = {}, {}
    for key in product(("full", "lora"), ("fp32", "autocast", "16 bit"), (False, True), (False, True)):
        method, precision, accumulation, checkpointing = key
        if method == "full" and precision == "16 bit":               # what is trained is held in fp32
            continue
        sizes = (1, args.batch_size) if accumulation else (args.batch_size, 1)
        line, point = f"{method}, {precision}", ("accumulated" if accumulation else "at once") + ", checkpointing" * checkpointing
        result = results[key] = taken(args, f"{line}, {point}", run_of(
            args, "--method", method, "--precision", "fp32" if precision == "fp32" else low, "--batch-size", str(sizes[0]),
            "--accumulation-steps", str(sizes[1]), *["--checkpointing"] * checkpointing,
            autocast=(method, precision) == ("lora", "autocast"), count=True))
        row = [method, {"fp32": "fp32", "autocast": f"{low} by autocast", "16 bit": f"{low}, weights too"}[precision],
               f"{sizes[1]} x {sizes[0]}", "yes" if checkpointing else "no"]
        by_phase = [""] * 4
        if "peaks" in result:
            own = result["peaks"].get("start", 0.0)
            peaks.setdefault(line, []).append((point, most(result) - own))
            speeds.setdefault(line, []).append((point, result["tokens_per_second"]))
            row += [f"{result['seconds']:.2f}", f"{result['tokens_per_second']:,.0f}", f"{most(result) - own:,.0f}"]
            by_phase = [f"{most(result, phase) - own:,.0f}" if phase in result["peaks"] else ""
                        for phase in ("weights", "forward", "backward", "step")]
        else:
            row += ["", "", "out of memory"]
        rows.append([*row, runs.mib(sum(result["estimate"].values())), *by_phase])
    picture(args, [("peak above the bare process", "", "MiB", peaks), ("speed", "", "tokens/s", speeds)])
    bare = [result["peaks"]["start"] for result in results.values() if "start" in result.get("peaks", {})]
    bare = f"the {statistics.median(bare):,.0f} MiB of the process before its weights are taken off; " if bare else ""
    table_1, wrong = changes(results)
    return [*markdown(["trained", "precision", "micro-batches x examples", "checkpointing", "s a step", "tokens/s", "peak, MiB",
                       "estimate, MiB", "peak of weights", "forward", "backward", "step"], rows), "",
            f"({bare}estimate: by llama/preflight.py, of tensors alone)", "",
            "What each technique does. Bytes as autograd and the optimizer hold them, activations: what the largest micro-batch keeps "
            "for backward. In brackets the arrow of the course report, where it has one, bold where it is another here; its "
            "\"computation\" is read as FLOP:", "",
            *markdown(["", *(f"{kind}, {KINDS[kind][0]}" for kind in KINDS)], table_1), "", *(f"- {line}" for line in wrong)]
