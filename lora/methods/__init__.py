"""One file per method.  To delete a method, delete its file and the two lines here that name it."""
from .. import layers
from .. import start
from . import delta_lora
from . import dora
from . import dylora
from . import lora_fa
from . import rslora
from . import vera

# Name of the method: {type of base: adapter layer}.
METHODS = {
    "lora": start.offered_by(layers.LAYERS),
    "rslora": start.offered_by(rslora.LAYERS),
    "lora-fa": lora_fa.LAYERS,
    "vera": vera.LAYERS,
    "delta-lora": delta_lora.LAYERS,
    "dora": dora.LAYERS,
    "dylora": dylora.LAYERS,
}
