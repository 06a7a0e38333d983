"""Weights for generation on a CPU, stored once in the layout in which oneDNN multiplies them.

F.linear converts a weight to that layout in each product.  In bf16 the results stay the same to the
bit.  In fp32 another kernel computes them: it sums in another order and is twice as fast on some
CPUs.  The operators are torch's own; its compiler uses them for frozen weights.
"""
import torch
import torch.nn as nn

from .quantize import QuantizedLinear

EXPECTED_TOKENS = 128              # The operator asks for a number; its layout serves any number.


class PrepackedLinear(QuantizedLinear):
    """y = W x + b with a whole, frozen W in oneDNN's layout, and without gradients.

    x (..., d_in), in W's dtype -> y (..., d_out).  Adapters treat it as a quantised layer.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        weight = linear.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_TOKENS)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.packed.to_dense().to(dtype)       # Exactly the weight that was packed.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(model: nn.Module):
    """Replace each nn.Linear of `model` that is on the CPU by a PrepackedLinear.

    Layers in a dtype that this CPU's oneDNN cannot multiply stay as they are.  If the output matrix
    is tied to the embedding, this makes a second copy of it in memory.
    """
    dtypes = set()
    if torch.backends.mkldnn.is_available():
        dtypes.add(torch.float32)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtypes.add(torch.bfloat16)
    # A list of paths alone, so that each weight is freed as soon as its layer is replaced.
    paths = [path for path, layer in model.named_modules() if type(layer) is nn.Linear]
    for path in paths:
        layer = model.get_submodule(path)
        if layer.weight.is_cpu and layer.weight.dtype in dtypes:
            packed = PrepackedLinear(layer)
            packed.train(layer.training)              # An adapter added later takes this mode.
            model.set_submodule(path, packed)
