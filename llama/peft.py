"""PEFT's adapters, in and out: a folder of adapter_config.json and adapter_model.safetensors (or .bin).

Names are Hugging Face's and so is the order of wq's and wk's rows: lora_B's and lora_magnitude's are turned like the
base's, lora_A has none.  VeRA stays here: one frozen B serves layers of both orders, so in the other order there is none.
"""
import re
from pathlib import Path

from .files import (
    SAFETENSORS,
    has_safetensors,
    read_object,
    read_saved,
    read_tensors,
    write_json,
    write_tensors,
)
from .huggingface import as_halves, as_pairs, heads
from .huggingface import hf_name as theirs
from .huggingface import meta_name as ours

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model", "base_model.model."
# Our method -> the flags by which PEFT has it.  LoRA-FA differs in training alone.
METHODS = {"lora": {}, "lora-fa": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
MATRICES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
FLAGS = {                        # whatever sets these to something else computes something else (pissa: over another base)
    "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False, True), "use_dora": (False, True),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
HARMLESS = {                     # of any other key, whatever is not empty is refused: it is a feature we lack
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern", "base_model_name_or_path",
    "revision", "task_type", "auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config", "loftq_config", "eva_config",
}


def is_peft(path):
    return (Path(path) / CONFIG).is_file()


def read_config(folder):
    """({method, r, alpha, dropout} for LoRAConfig, the base's name or None).  Raises ValueError naming what we lack."""
    path, config = Path(folder) / CONFIG, read_object(Path(folder) / CONFIG)
    if missing := {"peft_type", "r", "lora_alpha"} - config.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}")
    for key, value in config.items():
        if value not in FLAGS[key] if key in FLAGS else value and key not in HARMLESS:
            known = f"; there is {', '.join(map(str, FLAGS[key]))}" if key in FLAGS else ""
            raise ValueError(f"{path}: {key} is {value!r}, which the adapters here do not know{known}")
    flags = {key: True for key in ("use_rslora", "use_dora") if config.get(key)}
    if flags not in METHODS.values():
        raise ValueError(f"{path}: {' and '.join(flags)} together, which the adapters here do not know")
    method = next(method for method, needed in METHODS.items() if needed == flags)
    return (dict(method=method, r=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0)),
            config.get("base_model_name_or_path"))


def adapter_at(path, args=None):
    """What lora's read_adapter and load_adapter take: the content of our file or, where `path` is a PEFT folder, its
    content as our file would hold it.

    args: the base's ModelArgs, for a PEFT folder; their head counts order the rows.  Which layers are wrapped the
    tensors tell.  The base is None then: PEFT does not say which it was.  Raises FileNotFoundError or ValueError.
    """
    if not is_peft(path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no adapter file at {path}")
        content = read_saved(Path(path), "an adapter file")
        if not isinstance(content, dict) or not isinstance(content.get("base"), dict):
            raise ValueError(f"{path} is not an adapter file: it does not say what its base is")
        return {**content, "path": str(path)}
    folder = Path(path)
    config, _ = read_config(folder)
    suffixes = (SAFETENSORS, ".bin") if has_safetensors() else (".bin", SAFETENSORS)
    files = [folder / (WEIGHTS + suffix) for suffix in suffixes]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise FileNotFoundError(f"no {WEIGHTS}.safetensors or {WEIGHTS}.bin in {folder}")
    tensors, wrapped = {}, {}                                     # wrapped: last part of a layer's name -> its blocks
    for name, tensor in read_tensors(file).items():
        their, kind = re.fullmatch(r"(?:base_model\.model\.)?(.*?)(?:\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
                                   r"lora_magnitude_vector|base_layer))?(?:\.weight)?", name, re.S).groups()
        layer, embeds = ours(their), their == theirs("tok_embeddings")
        if kind == "base_layer" and layer in ("tok_embeddings", "output") and tensor.shape == (args.vocab_size, args.dim):
            continue                                              # the base's own matrix, which PEFT saves along
        if not layer or kind in (None, "base_layer") or embeds != ("embedding" in kind) \
                or tensor.dim() != (1 if kind == "lora_magnitude_vector" else 2):
            raise ValueError(f"{file} holds {name} {tuple(tensor.shape)}, which is no matrix of a LoRA here")
        block, _, last = layer.rpartition(".")
        wrapped.setdefault(last, set()).add(block.split(".")[1] if block else "")
        matrix = kind.replace("_embedding", "").removesuffix("_vector")
        if matrix != "lora_A" and (n := heads(layer, args)) and len(tensor) % (2 * n) == 0:      # else its shape is refused
            tensor = as_pairs(tensor, n)
        tensors[f"{layer}.{matrix}"] = tensor
    blocks = set().union(*wrapped.values()) - {""}
    for last, where in wrapped.items():
        if where != {""} and where != blocks:
            raise ValueError(f"{file} adapts {last} in {len(where)} of {len(blocks)} blocks: the adapters here wrap all of a name")
    return {"path": str(path), "config": {**config, "targets": sorted(wrapped)}, "base": None, "tensors": tensors}


def save_peft(adapter, args, base, folder, suffix):
    """Write an adapter, as lora's read_adapter gives it, as a folder that PEFT loads over the base of these ModelArgs.

    base: the folder to name as its base.  Raises ValueError for a method that PEFT does not have.
    """
    config = adapter["config"]
    if config.method not in METHODS:
        raise ValueError(f"a {config.method} adapter has no form in PEFT; {', '.join(METHODS)} have")
    tensors, targets = {}, set()
    for name, tensor in adapter["tensors"].items():
        layer, _, matrix = name.rpartition(".")
        if matrix != "lora_A":
            tensor = as_halves(tensor, heads(layer, args))
        matrix = matrix.replace("_", "_embedding_") if layer == "tok_embeddings" else MATRICES[matrix]
        tensors[f"{PREFIX}{theirs(layer)}.{matrix}"] = tensor
        targets.add(theirs(layer).rpartition(".")[2])
    write_tensors(folder / (WEIGHTS + suffix), tensors)
    write_json(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(Path(base).resolve()),
        "r": config.r, "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout, "target_modules": sorted(targets), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, **METHODS[config.method]})
