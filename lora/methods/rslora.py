"""rsLoRA (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA")."""
import math

import torch.nn as nn

from ..layers import LoRAEmbedding, LoRALinear


class RSLoRA:
    """y = W0 x + (alpha / sqrt(r)) B A dropout(x)  (rsLoRA, theorem 3.2), with W0 frozen.

    B A x is a sum of r terms, which grows as a sum of random numbers does: with sqrt(r).  With the
    scale alpha / r the update and its gradient therefore shrink as the rank grows, and a higher
    rank learns no more.  1 / sqrt(r) is the only power of r at which they neither vanish nor
    explode as r grows.

    The same alpha is a larger scale here: rsLoRA with alpha / sqrt(r) is LoRA with alpha.
    All else is LoRA's: shapes, starting state (equal to the base to the bit), merge and errors.
    """

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.r)


class RSLoRALinear(RSLoRA, LoRALinear):
    """x (..., d_in) -> y (..., d_out), over an nn.Linear with the weight (d_out, d_in)."""


class RSLoRAEmbedding(RSLoRA, LoRAEmbedding):
    """t (...) int64 -> y (..., D), over an nn.Embedding with the weight (V, D)."""


LAYERS = {nn.Linear: RSLoRALinear, nn.Embedding: RSLoRAEmbedding}
