"""An exam for models: the likelihood of the right answers, and answers of the model's own.

The model's own answers are generated greedily.
"""
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn

from llama.guesses import NgramPool
from llama.sampling import generate, tokens_left
from llama.tokenizer import Tokenizer

from .batches import split
from .dataset import answer_piece, count_answer, encode_answer, encode_example
from .evaluate import distinct_classes, has_one_answer, last_answer, score_answers
from .templates import DEFAULT, Template
from .templates.conversation import last_answer_text

ANSWERED_AT_ONCE = 8                                 # prompts


class BrokenWeights(ValueError):
    """A model's logits are not numbers."""


class Exam:
    """Examples to test several models on, which must have the same tokenizer and context length.

    An example with several answers is asked for the last one, which is its "output", after all that
    stands before; the likelihoods count all its answers.
    choices: texts to compare as answers; by default the examples' own answers if they are classes.
    limit: the most tokens that a greedy answer may have.  It is lowered to twice the length of the
    longest answer of the examples.  name: what an error calls the data.
    Raises ValueError for an answer that is not among the choices, choices for several answers, or
    an example that is too long.
    """

    def __init__(self, examples: Sequence[dict], tokenizer: Tokenizer, max_seq_len: int,
                 choices: Sequence[str] | None = None, limit: int = 128, name: str = "the data", *,
                 template: Template = DEFAULT):
        answers = [last_answer_text(example) for example in examples]
        answers = as_written_once(choices or (), answers, template)
        self.answers = answers
        if choices:
            check_among(answers, choices, name)
        self.tokenizer = tokenizer
        self.rows = [encode_example(example, tokenizer, template) for example in examples]
        self.choices = choices
        if all(map(has_one_answer, self.rows)):
            self.choices = choices or distinct_classes(answers)
        elif choices:
            raise ValueError(f"{name}: --choices compares single answers, and there are examples "
                             "with several; leave --choices out")
        self.choice_ids = [encode_answer(choice, tokenizer, template)
                           for choice in self.choices or ()]
        encoded = [last_answer(row) for row in self.rows]
        self.prompts = [prompt for prompt, _ in encoded]
        self.answer_lengths = [len(answer) for _, answer in encoded]
        longest_choice = max(map(len, self.choice_ids), default=0)
        lengths = zip(map(len, self.prompts), self.answer_lengths, strict=True)
        for n, (n_prompt, n_answer) in enumerate(lengths, 1):
            total = n_prompt + max(n_answer, longest_choice)
            if total > max_seq_len:
                raise ValueError(f"{name}, example {n}: prompt and answer have {total} tokens and "
                                 f"the model takes {max_seq_len}")
        self.limit = min(limit, 2 * max(self.answer_lengths))

    def about(self) -> dict:
        """Return facts about the examples that need no model."""
        n_targets = sum(count_answer(labels) for _, labels in self.rows)
        facts = {"examples": len(self.answers), "answer_tokens": n_targets,
                 "limit": self.limit, "choices": self.choices}
        if self.choices:
            majority = max(self.choices, key=self.answers.count)
            share = self.answers.count(majority) / len(self.answers)
            facts["majority"] = {"answer": majority, "accuracy": share}
        return facts

    def score(self, model: nn.Module,
             report: Callable[[int], None] | None = None) -> dict[str, torch.Tensor]:
        """Return the table of score_answers with two more columns about the model's own answers.

        "ended": 1 if the answer ended with eos before the limit.  "exact_match": 1 if it also
        equals the example's answer; white space at both ends does not count.
        report(n) is called with the number of examples that are answered so far.
        Raises BrokenWeights.
        """
        table = score_answers(model, self.rows, self.choice_ids)
        if table["nats"].isnan().any():
            raise BrokenWeights("the model's logits are not numbers: are its weights, or the "
                                "adapter's?")
        exact = []
        ended = []
        pool = NgramPool()                           # Earlier answers help to guess later ones.
        for indices in split(range(len(self.rows)), ANSWERED_AT_ONCE):
            prompts = [self.prompts[i] for i in indices]
            answers = [[] for _ in indices]
            for k, token in generate(model, prompts, self.limit, self.tokenizer.end_ids, pool=pool):
                answers[k].append(token)
            limits = tokens_left(model, prompts, self.limit)
            for i, answer, limit in zip(indices, answers, limits, strict=True):
                text = self.tokenizer.decode(answer)
                exact.append(text.strip() == self.answers[i].strip())
                ended.append(len(answer) < limit)
            if report:
                report(len(ended))
        table["ended"] = torch.tensor(ended, dtype=torch.float64)
        table["exact_match"] = torch.tensor(exact, dtype=torch.float64) * table["ended"]
        return table


def as_written_once(choices: Sequence[str], answers: Sequence[str],
                    template: Template) -> list[str]:
    """Return the answers; where the template writes several alike, all become the first of them.

    Choices come before answers.  Raises ValueError for two choices that it writes alike.
    """
    first_text = {}                                  # {what the template writes: the first text}
    for choice in choices:
        other = first_text.setdefault(answer_piece(choice, template).text, choice)
        if other != choice:
            raise ValueError(f"--choices: {other!r} and {choice!r} are one answer in this template")
    return [first_text.setdefault(answer_piece(answer, template).text, answer)
            for answer in answers]


def check_among(answers: Sequence[str], choices: Sequence[str], name: str):
    """Raise ValueError for an answer that is not one of the choices."""
    for n, answer in enumerate(answers, 1):
        if answer not in choices:
            raise ValueError(f"{name}, example {n}: its output {answer!r} is not one of the "
                             f"choices {', '.join(map(repr, choices))}")
