"""Starts of A and B that know the weight, for lora and rslora: PiSSA, OLoRA and LoftQ.

    python train.py --method-options start=pissa

LoftQ chooses the codes of a quantised base too: its other part is in loftq.py.
"""
import math
from dataclasses import replace

import torch
import torch.nn as nn

from .matrices import gathered_weights

LOFTQ = "loftq"


def pissa(W: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, d_in) and B (d_out, r) with scale * B A = the part of W nearest to it at rank r.

    W (d_out, d_in).  This part has the r largest singular values, and A and B get the root of each
    (PiSSA, Meng et al. 2024, eq. 2 and 3).
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    roots = (S[:r] / scale).sqrt()
    return roots[:, None] * Vh[:r], U[:, :r] * roots


def olora(W: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, d_in), the first rows of R, and B (d_out, r), the first columns of Q; W = Q R.

    W (d_out, d_in).  No scale enters, as in PEFT (OLoRA, Buyukakyildiz 2024).
    """
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


FROM_WEIGHT = {"pissa": pissa, "olora": olora}


class Start:
    """y = W0 x + s (B A - B0 A0) dropout(x), where A0 and B0 are A and B at the start.

    The papers take s B0 A0 out of the weight.  Here it is taken out of the update.  So the base
    stays as it is, also a quantised one, and the layer equals it to the bit until the first step.
    The update is a LoRA of rank 2 r:

        B A - B0 A0 = (B - B0) A + B0 (A - A0)

    The differences are taken in fp32, so a forward pass in 16 bits does not lose them.

    With loftq it is y = Q x + s B A dropout(x).  Q = q(W0 - B0 A0) is the base, and A0 and B0 only
    serve to build Q again.

    lora_A0 (r, d_in) and lora_B0 (d_out, r) are frozen, and adapter files hold them.  init="none"
    leaves them zero, for values that are loaded afterwards.
    Raises ValueError for a base that LoftQ did not quantise, where it should have, or the reverse.
    """
    options = {"start": "random"}
    frozen = ("lora_A0", "lora_B0")

    @classmethod
    def complete_options(cls, options):
        """Leave out LoRA's own start, so that files of plain adapters do not mention this page."""
        options = super().complete_options(options)
        if options["start"] == "random":
            del options["start"]
        return options

    @classmethod
    def check(cls, config):
        super().check(config)
        if "start" not in config.options:
            return
        start = config.options["start"]
        if start not in (*FROM_WEIGHT, LOFTQ):
            raise ValueError(f"start is {start!r}, must be random, {', '.join(FROM_WEIGHT)} or "
                             f"{LOFTQ}")
        if "all" in config.targets:
            raise ValueError(f"start={start} is for matrices, and all means the embeddings too; "
                             "name the targets, as in wq,wk,wv,wo,w1,w2,w3")

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        super().__init__(base, r, alpha, dropout, init, **options)
        start = self.settings.get("start")
        pair = getattr(base, "loftq_pair", None)
        if start == LOFTQ and (pair is None or len(pair[0]) != r):
            raise ValueError("start=loftq needs a base that is quantised for it and its r: "
                             "--quantize int8 or nf4, and targets inside the blocks")
        if start:
            A, B, A0, B0 = self.at_start(start, init)
            self.lora_A = nn.Parameter(A)
            self.lora_B = nn.Parameter(B)
            self.lora_A0 = nn.Parameter(A0, requires_grad=False)
            self.lora_B0 = nn.Parameter(B0, requires_grad=False)

    @torch.no_grad()
    def at_start(self, start: str, init: str) -> tuple[torch.Tensor, ...]:
        """Return A, B, A0 and B0."""
        if start == LOFTQ:
            A0, B0 = self.base.loftq_pair
            A, B = getattr(self.base, "loftq_rest", (A0, B0))
            root = math.sqrt(self.scale)
            # Copied, as all below: what is loaded into A0 and B0 must not change the base's pair.
            # And where A is: the base may have moved since it was read.
            return tuple(tensor.to(self.lora_A.device, copy=True)
                         for tensor in (A / root, B / root, A0, B0))
        A = self.lora_A.detach()
        B = self.lora_B.detach()
        if init == "none":
            return A, B, torch.zeros_like(A), torch.zeros_like(B)
        values = self.from_base()
        A.copy_(values["lora_A0"])
        B.copy_(values["lora_B0"])
        return A, B, A.clone(), B.clone()

    @torch.no_grad()
    def from_base(self) -> dict[str, torch.Tensor]:
        """Return the A0 and B0 of pissa or olora, computed from the weight as it is now."""
        make = FROM_WEIGHT[self.settings["start"]]
        with gathered_weights(self.base):
            A0, B0 = make(self.base.weight.detach().to(self.lora_A.dtype), self.r, self.scale)
        # They are copied, because a slice would keep the whole factor of W in memory.
        return {"lora_A0": A0.clone(), "lora_B0": B0.clone()}

    @classmethod
    def connect(cls, layers, config):
        """Free what only the constructors needed."""
        super().connect(layers, config)
        for layer in layers:
            vars(layer.base).pop("loftq_rest", None)

    def factors(self):
        if self.settings.get("start") not in FROM_WEIGHT:
            return super().factors()
        return rank_2r(self.lora_A, self.lora_B, self.lora_A0, self.lora_B0)

    def _load_from_state_dict(self, state, prefix, *rest):
        """Refuse values for which the base was not quantised."""
        if self.settings.get("start") == LOFTQ and f"{prefix}lora_A0" in state:
            expected = (self.lora_B0 @ self.lora_A0).cpu()
            product = state[f"{prefix}lora_B0"].cpu() @ state[f"{prefix}lora_A0"].cpu()
            # On another machine LoftQ's own result differs in the last digits.
            if (product - expected).norm() > 1e-3 * expected.norm():
                raise ValueError(f"{prefix[:-1]}: the base was quantised for another adapter with "
                                 "start=loftq")
        super()._load_from_state_dict(state, prefix, *rest)


def rank_2r(A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor,
            B0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (2 r, d_in) and (d_out, 2 r) of B A - B0 A0."""
    return torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)


def offered_by(layers: dict) -> dict:
    """Return a method's {type of base: adapter layer}, its linear layer with the option `start`."""
    linear = layers[nn.Linear]
    return layers | {nn.Linear: type(linear.__name__, (Start, linear), {})}


def as_plain_lora(adapter: dict) -> dict:
    """Return an adapter with start=pissa or olora as plain LoRA of rank 2 r over the same base.

    adapter: as read_adapter returns it.  Other adapters are returned as they are.
    """
    config = adapter["config"]
    if config.options.get("start") not in FROM_WEIGHT:
        return adapter
    tensors = {}
    for path in sorted({name.rpartition(".")[0] for name in adapter["tensors"]}):
        parts = [adapter["tensors"][f"{path}.lora_{name}"] for name in ("A", "B", "A0", "B0")]
        tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = rank_2r(*parts)
    # The scale, alpha / r or alpha / sqrt(r), must stay the same.
    growth = 2 if config.method == "lora" else math.sqrt(2)
    config = replace(config, r=2 * config.r, alpha=growth * config.alpha, options={})
    return {**adapter, "config": config, "tensors": tensors}
