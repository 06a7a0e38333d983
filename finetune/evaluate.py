"""How likely are the right answers to examples that the model was not trained on?

They are scored exactly and in batches.  The result is a table with one row per example, and
measures.py makes accuracy and the like of its columns.
"""
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from os.path import commonprefix
from typing import NamedTuple

import torch
import torch.nn as nn

from llama.layout import MIN_SHARED, Layout

from .dataset import IGNORE, SupervisedDataset, answer_spans
from .loss import CHUNK
from .measures import measures
from .ranks import sum_over_ranks

MAX_CLASSES = 20                                     # More different answers count as text.
SCORING_TOKENS = 2048                                # per forward that scores answers


class Question(NamedTuple):
    """A prompt and the answers to score after it, all lists of ids.

    labels: for each answer, its ids with IGNORE in place of those that are not scored, as in a row
    with several answers; None: all are scored.
    """
    prompt: list
    answers: list
    labels: list | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def targets(self) -> list:
        """The labels of each answer."""
        return self.answers if self.labels is None else self.labels


class Score(NamedTuple):
    """The score of an answer.

    log_p: log-probability of all its targets, in nats.  hits: how many of its targets are the
    model's first choice.
    """
    log_p: float
    hits: int


def distinct_classes(answers: Sequence) -> list | None:
    """Return the distinct answers in order, if they are classes; None otherwise.

    Classes are 2 to MAX_CLASSES different answers, with two examples to each on average.
    """
    classes = sorted(set(answers))
    if 2 <= len(classes) <= min(MAX_CLASSES, len(answers) / 2):
        return classes
    return None


def class_answers(dataset: SupervisedDataset, max_seq_len: int) -> list[list[int]] | None:
    """Return the distinct answers of a dataset, as ids, if they are classes; None otherwise.

    No example may be truncated or have several answers, and each answer must fit after every
    prompt.
    """
    if dataset.is_text or dataset.cut or not all(map(has_one_answer, dataset.rows)):
        return None
    examples = [last_answer(row) for row in dataset.rows]
    classes = distinct_classes([tuple(answer) for _, answer in examples])
    if classes is None:
        return None
    longest_prompt = max(len(prompt) for prompt, _ in examples)
    longest_answer = max(map(len, classes))
    if longest_prompt + longest_answer > max_seq_len:
        return None
    return [list(answer) for answer in classes]


def has_one_answer(row: tuple[list[int], list[int]]) -> bool:
    return len(answer_spans(row[1])) == 1


def last_answer(row: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Return (all tokens before a row's last answer, that answer), for (tokens, labels)."""
    tokens, labels = row
    start, stop = answer_spans(labels)[-1]
    return tokens[:start], tokens[start:stop]


def as_question(row: tuple[list[int], list[int]]) -> Question:
    """Return the question that scores all targets of a row (tokens, labels).

    Its answer reaches from the row's first target to the last; what follows predicts no target.
    """
    tokens, labels = row
    spans = answer_spans(labels)
    start = spans[0][0]
    stop = spans[-1][1]
    return Question(tokens[:start], [tokens[start:stop]], [labels[start:stop]])


def lay_out(questions: Sequence[Question]) -> tuple:
    """Return (tokens (1, N), Layout, places (M,), targets (M,)) of one packed row.

    The row has first the common beginning of all prompts, once.  Then come the rest of each prompt
    and its answers, each of which continues that prompt alone.  targets: the targets of all
    answers, one answer after another.  places[m]: the place in the row that predicts targets[m]; an
    answer's first token is predicted by the prompt's last.  An answer's own last token (eos, unless
    the answer was truncated) predicts nothing and is left out.
    """
    shared = []
    if len(questions) > 1:
        shared = commonprefix([question.prompt[:-1] for question in questions])
    tokens = []
    segments = []
    beginning = ()                                   # the segments before each prompt's own part
    if len(shared) >= MIN_SHARED:
        tokens = [*shared]
        segments = [(len(shared), ())]
        beginning = (0,)
    n_shared = len(tokens)
    places = []
    targets = []
    for question in questions:
        prompt = question.prompt
        tokens += prompt[n_shared:]
        segments.append((len(prompt) - n_shared, beginning))
        last_place = len(tokens) - 1
        context = (*beginning, len(segments) - 1)
        for answer, labels in zip(question.answers, question.targets, strict=True):
            answer_places = [last_place, *range(len(tokens), len(tokens) + len(answer) - 1)]
            for place, label in zip(answer_places, labels, strict=True):
                if label != IGNORE:
                    places.append(place)
                    targets.append(label)
            if len(answer) > 1:
                tokens += answer[:-1]
                segments.append((len(answer) - 1, context))
    return torch.tensor([tokens]), Layout(segments), torch.tensor(places), torch.tensor(targets)


def log_likelihoods(model: nn.Module, questions: Sequence[Question]) -> list[Score]:
    """Return the Score of each answer of each question, in order; eos counts as a target.

    This is one forward for all of them.  The log-sum-exp is in fp32 (or fp64), sums over tokens are
    in fp64.
    """
    device = next(model.parameters()).device
    tokens, layout, places, targets = lay_out(questions)
    # A place that several answers share is predicted once.
    rows, row_of_place = places.unique(return_inverse=True)
    logits = model(tokens.to(device), rows=rows.to(device), layout=layout.to(device))  # (R, V)
    sum_dtype = torch.promote_types(logits.dtype, torch.float32)
    totals = [chunk.to(sum_dtype).logsumexp(-1) for chunk in logits.split(CHUNK)]
    total = torch.cat(totals)                                                          # (R,)
    row_of_place = row_of_place.to(device)
    targets = targets.to(device)
    log_p = logits[row_of_place, targets].to(sum_dtype) - total[row_of_place]          # (M,)
    is_hit = logits.argmax(-1)[row_of_place] == targets
    counts = []                                      # targets per answer
    for question in questions:
        counts += map(count_targets, question.targets)
    per_answer = zip(log_p.cpu().double().split(counts), is_hit.cpu().split(counts), strict=True)
    return [Score(p.sum().item(), hits.sum().item()) for p, hits in per_answer]


def count_targets(labels: Sequence[int]) -> int:
    """Return how many labels of an answer are targets."""
    return sum(label != IGNORE for label in labels)


def questions_of(rows: Sequence, choices: list | None) -> list[Question]:
    """Return the question of each row (tokens, labels), with `choices` as its answers if given."""
    questions = [as_question(row) for row in rows]
    if choices:
        return [Question(question.prompt, choices) for question in questions]
    return questions


def group_questions(questions: Sequence[Question], max_tokens: int) -> list[list[int]]:
    """Return the indices of the questions in groups of up to max_tokens tokens.

    A longer question gets a group of its own.  The order is that of the prompts' ids, so that
    prompts with the same beginning come together.
    """
    groups = []
    n_tokens = math.inf                              # The first question opens the first group.
    for i in sorted(range(len(questions)), key=lambda i: questions[i].prompt):
        if n_tokens + questions[i].n_tokens > max_tokens:
            groups.append([])
            n_tokens = 0
        groups[-1].append(i)
        n_tokens += questions[i].n_tokens
    return groups


@torch.no_grad()
def score_answers(model: nn.Module, rows: Sequence, choices: list | None = None,
                  tokens: int = SCORING_TOKENS,
                  autocast: AbstractContextManager | None = None) -> dict[str, torch.Tensor]:
    """Return a table {column: (n,) fp64} that scores the given answers of n encoded examples.

    Its columns are "examples" (all ones), "tokens" (how many targets the example has), "nats"
    (their negative log-likelihood) and "hits" (how many of them are the model's first choice).
    rows: (tokens, labels); all targets count, whether they are one answer or several.
    choices: answers (lists of ids) to compare for each example, which must have one answer and that
    among them.  They add the column "confusion" (n, C, C), with a one at [its answer, likeliest].
    tokens: at most so many per forward.  How the examples are grouped affects the speed alone.
    """
    n = len(rows)
    questions = questions_of(rows, choices)
    table = {name: torch.zeros(n, dtype=torch.float64)
             for name in ("examples", "tokens", "nats", "hits")}
    expected = [0] * n                               # the place of each example's own answer
    if choices:
        table["confusion"] = torch.zeros(n, len(choices), len(choices), dtype=torch.float64)
        expected = [choices.index(as_question(row).answers[0]) for row in rows]
    for group in group_questions(questions, tokens):
        with autocast or nullcontext():
            scores = iter(log_likelihoods(model, [questions[i] for i in group]))
        for i in group:
            answer_scores = [next(scores) for _ in questions[i].answers]
            right = expected[i]
            table["examples"][i] = 1
            table["tokens"][i] = count_targets(questions[i].targets[right])
            table["nats"][i] = -answer_scores[right].log_p
            table["hits"][i] = answer_scores[right].hits
            if choices:
                log_p = [score.log_p for score in answer_scores]
                table["confusion"][i, right, log_p.index(max(log_p))] = 1
    return table


def evaluate(model: nn.Module, dataset: SupervisedDataset, tokens: int,
             autocast: AbstractContextManager, rank: int = 0,
             world_size: int = 1) -> dict[str, float]:
    """Return {"val_loss": nats per answer token} and, if the answers are classes, two more.

    These are "val_accuracy" and "val_mcc".  Each rank scores its share of the dataset, and all get
    the same values, from the sums over all examples.  tokens: at most so many per forward.
    model: without the DDP wrapper, whose forward may wait for the other ranks.  It is in training
    mode afterwards.
    """
    model.eval()
    choices = class_answers(dataset, model.args.max_seq_len)
    shares = [dataset.rows[i::world_size] for i in range(world_size)]
    table = score_answers(model, shares[rank], choices, tokens, autocast)
    n_forwards = [len(group_questions(questions_of(share, choices), tokens)) for share in shares]
    # With --shard every forward needs all ranks, so each runs as many.
    for _ in range(max(n_forwards) - n_forwards[rank]):
        score_answers(model, dataset.rows[:1], choices, tokens, autocast)     # not used
    model.train()
    values = measures({name: sum_over_ranks(column.sum(0)) for name, column in table.items()})
    names = [name for name in ("loss", "accuracy", "mcc") if name in values]
    return {f"val_{name}": values[name].item() for name in names}
