"""transformers + PEFT, TRL, and litgpt, against this: training and generation, alternated.

Both sides read one folder in Hugging Face's layout, and the same rows of ids in the same order.
The peers' side is tests/peers.py, run by a Python that has them.  Every run is a process of its
own, and a run of 50 steps: the memory of a process grows over the first of them.
"""
import fnmatch
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice, product
from pathlib import Path

from finetune.arguments import number, text
from finetune.batches import first_target
from finetune.hardware import DTYPES, pick_hardware
from finetune.preflight import plural
from llama.checkpoint import is_huggingface, load_checkpoint
from llama.guesses import NgramPool
from llama.sampling import generate as generate_ids
from lora.prepack import prepack

from . import runs
from .measure import Peaks
from .request import Request
from .runs import (
    Setup,
    Workload,
    completed,
    make_setup,
    measure_run,
    peak_of,
    report_speed,
    rows_of,
    shape_folder,
)
from .tables import ROOT, Table, list_of, markdown, panel, try_fresh

FILES = (ROOT / "tests/peers.py", ROOT / "tests/peers_trl.py", ROOT / "benchmarks/request.py")
PEERS = ("transformers", "litgpt", "trl")
REQUIREMENTS = {"transformers": "tests/requirements.txt", "litgpt": "tests/requirements-litgpt.txt",
                "trl": "tests/requirements-trl.txt"}
BATCHINGS = {"transformers": ("padded", "padding-free"),
             "trl": ("padded", "padding-free", "packing")}       # "padded" is their default
OURS = "ours"
KILLED = -9
PROMPT_TOKENS = 64                                   # per answer, where --prompts are counted
WARM_UP_TOKENS = 64                                  # per answer that warms up, at most


@dataclass(frozen=True)
class Comparison:
    """What both sides do.  batch: examples per step, or prompts at a time.

    new: tokens per answer, None for training.  caches: whether transformers is also run with and
    without its KV cache.  flags: more flags of train.py, for our side alone.  one_layer: of 7B,
    with random weights.  warm: steps, if not --warm.
    """
    precision: str
    batch: int
    new: int | None = None
    caches: tuple = (True, False)
    dropout: float = 0.0
    checkpointing: bool = False
    flags: tuple = ()
    one_layer: bool = False
    warm: int | None = None


@dataclass(frozen=True)
class Contestant:
    """One side of a comparison: the settings of its cell, and the function that measures it."""
    settings: dict
    measure: Callable[[], dict]


def grid() -> dict:
    """Return {name: Comparison} of training by precision, checkpointing and batch."""
    comparisons = {}
    for precision, checkpointing, batch in product(("fp32", "bf16"), (False, True), (1, 4, 16)):
        suffix = " checkpointing" if checkpointing else ""
        comparison = Comparison(precision, batch, checkpointing=checkpointing)
        comparisons[f"grid {precision} batch {batch}{suffix}"] = comparison
    return comparisons


COMPARISONS = {
    "train bf16 batch 4": Comparison("bf16", 4),
    "train fp32 batch 4": Comparison("fp32", 4),
    "train bf16 batch 4 dropout 0.05": Comparison("bf16", 4, dropout=0.05),
    "train bf16 batch 32 share-prefix": Comparison("bf16", 32, flags=("share_prefix",)),
    "train fp32 batch 4 fast-matmul": Comparison("fp32", 4, flags=("fast_matmul",)),
    "train bf16 batch 4 one 7b layer": Comparison("bf16", 4, one_layer=True),
    "compiled train bf16 batch 4": Comparison("bf16", 4, flags=("compile",), warm=12),
    "generate bf16 64 tokens": Comparison("bf16", 1, new=64),
    "long generate bf16 256 tokens": Comparison("bf16", 1, new=256),
    "generate fp32 64 tokens": Comparison("fp32", 1, new=64),
    "generate bf16 64 tokens batch 8": Comparison("bf16", 8, new=64, caches=(True,)),
    **grid(),
}
USUAL = ["train*", "generate*"]


def add_flags(parser):
    runs.add_flags(parser, warm=1, steps=49, repeats=2)
    flag = parser.add_argument
    flag("--cells", metavar="PATTERN,...", type=list_of(text), default=USUAL,
         help=f"what is compared, * for anything, of: {', '.join(COMPARISONS)} (default: "
              f"{','.join(USUAL)})")
    flag("--against", metavar="NAME,...", type=list_of(text), default=["transformers"],
         help=f"of {','.join(PEERS)} (default: transformers)")
    flag("--peer-python", metavar="PATH,...", type=list_of(text), default=[sys.executable],
         help="Python programs in which the peers are installed (default: this one)")
    flag("--prompts", metavar="N", type=number(int, 1), default=2,
         help="number of 64-token answers to time; fewer if answers are longer or batched "
              "(default: 2)")


def make(args, table: Table) -> list:
    """Measure the comparisons; return lines of Markdown."""
    names = chosen_comparisons(args.cells)
    check_peers(args.against)
    setup = make_setup(args, table.out)
    pythons = find_pythons(args.against, args.peer_python)
    if not is_huggingface(Path(setup.folder)):
        raise ValueError(f"{setup.folder} is not in Hugging Face's layout, which both sides read: "
                         f"python -m finetune.convert {setup.folder} COPY --to hf")
    tables = {}                                      # {header: rows}, as headers differ
    speeds = {}                                      # {kind of comparison: {contestant: points}}
    versions = {}                                    # {package: versions}; TRL has its own
    for name in names:
        comparison = COMPARISONS[name]
        contestants = contestants_of(comparison, setup, args.prompts, pythons, table.out)
        results = measure_alternately(table, name, contestants, setup.repeats)
        compares_text = comparison.new is not None and setup.init == "checkpoint"
        header, row = versus(results, compares_text)
        tables.setdefault(tuple(header), []).append([name, *row])
        add_speeds(speeds, name, results)
        for side in results.values():
            for result in side:
                add_versions(versions, result.get("versions", {}))
    table.draw([panel(speed_title(kind), "", "tokens/s", lines) for kind, lines in speeds.items()])
    lines = []
    for header, rows in tables.items():
        lines += [*markdown(["", *header], rows), ""]
    warm = sorted({warm_steps(COMPARISONS[name], setup) for name in names})
    return [*lines, note(setup, warm, versions)]


def chosen_comparisons(patterns: list) -> list:
    """Return the names of comparisons that match a pattern.  Raises ValueError if none does."""
    names = []
    for name in COMPARISONS:
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            names.append(name)
    if not names:
        raise ValueError(f"--cells {','.join(patterns)}: no match among {'; '.join(COMPARISONS)}")
    return names


def check_peers(names: list):
    unknown = set(names) - set(PEERS)
    if unknown:
        raise ValueError(f"--against {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")


def find_pythons(peers: list, pythons: list) -> dict:
    """Return {peer: (path of a Python that has it, digest)}, without peers that no Python has.

    The digest changes with the versions of the packages there.
    """
    pythons_by_peer = {}
    for peer in peers:
        python = peer_python(pythons, peer)
        if python:
            pythons_by_peer[peer] = python
    if not pythons_by_peer:
        files = " and ".join(REQUIREMENTS[peer] for peer in peers)
        raise ValueError(f"no --peer-python has {' or '.join(peers)}: {files} say what to install, "
                         "each in an environment of its own")
    return pythons_by_peer


def peer_python(pythons: list, peer: str) -> tuple[str, str] | None:
    """Return (path, digest of the packages) of the first Python that has this peer, or None."""
    code = (f"import {peer}, importlib.metadata as metadata\n"
            "print(sorted(f'{each.name} {each.version}' for each in metadata.distributions()))")
    for python in pythons:
        try:
            check = subprocess.run([python, "-c", code], capture_output=True)
        except OSError as error:
            raise ValueError(f"--peer-python {python} does not run: {error.strerror}") from None
        if check.returncode == 0:
            *_, packages = check.stdout.splitlines()             # after what an import may print
            digest = hashlib.sha256(packages).hexdigest()[:8]
            return os.path.abspath(shutil.which(python)), digest
    return None


def contestants_of(comparison: Comparison, setup: Setup, prompts: int, pythons: dict,
                   out: Path) -> dict:
    """Return {name: Contestant} of a comparison, ours first.

    More examples per step make fewer steps, so that each comparison reads about as many.
    """
    if comparison.one_layer:
        setup = replace(setup, folder=shape_folder("7b", out), init="random", layers=1, data=None)
    steps = max(1, round(setup.steps * 4 / comparison.batch))
    warm = warm_steps(comparison, setup)
    flags = {"precision": comparison.precision, "batch_size": comparison.batch,
             "accumulation_steps": 1, "dropout": comparison.dropout,
             "checkpointing": comparison.checkpointing}
    flags |= dict.fromkeys(comparison.flags, True)
    workload = setup.workload(flags, warm=warm, steps=steps, repeats=1)
    n_batches = None
    if comparison.new:
        tokens = prompts * PROMPT_TOKENS
        n_batches = max(1, round(tokens / comparison.new / comparison.batch))
    contestants = {OURS: our_side(workload, comparison, n_batches)}
    request = Request(
        peer="", folder=str(Path(setup.folder).resolve()), is_random=setup.init == "random",
        layers=setup.layers, device=setup.device, precision=comparison.precision,
        batch=comparison.batch, steps=steps, warm=warm, dropout=comparison.dropout,
        checkpointing=comparison.checkpointing, new=comparison.new, n_batches=n_batches)
    for peer, (python, packages) in pythons.items():
        for name, variant in variants_of(peer, comparison):
            contestants[peer + name] = peer_side(
                python, packages, replace(request, peer=peer, **variant), workload)
    return contestants


def warm_steps(comparison: Comparison, setup: Setup) -> int:
    return setup.warm if comparison.warm is None else comparison.warm


def our_side(workload: Workload, comparison: Comparison, n_batches: int | None) -> Contestant:
    if comparison.new is None:
        return Contestant(asdict(workload), lambda: try_fresh(measure_run, workload))
    batch = comparison.batch
    new = comparison.new
    settings = asdict(workload) | {"batch": batch, "n_batches": n_batches, "new": new}
    return Contestant(settings, lambda: try_fresh(time_generation, workload, batch, n_batches, new))


def peer_side(python: str, packages: str, request: Request, workload: Workload) -> Contestant:
    settings = asdict(request) | {"data": workload.data, "packages": packages}
    settings["prompts"] = settings.pop("n_batches")  # its name in the cells that are saved
    return Contestant(settings, lambda: ask_peer(python, request, rows_of(workload)))


def variants_of(peer: str, comparison: Comparison) -> list:
    """Return (suffix of the name, fields of Request) for each run of a peer; none if it cannot."""
    if comparison.new is None:
        if peer not in BATCHINGS:
            return [("", {})]
        return [(f", {batching}", {"batching": batching}) for batching in BATCHINGS[peer]]
    if peer == "trl":                                # It trains alone.
        return []
    names = {True: ", KV cache", False: ", no cache"}
    if peer == "transformers":
        return [(names[cache], {"cache": cache}) for cache in comparison.caches]
    if comparison.batch == 1:
        return [(names[True], {"cache": True})]
    return []                                        # litgpt answers one prompt at a time.


def ask_peer(python: str, request: Request, rows: list) -> dict:
    """Return what tests/peers.py measures in the peer's own Python.

    Empty if memory is not enough.  Raises ValueError with its last line for any other error.
    """
    asked = json.dumps({"request": asdict(request), "rows": rows})
    run = subprocess.run([python, "-m", "tests.peers"], input=asked, capture_output=True, text=True,
                         cwd=ROOT)
    lines = run.stderr.strip().splitlines()
    last_line = lines[-1] if lines else ""
    if run.returncode == KILLED or run.returncode and "memory" in last_line.lower():
        return {}
    if run.returncode:
        raise ValueError(f"{request.peer}: {last_line}")
    return json.loads(run.stdout.splitlines()[-1])


def time_generation(workload: Workload, batch: int, n_batches: int, new: int) -> dict:
    """Answer prompts greedily, `batch` at a time; return {tokens_per_second, peaks, ids}.

    Answers have `new` tokens and do not end at eos.  One batch warms up before the n_batches that
    count.  Guesses come from earlier answers too; but when the prompts end and begin again, these
    are forgotten, because they are the answers.
    """
    options = workload.options()
    device, precision = pick_hardware(options.device, options.precision)
    prompts = [tokens[:first_target(labels)] for tokens, labels in rows_of(workload)]
    peaks = Peaks(device)
    peaks.end("start")
    model, _ = load_checkpoint(options.checkpoint, options.layers, DTYPES[precision], device,
                               init=options.init)
    prepack(model.eval())
    peaks.end("weights")
    endless_prompts = cycle(prompts)
    no_eos = -1
    pool = NgramPool()
    answers = []
    seconds = []
    for i in range(1 + n_batches):
        if batch * (i + 1) > len(prompts):
            pool.clear()
        asked = list(islice(endless_prompts, batch))
        ids = [[] for _ in asked]
        n_new = new if i else min(new, WARM_UP_TOKENS)
        began = time.perf_counter()
        for k, token in generate_ids(model, asked, n_new, no_eos, pool=pool):
            ids[k].append(token)
        seconds.append(time.perf_counter() - began)
        answers += ids
    peaks.end("generate")
    answers = answers[batch:]
    if any(len(answer) < new for answer in answers):
        raise ValueError(f"{options.checkpoint} takes {model.args.max_seq_len} tokens: too few for "
                         f"these prompts and {new} new ones")
    return {"tokens_per_second": batch * n_batches * new / sum(seconds[1:]), "peaks": peaks.mib,
            "ids": answers}


def measure_alternately(table: Table, name: str, contestants: dict, repeats: int) -> dict:
    """Return {contestant: its results}.

    The order is reversed every second time, so that none always comes first.
    """
    results = {who: [] for who in contestants}
    for i in range(repeats):
        order = list(contestants)
        if i % 2:
            order.reverse()
        for who in order:
            contestant = contestants[who]
            settings = contestant.settings | {"who": who, "round": i, "cell": name}
            result = table.cell(settings, contestant.measure)
            report_speed(f"{name}, {who}, {i + 1}/{repeats}", result)
            results[who].append(result)
    return results


def versus(results: dict, compares_text: bool) -> tuple[list, list]:
    """Return (header, row) of {contestant: results}: speed and peak, and ours divided by theirs.

    compares_text: also whether the answers are the same.
    """
    speeds = {}
    peaks = {}
    for who, side in results.items():
        if all(map(completed, side)):
            speeds[who] = median_speed(side)
            peaks[who] = statistics.median(map(peak_of, side))
    header = []
    row = []
    for who, side in results.items():
        header += [f"{who}, tokens/s", "MiB"]
        if who in speeds:
            row += [f"{speeds[who]:,.1f}", f"{peaks[who]:,.0f}"]
        else:
            row += ["out of memory", ""]
        if who == OURS:
            continue
        header += ["speed, ours / theirs", "memory, ours / theirs"]
        if who in speeds and OURS in speeds:
            row += [f"{speeds[OURS] / speeds[who]:.2f}", f"{peaks[OURS] / peaks[who]:.2f}"]
        else:
            row += ["", ""]
        if compares_text and who.startswith("transformers"):
            header.append("same text")
            row.append(same_text(results[OURS][0], side[0]))
    return header, row


def same_text(our_result: dict, peer_result: dict) -> str:
    """Return "yes", "no", or nothing if one of them was out of memory."""
    if not completed(our_result) or not completed(peer_result):
        return ""
    return "yes" if our_result["ids"] == peer_result["ids"] else "no"


def median_speed(side: list) -> float:
    return statistics.median(result["tokens_per_second"] for result in side)


def add_speeds(speeds: dict, name: str, results: dict):
    """Add a comparison's speeds to the lines of its kind, the first word of its name."""
    kind = name.partition(" ")[0]
    for who, side in results.items():
        if all(map(completed, side)):
            points = speeds.setdefault(kind, {}).setdefault(who, [])
            points.append((name, median_speed(side)))


def speed_title(kind: str) -> str:
    titles = {"train": "Training speed", "generate": "Generating speed",
              "compiled": "Training speed, compiled", "long": "Generating speed, long answers",
              "grid": "Training speed by precision, batch and checkpointing"}
    return titles[kind]


def add_versions(versions: dict, more: dict):
    """Add the versions of a peer's packages; a peer's environment may have another one."""
    for name, version in more.items():
        known = versions.setdefault(name, [])
        if version not in known:
            known.append(version)


def note(setup: Setup, warm: list, versions: dict) -> str:
    """Return a line about all runs.  warm: the numbers of steps that warmed them up."""
    packages = ", ".join(f"{name} {' and '.join(known)}" for name, known in versions.items())
    steps = " or ".join(plural(n, "step") for n in warm)
    return (f"(medians of {setup.repeats} runs each, alternated, every run a process of its own, "
            f"after {steps} or one batch of prompts to warm up; tokens are real, never padding; "
            f"MiB: the peak of the whole process, or of the GPU's allocations; {packages}, not "
            "compiled)")
