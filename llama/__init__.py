"""LLaMA 2 from scratch: model, tokenizer, checkpoints, sampling."""
from .checkpoint import load_checkpoint, save_checkpoint
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["ModelArgs", "Tokenizer", "Transformer", "load_checkpoint", "save_checkpoint"]
