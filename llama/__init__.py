"""LLaMA 2 from scratch: model, tokenizer, checkpoints, Alpaca data, loss, sampling."""
from .checkpoint import load_checkpoint, save_checkpoint
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer
