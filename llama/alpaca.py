"""Alpaca examples: prompt -> tokens and labels -> micro-batches.

An example is a dict with "instruction", "input" (may be absent or empty) and "output", all text.
"""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

IGNORE = -100                                        # the label of what is no target: cross_entropy's own default

# Stanford Alpaca's two prompts, to the letter: training, evaluation and generation all use these.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")


class Batch(NamedTuple):
    """A micro-batch: tokens and labels (B, T) int64, the number of its answer tokens, and, of a packed one, its layout.

    Labels stand where their tokens stand (labels[t] is tokens[t] or IGNORE); the shift by one is the loss's.
    """
    tokens: torch.Tensor
    labels: torch.Tensor
    n_answer: int
    layout: object = None

    def to(self, device):
        """What the model reads goes to the device, while that still computes; labels stay, and so nothing asks it back."""
        tokens = self.tokens.pin_memory() if device.type == "cuda" else self.tokens
        return self._replace(tokens=tokens.to(device, non_blocking=True), layout=self.layout and self.layout.to(device))


class Window(NamedTuple):
    """An optimizer step: this rank's micro-batches, what all ranks have, and how many epochs will have passed."""
    batches: list
    n_tokens: int
    n_answer: int
    epoch: float


def format_prompt(example):
    """The text up to where the answer begins."""
    return (PROMPT_WITH_INPUT if example.get("input") else PROMPT_WITHOUT_INPUT).format_map(example)


def encode_prompt(example, tokenizer):
    """Ids of bos and prompt.  The answer is encoded on its own and joined, so the border between the two is a
    fact: encoded as one text, "Response:" and an answer that begins with "-" would share a piece.  An answer's
    first piece therefore begins like any word does, and generation stops its prompt at the same place."""
    return tokenizer.encode(format_prompt(example), bos=True)


def encode_example(example, tokenizer, max_seq_len):
    """(tokens, labels): two lists of at most max_seq_len ids.  The prompt is masked, eos is a target.

    A longer row loses its tail, eos first: an answer cut short must not teach the model to stop there.
    """
    prompt = encode_prompt(example, tokenizer)
    answer = tokenizer.encode(example["output"], eos=True)
    return (prompt + answer)[:max_seq_len], ([IGNORE] * len(prompt) + answer)[:max_seq_len]


def read_examples(path, required=("instruction", "output")):
    """List of examples from a .json list or a .jsonl file with one object a line.

    Raises FileNotFoundError, or ValueError that says which line or which example (from 1) is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from error
    if path.suffix.lower() == ".jsonl":
        examples = [parse_json(line, f"{path}, line {n}", n)
                    for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        examples = parse_json(text, path)
        if not isinstance(examples, list):
            raise ValueError(f"{path} holds a {type(examples).__name__}, not a list of examples")
    for n, example in enumerate(examples, 1):
        check_example(example, f"{path}, example {n}", required)
    if not examples:
        raise ValueError(f"{path} holds no example")
    return examples


def parse_json(text, where, line=None):
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON (nested too deeply)") from error
    except ValueError as error:
        spot = f", line {error.lineno}, column {error.colno}" if line is None and hasattr(error, "lineno") else ""
        raise ValueError(f"{where}{spot}: not JSON ({getattr(error, 'msg', error)})") from error


def check_example(example, where, required):
    """Raise ValueError unless `example` has the required fields, all as text, and an instruction that says something."""
    if not isinstance(example, dict):
        raise ValueError(f"{where} is a {type(example).__name__}, not an object")
    for field in ("instruction", "input", "output"):
        value = example.get(field)
        if value is None and field not in required:
            continue
        if value is None:
            raise ValueError(f"{where} has no {field!r}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field!r} is a {type(value).__name__}, not text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{where}: {field!r} has half of a surrogate pair, which is no character")
    if not example["instruction"].strip():
        raise ValueError(f"{where}: 'instruction' is empty")


class SupervisedDataset(torch.utils.data.Dataset):
    """Encoded examples; [i] is (tokens, labels).  `cut` and `dropped` count what max_seq_len did.

    numbers[i] is what to call it: its place in the file, from 1, unless `numbers` says otherwise of the examples.
    Rows with no answer token left are dropped.  Raises ValueError when that leaves none.
    """

    def __init__(self, examples, tokenizer, max_seq_len=512, name="the data", numbers=None):
        rows = [encode_example(example, tokenizer, max_seq_len) for example in examples]
        self.numbers = [number for number, row in zip(numbers or range(1, len(rows) + 1), rows) if row[1][-1] != IGNORE]
        self.rows = [row for row in rows if row[1][-1] != IGNORE]
        self.dropped = len(rows) - len(self.rows)
        self.cut = sum(labels[-1] != tokenizer.eos_id for _, labels in self.rows)
        if not self.rows:
            raise ValueError(f"{name}: none of {len(rows)} examples has an answer token within {max_seq_len} tokens; "
                             "allow longer rows")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def count_answer(labels):
    """Targets of one row (the first token has nothing before it that could predict it)."""
    return sum(label != IGNORE for label in labels[1:])


def pad_right(lists, value):
    """Lists of B lists of ids -> (B, T) int64, filled up with `value` to the longest."""
    T = max(map(len, lists))
    return torch.tensor([ids + [value] * (T - len(ids)) for ids in lists])


class DataCollatorForSupervisedDataset:
    """List of (tokens, labels) -> Batch, padded on the right to the longest row: pad_id, labels IGNORE.

    The plain form, in which most code has it; train.py packs instead, and tests compare that with this.
    """

    def __init__(self, pad_id):
        self.pad_id = pad_id

    def __call__(self, rows):
        tokens, labels = zip(*rows)
        return Batch(pad_right(tokens, self.pad_id), pad_right(labels, IGNORE), sum(map(count_answer, labels)))


def plan_epoch(lengths, batch_size, accumulation_steps, seed, epoch, world_size=1, tokens_per_batch=None):
    """The optimizer steps of an epoch: [step][rank][micro-batch] -> indices into `lengths`, the examples' tokens.

    The order is drawn from (seed, epoch), every example comes once, and what is left at the end makes a smaller
    step like any other.  A step is dealt out rank by rank; at the end a rank may be left without.  A micro-batch has
    batch_size examples or, with tokens_per_batch, as many as fit in that many tokens, and always one.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(lengths)).tolist()
    if tokens_per_batch:
        steps = split(fill(order, lengths, tokens_per_batch), accumulation_steps * world_size)
        return [[step[rank::world_size] for rank in range(world_size)] for step in steps]
    steps = split(order, batch_size * accumulation_steps * world_size)
    return [[split(step[rank::world_size], batch_size) for rank in range(world_size)] for step in steps]


def split(some, n):
    """Pieces of n, the last one of what is left."""
    return [some[i:i + n] for i in range(0, len(some), n)]


def fill(order, lengths, room, at_once=1024):
    """Indices in `order`, grouped so that the lengths of a group add up to at most `room`, where one alone does.

    The next thousand are taken from longest to shortest, each into the first group that has room for it
    (first-fit decreasing, Johnson 1973: at most 11/9 of the fewest groups); groups then come by their earliest member.
    """
    groups = []
    for some in split(order, at_once):
        filled = []                                              # [room left, places in the order]
        for place in sorted(range(len(some)), key=lambda place: -lengths[some[place]]):
            length = lengths[some[place]]
            group = next((group for group in filled if group[0] >= length), None)
            if group is None:
                filled.append(group := [room, []])
            group[0] -= length
            group[1].append(place)
        groups += [[some[place] for place in places] for places in sorted(sorted(places) for _, places in filled)]
    return groups


def windows(dataset, collate, steps, rank=0):
    """Yield a Window for each of `steps`, (epochs passed, [rank][micro-batch][index]).

    Each rank knows the whole plan, so the counts need no communication.  A rank that is left without gets one
    micro-batch that is masked whole, whose loss is 0: it must not miss the gradients' all-reduce.
    """
    for epoch, ranks in steps:
        rows = [dataset[i] for batches in ranks for batch in batches for i in batch]
        batches = [collate([dataset[i] for i in batch]) for batch in ranks[rank]]
        batches = batches or [collate([(rows[0][0], [IGNORE] * len(rows[0][1]))])]
        yield Window(batches, sum(len(tokens) for tokens, _ in rows), sum(count_answer(labels) for _, labels in rows), epoch)


def ahead(items):
    """The same items, each made in a thread while the one before it is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
