"""LLaMA 2 (Touvron et al. 2023) for training: tokens in, logits out, no KV cache.

This file needs torch alone.  Names follow Meta's checkpoints.  Shapes: B examples, T tokens,
D model width, H query heads, K key and value heads, hd head width (D / H), V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class ModelArgs:
    """The sizes in Meta's params.json.  The defaults are Llama-2-7B's, but for max_seq_len.

    Raises ValueError for sizes that do not fit each other.
    """
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None              # None: n_heads (MHA); fewer: GQA; 1: MQA
    vocab_size: int = 32000
    multiple_of: int = 256                     # The width of SwiGLU is rounded up to this.
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 512                     # tokens per example; longer ones are refused
    tie_embeddings: bool = False               # One matrix is tok_embeddings and output.

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        # The author of a params.json is unknown, so absurd sizes are refused before any product.
        limits = {"dim": 2 ** 20, "n_layers": 2 ** 9, "n_heads": 2 ** 12, "n_kv_heads": 2 ** 12,
                  "vocab_size": 2 ** 24, "multiple_of": 2 ** 20, "max_seq_len": 2 ** 30}
        for name, limit in limits.items():
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise ValueError(f"{name} is {value}, must be 1 to {limit}")
        for name, limit in {"norm_eps": 1, "rope_theta": 1e12, "ffn_dim_multiplier": 64}.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= limit:
                raise ValueError(f"{name} is {value}, must be above 0 and at most {limit:g}")
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim {self.dim} must be n_heads {self.n_heads} times an even head "
                             "width (RoPE turns pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads "
                             f"{self.n_kv_heads}")
        if self.hidden_dim < 1:
            raise ValueError(f"ffn_dim_multiplier {self.ffn_dim_multiplier} makes the width of "
                             "SwiGLU 0")

    @property
    def hidden_dim(self) -> int:
        """Return the width of SwiGLU, computed and rounded up as Meta does.

        It is about 2/3 of 4 D, so that SwiGLU's three matrices have as many weights as the two
        matrices of a plain feed-forward layer of width 4 D.
        """
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4).

    x (..., D) of any float dtype -> the same shape and dtype.  It is computed in at least fp32:
    in fp16 the square of 256 is infinite already.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(T: int, head_dim: int, theta: float, device: torch.device,
               dtype: torch.dtype) -> torch.Tensor:
    """Return cos and sin of the angle t theta^(-2j/hd) for each position t and pair j.

    The shape is (T, hd/2, 2) (RoFormer, Su et al. 2021, eq. 15).  The table is made anew in each
    forward, in fp32 or fp64, which costs almost nothing.  A buffer would be cast with the model,
    and bf16 cannot tell position 256 from 257.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=dtype) / head_dim)
    angle = torch.outer(torch.arange(T, device=device, dtype=dtype), frequency)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn each neighbouring pair (a, b) of x by its position's angle: (a + ib)(cos + i sin).

    x (B, T, heads, hd), rope (T, hd/2, 2) -> the shape and dtype of x.
    """
    pairs = x.to(rope.dtype).unflatten(-1, (-1, 2))              # (B, T, heads, hd/2, 2)
    rope = rope[:, None]                                         # (T, 1, hd/2, 2)
    if torch.compiler.is_compiling():                            # It fuses real products only.
        a, b = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).type_as(x)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(hd)) v, where each token sees those up to itself.

    q (B, T, H, hd), k and v (B, T, K, hd) -> (B, T, H, hd).  With K < H (GQA) each key and value
    head serves H / K query heads.
    """
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))             # (B, H or K, T, hd)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
    return y.transpose(1, 2)


class Attention(nn.Module):
    """y = wo(attend(rotate(wq x), rotate(wk x), wv x)) (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.dim // args.n_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * self.head_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, attend=causal) -> torch.Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        # The rotation is the only place where a token's position has an effect.
        y = attend(rotate(q, rope), rotate(k, rope), v)          # (B, T, H, hd)
        return self.wo(y.flatten(-2))                            # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: y = w2(silu(w1 x) * w3 x) (Shazeer 2020, eq. 6)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """h = x + attention(norm(x)); y = h + feed_forward(norm(h)).  All are (B, T, D).

    The norm comes before each part, so the residual path from x to y has only additions.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: torch.Tensor, rope: torch.Tensor, attend=causal) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), rope, attend)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole model: embedding, blocks, norm, output.

    With `checkpointing = True` the backward pass recomputes each block instead of keeping it.
    """

    def __init__(self, args: ModelArgs):
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
        """Draw matrices with a standard deviation of 0.02 as GPT-2 does; norms start at 1.

        The two matrices of a block that write to the residual path get 0.02 / sqrt(2 n_layers).
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            else:
                is_on_residual_path = name.endswith(("wo.weight", "w2.weight"))
                std = 0.02 / math.sqrt(2 * self.args.n_layers) if is_on_residual_path else 0.02
                nn.init.normal_(weight, std=std)

    def forward(self, tokens: torch.Tensor, rows: torch.Tensor | None = None,
                layout=None) -> torch.Tensor:
        """Return the logits (B, T, V) of tokens (B, T) int64.

        rows: the positions to return logits for; the result is then (R, V).  Either (B, T) bool, or
        (R,) int64 indices into the B T positions.  The product with the vocabulary and the fp32
        loss after it take much of a step's time and memory.  Training needs logits only where an
        answer token is predicted, generation only at the last token.
        layout: where the examples of a packed row (1, N) stand.  It has their positions, and its
        attention keeps each example to itself.
        Put padding on the right: with the causal mask no real token sees what comes after it, so
        no padding mask is needed.
        Raises ValueError when an example has more than args.max_seq_len tokens.
        """
        length = layout.longest if layout else tokens.shape[1]
        if length > self.args.max_seq_len:
            raise ValueError(f"a row of {length} tokens is longer than max_seq_len "
                             f"{self.args.max_seq_len}")
        h = self.tok_embeddings(tokens)                                        # (B, T, D)
        rope = rope_table(length, self.args.dim // self.args.n_heads, self.args.rope_theta,
                          h.device, torch.promote_types(h.dtype, torch.float32))
        if layout:
            rope = rope[layout.positions]
        attend = layout.attend if layout else causal
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                # With use_reentrant=True LoRA would get no gradient, because h comes from a frozen
                # embedding and does not require a gradient.
                h = checkpoint(layer, h, rope, attend, use_reentrant=False)
            else:
                h = layer(h, rope, attend)
        if rows is not None:
            h = h[rows] if rows.dtype == torch.bool else h.flatten(0, 1)[rows]     # (R, D)
        return self.output(self.norm(h))
