"""Adapters as a whole: put them into a model, switch them off, merge them, save and load them."""
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn

from .layers import lora_layers
from .methods import METHODS


@dataclass
class LoRAConfig:
    """What rebuilds an adapter's layers; in a file it is this as a plain dict.

    targets: last parts of module paths ("wq" is every ...wq), or "all" for each layer the method can wrap.
    dropout: None for the method's default, which is 0.05 or, where it cannot have any, 0.
    options: settings of the method's own, as its file in lora/ lists them; those not given get their defaults.
    Raises ValueError for values out of range.
    """
    method: str = "lora"
    r: int = 16
    alpha: float = 32
    dropout: float = None
    targets: tuple = ("wq", "wv")
    init: str = "kaiming"
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; there is {', '.join(METHODS)}")
        kind = METHODS[self.method][nn.Linear]
        self.dropout = kind.default_dropout if self.dropout is None else self.dropout
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init is {self.init!r}, must be kaiming or gaussian")
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}, must be a whole number from 1")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha <= 2 ** 53:
            raise ValueError(f"alpha is {self.alpha!r}, must be a number above 0 and at most 2^53")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, must be from 0 to below 1")
        if not self.targets or not all(isinstance(target, str) and target for target in self.targets):
            raise ValueError(f"targets are {self.targets!r}, must be names of layers")
        if not isinstance(self.options, dict):
            raise ValueError(f"options are {self.options!r}, must be a dict")
        try:
            self.options = kind.settled(self.options)
            kind.check(self)
        except ValueError as error:
            raise ValueError(f"{self.method}: {error}") from error


def method_options(method):
    """{name: default} of the settings that are the method's own."""
    return METHODS[method][nn.Linear].options


def is_lora(name):
    """Whether a parameter's full name is an adapter's."""
    return name.rpartition(".")[2].startswith("lora_")


def kind_of(module):
    """The type of layer that a method wraps: a quantised one stands for nn.Linear."""
    return getattr(module, "stands_for", type(module))


def add_lora(model, config):
    """Freeze `model`, wrap each layer that config.targets names, return the wrapped paths.

    Raises ValueError, with the model as it was, for a target that matches nothing or a layer the method has no
    form for, an r that a layer is too small for, or a model that has an adapter already.
    """
    if lora_layers(model):
        raise ValueError("the model has an adapter already; load_adapter swaps it")
    kinds, config = METHODS[config.method], replace(config)          # a copy: a method may note there what it settles
    wrappable = {path: module for path, module in model.named_modules() if path and kind_of(module) in kinds}
    names = {path.rpartition(".")[2] for path in wrappable}
    targets = names if names and "all" in config.targets else set(config.targets)
    others = set().union(*METHODS.values()) - kinds.keys()            # what some method wraps and this one does not
    for path, module in model.named_modules():
        if kind_of(module) in others and path.rpartition(".")[2] in config.targets:
            raise ValueError(f"{config.method} has no form for {path}, an nn.{type(module).__name__}")
    if missing := targets - names:
        raise ValueError(f"no layer named {', '.join(sorted(missing))} to adapt; there is {', '.join(sorted(names)) or 'none'}")
    settings = dict(r=config.r, alpha=config.alpha, dropout=config.dropout, init=config.init, **config.options)
    layers = {}
    with unchanged_on_error(model):
        for path, base in wrappable.items():
            if path.rpartition(".")[2] in targets:
                try:
                    layers[path] = kinds[kind_of(base)](base, **settings)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
    model.requires_grad_(False)
    METHODS[config.method][nn.Linear].connect(list(layers.values()), config)
    for path, layer in layers.items():
        model.set_submodule(path, layer.train(layer.base.training))      # else eval() before would leave dropout on
    model.lora_config = config
    return list(layers)


@contextmanager
def unchanged_on_error(model):
    """Where the block raises ValueError the model gets its layers, its config and its trainable parameters back."""
    held, config = lora_layers(model), getattr(model, "lora_config", None)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield held
    except ValueError:
        remove_lora(model)
        for path, layer in held.items():
            model.set_submodule(path, layer)
        model.lora_config = config
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise


def remove_lora(model):
    """Take the adapter out again: each wrapped layer's base goes back to its place, frozen as it is."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base)


def mark_only_lora_as_trainable(model):
    """requires_grad for the parameters that the adapter's method trains and for no other."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(name not in layer.frozen)


def begin_step(model, step, loss=None):
    """Tell the adapter's layers that optimizer step `step` (from 1) begins; return what they note for the log.

    loss: the last step's, the same on all ranks.  Most methods have nothing to do here and note nothing.
    """
    noted = {}
    for layer in lora_layers(model).values():
        noted |= layer.begin_step(step, loss)
    return noted


def follow_optimizer(model, optimizer):
    """From now on tell the adapter's layers after each step of `optimizer`: a method may have more to move."""
    layers = list(lora_layers(model).values())

    def after(*_):
        for layer in layers:
            layer.after_step()
    optimizer.register_step_post_hook(after)


def lora_state_dict(model):
    """{name: tensor} of the adapter alone, with what of it is frozen."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_lora(name)}


class AdapterState:
    """All of an adapter that training moves, for a run that is interrupted and goes on: as an optimizer has it.

    load_state_dict raises ValueError, with the model as it was, where the adapter is another.
    """

    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return {"tensors": lora_state_dict(self.model),
                "methods": {path: layer.state() for path, layer in lora_layers(self.model).items()}}

    def load_state_dict(self, state):
        own, tensors = self.state_dict(), state["tensors"]
        if own["methods"].keys() != state["methods"].keys() or {name: tensor.shape for name, tensor in own["tensors"].items()} \
                != {name: tensor.shape for name, tensor in tensors.items()}:
            raise ValueError("the adapter's layers or their sizes are others")
        self.model.load_state_dict(tensors, strict=False)            # the base is not in it
        for path, layer in lora_layers(self.model).items():
            layer.load_state(state["methods"][path])


@contextmanager
def lora_disabled(model):
    """Within the block `model` is its base, bit for bit.  Raises ValueError while the adapter is merged."""
    layers = list(lora_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the weights; unmerge it first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def merge_lora(model, keep_base=True):
    """Merge every adapter layer into its base; return the share of the update that survived the rounding.

    1.0 is all of it; in bf16 a small update can be lost nearly whole, because the weights' steps are larger
    than it.  keep_base=False frees each weight that is replaced: then nothing can unmerge.  Raises ValueError when
    there is nothing to merge or it is merged already.
    """
    layers = lora_layers(model).values()
    if not layers or any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged already" if layers else "the model has no adapter to merge")
    if not all(layer.enabled for layer in layers):
        raise ValueError("the adapter is disabled; merge it outside of lora_disabled")
    kept, whole = (sum(column) for column in zip(*[layer.merge(keep_base) for layer in layers]))
    return kept / whole if whole else 1.0


@torch.no_grad()
def merge_report(model, tokens, remedy, keep_base=True):
    """Merge the adapter and say in one line what that lost: of the update, and on the logits of `tokens` (B, T).

    remedy: the flag to name when less than half of the update survives.  Call it in eval mode: dropout moves logits too.
    """
    before = model(tokens).float()
    share = merge_lora(model, keep_base)
    moved = (model(tokens).float() - before).abs().max()
    dtype = next(iter(lora_layers(model).values())).base.weight.dtype
    return (f"merged: {100 * share:.1f} % of the update survives in {str(dtype).removeprefix('torch.')}; "
            f"logits of up to {before.abs().max():.3g} move by up to {moved:.2g}"
            + f"; WARNING, most of it is lost: use {remedy}, or keep the adapter apart" * (share < 0.5))


def unmerge_lora(model):
    """Undo merge_lora, bit for bit.  Raises ValueError when nothing is merged."""
    layers = lora_layers(model).values()
    if not layers or not all(layer.merged for layer in layers):
        raise ValueError("no merged adapter to take out")
    for layer in layers:
        layer.unmerge()


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write an adapter file: the tensors, the config, and model.origin, which describes the base.

    The file is whole or not there.  Raises ValueError for a model that has no adapter, and OSError.
    """
    tensors = {name: tensor.detach().cpu().clone()
               for name, tensor in lora_state_dict(model).items()}
    if not tensors:
        raise ValueError("the model has no adapter to save")
    config = {**asdict(model.lora_config), "targets": list(model.lora_config.targets)}
    content = {"config": config, "base": getattr(model, "origin", {}), "tensors": tensors}
    new = Path(f"{path}.tmp")
    try:
        # An open file: given a path, torch.save would write the file's name into it.
        with open(new, "wb") as file:
            torch.save(content, file)
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

    source: the path of an adapter file; or its content with a "path" to call it by, as readers of
    other formats make it.  "base" may be None there: it is not known.
    load: load(path) returns the content of a file, or raises ValueError.  The default runs no code
    of the file, but takes as much memory as that asks for; llama.files.load_saved does not.
    Raises FileNotFoundError, or ValueError for a file that is not an adapter's.
    """
    from_file = not isinstance(source, dict)
    path = source if from_file else source["path"]
    if from_file and not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    content = load(path) if from_file else source
    with reading(path):
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        config = LoRAConfig(**content["config"])
        tensors = rescaled(content["tensors"], content.get("scales", {}))
        base = content["base"]
        if base is not None or from_file:
            base = dict(base)
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and is_dense(tensor)):
            raise ValueError(f"{path} is not an adapter file: it holds something else among its "
                             "tensors")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path} holds values that are no finite numbers, in {name}")
    values = base.values() if base else ()
    if not all(isinstance(value, (str, int, float, type(None))) for value in values):
        raise ValueError(f"{path} is not an adapter file: it names its base by nonsense")
    return {"path": str(path), "config": config, "base": base, "tensors": tensors}


def rescaled(tensors: dict, scales: dict) -> dict:
    """Return {name: tensor} with those that are stored in int8 multiplied by their scales."""
    # expand_as refuses scales that would make a tensor wider.
    return {name: tensor * scales[name].expand_as(tensor) if name in scales else tensor
            for name, tensor in tensors.items()}


def is_dense(tensor) -> bool:
    """Return whether a value is a dense floating-point tensor in the CPU's memory."""
    return (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            and tensor.layout is torch.strided and tensor.device.type == "cpu")


def load_adapter(model: nn.Module, source: str | Path | dict,
                 load: Callable = load_weights_only) -> None:
    """Load an adapter into `model`: add its layers, or, where they are there, swap the tensors.

    source and load: as read_adapter takes them.
    Raises ValueError, with the model as it was, when the file belongs to another base (where that
    is known: else only shapes are compared) or its tensors do not fit, naming both sides, or while
    another adapter is merged.
    """
    saved = read_adapter(source, load)
    path = saved["path"]
    base = saved["base"]
    origin = getattr(model, "origin", {})
    if base is not None and base.get("fingerprint") != origin.get("fingerprint"):
        raise ValueError(f"{path} was trained on another base: {_name(base)}, this one is "
                         f"{_name(origin)}")
    with unchanged_on_error(model) as layers:
        if any(layer.merged for layer in layers.values()):
            raise ValueError("an adapter is merged into the weights; unmerge it first")
        if not layers or model.lora_config != saved["config"]:
            remove_lora(model)
            add_lora(model, saved["config"])
        expected = lora_state_dict(model)
        in_model = unmatched(expected, saved["tensors"])
        in_file = unmatched(saved["tensors"], expected)
        if in_model or in_file:
            raise ValueError(f"{path} does not fit; the model expects {in_model or 'none'}; "
                             f"the file has {in_file or 'none'}")
    # The base's weights are not in the file, so strict=True would miss them.
    model.load_state_dict(saved["tensors"], strict=False)


def unmatched(tensors: dict, others: dict) -> str:
    """Return the names and shapes of tensors that `others` lacks or has in another shape."""
    names = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()
             if name not in others or others[name].shape != tensor.shape]
    text = ", ".join(names[:6])
    if len(names) > 6:
        text += f" and {len(names) - 6} more"
    return text


def _name(origin):
    """One base among others, for a message."""
    if not origin:
        return "one that does not say what it is"
    return f"{origin.get('folder')} ({origin.get('layers')} layers, {origin.get('init')})"
