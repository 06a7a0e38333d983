"""rsLoRA (Kalajdzievski 2023): LoRA whose scale falls with the square root of its rank."""
import math

import torch.nn as nn

from ..layers import LoRAEmbedding, LoRALinear


class RSLoRA:
    """y = W0 x + (alpha / sqrt(r)) B A dropout(x) ("A Rank Stabilization Scaling Factor", theorem 3.2).

    The r terms of B A x add up like random numbers do, with sqrt(r).  So under alpha / r the update and its
    gradient shrink as the rank grows, and more rank learns no more; 1 / sqrt(r) is the one power of r at which
    neither vanishes nor explodes.  All else is LoRA: shapes, starting state (the base, bit for bit), merge, errors.
    alpha means something else now: what LoRA does with alpha, rsLoRA does with alpha / sqrt(r).
    """

    @property
    def scale(self):
        return self.alpha / math.sqrt(self.r)


class RSLoRALinear(RSLoRA, LoRALinear):
    """x (..., d_in) -> (..., d_out), over nn.Linear (d_out, d_in)."""


class RSLoRAEmbedding(RSLoRA, LoRAEmbedding):
    """t (...) int64 -> (..., D), over nn.Embedding (V, D)."""


LAYERS = {nn.Linear: RSLoRALinear, nn.Embedding: RSLoRAEmbedding}
