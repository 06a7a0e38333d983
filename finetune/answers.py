"""Answers to examples: one printed as it comes, or those to a whole file as JSON lines."""
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn as nn

from llama.guesses import NgramPool
from llama.sampling import beam_search, generate, stream
from llama.tokenizer import Tokenizer

from .batches import split
from .dataset import encode_prompt
from .exam import ANSWERED_AT_ONCE
from .preflight import plural
from .templates import Template


@dataclass(frozen=True)
class Decoding:
    """How the tokens of an answer are chosen; the help of generate.py explains each field."""
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    beams: int
    no_repeat_ngram: int
    seed: int


class Answerer:
    """A model with its tokenizer and template, and the guesses that its answers share.

    verbose: whether to print tokens and forwards after each answer or batch.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, template: Template,
                 decoding: Decoding, verbose: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.decoding = decoding
        self.verbose = verbose
        self.pool = NgramPool()

    def prompt(self, example: dict) -> list[int]:
        return encode_prompt(example, self.tokenizer, self.template)

    def answer_ids(self, examples: Sequence[dict]) -> Iterator[tuple[int, int]]:
        """Iterate over (i, id): the next tokens of the answer to examples[i]."""
        how = self.decoding
        prompts = [self.prompt(example) for example in examples]
        if how.beams > 1:
            return self.beam_ids(prompts)
        return generate(self.model, prompts, how.max_new_tokens, self.tokenizer.end_ids,
                        temperature=how.temperature, top_k=how.top_k, top_p=how.top_p,
                        no_repeat_ngram=how.no_repeat_ngram, seed=how.seed, pool=self.pool)

    def beam_ids(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, int]]:
        how = self.decoding
        for i, prompt in enumerate(prompts):
            answer = beam_search(self.model, prompt, how.max_new_tokens, self.tokenizer.end_ids,
                                 how.beams, how.no_repeat_ngram)
            for token in answer:
                yield i, token

    def show(self, example: dict) -> str:
        """Print the answer to one example as it comes, and return it."""
        answer = ""
        with counted(self.model, self.answer_ids([example]), self.verbose) as ids:
            for piece in stream(self.tokenizer, (token for _, token in ids)):
                print(piece, end="", flush=True)
                answer += piece
            print(flush=True)
        return answer

    def answers_to(self, examples: Sequence[dict]) -> list[str]:
        """Return the answers to several examples, generated as one batch."""
        answers = [[] for _ in examples]
        if examples:
            with counted(self.model, self.answer_ids(examples), self.verbose) as ids:
                for i, token in ids:
                    answers[i].append(token)
        return [self.tokenizer.decode(answer) for answer in answers]


class QuestionFile:
    """The rows of a file, as read and as examples, checked and ready to be answered.

    Raises ValueError if no example leaves space for an answer, or if rows already have the fields
    that would be added.  The number of each example that is too long is printed.
    """

    def __init__(self, path: str, rows: Sequence[dict], examples: Sequence[dict],
                 answerer: Answerer):
        self.rows = rows
        self.examples = examples
        self.answerer = answerer
        self.answer_field, self.error_field = free_fields(rows, path)
        self.problems = length_problems(answerer, examples, path)

    def print_answers(self):
        """Print each row as a JSON line with its answer on stdout, and progress on stderr.

        The answer to an example that is too long is null, and the row says why.
        """
        n_answered = 0
        for indices in split(range(len(self.examples)), ANSWERED_AT_ONCE):
            answered = [i for i in indices if i not in self.problems]
            texts = self.answerer.answers_to([self.examples[i] for i in answered])
            answers = dict(zip(answered, texts, strict=True))
            for i in indices:
                if i in self.problems:
                    added = {self.answer_field: None, self.error_field: self.problems[i]}
                else:
                    added = {self.answer_field: answers[i]}
                print(json.dumps(self.rows[i] | added, ensure_ascii=False), flush=True)
            n_answered += len(answered)
            print(f"{n_answered}/{len(self.examples)} answered", file=sys.stderr, flush=True)


def free_fields(rows: Sequence[dict], path: str) -> tuple[str, str]:
    """Return the names of the two fields that are added to rows: for the answer, and for an error.

    They are "answer" and "error".  If any row already has one of these, they are "model_answer" and
    "model_error".  Raises ValueError if these are taken too.
    """
    used_fields = set().union(*rows)
    for prefix in ("", "model_"):
        names = (f"{prefix}answer", f"{prefix}error")
        if not used_fields.intersection(names):
            return names
    taken = sorted(used_fields & {"answer", "error", "model_answer", "model_error"})
    raise ValueError(f"{path} has the fields {' and '.join(taken)}, which leave no name for the "
                     "model's answer or error; rename one of them")


def length_problems(answerer: Answerer, examples: Sequence[dict], path: str) -> dict[int, str]:
    """Return {i: problem} for each example whose prompt leaves no space for an answer.

    Each is printed, too.  Raises ValueError if that is every example.
    """
    limit = answerer.model.args.max_seq_len
    problems = {}
    for i, example in enumerate(examples):
        n_tokens = len(answerer.prompt(example))
        if n_tokens >= limit:
            problems[i] = f"the prompt has {n_tokens} tokens and the model takes {limit}"
    if len(problems) == len(examples):
        raise ValueError(f"{path}: no example can be answered; in the first, {problems[0]}")
    for i, problem in problems.items():
        print(f"{path}, example {i + 1}: {problem}; it is not answered", file=sys.stderr)
    return problems


@contextmanager
def counted(model: nn.Module, ids: Iterable, verbose: bool):
    """Yield `ids` to iterate over; at the end, if verbose, print tokens, forwards and speed."""
    n_tokens = 0
    n_forwards = 0

    def count_tokens():
        nonlocal n_tokens
        for pair in ids:
            n_tokens += 1
            yield pair

    def count_forward(*_):
        nonlocal n_forwards
        n_forwards += 1

    hook = model.register_forward_hook(count_forward)
    began = time.perf_counter()
    try:
        yield count_tokens()
    finally:
        hook.remove()
    if verbose:
        speed = n_tokens / (time.perf_counter() - began)
        print(f"{plural(n_tokens, 'token')} in {plural(n_forwards, 'forward pass')}, "
              f"{n_tokens / n_forwards:.2f} tokens per pass; {speed:.1f} tokens/s", file=sys.stderr,
              flush=True)
