"""LoRA layers (Hu et al. 2021): a held, frozen base and a low-rank update beside it."""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def lora_layers(model):
    """{path: layer} of the adapter layers in `model`."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALayer)}


def like(layer):
    """A tensor of the dtype and on the device that `layer` computes with, at no cost."""
    return layer.like if hasattr(layer, "like") else layer.weight             # a quantised one makes its weight each time


def with_weight(layer, weight):
    """A layer as `layer` is, with another weight, frozen; the two share all else."""
    if hasattr(layer, "with_weight"):
        return layer.with_weight(weight)
    other = copy.copy(layer)
    other._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return other


class LoRALayer(nn.Module):
    """What every adapter layer shares: the base, factors and scale, the switch, merge and unmerge.

    A subclass has `forward` and `delta()`, the update in the base weight's shape.  What more there is to a method
    it says by overriding the values that stand first here and the methods that stand last and do nothing, so that
    nothing outside of its file has to know it.
    Raises ValueError for an r that the layer is too small for, or settings that the method does not have.
    """
    options = {}                 # settings of the method's own and their defaults; an adapter's file carries them
    default_dropout = 0.05
    frozen = ()                  # names of parameters beside the base that are not trained
    keeps_input = True           # for its backward pass: x, as wide as the layer reads; or else only what is r wide
    keeps_results = 0            # for its backward pass: how many tensors as wide as the layer's result

    def __init__(self, base, r, alpha, dropout, **options):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.alpha = r, alpha
        self.dropout = nn.Dropout(dropout)
        self.settings = self.settled(options)
        self.enabled, self.merged = True, False

    def trained(self, *shape):
        """A parameter of zeros: fp32 (fp64 over an fp64 base), since in 16 bit the optimizer's small steps round away."""
        wide = torch.promote_types(like(self.base).dtype, torch.float32)
        return nn.Parameter(torch.zeros(shape, device=like(self.base).device, dtype=wide))

    def add_factors(self, d_in, d_out):
        if not 1 <= self.r <= min(d_in, d_out):
            raise ValueError(f"r is {self.r}, must be 1 to {min(d_in, d_out)} for a layer of {d_out} x {d_in}")
        self.lora_A, self.lora_B = self.trained(self.r, d_in), self.trained(d_out, self.r)

    def factors(self):
        """A (r, d_in) and B (d_out, r) as they are used."""
        return self.lora_A, self.lora_B

    @property
    def scale(self):
        return self.alpha / self.r

    def product(self):
        """scale B A in at least fp32, also where the whole model was cast to less."""
        A, B = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scale * (B.to(wide) @ A.to(wide))

    @torch.no_grad()
    def merge(self, keep_base=True):
        """Put base + delta in the base's place.  The sum is made in fp32 and stored in the base's dtype.

        The base itself is kept until `unmerge`, unless keep_base is False.  Returns (kept . delta, delta . delta), kept
        being what the stored weight moved by: their ratio is the share of the update that survived the rounding.
        Raises ValueError when merged already.
        """
        if self.merged:
            raise ValueError("the adapter is merged already; a second merge would add it twice")
        delta = self.delta()
        own = self.base.dequantize(delta.dtype) if hasattr(self.base, "dequantize") else self.base.weight.to(delta.dtype)
        merged = (own + delta).to(like(self.base).dtype)
        self.own = (self.base if keep_base else None,)          # in a tuple: a bare module would be registered
        self.base = with_weight(self.base, merged)              # another one: a tied matrix keeps its weight
        self.merged = True
        kept = merged.to(delta.dtype) - own
        return (kept * delta).sum().item(), delta.square().sum().item()

    def unmerge(self):
        """Give the layer its own base back: the very one, so bit for bit, as no subtraction would."""
        if not self.merged:
            raise ValueError("the adapter is not merged")
        if self.own[0] is None:
            raise ValueError("the base's own weights were not kept")
        self.base = self.own[0].to(self.base.weight)            # where the model was moved or cast meanwhile
        del self.own
        self.merged = False

    @classmethod
    def settled(cls, options):
        """`options` and, where they say nothing, the defaults.  Raises ValueError for a name or type it does not know."""
        for name, value in options.items():
            if name not in cls.options:
                raise ValueError(f"unknown option {name!r}; there is {', '.join(cls.options) or 'none'}")
            kind = type(cls.options[name])
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"{name} is {value!r}, must be like {cls.options[name]!r}")
            if kind is not str and isinstance(value, int) and abs(value) > 2 ** 64:
                raise ValueError(f"{name} is out of range")
        return {**cls.options, **options}

    @classmethod
    def check(cls, config):
        """Raise ValueError for a LoRAConfig that the method cannot have."""

    @classmethod
    def connect(cls, layers, config):
        """Called once when all `layers` of a model stand: for what they share.  `config` is what will be saved."""

    def begin_step(self, step, loss):
        """Called before optimizer step `step` (from 1) with the last one's loss over all ranks; returns what to log."""
        return {}

    def after_step(self):
        """Called when the optimizer has stepped."""

    def state(self):
        """What else of the method has changed since it began, beside its tensors, for a run that goes on."""
        return {}

    def load_state(self, state):
        """Take back what `state` gave."""


class LoRALinear(LoRALayer):
    """y = W0 x + (alpha / r) B A dropout(x), W0 frozen (LoRA, Hu et al. 2021, eq. 3).

    base: nn.Linear (d_out, d_in).  lora_A (r, d_in) starts random: "kaiming" is uniform as in loralib and PEFT,
    "gaussian" is N(0, 1/r^2) in the paper's manner.  lora_B (d_out, r) starts at zero, so the layer equals its
    base until the first step.  Dropout acts on the adapter's input alone.  x (..., d_in) -> (..., d_out).
    """

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming", **options):
        super().__init__(base, r, alpha, dropout, **options)
        self.add_factors(base.in_features, base.out_features)
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        # The adapter comes down to x's dtype; x going up to fp32 would be kept for backward, twice the size.
        A, B = (factor.to(x.dtype) for factor in self.factors())
        return y + self.scale * F.linear(F.linear(self.dropout(x), A), B)

    def delta(self):
        return self.product()                                             # (d_out, d_in)


class LoRAEmbedding(LoRALayer):
    """y = W0[t] + (alpha / r) B A[:, t] for token t: the same update for a table looked up by row.

    base: nn.Embedding (V, D).  As in loralib, lora_A (r, V) starts at zero and lora_B (D, r) at N(0, 1), the
    other way round: column t of A belongs to token t alone, so a token that training never meets keeps its
    base vector.  There is no input to drop from, so no dropout.  t (...) int64 -> (..., D).
    """

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming", **options):
        super().__init__(base, r, alpha, 0.0, **options)
        self.add_factors(base.num_embeddings, base.embedding_dim)
        nn.init.normal_(self.lora_B)

    def forward(self, tokens):
        y = self.base(tokens)
        if self.merged or not self.enabled:
            return y
        A, B = self.factors()
        looked_up = F.embedding(tokens, A.T, self.base.padding_idx)               # (..., r)
        return y + (self.scale * F.linear(looked_up, B)).to(y.dtype)

    def delta(self):
        return self.product().T                                           # (V, D)


LAYERS = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}                     # base layer -> adapter layer
