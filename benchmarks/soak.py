"""Runs that are killed, stopped or short of disk, and damaged files: what was lost in some hours.

Every batch of misfortunes has a kind and a seed, and is a run (or a folder of files) of its own.
Batches are kept like any cell, so the same command goes on with the next seeds until --hours are
over, in as many parts as it takes.  Kept batches of other code are not counted.
"""
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

try:
    import resource
except ImportError:                                  # Windows, where nothing here is called.
    resource = None

import torch

from finetune.arguments import number
from finetune.folder import METRICS
from finetune.run import Run

from . import mutate
from .lives import STOP_SIGNALS, DyingSave, Lost, Place, Trial, is_alive, n_rows
from .tables import ROOT, FailedLines, Table, markdown, read_cells, report

FILES = (ROOT / "benchmarks/lives.py", ROOT / "benchmarks/mutate.py")
FLAGS = ["--checkpoint", "base", "--data", "data.json", "--val-data", "data.json", "--r", "2",
         "--lr", "1e-2", "--device", "cpu"]
# A batch draws one of these.
VARIANTS = ("--method lora --dropout 0.2", "--method dora", "--method vera", "--method full",
            "--method dylora --dropout 0.1", "--method rslora --targets all --checkpointing",
            "--method lora-fa --quantize int8", "--method lora --tokens-per-batch 100")
N_LIVES = 20                                         # per batch, of one process
N_FILES = 500                                        # per batch
N_STEPS = 100
SILENT_SECONDS = 60                                  # after which a rank that hangs must be noticed
LEAVE_SECONDS = 30                                   # after a signal, as torchrun grants


@dataclass(frozen=True)
class Kind:
    """A kind of misfortune.

    try_batch(place, draw) returns figures, at least {tried: number}, and raises Lost.  noun: of
    what is counted.  share: of the time.  seconds: that a batch takes at most, as a rule.
    """
    try_batch: Callable
    noun: str
    share: float
    seconds: float


def begin_trial(place: Place, draw, ranks: int = 1) -> Trial:
    """Return a run that is about to be disturbed; the undisturbed one is finished."""
    variant = draw.choice(VARIANTS)
    save_every = draw.choice([1, 1, 2, 5])
    batches = ["--batch-size", "2", "--accumulation-steps", "1"]
    if ranks > 1:
        batches = ["--batch-size", "1", "--accumulation-steps", "2"]
    if "--tokens-per-batch" in variant:
        batches = ["--accumulation-steps", "1"]
    flags = [*FLAGS, *variant.split(), *batches, "--save-every", str(save_every), "--epochs", "99",
             "--max-steps", str(N_STEPS), "--seed", str(draw.randrange(10 ** 6))]
    port = place.host_store() if ranks > 1 else 0
    trial = Trial(place, flags, save_every, N_STEPS, ranks, port)
    trial.complete("whole")
    return trial


def disturb(trial: Trial, live: Callable) -> dict:
    """Let the run live again and again, then finish; return {tried}.

    live() is a life, and returns the exit code with which it ended; 0 if nothing disturbed it.
    Raises Lost.
    """
    n_disturbed = 0
    for _ in range(N_LIVES):
        n_disturbed += live() != 0
        if trial.check().finished:
            break
    trial.finish()
    return {"tried": n_disturbed}


def expect(code: int, end: tuple) -> int:
    """Return the exit code of a process, given it and its stderr.  Raises Lost for a wrong one."""
    if end[0] not in (0, code):
        raise Lost(f"exit code {end[0]}: {end[1][-600:]}")
    return end[0]


# --- the kinds


def kills_alone(place: Place, draw) -> dict:
    """Kill a run at random moments."""
    trial = begin_trial(place, draw)

    def live():
        child, = trial.start()
        trial.live_a_little([child], draw)
        return expect(-signal.SIGKILL, place.kill(child))

    return disturb(trial, live)


def kills_in_saves(place: Place, draw) -> dict:
    """Let a run die at random system calls that write a file whole."""
    trial = begin_trial(place, draw)

    def live():
        call = draw.choice(["open", "write", "fsync", "replace", "unlink"])
        dying = DyingSave(call, draw.randrange(1, 9), draw.choice(["before", "within", "after"]))
        child, = trial.start(dying.install)
        return expect(-signal.SIGKILL, place.end(child))

    return disturb(trial, live)


def kills_of_a_rank(place: Place, draw) -> dict:
    """Kill one of two ranks; the other is told so by SIGTERM, as torchrun does, and must leave."""
    trial = begin_trial(place, draw, ranks=2)

    def live():
        children = trial.start()
        trial.live_a_little(children, draw)
        killed = children.pop(draw.randrange(2))
        code = expect(-signal.SIGKILL, place.kill(killed))
        os.kill(children[0].pid, signal.SIGTERM)
        place.end(children[0], within=LEAVE_SECONDS)
        return code

    return disturb(trial, live)


def full_disks(place: Place, draw) -> dict:
    """Let the disk be full, from some step on, for files above a random size."""
    trial = begin_trial(place, draw)
    state_bytes = os.path.getsize(place.folder / "whole/state.pt")

    def live():
        steps_left = N_STEPS - trial.check().step
        n_calls = draw.choice([*range(1, 9), steps_left])        # Also at the last save.
        size = draw.choice([0, draw.randrange(state_bytes)])
        child, = trial.start(FullDisk(n_calls, size, draw.randrange(400)).install)
        code, errors = place.end(child)
        is_explained = re.fullmatch("train.py: .*; the last save is intact: --resume .*\n", errors)
        if code and not is_explained:
            raise Lost(f"a full disk is not explained in one line: {errors[-600:]}")
        return expect(2, (code, errors))

    return disturb(trial, live)


@dataclass
class FullDisk:
    """Limits the size of files in the n-th step of a run.

    more: bytes that metrics.jsonl may still grow; the limit is at least that.
    """
    steps_left: int
    size: int
    more: int

    def install(self):
        sum_loss = Run.sum_loss

        def limited(run, loss):
            self.steps_left -= 1
            if self.steps_left == 0:
                limit = max(self.size, os.path.getsize(run.out / METRICS) + self.more)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return sum_loss(run, loss)

        Run.sum_loss = limited


def hangs(place: Place, draw) -> dict:
    """Stop one of two or three ranks for ever; the others must notice, say so and leave."""
    trial = begin_trial(place, draw, ranks=draw.choice([2, 3]))
    children = trial.start()
    while not n_rows(trial.out):
        if not all(map(is_alive, children)):
            raise Lost("a rank died before its first step")
        trial.live_a_little(children, draw)
    rank = draw.randrange(trial.n_ranks)
    stopped = children.pop(rank)
    os.kill(stopped.pid, signal.SIGSTOP)
    began = time.monotonic()
    within = SILENT_SECONDS + trial.longest_step()
    ends = [place.end(child, began + within - time.monotonic()) for child in children]
    seconds = time.monotonic() - began
    place.kill(stopped)
    codes = {code for code, _ in ends}
    errors = "".join(text for _, text in ends)       # one line, of one of them
    if codes != {1} or not re.fullmatch(rf"train\.py: step \d+: rank {rank} .*\n", errors):
        raise Lost(f"rank {rank} was stopped, the others left with exit codes {codes}: "
                   f"{errors[-600:]}")
    trial.check()
    trial.finish()
    return {"tried": 1, "left after": seconds}


def damaged_files(place: Place, draw) -> dict:
    """Give files that were changed at random to the command lines that read them."""
    seed = draw.randrange(10 ** 6)
    log = place.folder / "cases"
    child = place.start(lambda: mutate.main(seed, range(N_FILES), log))
    code, errors = place.end(child, within=20 * N_FILES)
    cases = mutate.read_cases(log) if log.exists() else []
    wrong = [case for case in cases if case[1] == "WRONG"]
    if wrong:
        raise Lost(f"{len(wrong)} files of seed {seed}, the first: {wrong[0]}")
    if code:                                         # The next case took the process with it.
        raise Lost(f"files of seed {seed}, number {len(cases)}: exit code {code}: {errors[-600:]}")
    n_ok = sum(case[1] == "ok" for case in cases)
    return {"tried": len(cases), "loaded": n_ok}


# Names, and what a batch takes on one core.
KINDS = {
    "kills alone": Kind(kills_alone, "kills", 0.2, 10),
    "kills in saves": Kind(kills_in_saves, "kills", 0.15, 10),
    "kills of a rank": Kind(kills_of_a_rank, "kills", 0.2, 20),
    "full disks": Kind(full_disks, "full disks", 0.1, 10),
    "hangs": Kind(hangs, "stopped ranks", 0.15, 90),
    "damaged files": Kind(damaged_files, "files", 0.2, 60),
}


# --- the page


def add_flags(parser):
    flag = parser.add_argument
    flag("--hours", metavar="H", type=number(float, 0), default=0.1,
         help="time for new batches (default: 0.1)")
    flag("--only", metavar="KIND", choices=KINDS,
         help=f"only misfortunes of this kind: {', '.join(KINDS)}")
    flag("--seed", metavar="N", type=number(int, 0),
         help="try the batch of --only with this seed alone, and keep nothing of it")


def make(args, table: Table) -> list:
    """Try batches until the time is over; return lines of Markdown with all kept ones."""
    if not hasattr(os, "fork"):
        raise ValueError("soak forks its runs, which this system cannot; try Linux or macOS")
    if args.seed is not None and not args.only:
        raise ValueError("--seed repeats one batch: say of which kind with --only")
    torch.set_num_threads(1)
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.default_int_handler)        # All clean up, as Ctrl-C does.
    if args.seed is not None:
        return in_lines([({"kind": args.only, "seed": args.seed},
                          try_one(args.only, args.seed))])
    until = time.monotonic() + 3600 * args.hours
    names = [args.only] if args.only else list(KINDS)
    while kind := next_kind(names, kept(table), until - time.monotonic()):
        seeds = {settings["seed"] for settings, _ in kept(table) if settings["kind"] == kind}
        seed = next(seed for seed in range(len(seeds) + 1) if seed not in seeds)
        settings = {"kind": kind, "seed": seed}
        result = table.cell(settings, lambda kind=kind, seed=seed: try_one(kind, seed))
        report(f"{kind}, seed {seed}: {result['tried']} {KINDS[kind].noun} in "
               f"{result['seconds']:.0f} s, {result['lost'] or 'nothing lost'}")
    return in_lines(kept(table))


def try_one(kind: str, seed: int) -> dict:
    """Return the figures of a batch, with `lost`: what was lost, or None."""
    began = time.monotonic()
    result = {"tried": 0}
    lost = None
    try:
        with Place() as place:
            result = KINDS[kind].try_batch(place, random.Random(f"{kind}, {seed}"))
    except Lost as error:
        lost = " ".join(str(error).split())
    return result | {"lost": lost, "seconds": time.monotonic() - began}


def kept(table: Table) -> list:
    """Return [(settings, result)] of the batches of this machine and this code."""
    path = table.out / f"{table.name}.json"
    cells = [cell for cell in read_cells(path)
             if cell["settings"].get("conditions") == table.conditions]
    return [(cell["settings"], cell["result"]) for cell in cells]


def next_kind(names: list, batches: list, seconds_left: float) -> str | None:
    """Return the kind that has had least of its share of the time; None if time is over."""
    spent = dict.fromkeys(names, 0.0)
    for settings, result in batches:
        if settings["kind"] in spent:
            spent[settings["kind"]] += result["seconds"] / KINDS[settings["kind"]].share
    fitting = [name for name in names if KINDS[name].seconds <= seconds_left]
    return min(fitting, key=spent.get, default=None)


def in_lines(batches: list) -> list:
    """Return the table of these batches, and below it a line for each that lost something."""
    rows = []
    lines = []
    for kind in KINDS:
        results = [result for settings, result in batches if settings["kind"] == kind]
        if results:
            rows.append(row_of(kind, results))
    for settings, result in batches:
        if result["lost"]:
            lines += ["", f"Lost: {settings['kind']}, seed {settings['seed']}: {result['lost']}. "
                      f"To try it again: `python -m benchmarks soak --only "
                      f"'{settings['kind']}' --seed {settings['seed']}`"]
    header = ["what", "batches", "tried", "batches with a loss", "minutes", ""]
    table = markdown(header, rows)
    return FailedLines([*table, *lines]) if lines else table


def row_of(kind: str, results: list) -> list:
    """Return a row of the table."""
    tried = sum(result["tried"] for result in results)
    n_lost = sum(result["lost"] is not None for result in results)
    minutes = sum(result["seconds"] for result in results) / 60
    remark = ""
    waits = [result["left after"] for result in results if "left after" in result]
    if waits:
        remark = f"the others had left after {min(waits):.0f} to {max(waits):.0f} s"
    if kind == "damaged files":
        n_loaded = sum(result.get("loaded", 0) for result in results)
        remark = f"{n_loaded:,} loaded, the others refused in one line"
    return [kind, str(len(results)), f"{tried:,} {KINDS[kind].noun}", str(n_lost),
            f"{minutes:.1f}", remark]
