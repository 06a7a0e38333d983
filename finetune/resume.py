"""state.pt: all that a run's next step depends on, written atomically, read as untrusted input.

A save is written to a file beside, flushed and renamed, and the one before it stays as
state.previous.pt.  So a kill at any moment leaves an intact save.
"""
import hashlib
import itertools
import json
import math
import os
import random
from array import array
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from llama.files import first_line, load_saved, reading, write_whole

from .errors import is_out_of_memory
from .folder import PREVIOUS, STATE
from .shard import share_like, whole_state

LARGEST = 2 ** 53                                    # no count or measure of a run is larger


@dataclass
class Progress:
    """How far a run has come.

    loss: of the last step, over all ranks; None where it was not finite.  updates: steps that
    moved the weights.  bad: steps in a row without a finite loss and gradient.  skipped: such steps
    in the whole run.  best: the lowest held-out loss, after step best_step.  worse: measurements
    since then without a better one.
    """
    step: int = 0
    loss: float | None = None
    updates: int = 0
    bad: int = 0
    skipped: int = 0
    best: float = math.inf
    best_step: int = 0
    worse: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Save:
    """What a state.pt holds.

    settings: the run's flags with their final values.  fingerprints: hashes of data, plan and base,
    which a resumed run must have too.
    metrics_bytes: length of metrics.jsonl.  launch: torchrun's run id.  parts: states of model,
    optimizer and scaler.  random_states: one for each rank that wrote it; none before step 1.
    warning: why a later save could not be read.  (In the file: counters, args, about, metrics,
    launch, parts, random.)
    """
    path: Path
    progress: Progress
    settings: dict
    fingerprints: dict
    metrics_bytes: int
    launch: str
    parts: dict
    random_states: list
    warning: str | None = None

    @property
    def begun_with(self) -> int:
        """The number of ranks that the run was begun with; those that wrote this may be others."""
        return self.fingerprints.get("ranks")


def read_last_save(out: Path) -> Save | None:
    """Return the last intact save in a folder; None if there is no save.

    Raises ValueError if there are saves and none of them can be read.
    """
    problems = []
    for path in (out / STATE, out / PREVIOUS):
        if path.exists():
            try:
                return read_save(path, "; ".join(problems) or None)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError(f"{'; '.join(problems)}; no save can be read, --overwrite starts again")
    return None


def read_save(path: Path, warning=None) -> Save:
    """Return what a state.pt holds; tensors are memory-mapped, and no pickled code runs.

    Raises ValueError for a file that is truncated, damaged, or not a save.
    """
    what = "a whole save of a run"
    content = load_saved(path, what, mapped=True)
    with reading(path, what):
        # torch warns on stderr when a tensor is indexed by text, so look at the types first.
        if not isinstance(content, dict) or not isinstance(content.get("counters"), dict):
            raise ValueError("it has no counters")
        counters = dict(content["counters"])
        counters.pop("seconds", None)                # Earlier versions saved this too.
        if "taken" in counters:                      # An earlier version called it that,
            counters["updates"] = counters.pop("taken")
        if "updates" not in counters:                # and one before it saved it elsewhere.
            counters["updates"] = content["parts"]["schedule"]["last_epoch"]
        settings = json.loads(json.dumps(content["args"]))     # refuses tensors, makes keys text
        settings.setdefault("template", "alpaca")    # Earlier versions had no other, and one file.
        for name in ("data", "val_data"):
            if isinstance(settings.get(name), str):
                settings[name] = [settings[name]]
        save = Save(path, progress_of(counters), settings, content["about"], content["metrics"],
                    content["launch"], content["parts"], content["random"], warning)
        expected_types = {"settings": dict, "fingerprints": dict, "metrics_bytes": int,
                          "launch": str, "parts": dict, "random_states": list}
        for name, expected in expected_types.items():
            if not isinstance(getattr(save, name), expected):
                raise ValueError(f"its {name} have the wrong type")
        if type(save.begun_with) is not int or not 1 <= save.begun_with <= LARGEST:
            raise ValueError(f"its number of ranks is {save.begun_with!r}")
    return save


def progress_of(counters: dict) -> Progress:
    """Return the Progress with these values.  Raises ValueError for impossible ones."""
    progress = Progress(**counters)
    for field in fields(Progress):
        value = getattr(progress, field.name)
        if value == field.default and type(value) is type(field.default):
            continue                                 # best begins at infinity, loss at None
        kind = float if field.name == "loss" else type(field.default)
        if type(value) is not kind or not abs(value) <= LARGEST:
            raise ValueError(f"{field.name} is {value!r}")
    return progress


def write_save(save: Save):
    """Write a save to its path; the one before it stays beside it."""
    content = {"counters": asdict(save.progress), "about": save.fingerprints,
               "metrics": save.metrics_bytes, "args": json.loads(json.dumps(save.settings)),
               "launch": save.launch, "random": save.random_states, "parts": save.parts}
    # The first save of a run must not keep another run's as state.previous.pt, and the last one
    # leaves none.
    keeps_previous = save.progress.step and not save.progress.finished
    previous = save.path.with_name(PREVIOUS) if keeps_previous else None
    write_whole(save.path, lambda file: torch.save(content, file), previous)


def rows_fit(rows: bytes, progress: Progress) -> bool:
    """Return whether these are the rows of metrics.jsonl of a run that has come so far."""
    *lines, end = rows.split(b"\n")
    if end or len(lines) != progress.step:
        return False
    if not lines or progress.loss is None:
        return True
    try:
        last = json.loads(lines[-1])
    except (ValueError, RecursionError):
        return False
    return isinstance(last, dict) and last.get("loss") == progress.loss


def what_is_left(out: Path) -> str:
    """Return what a run can go on from whose last file could not be written."""
    if (out / STATE).exists() or (out / PREVIOUS).exists():
        return "the last save is intact: --resume continues from it"
    return f"no save is in {out} any more: the run has to start again"


def states_of(parts: dict, keeps: bool) -> dict:
    """Return {name: state} of parts that have state_dict(), with whole tensors.

    All ranks call this; keeps: whether this one wants the tensors that are cut over ranks.
    """
    return {name: whole_state(part.state_dict(), keeps) for name, part in parts.items()}


def restore(save: Save, parts: dict, rank: int, device):
    """Give each part its state back, and this rank its random numbers.

    A rank that the save does not know keeps those that it begins with.  They depend on its number,
    so no two ranks draw the same.
    Raises ValueError for a state that does not fit its part.
    """
    try:
        for name, part in parts.items():
            state = save.parts[name]
            if isinstance(part, torch.optim.Optimizer):
                restore_optimizer(part, state)
            else:
                current = part.state_dict()
                check_form(current, state, name)
                part.load_state_dict(shares_like(state, current))
        if not save.random_states:
            raise ValueError("it has no random numbers")
        if rank < len(save.random_states):
            check_random_state(save.random_states[rank])
            set_random_state(save.random_states[rank], device)
    except Exception as error:                       # Each part raises its own kind of error.
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{save.path} does not fit this run: {first_line(error)}") from error


def restore_optimizer(optimizer, state: dict):
    """Load an optimizer's state, of whatever kind it is, and check that its next step can use it.

    load_state_dict compares the number of parameters only, and a fused step reads beyond a tensor
    that is too small.  So each parameter's state must match in keys, shapes and dtypes what one
    trial step of a new optimizer creates.  No check can tell whether the numbers are this run's.
    """
    if settings_of(optimizer.param_groups) != settings_of(state["param_groups"]):
        raise ValueError("it was saved by another optimizer, or one with other settings")
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    moments = {}
    for i, parameter in enumerate(parameters):
        if i in state["state"]:
            moments[i] = {name: share_like(value, parameter)
                          for name, value in state["state"][i].items()}
    if moments.keys() != state["state"].keys():
        raise ValueError("optimizer holds the state of a parameter that is not trained here")
    optimizer.load_state_dict({**state, "state": moments})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                stand_in = torch.zeros_like(parameter).requires_grad_()
                stand_in.grad = torch.zeros_like(stand_in)
                trial = type(optimizer)([{**group, "params": [stand_in]}])
                trial.step()
                check_form(trial.state[stand_in], optimizer.state[parameter], "optimizer")


def shares_like(state, current):
    """Return a saved state in which tensors are cut as those of the `current` state."""
    if isinstance(state, dict):
        return {name: shares_like(value, current[name]) for name, value in state.items()}
    return share_like(state, current) if isinstance(state, torch.Tensor) else state


def settings_of(param_groups: list) -> list:
    """Return an optimizer's groups without their parameters and learning rates."""
    ignored = ("params", "lr", "initial_lr")
    return [without(group, ignored) for group in param_groups]


def without(items: dict, names: tuple) -> dict:
    return {name: value for name, value in items.items() if name not in names}


def check_form(expected, saved, name: str):
    """Raise ValueError unless `saved` has the structure of `expected`, without nan.

    That is: the same keys, lengths, types, shapes, dtypes, strings and booleans; numbers may
    differ.
    """
    keys = []
    if isinstance(expected, dict):
        fits = isinstance(saved, dict) and expected.keys() == saved.keys()
        keys = expected.keys()
    elif isinstance(expected, (list, tuple)):
        fits = type(expected) is type(saved) and len(expected) == len(saved)
        keys = range(len(expected))
    elif isinstance(expected, torch.Tensor):
        fits = (isinstance(saved, torch.Tensor) and expected.shape == saved.shape
                and expected.dtype == saved.dtype and not saved.isnan().any())
    elif expected is None:                           # a number that a new run lacks, a loss, say
        fits = saved is None or is_plausible(saved)
    elif type(expected) in (int, float):
        fits = type(saved) is type(expected) and (saved == expected or is_plausible(saved))
    else:
        fits = type(expected) is type(saved) and expected == saved
    if not fits:
        raise ValueError(f"{name} does not match this run")
    for key in keys:
        check_form(expected[key], saved[key], f"{name}, {key}")


def is_plausible(value) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def random_state(device) -> dict:
    """Return the state of every random generator that a rank may use."""
    name, keys, *rest = np.random.get_state()
    streams = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
               "torch": torch.get_rng_state()}
    if device.type != "cpu":
        streams[device.type] = torch.get_device_module(device).get_rng_state()
    return streams


def check_random_state(streams: dict):
    """Raise ValueError unless the generators on the CPU can take these states without a warning."""
    if not isinstance(streams, dict):
        raise ValueError("random numbers do not match this run")
    current = random_state(torch.device("cpu"))
    current["python"] = random.Random(0).getstate()      # of no half-used pair of normal numbers
    check_form(current, {name: streams[name] for name in current}, "random numbers")


def set_random_state(streams: dict, device):
    """Restore what `random_state` returned."""
    random.setstate(streams["python"])
    np.random.set_state(streams["numpy"])
    torch.set_rng_state(streams["torch"])
    if device.type in streams:
        torch.get_device_module(device).set_rng_state(streams[device.type])


def is_restart() -> bool:
    """Return whether torchrun has started this process in place of one that ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def torchrun_id() -> str:
    """Return the id of torchrun's launch; empty without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restarted_by_torchrun(save: Save | None, metrics: Path) -> bool:
    """Return whether torchrun has restarted the launch that wrote the save.

    Or, without a save, one that died before its first: then `metrics` has no rows.
    """
    if save is None:
        return is_restart() and not (metrics.exists() and metrics.stat().st_size)
    return is_restart() and save.launch == torchrun_id()


def digest(lists) -> str:
    """Return a hash of lists of integers, 16 hex digits."""
    sha = hashlib.sha256()
    for numbers in lists:
        sha.update(array("q", [len(numbers), *numbers]))
    return sha.hexdigest()[:16]
