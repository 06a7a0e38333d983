"""finetune/loss.py: a sum by a count, so a step's gradient does not depend on how it is cut."""
import torch
import torch.nn.functional as F

from finetune.batches import DataCollatorForSupervisedDataset
from finetune.dataset import IGNORE
from finetune.loss import answer_loss

from .helpers import tiny


def rows(n=8):
    """Rows with 1 to 60 answer tokens: means of micro-batches would be far off."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for i in range(n):
        prompt = [1] + torch.randint(3, 50, (2 + i,), generator=draw).tolist()
        answer = torch.randint(3, 50, ((1, 60, 3, 17)[i % 4],), generator=draw).tolist() + [2]
        made.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    return made


def collate(some):
    return DataCollatorForSupervisedDataset(pad_id=2)(some)


def gradient(batches, checkpointing=False):
    model = tiny(n_kv_heads=2).double()
    model.checkpointing = checkpointing
    n_answer = sum(batch.n_answer for batch in batches)
    for batch in batches:
        (answer_loss(model, batch)[0] / n_answer).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def cut(*sizes):
    items = iter(rows())
    return [collate([next(items) for _ in range(size)]) for size in sizes]


def test_batch_of_8_equals_4x2_equals_3_3_2_equals_checkpointing():
    whole = gradient(cut(8))
    for sizes in ((4, 4), (2, 2, 2, 2), (3, 3, 2), (1, 7), (8,)):
        for checkpointing in (False, True):
            other = gradient(cut(*sizes), checkpointing)
            assert (whole - other).norm() <= 1e-12 * whole.norm()


def test_equal_to_cross_entropy_written_out():
    model, batch = tiny().double(), cut(3)[0]
    logits = model(batch.tokens)
    loss, count = 0.0, 0
    for b in range(3):
        for t in range(1, batch.tokens.shape[1]):
            if batch.labels[b, t] != IGNORE:
                # Position t - 1 predicts token t.
                loss += -logits[b, t - 1].log_softmax(-1)[batch.labels[b, t]]
                count += 1
    ours, n = answer_loss(model, batch)
    assert torch.allclose(ours, loss, rtol=1e-12) and n == count == batch.n_answer


def test_logits_are_widened_for_the_loss():
    model, batch = tiny().bfloat16(), cut(2)[0]
    loss, _ = answer_loss(model, batch)
    assert loss.dtype == torch.float32
    logits = model(batch.tokens)[:, :-1].flatten(0, 1).float()
    wide = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(loss, wide, rtol=1e-3)


