"""Ours against independent implementations: transformers' LLaMA, PEFT's LoRA, and a training loop over the two.

Needs tests/requirements.txt and is skipped without; `pytest -s tests/test_peers.py` prints the largest differences.
"""
from importlib.util import find_spec

import pytest
import torch

from .record import (LAYERS, SHAPES, ids, layer_numbers, our_greedy, our_layer, ours, peer_greedy, peer_layer, peer_model,
                     to_halves, to_pairs, trained_by_peers, trained_by_us)

pytestmark = [pytest.mark.skipif(not (find_spec("transformers") and find_spec("peft")),
                                 reason="needs transformers and peft: pip install -r tests/requirements.txt"),
              pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]       # what PEFT calls there, not us


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape):
    model, difference = ours(**SHAPES[shape]), 0.0
    peer = peer_model(model)
    with torch.no_grad():
        for T in (1, 2, 37, 512):
            tokens = ids(2, T, 53)
            expected = peer(tokens).logits
            difference = max(difference, ((model(tokens) - expected).abs().max() / expected.abs().max()).item())
    print(f"\nlogits, {shape}: largest difference {difference:.1e} of the largest logit")
    assert difference <= 1e-5


@pytest.mark.parametrize("shape", ["MHA", "GQA", "odd sizes, multiple of 1"])
def test_greedy_text_equals_transformers_token_for_token(shape):
    answers, expected = our_greedy(shape), peer_greedy(shape)
    different = sum(a != b for ours, theirs in zip(answers, expected) for a, b in zip(ours, theirs, strict=True))
    print(f"\ngreedy text, {shape}: {different} of {sum(map(len, expected))} tokens differ")
    assert answers == expected and all(len(answer) == 30 for answer in answers)


@pytest.mark.parametrize("kind", LAYERS)
def test_adapter_layers_equal_peft(kind):
    """Output, gradients of A, B and x, merged weight."""
    expected = layer_numbers(kind, *peer_layer(kind))
    found = layer_numbers(kind, *our_layer(kind))
    differences = {what: ((found[what] - expected[what]).norm() / expected[what].norm()).item() for what in expected}
    assert found.keys() == expected.keys()
    print(f"\n{kind}: largest difference {max(differences.values()):.1e} of the norm")
    assert max(differences.values()) <= 1e-6


def test_rows_go_to_halves_and_back():
    """The one rearrangement between the two layouts, by hand: 2 heads of width 4."""
    rows = torch.arange(8)[:, None]
    assert to_halves(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(to_pairs(to_halves(rows, 2), 2), rows)


def test_fifty_steps_equal_a_plain_loop_over_transformers_and_peft():
    """Every second step has half the examples; warm-up and cosine; some steps are clipped and some are not."""
    rows, adapter = trained_by_us()
    losses, expected = trained_by_peers()
    loss = max(abs(row["loss"] - other) for row, other in zip(rows, losses, strict=True))
    assert adapter.keys() == expected.keys()
    differences = {name: ((adapter[name] - other).norm() / other.norm()).item() for name, other in expected.items()}
    worst = max(differences, key=differences.get)
    print(f"\n50 steps, loss {losses[0]:.2f} to {losses[-1]:.2f}: largest difference {loss:.1e} in the loss, "
          f"{differences[worst]:.1e} of the adapter's norm ({worst})")
    assert loss <= 1e-4 and differences[worst] <= 1e-4
    assert min(row["grad_norm"] for row in rows) < 1 < max(row["grad_norm"] for row in rows)
    assert losses[-1] < losses[0] / 2
