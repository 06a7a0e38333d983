"""What several test files share: data, a tiny model, and what a run or a file holds."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from finetune.batches import plan_epoch, windows
from llama import ModelArgs, Transformer
from lora import LoRAConfig, add_lora, lora_state_dict

ROOT = Path(__file__).parents[1]
ROOMS = ("llama", "lora", "finetune", "benchmarks")
CORPUS = [
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context.",
    "Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response:",
    "Name a colour.",
    "What is the opposite of hot?",
    "The sky is blue and the grass is green.",
    "Blue",
    "cold",
    "Count to three: one, two, three.",
    "- a list - of things",
    "Is this sentence happy or sad?",
    "happy sad yes no",
]
WORDS = "blue cold one two three green happy sad yes no sky grass".split()
TIMED = ("tokens_per_second", "peak_memory_mb")  # columns of metrics.jsonl that no run repeats
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def example(i, word):
    """Return an Alpaca example whose answer says a word 1 to 4 times."""
    instruction = f"Say {word} {'again ' * (i % 3)}please."
    answer = f"{word} " * (1 + i % 4)
    return {"instruction": instruction, "input": "quietly" * (i % 2), "output": answer}


EXAMPLES = [example(i, word) for i, word in enumerate(WORDS)]


def shipped(*rooms):
    """Return the .py files of these rooms, as paths from ROOT; by default all that is shipped."""
    files = [] if rooms else list(ROOT.glob("*.py"))
    for room in rooms or ROOMS:
        files += ROOT.glob(f"{room}/**/*.py")
    return sorted(str(path.relative_to(ROOT)) for path in files)


def tiny(vocab_size=400, **sizes):
    """Return a small random model in eval mode, the same for the same sizes."""
    torch.manual_seed(0)
    defaults = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16}
    model = Transformer(ModelArgs(vocab_size=vocab_size, **(defaults | sizes)))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # large enough for every part to matter
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


class GivenLogits(torch.nn.Module):
    """A model whose logits at each row are given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))
        self.output = torch.nn.Identity()

    def forward(self, tokens, rows, layout=None):
        return self.output(self.logits[rows])


def adapt(model, std=0.1, **settings):
    """Add an adapter whose tensors are all random, as after training; return the model."""
    add_lora(model, LoRAConfig(**({"dropout": 0.0} | settings)))
    for tensor in lora_state_dict(model).values():
        torch.nn.init.normal_(tensor, std=std)
    return model


def epoch_windows(rows, collate, batch_size, accumulation_steps, seed=0, epoch=0, rank=0,
                  world_size=1, tokens_per_batch=None):  # fmt: skip
    """Return the windows of one epoch of (tokens, labels) rows, as train.py has them."""
    lengths = [len(rows[i][0]) for i in range(len(rows))]
    plan = plan_epoch(lengths, batch_size, accumulation_steps, seed, epoch, world_size=world_size,
                      tokens_per_batch=tokens_per_batch)  # fmt: skip
    steps = [(epoch + i / len(plan), step) for i, step in enumerate(plan, 1)]
    return list(windows(rows, collate, steps, rank))


def given_once(words):
    """Return a command line in which each flag stands once, with the last of its values."""
    groups = {}
    for word in words:
        if word.startswith("--"):
            flag = word
            groups[flag] = []
        groups[flag].append(word)
    return [word for group in groups.values() for word in group]


# --- files

DROP = object()
FOLDER = object()


def spoil(path, content):
    """Change a file: values of a JSON object (a dict), its bytes, FOLDER, or None to remove it."""
    if isinstance(content, dict):
        values = json.loads(path.read_text()) | content
        kept = {key: value for key, value in values.items() if value is not DROP}
        content = json.dumps(kept).encode()
    path.unlink(missing_ok=True)
    if content is FOLDER:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


def files_in(folder):
    """Return {path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contents(folder):
    """Return {name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def metrics(folder):
    """Return the rows of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(rows):
    """Return rows of metrics.jsonl without the columns of time and memory."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def adapter_tensors(folder):
    """Return {name: tensor} of a run's adapter, as its file has it."""
    return torch.load(folder / "adapter.pt", weights_only=True)["tensors"]


def stored(folder):
    """Return {name: tensor} of a checkpoint in Meta's layout, as its one file has it."""
    return torch.load(folder / "consolidated.00.pth", weights_only=True)


def saved(content, **settings):
    """Return the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


class Attack:
    """Code that runs where a pickle of it is loaded."""

    def __reduce__(self):
        return print, ("the pickle ran",)


# --- processes

# A process begins with its parent's peak in ru_maxrss, and pytest's would hide everything.  Linux
# has one of its own too.
PEAK = """
import os, resource
def peak():
    if os.path.exists("/proc/self/status"):
        return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
"""


def torchrun(folder, *command, ranks=2):
    """Return the finished process of `torchrun --nproc_per_node=RANKS -- COMMAND` in a folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=ONE_THREAD,
    )
