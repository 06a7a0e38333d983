"""How good are a model's answers to examples it was not trained on, and is the gain chance?

The right answers of the data are scored by their likelihood, exactly and in batches; the model's
own answers are generated greedily.  Each result is a table with one row per example.  Every measure
is computed from column sums, so ranks and bootstrap samples use the same code.
"""
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from os.path import commonprefix
from typing import NamedTuple

import torch
import torch.nn as nn

from llama.guesses import NgramPool
from llama.layout import MIN_SHARED, Layout
from llama.sampling import generate, tokens_left
from llama.tokenizer import Tokenizer

from .batches import split
from .dataset import (
    IGNORE,
    SupervisedDataset,
    answer_piece,
    answer_spans,
    count_answer,
    encode_answer,
    encode_example,
)
from .loss import CHUNK
from .ranks import sum_over_ranks
from .templates import DEFAULT, Template
from .templates.conversation import last_answer_text

MAX_CLASSES = 20                                     # More different answers count as text.
SCORING_TOKENS = 2048                                # per forward that scores answers
ANSWERED_AT_ONCE = 8                                 # prompts
RESAMPLES = 2000


class BrokenWeights(ValueError):
    """A model's logits are not numbers."""


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


def measures(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return {measure: value} from the sums of a table's columns.

    Sums may have one more axis in front, which the values keep; it counts bootstrap samples.
    """
    values = {}
    values["loss"] = sums["nats"] / sums["tokens"]
    values["perplexity"] = values["loss"].exp()
    values["token_accuracy"] = sums["hits"] / sums["tokens"]
    for name in ("exact_match", "ended"):
        if name in sums:
            values[name] = sums[name] / sums["examples"]
    if "confusion" in sums:
        values |= class_measures(sums["confusion"], sums["examples"])
    return values


def class_measures(confusion: torch.Tensor, n: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return accuracy, macro F1 and Matthews correlation of confusion counts (..., C, C).

    confusion[..., i, k]: how often the answer is class i and the model chooses k.  n: their sum.
    Macro F1 is the mean over classes of 2 TP / (2 TP + FP + FN), without classes that are neither
    an answer nor chosen.  The correlation is R_K (Gorodkin 2004), which for two classes is the
    usual one.  It is 0 if all answers are one class, or if the model chooses one class only.
    """
    right = confusion.diagonal(dim1=-2, dim2=-1)                               # (..., C)
    expected = confusion.sum(-1)
    chosen = confusion.sum(-2)
    n_right = right.sum(-1)
    covariance = n * n_right - (expected * chosen).sum(-1)
    variances = (n ** 2 - (expected ** 2).sum(-1)) * (n ** 2 - (chosen ** 2).sum(-1))
    return {"accuracy": n_right / n,
            "macro_f1": (2 * right / (expected + chosen)).nanmean(-1),
            "mcc": torch.where(variances > 0, covariance / variances.sqrt(), 0.0)}


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
    """Return the answers; those that the template writes alike have all the first one's text.

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


def intervals(tables: dict[str, dict[str, torch.Tensor]], seed: int = 0,
              resamples: int = RESAMPLES) -> dict[str, dict[str, list]]:
    """Return {name: {measure: [value, low, high]}} of tables by name.

    If there are tables named "base" and "adapter", the result also has their "difference".  Between
    low and high lie the middle 95 % of a measure's values over `resamples` samples.  A sample has
    as many examples as a table, drawn with replacement (the percentile bootstrap, Efron &
    Tibshirani 1993, chapter 13).  All tables use the same samples, so an example that is equally
    hard for both adds nothing to the difference.
    A value that is not a finite number is None.
    """
    any_table = next(iter(tables.values()))
    n = len(any_table["examples"])
    whole = weighted_measures(tables, torch.ones(1, n, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for numbers in split(range(resamples), 100):     # so that the weights need little memory
        drawn = torch.randint(n, (len(numbers), n), generator=generator)
        times_drawn = torch.zeros(len(numbers), n, dtype=torch.float64)
        times_drawn.scatter_add_(1, drawn, torch.ones_like(times_drawn))
        samples.append(weighted_measures(tables, times_drawn))
    result = {}
    for name, values in whole.items():
        result[name] = {}
        for measure, value in values.items():
            draws = torch.cat([sample[name][measure] for sample in samples])
            result[name][measure] = finite_or_none([value.item(), *middle_95_percent(draws)])
    return result


def weighted_measures(tables: dict[str, dict[str, torch.Tensor]],
                      weights: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Return {name: {measure: (R,)}} for weights (R, n): how often each example counts."""
    result = {}
    for name, table in tables.items():
        sums = {column: torch.tensordot(weights, values, 1) for column, values in table.items()}
        result[name] = measures(sums)
    if result.keys() >= {"base", "adapter"}:
        base = result["base"]
        result["difference"] = {measure: value - base[measure]
                                for measure, value in result["adapter"].items()}
    return result


def middle_95_percent(draws: torch.Tensor) -> list[float]:
    """Return [low, high]: 2.5 % of the draws lie below and 2.5 % above."""
    return draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def finite_or_none(values: Iterable[float]) -> list[float | None]:
    """Return the values, with None for one that is not finite: JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in values]
