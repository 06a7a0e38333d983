"""The loss of instruction tuning: a sum and a count, so that the mean needs one division only."""
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .batches import Batch, to_device
from .dataset import IGNORE

CHUNK = 128                                          # rows of logits in fp32 at a time


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of -log softmax(logits (R, V))[targets (R,)], in nats.

    It is computed in fp32 (or fp64): a log-sum-exp in 16 bit is too inexact.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum")


def answer_rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows, targets), both (R,) int64: where answer tokens are predicted, and their ids.

    rows: indices into the flattened batch.tokens.
    """
    T = batch.labels.shape[1]
    # This is the shift by one: row t predicts token t + 1.  No other code shifts.
    targets = batch.labels.flatten().roll(-1)
    targets[T - 1::T] = IGNORE                       # Nothing follows the last token.
    rows = (targets != IGNORE).nonzero().flatten()
    return rows, targets[rows]


def in_chunks(loss: Callable, *tensors: torch.Tensor) -> torch.Tensor:
    """Return the sum of loss(*tensors), computed on CHUNK rows of the tensors (R, ...) at a time.

    The backward pass needs several fp32 tensors as large as the logits, which would be most of a
    step's peak memory.  So backward computes them anew for one chunk at a time, and frees them
    before the next chunk.
    """
    chunks = zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)
    return sum(checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False)
               for chunk in chunks)


def answer_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Return (sum of -log p(answer token), number of answer tokens).

    The sum is a scalar in nats, in fp32 (or fp64).  Only the rows that predict an answer token get
    logits.  Never average the means of micro-batches: with 4 answer tokens in one and 60 in the
    next, each token of the first would weigh 15 times more.  A batch without answer tokens gives a
    0 on which backward() works; its mean would be 0/0.
    """
    rows, targets = answer_rows(batch)
    rows = to_device(rows, batch.tokens.device)
    logits = model(batch.tokens, rows=rows, layout=batch.layout)               # (R, V)
    loss = in_chunks(summed_cross_entropy, logits, to_device(targets, logits.device))
    return loss, batch.n_answer
