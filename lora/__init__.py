"""LoRA adapters for any nn.Module with nn.Linear or nn.Embedding inside."""
from .adapter import (LoRAConfig, add_lora, load_adapter, lora_disabled, lora_state_dict,
                      mark_only_lora_as_trainable, merge_lora, read_adapter, save_adapter, unmerge_lora)
from .layers import LoRAEmbedding, LoRALinear
