"""Text to ids and back with sentencepiece, as LLaMA 2 has it: bos and eos are ids, never text; no pad id."""
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """A sentencepiece `tokenizer.model`, given as a path or as its bytes.

    Raises FileNotFoundError, or ValueError when it is no sentencepiece model or has no bos or eos id.
    """

    def __init__(self, model):
        name = "the tokenizer" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise FileNotFoundError(f"no tokenizer at {model}: a sentencepiece tokenizer.model belongs there")
            model = Path(model).read_bytes()
        if not model:                                # sentencepiece takes b"" for "no model yet"
            raise ValueError(f"{name} is empty")
        try:
            self.sp = SentencePieceProcessor(model_proto=model)
            self.sp.id_to_piece(list(range(len(self.sp))))       # not every piece that it takes is UTF-8
        except (RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not a sentencepiece model") from error
        self.model = model                           # the file's bytes: a checkpoint takes its tokenizer along
        self.vocab_size = self.sp.get_piece_size()
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{name} has no bos or no eos id")
        # LLaMA has no pad id, and -1 is no row of the embedding.  Any id serves: the causal mask hides
        # padding on the right from every real token, and its labels are masked.
        self.pad_id = self.eos_id

    def encode(self, text, bos=False, eos=False):
        """Text -> list of ids.  Special tokens come from the flags alone: "</s>" in the text stays text."""
        return [self.bos_id] * bos + self.sp.encode(text) + [self.eos_id] * eos

    def decode(self, ids):
        """Ids -> text, all at once: token by token the spaces between words are lost.  Specials give no text,
        nor does an id past the pieces: some models round their vocabulary up."""
        return self.sp.decode([i for i in ids if i < self.vocab_size])
