"""Logits to text: the likeliest token, a drawn one, or a search with beams.

Without a KV cache each forward computes the whole row again: simple, and right.  The rows of a
batch are packed, and a beginning that several of them share is computed once.
"""
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn

from .guesses import Guesses, NgramPool
from .layout import Layout, arrange
from .tokenizer import Tokenizer


def generate(model: nn.Module, prompts: list[list[int]], max_new_tokens: int,
             eos_id: int | Collection[int], *, temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, no_repeat_ngram: int = 0, seed: int = 0,
             pool: NgramPool | None = None) -> Iterator[tuple[int, int]]:
    """Return an iterator over (i, id): the next token of the answer to prompts[i], a list of ids.

    An answer ends before eos (one id or several), which is not given, after max_new_tokens, at
    max_seq_len, or where no_repeat_ngram leaves no token.
    Temperature 0 takes the likeliest token.  Above 0 one is drawn from `filtered`, for each prompt
    by a generator of its own from the same seed.  With no_repeat_ngram n above 0 no answer repeats
    n tokens in a row.
    A prompt gets the same text alone, in any batch and with any pool.  In 16 bits rounding may
    change it.
    pool: what earlier calls with this model learnt, which makes greedy text faster (guesses.py).
    Raises ValueError, at once, for a prompt that leaves no space for an answer.
    """
    limits = tokens_left(model, prompts, max_new_tokens)
    ends_of_text = end_ids(eos_id)

    def logits_after(rows):
        """Return {i: logits (V,)} of what follows each of the rows {i: ids}."""
        logits_of_rows = next_logits(model, list(rows.values()))
        return {i: logits[0] for i, logits in zip(rows, logits_of_rows, strict=True)}

    if temperature == 0:
        # The same logits in fewer forwards; rows that it does not answer wait for the next turn.
        final_lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        guesses = Guesses(partial(next_logits, model), final_lengths, model.args.max_seq_len, pool)
        logits_after = guesses.logits_after

    @torch.inference_mode()
    def answer_tokens():
        answers = [[] for _ in prompts]
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        unfinished = [i for i, limit in enumerate(limits) if limit > 0]
        while unfinished:
            rows = {i: prompts[i] + answers[i] for i in unfinished}
            for i, logits in logits_after(rows).items():
                banned = repeats(answers[i], no_repeat_ngram)
                is_over = len(set(banned)) == len(logits)    # Every token would repeat something.
                if not is_over:
                    ban(logits, banned)
                    token = choose(logits, temperature, top_k, top_p, generators[i])
                    is_over = token in ends_of_text
                if not is_over:
                    answers[i].append(token)
                    yield i, token
                if is_over or len(answers[i]) == limits[i]:
                    unfinished.remove(i)

    return answer_tokens()


def end_ids(eos_id: int | Collection[int]) -> Collection[int]:
    """Return the ids that end a text: an id alone as a tuple of one."""
    return (eos_id,) if isinstance(eos_id, int) else eos_id


def tokens_left(model: nn.Module, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """Return how many tokens may follow each prompt.

    Raises ValueError for a prompt that leaves no space for an answer.
    """
    limit = model.args.max_seq_len
    longest = max(map(len, prompts), default=0)
    if longest >= limit:
        raise ValueError(f"the prompt has {longest} tokens and the model takes {limit}")
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def next_logits(model: nn.Module, rows: list[list[int]], trees=None) -> list[torch.Tensor]:
    """Return the logits of what follows each row: fp32, on the model's device, (1 + g, V) per row.

    rows: lists of ids, of any lengths.  trees: for each row g tokens that may follow it, as a
    guesses.Tree, or None.  The first logits are those after the row, the others those after each
    token of its tree.
    All rows stand in one packed row, each with its tree after it, and a common beginning is stored
    once.  A token of a tree sees its row and the tokens that it follows, so each row
    gets the logits that it would get alone.
    Raises ValueError if a logit is nan or +inf, for example because weights are damaged.
    """
    trees = trees or [None] * len(rows)
    guessed = [tree.tokens if tree else [] for tree in trees]
    examples = [row + tokens for row, tokens in zip(rows, guessed, strict=True)]
    pieces, ends = arrange(examples, [len(row) - 1 for row in rows])
    packed_tokens = []
    for piece in pieces:
        packed_tokens += examples[piece.example][piece.start:piece.stop]
    segments = [(piece.stop - piece.start, piece.context) for piece in pieces]
    stops = list(accumulate(length for length, _ in segments))
    tree_masks = {}
    places = []                              # in the packed row: each row's last token and its tree
    counts = [1 + len(tokens) for tokens in guessed]
    for tree, end, count in zip(trees, ends, counts, strict=True):
        places += range(stops[end] - count, stops[end])
        if tree:
            length, _ = segments[end]
            tree_masks[end] = tree.mask(length - len(tree))
    device = next(model.parameters()).device
    tokens = torch.tensor([packed_tokens], device=device)
    places = torch.tensor(places, device=device)
    layout = Layout(segments, tree_masks).to(device)
    logits = model(tokens, rows=places, layout=layout).float()
    if not logits.max() < torch.inf:                 # The maximum is nan if one of them is.
        raise ValueError("the model's logits are not finite: are its weights, or the adapter's, "
                         "damaged?")
    return logits.split(counts)


def choose(logits: torch.Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> int:
    """Return the token with the largest logit or, above temperature 0, one that is drawn."""
    if temperature == 0:
        return logits.argmax().item()
    probabilities = filtered(logits, temperature, top_k, top_p)
    # Drawn on the CPU, so that a seed gives the same numbers on every device.
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).item()


def filtered(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0) -> torch.Tensor:
    """Return softmax(logits / temperature) of the tokens that the filters keep, logits (V,).

    top_k keeps the k likeliest tokens (0: all).  top_p then keeps the fewest likeliest ones whose
    probabilities together reach p, and always one (nucleus sampling, Holtzman et al. 2020).
    """
    logits = (logits - logits.max()) / temperature   # The largest is 0, so exp cannot overflow.
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0.0
        probabilities /= probabilities.sum()
    likelier = probabilities.cumsum(-1) - probabilities      # what the likelier tokens add up to
    likelier[0] = -1.0                               # so that the likeliest is always kept
    kept = torch.where(likelier < top_p, probabilities, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum())


def ban(logits: torch.Tensor, tokens: list[int]):
    """Set the logits (V,) of these tokens to -inf."""
    if tokens:                                       # An empty index would be copied to a GPU too.
        logits[tokens] = -torch.inf


def repeats(answer: list[int], n: int) -> list[int]:
    """Return the tokens that would end an n-gram which the answer has already; n 0: none."""
    if n == 0 or len(answer) < n - 1:
        return []
    begin = answer[len(answer) - n + 1:]             # the n - 1 tokens that the next one follows
    tokens = []
    for i in range(len(answer) - n + 1):
        if answer[i:i + n - 1] == begin:
            tokens.append(answer[i + n - 1])
    return tokens


@torch.inference_mode()
def beam_search(model: nn.Module, prompt: list[int], max_new_tokens: int,
                eos_id: int | Collection[int], beams: int, no_repeat_ngram: int = 0) -> list[int]:
    """Return the best answer found: the one with the highest mean log p of its tokens.

    eos counts as a token where it ends the answer, and is not returned.  `beams` unfinished answers
    are kept, those with the highest log p, and a step extends each by every token.  The search ends
    when as many are finished and no unfinished one has a better mean so far than the best of them.
    Raises ValueError for a prompt that leaves no space for an answer.
    """
    limit = tokens_left(model, [prompt], max_new_tokens)[0]
    if not limit:
        return []
    ends_of_text = end_ids(eos_id)
    unfinished = [(0.0, [])]                         # (log p, answer), the highest log p first
    finished = []                                    # (mean log p, answer)
    while unfinished:
        logits = torch.cat(next_logits(model, [prompt + answer for _, answer in unfinished]))
        for row, (_, answer) in zip(logits, unfinished, strict=True):
            ban(row, repeats(answer, no_repeat_ngram))
        log_p = logits.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        scores = log_p + torch.tensor([[score] for score, _ in unfinished], device=log_p.device)
        # Each beam may end, once per end id, and as many as there are beams must still go on.
        n_best = beams * (1 + len(ends_of_text))
        best, places = scores.flatten().topk(min(n_best, scores.numel()))
        extended = []
        for score, place in zip(best.tolist(), places.tolist(), strict=True):
            if score == -torch.inf:
                break                                # Every other token is banned.
            beam, token = divmod(place, logits.shape[1])
            _, answer = unfinished[beam]
            if token in ends_of_text:
                finished.append((score / (len(answer) + 1), answer))
            else:
                extended.append((score, [*answer, token]))
        if not extended and not finished:
            return unfinished[0][1]
        unfinished = extended[:beams]
        if not unfinished:
            break
        means = [(score / len(answer), answer) for score, answer in unfinished]
        if len(unfinished[0][1]) == limit:
            finished += means
            break
        if len(finished) >= beams and highest(finished)[0] >= highest(means)[0]:
            break
    return highest(finished)[1]


def highest(scored):
    """Return the first (score, answer) with the highest score."""
    return max(scored, key=lambda pair: pair[0])


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids as they come; joined it is tokenizer.decode of all of them.

    Each time all ids so far are decoded, and the new text is given out: decoded alone, a piece
    loses its leading space.  A character of several byte pieces decodes to U+FFFD until it is
    complete, so a tail of those waits.
    """
    ids_so_far = []
    n_given = 0
    for token in ids:
        ids_so_far.append(token)
        text = tokenizer.decode(ids_so_far)
        complete = text.rstrip("\ufffd")
        if len(complete) > n_given:
            yield complete[n_given:]
            n_given = len(complete)
    text = tokenizer.decode(ids_so_far)
    if len(text) > n_given:
        yield text[n_given:]
