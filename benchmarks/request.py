"""What benchmarks/peers.py asks tests/peers.py to measure, as JSON between two Pythons."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A run of a peer.

    peer: "transformers", "litgpt" or "trl".  folder: of the model, in Hugging Face's layout;
    is_random: its weights are not read.  layers: None for all.  batch: examples per step, or
    prompts at a time.  steps, warm: of training.  new: tokens per answer, None for training.
    n_batches: of prompts to time.  cache: whether keys and values are cached.  batching: of
    transformers and TRL: "padded" or "padding-free"; of TRL also "packing".
    """
    peer: str
    folder: str
    is_random: bool
    layers: int | None
    device: str
    precision: str
    batch: int
    steps: int
    warm: int
    dropout: float = 0.0
    checkpointing: bool = False
    new: int | None = None
    n_batches: int | None = None
    cache: bool | None = None
    batching: str | None = None
