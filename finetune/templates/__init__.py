"""One file per prompt format.  To delete one, delete its file and its two lines here.

The default, alpaca, must stay.
"""
from . import alpaca
from . import llama2
from . import text
from .template import Piece, Template

TEMPLATES: dict[str, Template] = {
    "alpaca": alpaca.TEMPLATE,
    "llama2": llama2.TEMPLATE,
    "text": text.TEMPLATE,
}
DEFAULT = TEMPLATES["alpaca"]


def template_name(given: str | None, base_info: dict, adapter: str) -> str:
    """Return the name of the template to use: the given one, else the adapter's, else alpaca.

    base_info: what the file `adapter` says besides its tensors.  Raises ValueError for a template
    that is not here.
    """
    name = given or base_info.get("template") or "alpaca"
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(f"{adapter} was trained with the template {name!r}, which is not in "
                         f"finetune/templates/; --template chooses one of {', '.join(TEMPLATES)}")
    return name
