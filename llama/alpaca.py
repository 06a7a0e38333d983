"""Alpaca examples: prompt -> tokens and labels -> micro-batches.

An example is a dict with "instruction", "input" (may be absent or empty) and "output", all text.
"""
import json
from collections import namedtuple
from pathlib import Path

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

Batch = namedtuple("Batch", "tokens labels n_answer")
Batch.__doc__ = """A micro-batch: tokens and labels (B, T) int64, and the number of its answer tokens.

Labels stand where their tokens stand (labels[t] is tokens[t] or IGNORE); the shift by one is the loss's.
"""

Window = namedtuple("Window", "batches n_tokens n_answer")
Window.__doc__ = "An optimizer step: this rank's micro-batches, and how many real and answer tokens all ranks have."


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

    Rows with no answer token left are dropped.  Raises ValueError when that leaves none.
    """

    def __init__(self, examples, tokenizer, max_seq_len=512, name="the data"):
        rows = [encode_example(example, tokenizer, max_seq_len) for example in examples]
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
    """List of (tokens, labels) -> Batch, padded on the right to the longest row: pad_id, labels IGNORE."""

    def __init__(self, pad_id):
        self.pad_id = pad_id

    def __call__(self, rows):
        tokens, labels = zip(*rows)
        return Batch(pad_right(tokens, self.pad_id), pad_right(labels, IGNORE), sum(map(count_answer, labels)))


def in_order(dataset, collate, batch_size, rank=0, world_size=1):
    """Yield this rank's share of the dataset as micro-batches in file order: for held-out loss."""
    mine = range(rank, len(dataset), world_size)
    for i in range(0, len(mine), batch_size):
        yield collate([dataset[j] for j in mine[i:i + batch_size]])


def windows(dataset, collate, batch_size, accumulation_steps, seed, epoch, rank=0, world_size=1):
    """Yield a Window for each optimizer step of an epoch: this rank's micro-batches, the counts of all ranks.

    The order is drawn from (seed, epoch), every example comes once, and what is left at the end makes a
    smaller window like any other.  A step's examples are dealt out rank by rank; each rank knows the order, so
    the counts need no communication.  A rank that is left without gets one micro-batch that is masked whole,
    whose loss is 0: it must not miss the gradients' all-reduce.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset)).tolist()
    in_a_step = batch_size * accumulation_steps * world_size
    for start in range(0, len(order), in_a_step):
        step = [dataset[i] for i in order[start:start + in_a_step]]
        mine = step[rank::world_size] or [(step[0][0], [IGNORE] * len(step[0][1]))]
        batches = [collate(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]
        yield Window(batches, sum(len(tokens) for tokens, _ in step), sum(count_answer(labels) for _, labels in step))
