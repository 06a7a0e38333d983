"""LLaMA 2 from scratch: model, tokenizer, checkpoints, Alpaca data, loss, sampling."""
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["ModelArgs", "Tokenizer", "Transformer", "load_checkpoint", "save_checkpoint"]


def __getattr__(name):                       # late, for `python -m llama.checkpoint` must not find itself imported already
    if name in ("load_checkpoint", "save_checkpoint"):
        from . import checkpoint
        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
