"""How well a model answers examples that it was not trained on, and whether an adapter does better than its base.

Given answers are scored by their likelihood, exact and batched; answers of the model's own are written greedily.  All
that is found is first a table of columns with a row an example, and every measure a function of the columns' sums: over
all ranks, or over examples drawn again and again, which is what says how much of a difference is chance.
"""
import itertools
import math
from contextlib import nullcontext
from os.path import commonprefix

import torch

from llama.guesses import NgramPool
from llama.layout import MIN_SHARED, Layout
from llama.sampling import generate, tokens_left

from .batches import split
from .dataset import IGNORE, encode_example
from .loss import CHUNK
from .ranks import sum_over_ranks

MOST = 20                                            # answers, if there are no more, are classes
TOKENS = 2048                                        # a forward
BATCH = 8                                            # prompts that are answered at a time
RESAMPLES = 2000


def small_set(answers):
    """The distinct ones of `answers`, sorted, if they are classes: 2 to 20, and two examples to each on average; else None."""
    distinct = sorted(set(answers))
    return distinct if 2 <= len(distinct) <= min(MOST, len(answers) / 2) else None


def class_answers(dataset, max_seq_len):
    """The small set of answers (lists of ids) that a SupervisedDataset's are from; None if they are not, or not whole
    and with room for every other one in their place."""
    prompts, own = zip(*(parts(row) for row in dataset.rows))
    choices = small_set([tuple(answer) for answer in own])
    if choices and not dataset.cut and max(map(len, prompts)) + max(map(len, choices)) <= max_seq_len:
        return [list(answer) for answer in choices]
    return None


def parts(row):
    """(prompt, answer) of an encoded example (tokens, labels)."""
    tokens, labels = row
    begin = sum(label == IGNORE for label in labels)
    return tokens[:begin], tokens[begin:]


def lay(asked):
    """[(prompt, answers)], all lists of ids -> (tokens (1, N), Layout, places (M,), targets (M,)).

    What all prompts begin with stands once, the rest of each once, and behind it the answers, each of which continues
    that prompt alone.  targets are the answers' tokens, one answer behind another; places[m] is where targets[m] is
    predicted: an answer's first token by the prompt's last.  Its own last, eos, predicts nothing and is not read.
    """
    shared = commonprefix([prompt[:-1] for prompt, _ in asked]) if len(asked) > 1 else []
    shared = shared if len(shared) >= MIN_SHARED else []
    segments, above = ([(len(shared), ())], (0,)) if shared else ([], ())
    tokens, places, targets = [*shared], [], []
    for prompt, answers in asked:
        tokens += prompt[len(shared):]
        segments.append((len(prompt) - len(shared), above))
        last, context = len(tokens) - 1, (*above, len(segments) - 1)
        for answer in answers:
            places += [last, *range(len(tokens), len(tokens) + len(answer) - 1)]
            targets += answer
            if len(answer) > 1:
                tokens += answer[:-1]
                segments.append((len(answer) - 1, context))
    return torch.tensor([tokens]), Layout(segments), torch.tensor(places), torch.tensor(targets)


def log_likelihoods(model, asked):
    """[(prompt, answers)] -> for each answer, in order, (log p in nats of all its tokens, eos with them; how many of
    them are the model's first choice where they stand).  One forward; fp32 log-sum-exp, fp64 sums."""
    device = next(model.parameters()).device
    tokens, layout, places, targets = lay(asked)
    rows, where = places.unique(return_inverse=True)                       # what answers share is predicted once
    logits = model(tokens.to(device), rows=rows.to(device), layout=layout.to(device))              # (R, V)
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = torch.cat([chunk.to(wide).logsumexp(-1) for chunk in logits.split(CHUNK)])             # 16 bit would be wrong
    where, targets = where.to(device), targets.to(device)
    log_p = logits[where, targets].to(wide) - total[where]
    first = logits.argmax(-1)[where] == targets
    lengths = [len(answer) for _, answers in asked for answer in answers]
    return [(p.sum().item(), n.sum().item()) for p, n in zip(log_p.cpu().double().split(lengths), first.cpu().split(lengths))]


def grouped(asked, tokens):
    """Indices into `asked`, in groups of up to so many tokens, or one alone; what begins alike comes together."""
    groups, held = [], math.inf
    for i in sorted(range(len(asked)), key=lambda i: asked[i][0]):
        length = len(asked[i][0]) + sum(map(len, asked[i][1]))
        if held + length > tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += length
    return groups


@torch.no_grad()
def forced(model, rows, choices=None, tokens=TOKENS, autocast=nullcontext()):
    """Encoded examples -> columns {name: (n,)} fp64 about their own answers, read as they are
    (teacher forcing): "examples" (ones), "tokens" of the answer,
    "nats" that they cost, and "hits", how many are the model's first choice.

    choices: the answers (lists of ids) to compare for each; each example's own must be among them.  Then there is
    "confusion" (n, C, C) too, with a one at [own, likeliest].  What a group of examples is makes no difference.
    """
    examples = [parts(row) for row in rows]
    asked = [(prompt, choices or [own]) for prompt, own in examples]
    columns = {name: torch.zeros(len(rows), dtype=torch.float64) for name in ("examples", "tokens", "nats", "hits")}
    if choices:
        columns["confusion"] = torch.zeros(len(rows), len(choices), len(choices), dtype=torch.float64)
    for group in grouped(asked, tokens):
        with autocast:
            found = iter(log_likelihoods(model, [asked[i] for i in group]))
        for i in group:
            answers, own = asked[i][1], examples[i][1]
            scores = list(itertools.islice(found, len(answers)))
            right = answers.index(own)
            for name, value in zip(columns, (1, len(own), -scores[right][0], scores[right][1])):
                columns[name][i] = value
            if choices:
                columns["confusion"][i, right, max(range(len(choices)), key=lambda k: scores[k][0])] = 1
    return columns


def measures(sums):
    """{measure: value} from columns summed over examples; axes before the columns' own (resamples) are kept.

    Of the (C, C) counts [own, said]: accuracy; the mean over classes of F1 = 2 TP / (2 TP + FP + FN), those that are
    neither there nor said left out; and Matthews correlation for any number of classes (R_K, Gorodkin 2004),
    the usual one for two and 0 where only one class is there or said.
    """
    loss = sums["nats"] / sums["tokens"]
    found = {"loss": loss, "perplexity": loss.exp(), "token_accuracy": sums["hits"] / sums["tokens"]}
    found |= {name: sums[name] / sums["examples"] for name in ("exact_match", "ended") if name in sums}
    if "confusion" in sums:
        right = sums["confusion"].diagonal(dim1=-2, dim2=-1)
        own, said, n, hits = sums["confusion"].sum(-1), sums["confusion"].sum(-2), sums["examples"], right.sum(-1)
        together = n * hits - (own * said).sum(-1)
        apart = (n ** 2 - (own ** 2).sum(-1)) * (n ** 2 - (said ** 2).sum(-1))
        found |= {"accuracy": hits / n, "macro_f1": (2 * right / (own + said)).nanmean(-1),
                  "mcc": torch.where(apart > 0, together / apart.sqrt(), 0.0)}
    return found


def evaluate(model, dataset, tokens, autocast, rank=0, world_size=1):
    """{"val_loss": nats per answer token} over the dataset, of which each rank takes its share, and, where its answers are
    classes, "val_accuracy" and "val_mcc": sums over all by counts of all, whatever was computed with what.

    `model` is the bare one, not DDP's: the ranks may have different numbers of batches, and none waits for another.
    """
    model.eval()
    choices = class_answers(dataset, model.args.max_seq_len)
    columns = forced(model, dataset.rows[rank::world_size], choices, tokens, autocast)
    model.train()
    found = measures({name: sum_over_ranks(column.sum(0)) for name, column in columns.items()})
    return {f"val_{name}": found[name].item() for name in ("loss", "accuracy", "mcc") if name in found}


class Exam:
    """Examples to score models on that are alike but for their weights.

    choices: texts to compare, by default the examples' own answers where these are a small set.  limit: tokens that a
    greedy answer may take, and at most twice the longest of the examples'.
    Raises ValueError for an answer that is not among the choices, or an example that is too long for max_seq_len.
    """

    def __init__(self, examples, tokenizer, max_seq_len, choices=None, limit=128, name="the data"):
        own = [example["output"] for example in examples]
        self.examples, self.tokenizer, self.choices = examples, tokenizer, choices or small_set(own)
        for n, answer in enumerate(own, 1):
            if choices and answer not in choices:
                raise ValueError(f"{name}, example {n}: its output {answer!r} is none of the choices {', '.join(map(repr, choices))}")
        self.ids = [tokenizer.encode(choice, eos=True) for choice in self.choices or ()]
        self.rows = [encode_example(example, tokenizer, None) for example in examples]
        for n, (prompt, answer) in enumerate(map(parts, self.rows), 1):
            if (longest := len(prompt) + max(map(len, (answer, *self.ids)))) > max_seq_len:
                raise ValueError(f"{name}, example {n}: prompt and answer have {longest} tokens and the model takes {max_seq_len}")
        self.limit = min(limit, 2 * max(len(parts(row)[1]) for row in self.rows))

    def about(self):
        """What is known of the examples without a model."""
        own = [example["output"] for example in self.examples]
        known = {"examples": len(own), "answer_tokens": sum(len(parts(row)[1]) for row in self.rows), "limit": self.limit,
                 "choices": self.choices}
        if self.choices:
            most = max(self.choices, key=own.count)
            known["majority"] = {"answer": most, "accuracy": own.count(most) / len(own)}
        return known

    def take(self, model, said=lambda n: None):
        """Columns of `forced`, and of the model's own answers "exact_match", to the letter but for space at the ends,
        and ended, and "ended", by eos before the limit.  said(n) hears how many are done.  Raises ValueError where weights
        have gone wrong."""
        columns = forced(model, self.rows, self.ids)
        if columns["nats"].isnan().any():
            raise ValueError("the model's logits are not numbers: are its weights, or the adapter's?")
        exact, ended, pool = [], [], NgramPool()
        for some in split(range(len(self.rows)), BATCH):
            prompts, ids = [parts(self.rows[i])[0] for i in some], [[] for _ in some]
            for k, token in generate(model, prompts, self.limit, self.tokenizer.eos_id, pool=pool):
                ids[k].append(token)
            ended += [len(answer) < left for answer, left in zip(ids, tokens_left(model, prompts, self.limit))]
            exact += [self.tokenizer.decode(answer).strip() == self.examples[i]["output"].strip() for answer, i in zip(ids, some)]
            said(len(ended))
        ended = torch.tensor(ended, dtype=torch.float64)
        return columns | {"exact_match": torch.tensor(exact, dtype=torch.float64) * ended, "ended": ended}


def intervals(tables, seed=0, resamples=RESAMPLES):
    """{name: columns} -> {name: {measure: [value, low, high]}}, and with a "base" and an "adapter" a "difference".

    low and high hold the middle 95 % of what the measure is when as many examples are drawn from these, with replacement
    (the percentile bootstrap, Efron & Tibshirani 1993, chapter 13).  The tables, and so the difference, see the same
    draws: an example that is hard for both adds nothing to it.
    """
    def measured(times):
        """times (R, n): how often each example counts."""
        found = {name: measures({column: torch.tensordot(times, values, 1) for column, values in columns.items()})
                 for name, columns in tables.items()}
        if found.keys() >= {"base", "adapter"}:
            found["difference"] = {measure: value - found["base"][measure] for measure, value in found["adapter"].items()}
        return found
    n, generator = len(next(iter(tables.values()))["examples"]), torch.Generator().manual_seed(seed)
    whole, drawn = measured(torch.ones(1, n, dtype=torch.float64)), []
    for some in split(range(resamples), 100):
        picked = torch.randint(n, (len(some), n), generator=generator)
        times = torch.zeros(len(some), n, dtype=torch.float64)
        drawn.append(measured(times.scatter_add_(1, picked, torch.ones_like(times))))
    def line(name, measure):
        draws = torch.cat([some[name][measure] for some in drawn])
        ends = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        entry = whole[name][measure].item(), *ends.tolist()
        return [value if math.isfinite(value) else None for value in entry]              # JSON has no NaN
    return {name: {measure: line(name, measure) for measure in found} for name, found in whole.items()}
