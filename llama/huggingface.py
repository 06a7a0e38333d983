"""Hugging Face's layout of a LLaMA: config.json, model.safetensors or pytorch_model.bin (or shards), tokenizer.model.

Besides other names there is one difference: where Meta turns neighbours (2i, 2i + 1) of a head by RoPE, Hugging
Face turns (i, i + hd/2).  So each head's rows of wq and wk are stored in another order: first the even, then the odd.
"""
import re
from functools import reduce
from pathlib import Path, PureWindowsPath

import torch

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

CONFIG, INDEX, TOKENIZER = "config.json", ".index.json", "tokenizer.model"
TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
         "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
SIZES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
         "num_key_value_heads": "n_kv_heads", "vocab_size": "vocab_size", "intermediate_size": "multiple_of",
         "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta", "max_position_embeddings": "max_seq_len"}
DEFAULTS = {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048}
FEATURES = {                     # what would make it another model, and the values that do not; null is always one
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
    "sliding_window": (), "quantization_config": (), "partial_rotary_factor": (1,), "rope_interleaved": (False,),
    "tie_word_embeddings": (False, True),
    "dtype": ("float32", "bfloat16", "float16", "float64"), "torch_dtype": ("float32", "bfloat16", "float16", "float64"),
}


def theirs(name):
    """Meta's name of a layer or a tensor -> Hugging Face's; what has none stays as it is."""
    block, layer, weight = re.fullmatch(r"(layers\.\d+\.)?(.*?)(\.weight)?", name, re.S).groups(default="")
    known = BLOCK if block else TOP
    return f"{block and 'model.'}{block}{known[layer]}{weight}" if layer in known else name


def ours(name):
    """Hugging Face's name of a layer -> Meta's, or None."""
    block, layer = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name, re.S).groups(default="")
    layer = {their: our for our, their in (BLOCK if block else TOP).items()}.get(layer)
    return layer and block + layer


def heads(name, args):
    """How many heads the rows of a layer, named in Meta's way, belong to; None where RoPE turns nothing."""
    return {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.removesuffix(".weight").rpartition(".")[2])


def as_pairs(rows, n_heads):
    """Hugging Face's order of the rows (n_heads hd, ...) -> Meta's; n_heads None: no matter."""
    return rows if n_heads is None else rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def as_halves(rows, n_heads):
    """Meta's order of the rows (n_heads hd, ...) -> Hugging Face's; n_heads None: no matter."""
    return rows if n_heads is None else rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_config(folder, max_seq_len=None):
    """(ModelArgs, Tokenizer) from config.json and tokenizer.model in `folder`.

    Raises FileNotFoundError, or ValueError for what is not JSON, does not fit, or names a feature we lack.
    """
    path, config = folder / CONFIG, {**DEFAULTS, **read_object(folder / CONFIG)}
    if "model_type" not in config:
        raise ValueError(f"{path} lacks model_type: is it a model's?")
    for key, plain in FEATURES.items():
        if config.get(key) is not None and config[key] not in plain:
            known = f"; there is {', '.join(map(str, plain))}" if plain else ""
            raise ValueError(f"{path}: {key} is {config[key]!r}, which this model does not know{known}")
    for key in ("rope_scaling", "rope_parameters"):               # before transformers 5, and since
        rope = config.get(key) or {}
        if not isinstance(rope, dict) or any(value != "default" or name not in ("rope_type", "type")
                                             for name, value in rope.items() if name != "rope_theta"):
            raise ValueError(f"{path}: {key} is {rope!r}, which this model does not know; there is rope_type default")
        config["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    if missing := SIZES.keys() - config.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}")
    for key in SIZES:
        kind = (float, int) if key in ("rms_norm_eps", "rope_theta") else int
        if not (config[key] is None and key == "num_key_value_heads") \
                and (isinstance(config[key], bool) or not isinstance(config[key], kind)):
            raise ValueError(f"{path}: {key} is {config[key]!r}, not a number of the right kind")
    params = {our: config[their] for their, our in SIZES.items()}
    params["max_seq_len"] = max_seq_len or params["max_seq_len"]
    params["tie_embeddings"] = bool(config.get("tie_word_embeddings"))
    if not (folder / TOKENIZER).is_file():
        raise FileNotFoundError(f"no {TOKENIZER} in {folder}: sentencepiece is the one kind of tokenizer here, a "
                                "tokenizer.json is another")
    tokenizer = Tokenizer(folder / TOKENIZER)
    if params["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"{path}: vocab_size {params['vocab_size']} is less than the tokenizer's {tokenizer.vocab_size}")
    try:
        args = with_width(params)
    except ValueError as error:                                   # which speaks of Meta's names
        said = reduce(lambda text, size: re.sub(rf"\b{size[1]}\b", size[0], text), SIZES.items(), str(error))
        raise ValueError(f"{path}: {said}") from error
    if config.get("head_dim") not in (None, args.dim // args.n_heads):
        raise ValueError(f"{path}: head_dim is {config['head_dim']!r}, which this model does not know; there is hidden_size / "
                         f"num_attention_heads = {args.dim // args.n_heads}")
    return args, tokenizer


def with_width(params):
    """ModelArgs whose hidden_dim is the intermediate_size in params["multiple_of"], by Meta's own formula.

    What is rounded up to a multiple of the width is the width, if it was not more; else it is shrunk to that first.
    Where 256 gives the same, as it does for LLaMA 2 7B and 13B, it is what Meta's own files say.
    """
    width, args = params["multiple_of"], ModelArgs(**params)
    if ModelArgs(**{**params, "multiple_of": 256}).hidden_dim == width:
        args.multiple_of = 256
    elif args.hidden_dim != width:                                # half more, so that no rounding can take it below
        args.ffn_dim_multiplier = (width + 0.5) / ModelArgs(**{**params, "multiple_of": 1}).hidden_dim
    return args


def weight_files(folder):
    """The paths of the files with the weights: one, or those that an index names.

    safetensors before torch's own, as long as the package is there.  Raises FileNotFoundError or ValueError.
    """
    kinds = ["model" + SAFETENSORS, "pytorch_model.bin"]
    for name in kinds if has_safetensors() else reversed(kinds):
        if (folder / name).exists():
            return [folder / name]
        index = folder / (name + INDEX)
        if index.exists():
            shards = read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index} has no weight_map of names to files")
            for shard in sorted(set(shards.values())):
                if shard in ("", ".", "..") or shard != PureWindowsPath(shard).name or shard != Path(shard).name:
                    raise ValueError(f"{index} names {shard!r}, which is no file of this folder")
                if not (folder / shard).exists():
                    raise FileNotFoundError(f"no {shard} in {folder}, which {index.name} names")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise FileNotFoundError(f"no {kinds[0]} or {kinds[1]} in {folder}, nor an index of either")


def read_weights(folder):
    """{name: [tensor]}, names and rows as they are in the files, mapped: nothing is in memory until it is touched."""
    pieces = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path).items():
            if name in pieces:
                raise ValueError(f"{path} holds {name}, and another shard does too")
            if not name.endswith("rotary_emb.inv_freq"):          # an old table: the model makes its own
                pieces[name] = [tensor]
    return pieces


def drop_tied(pieces, args, folder):
    """Take a second copy of a tied matrix out.  Raises ValueError where it is no copy: readers differ in which they take."""
    copy, (table,) = pieces.get("lm_head.weight"), pieces.get("model.embed_tokens.weight", [None])
    if args.tie_embeddings and copy and table is not None:
        if not torch.equal(copy[0], table):
            raise ValueError(f"{folder / CONFIG} ties lm_head.weight to model.embed_tokens.weight, but the weights differ")
        del pieces["lm_head.weight"]


def save(state, args, tokenizer, folder, suffix, shard_bytes):
    """Write a model's state, named and ordered in Meta's way, as a folder that transformers loads.

    suffix: .safetensors or .bin.  A file holds up to shard_bytes; several get an index.  Raises ValueError where
    a model is already: of two in one folder, readers take either.
    """
    stem = "model" if suffix == SAFETENSORS else "pytorch_model"
    if old := [path.name for name in ("model*.safetensors*", "pytorch_model*.bin*") for path in folder.glob(name)]:
        raise ValueError(f"{folder} holds a model already ({old[0]}); write to another folder")
    shards, room = [], 0
    for name, tensor in state.items():
        if tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    where = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-{len(shards):05}{suffix}" if len(shards) > 1 else f"{stem}{suffix}"
        write_tensors(folder / file, {theirs(name): as_halves(state[name], heads(name, args)) for name in names})
        where |= {theirs(name): file for name in names}
    if len(shards) > 1:
        write_json(folder / f"{stem}{suffix}{INDEX}", {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": where})
    write_whole(folder / TOKENIZER, lambda file: file.write(tokenizer.model))
    special = {"unk_token": tokenizer.sp.unk_id(), "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    special = {key: tokenizer.sp.id_to_piece(i) for key, i in special.items()}
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer.sp, special))
    write_json(folder / "tokenizer_config.json", {    # the second and the third switch habits of transformers 4 off
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"], **special})
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    write_json(folder / "generation_config.json", ends)
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    write_json(folder / CONFIG, {                     # in the words of transformers 4, which 5 and others read too
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "rope_scaling": None, **{their: getattr(args, our) for their, our in SIZES.items()},
        "intermediate_size": args.hidden_dim, "tie_word_embeddings": "output.weight" not in state,
        "torch_dtype": str(dtype).removeprefix("torch."), **ends})
