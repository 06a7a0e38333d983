"""DyLoRA (Valipour et al. 2023): one adapter that has been trained to work at every rank up to r."""
import random

import torch.nn as nn

from ..layers import LoRAEmbedding, LoRALayer, LoRALinear, lora_layers
from .rank_by_loss import RankByLoss


class DyLoRA(LoRALayer):
    """y = W0 x + (alpha / b) B[:, :b] A[:b] dropout(x), for an active rank b <= r (DyLoRA).

    Each training step has a b of its own, the same for all layers, so the first rows of A and columns of B learn
    to do without the later ones.  Those take no part in that step; their gradient is zero, though Adam's momentum
    still moves them.  Shapes and starting state are LoRA's: it equals its base to the bit until the first step.

    Afterwards `set_rank(model, b)` chooses any rank there is; merge and file take the one that is chosen.

    options: rank_by "chance": b is drawn uniformly from rank_min to r, by (seed, step) and nothing else;
             rank_by "loss": `RankByLoss` moves it within the same bounds, and where it ends is the rank to use;
             rank: the rank outside of training, 0 for r.
    Raises ValueError unless 1 <= rank_min <= r and 0 <= rank <= r.
    """
    options = {"seed": 0, "rank_by": "chance", "rank_min": 1, "rank": 0}

    @classmethod
    def check(cls, config):
        own = config.options
        if own["rank_by"] not in ("chance", "loss"):
            raise ValueError(f"rank_by is {own['rank_by']!r}, must be chance or loss")
        if not 1 <= own["rank_min"] <= config.r or not 0 <= own["rank"] <= config.r:
            raise ValueError(f"rank_min is {own['rank_min']} and rank {own['rank']}, must be within r, {config.r}")

    @classmethod
    def connect(cls, layers, config):
        own = config.options
        by_loss = RankByLoss(own["rank_min"], config.r)
        for layer in layers:
            layer.settings = own                                  # the very dict that is saved: one place for the rank
            layer.by_loss = by_loss

    drawn = None                                                  # the rank of this training step

    @property
    def rank(self):
        return self.drawn if self.training and self.drawn else self.settings["rank"] or self.r

    @property
    def scale(self):
        return self.alpha / self.rank

    def factors(self):
        return self.lora_A[:self.rank], self.lora_B[:, :self.rank]

    def merge(self, keep_base=True):
        self.drawn = None                                         # a merge is of the chosen rank, not of the last step's
        return super().merge(keep_base)

    def begin_step(self, step, loss):
        own = self.settings
        if own["rank_by"] == "loss":
            self.drawn = own["rank"] = self.by_loss(step, loss)
        else:
            self.drawn = random.Random(f"{own['seed']}, {step}").randint(own["rank_min"], self.r)
        return {"rank": self.drawn}

    def state(self):
        return {"rank": self.settings["rank"], "by_loss": dict(vars(self.by_loss))}           # all layers share the two

    def load_state(self, state):
        self.settings["rank"] = state["rank"]
        vars(self.by_loss).update(state["by_loss"])


def set_rank(model, b):
    """Use rank b outside of training.  Raises ValueError where there is no such rank, or the adapter is merged."""
    layers = [layer for layer in lora_layers(model).values() if isinstance(layer, DyLoRA)]
    if not layers or not 1 <= b <= layers[0].r:
        raise ValueError(f"no rank {b}: there is 1 to {layers[0].r}" if layers else "the model has no dylora adapter")
    if layers[0].merged:
        raise ValueError("the adapter is merged into the weights; unmerge it first")
    for layer in layers:
        layer.settings["rank"], layer.drawn = b, None


class DyLoRALinear(DyLoRA, LoRALinear):
    """x (..., d_in) -> (..., d_out), over nn.Linear (d_out, d_in)."""


class DyLoRAEmbedding(DyLoRA, LoRAEmbedding):
    """t (...) int64 -> (..., D), over nn.Embedding (V, D)."""


LAYERS = {nn.Linear: DyLoRALinear, nn.Embedding: DyLoRAEmbedding}
