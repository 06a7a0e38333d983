"""Logits to text.  Without a KV cache each forward computes the whole row again: simple, and right.  To check guesses of
what comes next costs little more then, so a forward gives several tokens; a batch computes what its rows share once.
"""
from itertools import accumulate

import torch

from .layout import Layout, arrange

BLOCK = 16                                           # tokens: a forward of one row is filled up to a multiple with guesses
GUESSES, FEWER = 24, 12                              # tokens: for a row alone, at least; for each of several, where they cost more
NGRAM, LINE = 4, 4                                   # the longest match looked for; tokens guessed from one of 1, twice as many from 2
KNOWN, RIVALS, FURTHER = 3, 8, 2                     # what is remembered of each place; and how far a line goes
POOL = 2 ** 17                                       # places remembered from answer to answer, some 40 MB; then it begins anew


def next_logits(model, rows, trees=None):
    """rows: lists of ids, of any lengths -> list of fp32 logits on the CPU, (1 + g, V) for each row: of what follows it,
    and of what follows each of the g tokens of its tree, as `guess` makes one.

    The rows stand one behind another, each with its tree, with what several begin with only once; a token of a tree sees
    its row and those it follows, so each gets what it would get alone.
    Raises ValueError where weights have gone wrong and a logit is no finite number.
    """
    trees = trees or [{}] * len(rows)
    whole = [[*row, *(token for _, token in tree)] for row, tree in zip(rows, trees)]
    pieces, ends = arrange(whole, [len(row) - 1 for row in rows])
    tokens = torch.tensor([[token for piece in pieces for token in whole[piece.example][piece.start:piece.stop]]])
    segments = [(piece.stop - piece.start, piece.context) for piece in pieces]
    stops, seen, places = list(accumulate(length for length, _ in segments)), {}, []
    for tree, end in zip(trees, ends):
        places.append(range(stops[end] - len(tree) - 1, stops[end]))         # the row's last token and the tree's
        if tree:
            length, _ = segments[end]
            seen[end] = torch.ones(length, length, dtype=torch.bool).tril()
            for i, (parent, _) in enumerate(tree, length - len(tree)):
                seen[end][i] = seen[end][length - len(tree) + parent]
                seen[end][i, i] = True
    device = next(model.parameters()).device
    logits = model(tokens.to(device), rows=torch.tensor([place for some in places for place in some], device=device),
                   layout=Layout(segments, seen).to(device)).float().cpu()
    if not logits.max() < torch.inf:                                 # nan is neither
        raise ValueError("the model's logits are no finite numbers: are its weights, or the adapter's?")
    return logits.split([len(some) for some in places])


def lookup(row):
    """What followed when the last few tokens of `row` were there before (prompt lookup, Saxena 2023), twice as much of it
    for each more that matches; [] where none does."""
    for n in range(min(NGRAM, len(row) - 1), 0, -1):
        for i in range(len(row) - n - 1, -1, -1):                    # the last time first
            if row[i:i + n] == row[-n:]:
                said = row[:]
                while len(said) < len(row) + LINE * 2 ** (n - 1):
                    said.append(said[i + n - len(row)])              # past the end of the row it copies what it has said
                return said[len(row):]
    return []


def guess(row, most, pool, rivals):
    """A tree of up to `most` tokens that may follow `row`: {(parent, token): number}, parents first, -1 being the row's end.

    pool: {(token,) or (one before, token): the likeliest after these where the model read them last}, in this text or another,
    right or wrong a guess as they were (Fu et al. 2024).  rivals: tokens that might have stood where the row's last one does;
    what was said after them fits here often, and they themselves may be still to come.
    """
    def after(*line):
        return pool.get(line[-2:]) or pool.get(line[-1:], [])

    likely, lines, tree = [after(*row[-2:-1], rival) for rival in rivals], [lookup(row)], {}
    for token in [*after(*row[-2:]), *(token for rank in zip(*filter(None, likely)) for token in rank), *rivals]:
        line = [row[-1], token]
        while len(line) < 2 + FURTHER and after(*line):
            line.append(after(*line)[0])
        lines.append(line[1:])
    for line in lines:
        parent = -1
        for token in line:
            if (parent, token) not in tree:
                if len(tree) >= most:
                    return tree
                tree[parent, token] = len(tree)
            parent = tree[parent, token]
    return tree


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities (V,) from logits (V,): softmax(logits / temperature) over what the filters leave.

    top_k keeps the k likeliest tokens (0: all); top_p then the fewest likeliest whose probabilities reach p
    together (nucleus sampling, Holtzman et al. 2020), never none.
    """
    logits = (logits - logits.max()) / temperature                   # the largest is 0: no overflow
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0.0
        probabilities /= probabilities.sum()
    before = probabilities.cumsum(-1) - probabilities                # what is likelier than each, together
    before[0] = -1.0
    kept = torch.where(before < top_p, probabilities, 0.0)
    return torch.zeros_like(kept).scatter(-1, order, kept / kept.sum())


def repeats(ids, n):
    """The tokens that would end an n-gram which `ids` (the answer so far) holds already."""
    if n == 0 or len(ids) < n - 1:
        return []
    start = ids[len(ids) - n + 1:]
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == start]


def room(model, prompts, max_new_tokens):
    """How many tokens may follow each prompt.  Raises ValueError for a prompt that leaves no room."""
    limit = model.args.max_seq_len
    if longest := max((len(prompt) for prompt in prompts if len(prompt) >= limit), default=0):
        raise ValueError(f"the prompt has {longest} tokens and the model takes {limit}")
    return [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]


def generate(model, prompts, max_new_tokens, eos_id, temperature=0.0, top_k=0, top_p=1.0, no_repeat_ngram=0, seed=0,
             pool=None):
    """Iterate over (i, id): what comes next for prompts[i] (lists of ids), a round at a time, until eos (not given).

    temperature 0 takes the likeliest token; a round gives those that were guessed right and the one after them, the
    text being what a token a round would give.  Above 0 one is drawn from `filtered` with a generator for each prompt,
    seeded alike.  Either way a prompt gets the same text alone, in any batch and with any pool, but for what 16 bits round
    otherwise at another length.  no_repeat_ngram n never lets the answer repeat n tokens in a row.  Ends at max_seq_len as well.
    pool: a dict, empty at first, that calls with one model share: what it said in earlier answers makes guesses better.
    Raises ValueError, at once, when a prompt leaves no room for an answer.
    """
    left, pool = room(model, prompts, max_new_tokens), {} if pool is None else pool

    @torch.inference_mode()
    def choose(logits, answer, generator):
        logits[repeats(answer, no_repeat_ngram)] = -torch.inf
        if logits.isneginf().all():
            return eos_id                                            # nothing may follow
        if temperature == 0:
            return logits.argmax().item()
        return torch.multinomial(filtered(logits, temperature, top_k, top_p), 1, generator=generator).item()

    def places_for(row, wanted, alone):
        """Guesses for what follows it: none where the next token is drawn, or the last."""
        if temperature > 0 or wanted == 1:
            return 0
        stop = -(-(len(row) + GUESSES) // BLOCK) * BLOCK if alone else len(row) + FEWER
        return min(stop, model.args.max_seq_len) - len(row)

    def likeliest(logits, n):
        return logits.topk(min(n, logits.shape[-1])).indices.tolist()

    def rounds():
        answers, rivals = [[] for _ in prompts], [[] for _ in prompts]
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        going = range(len(prompts))
        if len(pool) > POOL:
            pool.clear()
        while going:
            rows = [prompts[i] + answers[i] for i in going]
            trees = [guess(row, places_for(row, left[i] - len(answers[i]), len(rows) == 1), pool, rivals[i])
                     for i, row in zip(going, rows)]
            with torch.inference_mode():
                found = next_logits(model, rows, trees)
            still = []
            for i, row, tree, logits in zip(going, rows, trees, found):
                read = [row[-1], *(token for _, token in tree)]
                pairs = [tuple(row[-2:]), *((read[1 + parent], token) for parent, token in tree)]
                for pair, best in zip(pairs, likeliest(logits, KNOWN) if temperature == 0 else ()):
                    pool[pair] = pool[pair[-1:]] = best
                node = -1                                            # where in the tree the text stands
                while len(answers[i]) < left[i]:
                    token = choose(logits[1 + node], answers[i], generators[i])
                    if token == eos_id:
                        break
                    answers[i].append(token)
                    yield i, token
                    if (node, token) not in tree:
                        wrong = [other for parent, other in tree if parent == node]
                        rivals[i] = [*wrong, *likeliest(logits[1 + node], 1 + RIVALS)[1:]]
                        still += [i] * (len(answers[i]) < left[i])
                        break
                    node = tree[node, token]
            going = still
    return rounds()


@torch.inference_mode()
def beam_search(model, prompt, max_new_tokens, eos_id, beams, no_repeat_ngram=0):
    """The best answer found (list of ids, no eos): highest mean log p of its tokens, eos counted where it ends it.

    `beams` unfinished answers are kept, those with the highest log p; a step extends each by every token.  It ends
    when as many are finished and none unfinished has a better mean so far than the best of them.
    """
    left, = room(model, [prompt], max_new_tokens)
    alive, done = [(0.0, [])], []
    while alive:
        logits = torch.cat(next_logits(model, [prompt + answer for _, answer in alive]))
        for row, (_, answer) in zip(logits, alive):
            row[repeats(answer, no_repeat_ngram)] = -torch.inf
        scores = logits.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf) + torch.tensor([[score] for score, _ in alive])
        best, flat = scores.flatten().topk(min(2 * beams, scores.numel()))       # twice: half may be eos
        extended = []
        for score, index in zip(best.tolist(), flat.tolist()):
            if score == -torch.inf:
                break                                                # nothing may follow
            answer, token = alive[index // logits.shape[1]][1], index % logits.shape[1]
            if token == eos_id:
                done.append((score / (len(answer) + 1), answer))
            else:
                extended.append((score, [*answer, token]))
        if not extended and not done:
            return alive[0][1]
        alive = extended[:beams]
        if alive and len(alive[0][1]) == left:
            done += [(score / left, answer) for score, answer in alive]
            break
        if len(done) >= beams and max(done)[0] >= max((score / len(answer) for score, answer in alive), default=0):
            break
    return max(done, key=lambda pair: pair[0])[1]


def stream(tokenizer, ids):
    """Yield text as the ids come: joined, exactly tokenizer.decode(all of them).

    Each time all ids are decoded and what is new is given out: alone, a piece loses its leading space.  A
    character of several byte pieces decodes to U+FFFD until it is whole, so a tail of those waits.
    """
    seen, given = [], ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        whole = text.rstrip("\ufffd")
        if len(whole) > len(given):
            yield whole[len(given):]
            given = whole
    text = tokenizer.decode(seen)
    if len(text) > len(given):
        yield text[len(given):]
