"""Read and write Hugging Face's layout of a LLaMA.

It is config.json, model.safetensors or pytorch_model.bin (or shards of them) and tokenizer.model.
Tensors have other names there, and the rows of wq and wk have another order: RoPE turns the pairs
(i, i + hd/2) of a head, while Meta's turns (2i, 2i + 1).  So each head has Meta's even rows first,
then the odd ones.
"""
import re
from functools import reduce
from pathlib import Path, PureWindowsPath

import torch

from .companions import (
    CONTEXT_KEY,
    TOKENIZER_FILES,
    Companions,
    add_companions,
    from_huggingface,
)
from .fields import CONFIG, DEFAULTS, FEATURES, FRACTIONS, GENERATION_CONFIG, SIZES
from .files import (
    SAFETENSORS,
    has_safetensors,
    read_object,
    read_tensors,
    write_json,
    write_tensors,
    write_whole,
)
from .model import ModelArgs
from .tokenizer import Tokenizer
from .tokenizer_json import tokenizer_json

INDEX = ".index.json"
TOKENIZER = "tokenizer.model"
# Meta's names of layers -> Hugging Face's: outside the blocks, and in a block.
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def hf_name(name: str) -> str:
    """Return Hugging Face's name for Meta's name of a layer or a tensor.

    A name that Hugging Face does not have stays as it is.
    """
    parts = re.fullmatch(r"(layers\.\d+\.)?(.*?)(\.weight)?", name, re.S)
    block, layer, weight = parts.groups(default="")
    names = BLOCK if block else TOP
    if layer not in names:
        return name
    prefix = f"model.{block}" if block else ""
    return f"{prefix}{names[layer]}{weight}"


def meta_name(name: str) -> str | None:
    """Return Meta's name for Hugging Face's name of a layer; None for a name it does not have."""
    parts = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name, re.S)
    block, layer = parts.groups(default="")
    names = BLOCK if block else TOP
    for meta_layer, hf_layer in names.items():
        if hf_layer == layer:
            return block + meta_layer
    return None


def heads_in_rows(name: str, args: ModelArgs) -> int | None:
    """Return the number of heads in the rows of a layer that RoPE turns; None for other layers.

    name: Meta's, of the layer or of its weight.
    """
    layer = name.removesuffix(".weight").rpartition(".")[2]
    return {"wq": args.n_heads, "wk": args.n_kv_heads}.get(layer)


def as_pairs(rows: torch.Tensor, n_heads: int | None) -> torch.Tensor:
    """Return rows (n_heads hd, ...) in Meta's order, given Hugging Face's.

    With n_heads None the order is the same, and so are the rows.
    """
    if n_heads is None:
        return rows
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def as_halves(rows: torch.Tensor, n_heads: int | None) -> torch.Tensor:
    """Return rows (n_heads hd, ...) in Hugging Face's order, given Meta's.

    With n_heads None the order is the same, and so are the rows.
    """
    if n_heads is None:
        return rows
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_config(folder: Path, max_seq_len: int | None = None) -> tuple[ModelArgs, Tokenizer]:
    """Return (sizes, tokenizer) from config.json and tokenizer.model.

    max_seq_len: by default the config's.
    Raises FileNotFoundError, or ValueError for what is not JSON, does not fit, or names a feature
    that this model lacks.
    """
    path = folder / CONFIG
    config = DEFAULTS | read_object(path)
    check_features(config, path)
    config["rope_theta"] = rope_theta(config, path)
    check_sizes(config, path)
    params = {field: config[key] for key, field in SIZES.items()}
    params["max_seq_len"] = max_seq_len or params["max_seq_len"]
    params["tie_embeddings"] = bool(config.get("tie_word_embeddings"))
    if not (folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"no {TOKENIZER} in {folder}: the tokenizer must be a sentencepiece"
                                " model; a tokenizer.json is of another kind")
    tokenizer = Tokenizer(folder / TOKENIZER)
    if params["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"{path}: vocab_size {params['vocab_size']} is less than the tokenizer's "
                         f"{tokenizer.vocab_size}")
    try:
        args = args_with_hidden_dim(params)
    except ValueError as error:
        raise ValueError(f"{path}: {in_config_words(str(error))}") from error
    head_dim = args.dim // args.n_heads
    if config.get("head_dim") not in (None, head_dim):
        raise ValueError(f"{path}: head_dim is {config['head_dim']!r}, which this model does not "
                         f"support; supported: hidden_size / num_attention_heads = {head_dim}")
    add_companions(tokenizer, from_huggingface(folder), args.vocab_size)
    return args, tokenizer


def check_features(config: dict, path: Path):
    """Raise ValueError for a config of another kind of model, or of no model at all."""
    if "model_type" not in config:
        raise ValueError(f"{path} lacks model_type: is it a model's?")
    for key, accepted in FEATURES.items():
        value = config.get(key)
        if value is None or value in accepted:
            continue
        choices = ""
        if accepted:
            choices = f"; supported: {', '.join(map(str, accepted))}"
        raise ValueError(f"{path}: {key} is {value!r}, which this model does not support{choices}")


def rope_theta(config: dict, path: Path) -> float:
    """Return theta, which may be a key of its own or one of RoPE's parameters.

    Raises ValueError for a RoPE that scales its angles.
    """
    theta = config["rope_theta"]
    # transformers 5 writes rope_parameters; versions before it wrote rope_scaling.
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if not is_plain_rope(rope):
            raise ValueError(f"{path}: {key} is {rope!r}, which this model does not support; "
                             "supported: rope_type default")
        theta = rope.get("rope_theta", theta)
    return theta


def is_plain_rope(rope: object) -> bool:
    """Return whether the parameters of RoPE are those of the default kind."""
    if not isinstance(rope, dict):
        return False
    for name, value in rope.items():
        if name == "rope_theta":
            continue
        if name not in ("rope_type", "type") or value != "default":
            return False
    return True


def check_sizes(config: dict, path: Path):
    """Raise ValueError for sizes that are missing or are not numbers."""
    missing = SIZES.keys() - config.keys()
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}")
    for key in SIZES:
        value = config[key]
        if value is None and key == "num_key_value_heads":
            continue
        types = (float, int) if key in FRACTIONS else int
        if isinstance(value, bool) or not isinstance(value, types):
            raise ValueError(f"{path}: {key} is {value!r}, not a number of the right kind")


def in_config_words(message: str) -> str:
    """Return a message of ModelArgs with config.json's names in place of Meta's."""
    for key, field in SIZES.items():
        message = re.sub(rf"\b{field}\b", key, message)
    return message


def args_with_hidden_dim(params: dict) -> ModelArgs:
    """Return ModelArgs whose hidden_dim is the width in params["multiple_of"].

    Meta's formula computes a width and rounds it up to a multiple of multiple_of.  If multiple_of
    is the wanted width, the result is the wanted width, unless the computed width is larger.  Then
    a multiplier first makes the computed width smaller.  If multiple_of 256 gives the wanted width
    too, as for LLaMA 2 7B and 13B, it is 256, as in Meta's own files.
    """
    width = params["multiple_of"]
    args = ModelArgs(**params)
    if ModelArgs(**{**params, "multiple_of": 256}).hidden_dim == width:
        args.multiple_of = 256
    elif args.hidden_dim != width:
        formula_width = ModelArgs(**{**params, "multiple_of": 1}).hidden_dim
        # 0.5 is added so that a rounding error cannot make the product smaller than the width.
        args.ffn_dim_multiplier = (width + 0.5) / formula_width
    return args


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights: one, or those that an index names.

    If the package safetensors is installed, its files are preferred, otherwise torch's.
    Raises FileNotFoundError or ValueError.
    """
    names = ["model" + SAFETENSORS, "pytorch_model.bin"]
    preferred = names if has_safetensors() else reversed(names)
    for name in preferred:
        if (folder / name).exists():
            return [folder / name]
        if (folder / (name + INDEX)).exists():
            return indexed_files(folder / (name + INDEX))
    raise FileNotFoundError(f"no {names[0]} or {names[1]} in {folder}, nor an index of either")


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names, each once.

    Raises ValueError for names outside the index's folder, or FileNotFoundError.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of names to files")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of names to files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # The entry must be a bare file name, on Linux and on Windows.
        is_name = shard == Path(shard).name == PureWindowsPath(shard).name
        if not is_name or shard in ("", ".", ".."):
            raise ValueError(f"{index} names {shard!r}, which is not a file of this folder")
        if not (index.parent / shard).exists():
            raise FileNotFoundError(f"no {shard} in {index.parent}, which {index.name} names")
    return [index.parent / shard for shard in shards]


def read_weights(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Return {name: [tensor]}, with names and rows as they are in the files.

    The files are mapped: nothing is in memory until it is used.
    Raises FileNotFoundError or ValueError.
    """
    parts = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if name in parts:
                raise ValueError(f"{path} holds {name}, and another shard does too")
            if not name.endswith("rotary_emb.inv_freq"):     # an old table: the model makes its own
                parts[name] = [tensor]
    return parts


def drop_tied(parts: dict[str, list[torch.Tensor]], args: ModelArgs, folder: Path):
    """Remove the second copy of a tied matrix.

    Raises ValueError if it is not a copy: readers could use either of the two.
    """
    output = parts.get("lm_head.weight")
    embeddings = parts.get("model.embed_tokens.weight")
    if not args.tie_embeddings or not output or not embeddings:
        return
    if not torch.equal(output[0], embeddings[0]):
        raise ValueError(f"{folder / CONFIG} ties lm_head.weight to model.embed_tokens.weight, but "
                         "the weights differ")
    del parts["lm_head.weight"]


def save(state: dict[str, torch.Tensor], args: ModelArgs, tokenizer: Tokenizer, folder: Path,
         suffix: str, shard_bytes: int):
    """Write a model as a folder that transformers loads.

    state: with Meta's names and order of rows.  suffix: .safetensors or .bin.  shard_bytes: the
    largest size of a file of weights; several files get an index.
    Raises ValueError if the folder already holds a model: readers could use either of the two.
    """
    old_files = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]
    if old_files:
        raise ValueError(f"{folder} holds a model already ({old_files[0].name}); write to another "
                         "folder")
    companions = tokenizer.companions
    texts = companions.texts if companions else {}
    has_tokenizer = texts.keys() & set(TOKENIZER_FILES)
    # {name: content}, all made before any file is written
    files = {} if has_tokenizer else tokenizer_files(tokenizer)
    config = {                    # the keys of transformers 4, which others read too
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    config |= sizes_of(state, args)
    if companions:
        config = config_with(companions, config)
    else:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        files[GENERATION_CONFIG] = ids
        config |= ids
    files[CONFIG] = config
    save_shards(state, args, folder, suffix, shard_bytes)
    write_whole(folder / TOKENIZER, lambda file: file.write(tokenizer.model))
    if companions:
        companions.write(folder)
    for name, content in files.items():
        write_json(folder / name, content)


def sizes_of(state: dict[str, torch.Tensor], args: ModelArgs) -> dict:
    """Return the fields of config.json that a model's own sizes and dtypes decide."""
    sizes = {key: getattr(args, field) for key, field in SIZES.items()}
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    return sizes | {
        "intermediate_size": args.hidden_dim, "tie_word_embeddings": "output.weight" not in state,
        "torch_dtype": str(dtype).removeprefix("torch.")}


def config_with(companions: Companions, sizes: dict) -> dict:
    """Return the config.json of a model of these sizes that a Hugging Face folder came with.

    The context length is the base's own: a run may have loaded the model with a shorter one.
    Raises ValueError for a feature that this model lacks.
    """
    config = companions.copied_fields(CONFIG) | sizes
    config.pop("dtype", None)                        # the new name of torch_dtype
    check_features(config, companions.source)
    rope_theta(config, companions.source)            # It checks the parameters of RoPE.
    if config.get("rope_parameters"):                # transformers 5 has theta here as well.
        config["rope_parameters"]["rope_theta"] = sizes["rope_theta"]
    if config.get("head_dim"):
        config["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    config[CONTEXT_KEY] = companions.context()
    return config


def save_shards(state: dict[str, torch.Tensor], args: ModelArgs, folder: Path, suffix: str,
                shard_bytes: int):
    """Write the tensors in one file or in several with an index, under Hugging Face's names."""
    stem = "model" if suffix == SAFETENSORS else "pytorch_model"
    shards = split_by_bytes(state, shard_bytes)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}{suffix}"
        if len(shards) > 1:
            file = f"{stem}-{i:05}-of-{len(shards):05}{suffix}"
        tensors = {}
        for name in names:
            tensors[hf_name(name)] = as_halves(state[name], heads_in_rows(name, args))
            weight_map[hf_name(name)] = file
        write_tensors(folder / file, tensors)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        write_json(folder / f"{stem}{suffix}{INDEX}",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def split_by_bytes(state: dict[str, torch.Tensor], shard_bytes: int) -> list[list[str]]:
    """Return the names in order, in groups of at most shard_bytes; a larger tensor is alone."""
    shards = []
    bytes_left = 0
    for name, tensor in state.items():
        if tensor.nbytes > bytes_left:
            shards.append([])
            bytes_left = shard_bytes
        shards[-1].append(name)
        bytes_left -= tensor.nbytes
    return shards


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, dict]:
    """Return the content of tokenizer.json and tokenizer_config.json for a tokenizer.model.

    Raises ValueError for one that transformers would read otherwise.
    """
    ids = {"unk_token": tokenizer.sp.unk_id(), "bos_token": tokenizer.bos_id,
           "eos_token": tokenizer.eos_id}
    special = {key: tokenizer.sp.id_to_piece(i) for key, i in ids.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # The next two keys switch off defaults of transformers 4.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], **special}
    return {"tokenizer.json": tokenizer_json(tokenizer.sp, special),
            "tokenizer_config.json": config}
