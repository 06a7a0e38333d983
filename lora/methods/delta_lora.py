"""Delta-LoRA (Zi et al. 2023): after each step the weight itself moves by what the product B A has changed."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import LoRALinear


class DeltaLoRALinear(LoRALinear):
    """y = W x + s B A x, and after optimizer step t > start: W += ratio * s (B' A' - B A)  (Delta-LoRA, algorithm 1).

    s = alpha / r, A and B before the step, A' and B' after it; W needs neither a gradient nor an optimizer's state.

    base: nn.Linear (d_out, d_in).  lora_A (r, d_in) and lora_B (d_out, r) start as LoRA's, lora_W (d_out, d_in) at
    the base's weight, so the layer equals its base to the bit until the first step.  Steps this small round away
    in 16 bit, so lora_W is fp32 whatever the base is (a forward in 16 bit makes a copy and keeps it until backward,
    unless its block is checkpointed), and it is saved with the adapter.  The base stays beside it,
    untouched, so that the adapter can be switched off, unmerged and taken out.  x (..., d_in) -> (..., d_out).

    Dropout would make dA and dB no gradient of s B A, which is what stands in for W's: the paper drops it.

    All steps together telescope: W = W0 + ratio * s (B A - B_start A_start).  So the whole update has at most rank 2 r,
    and from start 0 it is LoRA with (1 + ratio) s in the forward and s in the gradient.

    options: ratio (the paper's lambda) and start (its K), the steps before W begins to move.
    Raises ValueError for a quantised base, a dropout, a ratio that is not finite or a start below 0.
    """
    options = {"ratio": 2.0, "start": 10}
    default_dropout = 0.0
    frozen = ("lora_W",)
    before = None                                                # A and B before this step, once W moves

    @classmethod
    def check(cls, config):
        if config.dropout:
            raise ValueError(f"dropout is {config.dropout}, must be 0: delta-lora takes the change of B A for a gradient's")
        if not math.isfinite(config.options["ratio"]) or config.options["start"] < 0:
            raise ValueError(f"ratio is {config.options['ratio']} and start {config.options['start']}, "
                             "must be a finite number and at least 0")

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming", **options):
        if getattr(base, "kind", None):                           # prepack.py's is none: it holds its weight whole
            raise ValueError("delta-lora moves the weight itself, which a quantised base cannot do")
        super().__init__(base, r, alpha, dropout, init, **options)
        self.lora_W = nn.Parameter(base.weight.detach().to(self.lora_A.dtype, copy=True), requires_grad=False)

    def forward(self, x):
        if self.merged or not self.enabled:
            return self.base(x)
        A, B = (factor.to(x.dtype) for factor in self.factors())
        return F.linear(x, self.lora_W.to(x.dtype), self.base.bias) + self.scale * F.linear(F.linear(x, A), B)

    def begin_step(self, step, loss):
        moves = step > self.settings["start"]
        self.before = (self.lora_A.detach().clone(), self.lora_B.detach().clone()) if moves else None
        return {}

    @torch.no_grad()
    def after_step(self):
        """B' A' - B A = (B' - B) A' + B (A' - A): exactly nothing where an overflow made the optimizer skip its step."""
        if self.before:
            A, B = self.before
            change = (self.lora_B - B) @ self.lora_A + B @ (self.lora_A - A)
            self.lora_W += self.settings["ratio"] * self.scale * change

    def delta(self):
        update = self.product()
        return self.lora_W.to(update.dtype) - self.base.weight.to(update.dtype) + update


LAYERS = {nn.Linear: DeltaLoRALinear}
