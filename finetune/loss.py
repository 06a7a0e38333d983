"""The loss of instruction tuning, as a sum and a count: whoever averages divides once, over all there is."""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .dataset import IGNORE

CHUNK = 128                                                      # rows of logits at a time in fp32


def summed_cross_entropy(logits, targets):
    """Sum of -log softmax(logits (R, V))[targets (R,)] in nats, in fp32 (or fp64): log-sum-exp in 16 bit is wrong."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def answer_rows(batch):
    """(rows, targets), (R,) int64 each: where in batch.tokens, flattened, an answer token is predicted, and which."""
    targets = batch.labels.flatten().roll(-1)                    # the shift by one, here and nowhere else
    targets[batch.labels.shape[1] - 1::batch.labels.shape[1]] = IGNORE        # nothing follows the last token
    rows = (targets != IGNORE).nonzero().flatten()
    return rows, targets[rows]


def in_chunks(loss, *tensors):
    """Sum of loss(*tensors), all (R, ...), over CHUNK rows at a time: backward wants several fp32 tensors as large as the
    logits, most of a step's peak, and so makes them anew, chunk by chunk."""
    chunks = zip(*(tensor.split(CHUNK) for tensor in tensors))
    return sum(checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)


def answer_loss(model, batch):
    """(sum, count): sum of -log p(answer token) in nats, an fp32 (or fp64) scalar, and the number of such tokens.

    Only positions whose next token is a target get logits.  Means of micro-batches must not be averaged:
    with 4 answer tokens in one and 60 in the next the gradient points elsewhere.  A batch without answer
    tokens gives 0, connected to the graph, where a mean would be 0/0.
    """
    rows, targets = answer_rows(batch)
    logits = model(batch.tokens, rows=rows.to(batch.tokens.device, non_blocking=True), layout=batch.layout)       # (R, V)
    loss = in_chunks(summed_cross_entropy, logits, targets.to(logits.device, non_blocking=True))
    return loss, batch.n_answer
