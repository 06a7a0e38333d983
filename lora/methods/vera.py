"""VeRA (Kopiczko et al. 2023): one frozen random pair A, B for the whole model, and two trained vectors a layer."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers import LoRALayer, like

WIDEST = 2 ** 14                 # r: nothing of a layer bounds it, and the pair is as large as it says


class Pair(nn.Module):
    """A (r, d_in) and B (d_out, r), as large as the largest layer needs: uniform within sqrt(6 / columns) (Kaiming).

    Drawn on the CPU in fp32, so that a seed gives the same pair on every device and in every dtype (and PEFT's
    with projection_prng_key).  Held in `like`'s dtype as all that is frozen, and in files only where `stored`.
    """

    def __init__(self, r, d_in, d_out, seed, stored, like):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("lora_A", (r, d_in)), ("lora_B", (d_out, r))):
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))          # in this order, for PEFT's very bits
            drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(like), persistent=stored)


class VeRALinear(LoRALayer):
    """y = W0 x + b * B (d * (A dropout(x))), with A, B and W0 frozen; vectors b and d are trained (VeRA, eq. 2).

    base: nn.Linear (d_out, d_in).  A is the first d_in columns of the shared pair's, B the first d_out rows.
    lora_d (r) starts at `d_init`, lora_b (d_out) at zero, so the layer equals its base until the first step.
    r is a width of frozen numbers: it may exceed the layer's, and costs one trained number each.  There is no
    alpha (b and d are the scale; the config's is not used) and one way to draw the pair.  Vectors this few want
    a larger learning rate, about ten times LoRA's.  x (..., d_in) -> (..., d_out).

    options: seed of the pair, d_init, stored (the pair in the adapter's file too, where a seed will not do).
    Raises ValueError for a seed or an r out of range.  An embedding has no form in the paper.
    """
    options = {"seed": 0, "d_init": 0.1, "stored": False}
    keeps_input, keeps_results = False, 1                         # A is frozen; b needs what it multiplies

    @classmethod
    def check(cls, config):
        if not 0 <= config.options["seed"] < 2 ** 63:
            raise ValueError(f"seed is {config.options['seed']}, must be from 0 to below 2^63")
        if config.r > WIDEST:
            raise ValueError(f"r is {config.r}, must be 1 to {WIDEST}")
        if not config.options["d_init"] or not math.isfinite(config.options["d_init"]):
            raise ValueError(f"d_init is {config.options['d_init']}, must be finite and not 0: nothing would get a gradient")

    @classmethod
    def connect(cls, layers, config):
        d_in, d_out = max(layer.base.in_features for layer in layers), max(layer.base.out_features for layer in layers)
        pair = Pair(config.r, d_in, d_out, config.options["seed"], config.options["stored"], like(layers[0].base))
        layers[0].pair = pair                                     # one module owns it: moved, cast and saved once
        for layer in layers:
            layer.shared = (pair,)                                # in a tuple: seen by all, registered by none

    def __init__(self, base, r, alpha=None, dropout=0.0, init="kaiming", **options):
        super().__init__(base, r, alpha, dropout, **options)
        self.lora_d, self.lora_b = self.trained(r), self.trained(base.out_features)
        nn.init.constant_(self.lora_d, self.settings["d_init"])

    def factors(self):
        pair, = self.shared
        return pair.lora_A[:, :self.base.in_features], pair.lora_B[:self.base.out_features]

    def forward(self, x):
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        A, B = (factor.to(x.dtype) for factor in self.factors())
        projected = F.linear(self.dropout(x), A)                  # (..., r)
        return y + self.lora_b.to(y.dtype) * F.linear(self.lora_d.to(y.dtype) * projected, B)

    def delta(self):
        wide = torch.promote_types(self.lora_d.dtype, torch.float32)
        A, B = (factor.to(wide) for factor in self.factors())
        return (self.lora_b.to(wide)[:, None] * B) @ (self.lora_d.to(wide)[:, None] * A)      # (d_out, d_in)


LAYERS = {nn.Linear: VeRALinear}
