"""LLaMA 2 (Touvron et al. 2023) for training: tokens in, logits out, no KV cache.  Needs torch alone.

Names follow Meta's checkpoints.  Shapes: B examples, T tokens, D model width, H query heads, K key and
value heads, hd head width (D / H), V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelArgs:
    """Meta's params.json, with the values of Llama-2-7B as defaults.

    Raises ValueError for sizes that do not fit each other.
    """
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None              # None: one for each query head (MHA); fewer is GQA, 1 is MQA
    vocab_size: int = 32000
    multiple_of: int = 256                     # the width of SwiGLU is rounded up to this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 512                     # tokens; longer rows are refused
    tie_embeddings: bool = False               # no output matrix of its own: tok_embeddings serves twice

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        # A params.json may come from anywhere: nothing is multiplied that a hostile one could make absurd.
        most = dict(dim=2 ** 20, n_layers=2 ** 9, n_heads=2 ** 12, n_kv_heads=2 ** 12, vocab_size=2 ** 24,
                    multiple_of=2 ** 20, max_seq_len=2 ** 30)
        for name, high in most.items():
            if not 1 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 to {high}")
        for name, high in dict(norm_eps=1, rope_theta=1e12, ffn_dim_multiplier=64).items():
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0 and at most {high:g}")
        if self.dim % self.n_heads or self.dim // self.n_heads % 2:
            raise ValueError(f"dim {self.dim} must be n_heads {self.n_heads} times an even head width (RoPE turns pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.hidden_dim < 1:
            raise ValueError(f"ffn_dim_multiplier {self.ffn_dim_multiplier} leaves SwiGLU no width")

    @property
    def hidden_dim(self):
        """Width of SwiGLU: 2/3 of 4 D, so that three matrices cost what two did, rounded up as Meta does."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4).

    x (..., D) of any float dtype -> the same; computed in at least fp32, since fp16 squares overflow at 256.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(T, head_dim, theta, device, dtype):
    """cos and sin of t theta_j for positions t, theta_j = theta^(-2j/hd), (T, hd/2, 2) (RoFormer, Su et al. 2021, eq. 15).

    Made anew in each forward, which costs next to nothing, in `dtype` (fp32 or fp64): as a buffer it
    would follow `model.half()`, and positions in 16 bit are wrong from the 257th on.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angle = torch.outer(torch.arange(T, device=device, dtype=dtype), frequency)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x, rope):
    """Turn each neighbouring pair of x (B, T, heads, hd) by its position's angle: (a + ib)(cos + i sin); same shape and dtype."""
    pairs, rope = x.to(rope.dtype).unflatten(-1, (-1, 2)), rope[:, None]                           # (T, 1, hd/2, 2)
    if torch.compiler.is_compiling():                            # which fuses real numbers alone
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).type_as(x)


def causal(q, k, v):
    """softmax(q k^T / sqrt(hd)) v, each token seeing those up to itself; K < H heads serve H / K queries each (GQA)."""
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True,
                                       enable_gqa=k.shape[2] < q.shape[2])                         # (B, H, T, hd)
    return y.transpose(1, 2)


class Attention(nn.Module):
    """wo of what the heads read, each from the tokens before it (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, args):
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x, rope, attend=causal):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))   # (B, T, H|K, hd)
        q, k = rotate(q, rope), rotate(k, rope)                  # positions enter here and nowhere else
        y = attend(q, k, v)                                      # (B, T, H, hd)
        return self.wo(y.flatten(-2))                            # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, eq. 6)."""

    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)): normed before, so the residual path stays bare."""

    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, rope, attend=causal):
        h = x + self.attention(self.attention_norm(x), rope, attend)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole model.  `checkpointing = True` recomputes each block in the backward pass instead of keeping it."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.checkpointing = False
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self):
        """N(0, 0.02), the two matrices that write to the residual stream by 1/sqrt(2 n_layers) less (GPT-2)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.args.n_layers) if writes else 0.02)

    def forward(self, tokens, rows=None, layout=None):
        """tokens (B, T) int64 -> logits (B, T, V); with rows, (B, T) bool or (R,) indices into B T, theirs alone: (R, V).

        The product with the vocabulary and the fp32 loss behind it are a large part of time and memory:
        training wants them at answer tokens, generation at the last.  Rows are padded on the right: under the
        causal mask no real token sees the padding behind it, so no attention mask is needed.  A layout says where
        in one row (1, N) several examples stand: it knows their positions and keeps attention within each.
        Raises ValueError when an example exceeds args.max_seq_len.
        """
        T = layout.longest if layout else tokens.shape[1]
        if T > self.args.max_seq_len:
            raise ValueError(f"a row of {T} tokens is longer than max_seq_len {self.args.max_seq_len}")
        h = self.tok_embeddings(tokens)                                        # (B, T, D)
        rope = rope_table(T, self.args.dim // self.args.n_heads, self.args.rope_theta, h.device,
                          torch.promote_types(h.dtype, torch.float32))
        rope, attend = (rope[layout.positions], layout.attend) if layout else (rope, causal)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                # Of the reentrant kind LoRA gets no gradient: over a frozen base h needs none itself.
                h = checkpoint(layer, h, rope, attend, use_reentrant=False)
            else:
                h = layer(h, rope, attend)
        if rows is not None:
            h = h[rows] if rows.dtype == torch.bool else h.flatten(0, 1)[rows]                     # (R, D)
        return self.output(self.norm(h))
