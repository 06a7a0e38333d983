"""llama/guesses.py: several tokens per forward, and the text that one token per forward gives."""
import types

import pytest
import torch

from llama import guesses, layout
from llama.guesses import BLOCK, COPIED_TOKENS, MAX_MATCH, ROW_END
from llama.guesses import NgramPool, Tree, lookup, make_tree
from llama.rnn import RNN, RNNArgs
from llama.sampling import beam_search, next_logits

from .helpers import ROOT, tiny
from .test_sampling import PROMPTS, Counted, naive, one, several

# A line 5 6, which 8 9 leaves after the 5, and a line 7 6.
TREE = [(ROW_END, 5), (1, 6), (ROW_END, 7), (1, 8), (4, 9), (3, 6)]


def tree_of(*pairs):
    """Return the Tree of (parent's place, token) pairs."""
    tree = Tree()
    for parent, token in pairs:
        tree.add(parent, token)
    return tree


def lines(tree):
    """Return the tokens from the root to each token of the tree, in the order of their places."""
    assert len(tree) == len(tree.tokens) == len(tree.parents) == len(tree.places)
    read = [[]]
    for place, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True), 1):
        assert tree.child(parent, token) == place
        assert parent < place                        # A token comes after the one that it follows.
        read.append([*read[parent], token])
    return read[1:]


# --- what is guessed


def test_what_followed_the_last_time_is_looked_up():
    assert lookup([5, 1, 2, 3, 4, 1, 2])[:4] == [3, 4, 1, 2]
    assert lookup([1, 2, 8, 2, 9, 1, 2])[0] == 8     # the longer match, though another is nearer
    assert lookup([2, 8, 2, 9, 2])[0] == 9           # the last of equals
    assert lookup([4, 5, 6, 5, 6])[:5] == [5, 6, 5, 6, 5]        # It goes on in its own copy.
    assert lookup([1, 2, 3]) == lookup([1]) == []
    for n in range(1, MAX_MATCH + 1):
        row = [*range(10, 60), 1, *range(10, 10 + n)]            # Its last n tokens came before.
        followed = [*range(10 + n, 60), 1, *range(10, 99)]
        assert lookup(row) == followed[:COPIED_TOKENS * 2 ** (n - 1)]


def test_a_pool_has_what_was_put_last_after_two_tokens_or_one():
    pool = NgramPool()
    assert pool.after([1, 2]) == [] and len(pool) == 0
    pool.put([9, 1, 2], [3, 4])
    assert pool.after([1, 2]) == pool.after([8, 2]) == pool.after([2]) == [3, 4]
    pool.put([8, 2], [5, 6])
    assert pool.after([7, 1, 2]) == [3, 4]
    assert pool.after([8, 2]) == pool.after([2]) == [5, 6]
    assert pool.after([1]) == []
    assert len(pool) == 3
    pool.put([4], [7])
    assert pool.after([1, 4]) == [7]
    pool.clear()
    assert pool.after([4]) == [] and len(pool) == 0


def test_a_tree_of_guesses_by_hand():
    pool = NgramPool()
    pool.followers |= {
        (3,): [7, 8, 9], (7,): [4, 5, 6], (4,): [3, 1, 1], (8,): [8, 8, 8],
        (20,): [30, 31, 32], (21,): [30, 41, 42]}
    after_3 = [[7], [7, 4], [7, 4, 3], [8], [8, 8], [8, 8, 8], [9]]
    assert lines(make_tree([1, 2, 3], 99, pool, [])) == after_3
    assert lines(make_tree([1, 2, 3], 4, pool, [])) == after_3[:4]
    # What followed each alternative, the likeliest first; then the alternatives, one unknown.
    assert lines(make_tree([1, 2, 5], 99, pool, [20, 22, 21])) == [
        [30], [31], [41], [32], [42], [20], [20, 30], [22], [21], [21, 30]]
    # What was looked up comes first.
    looked_up = [[5, 3, 5, 3][:n] for n in range(1, COPIED_TOKENS + 1)]
    assert lines(make_tree([3, 5, 3], 99, pool, []))[:COPIED_TOKENS + 3] == [
        *looked_up, [7], [7, 4], [7, 4, 3]]


# --- how guesses are read


@pytest.mark.parametrize("short", [0, 256])
def test_each_token_of_a_tree_sees_its_row_and_its_own_line_alone(monkeypatch, short):
    """Against row and line as a row of their own: Transformer in both kernels, and LSTM."""
    monkeypatch.setattr(layout, "SHORT_CONTEXT", short)
    torch.manual_seed(0)
    shared = [1, *range(300, 309)]
    rows = [[1, 5, 9, 20], [7], [*shared, 4], [*shared, 5, 6], [*shared, 4]]
    trees = [tree_of(*TREE), tree_of((ROW_END, 3), (1, 3)), tree_of(),
             tree_of((ROW_END, 2), (ROW_END, 3)), tree_of((ROW_END, 9))]
    lstm = RNN(RNNArgs("lstm", dim=16, n_layers=2, vocab_size=400, max_seq_len=64))
    for model in (tiny(n_kv_heads=2).double(), lstm.double()):
        with torch.no_grad():
            logits_of_rows = next_logits(model, rows, trees)
            for row, tree, logits in zip(rows, trees, logits_of_rows, strict=True):
                for line, got in zip([[], *lines(tree)], logits, strict=True):
                    alone = model(torch.tensor([row + line]))[0, -1].float()
                    torch.testing.assert_close(got, alone)


# --- the text is the same


def test_guesses_give_the_greedy_text_in_fewer_forwards():
    """Against one token per forward, at each length of prompt and answer, with eos in a guess."""
    for sizes in ({"n_kv_heads": 2}, {"vocab_size": 12, "dim": 16}, {"vocab_size": 2, "dim": 16}):
        model = tiny(max_seq_len=45, **sizes)
        for prompt in ([1], [1, 0, 1], [1, 0, 1, 0, 1, 0], [0, 1] * 15):
            text = naive(model, prompt, 99, -1)
            assert len(text) == 45 - len(prompt)
            for most in (1, 2, 7, 99):
                assert one(model, prompt, most, -1) == text[:most]
            for eos in sorted(set(text))[::4]:
                assert one(model, prompt, 99, eos) == text[:text.index(eos)]
            for n in (1, 2, 3):
                expected = naive(model, prompt, 30, -1, n)
                assert one(model, prompt, 30, -1, no_repeat_ngram=n) == expected
    counted = Counted(tiny(vocab_size=12, dim=16, max_seq_len=300))
    assert len(one(counted, [1, 5, 9], 200, -1)) == 200
    n_forwards = len(counted.tokens)
    assert n_forwards < 80
    assert sum(n % BLOCK == 0 for n in counted.tokens) > 0.7 * n_forwards     # so few shapes


@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_any_guess_gives_the_greedy_text(monkeypatch, right):
    """A line of five of which the first `right` are, with two wrong ones beside each token.

    A forward gives these and one more.
    """
    model = tiny()
    text = naive(model, [1, 5, 9], 24, -1)

    def oracle(row, limit, pool, alternatives):
        tree = Tree()
        if limit == 0:
            return tree
        place = ROW_END
        n_given = len(row) - 3
        for i, token in enumerate(text[n_given:n_given + 5]):
            guess = token if i < right else token + 1
            tree.add(place, guess + 2)
            next_place = tree.add(place, guess)
            tree.add(place, guess + 3)
            place = next_place
        return tree

    monkeypatch.setattr(guesses, "make_tree", oracle)
    counted = Counted(model)
    assert one(counted, [1, 5, 9], 24, -1) == text
    expected = []
    for n_left in range(24, 0, -right - 1):
        n_guesses = 3 * min(5, n_left) if n_left > 1 else 0
        expected.append(1 + n_guesses)
    assert counted.places == expected


def test_no_guess_gives_the_same_text_with_a_token_per_forward(monkeypatch):
    model = tiny(n_kv_heads=2)
    texts = several(model, PROMPTS, 10, -1)
    monkeypatch.setattr(guesses, "make_tree", lambda *_: Tree())
    counted = Counted(model)
    assert several(counted, PROMPTS, 10, -1) == texts
    assert counted.places == [len(PROMPTS)] * 10
    assert one(model, [1, 5, 9], 24, -1) == naive(model, [1, 5, 9], 24, -1)


DELETED = [                                          # in sampling.py: (with guesses, without)
    ("from .guesses import Guesses, NgramPool\n", ""),
    ("seed: int = 0,\n             pool: NgramPool | None = None)", "seed: int = 0)"),
    ("""    if temperature == 0:
        # The same logits in fewer forwards; rows that it does not answer wait for the next turn.
        final_lengths = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        guesses = Guesses(partial(next_logits, model), final_lengths, model.args.max_seq_len, pool)
        logits_after = guesses.logits_after

""", ""),
]


def test_without_guesses_py_a_plain_loop_gives_the_same_text():
    source = (ROOT / "llama/sampling.py").read_text()
    for lines_with, lines_without in DELETED:
        assert source.count(lines_with) == 1, lines_with
        source = source.replace(lines_with, lines_without)
    assert "Guesses" not in source and "NgramPool" not in source
    plain = types.ModuleType("llama.plain_sampling")
    plain.__package__ = "llama"
    exec(source, vars(plain))
    for settings in ({}, {"no_repeat_ngram": 2}, {"temperature": 1.0}):
        counted = Counted(tiny(n_kv_heads=2))
        answers = [[] for _ in PROMPTS]
        for i, token in plain.generate(counted, PROMPTS, 10, 7, **settings):
            answers[i].append(token)
        assert answers == several(counted.model, PROMPTS, 10, 7, **settings)
        assert counted.places[0] == len(PROMPTS)
        assert sum(counted.places) >= sum(map(len, answers))     # an eos takes a forward too
        assert len(counted.places) == 10


# --- what is learnt on the way


def test_answers_of_one_pool_help_the_next(monkeypatch):
    """The same text in fewer forwards; a full pool begins again; without one, nothing is shared."""
    model = tiny(max_seq_len=128)
    text = naive(model, [1, 5, 9], 60, -1)

    def forwards(pool):
        counted = Counted(model)
        assert one(counted, [1, 5, 9], 60, -1, pool=pool) == text
        return len(counted.places)

    pool = NgramPool()
    first = forwards(pool)
    second = forwards(pool)
    assert second < 0.9 * first
    assert first == forwards(None) == forwards(None) == forwards(NgramPool())
    full = len(pool)
    monkeypatch.setattr(guesses, "POOL_SIZE", full)
    assert forwards(pool) <= second and len(pool) >= full
    monkeypatch.setattr(guesses, "POOL_SIZE", len(pool) - 1)
    assert forwards(pool) == first


def test_what_is_drawn_or_searched_is_not_guessed():
    counted = Counted(tiny())
    pool = NgramPool()
    one(counted, [1, 5, 5, 5, 5], 9, -1, temperature=1.0, pool=pool)
    beam_search(counted, [1, 5, 5, 5, 5], 9, -1, 1)
    assert counted.places == [1] * 18
    assert len(pool) == 0
