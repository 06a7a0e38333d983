"""A run: how far it has come, what it records and saves, its best model, and when it stops."""
import errno
import itertools
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

try:
    import fcntl
except ImportError:                                  # Windows: two runs in one folder go unnoticed.
    fcntl = None

import torch

from llama.checkpoint import WEIGHTS
from llama.files import write_json

from .batches import example_indices, indices_as_dealt_to
from .console import INTERRUPTED
from .errors import GAVE_UP, in_one_line
from .folder import ADAPTER, ARGS, BEST, METRICS, PICTURE, PREVIOUS, STATE, prepare_folder
from .ranks import sum_over_ranks
from .resume import (
    Progress,
    Save,
    digest,
    random_state,
    read_last_save,
    is_restart,
    restarted_by_torchrun,
    restore,
    rows_fit,
    states_of,
    torchrun_id,
    write_save,
)
from .same_run import (
    MAY_DIFFER_BETWEEN_RANKS,
    changed_ranks,
    changed_settings,
    check_fingerprint,
)
from .signals import StopRequest


class Run:
    """A run in its folder: how far it has come, what it saves, and when it stops.

    Call order: `open`; `check_same_run` before the weights load; `begin`; `attach`; then for each
    step of `steps` `sum_loss`, `record` and `end_step`; at the end `finish`.
    """

    def __init__(self, options, ranks, out: Path, last_save: Save | None, resumes: bool):
        self.options = options
        self.ranks = ranks
        self.out = out
        self.resumes = resumes
        self.last_save = last_save
        self.progress = last_save.progress if last_save else Progress()
        self.fingerprints = {}
        self.stop_request = StopRequest(ranks)
        self.must_stop = False                       # whether any rank got a stop signal

    @classmethod
    def open(cls, options, ranks) -> "Run":
        """Return the run of --out: a new one, or the one to resume.

        Raises ValueError or OSError if the folder cannot be used or the run cannot be resumed.
        """
        out = Path(options.out or "out")
        last_save = read_last_save(out) if options.resume or is_restart() else None
        resumes = options.resume or restarted_by_torchrun(last_save, out / METRICS)
        if not resumes:
            last_save = None
        if last_save:
            ranks = replace(ranks, begun_with=last_save.begun_with)
        if ranks.is_first:
            prepare_folder(options, out, resumes)
        run = cls(options, ranks, out, last_save, resumes)
        ranks.agree((run.progress.step, run.progress.finished), "the saves in --out")
        return run

    def check_same_run(self, job):
        """Raise ValueError if this job differs from the saved run.

        Print allowed changes.  Also store plan and settings, and compare the ranks.
        """
        self.plan = job.plan
        self.example_numbers = job.train_set.numbers
        self.settings = json.loads(json.dumps(job.settings))
        changes = changed_settings(self.last_save, self.settings)
        self.reopen_if_stopped_early()
        begun_with = job.ranks.begun_with or job.ranks.size
        self.fingerprints["ranks"] = begun_with
        datasets = [part for part in (job.train_set, job.val_set) if part]
        rows = itertools.chain.from_iterable(part.rows for part in datasets)
        self.check_fingerprint("data", digest([*tokens, *labels] for tokens, labels in rows),
                               "the examples are not those that it was begun with")
        steps = [indices_as_dealt_to(begun_with, step, bool(job.options.tokens_per_batch))
                 for step in self.plan]
        flags = ("--tokens-per-batch and --accumulation-steps" if job.options.tokens_per_batch else
                 "the product of --batch-size and --accumulation-steps")
        self.check_fingerprint("steps", digest(steps),
                               f"its steps would not hold the same examples; keep {flags}")
        n_steps = len(self.plan)
        if not 0 <= self.progress.updates <= self.progress.step <= n_steps:
            raise ValueError(f"{self.last_save.path} claims step {self.progress.step} of "
                             f"{n_steps}, and that {self.progress.updates} moved the weights")
        common = set(self.settings) - MAY_DIFFER_BETWEEN_RANKS
        self.ranks.agree({name: self.settings[name] for name in common}, "their flags")
        self.ranks.agree(self.fingerprints, "their examples")
        if self.resumes:
            self.report_resume(changes, job)

    def reopen_if_stopped_early(self):
        """Let a run go on that --early-stop has ended, if its new value does not end it there."""
        progress = self.progress
        patience = self.options.early_stop
        if progress.step < len(self.plan) and not (patience and progress.worse >= patience):
            progress.finished = False

    def report_resume(self, changes: list, job):
        """Print where the run goes on, and which settings have changed."""
        if not self.last_save:
            print(f"resume    {self.out} has no save yet: starting from step 1")
            return
        if self.last_save.warning:
            print(f"resume    {in_one_line(self.last_save.warning)}; the one before it is used")
        if self.progress.finished:
            print(f"resume    {self.out} is finished, after step {self.progress.step}: nothing is "
                  "left to do, nothing was changed")
        else:
            print(f"resume    {self.last_save.path}: {self.progress.step} of {len(self.plan)} "
                  "steps are done")
            for line in changed_ranks(self.last_save, job):
                print(f"ranks     {line}")
        for change in changes:
            print(f"changed   {in_one_line(change)}")

    def check_fingerprint(self, name, value, problem):
        """Note a fingerprint of the run.  Raises ValueError if the save holds another value."""
        check_fingerprint(self.last_save, name, value, problem)
        self.fingerprints[name] = value

    def begin(self, job):
        """Compare base and teacher with the save, lock the folder, and open metrics.jsonl.

        Rank 0 writes an empty save, args.json and an empty metrics.jsonl; a resumed run keeps its
        own.  Raises ValueError if the base or the teacher is another one, if another run has just
        begun or is running in the folder, or if metrics.jsonl does not match the save.
        """
        base = job.model.origin.get("fingerprint")
        teacher = job.distillation.fingerprint() if job.distillation else None
        self.check_fingerprint("base", base, "it was begun over another base")
        self.check_fingerprint("teacher", teacher, "it was begun with another teacher")
        self.ranks.agree(self.fingerprints, "their bases")
        # All ranks have passed.  Only now is a file changed.
        if not self.ranks.is_first:
            return
        n_bytes = self.check_metrics()
        self.metrics = open(self.out / METRICS, "ab", buffering=0)   # one write per row
        self.lock_folder()
        if self.last_save and self.last_save.path.name == PREVIOUS:
            # state.pt is damaged or gone, and `finish` deletes the file of this name.
            os.replace(self.out / PREVIOUS, self.out / STATE)
            self.last_save = replace(self.last_save, path=self.out / STATE)
        if not self.last_save:
            self.replace_old_run()
        write_json(self.out / ARGS, self.settings)
        self.metrics.truncate(n_bytes)
        self.metrics.seek(n_bytes)

    def check_metrics(self) -> int:
        """Return how many bytes of metrics.jsonl belong to the save."""
        n_bytes = self.last_save.metrics_bytes if self.last_save else 0
        path = self.out / METRICS
        rows = path.read_bytes()[:n_bytes] if path.exists() else b""
        if len(rows) != n_bytes or not rows_fit(rows, self.progress):
            raise ValueError(f"{path} is not what it was when {self.last_save.path} was saved: "
                             "put it back, or --overwrite the run")
        return n_bytes

    def lock_folder(self):
        """Keep other runs out until this process ends, however it ends."""
        if not fcntl:
            return
        try:
            fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is running in {self.out} now: wait until it has "
                             "ended, or name another folder with --out") from None
        except OSError:                              # This file system has no locks.
            pass

    def replace_old_run(self):
        """Write an empty save, and delete what an earlier run left."""
        if self.options.out and not self.options.overwrite and not self.resumes:
            try:                                     # Only one of two runs can create it.
                open(self.out / ARGS, "x").close()
            except FileExistsError:
                raise ValueError(f"another run has just begun in {self.out}; name another folder "
                                 "with --out") from None
        for name in (PREVIOUS, PICTURE):
            (self.out / name).unlink(missing_ok=True)
        self.write({}, [], 0)

    def write(self, parts: dict, random_states: list, metrics_bytes: int):
        """Write state.pt."""
        write_save(Save(self.out / STATE, self.progress, self.settings, self.fingerprints,
                        metrics_bytes, torchrun_id(), parts, random_states))

    def attach(self, device, save_best, **parts):
        """Register the parts to save; a resumed run loads their states first.

        parts: objects with state_dict() and load_state_dict().  save_best(path) writes the model
        as it is at that moment; all ranks call it.
        Raises ValueError for a state that does not fit.
        """
        self.device = device
        self.save_best = save_best
        self.parts = parts
        self.first_step = None                       # number and end of this process's first step
        if self.progress.step:
            restore(self.last_save, parts, self.ranks.rank, device)
        self.last_save = None

    def save(self):
        """Save the run.  Every rank calls this after the same step; the first one writes."""
        random_states = self.ranks.gather(random_state(self.device))
        states = states_of(self.parts, keeps=self.ranks.is_first)
        if self.ranks.is_first:
            os.fsync(self.metrics.fileno())          # Rows are on disk before a save counts them.
            self.write(states, random_states, self.metrics.tell())

    def steps(self, windows):
        """Yield (number, window) of each step that is left, and tell the watchdog where this is."""
        watchdog = self.ranks.watchdog
        windows = iter(windows)
        for step in itertools.count(self.progress.step + 1):
            self.step_began = time.perf_counter()    # before the wait for its examples
            watchdog.begin_reading(step)
            window = next(windows, None)
            if window is None:
                watchdog.rest()
                return
            compiles = self.options.compile and self.first_step is None
            watchdog.begin_step(window.n_tokens, compiles)
            yield step, window

    def step_seconds(self) -> float:
        """Return how long this step has taken so far."""
        return max(1e-6, time.perf_counter() - self.step_began)      # The clock may jump.

    def sum_loss(self, loss) -> float:
        """Return the step's loss, summed over the ranks.

        The stop signal travels in the same all-reduce, so all ranks stop after the same step.
        """
        received = torch.full_like(loss, self.stop_request.received_at is not None)
        total, n_stopped = sum_over_ranks(torch.stack([loss, received])).tolist()
        self.must_stop = n_stopped > 0
        self.ranks.watchdog.end_step()
        return total

    def record(self, row: dict, is_finite: bool, overflow: bool) -> str:
        """Append a step's row to metrics.jsonl, keep the best model; return a remark to print.

        is_finite: loss and gradient norm were finite, so the optimizer stepped.  overflow: fp16's
        loss scale was too high and has been lowered.  That alone does not count as a bad step,
        unless the scale could not have been the reason.
        """
        progress = self.progress
        progress.step = row["step"]
        progress.loss = row["loss"] if math.isfinite(row["loss"]) else None
        if self.first_step is None:
            self.first_step = progress.step, time.perf_counter()
        remark = ""
        if is_finite:
            progress.updates += 1
            progress.bad = 0
        elif overflow and progress.loss is not None and row["loss_scale"] > 1:
            remark = " | overflow, step skipped"
        else:
            remark = self.count_bad_step(row, overflow)
        if "val_loss" in row:
            self.keep_best(row["val_loss"])
        self.append({name: none_if_not_finite(value) for name, value in row.items()})
        return remark

    def count_bad_step(self, row, overflow) -> str:
        """Count a step that moved nothing, and add its examples to the row; return a remark."""
        progress = self.progress
        progress.bad += 1
        progress.skipped += 1
        indices = example_indices(self.plan[progress.step - 1])
        numbers = sorted(self.example_numbers[i] for i in indices)
        row["skipped"] = progress.skipped
        row["examples"] = numbers
        listed = ", ".join(map(str, numbers[:8]))
        if len(numbers) > 8:
            listed += f" and {len(numbers) - 8} more"
        what = "overflow" if overflow and progress.loss is not None else "not finite"
        return (f" | {what}, step skipped, {progress.bad} in a row, {progress.skipped} in all: "
                f"examples {listed}")

    def keep_best(self, val_loss):
        progress = self.progress
        if val_loss < progress.best:
            progress.best = val_loss
            progress.best_step = progress.step
            progress.worse = 0
            self.save_best(self.out / BEST)
        else:
            progress.worse += 1

    def append(self, row):
        """Append a line to metrics.jsonl: whole, or not at all."""
        if not self.ranks.is_first:
            return
        line = json.dumps(row).encode() + b"\n"
        n_bytes = self.metrics.tell()
        try:
            if self.metrics.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.metrics.truncate(n_bytes)
            raise OSError(f"{self.out / METRICS} cannot be written: {error.strerror}") from error

    def end_step(self) -> bool:
        """Save if it is due; return whether this step was the last.

        Exits the process after a stop signal or too many bad steps.
        """
        progress = self.progress
        n_steps = len(self.plan)
        if progress.bad >= self.options.max_bad_steps:
            self.give_up()
        if progress.step == n_steps:
            return True
        if self.options.early_stop and progress.worse >= self.options.early_stop:
            print(f"stopped   after step {progress.step} of {n_steps}: no better held-out loss in "
                  f"{progress.worse} measurements")
            return True
        save_every = self.options.save_every
        # A resumed run must know of best.pt.
        is_due = save_every and (progress.step % save_every == 0
                                 or progress.step == progress.best_step)
        if self.must_stop or is_due:
            self.save()
        if self.must_stop:
            print(f"stopped   after step {progress.step} of {n_steps}: saved {self.out / STATE}; "
                  "the same command with --resume continues")
            self.ranks.exit_together(INTERRUPTED)
        return False

    def give_up(self):
        """Print that too many steps in a row were not finite, and exit."""
        progress = self.progress
        if self.ranks.is_first:
            remedy = "a lower --lr or --clip-grad-norm"
            if self.settings["precision"] == "fp16":
                remedy += ", --precision bf16 or fp32"
            print(f"train.py: no finite loss and gradient in {progress.bad} steps in a row, the "
                  f"last at step {progress.step}: try {remedy}, or look at the examples of these "
                  f"steps in {METRICS}; the weights have not changed since step "
                  f"{progress.step - progress.bad}", file=sys.stderr)
        self.ranks.exit_together(GAVE_UP)

    def finish(self):
        """Write the last save, which marks the run as finished.

        What the run does not leave is deleted before: afterwards a kill could leave it for ever.
        """
        self.progress.finished = True
        if self.ranks.is_first:
            (self.out / PREVIOUS).unlink(missing_ok=True)
            if not self.progress.best_step:
                (self.out / BEST).unlink(missing_ok=True)        # An earlier run left it.
        self.save()
        if self.progress.best_step:
            print(f"best      {self.best_line()}")

    def best_line(self) -> str:
        """Return what best.pt is, and how to use it where generate.py takes another file."""
        progress = self.progress
        path = self.out / BEST
        result = WEIGHTS if self.settings["method"] == "full" else ADAPTER
        line = f"{path}: held-out loss {progress.best:.4f}, after step {progress.best_step}"
        if progress.best_step == progress.step:
            return f"{line}, the last; the same as {result}"
        line += f"; {result} is from step {progress.step}, the last"
        if result == WEIGHTS:
            return f"{line}; to use the best, copy {BEST} over {result}"
        if self.settings["init"] == "random":
            return line                              # No file has the base of this adapter.
        return f"{line}; to use the best: python generate.py --adapter {path}"

    def seconds_left(self) -> float | None:
        """Return an estimate of the time left; None before the second step of this process.

        The first step is left out: it warms up caches and may compile.
        """
        first, its_end = self.first_step
        if self.progress.step == first:
            return None
        per_step = (time.perf_counter() - its_end) / (self.progress.step - first)
        return max(0, per_step) * (len(self.plan) - self.progress.step)


def none_if_not_finite(value):
    """Return the value, or None for nan and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
