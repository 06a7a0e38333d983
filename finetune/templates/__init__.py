"""Prompt formats, one page each.  A new one needs its page and two lines here."""
from . import alpaca, llama2, text
from .template import Piece, Template

TEMPLATES: dict[str, Template] = {
    "alpaca": alpaca.TEMPLATE,
    "llama2": llama2.TEMPLATE,
    "text": text.TEMPLATE,
}
