"""LoRA adapters for any nn.Module with nn.Linear or nn.Embedding inside."""
from .adapter import (
    AdapterState,
    LoRAConfig,
    add_lora,
    begin_step,
    follow_optimizer,
    lora_disabled,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merge_report,
    method_options,
    unmerge_lora,
)
from .files import load_adapter, read_adapter, save_adapter
from .layers import LoRAEmbedding, LoRALinear
