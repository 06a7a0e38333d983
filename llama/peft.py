"""Read and write PEFT's adapters: folders of adapter_config.json and adapter_model.safetensors.

The names are Hugging Face's, and so is the order of the rows of wq and wk: lora_B and
lora_magnitude are reordered like the base's rows, lora_A has none of them.  VeRA has no form in
PEFT here: its one frozen B serves layers of both orders.

PEFT also saves whole matrices and norms, which replace the base's (of modules_to_save, and of
embeddings that are adapted).  They are read too; lora's load_adapter compares them with the base.
"""
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from .files import (
    SAFETENSORS,
    has_safetensors,
    listed,
    load_saved,
    plain_names,
    read_object,
    read_tensors,
    write_json,
    write_tensors,
)
from .huggingface import as_halves, as_pairs, heads_in_rows, hf_name, meta_name
from .model import ModelArgs

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model"
PREFIX = "base_model.model."
# Our methods, with the flags by which PEFT knows them.  LoRA-FA differs in training alone.
METHODS = {
    "lora": {}, "lora-fa": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
}
# Our names of a layer's tensors, with PEFT's.
MATRICES = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector",
}
# Starts that are part of what the adapter computes; they are computed from the base again.
STARTS = ("pissa", "olora")
# The values that compute what our adapters compute.
FLAGS = {
    "peft_type": ("LORA",), "bias": ("none",),
    "use_rslora": (False, True), "use_dora": (False, True),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", *STARTS),
}
# Keys that may have any value.  A value of any other key is a feature that we lack.
HARMLESS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_pattern",
    "layers_to_transform", "modules_to_save", "base_model_name_or_path", "revision", "task_type",
    "auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config", "loftq_config", "eva_config",
}
# A tensor's name in a PEFT file: the layer, which of its tensors, and perhaps the adapter's name.
TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(.*?)"
    r"(?:\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|base_layer|"
    r"modules_to_save)(?:\.(?!weight$)[^.]+)?)?"
    r"(?:\.weight)?", re.S)
IN_A_FILE = ("config", "base", "tensors", "scales")  # what our own adapter files hold
WHOLE = (None, "base_layer", "modules_to_save")      # the kinds that are no part of a LoRA


def is_peft(path: str | Path) -> bool:
    """Return whether `path` is a folder with a PEFT adapter."""
    return (Path(path) / CONFIG).is_file()


def read_config(folder: str | Path) -> tuple[dict, str | None]:
    """Return ({method, r, alpha, dropout, options}, the base's name) of a PEFT folder.

    The name is None where the folder does not say it.  Raises FileNotFoundError, or ValueError
    that names the feature that our adapters lack.
    """
    path = Path(folder) / CONFIG
    config = read_object(path)
    missing = {"peft_type", "r", "lora_alpha"} - config.keys()
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}")
    for key, value in config.items():
        if key in FLAGS:
            if value not in FLAGS[key]:
                choices = ", ".join(map(str, FLAGS[key]))
                raise ValueError(f"{path}: {key} is {value!r}, which the adapters here do not "
                                 f"support; supported: {choices}")
        elif value and key not in HARMLESS:
            raise ValueError(f"{path}: {key} is {value!r}, which the adapters here do not support")
    flags = {key: True for key in ("use_rslora", "use_dora") if config.get(key)}
    methods = [method for method, method_flags in METHODS.items() if method_flags == flags]
    start = config.get("init_lora_weights")
    if not methods or (start in STARTS and methods[0] == "dora"):
        features = [*flags, start] if start in STARTS else flags
        raise ValueError(f"{path}: {' and '.join(features)} together, which the adapters here do "
                         "not support")
    settings = {"method": methods[0], "r": config["r"], "alpha": config["lora_alpha"],
                "dropout": config.get("lora_dropout", 0.0)}
    if start in STARTS:
        settings["options"] = {"start": start}
    return settings, config.get("base_model_name_or_path")


def adapter_at(path: str | Path, args: ModelArgs | None = None) -> dict:
    """Return the content of our adapter file or of a PEFT folder, for lora's read_adapter.

    args: the base's, for a PEFT folder; their head counts order the rows.  The content's "base"
    is None then, as PEFT does not say which base it was.
    Raises FileNotFoundError, or ValueError for what is neither of the two.
    """
    if is_peft(path):
        return read_peft(Path(path), args)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    content = load_saved(path, "an adapter file")
    if not isinstance(content, dict) or not isinstance(content.get("base"), dict):
        raise ValueError(f"{path} is not an adapter file: it does not say what its base is")
    for key in ("tensors", "scales"):
        if isinstance(content.get(key), dict):
            content[key] = plain_names(content[key], path)
    # Other keys would count as read_peft's.
    known = {key: content[key] for key in IN_A_FILE if key in content}
    return {**known, "path": str(path)}


def read_peft(folder: Path, args: ModelArgs) -> dict:
    """Return what our adapter file would hold for the adapter in a PEFT folder.

    Besides that, "matrices" has whole matrices and norms of the base, "names_in_file" what the file
    calls each tensor, "skips_blocks" is True if the adapter may leave out some blocks, and
    "from_base" names the tensors of a start that the base gives.
    """
    config, _ = read_config(folder)
    file = weights_file(folder)
    tensors = {}
    matrices = {}
    names_in_file = {}
    for peft_name, tensor in read_tensors(file).items():
        layer, kind = parse_name(peft_name, tensor, file)
        n_heads = heads_in_rows(layer, args)
        # Rows that the heads do not divide stay as they are: their shape is refused later.
        if kind != "lora_A" and n_heads and len(tensor) % (2 * n_heads) == 0:
            tensor = as_pairs(tensor, n_heads)
        name = f"{layer}.{kind}"
        if name in names_in_file:
            raise ValueError(f"{file} holds both {names_in_file[name]} and {peft_name}, of two "
                             "adapters: give a file of one")
        names_in_file[name] = peft_name
        group = matrices if kind == "weight" else tensors
        group[name] = tensor
    check_saved_modules(folder, file, names_in_file.values())
    config["targets"] = sorted({name.split(".")[-2] for name in tensors})
    skips_blocks = check_blocks(folder, file, tensors, config["method"])
    return {"path": str(folder), "config": config, "base": None, "tensors": tensors,
            "matrices": matrices, "names_in_file": names_in_file, "skips_blocks": skips_blocks,
            "from_base": ("lora_A0", "lora_B0") if "options" in config else ()}


def check_saved_modules(folder: Path, file: Path, names: Iterable[str]):
    """Raise ValueError unless the file holds what modules_to_save names."""
    modules = read_object(folder / CONFIG).get("modules_to_save") or []
    if not isinstance(modules, list):
        raise ValueError(f"{folder / CONFIG}: modules_to_save is {modules!r}, not a list of names")
    for module in modules:
        if not any(f".{module}." in f".{name}." for name in names):
            raise ValueError(f"{folder / CONFIG}: modules_to_save is {modules!r}, but {file} holds "
                             f"no {module}")


def check_blocks(folder: Path, file: Path, tensors: Iterable[str], method: str) -> bool:
    """Return whether an adapter may leave out blocks, as some of PEFT's settings say.

    Raises ValueError for a file that lacks layers although the settings name them.
    """
    config = read_object(folder / CONFIG)
    blocks_of = {}                                   # {last part of a layer's name: its blocks}
    for name in tensors:
        *block, layer, _ = name.split(".")
        blocks_of.setdefault(layer, set()).update(block[1:2])
    all_blocks = set().union(*blocks_of.values())
    selected = config.get("layers_to_transform")
    chosen = selected if isinstance(selected, list) else [selected]
    if selected is not None and not all_blocks <= set(map(str, chosen)):
        raise ValueError(f"{folder / CONFIG}: layers_to_transform is {selected!r}, but {file} "
                         f"adapts blocks {listed(all_blocks)}")
    targets = config.get("target_modules")
    has_pattern = isinstance(targets, str) and targets != "all-linear"
    has_number = isinstance(targets, list) and bool(re.search(r"\d", str(targets)))
    skips_blocks = bool(selected is not None or config.get("exclude_modules") or has_pattern
                        or has_number)
    # A DoRA without A and B still has a magnitude, which training would change.
    may_skip = skips_blocks and method != "dora"
    for layer, blocks in blocks_of.items():
        if blocks not in (set(), all_blocks) and not may_skip:
            reason = "a DoRA here adapts all" if skips_blocks else "no setting of it leaves out any"
            raise ValueError(f"{file} adapts {layer} in {len(blocks)} of {len(all_blocks)} blocks, "
                             f"and {reason}")
    return may_skip


def weights_file(folder: Path) -> Path:
    """Return the file with a PEFT adapter's tensors; raise FileNotFoundError if there is none."""
    suffixes = (SAFETENSORS, ".bin") if has_safetensors() else (".bin", SAFETENSORS)
    for suffix in suffixes:
        file = folder / (WEIGHTS + suffix)
        if file.exists():
            return file
    raise FileNotFoundError(f"no {WEIGHTS}.safetensors or {WEIGHTS}.bin in {folder}")


def parse_name(name: str, tensor: torch.Tensor, file: Path) -> tuple[str, str]:
    """Return (layer, kind) in our names for a tensor of a PEFT file.

    kind: lora_A, lora_B or lora_magnitude; or weight, for a whole matrix or norm.
    Raises ValueError for a tensor that no adapter here has.
    """
    peft_layer, kind = TENSOR_NAME.fullmatch(name).groups()
    layer = meta_name(peft_layer)
    is_whole = kind in WHOLE
    is_vector = kind == "lora_magnitude_vector" or (is_whole and peft_layer.endswith("norm"))
    is_embedding = layer == "tok_embeddings"
    fits_layer = is_whole or is_embedding == ("embedding" in kind)
    if not layer or not fits_layer or tensor.dim() != (1 if is_vector else 2):
        raise ValueError(f"{file} holds {name} {tuple(tensor.shape)}, which is no part of an "
                         "adapter here")
    if is_whole:
        return layer, "weight"
    return layer, kind.replace("_embedding", "").removesuffix("_vector")


def save_peft(adapter: dict, args: ModelArgs, base: str | Path | None, folder: Path,
              suffix: str) -> None:
    """Write an adapter, as lora's read_adapter returns it, as a folder that PEFT loads.

    args: the base's.  base: the folder to name as the base, in Hugging Face's layout; None names
    none.  suffix: of the file with the tensors.
    Raises ValueError for a method that PEFT does not have.
    """
    config = adapter["config"]
    if config.method not in METHODS:
        raise ValueError(f"a {config.method} adapter has no form in PEFT; {', '.join(METHODS)} "
                         "have")
    tensors = {}
    targets = set()
    for name, tensor in adapter["tensors"].items():
        layer, _, matrix = name.rpartition(".")
        if matrix != "lora_A":
            tensor = as_halves(tensor, heads_in_rows(layer, args))
        is_embedding = layer == "tok_embeddings"
        peft_matrix = matrix.replace("_", "_embedding_") if is_embedding else MATRICES[matrix]
        tensors[f"{PREFIX}{hf_name(layer)}.{peft_matrix}"] = tensor
        targets.add(hf_name(layer).rpartition(".")[2])
    write_tensors(folder / (WEIGHTS + suffix), tensors)
    whole_alpha = config.alpha == int(config.alpha)
    write_json(folder / CONFIG, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base).resolve()) if base else None,
        "r": config.r,
        "lora_alpha": int(config.alpha) if whole_alpha else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **METHODS[config.method],
    })
