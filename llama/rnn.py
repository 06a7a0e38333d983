"""A student that is no transformer: a small recurrent language model behind Transformer's interface.  Needs torch alone.

A folder whose params.json reads {"rnn": "gru", "dim": 128, "n_layers": 2}, and that has a tokenizer.model, is one:
`--init random` draws its weights, and from then on it is loaded, trained, saved and asked like any other checkpoint.
Deleting this page, and its lines in checkpoint.py and preflight.py, leaves LLaMA alone.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from .model import RMSNorm

KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}


@dataclass
class RNNArgs:
    """What params.json says of it.  Raises ValueError for sizes that are out of range."""
    rnn: str                                   # gru or lstm
    dim: int
    n_layers: int
    vocab_size: int = 32000
    norm_eps: float = 1e-5
    max_seq_len: int = 512                     # tokens that whoever generates may ask for; the state itself has no end
    tie_embeddings: bool = False

    n_heads = n_kv_heads = hidden_dim = rope_theta = 0     # a transformer's, for what reads either's sizes; no fields

    def __post_init__(self):
        if self.rnn not in KINDS:
            raise ValueError(f"rnn is {self.rnn!r}, must be {' or '.join(KINDS)}")
        for name, high in dict(dim=2 ** 20, n_layers=2 ** 9, vocab_size=2 ** 24, max_seq_len=2 ** 30).items():
            if not 1 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 to {high}")
        if not 0 < self.norm_eps <= 1:
            raise ValueError(f"norm_eps is {self.norm_eps}, must be above 0 and at most 1")


class RecurrentBlock(nn.Module):
    """x + rnn(norm(x)): GRU (Cho et al. 2014) or LSTM (Hochreiter & Schmidhuber 1997) from a state of zeros.  (B, T, D)."""

    def __init__(self, args):
        super().__init__()
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.rnn = KINDS[args.rnn](args.dim, args.dim, batch_first=True)

    def train(self, mode=True):
        """The rnn trains always, which changes nothing of it: in eval mode cuDNN refuses the backward pass tried before step 1."""
        super().train(mode)
        self.rnn.train()
        return self

    def forward(self, x):
        return x + self.rnn(self.norm(x))[0]


class RNN(nn.Module):
    """Embedding, blocks, norm, output, named as Transformer's are."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.checkpointing = False
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(RecurrentBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self):
        """N(0, 0.02) where tokens go in and out, U(-1, 1) / sqrt(D) between, which is torch's own, biases 0."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.constant_(weight, float("bias" not in name))
            elif name.startswith("layers."):
                nn.init.uniform_(weight, -self.args.dim ** -0.5, self.args.dim ** -0.5)
            else:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens, rows=None, layout=None):
        """tokens (B, T) int64 -> logits (B, T, V); with rows, (B, T) bool or (R,) indices into B T, theirs alone: (R, V).

        Padding on the right comes after every real token.  Of a packed row (1, N) each of the layout's segments becomes a
        row of its own, behind what it continues: the state crosses from no example into the next, and what several share
        is computed for each.
        """
        shape = tokens.shape
        if layout:
            there, back = (places.to(tokens.device, non_blocking=True) for places in unpacked(layout))
            tokens = tokens[0, there]                                          # (S, L)
        h = self.tok_embeddings(tokens)                                        # (B, T, D)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else layer(h)
        h = h.flatten(0, 1)
        if layout:
            h = h[back]
        if rows is not None:
            h = h[rows.flatten()]
        h = self.output(self.norm(h))
        return h if rows is not None else h.unflatten(0, shape)

    def block_bytes(self, width):
        """Bytes a token that one block keeps for its backward pass: norm's input, gates, states and what torch's CPU kernels
        make of them, as counted."""
        return self.args.dim * width * {"gru": 10, "lstm": 20}[self.args.rnn]


def unpacked(layout):
    """A packed row of N tokens as S rows, one a segment (of a tree one a leaf): (S, L) where in the row their tokens stand,
    each behind those it continues, filled up with 0; and (N,) where in the S L each token of the row stands itself."""
    lengths = [length for length, _ in layout.segments]
    spans = torch.arange(sum(lengths)).split(lengths)
    rows, which, places = [], [], []
    for i, (length, context) in enumerate(layout.segments):
        lines, depth = torch.ones(1, length, dtype=torch.bool), torch.arange(length)
        if i in layout.trees:
            tree = layout.trees[i].cpu()
            lines, depth = tree[tree.sum(0) == 1], tree.sum(1) - 1             # of those that no other token sees
        which.append(lines.int().argmax(0) + len(rows))
        places.append(depth + sum(lengths[j] for j in context))
        rows += [torch.cat([*(spans[j] for j in context), spans[i][line]]) for line in lines]
    there = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return there, torch.cat(which) * there.shape[1] + torch.cat(places)
