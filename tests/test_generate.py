"""llama/sampling.py and generate.py: the right tokens, whole characters, base and adapter and merged."""
import io
import json
import re
import shutil

import pytest
import torch

import generate as command
import train
from llama import layout as packed, load_checkpoint, sampling, save_checkpoint
from llama.rnn import RNN, RNNArgs
from llama.sampling import BLOCK, FEWER, GUESSES, LINE, NGRAM, beam_search, filtered, generate, guess, lookup, next_logits, repeats, stream

from .helpers import EXAMPLES, tiny


class Scripted(torch.nn.Module):
    """A model whose next token is scripted by the length of the row; keeps what each place that it was asked about read."""

    def __init__(self, script, max_seq_len=64):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))
        self.args = type("Args", (), dict(max_seq_len=max_seq_len))
        self.script, self.asked = script, []

    def forward(self, tokens, rows, layout):
        segments = tokens[0].split([length for length, _ in layout.segments])
        begins = [sum(length for length, _ in layout.segments[:i]) for i in range(len(segments) + 1)]
        which = [next(i for i in range(len(segments)) if place < begins[i + 1]) for place in rows.tolist()]
        read = [torch.cat([*(segments[j] for j in layout.segments[i][1]), segments[i][layout.trees[i][place - begins[i]]]
                           if i in layout.trees else segments[i][:place + 1 - begins[i]]]).tolist()
                for i, place in zip(which, rows.tolist())]
        self.asked.append(read)
        return torch.stack([self.says(ids) for ids in read])

    def says(self, ids):
        return torch.nn.functional.one_hot(torch.tensor(self.script.get(len(ids), 0)), 50).float()


class Counted(torch.nn.Module):
    """A model as it is, and how many forwards it ran and how many tokens and places each had."""

    def __init__(self, model):
        super().__init__()
        self.model, self.args, self.tokens, self.places = model, model.args, [], []

    def forward(self, tokens, rows, layout):
        self.tokens.append(tokens.shape[1])
        self.places.append(len(rows))
        return self.model(tokens, rows=rows, layout=layout)


def one(model, prompt, *args, **settings):
    """The answer to one prompt as a list of ids."""
    return [token for _, token in generate(model, [prompt], *args, **settings)]


def naive(model, prompt, max_new_tokens, eos_id, no_repeat_ngram=0):
    """Greedy decoding as it is defined: the likeliest by the logits of a whole forward of the row alone, token by token."""
    answer = []
    while len(answer) < min(max_new_tokens, model.args.max_seq_len - len(prompt)):
        logits = model(torch.tensor([prompt + answer]))[0, -1]
        logits[repeats(answer, no_repeat_ngram)] = -torch.inf
        token = logits.argmax().item()
        if token == eos_id or logits.isneginf().all():
            break
        answer.append(token)
    return answer


def test_greedy_follows_the_likeliest_token_and_stops_at_eos():
    model = Scripted({3: 7, 4: 8, 5: 2, 6: 9})
    assert one(model, [1, 5, 6], 10, eos_id=2) == [7, 8]
    assert [read[0] for read in model.asked] == [[1, 5, 6], [1, 5, 6, 7], [1, 5, 6, 7, 8]]
    assert one(model, [1, 5, 6], 1, eos_id=2) == [7]
    assert model.asked[-1] == [[1, 5, 6]]                                    # logits at the last position only, and no guess after it


def test_what_followed_the_last_time_is_looked_up():
    assert lookup([5, 1, 2, 3, 4, 1, 2])[:4] == [3, 4, 1, 2]
    assert lookup([1, 2, 8, 2, 9, 1, 2])[0] == 8                             # the longer match, though the shorter is nearer
    assert lookup([2, 8, 2, 9, 2])[0] == 9                                   # of equals the last
    assert lookup([4, 5, 6, 5, 6])[:5] == [5, 6, 5, 6, 5]                    # it goes on in what it says
    assert lookup([1, 2, 3]) == lookup([1]) == []
    for n in range(1, NGRAM + 1):
        row = [*range(10, 60), 1, *range(10, 10 + n)]                        # its last n tokens were there before
        assert lookup(row) == [*range(10 + n, 60), 1, *range(10, 99)][:LINE * 2 ** (n - 1)]


def lines(tree):
    """What a tree says, from its root to each token, in the order of its numbers."""
    assert list(tree.values()) == list(range(len(tree)))
    read = [[]]
    for parent, token in tree:
        assert parent < len(read) - 1
        read.append([*read[1 + parent], token])
    return read[1:]


def test_a_tree_of_guesses_by_hand():
    said = {(3,): [7, 8, 9], (7,): [4, 5, 6], (4,): [3, 1, 1], (8,): [8, 8, 8], (20,): [30, 31, 32], (21,): [30, 41, 42]}
    assert lines(guess([1, 2, 3], 99, said, [])) == [[7], [7, 4], [7, 4, 3], [8], [8, 8], [8, 8, 8], [9]]    # after 3, as last said
    assert lines(guess([1, 2, 3], 4, said, [])) == [[7], [7, 4], [7, 4, 3], [8]]
    assert lines(guess([1, 2, 3], 99, {**said, (2, 3): [8, 9, 7], (3, 8): [5, 6, 7], (1, 3): [9, 9, 9], (8, 5): [7, 7, 7]}, [])) == [
        [8], [8, 5], [8, 5, 7], [9], [7], [7, 4], [7, 4, 3]]                                                 # two say more than one
    # What rivals were followed by, the likeliest of each first; then the rivals, of which one was never read.
    assert lines(guess([1, 2, 5], 99, said, [20, 22, 21])) == [
        [30], [31], [41], [32], [42], [20], [20, 30], [22], [21], [21, 30]]
    assert lines(guess([1, 2, 5], 3, {**said, (2, 21): [50, 51, 52]}, [20, 22, 21])) == [[30], [50], [31]]
    assert lines(guess([3, 5, 3], 99, said, []))[:LINE + 3] == [
        *([5, 3, 5, 3][:n] for n in range(1, LINE + 1)), [7], [7, 4], [7, 4, 3]]                 # looked up before
    assert lines(guess([3, 7, 3], 99, said, []))[LINE:LINE + 2] == [[7, 4], [7, 4, 3]]                       # lines that begin alike
    assert guess([7, 7], 0, said, [7]) == guess([1, 2], 9, {}, []) == guess([1], 9, {}, []) == {}


@pytest.mark.parametrize("short", [0, 256])
def test_each_token_of_a_tree_sees_its_row_and_its_own_line_alone(monkeypatch, short):
    """Against the row and the line as a row of their own, for the Transformer in both kernels, and for the LSTM."""
    monkeypatch.setattr(packed, "SHORT", short)
    torch.manual_seed(0)
    rows = [[1, 5, 9, 20], [7], [1, *range(300, 309), 4], [1, *range(300, 309), 5, 6], [1, *range(300, 309), 4]]
    trees = [{(-1, 5): 0, (0, 6): 1, (-1, 7): 2, (0, 8): 3, (3, 9): 4, (2, 6): 5}, {(-1, 3): 0, (0, 3): 1}, {}, {(-1, 2): 0, (-1, 3): 1}, {(-1, 9): 0}]
    for model in (tiny(n_kv_heads=2).double(), RNN(RNNArgs("lstm", dim=16, n_layers=2, vocab_size=400, max_seq_len=64)).double()):
        with torch.no_grad():
            found = next_logits(model, rows, trees)
            for row, tree, logits in zip(rows, trees, found):
                for line, got in zip([[], *lines(tree)], logits, strict=True):
                    torch.testing.assert_close(got, model(torch.tensor([row + line]))[0, -1].float())


def test_a_recurrent_model_reads_each_line_of_a_tree_once():
    """From its root to a leaf: what lines begin with is computed for each, but no line for each of its tokens."""
    model, read = RNN(RNNArgs("gru", dim=16, n_layers=1, vocab_size=400)), []
    model.layers[0].register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[:2])))
    next_logits(model, [[1, 5, 9, 20]], [{(-1, 5): 0, (0, 6): 1, (-1, 7): 2, (0, 8): 3, (3, 9): 4, (2, 6): 5}])
    next_logits(model, [[1, 5, 9, 20]])
    assert read == [(3, 4 + 3), (1, 4)]


def test_guesses_give_the_greedy_text_in_fewer_forwards():
    """Against one token a forward: at each length of prompt and answer, to the end of the context, with eos amid a guess."""
    for sizes in (dict(n_kv_heads=2), dict(vocab_size=12, dim=16), dict(vocab_size=2, dim=16)):
        model = tiny(max_seq_len=45, **sizes)
        for prompt in ([1], [1, 0, 1], [1, 0, 1, 0, 1, 0], [0, 1] * 15):
            text = naive(model, prompt, 99, -1)
            assert len(text) == 45 - len(prompt)
            for most in (1, 2, 7, 99):
                assert one(model, prompt, most, -1) == text[:most]
            for eos in sorted(set(text))[::4]:
                assert one(model, prompt, 99, eos) == text[:text.index(eos)]
            for n in (1, 2, 3):
                assert one(model, prompt, 30, -1, no_repeat_ngram=n) == naive(model, prompt, 30, -1, n)
    counted = Counted(tiny(vocab_size=12, dim=16, max_seq_len=300))
    assert len(one(counted, [1, 5, 9], 200, -1)) == 200 and len(counted.tokens) < 80
    assert sum(n % BLOCK == 0 for n in counted.tokens) > 0.7 * len(counted.tokens)      # and so few shapes


@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_any_guess_gives_the_greedy_text(monkeypatch, right):
    """A line of five tokens of which the first `right` are, and two that are wrong beside each: a forward gives these and one more."""
    model = tiny()
    text = naive(model, [1, 5, 9], 24, -1)

    def oracle(row, most, said, rivals):
        line, tree, node = [token if i < right else token + 1 for i, token in enumerate(text[len(row) - 3:][:5])], {}, -1
        for token in line if most else []:
            for other in (token + 2, token, token + 3):
                tree[node, other] = len(tree)
            node = tree[node, token]
        return tree
    monkeypatch.setattr(sampling, "guess", oracle)
    counted = Counted(model)
    assert one(counted, [1, 5, 9], 24, -1) == text
    assert counted.places == [1 + 3 * min(5, 24 - said) * (24 - said > 1) for said in range(0, 24, right + 1)]


def test_what_is_said_after_a_wrong_guess_is_guessed_next():
    """The model counts up whatever comes before; the guess 20 after the second 7 is wrong, what is said after it right."""
    class Counting(Scripted):
        def says(self, ids):
            return torch.nn.functional.one_hot(torch.tensor(len(ids)), 64).float()
    model = Counting({})
    assert one(model, [7, *range(20, 30), 7], 3, -1) == [12, 13, 14]
    first, second = ([ids[12:] for ids in read] for read in model.asked)
    assert first == [[*range(20, 20 + n)] for n in range(LINE + 1)]
    assert second[:2] == [[12], [12, 13]]


def test_answers_of_one_pool_help_the_next(monkeypatch):
    """The same text, in fewer forwards the second time; a full pool begins anew; without one, calls share nothing."""
    model = tiny(max_seq_len=128)
    text, pool = naive(model, [1, 5, 9], 60, -1), {}

    def forwards(pool):
        counted = Counted(model)
        assert one(counted, [1, 5, 9], 60, -1, pool=pool) == text
        return len(counted.places)
    first, second, full = forwards(pool), forwards(pool), len(pool)
    assert second < 0.9 * first == 0.9 * forwards(None) == 0.9 * forwards(None) == 0.9 * forwards({})
    monkeypatch.setattr(sampling, "POOL", full)
    assert forwards(pool) <= second and len(pool) >= full
    monkeypatch.setattr(sampling, "POOL", len(pool) - 1)
    assert forwards(pool) == first
    one(model, [1, 5, 9], 60, -1, temperature=1.0, pool=(drawn := {}))
    assert drawn == {}


def test_what_is_drawn_or_searched_is_not_guessed():
    counted = Counted(tiny())
    one(counted, [1, 5, 5, 5, 5], 9, -1, temperature=1.0)
    beam_search(counted, [1, 5, 5, 5, 5], 9, -1, 1)
    assert counted.places == [1] * 18


def test_the_context_ends_it():
    model = Scripted({n: 7 for n in range(64)}, max_seq_len=6)
    assert one(model, [1, 5, 6], 10, eos_id=2) == [7, 7, 7]
    with pytest.raises(ValueError, match="the prompt has 6 tokens and the model takes 6"):
        generate(model, [[1, 5], [1] * 6], 10, eos_id=2)


LOGITS = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()


@pytest.mark.parametrize("settings, expected", [
    (dict(), [0.1, 0.2, 0.4, 0.3]),
    (dict(temperature=0.5), [0.01 / 0.3, 0.04 / 0.3, 0.16 / 0.3, 0.09 / 0.3]),         # p^(1/T), normed
    (dict(top_k=1), [0, 0, 1, 0]),
    (dict(top_k=2), [0, 0, 4 / 7, 3 / 7]),
    (dict(top_k=9), [0.1, 0.2, 0.4, 0.3]),
    (dict(top_p=0.39), [0, 0, 1, 0]),                                                  # never none
    (dict(top_p=0.6), [0, 0, 4 / 7, 3 / 7]),                                           # 0.4 is short of 0.6, with 0.3 past it
    (dict(top_p=0.75), [0, 2 / 9, 4 / 9, 3 / 9]),
    (dict(top_k=3, top_p=0.7), [0, 0, 4 / 7, 3 / 7]),                                  # of 4/9, 3/9, 2/9 two reach 0.7
    (dict(top_p=1e-9), [0, 0, 1, 0]),
    (dict(temperature=1e-40), [0, 0, 1, 0]),
    (dict(top_p=1e-320), [0, 0, 1, 0]),
    (dict(temperature=1e30), [0.25] * 4),
])
def test_filters_by_hand(settings, expected):
    assert torch.allclose(filtered(LOGITS, **settings), torch.tensor(expected, dtype=torch.float), atol=1e-6)


def test_filters_at_a_border_and_at_a_tie():
    half = torch.tensor([0.5, 0.25, 0.25]).log()
    assert filtered(half, top_p=0.5).tolist() == [1, 0, 0]                             # reached exactly: no more is needed
    assert filtered(torch.zeros(4), top_k=1).tolist() == [1, 0, 0, 0]                  # k tokens, not all that tie


def test_what_is_drawn_follows_the_filtered_probabilities():
    class Four(Scripted):
        def says(self, ids):
            return LOGITS.clone()
    for settings in (dict(temperature=1.0), dict(temperature=2.0), dict(temperature=1.0, top_k=2), dict(temperature=1.0, top_p=0.75)):
        drawn = torch.tensor([one(Four({}), [1], 1, -1, seed=seed, **settings)[0] for seed in range(3000)])
        assert torch.allclose(torch.bincount(drawn, minlength=4) / 3000, filtered(LOGITS, **settings), atol=0.04)


def test_a_seed_repeats_what_is_drawn():
    texts = [one(tiny(), [1, 5], 8, -1, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


PREAMBLE = [1, *range(300, 309)]
PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 3, 20, 30], [1, 8], PREAMBLE, [*PREAMBLE, 5], [*PREAMBLE, 5], [*PREAMBLE, *range(310, 320), 4],
           [*PREAMBLE, *range(310, 320)]]


@pytest.mark.parametrize("settings", [dict(), dict(temperature=1.5, seed=3), dict(temperature=1.0, top_k=5), dict(no_repeat_ngram=2)])
def test_several_prompts_in_a_batch_give_what_each_gives_alone(settings):
    """Of different lengths, ending at different times; some begin alike, two are alike, one is the beginning of others."""
    model = tiny(n_kv_heads=2)
    eos = one(model, PROMPTS[0], 3, -1)[2]                                    # some token that comes up early
    together = [[] for _ in PROMPTS]
    for i, token in generate(model, PROMPTS, 10, eos, **settings):
        together[i].append(token)
    assert together == [one(model, prompt, 10, eos, **settings) for prompt in PROMPTS]
    if not settings:
        assert len({len(answer) for answer in together}) > 1


def test_a_batch_computes_what_its_prompts_share_once_and_no_padding():
    preamble = list(range(200, 240))
    prompts = [[*preamble, 3], [*preamble, 4, 5], [*preamble, *range(250, 290), 6]]
    counted = Counted(tiny())
    [*generate(counted, prompts, 1, -1)]
    assert counted.places == [3] and counted.tokens == [40 + 1 + 2 + 41]


def test_guesses_fill_blocks_and_stop_at_the_end_of_the_context(monkeypatch):
    counted, asked = Counted(tiny(max_seq_len=64)), []
    monkeypatch.setattr(sampling, "guess", lambda row, most, *_: asked.append((len(row), most)) or {})
    one(counted, [1, 5, 9], 99, -1)
    assert asked == [(n, min(next(b for b in range(0, 999, BLOCK) if b >= n + GUESSES), 64) - n if n < 63 else 0) for n in range(3, 64)]
    asked.clear()
    [*generate(counted, [[1, 5, 9], [1, 5]], 3, -1)]
    assert asked == [(n, FEWER if n < start + 2 else 0) for step in range(3) for start in (3, 2) for n in [start + step]]
    asked.clear()
    [*generate(counted, [[*range(50)], [*range(57)]], 2, -1)]
    assert asked == [(50, FEWER), (57, 64 - 57), (51, 0), (58, 0)]


def test_no_ngram_comes_twice():
    assert repeats([1, 2, 3, 1, 2], 3) == [3] and repeats([1, 2, 3, 1, 2], 2) == [3] and repeats([1, 2], 1) == [1, 2]
    assert repeats([1, 2, 1, 3, 1], 2) == [2, 3] and repeats([1, 2, 3], 0) == repeats([], 2) == repeats([1], 3) == []
    model = tiny()
    free = one(model, [1, 5], 40, -1)
    for n in (1, 2, 3):
        for answer in (one(model, [1, 5], 40, -1, no_repeat_ngram=n), beam_search(model, [1, 5], 40, -1, 2, n)):
            grams = [tuple(answer[i:i + n]) for i in range(len(answer) - n + 1)]
            assert len(answer) == 40 and len(grams) == len(set(grams))
    assert len({tuple(free[i:i + 3]) for i in range(38)}) < 38                # greedy alone does repeat itself


def exhaustive(model, prompt, length, eos):
    """Every answer of up to `length` tokens, scored one by one: mean log p of its tokens, eos included."""
    best = (-float("inf"), None)
    unfinished = [(0.0, [])]
    for n in range(length):
        longer = []
        for score, answer in unfinished:
            log_p = model(torch.tensor([prompt + answer]))[0, -1].log_softmax(-1).tolist()
            best = max(best, ((score + log_p[eos]) / (n + 1), answer))
            longer += [(score + p, [*answer, token]) for token, p in enumerate(log_p) if token != eos]
        unfinished = longer
    return max(best, *((score / length, answer) for score, answer in unfinished))[1]


class Table(Scripted):
    """Probabilities by the answer so far: of eos (id 0), a (1) and b (2)."""

    def says(self, ids):
        return torch.tensor(self.script.get(tuple(ids[1:]), [0.8, 0.1, 0.1])).log()


@pytest.mark.parametrize("beams, script, best", [
    (2, {(): [0.5, 0.5, 0.0], (1,): [0.6, 0.2, 0.2]}, [1]),                  # (log .5 + log .6) / 2 beats log .5: eos counts
    (2, {(): [0.4, 0.35, 0.25], (1,): [0.1, 0.5, 0.4], (2,): [0.99, 0.01, 0.0]}, [2]),       # eos takes no beam's place
    (3, {(): [0.0, 0.6, 0.4], (1,): [0.0, 0.0, 0.0], (2,): [0.0, 0.0, 0.0]}, [1]),           # a dead end is no answer's rival
    (1, {(): [0.3, 0.6, 0.1], (1,): [0.9, 0.05, 0.05]}, [1]),                # one is finished, a better one still goes on
])
def test_beam_search_by_hand(beams, script, best):
    assert beam_search(Table(script), [3], 8, 0, beams) == best


def test_an_answer_ends_where_every_token_is_banned():
    model = tiny(vocab_size=5)
    for settings in (dict(), dict(temperature=1.0)):
        answer = one(model, [1], 20, -1, no_repeat_ngram=1, **settings)
        assert len(answer) == len(set(answer)) == 5
    for beams in (1, 2, 3):
        answer = beam_search(model, [1], 20, -1, beams, no_repeat_ngram=1)
        assert len(answer) == len(set(answer)) == 5
    never = torch.tensor([-torch.inf, 0.0, 0.0, 0.0])                         # eos, id 0, can't be said

    class Mute(Scripted):
        def says(self, ids):
            return never
    assert [sorted(beam_search(Mute({}), [9], 20, 0, beams, no_repeat_ngram=1)) for beams in (1, 2, 3)] == [[1, 2, 3]] * 3


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_what_exhaustive_search_finds(seed):
    model = tiny(vocab_size=5, dim=8, n_heads=2, n_layers=1)
    torch.manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    assert beam_search(model, [1, 3], 4, 2, beams=4 ** 4) == exhaustive(model, [1, 3], 4, 2)
    assert beam_search(model, [1, 3], 6, -1, beams=1) == one(model, [1, 3], 6, -1)         # one beam is greedy


@pytest.mark.parametrize("text", ["blue green", "two  spaces\n\nand lines ", "ünï 🦙🦙 多", " leading", "a\ufffdb", "ends in \ufffd", ""])
def test_streamed_text_is_the_decoded_whole_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = list(stream(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)               # no half of a character, ever
        assert len(pieces) > 1 or len(ids) < 3                              # and not all at the end


def test_half_a_character_at_the_end_is_shown_not_lost(tokenizer):
    ids = tokenizer.encode("a🦙")[:-1]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) != "a"


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, tokenizer):
    """The folder of a run whose adapter says something else than the base, which is the `base` of conftest.py."""
    folder = tmp_path_factory.mktemp("learnt")
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, folder / "base")
    (folder / "data.json").write_text(json.dumps(EXAMPLES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["--checkpoint", "base", "--data", "data.json", "--targets", "all", "--lr", "1e-2",
                    "--epochs", "40", "--accumulation-steps", "1", "--dropout", "0"])
    return folder / "out"


@pytest.fixture
def trained(learnt, base, data, tmp_path, monkeypatch, capsys):
    """say(*flags) where ./out holds that run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(learnt, "out")
    capsys.readouterr()

    def say(*flags):
        command.main([*flags, "--max-new-tokens", "8"])
        return capsys.readouterr()
    return say


def test_base_adapter_and_merged(trained, base, tokenizer):
    asked = ("--instruction", "Say blue please.")
    adapted, alone, merged = trained(*asked), trained(*asked, "--adapter", "none", "--checkpoint", str(base)), trained(*asked, "--merge")
    assert adapted.out == merged.out != alone.out
    assert adapted.out == "\n### Say blue please.\nblue \n"                  # learnt, and stops by itself
    assert re.search(r"^base \S+/base, 2 layers, fp32 on cpu; adapter out/adapter.pt, lora r 16 on all$", adapted.err, re.M)
    assert "merged: 100.0 % of the update survives in float32; logits of up to" in merged.err
    assert "; adapter" not in alone.err


def test_the_adapter_file_names_its_base_and_layers(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--layers", "1", "--max-steps", "1", "--out", "one"])
    command.main(["--adapter", "one/adapter.pt", "--instruction", "Say", "--max-new-tokens", "1"])
    assert "1 layer," in capsys.readouterr().err


def test_the_adapter_answers_without_dropout(base, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--dropout", "0.5"])
    model, *_ = command.load(command.parse_args(["--precision", "fp32"]), torch.device("cpu"), "fp32")
    assert not any(module.training for module in model.modules())


def test_weights_that_are_no_numbers_end_in_one_line(trained, tmp_path, capsys):
    content = torch.load("out/adapter.pt", weights_only=True)
    for value, message in ((float("nan"), "out/adapter.pt holds values that are no finite numbers, in layers.0.attention.wq.lora_B"),
                           (3e38, "the model's logits are no finite numbers")):
        content["tensors"]["layers.0.attention.wq.lora_B"].fill_(value)
        torch.save(content, "out/adapter.pt")
        for flags in ([], ["--temperature", "1"], ["--beams", "2"], ["--data", "examples.json"]):
            with pytest.raises(SystemExit, match="2"):
                trained(*flags)
            assert f"generate.py: {message}" in capsys.readouterr().err


def test_an_adapter_taken_by_default_is_named_when_it_does_not_fit(trained, base, capsys):
    with pytest.raises(SystemExit, match="2"):
        trained("--layers", "1")
    assert "; out/adapter.pt is the default because it is there, --adapter none runs without it" in capsys.readouterr().err


def test_input_goes_into_the_prompt(trained):
    with_input = trained("--instruction", "Say cold again please.", "--input", "quietly")
    assert with_input.out.startswith("\n### Say cold again please.\n# quietly\ncold")


def test_flags_reach_the_sampler(trained):
    def asked(*flags):
        return trained("--instruction", "Say", *flags).out
    hot = ("--temperature", "3", "--seed")
    assert asked(*hot, "1") == asked(*hot, "1") != asked(*hot, "2")
    assert asked(*hot, "1", "--top-k", "1") == asked(*hot, "1", "--top-p", "1e-9") == asked()
    assert asked("--beams", "3") and asked("--no-repeat-ngram", "1")


def test_a_file_is_answered_to_json_lines(trained, tmp_path):
    """Twelve questions in batches, one without an output; each answered as it is alone; progress on stderr."""
    questions = [{key: value for key, value in example.items() if key != "output"} for example in EXAMPLES[:-1]] + EXAMPLES[-1:]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    said = trained("--data", "questions.jsonl")
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "answer"} for row in rows] == questions
    assert sum(row["answer"] != "" and example["output"].startswith(row["answer"]) for row, example in zip(rows, EXAMPLES)) >= 10
    assert said.err.splitlines()[1:] == ["8/12 answered", "12/12 answered"]
    for row in rows[::5]:
        alone = trained("--instruction", row["instruction"], "--input", row["input"]) if row["input"] \
            else trained("--instruction", row["instruction"])
        assert alone.out.endswith(f"\n{row['answer']}\n")
    beams = trained("--data", "questions.jsonl", "--beams", "2").out
    assert len(beams.splitlines()) == 12


def test_interactive_answers_lines_and_switches_adapters_on_one_base(trained, base, data, monkeypatch):
    train.main(["--checkpoint", str(base), "--data", str(data), "--max-steps", "1", "--out", "other", "--targets", "w2", "--lr", "1"])
    typed = ["Say blue please.\n", " :adapter none\n", "Say blue please.\n", "\n", ":adapter other/adapter.pt\n", "Say blue please.\n",
             ":adapter nowhere.pt\n", ":adapter\n", ":quit\n", "Say blue please.\n", ":adapter out/adapter.pt\n", "Say blue please.\n"]
    loads = []
    monkeypatch.setattr(command, "load_checkpoint", lambda *args, **rest: loads.append(args) or load_checkpoint(*args, **rest))
    for flags in ((), ("--merge",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(typed)))
        said = trained("--interactive", *flags)
        first, bare, other, still_other, again = (part.strip() for part in said.out.split("###")[1:] if part.strip())
        assert first == again == "blue" and other == still_other and len({first, bare, other}) == 3
        assert "generate.py: no adapter file at nowhere.pt" in said.err
        assert said.err.count("\nadapter ") == 3
        assert said.err.count("type an instruction, or :adapter PATH, or :adapter none") == 2
        asked = ("--instruction", "Say blue please.", "--adapter")
        assert trained(*asked, "none", "--checkpoint", str(base)).out.endswith(f"\n{bare}\n")
        assert trained(*asked, "other/adapter.pt").out.endswith(f"\n{other}\n")
    assert len(loads) == 6                                                    # two sessions, four plain calls


def test_verbose_says_tokens_a_forward_and_a_second(base, data, capsys):
    def asked(*flags):
        command.main(["--checkpoint", str(base), "--adapter", "none", "--max-new-tokens", "8", *flags])
        return capsys.readouterr()
    for flags, lines in ((("--instruction", "Say"), 1), (("--data", str(data)), 2), (("--instruction", "Say", "--beams", "2"), 1), ((), 6)):
        quiet, said = asked(*flags), asked(*flags, "--verbose")
        found = re.findall(r"(\d+) tokens in (\d+) forwards, (\S+) per forward; \S+ tokens/s\n", said.err)
        assert said.out == quiet.out and len(found) == lines                  # an answer each, or a batch
        assert re.sub(r".* tokens in .*\n", "", said.err) == quiet.err
        for tokens, forwards, ratio in found:
            assert int(forwards) <= 8 and float(ratio) == pytest.approx(int(tokens) / int(forwards), abs=0.006)
            assert flags[0:1] != ("--data",) or float(ratio) > 2             # of eight prompts, or four, in one forward


def test_later_answers_of_a_session_take_fewer_forwards(base, tmp_path, capsys, monkeypatch):
    """The same instruction again, typed or in another batch of a file: the same answer from what is remembered of the first."""
    (tmp_path / "same.json").write_text(json.dumps([{"instruction": "Say"}] * 9))
    for flags in (["--interactive"], ["--data", str(tmp_path / "same.json")]):
        monkeypatch.setattr(command, "BATCH", 1)
        monkeypatch.setattr("sys.stdin", io.StringIO("Say\n" * 9))
        command.main(["--checkpoint", str(base), "--adapter", "none", "--max-new-tokens", "40", "--verbose", *flags])
        said = capsys.readouterr()
        answers = [json.loads(line)["answer"] for line in said.out.splitlines()] if "--data" in flags else said.out.split("\n### ")[1:-1]
        forwards = [int(n) for n in re.findall(r"tokens in (\d+) forwards", said.err)]
        assert len(answers) == len(forwards) == 9 and len(set(answers)) == 1 and max(forwards[1:]) < forwards[0]


def test_several_dtypes_answer(trained):
    for precision in ("bf16", "fp16"):
        assert f"{precision} on cpu" in trained("--instruction", "Say blue please.", "--precision", precision).err


def test_generation_leaves_the_model_as_it_was(base):
    model, tokenizer = load_checkpoint(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one(model.eval(), [1, 2, 3], 5, -1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
