"""Whole weights that an adapter brings: PEFT saves embeddings, output matrices and norms like that.

They replace the base's.  An adapter here leaves its base alone, so load_adapter refuses those that
differ, and replace_matrices uses them where base and adapter are merged for good.

saved: an adapter as read_adapter returns it.  Names are the model's unless something else is said.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn


def names_in_file(saved: dict, names: list[str]) -> list[str]:
    """Return what the adapter's file calls these weights."""
    return [saved["names_in_file"].get(name, name) for name in names]


def different_matrices(model: nn.Module, saved: dict) -> list[str]:
    """Return the names of an adapter's whole weights that are not the base's own.

    On the meta device all pass.  Raises ValueError for a weight that the base does not have.
    """
    different = []
    for name, matrix in saved["matrices"].items():
        weight = base_weight(model, name)
        title = f"{saved['path']} holds {names_in_file(saved, [name])[0]} {tuple(matrix.shape)}"
        if weight is None:
            raise ValueError(f"{title}, which the base does not have")
        if weight.shape != matrix.shape:
            raise ValueError(f"{title}, and the base's is {tuple(weight.shape)}: is the adapter of "
                             "another base, or of one with more tokens?")
        if not weight.is_meta and not is_copy(matrix, weight.detach().cpu()):
            different.append(name)
    return different


def base_weight(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return the weight of this name, also under an adapter; None if there is none.

    It is whole, also if it is cut over ranks, which then all call this.
    """
    try:
        layer = model.get_submodule(name.removesuffix(".weight"))
    except AttributeError:
        return None
    weight = getattr(getattr(layer, "base", layer), "weight", None)
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def is_copy(matrix: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether one of two tensors of a shape is the other, perhaps rounded to a dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if (matrix.to(dtype) == weight).all() or (weight.to(dtype) == matrix).all():
            return True
    if {matrix.dtype, weight.dtype} != {torch.bfloat16, torch.float16}:
        return False
    # Both may be roundings of one fp32 tensor: a step of bf16 apart, or below what fp16 can say.
    difference = (matrix.float() - weight.float()).abs()
    return bool((difference <= 2 ** -8 * weight.float().abs() + 2 ** -24).all())


@torch.no_grad()
def replace_matrices(model: nn.Module, saved: dict) -> list[str]:
    """Copy an adapter's whole weights into its base; return those that differ, as the file names.

    The model must have no adapter yet; load and merge it afterwards.
    Raises ValueError for a weight that is quantised, tied to another, absent or of another shape.
    """
    different = different_matrices(model, saved)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in different:
        title = f"{saved['path']} holds {names_in_file(saved, [name])[0]}"
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"{title}, and the base's is quantised")
        if sum(other is parameter for other in parameters.values()) > 1:
            raise ValueError(f"{title}, which differs from the base's, and the base ties its own "
                             "to another matrix")
        parameter.copy_(saved["matrices"][name])
    return names_in_file(saved, different)


@contextmanager
def gathered_weights(layer: nn.Module):
    """Within the block, give a layer whose weights are cut over ranks its whole weights.

    All ranks use it at the same point.  Forward does not need it: there the ranks have gathered the
    weights already.
    """
    parts = {name: parameter for name, parameter in layer.named_parameters(recurse=False)
             if hasattr(parameter, "full_tensor")}
    for name, part in parts.items():
        layer._parameters[name] = nn.Parameter(part.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        layer._parameters.update(parts)
