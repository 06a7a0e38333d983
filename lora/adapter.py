"""An adapter in a model: add it, train it, switch it off, merge it, remove it."""
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn

from .layers import lora_layers
from .lora_layer import LoRALayer
from .methods import METHODS


@dataclass
class LoRAConfig:
    """The settings from which an adapter's layers can be rebuilt; adapter files store them.

    method: a name in METHODS.  r: the rank.  alpha: the scale of the update is alpha / r, unless
    the method defines another.
    dropout: a probability; None means the method's default, 0.05 or 0.
    targets: last parts of module paths ("wq" selects every path that ends in ".wq"), or "all" for
    every layer that the method can adapt.
    init: how A starts, "kaiming" or "gaussian".
    options: {name: value} of the method's own settings, which its file in lora/methods/ lists.
    Those that are not given get their defaults.
    Raises ValueError for values out of range.
    """
    method: str = "lora"
    r: int = 16
    alpha: float = 32
    dropout: float | None = None
    targets: tuple[str, ...] = ("wq", "wv")
    init: str = "kaiming"
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, must be one of {', '.join(METHODS)}")
        layer = linear_layer(self.method)
        if self.dropout is None:
            self.dropout = layer.default_dropout
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"init is {self.init!r}, must be kaiming or gaussian")
        if not is_number(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}, must be a whole number from 1")
        if not is_number(self.alpha) or not 0 < self.alpha <= 2 ** 53:
            raise ValueError(f"alpha is {self.alpha!r}, must be a number above 0 and at most 2^53")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, must be from 0 to below 1")
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise ValueError(f"targets are {self.targets!r}, must be names of layers")
        if not isinstance(self.options, dict):
            raise ValueError(f"options are {self.options!r}, must be a dict")
        try:
            self.options = layer.complete_options(self.options)
            layer.check(self)
        except ValueError as error:
            raise ValueError(f"{self.method}: {error}") from error


def is_number(value, types=(int, float)) -> bool:
    """Return whether `value` is of one of `types`; True and False do not count as numbers."""
    return isinstance(value, types) and not isinstance(value, bool)


def linear_layer(method: str) -> type[LoRALayer]:
    """Return the method's layer for nn.Linear, which every method has.

    This class has the options and the hooks of the whole method.
    """
    return METHODS[method][nn.Linear]


def method_options(method: str) -> dict:
    """Return {name: default} of the settings that only this method has."""
    return linear_layer(method).options


def add_lora(model: nn.Module, config: LoRAConfig, values_follow: bool = False) -> list[str]:
    """Freeze `model`, wrap each layer that config.targets names, and return the wrapped paths.

    values_follow: whether a file's tensors will replace all values, so that a method may leave out
    the work of computing them.
    Raises ValueError, and leaves the model as it was, if a target matches no layer, if the method
    cannot adapt a target, if r is too large for a layer, if the model already has an adapter, or if
    its base was quantised for another one.
    """
    if lora_layers(model):
        raise ValueError("the model already has an adapter; load_adapter replaces it")
    config = replace(config)                 # A copy, because the method may update its options.
    layer_classes = METHODS[config.method]
    settings = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout,
                "init": "none" if values_follow else config.init, **config.options}
    bases = find_targets(model, config)
    for path, module in model.named_modules():
        needed = getattr(module, "adapter_options", {})
        if needed and not (path in bases and needed.items() <= config.options.items()):
            options = ", ".join(f"{name}={value}" for name, value in needed.items())
            raise ValueError(f"{path}: the base was quantised for an adapter with {options}")
    layers = {}
    with unchanged_on_error(model):
        for path, base in bases.items():
            try:
                layers[path] = layer_classes[base_type(base)](base, **settings)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    model.requires_grad_(False)
    linear_layer(config.method).connect(list(layers.values()), config)
    for path, layer in layers.items():
        layer.train(layer.base.training)     # In eval mode, a new layer's dropout must be off too.
        model.set_submodule(path, layer)
    model.lora_config = config
    return list(layers)


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return {path: layer} of the layers that config.targets names.

    Raises ValueError for a target that the method cannot adapt or that matches no layer.
    """
    layer_classes = METHODS[config.method]
    adaptable_by_any = set()
    for base_types in METHODS.values():
        adaptable_by_any.update(base_types)
    adaptable = {}
    for path, module in model.named_modules():
        if base_type(module) in layer_classes:
            if path:                                    # The model itself has no path.
                adaptable[path] = module
        elif base_type(module) in adaptable_by_any and last_part(path) in config.targets:
            kind = type(module).__name__
            raise ValueError(f"{config.method} cannot adapt {path}, an nn.{kind}")
    names = {last_part(path) for path in adaptable}
    if "all" in config.targets and adaptable:
        return adaptable
    targets = set(config.targets)
    missing = targets - names
    if missing:
        wanted = ", ".join(sorted(missing))
        present = ", ".join(sorted(names)) or "none"
        raise ValueError(f"no layer named {wanted} to adapt; the model has {present}")
    return {path: layer for path, layer in adaptable.items() if last_part(path) in targets}


def base_type(module: nn.Module) -> type:
    """Return the type under which methods know `module`: nn.Linear for a quantised layer."""
    return getattr(module, "stands_for", type(module))


def path_of(name: str) -> str:
    """Return what stands before the last dot: the layer of a tensor's name."""
    return name.rpartition(".")[0]


def last_part(path: str) -> str:
    """Return what follows the last dot of a module's or a parameter's path."""
    return path.rpartition(".")[2]


def is_lora(name: str) -> bool:
    """Return whether a parameter or buffer of this full name belongs to an adapter."""
    return last_part(name).startswith("lora_")


@contextmanager
def unchanged_on_error(model: nn.Module):
    """Restore the model's layers, config and trainable parameters if the block raises ValueError.

    The block gets {path: layer}, the adapter layers before the block.
    """
    layers = lora_layers(model)
    config = getattr(model, "lora_config", None)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield layers
    except ValueError:
        remove_lora(model)
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        model.lora_config = config
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        raise


def remove_lora(model: nn.Module):
    """Put the base of each adapter layer back in its place.  The bases stay frozen."""
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.base)


def mark_only_lora_as_trainable(model: nn.Module):
    """Set requires_grad for exactly those parameters that the adapter's method trains."""
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.requires_grad_(name not in layer.frozen)


def begin_step(model: nn.Module, step: int, loss: float | None = None) -> dict:
    """Tell the adapter's layers that optimizer step `step` begins; return {name: value} to log.

    Steps count from 1.  loss: the previous step's, over all ranks of a distributed run; None at the
    first step.  Most methods do nothing here and log nothing.
    """
    logged = {}
    for layer in lora_layers(model).values():
        logged.update(layer.begin_step(step, loss))
    return logged


def follow_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer):
    """Call the adapter layers' after_step after each step of `optimizer`.

    Some methods then move tensors that the optimizer does not know.
    """
    layers = list(lora_layers(model).values())

    def after_step(*_):
        for layer in layers:
            layer.after_step()

    optimizer.register_step_post_hook(after_step)


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of the adapter's own tensors, trained or frozen, without the base."""
    tensors = {}
    for path, layer in lora_layers(model).items():       # not the model's: a base may be cut
        for name, tensor in layer.state_dict(prefix=f"{path}.").items():
            if is_lora(name):
                tensors[name] = tensor
    return tensors


def load_tensors(model: nn.Module, tensors: dict):
    """Give a model the tensors of its adapter: all, or none if a layer raises ValueError.

    Only a layer over a base that was quantised for one adapter does.
    """
    before = {}
    if any(hasattr(layer.base, "adapter_options") for layer in lora_layers(model).values()):
        before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    try:
        # strict=True would raise an error, because the base's weights are not among them.
        model.load_state_dict(tensors, strict=False)
    except ValueError:
        model.load_state_dict(before, strict=False)
        raise


class AdapterState:
    """The state of an adapter that training changes, to save and restore it with a run.

    It has state_dict() and load_state_dict(), as an optimizer has.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict:
        """Return the adapter's tensors and what its methods remember between steps."""
        methods = {path: layer.state() for path, layer in lora_layers(self.model).items()}
        return {"tensors": lora_state_dict(self.model), "methods": methods}

    def load_state_dict(self, state: dict):
        """Restore what state_dict returned.

        Raises ValueError, and leaves the model as it was, if the state is of another adapter.
        """
        current = self.state_dict()
        same_layers = current["methods"].keys() == state["methods"].keys()
        if not same_layers or shapes(current["tensors"]) != shapes(state["tensors"]):
            raise ValueError("the saved adapter has other layers or other sizes")
        load_tensors(self.model, state["tensors"])
        for path, layer in lora_layers(self.model).items():
            layer.load_state(state["methods"][path])


def shapes(tensors: dict) -> dict:
    """Return {name: shape} of {name: tensor}."""
    return {name: tensor.shape for name, tensor in tensors.items()}


@contextmanager
def lora_disabled(model: nn.Module):
    """Switch the adapter off within the block, where `model` equals its base bit for bit.

    Raises ValueError while the adapter is merged.
    """
    layers = list(lora_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is merged into the weights; unmerge it first")
    enabled_layers = [layer for layer in layers if layer.enabled]
    try:
        for layer in enabled_layers:
            layer.enabled = False
        yield model
    finally:
        for layer in enabled_layers:
            layer.enabled = True


def merge_lora(model: nn.Module, keep_base: bool = True) -> float:
    """Merge each adapter layer into its base and return the share of the update that survived.

    1.0 means that all of it survived.  In bf16 a small update can be lost almost entirely, because
    it is smaller than the distance between neighbouring values of a weight.
    keep_base=False frees each weight that is replaced, so nothing can be unmerged.
    Raises ValueError if there is no adapter, or if it is already merged or is disabled.
    """
    layers = lora_layers(model).values()
    if not layers:
        raise ValueError("the model has no adapter to merge")
    if any(layer.merged for layer in layers):
        raise ValueError("the adapter is already merged")
    if not all(layer.enabled for layer in layers):
        raise ValueError("the adapter is disabled; merge it outside of lora_disabled")
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        products = [layer.merge(keep_base) for layer in layers]
    survived = sum(product[0] for product in products)
    total = sum(product[1] for product in products)
    return survived / total if total else 1.0


@torch.no_grad()
def merge_report(model: nn.Module, tokens: torch.Tensor, remedy: str,
                 keep_base: bool = True) -> str:
    """Merge the adapter and return one line about what was lost.

    The line has the share of the update that survived and the change of the logits of `tokens`
    (B, T).  remedy: the flag to recommend if less than half survived.
    Call it in eval mode, because dropout would change the logits too.
    """
    before = model(tokens).float()
    share = merge_lora(model, keep_base)
    change = (model(tokens).float() - before).abs().max()
    first_layer = list(lora_layers(model).values())[0]
    dtype = str(first_layer.base.weight.dtype).removeprefix("torch.")
    report = (f"merged: {100 * share:.1f} % of the update survives in {dtype}; "
              f"logits of up to {before.abs().max():.3g} move by up to {change:.2g}")
    if share < 0.5:
        report += f"; WARNING, most of it is lost: use {remedy}, or leave the adapter unmerged"
    return report


def unmerge_lora(model: nn.Module):
    """Undo merge_lora, bit for bit, also one that an error ended before the last layer.

    Raises ValueError if no adapter is merged, or if it was merged with keep_base=False.
    """
    layers = [layer for layer in lora_layers(model).values() if layer.merged]
    if not layers:
        raise ValueError("the model has no merged adapter to unmerge")
    for layer in layers:
        layer.unmerge()
