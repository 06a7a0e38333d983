"""llama/sampling.py: the right tokens, drawn, likeliest or searched, and whole characters."""
import pytest
import torch

from llama.sampling import beam_search, filtered, generate, repeats, stream

from .helpers import tiny


class Scripted(torch.nn.Module):
    """A model whose next token is scripted by the length of the text; `asked` keeps what it read.

    asked: per forward, for each place whose logits are wanted, the ids that the place reads.
    """

    def __init__(self, script, max_seq_len=64):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.args = type("Args", (), {"max_seq_len": max_seq_len})
        self.script = script
        self.asked = []

    def forward(self, tokens, rows, layout):
        read = [ids_read(tokens, layout, place) for place in rows.tolist()]
        self.asked.append(read)
        return torch.stack([self.logits(ids) for ids in read])

    def logits(self, ids):
        return torch.nn.functional.one_hot(torch.tensor(self.script.get(len(ids), 0)), 50).float()


def ids_read(tokens, layout, place):
    """Return the ids that the token at `place` of a packed row (1, N) reads, its own the last."""
    lengths = [length for length, _ in layout.segments]
    parts = tokens[0].split(lengths)
    segment = 0
    while place >= lengths[segment]:
        place -= lengths[segment]
        segment += 1
    _, context = layout.segments[segment]
    ids = []
    for i in context:
        ids += parts[i].tolist()
    if segment in layout.trees:
        seen = layout.trees[segment][place]
        return ids + parts[segment][seen].tolist()
    return ids + parts[segment][:place + 1].tolist()


class Counted(torch.nn.Module):
    """A model that keeps how many tokens and wanted places each of its forwards had."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.args = model.args
        self.tokens = []
        self.places = []

    def forward(self, tokens, rows, layout):
        self.tokens.append(tokens.shape[1])
        self.places.append(len(rows))
        return self.model(tokens, rows=rows, layout=layout)


def one(model, prompt, *args, **settings):
    """Return the answer to one prompt as a list of ids."""
    answer, = several(model, [prompt], *args, **settings)
    return answer


def several(model, prompts, *args, **settings):
    """Return the answers to the prompts as lists of ids."""
    answers = [[] for _ in prompts]
    for i, token in generate(model, prompts, *args, **settings):
        answers[i].append(token)
    return answers


def naive(model, prompt, max_new_tokens, eos_id, no_repeat_ngram=0):
    """Return the greedy answer by its definition: a forward of the whole row alone per token."""
    answer = []
    while len(answer) < min(max_new_tokens, model.args.max_seq_len - len(prompt)):
        logits = model(torch.tensor([prompt + answer]))[0, -1]
        logits[repeats(answer, no_repeat_ngram)] = -torch.inf
        token = logits.argmax().item()
        if token == eos_id or logits.isneginf().all():
            break
        answer.append(token)
    return answer


# --- one token after another


def test_greedy_follows_the_likeliest_token_and_stops_at_eos():
    model = Scripted({3: 7, 4: 8, 5: 2, 6: 9})
    assert one(model, [1, 5, 6], 10, eos_id=2) == [7, 8]
    assert [read[0] for read in model.asked] == [[1, 5, 6], [1, 5, 6, 7], [1, 5, 6, 7, 8]]
    assert one(model, [1, 5, 6], 1, eos_id=2) == [7]
    # Logits at the last position only, and no guess after it.
    assert model.asked[-1] == [[1, 5, 6]]


def test_the_context_ends_it():
    model = Scripted(dict.fromkeys(range(64), 7), max_seq_len=6)
    assert one(model, [1, 5, 6], 10, eos_id=2) == [7, 7, 7]
    with pytest.raises(ValueError, match="the prompt has 6 tokens and the model takes 6"):
        generate(model, [[1, 5], [1] * 6], 10, eos_id=2)


PREAMBLE = [1, *range(300, 309)]
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 3, 20, 30], [1, 8], PREAMBLE, [*PREAMBLE, 5],
           [*PREAMBLE, 5], [*PREAMBLE, *range(310, 320), 4], [*PREAMBLE, *range(310, 320)]]


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 1.5, "seed": 3}, {"no_repeat_ngram": 2}])
def test_several_prompts_in_a_batch_give_what_each_gives_alone(settings):
    """Different lengths and ends; two are alike, some begin alike, one is others' beginning."""
    model = tiny(n_kv_heads=2)
    eos = one(model, PROMPTS[0], 3, -1)[2]                       # a token that comes up early
    answers = several(model, PROMPTS, 10, eos, **settings)
    assert answers == [one(model, prompt, 10, eos, **settings) for prompt in PROMPTS]
    if not settings:
        assert len({len(answer) for answer in answers}) > 1


def test_a_batch_computes_what_its_prompts_share_once_and_no_padding():
    preamble = list(range(200, 240))
    prompts = [[*preamble, 3], [*preamble, 4, 5], [*preamble, *range(250, 290), 6]]
    counted = Counted(tiny())
    several(counted, prompts, 1, -1)
    assert counted.places == [3] and counted.tokens == [40 + 1 + 2 + 41]


# --- how a token is chosen

LOGITS = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()


@pytest.mark.parametrize("settings, expected", [
    ({}, [0.1, 0.2, 0.4, 0.3]),
    # p^(1/T), normed
    ({"temperature": 0.5}, [0.01 / 0.3, 0.04 / 0.3, 0.16 / 0.3, 0.09 / 0.3]),
    ({"top_k": 1}, [0, 0, 1, 0]),
    ({"top_k": 2}, [0, 0, 4 / 7, 3 / 7]),
    # One token is always kept.
    ({"top_p": 0.39}, [0, 0, 1, 0]),
    # 0.4 is short of 0.6, and with 0.3 it is past it.
    ({"top_p": 0.6}, [0, 0, 4 / 7, 3 / 7]),
    ({"top_p": 0.75}, [0, 2 / 9, 4 / 9, 3 / 9]),
    # Of 4/9, 3/9 and 2/9 two reach 0.7.
    ({"top_k": 3, "top_p": 0.7}, [0, 0, 4 / 7, 3 / 7]),
    ({"top_p": 1e-9}, [0, 0, 1, 0]),
    ({"temperature": 1e-40}, [0, 0, 1, 0]),
    ({"temperature": 1e30}, [0.25] * 4),
])
def test_filters_by_hand(settings, expected):
    expected = torch.tensor(expected, dtype=torch.float)
    assert torch.allclose(filtered(LOGITS, **settings), expected, atol=1e-6)


class Steady(Scripted):
    """A model that has the same logits after any text."""

    def logits(self, ids):
        return self.script.clone()


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.75}])
def test_what_is_drawn_follows_the_filtered_probabilities(settings):
    settings = settings | {"temperature": 1.0}
    drawn = [one(Steady(LOGITS), [1], 1, -1, seed=seed, **settings)[0] for seed in range(1000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 1000
    assert torch.allclose(shares, filtered(LOGITS, **settings), atol=0.05)


def test_a_seed_repeats_what_is_drawn():
    texts = [one(tiny(), [1, 5], 8, -1, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_no_ngram_comes_twice():
    assert repeats([1, 2, 3, 1, 2], 3) == [3]
    assert repeats([1, 2, 3, 1, 2], 2) == [3]
    assert repeats([1, 2], 1) == [1, 2]
    assert repeats([1, 2, 1, 3, 1], 2) == [2, 3]
    assert repeats([1, 2, 3], 0) == repeats([], 2) == repeats([1], 3) == []
    model = tiny()
    for n in (1, 2, 3):
        greedy = one(model, [1, 5], 40, -1, no_repeat_ngram=n)
        for answer in (greedy, beam_search(model, [1, 5], 40, -1, 2, n)):
            assert len(answer) == 40
            assert len(distinct_ngrams(answer, n)) == 40 - n + 1
    free = one(model, [1, 5], 40, -1)
    assert len(distinct_ngrams(free, 3)) < 38                    # greedy alone does repeat itself


def distinct_ngrams(answer, n):
    return {tuple(answer[i:i + n]) for i in range(len(answer) - n + 1)}


def test_an_answer_ends_where_every_token_is_banned():
    model = tiny(vocab_size=5)
    for settings in ({}, {"temperature": 1.0}):
        answer = one(model, [1], 20, -1, no_repeat_ngram=1, **settings)
        assert sorted(answer) == [0, 1, 2, 3, 4]
    mute = Steady(torch.tensor([-torch.inf, 0.0, 0.0, 0.0]))     # It never says eos, id 0.
    for beams in (1, 2, 3):
        answer = beam_search(model, [1], 20, -1, beams, no_repeat_ngram=1)
        assert sorted(answer) == [0, 1, 2, 3, 4]
        answer = beam_search(mute, [9], 20, 0, beams, no_repeat_ngram=1)
        assert sorted(answer) == [1, 2, 3]


# --- beams


def exhaustive(model, prompt, length, eos):
    """Return the best answer of up to `length` tokens, each scored alone.

    Its score is the mean log p of its tokens, eos included.
    """
    best = (-float("inf"), None)
    unfinished = [(0.0, [])]
    for n in range(length):
        longer = []
        for score, answer in unfinished:
            log_p = model(torch.tensor([prompt + answer]))[0, -1].log_softmax(-1).tolist()
            best = max(best, ((score + log_p[eos]) / (n + 1), answer))
            for token, p in enumerate(log_p):
                if token != eos:
                    longer.append((score + p, [*answer, token]))
        unfinished = longer
    return max(best, *((score / length, answer) for score, answer in unfinished))[1]


class Table(Scripted):
    """Probabilities by the answer so far: of eos (id 0), a (1) and b (2)."""

    def logits(self, ids):
        return torch.tensor(self.script.get(tuple(ids[1:]), [0.8, 0.1, 0.1])).log()


@pytest.mark.parametrize("beams, script, best", [
    # (log .5 + log .6) / 2 is better than log .5: eos counts.
    (2, {(): [0.5, 0.5, 0.0], (1,): [0.6, 0.2, 0.2]}, [1]),
    # eos takes no beam's place.
    (2, {(): [0.4, 0.35, 0.25], (1,): [0.1, 0.5, 0.4], (2,): [0.99, 0.01, 0.0]}, [2]),
    # An answer that cannot go on is no rival of one that can end.
    (3, {(): [0.0, 0.6, 0.4], (1,): [0.0, 0.0, 0.0], (2,): [0.0, 0.0, 0.0]}, [1]),
    # One is finished, and a better one goes on.
    (1, {(): [0.3, 0.6, 0.1], (1,): [0.9, 0.05, 0.05]}, [1]),
])
def test_beam_search_by_hand(beams, script, best):
    assert beam_search(Table(script), [3], 8, 0, beams) == best


def test_ends_take_no_beams_place_however_many_there_are():
    """After [1], log .4, the three ends are likelier than 2; yet 2 leads to the best answer."""
    script = {(): [0.2, 0.4, 0.12, 0.15, 0.13], (1,): [0.2] * 5,
              (2,): [0.99, 0.0025, 0.0025, 0.0025, 0.0025]}
    assert beam_search(Table(script), [3], 8, (0, 3, 4), 2) == [2]
    assert beam_search(Table(script), [3], 0, 0, 2) == []


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_what_exhaustive_search_finds(seed):
    model = tiny(vocab_size=5, dim=8, n_heads=2, n_layers=1)
    torch.manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    assert beam_search(model, [1, 3], 4, 2, beams=4 ** 4) == exhaustive(model, [1, 3], 4, 2)
    # One beam is greedy.
    assert beam_search(model, [1, 3], 6, -1, beams=1) == one(model, [1, 3], 6, -1)


# --- text as it comes


@pytest.mark.parametrize("text", [
    "blue green", "two  spaces\n\nand lines ", "ünï 🦙🦙 多", "a\ufffdb", ""])
def test_streamed_text_is_the_decoded_whole_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = list(stream(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)    # never half a character
        assert len(pieces) > 1 or len(ids) < 3                   # and not all at the end


def test_half_a_character_at_the_end_is_shown_not_lost(tokenizer):
    ids = tokenizer.encode("a🦙")[:-1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) != "a"
