"""LoRA adapters for any nn.Module with nn.Linear or nn.Embedding inside."""
from .adapter import (
    AdapterState,
    LoRAConfig,
    add_lora,
    begin_step,
    follow_optimizer,
    load_adapter,
    lora_disabled,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merge_report,
    method_options,
    read_adapter,
    save_adapter,
    unmerge_lora,
)
from .layers import LoRAEmbedding, LoRALinear
