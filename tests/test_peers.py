"""Ours against transformers' LLaMA, PEFT's LoRA, and a training loop over the two.

Needs tests/requirements.txt and is skipped without.  `pytest -s tests/test_peers.py` prints the
largest differences.
"""
import json
from importlib.util import find_spec

import pytest
import torch

from benchmarks.measure import Peaks
from benchmarks.request import Request
from benchmarks.runs import SHAPE_CONFIG
from benchmarks.runs import SHAPES as SHAPES_OF_RUNS
from finetune.dataset import IGNORE, encode_example, encode_prompt
from finetune.templates import TEMPLATES
from llama.files import write_json
from llama.tokenizer_json import tokenizer_json

from .peers import train as train_peer
from .record import (LAYERS, SHAPES, ids, layer_numbers, our_greedy, our_layer, ours, peer_greedy,
                     peer_layer, peer_model, trained_by_peers, trained_by_us)

TINY = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6,
        "intermediate_size": 64, "vocab_size": 60}
HAS_PEERS = find_spec("transformers") is not None and find_spec("peft") is not None
pytestmark = [
    pytest.mark.skipif(not HAS_PEERS, reason="needs transformers and peft: pip install -r "
                                             "tests/requirements.txt"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers")]    # PEFT calls what there is.


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape):
    model = ours(**SHAPES[shape])
    peer = peer_model(model)
    share = 0.0
    with torch.no_grad():
        for T in (1, 2, 37, 512):
            tokens = ids(2, T, 53)
            expected = peer(tokens).logits
            off = (model(tokens) - expected).abs().max() / expected.abs().max()
            share = max(share, off.item())
    print(f"\nlogits, {shape}: largest difference {share:.1e} of the largest logit")
    assert share <= 1e-5


@pytest.mark.parametrize("shape", ["MHA", "GQA", "odd sizes, multiple of 1"])
def test_greedy_text_equals_transformers_token_for_token(shape):
    answers = our_greedy(shape)
    expected = peer_greedy(shape)
    n_tokens = sum(map(len, expected))
    n_different = 0
    for answer, right in zip(answers, expected, strict=True):
        n_different += sum(a != b for a, b in zip(answer, right, strict=True))
    print(f"\ngreedy text, {shape}: {n_different} of {n_tokens} tokens differ")
    assert answers == expected and all(len(answer) == 30 for answer in answers)


@pytest.mark.parametrize("kind", LAYERS)
def test_adapter_layers_equal_peft(kind):
    """Output, gradients of A, B and x, merged weight."""
    expected = layer_numbers(kind, *peer_layer(kind))
    tensors = layer_numbers(kind, *our_layer(kind))
    assert tensors.keys() == expected.keys()
    share = max(relative(tensors[name], expected[name]) for name in expected)
    print(f"\n{kind}: largest difference {share:.1e} of the norm")
    assert share <= 1e-6


def test_fifty_steps_equal_a_plain_loop_over_transformers_and_peft():
    """Every second step has half the examples; some steps are clipped and some are not."""
    rows, adapter = trained_by_us()
    losses, expected = trained_by_peers()
    assert adapter.keys() == expected.keys()
    pairs = zip(rows, losses, strict=True)
    loss = max(abs(row["loss"] - other) for row, other in pairs)
    shares = {name: relative(adapter[name], tensor) for name, tensor in expected.items()}
    worst = max(shares, key=shares.get)
    print(f"\n50 steps, loss {losses[0]:.2f} to {losses[-1]:.2f}: largest difference {loss:.1e} "
          f"in the loss, {shares[worst]:.1e} of the adapter's norm ({worst})")
    assert loss <= 1e-4 and shares[worst] <= 1e-4
    assert min(row["grad_norm"] for row in rows) < 1 < max(row["grad_norm"] for row in rows)
    assert losses[-1] < losses[0] / 2


def test_the_plain_loop_has_the_same_loss_with_and_without_padding(tmp_path):
    """So that both of the benchmark's loops do one job; the examples have four lengths."""
    write_json(tmp_path / "config.json", SHAPE_CONFIG | SHAPES_OF_RUNS["135m"] | TINY)
    rows = []
    for n in (40, 9, 25, 17):
        rows.append((list(range(3, 3 + n)), [IGNORE] * 5 + list(range(8, 3 + n))))
    losses = {}
    for batching in ("padded", "padding-free"):
        request = Request("transformers", str(tmp_path), True, None, "cpu", "fp32", batch=4,
                          steps=3, warm=1, batching=batching)
        torch.manual_seed(0)
        losses[batching] = train_peer(request, rows, Peaks(torch.device("cpu")))["loss"]
    assert losses["padding-free"] == pytest.approx(losses["padded"], abs=1e-5)


@pytest.mark.parametrize("system", [None, "", "Be brief.\n"])
def test_chats_have_the_ids_of_transformers_template(tokenizer, tmp_path, system):
    from transformers import PreTrainedTokenizerFast
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(tokenizer.sp, special)))
    peer = PreTrainedTokenizerFast(tokenizer_file=str(path), **special)
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts = [" Name a colour.\n", "blue", "And [INST] or <<SYS>>?", "- one\n- two\n"]
    for i, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    for n in (len(messages), len(messages) - 1):
        expected = peer.apply_chat_template(messages[:n], tokenize=True, return_dict=False,
                                            chat_template=TEMPLATES["llama2"].chat_template)
        chat = {"messages": messages[:n]}
        if n == len(messages):
            tokens, _ = encode_example(chat, tokenizer, TEMPLATES["llama2"])
        else:
            tokens = encode_prompt(chat, tokenizer, TEMPLATES["llama2"])
        assert tokens == expected
