"""DyLoRA's other way to choose an active rank: a controller that listens to the loss."""
import math


class RankByLoss:
    """The active rank by the loss: one less after a step better than the mean of those before it, else one more.

    While the loss falls the adapter gives rank up, where it stalls it gets it back.  The mean is an exponential
    one (0.9 of the old, 0.1 of the new), the loss the step's over all ranks of a distributed run, so all take the
    same path.  It starts at `high` and stays within low..high.  A loss that is no number changes nothing.
    """

    def __init__(self, low, high):
        self.low, self.high, self.rank, self.mean, self.step = low, high, high, None, None

    def __call__(self, step, loss):
        if step != self.step and loss is not None and math.isfinite(loss):        # once a step, whichever layer asks
            if self.mean is not None:
                self.rank = max(self.low, self.rank - 1) if loss < self.mean else min(self.high, self.rank + 1)
            self.mean = loss if self.mean is None else 0.9 * self.mean + 0.1 * loss
        self.step = step
        return self.rank
