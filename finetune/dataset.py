"""Alpaca examples: read them, make prompts of them, encode them as tokens and labels.

An example is a dict with "instruction", "input" (may be absent or empty) and "output", all text.
"""
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from llama.tokenizer import Tokenizer

# The label of a token that is not a target.  It is the default of torch's cross_entropy.
IGNORE = -100
# Stanford Alpaca's two prompts, to the letter.  Training, evaluation and generation share them.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")


def format_prompt(example: dict) -> str:
    """Return the text before the answer."""
    template = PROMPT_WITH_INPUT if example.get("input") else PROMPT_WITHOUT_INPUT
    return template.format_map(example)


def encode_prompt(example: dict, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of bos and prompt.

    Prompt and answer are encoded separately, so that no token holds the end of one and the start of
    the other.  In one text, the ":" of "Response:" and a "-" that begins the answer could become
    one token.  Generation ends its prompt at the same place.
    """
    return tokenizer.encode(format_prompt(example), bos=True)


def encode_example(example: dict, tokenizer: Tokenizer,
                   max_seq_len: int | None) -> tuple[list[int], list[int]]:
    """Return (tokens, labels), two lists of at most max_seq_len ids (None: of any length).

    The labels of the prompt are IGNORE; eos is a target.  A longer row is truncated and so has no
    eos: an answer that was cut must not teach the model to stop there.
    """
    prompt = encode_prompt(example, tokenizer)
    answer = tokenizer.encode(example["output"], eos=True)
    labels = [IGNORE] * len(prompt) + answer
    return (prompt + answer)[:max_seq_len], labels[:max_seq_len]


def read_examples(path: str | Path,
                  required: Sequence[str] = ("instruction", "output")) -> list[dict]:
    """Return the examples of a file: a .json list, or .jsonl with one example per line.

    required: the fields that an example must have.
    Raises FileNotFoundError, or ValueError that names the wrong line or example, counted from 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from error
    if path.suffix.lower() == ".jsonl":
        examples = parse_lines(text, path)
    else:
        examples = parse_json(text, path)
        if not isinstance(examples, list):
            raise ValueError(f"{path} holds a {type(examples).__name__}, not a list of examples")
    for n, example in enumerate(examples, 1):
        check_example(example, f"{path}, example {n}", required)
    if not examples:
        raise ValueError(f"{path} holds no example")
    return examples


def parse_lines(text: str, path: Path) -> list:
    """Return the values of a .jsonl file; empty lines are skipped.  Raises ValueError."""
    values = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {n}: not JSON ({json_problem(error)})") from error
    return values


def parse_json(text: str, path: Path) -> object:
    """Return the value of a .json file.  Raises ValueError that names line and column."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = ""
        if isinstance(error, json.JSONDecodeError):
            place = f", line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}{place}: not JSON ({json_problem(error)})") from error


def json_problem(error: Exception) -> str:
    """Return what json found wrong."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # For a number with thousands of digits json raises a ValueError that is not its own.
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def check_example(example: object, place: str, required: Sequence[str]):
    """Raise ValueError unless the required fields are there, and all fields are text.

    place: the beginning of the message.  The other fields may be absent or null.  The instruction
    must not be empty.
    """
    if not isinstance(example, dict):
        raise ValueError(f"{place} is a {type(example).__name__}, not an object")
    for field in ("instruction", "input", "output"):
        value = example.get(field)
        if value is None:
            if field in required:
                raise ValueError(f"{place} has no {field!r}")
            continue
        if not isinstance(value, str):
            raise ValueError(f"{place}: {field!r} is a {type(value).__name__}, not text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{place}: {field!r} has half of a surrogate pair, which is not a "
                             "character")
    if not example["instruction"].strip():
        raise ValueError(f"{place}: 'instruction' is empty")


class SupervisedDataset(torch.utils.data.Dataset):
    """Encoded examples: dataset[i] is (tokens, labels), two lists of ids.

    dropped: how many examples have no answer token within max_seq_len; they are left out.
    cut: how many of the others were truncated.  numbers: the number of each example in its file, by
    default counted from 1.  name: what an error calls the data.
    Raises ValueError when no example is left.
    """

    def __init__(self, examples: Sequence[dict], tokenizer: Tokenizer, max_seq_len: int = 512,
                 name: str = "the data", numbers: Iterable[int] | None = None):
        rows = [encode_example(example, tokenizer, max_seq_len) for example in examples]
        if numbers is None:
            numbers = range(1, len(rows) + 1)
        self.numbers = [number for number, row in zip(numbers, rows, strict=True)
                        if row[1][-1] != IGNORE]
        self.rows = [row for row in rows if row[1][-1] != IGNORE]
        self.dropped = len(rows) - len(self.rows)
        self.cut = sum(labels[-1] != tokenizer.eos_id for _, labels in self.rows)
        if not self.rows:
            raise ValueError(f"{name}: none of {len(rows)} examples has an answer token within "
                             f"{max_seq_len} tokens; allow longer rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i]


def count_answer(labels: list[int]) -> int:
    """Return the number of targets in a row.

    The first token is not one of them: there is nothing before it that could predict it.
    """
    return sum(label != IGNORE for label in labels[1:])


def load_datasets(data: str, val_data: str | None, val_fraction: float | None, max_seq_len: int,
                  seed: int, tokenizer: Tokenizer) -> tuple:
    """Return (training set, held-out set or None) for --data, --val-data and --val-fraction.

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
