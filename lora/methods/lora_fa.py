"""LoRA-FA (Zhang et al. 2023): A stays as it was drawn, so a layer needs to remember far less for backward."""
import torch.nn as nn

from ..layers import LoRALinear, like


class LoRAFALinear(LoRALinear):
    """y = W0 x + (alpha / r) B A dropout(x) with W0 and A frozen; B alone is trained (LoRA-FA).

    base: nn.Linear (d_out, d_in).  lora_A (r, d_in) starts random (kaiming, as for LoRA) and is part of what is
    saved; lora_B (d_out, r) starts at zero, so the layer equals its base until the first step.
    x (..., d_in) -> (..., d_out).

    The gradients say what has to be kept of the forward, G being that of y:

        dB = G^T (A x)          A x is r wide
        dA = (B^T G)^T x        x is d_in wide, and LoRA keeps it for this alone
        dx = G W0 + G B A       needs weights, no activation

    Without dA, autograd keeps no x: the inherited forward is right as it stands, once A does not ask for a
    gradient.  Dropout's mask would be kept (a byte an element on CUDA, as large as x on a CPU), so by default there is
    none.  What is frozen is held in the base's dtype,
    like the base.  An embedding's adapter has no x to save, and its A, a column a token, is what learns:
    freezing it would leave nothing, so there is none.
    """
    frozen = ("lora_A",)
    default_dropout = 0.0
    keeps_input = False

    def __init__(self, base, r, alpha, dropout=0.0, init="kaiming", **options):
        super().__init__(base, r, alpha, dropout, init, **options)
        self.lora_A = nn.Parameter(self.lora_A.detach().to(like(base).dtype), requires_grad=False)


LAYERS = {nn.Linear: LoRAFALinear}
