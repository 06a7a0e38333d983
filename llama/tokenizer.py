"""Text to ids and back with sentencepiece, as LLaMA 2 does it: bos and eos are ids, never text."""
from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .files import check_pointer


class Tokenizer:
    """A sentencepiece `tokenizer.model`, given as a path or as its bytes.

    Raises FileNotFoundError, or ValueError for what is not a sentencepiece model with a bos and an
    eos id.
    """

    def __init__(self, model: str | Path | bytes):
        name = "the tokenizer"
        if not isinstance(model, bytes):
            name = str(model)
            path = Path(model)
            if not path.is_file():
                raise FileNotFoundError(f"no tokenizer at {path}: a sentencepiece tokenizer.model "
                                        "belongs there")
            check_pointer(path)
            model = path.read_bytes()
        if not model:                                # sentencepiece would take b"" for no model yet
            raise ValueError(f"{name} is empty")
        try:
            self.sp = SentencePieceProcessor(model_proto=model)
            # sentencepiece loads models with pieces that are not UTF-8; reading them all finds out.
            self.sp.id_to_piece(list(range(len(self.sp))))
        except (RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a sentencepiece model") from error
        self.model = model                           # the file's bytes, for save_checkpoint
        self.vocab_size = self.sp.get_piece_size()
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{name} lacks a bos or an eos id")
        # LLaMA has no pad id, and -1 is not a row of the embedding.  Any id serves: the causal mask
        # hides padding on the right from every real token, and the labels of padding are masked.
        self.pad_id = self.eos_id
        # A Hugging Face folder can hold more (companions.py): other ids that end an answer, a line
        # to print about them, and what save_checkpoint writes again.
        self.end_ids = frozenset([self.eos_id])
        self.eos_note = ""
        self.companions = None

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text, with bos before and eos behind it if asked for.

        Special tokens come from these flags alone: "</s>" in the text stays text.
        """
        ids = self.sp.encode(text)
        if bos:
            ids = [self.bos_id, *ids]
        if eos:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, decoded together: one by one they would lose the spaces.

        Special tokens give no text.  Neither do ids past the last piece, which a model can predict
        if its vocab_size was rounded up.
        """
        return self.sp.decode([i for i in ids if i < self.vocab_size])
