"""What several test files share: data, a tiny model, and what a run or a file holds."""

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from finetune.batches import plan_epoch, windows
from llama import ModelArgs, Transformer, save_checkpoint
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
HAS_SAFETENSORS = find_spec("safetensors") is not None
needs_safetensors = pytest.mark.skipif(
    not HAS_SAFETENSORS, reason="needs safetensors: pip install safetensors"
)
needs_peers = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("peft")),
    reason="needs transformers and peft: pip install -r tests/requirements.txt",
)


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


def random_ids(draw, low, high):
    """Return at least `low` and fewer than `high` ids, which a random generator draws."""
    length = int(torch.randint(low, high, (), generator=draw))
    return torch.randint(3, 390, (length,), generator=draw).tolist()


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


def close(one, other, share=1e-6):
    """Tell whether two tensors are equal to `share` of the norm."""
    return (one - other).norm() <= share * other.norm()


def check_linear(layer, weight, bias, parameters=(), share=1e-12):
    """Check a layer's output, and the gradients of x and parameters, against W x + b."""
    x = torch.randn(2, 4, weight.shape[1], dtype=weight.dtype, requires_grad=True)
    expected = F.linear(x, weight, bias)
    assert close(layer(x), expected, share)
    g = torch.randn_like(expected)
    gradients = torch.autograd.grad((layer(x) * g).sum(), [x, *parameters])
    right = torch.autograd.grad((expected * g).sum(), [x, *parameters])
    for one, other in zip(gradients, right, strict=True):
        assert close(one, other, share)


def epoch_windows(rows, collate, batch_size, accumulation_steps, seed=0, epoch=0, rank=0,
                  world_size=1, tokens_per_batch=None):  # fmt: skip
    """Return the windows of one epoch of (tokens, labels) rows, as train.py has them."""
    lengths = [len(rows[i][0]) for i in range(len(rows))]
    plan = plan_epoch(lengths, batch_size, accumulation_steps, seed, epoch, world_size=world_size,
                      tokens_per_batch=tokens_per_batch)  # fmt: skip
    steps = [(epoch + i / len(plan), step) for i, step in enumerate(plan, 1)]
    return list(windows(rows, collate, steps, rank))


def given_once(words):
    """Return a command line in which each flag stands once, with the last of its values.

    With --method full it is without the flags of an adapter.
    """
    groups = {}
    for word in words:
        if word.startswith("--"):
            flag = word
            groups[flag] = []
        groups[flag].append(word)
    if groups.get("--method") == ["--method", "full"]:
        for flag in ("--r", "--alpha", "--dropout", "--targets"):
            groups.pop(flag, None)
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


def column(folder, name):
    """Return a column of a run's metrics.jsonl: the values of the rows that have it."""
    return [row[name] for row in metrics(folder) if name in row]


def untimed(rows):
    """Return rows of metrics.jsonl without the columns of time and memory."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def adapter_tensors(folder):
    """Return {name: tensor} of a run's adapter, as its file has it."""
    return torch.load(folder / "adapter.pt", weights_only=True)["tensors"]


def stored(folder, name="consolidated.00.pth"):
    """Return what a file of tensors holds; by default that of a checkpoint in Meta's layout."""
    return torch.load(folder / name, weights_only=True)


def saved(content, **settings):
    """Return the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def lay_out(folder, tokenizer, n_examples, n_held_out, **sizes):
    """Write a base of 2 layers of GQA, data.json and held_out.json, from which runs begin."""
    model = tiny(tokenizer.vocab_size, **({"n_kv_heads": 2} | sizes))
    save_checkpoint(model, tokenizer, folder / "base")
    (folder / "data.json").write_text(json.dumps(EXAMPLES[:n_examples]))
    (folder / "held_out.json").write_text(json.dumps(EXAMPLES[:n_held_out]))


def copied_tree(folder):
    """Copy all that train.py and generate.py need to a folder."""
    for room in ("lora", "llama", "finetune"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "generate.py"):
        shutil.copy(ROOT / name, folder)


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


def python(folder, *words, timeout=300, **environment):
    """Return the finished process of `python WORDS` in a folder."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ONE_THREAD | environment,
    )


def launcher(ranks=2, *flags):
    """Return the words after `python` by which torchrun starts the command that follows them."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*command, *flags, "--"]


def torchrun(folder, *command, ranks=2):
    """Return the finished process of `torchrun --nproc_per_node=RANKS -- COMMAND` in a folder."""
    return python(folder, *launcher(ranks), *command)
