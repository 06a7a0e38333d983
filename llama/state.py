"""A run's folder: whether it may go there, and what it begins with."""
import json
import tempfile
from pathlib import Path

from .checkpoint import PARAMS, TOKENIZER, WEIGHTS
from .files import write_whole

RUN_FILES = ("args.json", "metrics.jsonl", "adapter.pt", PARAMS, WEIGHTS, TOKENIZER)      # what runs leave in --out


def claim_out(args):
    """The folder of --out, made if need be.  Raises ValueError or OSError if a run must not or cannot go there."""
    out = Path(args.out or "out")
    if out.resolve() == Path(args.checkpoint).resolve():
        raise ValueError(f"{out} is the base's own folder and a run replaces what is there; name another with --out")
    taken = any((out / name).exists() for name in RUN_FILES) or any(out.glob("consolidated.[0-9][0-9].pth"))
    ours = (out / "args.json").exists() and not (out / "consolidated.01.pth").exists()     # a run writes one file
    if taken and (args.out or not ours):
        raise ValueError(f"{out} holds a run or a model already; name another folder with --out")
    if folder := next((out / name for name in RUN_FILES if (out / name).is_dir()), None):
        raise ValueError(f"{folder} is a folder, where a file of the run belongs; name another folder with --out")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        if not args.dry_run:
            out.mkdir(parents=True, exist_ok=True)
            there = out
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"cannot write to --out {out}: {error.strerror}") from error
    return out


def begin(args, out):
    """Write args.json.  Raises ValueError where another run has begun in a named --out since it was looked at."""
    if args.out:
        try:
            open(out / "args.json", "x").close()
        except FileExistsError:
            raise ValueError(f"another run has just begun in {out}; name another folder with --out") from None
    write_whole(out / "args.json", lambda file: file.write(json.dumps(vars(args), indent=1).encode() + b"\n"))
