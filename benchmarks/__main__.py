"""The measured tables of docs/, each a command; every cell in a fresh process, warmed up, the median of repeats.

    python -m benchmarks ablation                             accumulation x precision x LoRA x checkpointing, a 135M's sizes
    python -m benchmarks ablation --shape 7b --layers 8       the same at another size, random weights
    python -m benchmarks peers --checkpoint llama-135m-hf --data alpaca_data.json --peer-python peers/bin/python
    python -m benchmarks scaling                              against tokens, length, layers, rank, ranks
    python -m benchmarks roofline                             against the machine's own matrix products
    python -m benchmarks methods                              the LoRA family on the demo
    python -m benchmarks distill                              students with and without a teacher
    python -m benchmarks search                               settings for a task, from method to learning rate
    python -m benchmarks front                                the README's picture, from a finished run in out/

Tables are printed in Markdown and left in --out with a picture, where matplotlib is installed, and with all cells as JSON,
written whole as soon as one is measured: the same command goes on where it was killed.
"""
import argparse
import shlex
import sys
from pathlib import Path

from finetune.arguments import Parser, text
from finetune.errors import one_line_errors
from llama.files import write_whole

from . import ablation, distill, front, methods, peers, ranks, roofline, scaling, search
from .tables import code, machine

# One page a table, one line here: add_flags(parser), and make(args) -> lines of Markdown.
TABLES = {
    "ablation": ablation,
    "peers": peers,
    "scaling": scaling,
    "roofline": roofline,
    "methods": methods,
    "ranks": ranks,
    "search": search,
    "distill": distill,
    "front": front,
}


def parse_args(argv=None):
    parser = Parser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", metavar="TABLE", required=True)
    for name, page in TABLES.items():
        said = page.__doc__.splitlines()[0]
        table = tables.add_parser(name, help=said, description=said)
        table.add_argument("--out", metavar="DIR", type=text, default="out-benchmark", help="where it goes (default: out-benchmark)")
        page.add_flags(table)
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    return args


def main(argv=None):
    with one_line_errors("benchmarks"):
        args = parse_args(argv)
        args.out.mkdir(parents=True, exist_ok=True)
        page = TABLES[args.table]
        data = [path for name in ("data", "val_data") if (path := getattr(args, name, None)) and Path(path).is_file()]
        # What every figure is kept for: on another machine, of other code, or of other examples, it is measured again.
        args.on = f"{machine()}, code {code(page.__file__, *getattr(page, 'FILES', ()), *data)}"
        args.said = f"`python -m benchmarks {shlex.join(sys.argv[1:] if argv is None else argv)}` on {args.on}"
        lines = [args.said, "", *page.make(args)]
        write_whole(args.out / f"{args.table}.md", lambda file: file.write("\n".join([*lines, ""]).encode()))
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("benchmarks: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
