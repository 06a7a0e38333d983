"""Alpaca examples: prompt -> tokens and labels.

An example is a dict with "instruction", "input" (may be absent or empty) and "output", all text.
"""
import json
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


def load_datasets(data, val_data, val_fraction, max_seq_len, seed, tokenizer):
    """Return (training set, held-out set or None) of --data, --val-data and --val-fraction.

    Raises FileNotFoundError or ValueError for files that cannot be used.
    """
    examples = read_examples(data)
    numbers = None
    held_out = None
    if val_data:
        held_out = read_examples(val_data)
    elif val_fraction:
        n = round(len(examples) * val_fraction)
        if not 1 <= n < len(examples):
            raise ValueError(f"--val-fraction {val_fraction} of {len(examples)} examples leaves "
                             "one side empty")
        order = np.random.default_rng(seed).permutation(len(examples)).tolist()
        numbers = [i + 1 for i in order[n:]]
        held_out = [examples[i] for i in order[:n]]
        examples = [examples[i] for i in order[n:]]
    train_set = SupervisedDataset(examples, tokenizer, max_seq_len, data, numbers)
    val_set = None
    if held_out:
        name = val_data or data
        val_set = SupervisedDataset(held_out, tokenizer, max_seq_len, name)
    return train_set, val_set
