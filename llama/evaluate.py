"""How well a model does on examples that it was not trained on."""
import torch

from .cli import sum_over_ranks
from .loss import answer_loss


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """Mean loss in nats per answer token over the batches of all ranks: one sum by one count, whatever their size.

    `model` is the bare one, not DDP's: the ranks may have different numbers of batches, and none waits for another.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        with autocast:
            loss, n = answer_loss(model, batch.to(device))
        total += torch.tensor([loss.item(), n])
    model.train()
    total = sum_over_ranks(total)
    return (total[0] / total[1]).item()
