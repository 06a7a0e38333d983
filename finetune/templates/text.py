"""Plain text, for continued pretraining: every token is a target.

A document is bos, its text, eos.  One that is longer than a row goes on in the next row.
"""
from .template import Piece, Template


def pieces(example: dict) -> list[Piece]:
    """Return the document, or, for an instruction without an answer, the text to continue.

    Raises ValueError without either.
    """
    has_document = any(example.get(name) is not None for name in ("text", "output"))
    if "instruction" in example and not has_document:
        texts = [example["instruction"], example.get("input") or ""]
        if not all(isinstance(part, str) for part in texts) or not texts[0].strip():
            raise ValueError("'instruction' is not text, or is empty")
        return [Piece("\n".join(filter(None, texts)), bos=True)]
    document = example.get("text")
    if not isinstance(document, str):
        raise ValueError("has no 'text'")
    if not document.strip():
        raise ValueError("'text' is empty")
    if str(example.get("input") or "").strip():
        raise ValueError("has 'text' and 'input', and plain text has no place for the input: "
                         "remove it, or use --template alpaca")
    return [Piece(document, is_target=True, bos=True, eos=True)]


TEMPLATE = Template(pieces, fields=("text", "input"), continues=True)
