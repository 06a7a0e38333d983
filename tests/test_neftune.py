"""NEFTune against a case made by hand; it acts in training alone, and no file has it."""
import math

import pytest
import torch

from finetune.batches import pack
from finetune.neftune import add_embedding_noise
from lora import lora_state_dict

from .helpers import adapt, tiny, untimed

ALPHA = 5.0
D = 32


@pytest.fixture
def noisy(monkeypatch):
    """A model in training mode whose "random" noise is 1 everywhere."""
    model = tiny()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, low, high: tensor.fill_(high))
    model.seen = []
    add_embedding_noise(model, ALPHA)
    model.layers[0].register_forward_pre_hook(lambda _, args: model.seen.append(args[0]))
    return model.train()


def added(model, tokens, layout=None):
    """Return what a forward adds to the embeddings (B, T, D), checked to be equal along D."""
    model(tokens, layout=layout)
    with torch.no_grad():
        noise = model.seen[-1] - model.tok_embeddings.weight[tokens]
    assert torch.allclose(noise, noise[..., :1].expand_as(noise), atol=1e-6)
    return noise[..., 0]


def strength(length):
    return ALPHA / math.sqrt(length * D)


def test_each_example_of_a_packed_row_has_its_own_length(noisy):
    batch = pack([([5, 6, 7], [5, 6, 7]), ([8, 9, 10, 11, 12], [8, 9, 10, 11, 12])])
    expected = torch.tensor([[strength(3)] * 3 + [strength(5)] * 5])
    assert torch.allclose(added(noisy, batch.tokens, batch.layout), expected, atol=1e-6)


def test_a_shared_beginning_has_the_length_of_the_longest(noisy):
    start = list(range(20, 32))
    rows = []
    for answer in ([40, 41], [50, 51, 52, 53, 54]):
        rows.append((start + answer, [-100] * 12 + answer))
    batch = pack(rows, share_prefix=True)
    assert batch.tokens.shape[1] < 14 + 17           # Something is shared.
    n_shared = 31 - batch.tokens.shape[1]
    lengths = [17] * n_shared + [14] * (14 - n_shared) + [17] * (17 - n_shared)
    expected = torch.tensor([[strength(length) for length in lengths]])
    assert torch.allclose(added(noisy, batch.tokens, batch.layout), expected, atol=1e-6)


def test_a_padded_batch_has_one_length(noisy):
    assert torch.allclose(added(noisy, torch.ones(2, 6, dtype=torch.long)),
                          torch.full((2, 6), strength(6)), atol=1e-6)


def test_no_noise_in_eval_mode_and_none_in_what_is_saved():
    noisy = tiny()
    add_embedding_noise(noisy, ALPHA)
    plain = tiny()
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(noisy.eval()(tokens), plain(tokens))
    assert noisy.state_dict().keys() == plain.state_dict().keys()


def test_noise_is_new_each_time_uniform_and_in_the_embeddings_dtype():
    model = adapt(tiny(), targets=("tok_embeddings", "wq")).to(torch.bfloat16).train()
    seen = []
    add_embedding_noise(model, ALPHA)
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.ones(1, 400, dtype=torch.long)
    for _ in range(2):
        model(tokens)
    assert seen[0].dtype == torch.bfloat16 and not torch.equal(seen[0], seen[1])
    noise = (seen[0] - seen[1]).detach().float() / strength(400)     # of two uniform numbers
    assert noise.abs().max() <= 2.1 and abs(noise.mean()) < 0.02
    assert noise.var().item() == pytest.approx(2 / 3, rel=0.05)
    assert all("noise" not in name for name in lora_state_dict(model))


def test_a_run_with_noise(run, data, capsys):
    """Only training sees it: before the first step the held-out loss is the same."""
    argv = ["--val-data", str(data), "--max-steps", "4", "--dropout", "0"]
    plain = run("plain", *argv)
    before = first_held_out(capsys)
    noisy = run("noisy", *argv, "--neftune-alpha", "5")
    assert first_held_out(capsys) == before
    assert [row["loss"] for row in noisy] != [row["loss"] for row in plain]
    assert untimed(run("again", *argv, "--neftune-alpha", "5")) == untimed(noisy)


def first_held_out(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("before")]
