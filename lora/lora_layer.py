"""The base class of every adapter layer: what a LoRA layer does besides its equation."""
import copy

import torch
import torch.nn as nn

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class LoRALayer(nn.Module):
    """A frozen layer with an update beside it, which can be switched off, merged and unmerged.

    base: the layer to adapt; it is frozen here.  r: the rank.  alpha: the scale is alpha / r.
    dropout: a probability.  options: the method's own settings, by name.

    A subclass defines `forward` and `delta`.  A method customises the rest by overriding the class
    attributes below and the hooks at the end of the class, so no other file has to know the method.
    Raises ValueError for options that the method does not have.
    """
    options = {}                # The method's own settings and their defaults; files store them.
    default_dropout = 0.05
    frozen = ()                 # Names of parameters that are not trained, besides the base's.

    # For the estimate of memory: what autograd keeps for the adapter's backward pass, besides A x.
    keeps_input = True          # Whether it keeps the layer's input x, which is d_in wide.
    keeps_results = 0           # How many tensors it keeps that are d_out wide.

    def __init__(self, base: nn.Module, r: int, alpha: float | None, dropout: float, **options):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r = r
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout)
        self.settings = self.complete_options(options)
        self.enabled = True
        self.merged = False

    def delta(self) -> torch.Tensor:
        """Return the update of the base weight, in that weight's shape and at least fp32."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """Return the factor of the update, alpha / r."""
        return self.alpha / self.r

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the A (r, d_in) and B (d_out, r) that the forward pass uses."""
        return self.lora_A, self.lora_B

    def product(self) -> torch.Tensor:
        """Return scale * B A (d_out, d_in) in at least fp32, even if A and B are in 16 bits."""
        A, B = self.factors()
        dtype = at_least_fp32(A.dtype)
        return self.scale * (B.to(dtype) @ A.to(dtype))

    def trainable_zeros(self, *shape: int) -> nn.Parameter:
        """Return a parameter of zeros on the base's device, in fp32 (in fp64 over an fp64 base).

        In 16 bits the small steps of the optimizer would be rounded away.
        """
        base = reference_tensor(self.base)
        return nn.Parameter(torch.zeros(shape, device=base.device, dtype=at_least_fp32(base.dtype)))

    # Merging

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> tuple[float, float]:
        """Replace the base with a layer whose weight is base + delta.

        The sum is computed in at least fp32 and stored in the base's dtype.  The original base is
        kept for `unmerge`, unless keep_base is False.

        Returns two inner products, (stored . delta, delta . delta), where `stored` is the change of
        the stored weight.  Their ratio is the share of the update that survived the rounding.
        Raises ValueError if the layer is merged already.
        """
        if self.merged:
            raise ValueError("the adapter is already merged; a second merge would add it twice")
        delta = self.delta()
        if hasattr(self.base, "dequantize"):
            weight = self.base.dequantize(delta.dtype)
        else:
            weight = self.base.weight.to(delta.dtype)
        merged = (weight + delta).to(reference_tensor(self.base).dtype)
        # In a tuple, so that nn.Module does not register it as a child.
        self.original_base = (self.base if keep_base else None,)
        # The merged weight goes into a new layer, so that a tied embedding keeps its own.
        self.base = with_weight(self.base, merged)
        self.merged = True
        stored = merged.to(delta.dtype) - weight
        return (stored * delta).sum().item(), delta.square().sum().item()

    def unmerge(self):
        """Put the original base back.

        It is the original module, so this is exact unless the model was cast since the merge.
        Subtracting delta would round.
        Raises ValueError if the layer is not merged or the original base was not kept.
        """
        if not self.merged:
            raise ValueError("the adapter is not merged")
        if self.original_base[0] is None:
            raise ValueError("the base's original weights were not kept")
        # What the model did since the merge, the base does too: move, cast, train or eval.
        self.base = self.original_base[0].to(self.base.weight).train(self.training)
        del self.original_base
        self.merged = False

    # Options and hooks of a method

    @classmethod
    def complete_options(cls, options: dict) -> dict:
        """Return `options` with the method's defaults for those that are not given.

        Raises ValueError for an unknown name, a wrong type, or a whole number out of range.
        """
        for name, value in options.items():
            if name not in cls.options:
                names = ", ".join(cls.options) or "none"
                raise ValueError(f"unknown option {name!r}; options of {cls.__name__}: {names}")
            kind = type(cls.options[name])
            accepted = (int, float) if kind is float else kind
            # In Python True is an int, so bool needs a test of its own.
            if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{name} is {value!r}, must be {TYPE_NAMES[kind]}")
            if isinstance(value, int) and abs(value) > 2 ** 64:
                raise ValueError(f"{name} is out of range, must be from -2^64 to 2^64")
        return {**cls.options, **options}

    @classmethod
    def check(cls, config):
        """Raise ValueError for a LoRAConfig that the method does not support."""

    @classmethod
    def connect(cls, layers: list, config):
        """Set up what all adapter layers of a model share; called once, when all exist.

        config: the LoRAConfig that adapter files will hold.  The method may update its options.
        """

    def begin_step(self, step: int, loss: float | None) -> dict:
        """Prepare for optimizer step `step`, counted from 1, and return {name: value} to log.

        loss: the previous step's, over all ranks of a distributed run; None at the first step.
        """
        return {}

    def after_step(self):
        """Do what the method does after each optimizer step."""

    def state(self) -> dict:
        """Return what the method remembers between steps besides tensors, to resume a run."""
        return {}

    def load_state(self, state: dict):
        """Restore what `state` returned."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32 for the 16-bit dtypes; fp32 and fp64 stay as they are."""
    return torch.promote_types(dtype, torch.float32)


def reference_tensor(layer: nn.Module) -> torch.Tensor:
    """Return a tensor that has the dtype and the device that `layer` computes with."""
    # A quantised layer computes its weight anew on each access, so its dtype_holder is used.
    return layer.dtype_holder if hasattr(layer, "dtype_holder") else layer.weight


def with_weight(layer: nn.Module, weight: torch.Tensor) -> nn.Module:
    """Return a copy of `layer` with `weight` as its frozen weight; all else is shared with it."""
    if hasattr(layer, "with_weight"):
        return layer.with_weight(weight)
    other = copy.copy(layer)
    other._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return other


def check_rank(r: int, d_in: int, d_out: int):
    """Raise ValueError unless 1 <= r <= min(d_in, d_out)."""
    largest = min(d_in, d_out)
    if not 1 <= r <= largest:
        raise ValueError(f"r is {r}, must be 1 to {largest} for a layer of {d_out} x {d_in}")
