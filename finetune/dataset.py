"""Alpaca examples: make prompts of them, encode them as tokens and labels.

An example is a dict with "instruction", "input" (may be absent or empty) and "output", all text.
A row is (tokens, labels), two lists of ids: labels[t] is tokens[t] where that token is a target,
and IGNORE where it is not.  All code that reads rows follows the labels, so a row may hold several
answers, with a question before each.
"""
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from llama.tokenizer import Tokenizer

from .examples import read_examples

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


def encode_example(example: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the row of an example, of whatever length: prompt, answer and eos.

    The labels of the prompt are IGNORE; eos is a target.
    """
    prompt = encode_prompt(example, tokenizer)
    answer = tokenizer.encode(example["output"], eos=True)
    return prompt + answer, [IGNORE] * len(prompt) + answer


def truncate(row: tuple[list[int], list[int]],
             max_seq_len: int) -> tuple[list[int], list[int]]:
    """Return the first max_seq_len tokens and labels of a row.

    What is cut off takes its eos with it: an answer that was cut must not teach the model to stop.
    """
    tokens, labels = row
    return tokens[:max_seq_len], labels[:max_seq_len]


def count_answer(labels: list[int]) -> int:
    """Return the number of targets in a row.

    The first token is not one of them: there is nothing before it that could predict it.
    """
    return sum(label != IGNORE for label in labels[1:])


def answer_spans(labels: list[int]) -> list[tuple[int, int]]:
    """Return (start, stop) of each answer in a row: of each run of targets after the first token.

    An answer ends with its eos, or where the row was truncated.
    """
    spans = []
    for t, label in enumerate(labels):
        if t == 0 or label == IGNORE:
            continue
        if spans and spans[-1][1] == t:
            spans[-1] = (spans[-1][0], t + 1)
        else:
            spans.append((t, t + 1))
    return spans


class SupervisedDataset(torch.utils.data.Dataset):
    """Encoded examples: dataset[i] is a row, (tokens, labels) of at most max_seq_len ids.

    dropped: how many examples have no target within max_seq_len; they are left out.
    cut: how many of the others were truncated.  n_with_eos: how many have eos as a target.
    n_empty: how many have no text to learn, only eos or white space.  numbers: the number of each
    example in its file, by default counted from 1.  name: what an error calls the data.
    Raises ValueError when no example is left.
    """

    def __init__(self, examples: Sequence[dict], tokenizer: Tokenizer, max_seq_len: int = 512,
                 name: str = "the data", numbers: Iterable[int] | None = None):
        whole_rows = [encode_example(example, tokenizer) for example in examples]
        if numbers is None:
            numbers = range(1, len(whole_rows) + 1)
        self.numbers = []
        self.rows = []
        self.cut = 0
        self.n_with_eos = 0
        self.n_empty = 0
        for number, whole_row in zip(numbers, whole_rows, strict=True):
            tokens, labels = truncate(whole_row, max_seq_len)
            if count_answer(labels) == 0:
                continue
            self.numbers.append(number)
            self.rows.append((tokens, labels))
            self.cut += len(tokens) < len(whole_row[0])
            self.n_with_eos += tokenizer.eos_id in labels[1:]
            self.n_empty += is_empty(labels, tokenizer)
        self.dropped = len(whole_rows) - len(self.rows)
        if not self.rows:
            raise ValueError(f"{name}: none of {len(whole_rows)} examples has an answer token "
                             f"within {max_seq_len} tokens; allow longer rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i]


def is_empty(labels: list[int], tokenizer: Tokenizer) -> bool:
    """Return whether a row's answers have no text but white space."""
    text_ids = [label for label in labels[1:] if label not in (IGNORE, tokenizer.eos_id)]
    return not tokenizer.decode(text_ids).strip()


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
