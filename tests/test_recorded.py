"""Ours against recorded numbers of transformers and PEFT, where those are not installed."""
import json

import pytest
import torch

from .record import (RECORDED, RECORDED_SHAPES, SHAPES, ids, layer_numbers, our_greedy, our_layer,
                     ours, sampled_adapter, sampled_logits, trained_by_us)

THEIRS = json.loads(RECORDED.read_text())


@pytest.mark.parametrize("shape", RECORDED_SHAPES)
def test_logits(shape):
    with torch.no_grad():
        logits = sampled_logits(ours(**SHAPES[shape])(ids(1, 200, 53))).flatten()
    off = (logits - torch.tensor(THEIRS[f"logits, {shape}"])).abs().max().item()
    share = off / THEIRS[f"largest logit, {shape}"]
    print(f"\nrecorded logits, {shape}: largest difference {share:.1e} of the largest logit")
    assert share <= 1e-5


def test_greedy_text():
    assert our_greedy("GQA") == THEIRS["greedy, GQA"]


@pytest.mark.parametrize("kind", ["LoRALinear", "LoRAEmbedding"])
def test_adapter_layers(kind):
    shares = []
    for name, tensor in layer_numbers(kind, *our_layer(kind)).items():
        expected = torch.tensor(THEIRS[f"{kind}, {name}"])
        shares.append(((tensor.flatten() - expected).norm() / expected.norm()).item())
    print(f"\nrecorded {kind}: largest difference {max(shares):.1e} of the norm")
    assert max(shares) <= 1e-6


def test_fifty_steps():
    rows, adapter = trained_by_us()
    pairs = zip(rows, THEIRS["losses"], strict=True)
    loss = max(abs(row["loss"] - other) for row, other in pairs)
    shares = []
    for name, tensor in adapter.items():
        theirs = THEIRS[f"adapter, {name}"]
        off = (sampled_adapter(tensor) - torch.tensor(theirs["values"])).norm().item()
        shares.append(off / theirs["norm"])
    assert len(adapter) == sum(key.startswith("adapter, ") for key in THEIRS)
    print(f"\nrecorded 50 steps: largest difference {loss:.1e} in the loss, {max(shares):.1e} of "
          "the adapter's norm")
    assert loss <= 1e-4 and max(shares) <= 1e-4
