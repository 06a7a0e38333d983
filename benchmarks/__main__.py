"""The measured tables of this project, one command each.

    python -m benchmarks ablation      accumulation x precision x LoRA x checkpointing
    python -m benchmarks peers --checkpoint llama-135m-hf --data alpaca_data.json
    python -m benchmarks scaling       speed and memory by tokens, length, layers, rank, ranks
    python -m benchmarks growth        memory of a process by step, with two limits of kernels
    python -m benchmarks roofline      beside the machine's fastest matrix products
    python -m benchmarks methods       the LoRA family on the demo
    python -m benchmarks rates         best learning rates of LoRA and of full fine-tuning
    python -m benchmarks ranks         LoRA trained at each r, and one DyLoRA cut to each
    python -m benchmarks paper         claims of the LoRA and QLoRA papers, each with a verdict
    python -m benchmarks distill       students with and without a teacher
    python -m benchmarks search        settings for a task, from method to learning rate
    python -m benchmarks gpu           a first day with a GPU, cell by cell within time limits
    python -m benchmarks soak          hours of kills, full disks, hangs and damaged files
    python -m benchmarks front         the README's picture, from a finished run in out/

Each cell of ablation, peers, scaling and roofline is measured in a new process, warmed up, as the
median of its repeats.  In growth, methods, rates, ranks, paper, distill and search a cell is a
whole training run or an evaluation; gpu has cells of many kinds, and soak has batches of
misfortunes, of which it ends with exit code 1 if one lost something.  front measures no cell.
A table is printed as Markdown and written to --out; all but distill, gpu, soak and front also draw
a picture there if matplotlib is installed.
Each cell is saved as soon as it is measured, so the same command goes on after a kill.
"""
from finetune.console import run_command     # First: it ends a Ctrl-C while torch loads quietly.

import shlex
import sys
from pathlib import Path

from finetune.arguments import Parser, text
from finetune.errors import one_line_errors
from llama.files import write_whole

from . import (
    ablation,
    distill,
    front,
    gpu,
    growth,
    methods,
    paper,
    peers,
    ranks,
    rates,
    roofline,
    scaling,
    search,
    soak,
)
from .tables import FailedLines, Table, code_digest, machine

# Each page has add_flags(parser), and make(args, table), which returns lines of Markdown.
PAGES = {
    "ablation": ablation,
    "peers": peers,
    "scaling": scaling,
    "growth": growth,
    "roofline": roofline,
    "methods": methods,
    "rates": rates,
    "ranks": ranks,
    "paper": paper,
    "search": search,
    "distill": distill,
    "gpu": gpu,
    "soak": soak,
    "front": front,
}


def main(argv=None):
    """Measure a table, print it, and write it to --out."""
    with one_line_errors("benchmarks"):
        args = parse_args(argv)
        page = PAGES[args.table]
        table = make_table(args, page, sys.argv[1:] if argv is None else argv)
        table.out.mkdir(parents=True, exist_ok=True)
        made = page.make(args, table)
        lines = [table.command, "", *made]
        content = "\n".join([*lines, ""]).encode()
        write_whole(table.out / f"{table.name}.md", lambda file: file.write(content))
    print("\n".join(lines))
    if isinstance(made, FailedLines):
        sys.exit(1)


def parse_args(argv=None):
    """Return the arguments of a command line.  Raises ValueError."""
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    tables = parser.add_subparsers(dest="table", metavar="TABLE", required=True)
    for name, page in PAGES.items():
        summary = page.__doc__.splitlines()[0]
        flags = tables.add_parser(name, help=summary, description=summary)
        flags.add_argument("--out", metavar="DIR", type=text, default="out-benchmark",
                           help="folder of table and picture (default: out-benchmark)")
        page.add_flags(flags)
    return parser.parse_args(argv)


def make_table(args, page, argv: list) -> Table:
    """Return the Table of these arguments.

    Its conditions name the machine, the code and, by their content, the examples, other text, and
    an adapter.
    """
    files = [page.__file__, *getattr(page, "FILES", ())]
    for name in ("data", "val_data", "also", "adapter"):
        given = getattr(args, name, None)
        if not given:
            continue
        path = Path(given)
        folder = sorted(path.iterdir()) if name == "adapter" and path.is_dir() else [path]
        files += [file for file in folder if file.is_file()]
    conditions = f"{machine()}, code {code_digest(*files)}"
    command = f"`python -m benchmarks {shlex.join(argv)}` on {conditions}"
    return Table(args.table, Path(args.out), conditions, command)


if __name__ == "__main__":
    run_command(main, "benchmarks", "interrupted; the same command goes on from here")
