"""An adapter in a file: save it, read it, load it into a model."""
import os
import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from .adapter import (
    LoRAConfig,
    add_lora,
    load_tensors,
    lora_state_dict,
    path_of,
    remove_lora,
    unchanged_on_error,
)
from .layers import lora_layers
from .matrices import different_matrices, names_in_file


def save_adapter(model: nn.Module, path: str | Path, write: Callable | None = None) -> None:
    """Write an adapter file: the tensors, the config, and model.origin, which describes the base.

    The file is written whole or not at all.
    write(path, write_content): how; it calls write_content(file) once on an open file.  The default
    is `write_file`; llama.files.write_whole also survives a power cut right after it.
    Raises ValueError for a model that has no adapter, or what `write` raises.
    """
    tensors = {name: tensor.detach().cpu().clone()
               for name, tensor in lora_state_dict(model).items()}
    if not tensors:
        raise ValueError("the model has no adapter to save")
    config = {**asdict(model.lora_config), "targets": list(model.lora_config.targets)}
    content = {"config": config, "base": getattr(model, "origin", {}), "tensors": tensors}
    write = write or write_file
    # torch.save gets an open file, because with a path it would store the file's name in it.
    write(Path(path), lambda file: torch.save(content, file))


def write_file(path: Path, write_content: Callable) -> None:
    """Call write_content(file) on a new file beside `path`, then rename it.  Raises OSError."""
    new = Path(f"{path}.tmp")
    try:
        with open(new, "wb") as file:
            write_content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns the error of a full disk into a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or error
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def reading(path: str | Path):
    """Turn whatever error a broken file causes into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        message = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not an adapter file: {message}") from error


def load_weights_only(path: str | Path):
    """Return the content of a file that torch.save wrote, read by torch's weights-only reader."""
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_adapter(source: str | Path | dict, load: Callable = load_weights_only) -> dict:
    """Return {"path": str, "config": LoRAConfig, "base": dict, "tensors": dict} of an adapter.

    source: the path of an adapter file, or a dict with the content of one and a "path" to name in
    messages, as readers of other formats return it.  In a dict "base" is None if it is unknown.
    Other formats have more, which is returned too: "matrices", {name: tensor} of whole weights to
    replace the base's; "names_in_file", {name: what the file calls it}; "skips_blocks", whether the
    adapter may leave out blocks; and "from_base", the last parts of names of tensors that the file
    lacks, because they are computed from the base.
    load: load(path) returns the content of a file, or raises ValueError.  The default runs no code
    of the file, but uses as much memory as the file asks for; llama.files.load_saved limits that.
    Raises FileNotFoundError, or ValueError for a file that is not an adapter's.
    """
    from_file = not isinstance(source, dict)
    path = source if from_file else source["path"]
    if from_file and not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    content = load(path) if from_file else source
    # Only readers of other formats add more than a file holds; a file's own additions are ignored.
    extras = {} if from_file else source
    with reading(path):
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        config = LoRAConfig(**content["config"])
        tensors = rescaled(content["tensors"], content.get("scales", {}))
        matrices = dict(extras.get("matrices", {}))
        base = content["base"]
        if base is not None or from_file:
            base = dict(base)
    for name, tensor in (tensors | matrices).items():
        if not (isinstance(name, str) and is_dense(tensor)):
            raise ValueError(f"{path} is not an adapter file: it holds something else among its "
                             "tensors")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path} has values that are not finite, in {name}")
    values = base.values() if base else ()
    if not all(isinstance(value, (str, int, float, type(None))) for value in values):
        raise ValueError(f"{path} is not an adapter file: what it says of its base is not text "
                         "or numbers")
    return {"path": str(path), "config": config, "base": base, "tensors": tensors,
            "matrices": matrices, "names_in_file": extras.get("names_in_file", {}),
            "skips_blocks": extras.get("skips_blocks", False),
            "from_base": extras.get("from_base", ())}


def rescaled(tensors: dict, scales: dict) -> dict:
    """Return {name: tensor}, where tensors stored in int8 are multiplied by their scales."""
    # expand_as refuses scales that would make a tensor larger.
    return {name: tensor * scales[name].expand_as(tensor) if name in scales else tensor
            for name, tensor in tensors.items()}


def is_dense(tensor) -> bool:
    """Return whether a value is a dense floating-point tensor in the CPU's memory."""
    return (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            and tensor.layout is torch.strided and tensor.device.type == "cpu")


def load_adapter(model: nn.Module, source: str | Path | dict,
                 load: Callable = load_weights_only) -> None:
    """Load an adapter into `model`, in place of the adapter that it has, if any.

    If both have the same config, only the tensors are replaced.  source, load: see read_adapter.
    Raises ValueError, and leaves the model as it was, if the file belongs to another base, if its
    tensors do not fit, or if an adapter is merged.  If the file's base is unknown, only names and
    shapes are compared, and whole weights that the file brings must be the base's own.
    """
    saved = read_adapter(source, load)
    path = saved["path"]
    base = saved["base"]
    origin = getattr(model, "origin", {})
    if base is not None and base.get("fingerprint") != origin.get("fingerprint"):
        raise ValueError(f"{path} was trained on another base: {describe_base(base)}, this one is "
                         f"{describe_base(origin)}")
    different = different_matrices(model, saved)
    if different:
        names = first_names(names_in_file(saved, different))
        raise ValueError(f"{path} holds {names}, other than the base's own; only a merge can use "
                         f"that: python -m finetune.convert BASE NEW --to hf --adapter {path}")
    with unchanged_on_error(model) as layers:
        if any(layer.merged for layer in layers.values()):
            raise ValueError("an adapter is merged into the weights; unmerge it first")
        if not layers or model.lora_config != saved["config"]:
            remove_lora(model)
            add_lora(model, saved["config"], values_follow=True)
        expected = lora_state_dict(model)
        tensors = all_tensors(saved, model)
        in_model = unmatched(expected, tensors)
        in_file = unmatched(tensors, expected)
        if in_model or in_file:
            raise ValueError(f"{path} does not fit; {adapted_blocks(tensors, expected)}the model "
                             f"expects {in_model or 'none'}; the file has {in_file or 'none'}")
        load_tensors(model, tensors)


def all_tensors(saved: dict, model: nn.Module) -> dict:
    """Return an adapter's tensors, with zeros for the model's adapter layers that it leaves out.

    Those that its file leaves to be computed from the base are computed.
    With A and B zero a layer computes what its base does, and their gradients are zero too.
    """
    tensors = dict(saved["tensors"])
    if saved["skips_blocks"]:
        adapted = {path_of(name) for name in tensors}
        for name, tensor in lora_state_dict(model).items():
            if path_of(name) not in adapted:
                tensors[name] = torch.zeros(tensor.shape)
    for path, layer in lora_layers(model).items():
        if any(f"{path}.{name}" not in tensors for name in saved["from_base"]):
            for name, tensor in layer.from_base().items():
                tensors[f"{path}.{name}"] = tensor
    return tensors


def adapted_blocks(tensors: dict, expected: dict) -> str:
    """Return "it adapts blocks 0 and 1 of 4; ", or "" if a file has the blocks of the model."""
    blocks = block_numbers(tensors)
    model_blocks = block_numbers(expected)
    if blocks == model_blocks or not blocks:
        return ""
    *others, last = map(str, blocks)
    text = f"blocks {', '.join(others)} and {last}" if others else f"block {last}"
    return f"it adapts {text} of {len(model_blocks)}; "


def block_numbers(names: Iterable[str]) -> list[int]:
    """Return the numbers in "layers.NUMBER." of these names, in order."""
    matches = [re.match(r"layers\.(\d{1,4})\.", name) for name in names]
    return sorted({int(match[1]) for match in matches if match})


def unmatched(tensors: dict, others: dict) -> str:
    """Return the names and shapes of tensors that `others` lacks or has in another shape."""
    names = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()
             if name not in others or others[name].shape != tensor.shape]
    return first_names(names)


def first_names(names: list[str]) -> str:
    """Return the first names as one text, and how many more there are."""
    text = ", ".join(names[:6])
    if len(names) > 6:
        text += f" and {len(names) - 6} more"
    return text


def describe_base(origin: dict) -> str:
    """Return how a message refers to a base."""
    if not origin:
        return "one that does not say what it is"
    return f"{origin.get('folder')} ({origin.get('layers')} layers, {origin.get('init')})"
