"""DoRA (Liu et al. 2024): LoRA turns the rows of a weight; a trained vector sets their lengths."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import LoRALinear
from ..lora_layer import at_least_fp32
from ..matrices import gathered_weights


class DoRALinear(LoRALinear):
    """y = W' x with W' = m * V / ||V|| and V = W0 + (alpha / r) B A  (DoRA, eq. 5).

    W0 is frozen; m, A and B are trained.
    base: nn.Linear with the weight W0 (d_out, d_in).  x (..., d_in) -> y (..., d_out).
    ||V|| (d_out) holds the length of each row of V, one per output, as in the authors' code and in
    PEFT.  The paper writes the weight transposed and therefore speaks of columns.

    lora_A and lora_B start as in LoRA, lora_magnitude m (d_out) starts as ||W0||.  So W' = W0, and
    the layer equals its base to the bit until the first step.  A row of zeros has no direction and
    gives nan.

    ||V|| is computed anew in each forward, but the gradient takes it as a constant (section 4.3).
    That makes the backward pass cheap, not the forward: each forward builds V, (d_out, d_in) in
    fp32, and frees it again.

    W' x is computed around the base's own output.  With g = m / ||V||:

        y = W0 x + (g - 1) * W0 dropout(x) + g * (alpha / r) B A dropout(x)

    In 16 bits g - 1 keeps digits that g would lose.  While dropout is on, W0 is applied twice, as
    in PEFT.  The gradient of g needs both terms that g scales, so besides x the backward pass keeps
    two results.
    """
    keeps_results = 2

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        super().__init__(base, r, alpha, dropout, init, **options)
        with gathered_weights(base):
            self.lora_magnitude = nn.Parameter(self.norm())

    def direction(self) -> torch.Tensor:
        """Return V (d_out, d_in) in at least fp32.

        It is built in place, so no second tensor of this size is needed.
        """
        A, B = self.factors()
        dtype = at_least_fp32(A.dtype)
        V = self.base.weight.detach().to(dtype, copy=True)
        return V.addmm_(B.to(dtype), A.to(dtype), alpha=self.scale)

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Return ||V|| (d_out), which is a constant for the gradient."""
        return torch.linalg.vector_norm(self.direction(), dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        dropped = self.dropout(x)
        base_part = y
        if self.training and self.dropout.p:
            base_part = self.base(dropped)
        if self.base.bias is not None:
            base_part = base_part - self.base.bias    # g scales the weight, not the bias.
        A, B = self.factors()
        update = self.scale * F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))
        g = self.lora_magnitude / self.norm()         # (d_out,) in at least fp32
        return y + (g - 1).to(y.dtype) * base_part + g.to(y.dtype) * update

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        g = self.lora_magnitude / self.norm()
        V = self.direction()
        return g.to(V.dtype)[:, None] * V - self.base.weight.to(V.dtype)


LAYERS = {nn.Linear: DoRALinear}        # The paper does not treat embeddings.
