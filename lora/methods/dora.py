"""DoRA (Liu et al. 2024): LoRA turns the rows of a weight, a trained vector says how long they are."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import LoRALinear


class DoRALinear(LoRALinear):
    """y = W' x with W' = m * V / ||V||, V = W0 + (alpha / r) B A (DoRA, eq. 5), W0 frozen; m, A and B are trained.

    base: nn.Linear (d_out, d_in).  ||V|| (d_out) is the length of each row of V, one an output, which is what the
    authors' code and PEFT take (the paper, writing the weight the other way round, calls them columns).  lora_A
    and lora_B start as LoRA's, lora_magnitude m (d_out) at ||W0||: so W' = W0, and the layer
    equals its base to the bit until the first step.  A row of zeros has no direction and gives nan.
    x (..., d_in) -> (..., d_out).

    ||V|| follows every step but is a constant for the gradient (section 4.3).  That makes it cheap to
    differentiate, but not to compute: V is built in fp32 in each forward, (d_out, d_in) for a moment.

    W' x is computed around the base's own output, g being m / ||V||:

        y = W0 x + (g - 1) * W0 dropout(x) + g * (alpha / r) B A dropout(x)

    In 16 bit g - 1 keeps digits that g loses.  While dropout is on, W0 is applied twice, as PEFT does.  g needs both
    of what it multiplies, so a layer keeps two results for backward beside x.  The paper has no embedding.
    """
    keeps_results = 2

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming", **options):
        super().__init__(base, r, alpha, dropout, init, **options)
        self.lora_magnitude = nn.Parameter(self.norm())

    def direction(self):
        """V (d_out, d_in) in at least fp32, made in place: nothing else of its size stands beside it."""
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.base.weight.detach().to(wide, copy=True).addmm_(B.to(wide), A.to(wide), alpha=self.scale)

    @torch.no_grad()
    def norm(self):
        """||V|| (d_out), a constant for the gradient."""
        return torch.linalg.vector_norm(self.direction(), dim=1)

    def forward(self, x):
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        dropped = self.dropout(x)
        straight = self.base(dropped) if self.training and self.dropout.p else y
        if self.base.bias is not None:
            straight = straight - self.base.bias                  # the magnitude is the weight's, not the bias's
        A, B = (factor.to(x.dtype) for factor in self.factors())
        g = self.lora_magnitude / self.norm()                     # in fp32
        return y + (g - 1).to(y.dtype) * straight + g.to(y.dtype) * (self.scale * F.linear(F.linear(dropped, A), B))

    @torch.no_grad()
    def delta(self):
        g = self.lora_magnitude / self.norm()
        V = self.direction()
        return g.to(V.dtype)[:, None] * V - self.base.weight.to(V.dtype)


LAYERS = {nn.Linear: DoRALinear}
