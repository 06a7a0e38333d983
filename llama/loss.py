"""The loss of instruction tuning, as a sum and a count: whoever averages divides once, over all there is."""
import torch
import torch.nn.functional as F

from .alpaca import IGNORE


def answer_loss(model, batch):
    """(sum, count): sum of -log p(answer token) in nats, an fp32 (or fp64) scalar, and the number of such tokens.

    Only positions whose next token is a target get logits.  Means of micro-batches must not be averaged:
    with 4 answer tokens in one and 60 in the next the gradient points elsewhere.  A batch without answer
    tokens gives 0, connected to the graph, where a mean would be 0/0.
    """
    targets = batch.labels.roll(-1, dims=1)                      # the shift by one, here and nowhere else
    targets[:, -1] = IGNORE                                      # nothing follows the last token
    rows = targets != IGNORE                                     # (B, T)
    logits = model(batch.tokens, rows=rows)                      # (rows.sum(), V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))      # log-sum-exp in 16 bit is wrong
    return F.cross_entropy(logits, targets[rows], reduction="sum"), batch.n_answer
