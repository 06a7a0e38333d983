"""The README's picture: loss, right answers before and after, speed and memory beside the peers.

Every number is read from a file that a command wrote, or computed here: losses come from the run's
metrics.jsonl, answers from base and adapter, the peers' figures and their machine from
docs/performance.md.
"""
import re
from pathlib import Path

from finetune.arguments import text
from finetune.examples import read_examples
from finetune.exam import Exam
from finetune.folder import METRICS
from finetune.options import DEMO
from finetune.pictures import Panel, draw, panels_of_a_run, read_metrics
from llama import load_checkpoint
from llama.peft import adapter_at
from lora import load_adapter, lora_disabled

from .tables import ROOT

PEERS = ROOT / "docs" / "performance.md"
FILES = [PEERS]


def add_flags(parser):
    flag = parser.add_argument
    flag("--run", metavar="DIR", type=text, default="out",
         help="the folder of a finished run over the demo's base (default: out)")
    flag("--picture", metavar="FILE", type=text, default=str(ROOT / "docs/pictures/front.png"),
         help="what is drawn (default: docs/pictures/front.png)")


def right_answers(model, exam):
    """Return how many greedy answers of the model equal the example's output to the letter."""
    return round(exam.score(model)["exact_match"].sum().item())


def beside_peers(page):
    """Return [(training, speed, memory)] of the page's first table, ours divided by theirs.

    Raises ValueError where the page has no such table.
    """
    head = r"^\| training \|.*transformers \+ PEFT.*\n\|[-|]+\n"
    table = re.search(head + r"((?:\|.*\n)+)", page, re.M)
    if not table:
        raise ValueError(f"{PEERS} has no table of training beside transformers + PEFT")
    rows = []
    for line in table[1].splitlines():
        training, *_, speed, memory = line.strip("| ").split(" | ")
        rows.append((short(training), float(speed), float(memory)))
    return rows


def machine_of_peers(page):
    """Return the machine that the page names for its figures, such as `two cores of an AMD EPYC`.

    Raises ValueError where the page names none.
    """
    match = re.search(r"^All figures on this page are from (.+?\))", page, re.M | re.S)
    if not match:
        raise ValueError(f"{PEERS} does not say from which machine its figures are")
    return " ".join(match[1].split())


def short(training):
    """Return the name of a training as it stands under a bar: `bf16, batch 4` is bf16."""
    name = re.sub(r", batch 4\b|, random weights|, after \d+ steps|`--|`", "", training)
    return name.replace("one block of the 7B", "7B block")


def make(args, table):
    run = Path(args.run)
    loss = panels_of_a_run(read_metrics(run / METRICS))[0]
    examples = read_examples(DEMO / "held_out.json")
    model, tokenizer = load_checkpoint(DEMO)
    load_adapter(model.eval(), adapter_at(run / "adapter.pt"))
    exam = Exam(examples, tokenizer, model.args.max_seq_len)
    adapted = right_answers(model, exam)
    with lora_disabled(model):
        base = right_answers(model, exam)
    bars = {"": [("base alone", base), ("with the adapter", adapted)]}
    answers = Panel(f"right answers: base {base} -> adapter {adapted} of {len(examples)}", "",
                    "held-out questions", bars, from_zero=True)
    page = PEERS.read_text(encoding="utf-8")
    peers = beside_peers(page)
    speeds = [(name, speed) for name, speed, _ in peers]
    memories = [(name, memory) for name, _, memory in peers]
    beside = Panel("beside transformers + PEFT, padded", "", "ours divided by theirs (1 = equal)",
                   {"speed": speeds, "memory": memories}, from_zero=True)
    sources = (f"{table.command}; beside transformers + PEFT: docs/performance.md, on "
               f"{machine_of_peers(page)}")
    draw(args.picture, [loss, answers, beside], sources)
    return [f"{answers.title}; drawn: {args.picture}"]
