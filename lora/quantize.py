"""Frozen weights in 8 or 4 bits: int8 per row, and the NF4 of QLoRA (Dettmers et al. 2023)."""
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BLOCK = 64                      # Weights that share a scale (QLoRA, section 3).
GROUP = 256                     # Scales that share a second scale (double quantisation).
TINY = 1e-30                    # The least divisor: it replaces a magnitude of 0.


class QuantizedLinear(nn.Module):
    """y = W x + b, with a frozen W in fewer bits.  x (..., d_in) -> y (..., d_out) in x's dtype,
    or in autocast's.

    A subclass keeps W in buffers and defines `dequantize`.  The buffer `dtype_holder`, one number,
    has the dtype and the device that the model computes with.  `weight` is W in that dtype,
    computed anew on each access.

    Quantise the weight in the dtype of its file, and cast the layer afterwards with `.to(dtype)`.
    A weight that was cast first would give other codes.
    """
    kind = None                 # The name of the format, as in --quantize.
    stands_for = nn.Linear      # LoRA methods treat this layer as one of this type.

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("dtype_holder", linear.weight.detach().new_zeros(()))
        self.bias = linear.bias

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W (d_out, d_in), computed in fp32 and rounded to `dtype` once."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        return self.dequantize(self.dtype_holder.dtype)

    def with_weight(self, weight: torch.Tensor) -> nn.Linear:
        """Return a frozen nn.Linear with this weight and the same bias; a merge needs one."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        """Move all buffers to another device, but cast only `dtype_holder` to another dtype.

        Module.to and Module.half call this.  A cast would lose digits of codes and scales.
        """
        exact = dict(self.named_buffers(recurse=False))
        del exact["dtype_holder"]
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(self.dtype_holder.device))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            # torch.compile would merge backward's second dequantisation with forward's, and keep
            # every W in between.  It computes what is checkpointed twice, as it is told.
            W = checkpoint(self.dequantize, x.dtype, use_reentrant=False, preserve_rng_state=False)
            y = F.linear(x, W)
        else:
            y = DequantizedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias


class DequantizedProduct(torch.autograd.Function):
    """The product W x of a quantised layer.

    The backward pass dequantises W again, so that W is not kept.  W gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.dtype = x.dtype
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        # Under autocast the gradient may be in another dtype than x.
        return (grad @ ctx.layer.dequantize(grad.dtype)).to(ctx.dtype), None


class Int8Linear(QuantizedLinear):
    """W[i, j] = q[i, j] * scale[i]: int8 codes within +-127 and one fp32 scale per row.

    The scale is the row's largest magnitude / 127.  The error of a weight is at most scale / 2.
    """
    kind = "int8"

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        q, scale = int8_codes(linear.weight.detach().float(), dim=1)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.q * self.scale).to(dtype)


class NF4Linear(QuantizedLinear):
    """W = levels[code] * s: one of 16 levels per weight and one scale s per block of 64 weights.

    The blocks are pieces of the flattened W, row after row.  s is the block's largest magnitude.
    Two codes share a byte.  With `double`, s itself is stored in 8 bits (double quantisation):
    s = mean + c * t, with int8 codes c within +-127 and one fp32 t per 256 blocks.

    This takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight, or 4.5 without `double`.  The
    error of a weight is at most 0.152 s, half the widest gap between levels, plus the error from
    the rounding of s to 8 bits.
    """
    kind = "nf4"

    def __init__(self, linear: nn.Linear, double: bool = True):
        super().__init__(linear)
        blocks = rows_of(linear.weight.detach().float().flatten(), BLOCK)
        largest = blocks.abs().amax(1)
        if double:
            mean = largest.mean()
            c, t = int8_codes(rows_of(largest - mean, GROUP), dim=1)
            self.register_buffer("c", c.flatten()[:len(largest)].clone())
            self.register_buffer("t", t.flatten())
            self.register_buffer("mean", mean)
        else:
            self.register_buffer("s", largest)
        levels = nf4_levels().to(blocks.device)
        midpoints = (levels[1:] + levels[:-1]) / 2
        divisors = largest[:, None].clamp(min=TINY)
        nearest = torch.bucketize(blocks / divisors, midpoints, out_int32=True)
        codes = nearest.to(torch.uint8).flatten()
        self.register_buffer("codes", codes[::2] * 16 + codes[1::2])
        # The two levels of each possible byte.  nf4_levels gives them, so no file stores them.
        self.register_buffer("pairs", torch.cartesian_prod(levels, levels), persistent=False)

    def scales(self) -> torch.Tensor:
        """Return the scale of each block, (blocks,) in fp32."""
        if hasattr(self, "s"):
            return self.s
        return self.mean + self.c * self.t.repeat_interleave(GROUP)[:len(self.c)]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        unpack = scaled_levels
        if self.codes.is_cuda and not torch.compiler.is_compiling():
            unpack = compiled_levels(self.codes.device)
        blocks = unpack(self.codes, self.pairs, self.scales(), dtype)
        size = self.out_features * self.in_features
        return blocks.flatten()[:size].view(self.out_features, self.in_features)


def scaled_levels(codes: torch.Tensor, pairs: torch.Tensor, scales: torch.Tensor,
                  dtype: torch.dtype) -> torch.Tensor:
    """Return the weights of NF4 in blocks, (blocks, BLOCK) in `dtype`.

    codes: two per byte.  pairs (256, 2): the levels of each byte.  scales (blocks,).
    """
    units = F.embedding(codes.int(), pairs).view(-1, BLOCK)
    # In place, because `units` is a new tensor and as large as the weight.
    return units.mul_(scales[:, None]).to(dtype)


@functools.cache
def compiled_levels(device: torch.device) -> Callable:
    """Return scaled_levels as one kernel for a GPU, which stores nothing in between.

    The result is the same to the bit: each weight is one product, rounded once.  Where torch cannot
    compile for the GPU, a warning says so and scaled_levels itself is returned.
    """
    in_one_kernel = torch.compile(scaled_levels, dynamic=True)
    codes = torch.zeros(BLOCK, dtype=torch.uint8, device=device)
    try:
        in_one_kernel(codes, codes.new_zeros(256, 2).float(), codes[:2].float(), torch.float32)
    except Exception as error:                       # Triton, a C compiler or Python.h is missing.
        reason = str(error).partition("\n")[0]
        warnings.warn(f"NF4 is dequantised without torch.compile, and slower: {reason}",
                      stacklevel=2)
        return scaled_levels
    return in_one_kernel


KINDS = {layer.kind: layer for layer in (Int8Linear, NF4Linear)}


def quantizer(kind: str | None) -> Callable | None:
    """Return a function that quantises an nn.Linear; None for "none" or None.

    It takes the layer and the layer's path, which only LoftQ needs (loftq.py).
    Raises ValueError for an unknown kind.
    """
    if kind not in (None, "none", *KINDS):
        raise ValueError(f"unknown quantisation {kind!r}, must be none, {' or '.join(KINDS)}")
    if kind not in KINDS:
        return None

    def convert(linear: nn.Linear, path: str = "") -> QuantizedLinear:
        return KINDS[kind](linear)

    convert.kind = kind
    return convert


def dequantize(model: nn.Module):
    """Replace each quantised layer by an nn.Linear with exactly the weight it computes with."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(path, layer.with_weight(layer.weight))


def in_int8(tensors: dict) -> tuple[dict, dict]:
    """Return ({name: tensor}, {name: scale}) of an adapter whose A and B are stored in int8.

    Each of the r terms of B A has one fp32 scale in A and one in B: a row of A, a column of B.
    All other tensors stay as they are.  tensor * scale differs from the original by at most half a
    scale.
    """
    stored = {}
    scales = {}
    for name, tensor in tensors.items():
        if name.endswith("lora_A"):
            stored[name], scales[name] = int8_codes(tensor, dim=1)
        elif name.endswith("lora_B"):
            stored[name], scales[name] = int8_codes(tensor, dim=0)
        else:
            stored[name] = tensor
    return stored, scales


def int8_codes(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes within +-127 and fp32 scales: codes * scales approximates `values`.

    All values along `dim` share a scale; the scales have size 1 in that dimension.
    """
    scales = values.float().abs().amax(dim, keepdim=True).clamp(min=TINY) / 127
    return (values / scales).round().to(torch.int8), scales


def rows_of(values: torch.Tensor, length: int) -> torch.Tensor:
    """Return `values` (n,) as rows of `length` values, (rows, length); zeros fill the last row."""
    zeros = -len(values) % length
    return F.pad(values, (0, zeros)).view(-1, length)


def nf4_levels() -> torch.Tensor:
    """Return the 16 levels of NormalFloat4, (16,) in fp32, from -1 to 1.

    They are quantiles of N(0, 1) at evenly spaced probabilities, scaled to [-1, 1].  7 are below
    zero, 8 above it, and zero itself is exact (QLoRA, section 3 and appendix E).  The largest
    probability, `end`, is the mean of 1 - 1/30 and 1 - 1/32.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(0.5, end, 8, dtype=torch.float64))
    return (torch.cat([below[1:].flip(0), above]) / above[-1]).float()
