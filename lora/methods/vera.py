"""VeRA (Kopiczko et al. 2023): one frozen random pair A, B, and two trained vectors per layer."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..lora_layer import LoRALayer, at_least_fp32, reference_tensor

LARGEST_R = 2 ** 14             # No layer bounds r, and the pair's size grows with it.


class Pair(nn.Module):
    """A (r, d_in) and B (d_out, r), uniform within +-sqrt(6 / columns) (Kaiming), never trained.

    Both are drawn on the CPU in fp32, so a seed gives the same pair for every device and dtype, and
    PEFT's for the same projection_prng_key.  Both get the dtype and the device of `reference`.
    Adapter files hold them only with the option `stored`.
    """

    def __init__(self, config, d_in: int, d_out: int, reference: torch.Tensor):
        super().__init__()
        rng = torch.Generator().manual_seed(config.options["seed"])
        for name, rows, columns in (("lora_A", config.r, d_in), ("lora_B", d_out, config.r)):
            # In this order of operations the numbers equal PEFT's to the bit.
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
            values = torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=rng)
            self.register_buffer(name, values.to(reference), persistent=config.options["stored"])


class VeRALinear(LoRALayer):
    """y = W0 x + b * B (d * (A dropout(x))), with W0, A, B frozen, b and d trained (VeRA, eq. 2).

    base: nn.Linear with the weight W0 (d_out, d_in).  x (..., d_in) -> y (..., d_out).
    A is the first d_in columns and B the first d_out rows of the pair that all layers share.
    lora_d (r) starts at `d_init` and lora_b (d_out) at zero, so at first the layer equals its base.
    r may exceed the layer's width: raising it by 1 adds only one trained number, in d.
    alpha and init are not used: b and d are the scale, and the pair is drawn in one way only.
    So few trained numbers need a larger learning rate, about ten times LoRA's.

    options: seed of the pair; d_init; stored: write the pair to adapter files too, for readers that
    cannot draw it from the seed.  Raises ValueError for a seed, r or d_init out of range.
    """
    options = {"seed": 0, "d_init": 0.1, "stored": False}
    keeps_input = False         # A needs no gradient.
    keeps_results = 1           # The gradient of b needs what b scales.

    @classmethod
    def check(cls, config):
        d_init = config.options["d_init"]
        if not 0 <= config.options["seed"] < 2 ** 63:
            raise ValueError(f"seed is {config.options['seed']}, must be from 0 to below 2^63")
        if config.r > LARGEST_R:
            raise ValueError(f"r is {config.r}, must be 1 to {LARGEST_R}")
        if not d_init or not math.isfinite(d_init):
            raise ValueError(f"d_init is {d_init}, must be finite and not 0: nothing would learn")

    @classmethod
    def connect(cls, layers, config):
        d_in = max(layer.base.in_features for layer in layers)
        d_out = max(layer.base.out_features for layer in layers)
        pair = Pair(config, d_in, d_out, reference_tensor(layers[0].base))
        layers[0].pair = pair           # One module registers it: it is moved, cast and saved once.
        for layer in layers:
            layer.shared = (pair,)      # All layers see it, but nn.Module registers no tuple.

    def __init__(self, base: nn.Linear, r: int, alpha: float | None = None, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        super().__init__(base, r, alpha, dropout, **options)
        self.lora_d = self.trainable_zeros(r)
        self.lora_b = self.trainable_zeros(base.out_features)
        nn.init.constant_(self.lora_d, self.settings["d_init"])

    def factors(self):
        pair = self.shared[0]
        return pair.lora_A[:, :self.base.in_features], pair.lora_B[:self.base.out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        A, B = self.factors()
        projected = F.linear(self.dropout(x), A.to(x.dtype))      # (..., r)
        update = F.linear(self.lora_d.to(y.dtype) * projected, B.to(x.dtype))
        return y + self.lora_b.to(y.dtype) * update

    def delta(self) -> torch.Tensor:
        dtype = at_least_fp32(self.lora_d.dtype)
        A, B = self.factors()
        b = self.lora_b.to(dtype)[:, None]
        d = self.lora_d.to(dtype)[:, None]
        return (b * B.to(dtype)) @ (d * A.to(dtype))              # (d_out, d_in)


LAYERS = {nn.Linear: VeRALinear}        # The paper does not treat embeddings.
