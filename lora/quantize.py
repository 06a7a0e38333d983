"""Frozen weights in 8 or 4 bits, in plain torch: int8 by rows, and QLoRA's NF4 (Dettmers et al. 2023)."""
import torch
import torch.nn as nn
import torch.nn.functional as F

BLOCK = 64                     # weights that share a scale (QLoRA, section 3)
SCALES = 256                   # scales that share a scale of their own: double quantisation
TINY = 1e-30                   # instead of a largest magnitude of 0


def nf4_levels():
    """The 16 levels of NormalFloat4: quantiles of N(0, 1), evenly spaced in probability, scaled to [-1, 1].

    7 below zero, 0 itself, 8 above it, so that zero is exact (QLoRA, section 3 and appendix E).  The outermost
    probability lies between the two that 15 and 16 even steps would leave at the end.
    """
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64))
    below = -torch.special.ndtri(torch.linspace(0.5, end, 8, dtype=torch.float64))
    return (torch.cat([below[1:].flip(0), above]) / above[-1]).float()


class Dequantized(torch.autograd.Function):
    """F.linear(x, layer.weight) that keeps no weight: backward dequantises again, and the weight gets no gradient."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(ctx.dtype), None


class QuantizedLinear(nn.Module):
    """y = W x + b with W in fewer bits, frozen.  x (..., d_in) -> (..., d_out) in x's dtype.

    A subclass keeps W as buffers and has `dequantize(dtype)` -> (d_out, d_in), made in fp32 and rounded once.  `like`,
    one number, says in which dtype and on which device the model computes; `weight` is W in that dtype, made anew each
    time.  Quantise what the file holds and cast then (`.to(dtype)`): cast before, other codes would come out.
    """
    kind = None                                                  # what --quantize calls it
    stands_for = nn.Linear                                       # to whoever looks for layers to adapt

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("like", linear.weight.detach().new_zeros(()))
        self.bias = linear.bias

    @property
    def weight(self):
        return self.dequantize(self.like.dtype)

    def with_weight(self, weight):
        """An nn.Linear with this weight and the same bias, frozen: what a merged adapter leaves."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta").train(self.training)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear

    def _apply(self, fn, recurse=True):
        """Moving goes for all buffers, casting (`model.half()`) for `like` alone: codes and scales would lose by it."""
        held = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name != "like"}
        super()._apply(fn, recurse)
        for name, buffer in held.items():
            setattr(self, name, buffer.to(self.like.device))
        return self

    def forward(self, x):
        y = Dequantized.apply(x, self)
        return y if self.bias is None else y + self.bias


class Int8Linear(QuantizedLinear):
    """W[i, j] = q[i, j] * s[i]: whole numbers to 127 and one fp32 scale a row, its largest magnitude / 127.

    No weight is off by more than s[i] / 2.
    """
    kind = "int8"

    def __init__(self, linear):
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=TINY) / 127
        q = (weight / scale).round().to(torch.int8)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def dequantize(self, dtype):
        return (self.q * self.scale).to(dtype)


class NF4Linear(QuantizedLinear):
    """W in blocks of 64 along its rows laid end to end: W = levels[code] * s, two codes a byte, s the block's largest
    magnitude, itself in 8 bits (double quantisation): s = mean + c * t, whole c to 127, one fp32 t for 256 blocks.

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight, 4.5 with `double` off.  No weight is off by more than half
    the widest gap between levels, 0.152 of its block's s, and what rounding s to 8 bits adds.
    """
    kind = "nf4"

    def __init__(self, linear, double=True):
        super().__init__(linear)
        weight = linear.weight.detach().float().flatten()
        blocks = F.pad(weight, (0, -len(weight) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        levels = nf4_levels().to(weight.device)
        if double:
            mean = scale.mean()
            groups = F.pad(scale - mean, (0, -len(scale) % SCALES)).view(-1, SCALES)
            t = groups.abs().amax(1, keepdim=True).clamp(min=TINY) / 127
            c = (groups / t).round().to(torch.int8)
            self.register_buffer("c", c.flatten()[:len(scale)].clone())
            self.register_buffer("t", t.flatten())
            self.register_buffer("mean", mean)
        else:
            self.register_buffer("s", scale)
        codes = torch.bucketize(blocks / scale[:, None].clamp(min=TINY), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
        self.register_buffer("codes", codes.flatten()[::2] * 16 + codes.flatten()[1::2])
        self.register_buffer("pairs", torch.cartesian_prod(levels, levels), persistent=False)      # of each byte: two levels

    def scales(self):
        """(blocks,) fp32."""
        if hasattr(self, "s"):
            return self.s
        return self.mean + self.c * self.t.repeat_interleave(SCALES)[:len(self.c)]

    def dequantize(self, dtype):
        unit = F.embedding(self.codes.int(), self.pairs).view(-1, BLOCK)
        weight = unit.mul_(self.scales()[:, None]).to(dtype)     # in place: what was just looked up is large enough
        return weight.flatten()[:self.out_features * self.in_features].view(self.out_features, self.in_features)


KINDS = {layer.kind: layer for layer in (Int8Linear, NF4Linear)}


def quantizer(kind):
    """nn.Linear -> the frozen layer in its place; None for "none" or None.  Raises ValueError for a kind there is not."""
    if kind not in (None, "none", *KINDS):
        raise ValueError(f"unknown quantisation {kind!r}; there is {', '.join(KINDS)}")
    return KINDS.get(kind)


def dequantize(model):
    """Put an nn.Linear with the very weight that was computed with in the place of each quantised layer."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(path, layer.with_weight(layer.weight))


def in_int8(tensors):
    """({name: tensor}, {name: scale}): an adapter's A and B in int8, with one fp32 scale for each of the r terms of B A.

    What is neither stays as it is.  tensor * scale is off by half a scale at most.
    """
    scales = {name: tensor.float().abs().amax(int(not name.endswith("lora_B")), keepdim=True).clamp(min=TINY) / 127
              for name, tensor in tensors.items() if name.endswith(("lora_A", "lora_B"))}
    return {name: (tensor / scales[name]).round().to(torch.int8) if name in scales else tensor
            for name, tensor in tensors.items()}, scales
