"""Fixtures: a tokenizer trained in memory and a tiny checkpoint, so that no test needs a download."""
import io
import json
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

import train
from llama import ModelArgs, Tokenizer, Transformer, save_checkpoint
from finetune.batches import plan_epoch, windows

ROOT = Path(__file__).parents[1]
CORPUS = [
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request.", "### Instruction: ### Input: ### Response:",
    "Name a colour.", "What is the opposite of hot?", "The sky is blue and the grass is green.", "Blue", "cold",
    "Count to three: one, two, three.", "- a list - of things", "Is this sentence happy or sad?", "happy sad yes no",
]
EXAMPLES = [{"instruction": f"Say {word} {'again ' * (i % 3)}please.", "input": "quietly" * (i % 2), "output": f"{word} " * (1 + i % 4)}
            for i, word in enumerate("blue cold one two three green happy sad yes no sky grass".split())]


torch.set_num_threads(1)                                    # for tensors this small, threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Runs leave no picture, wherever matplotlib is installed: it would take most of a tiny run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "picture_of", lambda out: "none")
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A 400-piece BPE with Llama 2's special ids: unk 0, bos 1, eos 2, no pad."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, model_type="bpe", vocab_size=400, byte_fallback=True,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return Tokenizer(out.getvalue())


def tiny(vocab_size=400, **sizes):
    """A small random model in eval mode, the same for the same sizes."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**{**dict(dim=32, n_layers=2, n_heads=4, vocab_size=vocab_size, multiple_of=16), **sizes}))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)             # large enough for every part to matter
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def base(tmp_path, tokenizer):
    """A folder with a checkpoint in Meta's layout: 2 layers of GQA, fp32."""
    save_checkpoint(tiny(tokenizer.vocab_size, n_kv_heads=2), tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path):
    """A file of 12 examples in Alpaca's format."""
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(EXAMPLES))
    return path


def epoch_windows(rows, collate, batch_size, accumulation_steps, seed=0, epoch=0, rank=0, world_size=1, tokens_per_batch=None):
    """The windows of one epoch of (tokens, labels) rows, as train.py has them."""
    lengths = [len(rows[i][0]) for i in range(len(rows))]
    planned = plan_epoch(lengths, batch_size, accumulation_steps, seed, epoch, world_size=world_size,
                         tokens_per_batch=tokens_per_batch)
    return list(windows(rows, collate, [(epoch + i / len(planned), step) for i, step in enumerate(planned, 1)], rank))
