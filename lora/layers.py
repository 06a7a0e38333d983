"""LoRA layers (Hu et al. 2021): a held, frozen base and a low-rank update beside it."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALayer(nn.Module):
    """What every adapter layer shares: the base, the scale alpha / r, the switch, merge and unmerge.

    A subclass fills lora_A and lora_B and has `forward` and `delta()`, the update in the base weight's shape.  The
    two are fp32 (fp64 over an fp64 base) whatever the base is: in 16 bit the optimizer's small steps would round away.
    Raises ValueError unless 1 <= r <= the base's smaller side.
    """

    def __init__(self, base, d_in, d_out, r, alpha, dropout):
        super().__init__()
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"r is {r}, must be 1 to {min(d_in, d_out)} for a layer of {d_out} x {d_in}")
        self.base = base.requires_grad_(False)
        self.r, self.alpha = r, alpha
        self.dropout = nn.Dropout(dropout)
        self.enabled, self.merged = True, False
        like = dict(device=base.weight.device, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.zeros(r, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, r, **like))

    @property
    def scale(self):
        return self.alpha / self.r

    def product(self):
        """(alpha / r) B A in at least fp32, also where the whole model was cast to less."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scale * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    @torch.no_grad()
    def merge(self):
        """Put base + delta in the base's place.  The sum is made in fp32 and stored in the base's dtype.

        The base's own weight is kept until `unmerge`.  Returns (kept . delta, delta . delta), kept being what
        the stored weight moved by: their ratio is the share of the update that survived the rounding.
        Raises ValueError when merged already.
        """
        if self.merged:
            raise ValueError("the adapter is merged already; a second merge would add it twice")
        own, delta = self.base.weight, self.delta()
        merged = (own.to(delta.dtype) + delta).to(own.dtype)
        self.own = (own,)                                       # in a tuple: a bare Parameter would be registered
        self.base.weight = nn.Parameter(merged, requires_grad=False)      # a new one: a tied matrix keeps the old
        self.merged = True
        kept = merged.to(delta.dtype) - own.to(delta.dtype)
        return (kept * delta).sum().item(), delta.square().sum().item()

    def unmerge(self):
        """Give the base its own weight back: the very tensor, so bit for bit, as no subtraction would."""
        if not self.merged:
            raise ValueError("the adapter is not merged")
        (own,), merged = self.own, self.base.weight
        if (own.device, own.dtype) != (merged.device, merged.dtype):      # the model was moved or cast meanwhile
            own = nn.Parameter(own.to(merged), requires_grad=False)
        self.base.weight = own
        del self.own
        self.merged = False


class LoRALinear(LoRALayer):
    """y = W0 x + (alpha / r) B A dropout(x), W0 frozen (LoRA, Hu et al. 2021, eq. 3).

    base: nn.Linear (d_out, d_in).  lora_A (r, d_in) starts random: "kaiming" is uniform as in loralib and PEFT,
    "gaussian" is N(0, 1/r^2) in the paper's manner.  lora_B (d_out, r) starts at zero, so the layer equals its
    base until the first step.  Dropout acts on the adapter's input alone.  x (..., d_in) -> (..., d_out).
    """

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming"):
        super().__init__(base, base.in_features, base.out_features, r, alpha, dropout)
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        # The adapter comes down to x's dtype; x going up to fp32 would be kept for backward, twice the size.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + self.scale * F.linear(F.linear(self.dropout(x), A), B)

    def delta(self):
        return self.product()                                             # (d_out, d_in)


class LoRAEmbedding(LoRALayer):
    """y = W0[t] + (alpha / r) B A[:, t] for token t: the same update for a table looked up by row.

    base: nn.Embedding (V, D).  As in loralib, lora_A (r, V) starts at zero and lora_B (D, r) at N(0, 1), the
    other way round: column t of A belongs to token t alone, so a token that training never meets keeps its
    base vector.  There is no input to drop from, so no dropout.  t (...) int64 -> (..., D).
    """

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming"):
        super().__init__(base, base.num_embeddings, base.embedding_dim, r, alpha, 0.0)
        nn.init.normal_(self.lora_B)

    def forward(self, tokens):
        y = self.base(tokens)
        if self.merged or not self.enabled:
            return y
        looked_up = F.embedding(tokens, self.lora_A.T, self.base.padding_idx)     # (..., r)
        return y + (self.scale * F.linear(looked_up, self.lora_B)).to(y.dtype)

    def delta(self):
        return self.product().T                                           # (V, D)
