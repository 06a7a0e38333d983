"""The LoRA layers (Hu et al. 2021): a frozen layer and a trained update of low rank beside it.

What all adapter layers share is in lora_layer.py: the scale, merging, and the hooks of a method.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .lora_layer import LoRALayer, check_rank


class LoRALinear(LoRALayer):
    """y = W0 x + (alpha / r) B A dropout(x), with W0 frozen (LoRA, Hu et al. 2021, eq. 3).

    base: nn.Linear with the weight W0 (d_out, d_in).  x (..., d_in) -> y (..., d_out).

    lora_A (r, d_in) starts random.  init="kaiming" draws it uniformly within +-1 / sqrt(d_in), as
    loralib and PEFT do; init="gaussian" draws it from N(0, 1 / r^2), a Gaussian as in the paper.
    lora_B (d_out, r) starts at zero, so the layer equals its base until the first step.
    Dropout acts on the adapter's input only; the base reads x as it is.
    Raises ValueError unless 1 <= r <= min(d_in, d_out).
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        super().__init__(base, r, alpha, dropout, **options)
        check_rank(r, base.in_features, base.out_features)
        self.lora_A = self.trainable_zeros(r, base.in_features)
        self.lora_B = self.trainable_zeros(base.out_features, r)
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        # A and B are cast down to x's dtype.  Casting x up to fp32 would make autograd keep
        # a second x, twice as large, for the backward pass.
        A, B = self.factors()
        inner = F.linear(self.dropout(x), A.to(x.dtype))      # (..., r)
        # The scale meets the r numbers between A and B, not the d_out behind B.
        return y + F.linear(self.scale * inner, B.to(x.dtype))

    def delta(self) -> torch.Tensor:
        return self.product()                         # (d_out, d_in)


class LoRAEmbedding(LoRALayer):
    """y = W0[t] + (alpha / r) B A[:, t] for a token t: LoRA for a table that is read by row.

    base: nn.Embedding with the weight W0 (V, D).  t (...) int64 -> y (..., D).

    The starting values are loralib's: lora_A (r, V) is zero and lora_B (D, r) is N(0, 1), the
    reverse of LoRALinear.  Column t of A belongs to token t alone, so a token that never occurs in
    training keeps its base vector.  `dropout` has no effect, because the input is a row number;
    `init` has no effect either.
    Raises ValueError unless 1 <= r <= min(V, D).
    """

    def __init__(self, base: nn.Embedding, r: int, alpha: float, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        super().__init__(base, r, alpha, 0.0, **options)
        check_rank(r, base.num_embeddings, base.embedding_dim)
        self.lora_A = self.trainable_zeros(r, base.num_embeddings)
        self.lora_B = self.trainable_zeros(base.embedding_dim, r)
        nn.init.normal_(self.lora_B)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.base(tokens)
        if self.merged or not self.enabled:
            return y
        A, B = self.factors()
        columns = F.embedding(tokens, A.T, self.base.padding_idx)                 # (..., r)
        return y + F.linear(self.scale * columns.to(y.dtype), B.to(y.dtype))

    def delta(self) -> torch.Tensor:
        return self.product().T                       # (V, D)


LAYERS = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}     # Type of base: adapter layer.


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return {path: layer} of the adapter layers in `model`."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer):
            layers[path] = module
    return layers
