"""LoftQ (Li et al. 2023): the codes of a quantised base and the start of A and B fit each other.

    python train.py --method-options start=loftq --quantize nf4

Quantisation rounds W away from itself, and LoRA starts with that error.  LoftQ looks for codes q
and factors with q + B A near W.  It needs W, so it works while the base is read.
"""
from collections.abc import Callable

import torch
import torch.nn as nn

from . import quantize
from .adapter import LoRAConfig
from .lora_layer import at_least_fp32, with_weight
from .start import LOFTQ, pissa

ROUNDS = 5


def quantizer(kind: str | None, adapter=None) -> Callable | None:
    """Return quantize.quantizer(kind), or for an adapter with start=loftq one that fits it.

    adapter: the LoRAConfig of a new adapter; the content of an adapter file, whose A0 and B0 build
    its base again; or None.
    """
    convert = quantize.quantizer(kind)
    if not convert or not adapter:
        return convert
    is_saved = isinstance(adapter, dict)
    config = LoRAConfig(**adapter["config"]) if is_saved else adapter
    if config.options.get("start") != LOFTQ:
        return convert

    def convert_for_adapter(linear: nn.Linear, path: str) -> quantize.QuantizedLinear:
        if not is_saved:
            is_target = path.rpartition(".")[2] in config.targets
            return loftq(linear, config.r, convert) if is_target else convert(linear)
        pair = [adapter["tensors"].get(f"{path}.lora_{name}") for name in ("A0", "B0")]
        shapes = [(config.r, linear.in_features), (linear.out_features, config.r)]
        # What does not fit is refused when the adapter is loaded.
        fits = [getattr(tensor, "shape", None) for tensor in pair] == shapes
        return quantized_without(linear, *pair, convert) if fits else convert(linear)

    convert_for_adapter.kind = kind
    return convert_for_adapter


@torch.no_grad()
def loftq(linear: nn.Linear, r: int, convert: Callable) -> quantize.QuantizedLinear:
    """Return the quantised layer Q, with the A and B for which Q + B A is near W (algorithm 1).

    Quantisation and SVD take turns: Q = q(W - B A), then B A = the part of W - Q at rank r.
    """
    W = linear.weight.to(at_least_fp32(linear.weight.dtype))
    A = W.new_zeros(r, linear.in_features)
    B = W.new_zeros(linear.out_features, r)
    for _ in range(ROUNDS):
        layer = quantized_without(linear, A, B, convert)
        A, B = pissa(W - layer.dequantize(W.dtype), r, 1.0)
    layer.loftq_rest = A, B
    return layer


def quantized_without(linear: nn.Linear, A0: torch.Tensor, B0: torch.Tensor,
                      convert: Callable) -> quantize.QuantizedLinear:
    """Return Q = q(W - B0 A0), with A0 and B0 for the adapter to keep."""
    W = linear.weight.detach()
    wide = W.to(at_least_fp32(W.dtype))
    # In fp64 on the CPU, so that every device finds the same codes.
    device = "meta" if A0.is_meta else "cpu"
    product = B0.to(device, torch.float64) @ A0.to(device, torch.float64)
    layer = convert(with_weight(linear, wide - product.to(wide))).to(W.dtype)
    layer.loftq_pair = A0.to(wide), B0.to(wide)      # A tuple, which no cast and no file touches.
    layer.adapter_options = {"start": LOFTQ}
    return layer


def check_export(config):
    """Raise ValueError for a LoRAConfig whose adapter means nothing over the original base."""
    if config.options.get("start") == LOFTQ:
        raise ValueError("an adapter with start=loftq belongs to a base that was quantised for it; "
                         "write both as one model: --to hf")
