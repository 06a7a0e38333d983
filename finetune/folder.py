"""A run's folder, --out: the names of its files, and whether a run may write there."""
import os
import tempfile
from pathlib import Path

from llama.checkpoint import COMPANIONS, PARAMS, TOKENIZER, WEIGHTS

ARGS = "args.json"
METRICS = "metrics.jsonl"
STATE = "state.pt"
PREVIOUS = "state.previous.pt"                       # the save before it
ADAPTER = "adapter.pt"
BEST = "best.pt"
PICTURE = "loss.png"
RESULTS = (ADAPTER, BEST, PARAMS, WEIGHTS, TOKENIZER, COMPANIONS)
RUN_FILES = (ARGS, METRICS, STATE, PREVIOUS, PICTURE, *RESULTS)     # what runs leave in --out


def prepare_folder(options, out: Path, resumes: bool):
    """Create --out (a dry run only tests its parent).  Raises ValueError if it cannot be used."""
    check_folder(options, out, resumes)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        if not options.dry_run:
            out.mkdir(parents=True, exist_ok=True)
            existing = out
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(f"cannot write to --out {out}: {error.strerror}") from error


def check_folder(options, out: Path, resumes: bool):
    """Raise ValueError if a run would replace what is in --out and must stay."""
    files = [name for name in RUN_FILES if (out / name).exists()]
    holds_shards = any(out.glob("consolidated.[0-9][0-9].pth"))
    holds_something = bool(files) or holds_shards
    # With two shards it is a downloaded model: a run writes one.
    holds_run = ARGS in files and not (out / "consolidated.01.pth").exists()
    is_resumable = resumes and (STATE in files or PREVIOUS in files)
    holds_results = any(name in files for name in RESULTS)
    may_replace = (not options.out or options.overwrite or is_resumable
                   or resumes and not holds_results)             # It was killed as it began.
    not_files = [out / name for name in files if not (out / name).is_file()]
    obstacle = not_files[0] if not_files else out
    kind = "folder" if obstacle.is_dir() else "device"
    # Path.resolve() may raise an error for links that form a loop.
    real_out = os.path.realpath(out)
    cases = [                                        # (condition, error message)
        (real_out in teacher_folders(options),
         f"{out} holds the teacher and a run replaces what is there; name another folder with "
         "--out"),
        (real_out == os.path.realpath(options.checkpoint),
         f"{out} is the base's own folder and a run replaces what is there; name another with "
         "--out"),
        ((holds_results or holds_shards) and not holds_run and not is_resumable,
         f"{out} holds a model already, and not a run; name another folder with --out"),
        (holds_something and not may_replace and resumes,
         f"{out} holds a run but no {STATE} to go on from, --overwrite replaces it, and --out "
         "names another folder"),
        (holds_something and not may_replace,
         f"{out} holds a run already: --resume goes on with it, --overwrite replaces it, and --out "
         "names another folder"),
        (bool(not_files),
         f"{obstacle} is a {kind}, where a file of the run belongs; name another folder with "
         "--out"),
    ]
    for applies, problem in cases:
        if applies:
            raise ValueError(problem)


def teacher_folders(options) -> list:
    """Return the real paths of the folders that hold the teacher and its adapter."""
    folders = [os.path.realpath(options.teacher)] if options.teacher else []
    if options.teacher_adapter:
        adapter = os.path.realpath(options.teacher_adapter)
        folders.append(adapter if os.path.isdir(adapter) else os.path.dirname(adapter))
    return folders
