"""What an adapter forgets: the loss on other text, with the base alone and with the adapter."""
import torch.nn as nn

from llama.tokenizer import Tokenizer

from .dataset import load_datasets
from .evaluate import score_answers
from .measures import intervals

ROW_TOKENS = 512                                     # A longer text goes on in another row.


class OtherText:
    """Text that an adapter was not trained for, in rows of at most ROW_TOKENS tokens.

    path: a file for --template text: JSON with rows of {"text": ...}.  Raises ValueError or
    FileNotFoundError for a file that cannot be used.
    """

    def __init__(self, path: str, tokenizer: Tokenizer, max_seq_len: int):
        self.path = path
        row_tokens = min(max_seq_len, ROW_TOKENS)
        dataset, _ = load_datasets([path], None, None, row_tokens, 0, tokenizer, template="text")
        self.rows = dataset.rows
        self.tables = {}

    def measure(self, model: nn.Module, name: str):
        """Score every token of the text with a model as it is now; name: "base" or "adapter"."""
        self.tables[name] = score_answers(model, self.rows)

    def results(self, seed: int) -> dict:
        """Return facts, then [value, low, high] per measure of each model, and the difference."""
        tokens = int(next(iter(self.tables.values()))["tokens"].sum())
        return {"data": self.path, "rows": len(self.rows), "tokens": tokens,
                **intervals(self.tables, seed)}
