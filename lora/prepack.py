"""Weights for generation on a CPU, laid out once as oneDNN multiplies them instead of anew in each product.

In bf16 the numbers stay the same to the bit; in fp32 they are another kernel's, which sums in another order and on
some CPUs is twice as fast as F.linear's.  These operators are torch's own, what its compiler uses for frozen weights.
"""
import torch
import torch.nn as nn

from .quantize import QuantizedLinear

ROWS = 128                     # tokens: asked for, but one layout serves all lengths


class PrepackedLinear(QuantizedLinear):
    """y = W x + b with W whole, frozen, in oneDNN's layout; no gradient.  x (..., d_in), in W's dtype -> (..., d_out)."""

    def __init__(self, linear):
        super().__init__(linear)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def dequantize(self, dtype):
        return self.packed.to_dense().to(dtype)                  # the very weight

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(model):
    """Put a PrepackedLinear in the place of each nn.Linear of `model` on a CPU whose oneDNN multiplies that dtype.

    An output matrix tied to the embedding is held twice from then on.
    """
    multiplied = {torch.float32} if torch.backends.mkldnn.is_available() else set()
    if multiplied and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        multiplied.add(torch.bfloat16)
    for path in [path for path, layer in model.named_modules() if type(layer) is nn.Linear]:
        layer = model.get_submodule(path)
        if layer.weight.is_cpu and layer.weight.dtype in multiplied:
            model.set_submodule(path, PrepackedLinear(layer).train(layer.training))     # an adapter follows its base
