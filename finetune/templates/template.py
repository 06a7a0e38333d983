"""What a prompt format is: an example becomes pieces of text, and some of them are targets."""
from collections.abc import Callable
from typing import NamedTuple


class Piece(NamedTuple):
    """A part of an example, which is encoded on its own.

    is_target: whether the model learns its tokens.  bos, eos: whether these ids stand before and
    after it.  eos is a target if the piece is one; bos never is, because nothing predicts it.
    """
    text: str
    is_target: bool = False
    bos: bool = False
    eos: bool = False


class Template(NamedTuple):
    """A prompt format: how an example becomes pieces.

    pieces(example): the list of Pieces; it raises ValueError for an example that the format cannot
    express.  An example without its last answer, as generation has it, ends with the prompt.
    fields: the names that may hold a prompt's text in a row of a file.
    holds_turns: whether it can hold several questions and answers, as `messages`.
    continues: whether an example that is too long goes on in a further row.  Otherwise it loses its
    tail.
    chat_template: the same format for transformers, in Jinja; None if there is none.
    """
    pieces: Callable
    fields: tuple[str, ...]
    holds_turns: bool = False
    continues: bool = False
    chat_template: str | None = None
