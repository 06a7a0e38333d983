"""Ours against recorded numbers of transformers and PEFT (tests/recorded.json), where those are not installed."""
import json

import pytest
import torch

from .record import (RECORDED, RECORDED_SHAPES, SHAPES, ids, layer_numbers, our_greedy, our_layer, ours, sampled_adapter,
                     sampled_logits, trained_by_us)

THEIRS = json.loads(RECORDED.read_text())


@pytest.mark.parametrize("shape", RECORDED_SHAPES)
def test_logits(shape):
    with torch.no_grad():
        found = sampled_logits(ours(**SHAPES[shape])(ids(1, 200, 53))).flatten()
    difference = (found - torch.tensor(THEIRS[f"logits, {shape}"])).abs().max().item() / THEIRS[f"largest logit, {shape}"]
    print(f"\nrecorded logits, {shape}: largest difference {difference:.1e} of the largest logit")
    assert difference <= 1e-5


def test_greedy_text():
    assert our_greedy("GQA") == THEIRS["greedy, GQA"]


@pytest.mark.parametrize("kind", ["LoRALinear", "LoRAEmbedding"])
def test_adapter_layers(kind):
    differences = {}
    for what, tensor in layer_numbers(kind, *our_layer(kind)).items():
        expected = torch.tensor(THEIRS[f"{kind}, {what}"])
        differences[what] = ((tensor.flatten() - expected).norm() / expected.norm()).item()
    print(f"\nrecorded {kind}: largest difference {max(differences.values()):.1e} of the norm")
    assert max(differences.values()) <= 1e-6


def test_fifty_steps():
    rows, adapter = trained_by_us()
    loss = max(abs(row["loss"] - other) for row, other in zip(rows, THEIRS["losses"], strict=True))
    expected = {key.removeprefix("adapter, "): value for key, value in THEIRS.items() if key.startswith("adapter, ")}
    assert adapter.keys() == expected.keys()
    difference = max((sampled_adapter(adapter[name]) - torch.tensor(theirs["values"])).norm().item() / theirs["norm"]
                     for name, theirs in expected.items())
    print(f"\nrecorded 50 steps: largest difference {loss:.1e} in the loss, {difference:.1e} of the adapter's norm")
    assert loss <= 1e-4 and difference <= 1e-4


def test_the_file_says_what_made_it():
    assert THEIRS["made by"].keys() == {"torch", "transformers", "peft"} and RECORDED.stat().st_size < 30_000
