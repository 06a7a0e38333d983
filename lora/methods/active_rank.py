"""How DyLoRA chooses the active rank of a step: by chance, or by the loss."""
import math
import random

import torch


def rank_by_chance(seed: int, step: int, low: int, high: int) -> int:
    """Draw a rank uniformly from low..high; the same seed and step always give the same rank."""
    return random.Random(f"{seed}, {step}").randint(low, high)


def compile_once_for_all_ranks():
    """Let torch.compile take whole numbers that layers hold for variables.

    It would take a rank for a constant, compile each rank anew, and give up after eight.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True


class RankByLoss:
    """A rank that goes down by one after a good step and up by one after any other.

    A step is good if its loss is below the mean of the losses before it.  So the adapter gives up
    rank while the loss falls, and gets it back where the loss stalls.

    The mean is exponential: 0.9 of the old mean plus 0.1 of the new loss.  The rank starts at
    `high` and stays within low..high.  A loss that is nan or infinite changes nothing.
    """

    def __init__(self, low: int, high: int):
        self.low = low
        self.high = high
        self.rank = high
        self.mean = None
        self.step = None

    def next_rank(self, step: int, loss: float | None) -> int:
        """Return the rank for optimizer step `step`.

        loss: of the step before, over all processes of a distributed run, so that all of them
        choose the same rank; None before the first step.
        """
        # Each layer asks in each step, but a loss counts once.
        if step != self.step and loss is not None and math.isfinite(loss):
            self.update(loss)
        self.step = step
        return self.rank

    def update(self, loss: float):
        """Move the rank by the loss, then the mean."""
        if self.mean is None:
            self.mean = loss
            return
        if loss < self.mean:
            self.rank = max(self.low, self.rank - 1)
        else:
            self.rank = min(self.high, self.rank + 1)
        self.mean = 0.9 * self.mean + 0.1 * loss
