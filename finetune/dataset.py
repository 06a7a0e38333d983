"""Examples become rows of tokens and labels, as their template says.

A row is (tokens, labels), two lists of ids: labels[t] is tokens[t] where that token is a target,
and IGNORE where it is not.  All code that reads rows follows the labels, so a row may hold several
answers, with a question before each.
"""
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from llama.tokenizer import Tokenizer

from .errors import short_paths
from .examples import read_examples
from .templates import DEFAULT, TEMPLATES, Piece, Template

# The label of a token that is not a target.  It is the default of torch's cross_entropy.
IGNORE = -100


def encode_pieces(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the row of pieces, each of them encoded separately.

    Encoded as one text, the ":" of "Response:" and a "-" that begins the answer could become one
    token, which would be half prompt and half answer.
    """
    tokens = []
    labels = []
    for piece in pieces:
        ids = tokenizer.encode(piece.text, bos=piece.bos, eos=piece.eos)
        n_masked = len(ids)
        if piece.is_target:                          # Nothing predicts bos.
            n_masked = 1 if piece.bos else 0
        tokens += ids
        labels += [IGNORE] * n_masked + ids[n_masked:]
    return tokens, labels


def encode_prompt(example: dict, tokenizer: Tokenizer, template: Template = DEFAULT) -> list[int]:
    """Return the ids of everything before the last answer, which the example need not have.

    Generation begins where training had the answer.  Raises ValueError without a prompt.
    """
    pieces = template.pieces(example)
    while pieces and pieces[-1].is_target:
        pieces = pieces[:-1]
    if not pieces:
        raise ValueError("there is no question to answer")
    tokens, _ = encode_pieces(pieces, tokenizer)
    return tokens


def encode_example(example: dict, tokenizer: Tokenizer,
                   template: Template = DEFAULT) -> tuple[list[int], list[int]]:
    """Return the row of an example, of whatever length.

    In Alpaca's template it is prompt, answer and eos.  The labels of the prompt are IGNORE; eos is
    a target.
    """
    return encode_pieces(template.pieces(example), tokenizer)


def answer_piece(text: str, template: Template = DEFAULT) -> Piece:
    """Return an answer as the template has it after any prompt."""
    return template.pieces({"instruction": "any", "output": text})[-1]


def encode_answer(text: str, tokenizer: Tokenizer, template: Template = DEFAULT) -> list[int]:
    """Return the ids of an answer, with eos, as the template has it after any prompt."""
    tokens, _ = encode_pieces([answer_piece(text, template)], tokenizer)
    return tokens


def truncate(row: tuple[list[int], list[int]],
             max_seq_len: int) -> tuple[list[int], list[int]]:
    """Return the first max_seq_len tokens and labels of a row.

    An answer that is cut gets no eos, so it does not teach the model to stop there.
    """
    tokens, labels = row
    return tokens[:max_seq_len], labels[:max_seq_len]


def cut_into_rows(row: tuple[list[int], list[int]], max_seq_len: int) -> list:
    """Return rows of at most max_seq_len tokens that have all targets of a long row, in order.

    Each further row begins with the last token of the row before, as context.
    """
    tokens, labels = row
    rows = []
    for start in range(0, len(tokens) - 1, max_seq_len - 1):
        stop = start + max_seq_len
        rows.append((tokens[start:stop], [IGNORE, *labels[start + 1:stop]]))
    return rows


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
    cut: how many of the others were truncated; 0 if template.continues.  Of their answers
    cut_answers have lost their end, and lost_turns are gone with their whole turn.
    n_with_eos: how many rows have eos as a target.  n_empty: how many have no text to learn, only
    eos or white space.  numbers: the number of each row's example in its file, by default counted
    from 1.  name: what an error calls the data.
    Raises ValueError when no example is left.
    """

    def __init__(self, examples: Sequence[dict], tokenizer: Tokenizer, max_seq_len: int = 512,
                 name: str = "the data", numbers: Iterable[int | str] | None = None,
                 template: Template = DEFAULT):
        whole_rows = [encode_example(example, tokenizer, template) for example in examples]
        if numbers is None:
            numbers = range(1, len(whole_rows) + 1)
        self.numbers = []
        self.rows = []
        self.cut = 0
        self.cut_answers = 0
        self.lost_turns = 0
        self.n_with_eos = 0
        self.n_empty = 0
        self.is_text = template.continues            # Then a target is no answer to a question.
        self.dropped = 0
        for number, whole_row in zip(numbers, whole_rows, strict=True):
            if template.continues:
                rows = cut_into_rows(whole_row, max_seq_len)
            else:
                rows = [truncate(whole_row, max_seq_len)]
                if len(whole_row[0]) > max_seq_len and count_answer(rows[0][1]) > 0:
                    self.count_cut(whole_row[1], rows[0][1])
            rows = [row for row in rows if count_answer(row[1]) > 0]
            self.dropped += not rows
            for tokens, labels in rows:
                self.numbers.append(number)
                self.rows.append((tokens, labels))
                self.n_with_eos += tokenizer.eos_id in labels[1:]
                self.n_empty += not template.continues and is_empty(labels, tokenizer)
        if not self.rows:
            raise ValueError(f"{name}: none of {len(whole_rows)} examples has an answer token "
                             f"within {max_seq_len} tokens; allow longer rows")

    def count_cut(self, whole_labels: list[int], labels: list[int]):
        """Count what an example has lost by truncation; at least one target is left."""
        whole_spans = answer_spans(whole_labels)
        spans = answer_spans(labels)
        self.cut += 1
        self.cut_answers += spans[-1] != whole_spans[len(spans) - 1]
        self.lost_turns += len(whole_spans) - len(spans)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        return self.rows[i]


def is_empty(labels: list[int], tokenizer: Tokenizer) -> bool:
    """Return whether a row's answers have no text but white space."""
    text_ids = [label for label in labels[1:] if label not in (IGNORE, tokenizer.eos_id)]
    return not tokenizer.decode(text_ids).strip()


def load_datasets(data: Sequence[str], val_data: Sequence[str] | None,
                  val_fraction: float | None, max_seq_len: int, seed: int, tokenizer: Tokenizer, *,
                  template: str = "alpaca") -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """Return (training set, held-out set or None) of these files.

    val_fraction: the share of all examples of `data` to hold out.  template: a name in TEMPLATES.
    Raises FileNotFoundError or ValueError for files that cannot be used.
    """
    template = TEMPLATES[template]
    examples, numbers = read_files(data, template)
    held_out = None
    if val_data:
        held_out, _ = read_files(val_data, template)
    elif val_fraction:
        n = round(len(examples) * val_fraction)
        if not 1 <= n < len(examples):
            raise ValueError(f"--val-fraction {val_fraction} of {len(examples)} examples leaves "
                             "one side empty")
        order = np.random.default_rng(seed).permutation(len(examples)).tolist()
        held_out = [examples[i] for i in order[:n]]
        numbers = [numbers[i] for i in order[n:]]
        examples = [examples[i] for i in order[n:]]
    train_set = SupervisedDataset(examples, tokenizer, max_seq_len, short_paths(data), numbers,
                                  template)
    val_set = None
    if held_out:
        name = short_paths(val_data or data)
        val_set = SupervisedDataset(held_out, tokenizer, max_seq_len, name, template=template)
    return train_set, val_set


def read_files(paths: Sequence[str], template: Template) -> tuple[list[dict], list[int | str]]:
    """Return (examples of all files, the number of each in its file).

    With several files the number has the file's name before it.
    """
    examples = []
    numbers = []
    for path in paths:
        examples_of_file = read_examples(path, template=template)
        examples += examples_of_file
        for n in range(1, len(examples_of_file) + 1):
            numbers.append(n if len(paths) == 1 else f"{path} {n}")
    return examples, numbers
