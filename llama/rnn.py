"""A small recurrent language model (GRU or LSTM) with Transformer's interface, to distil into.

A folder is one if it has a tokenizer.model and a params.json like {"rnn": "gru", "dim": 128,
"n_layers": 2}.  `--init random` draws its weights; from then on it is loaded, trained, saved and
asked like any other checkpoint.  Needs torch alone.
Deleting this file, and the lines that name RNN or RNNArgs in checkpoint.py, finetune/shard.py and
finetune/convert.py, leaves LLaMA alone.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .layout import Layout, copy_to
from .model import RMSNorm

KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}
VALUES_KEPT = {"gru": 10, "lstm": 20}                # by a block, per token and unit of its width
MAX_SIZES = {"dim": 2 ** 20, "n_layers": 2 ** 9, "vocab_size": 2 ** 24, "max_seq_len": 2 ** 30}


@dataclass
class RNNArgs:
    """The params.json of a recurrent model.  Raises ValueError for sizes that are out of range."""
    rnn: str                                         # "gru" or "lstm"
    dim: int
    n_layers: int
    vocab_size: int = 32000
    norm_eps: float = 1e-5
    max_seq_len: int = 512                           # tokens of a text; the state has no limit
    tie_embeddings: bool = False

    # A transformer's sizes, for code that reads either's.  Without annotations they are not fields.
    n_heads = 0
    n_kv_heads = 0
    hidden_dim = 0
    rope_theta = 0

    def __post_init__(self):
        if self.rnn not in KINDS:
            raise ValueError(f"rnn is {self.rnn!r}, must be {' or '.join(KINDS)}")
        for name, largest in MAX_SIZES.items():
            value = getattr(self, name)
            if not 1 <= value <= largest:
                raise ValueError(f"{name} is {value}, must be 1 to {largest}")
        if not 0 < self.norm_eps <= 1:
            raise ValueError(f"norm_eps is {self.norm_eps}, must be above 0 and at most 1")


class RecurrentBlock(nn.Module):
    """x + rnn(norm(x)) from a state of zeros, (B, T, D) -> (B, T, D).

    The rnn is a GRU (Cho et al. 2014) or an LSTM (Hochreiter & Schmidhuber 1997).
    """

    def __init__(self, args: RNNArgs):
        super().__init__()
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.rnn = KINDS[args.rnn](args.dim, args.dim, batch_first=True)

    def train(self, mode: bool = True):
        """Set the mode of all but the rnn, which always trains; that changes none of its results.

        In eval mode cuDNN refuses the backward pass that is tried before step 1.
        """
        super().train(mode)
        self.rnn.train()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.rnn(self.norm(x))
        return x + outputs


class RNN(nn.Module):
    """Embedding, blocks, norm and output, named as in Transformer."""

    def __init__(self, args: RNNArgs):
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
        """Draw N(0, 0.02) for embedding and output, U(-1, 1) / sqrt(D) for the blocks.

        The blocks' distribution is torch's own.  Biases are 0, norms 1.
        """
        bound = self.args.dim ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.constant_(weight, 0.0 if "bias" in name else 1.0)
            elif name.startswith("layers."):
                nn.init.uniform_(weight, -bound, bound)
            else:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: torch.Tensor, rows: torch.Tensor | None = None,
                layout: Layout | None = None) -> torch.Tensor:
        """Return the logits (B, T, V) of tokens (B, T) int64, or (R, V) of `rows` alone.

        rows: (B, T) bool, or (R,) indices into B T.  Padding on the right comes after every real
        token.  With a layout, each segment of the packed row (1, N) becomes a row of its own behind
        what it continues.  So no state passes from one example to the next, and what several
        examples share is computed for each.
        """
        shape = tokens.shape
        h = self.tok_embeddings(tokens)                                        # (B, T, D)
        if layout:
            places, indices = unpacked(layout)
            places = copy_to(places, tokens.device)
            indices = copy_to(indices, tokens.device)
            # h[0, places] would add gradients in another order each time.
            h = F.embedding(places, h[0])                                      # (S, L, D)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, use_reentrant=False)
            else:
                h = layer(h)
        h = h.flatten(0, 1)
        if layout:
            h = h[indices]
        if rows is not None:
            h = h[rows.flatten()]
        h = self.output(self.norm(h))
        return h if rows is not None else h.unflatten(0, shape)

    def block_bytes(self, itemsize: int) -> int:
        """Return the bytes per token that one block keeps for its backward pass, as counted.

        itemsize: bytes per value.  Kept are norm's input, gates, states and copies that torch's
        CPU kernels make.
        """
        return self.args.dim * itemsize * VALUES_KEPT[self.args.rnn]


def unpacked(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (places, indices) that turn a packed row of N tokens into rows and back.

    places (S, L): a row per segment, or per leaf of a tree: where in the packed row the tokens
    stand that the segment continues, and then its own; filled up with 0.
    indices (N,): for each token of the packed row its index among the S L.
    """
    lengths = [length for length, _ in layout.segments]
    spans = torch.arange(sum(lengths)).split(lengths)
    rows = []
    row_of_token = []
    column_of_token = []
    for i, (length, context) in enumerate(layout.segments):
        if i in layout.trees:
            tree = layout.trees[i].cpu()
            is_leaf = tree.sum(0) == 1               # Only the leaf itself sees it.
            lines = tree[is_leaf]                    # (leaves, length): the tokens up to each leaf
            depth = tree.sum(1) - 1
        else:
            lines = torch.ones(1, length, dtype=torch.bool)
            depth = torch.arange(length)
        first_line = lines.int().argmax(0)           # of those that a token is in
        row_of_token.append(len(rows) + first_line)
        column_of_token.append(depth + sum(lengths[j] for j in context))
        before = [spans[j] for j in context]
        for line in lines:
            rows.append(torch.cat([*before, spans[i][line]]))
    places = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    n_columns = places.shape[1]
    return places, torch.cat(row_of_token) * n_columns + torch.cat(column_of_token)
