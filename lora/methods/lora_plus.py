"""LoRA+ (Hayou et al. 2024): B learns faster than A; only the optimizer's groups change."""
import torch.nn as nn

from ..layers import lora_layers


def lora_plus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict]:
    """Return the optimizer's groups: lora_B of linear layers at ratio * lr, all else at lr.

    A step of Adam changes each number by about its learning rate, however small the gradient is.
    That changes A x by up to d_in * lr, but B z, where z is A x, by up to r * lr.  In a wide layer,
    a rate that is right for A is therefore too low for B.  The paper derives that A's rate should
    fall with 1 / d_in and B's should not, and finds that ratios around 16 work well.

    What matters is where the width enters, not which of the two starts at zero.  An embedding is a
    lookup, so no width enters: both its factors keep lr, though the authors' code sets them apart
    too.  What a method trains besides A and B, such as DoRA's magnitude, also keeps lr.

    With ratio 1 there is one group, as in LoRA.  Raises ValueError if no linear layer trains both
    A and B.  LoRA-FA, VeRA and a full model have nothing to set apart.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if ratio == 1:
        return [{"params": trained}]
    fast = []
    for layer in lora_layers(model).values():
        is_linear = not isinstance(layer.base, nn.Embedding)
        if is_linear and is_trained(layer, "lora_A") and is_trained(layer, "lora_B"):
            fast.append(layer.lora_B)
    if not fast:
        raise ValueError("LoRA+ needs a method that trains both lora_A and lora_B of linear layers")
    fast_ids = {id(p) for p in fast}
    slow = [p for p in trained if id(p) not in fast_ids]
    return [{"params": slow}, {"params": fast, "lr": ratio * lr}]


def is_trained(layer: nn.Module, name: str) -> bool:
    """Return whether `layer` has a parameter of this name and trains it."""
    parameter = getattr(layer, name, None)
    return parameter is not None and parameter.requires_grad
