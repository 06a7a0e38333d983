"""LoRA-FA (Zhang et al. 2023): with A frozen, far less has to be kept for the backward pass."""
import torch.nn as nn

from ..layers import LoRALinear
from ..lora_layer import reference_tensor


class LoRAFALinear(LoRALinear):
    """y = W0 x + (alpha / r) B A dropout(x), with W0 and A frozen and B trained (LoRA-FA).

    base: nn.Linear with the weight W0 (d_out, d_in).  x (..., d_in) -> y (..., d_out).
    lora_A (r, d_in) starts random, as in LoRA, and adapter files hold it.  It has the base's dtype,
    because it is frozen as the base is.  lora_B (d_out, r) starts at zero, so the layer equals its
    base until the first step.

    The gradients show what has to be kept of the forward pass.  With one token per row of x and of
    G, the gradient of y, and with s = alpha / r:

        dB = s G^T (A x)          needs A x, which is r wide
        dA = s (G B)^T x          needs x, which is d_in wide; LoRA keeps x for this alone
        dx = G W0 + s G B A       needs weights and no activation

    Here A needs no gradient, so autograd does not keep x, and the inherited forward can stay as it
    is.  Dropout would keep a mask (one byte per element on CUDA, as large as x on a CPU), so by
    default there is none.
    """
    frozen = ("lora_A",)
    default_dropout = 0.0
    keeps_input = False

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0,
                 init: str = "kaiming", **options):
        super().__init__(base, r, alpha, dropout, init, **options)
        A = self.lora_A.detach().to(reference_tensor(base).dtype)
        self.lora_A = nn.Parameter(A, requires_grad=False)


# Embeddings are left out.  Their adapter keeps no x, so there is no memory to save; and A, with one
# column per token, is the part that learns, so freezing it would leave nothing.
LAYERS = {nn.Linear: LoRAFALinear}
