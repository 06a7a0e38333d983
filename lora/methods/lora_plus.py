"""LoRA+ (Hayou et al. 2024): B learns faster than A, by the optimizer's groups alone."""
import torch.nn as nn

from ..layers import lora_layers


def lora_plus_groups(model, lr, ratio):
    """Optimizer groups for the trainable parameters of `model`: lora_B at ratio * lr, all others at lr.

    A step of Adam changes each number by about its learning rate, however small the gradient.  That moves A x by
    up to d_in * lr, but B z by r * lr only: in a wide layer, a rate at which A learns well leaves B behind.  The
    paper derives rates that fall with 1 / d_in for A and do not fall for B, and finds ratios around 16 to do well.

    It does not matter which of the two starts at zero, but where the width enters; and into a lookup none does.
    So both factors of an embedding's adapter keep lr (the authors' code sets them apart too), as does what a
    method trains beside A and B, such as DoRA's magnitude.

    ratio 1: one group, plain LoRA.  Raises ValueError where no linear layer trains both A and B (of LoRA-FA's A,
    VeRA's vectors or a full model there is nothing to set apart).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if ratio == 1:
        return [{"params": trained}]
    fast = [layer.lora_B for layer in lora_layers(model).values() if not isinstance(layer.base, nn.Embedding)
            and all(getattr(getattr(layer, name, None), "requires_grad", False) for name in ("lora_A", "lora_B"))]
    if not fast:
        raise ValueError("LoRA+ needs a method that trains both lora_A and lora_B of a linear layer; here is none")
    of_fast = set(map(id, fast))
    return [{"params": [p for p in trained if id(p) not in of_fast]}, {"params": fast, "lr": ratio * lr}]
