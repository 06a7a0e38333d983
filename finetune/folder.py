"""A run's folder, --out: the names of its files, and whether a run may write there."""
import os
import tempfile
from pathlib import Path

from llama.checkpoint import COMPANIONS, PARAMS, TOKENIZER, WEIGHTS, is_huggingface

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
    """Create --out, and try to write there.  Raises ValueError if it cannot be used.

    A dry run creates nothing: it tries the nearest folder that exists.
    """
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
    holds_model = holds_results or holds_shards or is_huggingface(out)
    may_replace = (not options.out or options.overwrite or is_resumable
                   or resumes and not holds_results)             # It was killed as it began.
    # Path.resolve() may raise an error for links that form a loop.
    real_out = os.path.realpath(out)
    cases = [                                        # (condition, error message)
        (bool(options.adapter) and real_out == folder_of(options.adapter),
         f"{out} holds the adapter to start from and a run replaces what is there; name another "
         "folder with --out"),
        (real_out in teacher_folders(options),
         f"{out} holds the teacher and a run replaces what is there; name another folder with "
         "--out"),
        (real_out == os.path.realpath(options.checkpoint),
         f"{out} is the base's own folder and a run replaces what is there; name another with "
         "--out"),
        (holds_model and not holds_run and not is_resumable,
         f"{out} holds a model already, and not a run; name another folder with --out"),
        (holds_something and not may_replace and resumes,
         f"{out} holds a run but no {STATE} to go on from, --overwrite replaces it, and --out "
         "names another folder"),
        (holds_something and not may_replace,
         f"{out} holds a run already: --resume goes on with it, --overwrite replaces it, and --out "
         "names another folder"),
    ]
    for applies, problem in cases:
        if applies:
            raise ValueError(problem)
    for path in (out / name for name in files):
        if not path.is_file():
            kind = "folder" if path.is_dir() else "device"
            raise ValueError(f"{path} is a {kind}, where a file of the run belongs; name another "
                             "folder with --out")


def teacher_folders(options) -> list:
    """Return the real paths of the folders that hold the teacher and its adapter."""
    folders = [os.path.realpath(options.teacher)] if options.teacher else []
    if options.teacher_adapter:
        folders.append(folder_of(options.teacher_adapter))
    return folders


def folder_of(adapter: str) -> str:
    """Return the real path of the folder of an adapter: of a file, or PEFT's own."""
    path = os.path.realpath(adapter)
    return path if os.path.isdir(path) else os.path.dirname(path)
