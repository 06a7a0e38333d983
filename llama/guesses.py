"""Guesses of what a greedy text says next, so that one forward gives several of its tokens.

Without a KV cache a forward computes the whole row again, and a few more tokens cost little.  So a
tree of guesses is appended after each row, and the forward gives the logits after the row and after
each guess.  While the model's choice equals a guess, the logits of its next token are known
already.  The text stays the same, whether the guesses are right or wrong.
Deleting this file, its lines in sampling.py, and the pools in finetune/answers.py and
finetune/exam.py leaves one forward per token.
"""
import math
from collections.abc import Callable

import torch

BLOCK = 16               # tokens: guesses fill the forward of one row up to a multiple of this
GUESSES_ALONE = 24       # guesses for a row that has a forward to itself, at least
GUESSES_EACH = 12        # guesses for each of several rows in a forward, where they cost more
MAX_MATCH = 4            # tokens: the longest match that is looked up
COPIED_TOKENS = 4        # copied after a match of one token; each further one doubles that
FOLLOWERS = 3            # tokens remembered of what may follow an n-gram
MAX_ALTERNATIVES = 8     # tokens nearly chosen, of which guesses are made too
MAX_FOLLOWED = 2         # tokens by which the pool extends a guess
POOL_SIZE = 2 ** 17      # n-grams, some 40 MB; a larger pool starts again

ROW_END = 0              # the place of a tree's root: the end of the row


class Tree:
    """Tokens that may follow a row; those that begin alike share their beginning.

    The tokens have the places 1, 2, ... in the order in which they came.  tokens[n - 1] stands at
    place n, and follows the token at place parents[n - 1], or the row if that is ROW_END.
    """

    def __init__(self):
        self.tokens = []
        self.parents = []
        self.places = {}                             # (parent, token): place

    def __len__(self) -> int:
        return len(self.tokens)

    def child(self, place: int, token: int) -> int | None:
        """Return the place of `token` after `place`, or None if it is not in the tree."""
        return self.places.get((place, token))

    def children(self, place: int) -> list[int]:
        """Return the tokens that follow `place`."""
        return [token for token, parent in zip(self.tokens, self.parents, strict=True)
                if parent == place]

    def add(self, parent: int, token: int) -> int:
        """Add `token` after the place `parent`, unless it is there, and return its place."""
        place = self.child(parent, token)
        if place is None:
            self.tokens.append(token)
            self.parents.append(parent)
            place = len(self.tokens)
            self.places[parent, token] = place
        return place

    def add_line(self, line: list[int], limit: int):
        """Add tokens that follow each other after the row, while the tree is below `limit`."""
        place = ROW_END
        for token in line:
            if len(self) >= limit and self.child(place, token) is None:
                return
            place = self.add(place, token)

    def mask(self, n_before: int) -> torch.Tensor:
        """Return what n_before tokens and the tree behind them see: (L, L) bool, row t what t sees.

        A token of the tree sees the tokens before the tree, those that it follows, and itself.
        """
        length = n_before + len(self)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        row_end = n_before - 1
        for place, parent in enumerate(self.parents, 1):
            mask[row_end + place] = mask[row_end + parent]
            mask[row_end + place, row_end + place] = True
        return mask


class NgramPool:
    """What the model found likeliest after a token or a pair of tokens, where it read them last.

    It reads them in a text or in a guess, right or wrong (Fu et al. 2024).  Calls of `generate`
    with one model may share a pool: earlier answers then give guesses for later ones.
    """

    def __init__(self):
        self.followers = {}                          # (token,) or (token before, token): ids

    def __len__(self) -> int:
        return len(self.followers)

    def after(self, tokens: list[int]) -> list[int]:
        """Return the ids that may follow, the likeliest first; [] if the pool has none."""
        after_pair = self.followers.get(tuple(tokens[-2:]))
        return after_pair or self.followers.get(tuple(tokens[-1:]), [])

    def put(self, tokens: list[int], followers: list[int]):
        """Remember which ids may follow the last one or two of `tokens`."""
        self.followers[tuple(tokens[-2:])] = followers
        self.followers[tuple(tokens[-1:])] = followers

    def clear(self):
        """Forget everything."""
        self.followers.clear()


class TreeCursor:
    """The place that one text has reached in the tree that was guessed for it.

    logits (1 + g, V): after the row and after each of the tree's g tokens, by place.
    """

    def __init__(self, tree: Tree, logits: torch.Tensor):
        self.tree = tree
        self.logits = logits
        self.place = ROW_END                         # None once the text has left the tree
        self.alternatives = []                       # tokens that might have stood here instead

    def step(self, token: int) -> torch.Tensor | None:
        """Go to the text's next token and return the logits (V,) after it.

        Returns None if the token was not guessed.  `alternatives` are then the wrong guesses and
        the likeliest other tokens, without what the sampler has banned by -inf in the logits.
        """
        if self.place is None:
            return None
        place = self.tree.child(self.place, token)
        if place is None:
            _, *others = likeliest(self.logits[self.place], 1 + MAX_ALTERNATIVES)
            self.alternatives = self.tree.children(self.place) + others
        self.place = place
        return None if place is None else self.logits[place]


class Guesses:
    """The logits after greedy rows: reused after a right guess, otherwise computed.

    forward: (rows, trees) -> logits (1 + g, V) of each row, as sampling.next_logits of one model.
    final_lengths: for each text the number of tokens, prompt included, at which it is complete.
    pool: what earlier calls have learnt, or None.
    """

    def __init__(self, forward: Callable, final_lengths: list[int], max_seq_len: int,
                 pool: NgramPool | None = None):
        self.forward = forward
        self.final_lengths = final_lengths
        self.max_seq_len = max_seq_len
        self.pool = NgramPool() if pool is None else pool
        if len(self.pool) > POOL_SIZE:
            self.pool.clear()
        self.cursors = {}                            # i: of rows[i] since the last forward

    def logits_after(self, rows: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Return {i: logits (V,) after rows[i]} for the rows whose last token was guessed, or all.

        rows: {i: ids}.  The caller appends one token to each row that was answered and passes it
        again, unless it is finished.  Rows without an answer are passed again unchanged: one
        forward then reads all rows together.
        """
        logits_after = {}
        for i, row in rows.items():
            cursor = self.cursors.get(i)
            logits = cursor.step(row[-1]) if cursor else None
            if logits is not None:
                logits_after[i] = logits
        return logits_after or self.compute(rows)

    def compute(self, rows):
        """Return {i: logits (V,) after rows[i]} from one forward, which reads new guesses too."""
        is_alone = len(rows) == 1
        trees = [self.propose(i, row, is_alone) for i, row in rows.items()]
        logits_of_rows = self.forward(list(rows.values()), trees)
        self.cursors = {}
        for i, tree, logits in zip(rows, trees, logits_of_rows, strict=True):
            self.learn(rows[i], tree, logits)
            self.cursors[i] = TreeCursor(tree, logits)
        return {i: cursor.logits[ROW_END] for i, cursor in self.cursors.items()}

    def propose(self, i: int, row: list[int], is_alone: bool) -> Tree:
        """Return a tree of guesses of what follows text i, which is `row` so far."""
        alternatives = self.cursors[i].alternatives if i in self.cursors else []
        return make_tree(row, self.limit(i, row, is_alone), self.pool, alternatives)

    def limit(self, i: int, row: list[int], is_alone: bool) -> int:
        """Return how many guesses may stand behind text i, which is `row` so far."""
        if self.final_lengths[i] - len(row) <= 1:
            return 0                                 # Nothing follows the last token.
        if is_alone:
            # Lengths repeat, for kernels that are prepared once per length.
            stop = BLOCK * math.ceil((len(row) + GUESSES_ALONE) / BLOCK)
        else:
            stop = len(row) + GUESSES_EACH
        return min(stop, self.max_seq_len) - len(row)

    def learn(self, row: list[int], tree: Tree, logits: torch.Tensor):
        """Put into the pool what the forward found likeliest after the row and after each guess."""
        followers = likeliest(logits, FOLLOWERS)
        self.pool.put(row, followers[ROW_END])
        by_place = [row[-1], *tree.tokens]
        for place, parent in enumerate(tree.parents, 1):
            self.pool.put([by_place[parent], by_place[place]], followers[place])


def make_tree(row: list[int], limit: int, pool: NgramPool, alternatives: list[int]) -> Tree:
    """Return a tree of up to `limit` tokens that may follow `row`, the best guesses first.

    alternatives: tokens that might have stood where the row's last one does.
    """
    tree = Tree()
    tree.add_line(lookup(row), limit)
    for token in candidates(row, pool, alternatives):
        line = [row[-1], token]
        while len(line) < 2 + MAX_FOLLOWED and pool.after(line):
            line.append(pool.after(line)[0])
        tree.add_line(line[1:], limit)
    return tree


def candidates(row: list[int], pool: NgramPool, alternatives: list[int]) -> list[int]:
    """Return tokens that may come next, the likeliest first.

    What was said after an alternative often fits here too, and it may itself be still to come.
    """
    after_alternatives = []
    for alternative in alternatives:
        followers = pool.after([*row[-2:-1], alternative])
        if followers:
            after_alternatives.append(followers)
    tokens = list(pool.after(row))
    for rank in range(FOLLOWERS):                    # The likeliest after each one comes first.
        for followers in after_alternatives:
            tokens += followers[rank:rank + 1]
    return tokens + alternatives


def lookup(row: list[int]) -> list[int]:
    """Return what followed when the row's last tokens stood in it before; [] if they never did.

    The longest match counts, and the last one of equally long ones.  Each token more that matches
    doubles the length of what is returned (prompt lookup, Saxena 2023).
    """
    for n in range(min(MAX_MATCH, len(row) - 1), 0, -1):
        for start in range(len(row) - n - 1, -1, -1):
            if row[start:start + n] == row[-n:]:
                distance = len(row) - n - start
                copied = list(row)
                for _ in range(COPIED_TOKENS * 2 ** (n - 1)):
                    copied.append(copied[-distance])     # Past the row it copies its own copy.
                return copied[len(row):]
    return []


def likeliest(logits: torch.Tensor, n: int) -> list:
    """Return the ids of the n largest logits (..., V), the largest first, or of all V."""
    return logits.topk(min(n, logits.shape[-1])).indices.tolist()
