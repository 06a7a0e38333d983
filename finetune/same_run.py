"""Whether a resumed run is the one that was saved: its settings, and fingerprints of what it reads.

save: the last save of the run, or None if there is none; a run without one is always the same.
"""
import torch

from .arguments import as_flag, as_words
from .resume import Save

# Settings that may differ when a run is resumed: paths, what is printed and kept, when it gives up,
# and how a step is computed: its micro-batches, and on which devices.
MAY_CHANGE = {
    "checkpoint", "adapter", "teacher", "teacher_adapter", "data", "val_data", "out", "device",
    "log_every", "save_every", "max_bad_steps", "early_stop", "batch_size", "accumulation_steps",
    "share_prefix", "checkpointing", "compile", "shard"}
NOT_COMPARED = {"resume", "overwrite", "dry_run"}
# Paths may differ between machines, and each rank has a device of its own.
MAY_DIFFER_BETWEEN_RANKS = {
    "checkpoint", "adapter", "teacher", "teacher_adapter", "data", "val_data", "out", "device"}


def changed_settings(save: Save | None, settings: dict) -> list:
    """Return a line for each setting that has changed since the save.

    Raises ValueError for those that would make this another run.
    """
    before = save.settings if save else settings
    allowed = []
    refused = []
    for name in sorted(settings.keys() | before.keys()):
        old = before.get(name)
        new = settings.get(name)
        if old == new or name in NOT_COMPARED:
            continue
        line = f"{as_flag(name, old)}, now {as_words(name, new)}"
        if name in MAY_CHANGE:
            allowed.append(line)
        else:
            refused.append(line)
    if refused:
        changed = "; ".join(refused)
        raise ValueError(f"{save.path.parent} was begun with {changed}: {advice_on_change(save)}")
    return allowed


def advice_on_change(save: Save) -> str:
    """Return why a resumed run cannot be another one, and what to do instead."""
    if not save.progress.finished:
        return "a resumed run cannot change this; give the old values, or another --out"
    out = save.path.parent
    advice = ("the run is finished, and its learning rate has come to the end of its schedule, "
              "so it is neither changed nor made longer; ")
    if save.settings.get("method") == "full":
        return advice + f"to train on from its result: --checkpoint {out}, another --out"
    if save.settings.get("init") == "random":
        return advice + "begin another one with another --out"
    return advice + (f"to train on from its result: --adapter {out / 'adapter.pt'}, another "
                     "--out, no --resume")


def check_fingerprint(save: Save | None, name: str, value, problem: str):
    """Raise ValueError with the problem if the save holds another value of this fingerprint."""
    before = save.fingerprints.get(name) if save else value
    if type(before) is not type(value) or before != value:
        advice = f"; {advice_on_change(save)}" if save.progress.finished else ""
        raise ValueError(f"{save.path.parent} cannot go on: {problem} ({name} {before}, now "
                         f"{value}){advice}")


def changed_ranks(save: Save, job) -> list:
    """Return lines on what another number of ranks means; none if it is that of the save.

    job.model may be on the meta device.
    """
    n_ranks = job.ranks.size
    before = len(save.random_states) or save.begun_with
    if n_ranks == before:
        return []
    lines = [f"{n_ranks} instead of {before}: the same steps, dealt out anew"]
    _, first_step = job.plan[0]
    n_idle = sum(not batches for batches in first_step)
    if n_idle:
        lines.append(f"a step has too few examples for {n_idle} of {n_ranks} ranks, which wait for "
                     "the others")
    if any(module.p for module in job.model.modules() if isinstance(module, torch.nn.Dropout)):
        lines.append("dropout now drops other elements than in the uninterrupted run")
    if job.options.neftune_alpha:
        lines.append("the noise on the embeddings is now another one than in the uninterrupted run")
    return lines
