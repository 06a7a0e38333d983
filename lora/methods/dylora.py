"""DyLoRA (Valipour et al. 2023): one adapter, trained to work at every rank up to r."""
import torch.nn as nn

from ..layers import LoRAEmbedding, LoRALinear, lora_layers
from .active_rank import RankByLoss, compile_once_for_all_ranks, rank_by_chance


class DyLoRA:
    """y = W0 x + (alpha / b) B[:, :b] A[:b] dropout(x), with an active rank b <= r (DyLoRA).

    Each training step has its own b, the same for all layers, so the first rows of A and columns of
    B learn to work without the later ones.  The later ones take no part in the step: their gradient
    is zero, although Adam's momentum still moves them.  Shapes and starting state are LoRA's: the
    layer equals its base to the bit until the first step.  After training, `set_rank(model, b)`
    chooses any rank up to r; merges and files use that rank.

    options: rank_by="chance" draws b uniformly from rank_min..r, by (seed, step) alone;
    rank_by="loss" lets `RankByLoss` move b within rank_min..r, and its last b is the one to use;
    rank is the b outside of training, and 0 means r.
    Raises ValueError unless 1 <= rank_min <= r and 0 <= rank <= r.
    """
    options = {"seed": 0, "rank_by": "chance", "rank_min": 1, "rank": 0}
    step_rank = None            # The active rank of the current training step.

    @classmethod
    def check(cls, config):
        options = config.options
        if options["rank_by"] not in ("chance", "loss"):
            raise ValueError(f"rank_by is {options['rank_by']!r}, must be chance or loss")
        for name, least in (("rank_min", 1), ("rank", 0)):
            if not least <= options[name] <= config.r:
                raise ValueError(f"{name} is {options[name]}, must be {least} to r, {config.r}")

    @classmethod
    def connect(cls, layers, config):
        controller = RankByLoss(config.options["rank_min"], config.r)
        compile_once_for_all_ranks()
        for layer in layers:
            layer.settings = config.options     # One dict for all, the one that files hold.
            layer.controller = controller

    @property
    def rank(self) -> int:
        return (self.step_rank if self.training else 0) or self.settings["rank"] or self.r

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self):
        return self.lora_A[:self.rank], self.lora_B[:, :self.rank]

    def merge(self, keep_base=True):
        self.step_rank = None                   # Merge the chosen rank, not the last step's.
        return super().merge(keep_base)

    def begin_step(self, step, loss):
        options = self.settings
        if options["rank_by"] == "loss":
            self.step_rank = options["rank"] = self.controller.next_rank(step, loss)
        else:
            self.step_rank = rank_by_chance(options["seed"], step, options["rank_min"], self.r)
        return {"rank": self.step_rank}

    def state(self):
        return {"rank": self.settings["rank"], "by_loss": dict(vars(self.controller))}

    def load_state(self, state):
        self.settings["rank"] = state["rank"]
        vars(self.controller).update(state["by_loss"])


def set_rank(model: nn.Module, b: int):
    """Use rank b outside of training.  Raises ValueError for a wrong b or a merged adapter."""
    layers = [layer for layer in lora_layers(model).values() if isinstance(layer, DyLoRA)]
    if not layers:
        raise ValueError("the model has no dylora adapter")
    if not 1 <= b <= layers[0].r:
        raise ValueError(f"rank is {b}, must be 1 to {layers[0].r}")
    if layers[0].merged:
        raise ValueError("the adapter is merged into the weights; unmerge it first")
    for layer in layers:
        layer.settings["rank"] = b
        layer.step_rank = None


class DyLoRALinear(DyLoRA, LoRALinear):
    """x (..., d_in) -> y (..., d_out), over an nn.Linear with the weight (d_out, d_in)."""


class DyLoRAEmbedding(DyLoRA, LoRAEmbedding):
    """t (...) int64 -> y (..., D), over an nn.Embedding with the weight (V, D)."""


LAYERS = {nn.Linear: DyLoRALinear, nn.Embedding: DyLoRAEmbedding}
