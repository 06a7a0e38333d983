"""Delta-LoRA (Zi et al. 2023): each step also moves the weight, by the change of B A."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import LoRALinear
from ..matrices import gathered_weights


class DeltaLoRALinear(LoRALinear):
    """y = W x + s B A x; after step t > start also W += ratio * s (B' A' - B A)  (algorithm 1).

    s = alpha / r; A and B are from before the step, A' and B' from after it.  W needs no gradient
    and no optimizer state.
    base: nn.Linear with the weight W0 (d_out, d_in).  x (..., d_in) -> y (..., d_out).

    lora_A (r, d_in) and lora_B (d_out, r) start as in LoRA, lora_W (d_out, d_in) starts as W0.  So
    the layer equals its base to the bit until the first step.  lora_W is fp32 even over a 16-bit
    base, because 16 bits would round steps this small away.  Adapter files hold lora_W.  A forward
    in 16 bits copies it and keeps the copy until the backward pass, unless the block is
    checkpointed.  W0 stays unchanged, so the adapter can be disabled, unmerged and removed.  Where
    ranks share the base (--shard), each still holds lora_W whole.

    The method takes the change of B A in place of W's gradient.  With dropout, dA and dB would not
    be gradients of s B A, so the paper leaves dropout out.

    All steps together give W = W0 + ratio * s (B A - B_start A_start), so the whole update has at
    most rank 2 r.  With start 0 the method is LoRA whose scale is (1 + ratio) s in the forward pass
    and s in the gradient.

    options: ratio, the paper's lambda; start, its K: the number of steps before W begins to move.
    Raises ValueError for a quantised base, dropout, a ratio that is not finite, or a start below 0.
    """
    options = {"ratio": 2.0, "start": 10}
    default_dropout = 0.0
    frozen = ("lora_W",)
    factors_before = None       # A and B from before the step; None while W does not move yet.

    @classmethod
    def check(cls, config):
        ratio = config.options["ratio"]
        start = config.options["start"]
        if config.dropout:
            raise ValueError(f"dropout is {config.dropout}, must be 0: "
                             "the change of B A takes the place of a gradient")
        if not math.isfinite(ratio):
            raise ValueError(f"ratio is {ratio}, must be finite")
        if start < 0:
            raise ValueError(f"start is {start}, must be at least 0")

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        if getattr(base, "kind", None):      # Only quantised layers have a kind.
            raise ValueError("delta-lora moves the weight itself, so the base cannot be quantised")
        super().__init__(base, r, alpha, dropout, init, **options)
        with gathered_weights(base):
            W = base.weight.detach().to(self.lora_A.dtype, copy=True)
        self.lora_W = nn.Parameter(W, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged or not self.enabled:
            return self.base(x)
        A, B = self.factors()
        y = F.linear(x, self.lora_W.to(x.dtype), self.base.bias)
        return y + self.scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def begin_step(self, step, loss):
        self.factors_before = None
        if step > self.settings["start"]:
            self.factors_before = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        return {}

    @torch.no_grad()
    def after_step(self):
        """Add ratio * s (B' A' - B A) to W.

        B' A' - B A is computed as (B' - B) A' + B (A' - A), which is exactly 0 where an overflow
        made the optimizer skip its step.
        """
        if self.factors_before:
            A, B = self.factors_before
            change = (self.lora_B - B) @ self.lora_A + B @ (self.lora_A - A)
            self.lora_W += self.settings["ratio"] * self.scale * change

    def delta(self) -> torch.Tensor:
        update = self.product()
        return self.lora_W.to(update.dtype) - self.base.weight.to(update.dtype) + update


LAYERS = {nn.Linear: DeltaLoRALinear}
