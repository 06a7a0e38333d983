"""finetune/loss.py: a sum by a count, so that the gradient does not depend on how a step is cut into micro-batches."""
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
    for other in (gradient(cut(4, 4)), gradient(cut(2, 2, 2, 2)), gradient(cut(3, 3, 2)), gradient(cut(1, 7)),
                  gradient(cut(8), checkpointing=True), gradient(cut(3, 3, 2), checkpointing=True)):
        assert (whole - other).norm() <= 1e-12 * whole.norm()


def test_the_mean_of_micro_batch_means_is_another_gradient():
    model, batches = tiny(n_kv_heads=2).double(), cut(1, 1)                      # 2 and 61 answer tokens
    for batch in batches:
        loss, count = answer_loss(model, batch)
        (loss / count / 2).backward()
    wrong, right = torch.cat([p.grad.flatten() for p in model.parameters()]), gradient(batches)
    assert (wrong - right).norm() > 0.5 * right.norm()


def test_equal_to_cross_entropy_written_out():
    model, batch = tiny().double(), cut(3)[0]
    logits = model(batch.tokens)
    loss, count = 0.0, 0
    for b in range(3):
        for t in range(1, batch.tokens.shape[1]):
            if batch.labels[b, t] != IGNORE:
                loss += -logits[b, t - 1].log_softmax(-1)[batch.labels[b, t]]    # position t - 1 predicts token t
                count += 1
    ours, n = answer_loss(model, batch)
    assert torch.allclose(ours, loss, rtol=1e-12) and n == count == batch.n_answer


def test_logits_are_widened_for_the_loss():
    model, batch = tiny().bfloat16(), cut(2)[0]
    loss, _ = answer_loss(model, batch)
    assert loss.dtype == torch.float32
    wide = F.cross_entropy(model(batch.tokens)[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(loss, wide, rtol=1e-3)


def test_a_batch_without_answer_tokens_is_zero_and_connected():
    model, batch = tiny(), cut(2)[0]
    loss, count = answer_loss(model, batch._replace(labels=torch.full_like(batch.labels, IGNORE), n_answer=0))
    loss.backward()
    assert loss.item() == 0.0 and count == 0
    assert all(p.grad is not None and not p.grad.isnan().any() and not p.grad.any() for p in model.parameters())


def test_padding_is_no_target():
    model, pair = tiny(), rows(2)
    apart = sum(answer_loss(model, collate([row]))[0].item() for row in pair)
    assert abs(answer_loss(model, collate(pair))[0].item() - apart) < 1e-4 * apart
