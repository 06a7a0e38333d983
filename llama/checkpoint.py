"""Load and save models as folders, in Meta's layout or in Hugging Face's.

Meta's layout is params.json, consolidated.00.pth (or several shards) and tokenizer.model, with
huggingface.json where the model came from Hugging Face's (companions.py).
Hugging Face's layout is in huggingface.py.
"""
import hashlib
import json
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from pathlib import Path

import torch
import torch.nn as nn

from . import huggingface
from .companions import COMPANIONS, add_companions, beside_meta
from .files import (
    SAFETENSORS,
    listed,
    read_object,
    read_tensors,
    whole,
    write_tensors,
    write_whole,
)
from .model import ModelArgs, Transformer
from .rnn import RNN, RNNArgs
from .tokenizer import Tokenizer

PARAMS = "params.json"
WEIGHTS = "consolidated.00.pth"
TOKENIZER = "tokenizer.model"
# Tokens that LLaMA 2 can look back.  params.json does not say it; huggingface.json does.
CONTEXT = 4096
PROBE = "Below is an instruction that describes a task."      # a text to try a merged model on
SHARD = 5 * 10 ** 9                # bytes per file in Hugging Face's layout


def load_checkpoint(folder: str | Path, layers: int | None = None, dtype: torch.dtype | None = None,
                    device: torch.device | str = "cpu", max_seq_len: int | None = None,
                    init: str = "checkpoint", *,
                    convert: Callable | None = None,
                    sharding=None) -> tuple[nn.Module, Tokenizer]:
    """Return (model, tokenizer) from a folder in Meta's or Hugging Face's layout.

    layers: the number of blocks to keep, from the first; the others are not read.
    dtype: of the weights; by default each weight keeps the dtype of its file.
    device: with "meta" the model has shapes but no memory.
    init: "random" reads only sizes and tokenizer and draws the weights from torch's seed.
    convert: takes a block's nn.Linear and its path, and returns its replacement.  It is called as
    soon as that layer is read, so that a base to be quantised is never in memory as a whole.
    sharding: its cut(block) is called as soon as a block is read, and cut_root(model) at the end.
    So a rank that keeps only a part of each block never holds more than one whole block.

    If the files have no output matrix, it is tied to the embedding.  model.origin says where the
    weights come from; adapter files store it.
    Raises FileNotFoundError, or ValueError for files or arguments that do not fit.
    """
    folder = Path(folder)
    args, tokenizer = read_params(folder, max_seq_len)
    check_request(folder, args, layers, init, convert)
    stored = None
    if init == "checkpoint":
        stored = StoredWeights(folder, args)
        args.tie_embeddings = stored.is_tied
    with torch.device("meta"):                       # sizes without memory
        model = RNN(args) if isinstance(args, RNNArgs) else Transformer(args)
    if stored:
        stored.check_keys(model)
    model.layers = model.layers[:layers]
    args.n_layers = len(model.layers)
    if not stored:
        draw_weights(model, folder, dtype, device)
    blocks = [f"layers.{i}" for i in range(args.n_layers)]
    for part in ("tok_embeddings", *blocks, "norm", "output"):
        # This lists paths, because a list of the layers would keep the converted ones in memory.
        paths = [path for path, _ in model.get_submodule(part).named_modules(prefix=part)]
        for path in paths:
            layer = model.get_submodule(path)
            is_converted = convert and isinstance(layer, nn.Linear) and path.startswith("layers.")
            if stored:
                # A layer to convert is read in the file's dtype, and cast after it was converted.
                stored.fill(layer, path, None if is_converted else dtype, device)
            if is_converted:
                model.set_submodule(path, convert(layer, path).to(dtype))
        if sharding and part in blocks:
            sharding.cut(model.get_submodule(part))
    tie_output(model)
    if sharding:
        sharding.cut_root(model)
    model.origin = {"folder": str(folder.resolve()), "layers": args.n_layers, "init": init,
                    "quantize": getattr(convert, "kind", "none"),
                    "fingerprint": base_fingerprint(model, stored)}
    return model, tokenizer


def is_huggingface(folder: Path) -> bool:
    """Return whether a folder is in Hugging Face's layout, and not in Meta's."""
    return not (folder / PARAMS).exists() and (folder / huggingface.CONFIG).exists()


def read_params(folder: str | Path,
                max_seq_len: int | None = None) -> tuple[ModelArgs | RNNArgs, Tokenizer]:
    """Return (sizes, tokenizer) of a folder in either layout.

    max_seq_len: by default what config.json says in Hugging Face's layout, and 4096 in Meta's if
    there is no huggingface.json.  In Meta's layout a vocab_size of -1 means the tokenizer's.
    Raises FileNotFoundError, or ValueError for params that are not JSON, do not fit each other, or
    name a feature that this model lacks, as LLaMA 3.1's use_scaled_rope: without the feature it
    would be another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}")
    if is_huggingface(folder):
        return huggingface.read_config(folder, max_seq_len)
    path = folder / PARAMS
    if not path.is_file():
        raise FileNotFoundError(f"no {PARAMS} in {folder}, nor {huggingface.CONFIG}: give the "
                                "folder of a LLaMA checkpoint in Meta's or Hugging Face's layout")
    tokenizer = Tokenizer(folder / TOKENIZER)
    params = read_object(path)
    for key in ("max_seq_len", "max_batch_size"):    # Meta's code sets these limits for each run.
        params.pop(key, None)
    # rnn.py has the only other model.
    kind = RNNArgs if "rnn" in params else ModelArgs
    check_params(params, kind, path)
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = tokenizer.vocab_size
    if params["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"{path}: vocab_size {params['vocab_size']} is less than the tokenizer's "
                         f"{tokenizer.vocab_size}")
    companions = beside_meta(folder)
    context = CONTEXT
    if companions:
        add_companions(tokenizer, companions, params["vocab_size"])
        context = companions.context()
    try:
        return kind(**params, max_seq_len=max_seq_len or context), tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_params(params: dict, kind: type, path: Path):
    """Raise ValueError unless params.json has the fields of `kind`, with values of their types."""
    types = {field.name: accepted_types(field) for field in fields(kind)}
    for key, value in params.items():
        if key not in types or key == "tie_embeddings":
            raise ValueError(f"{path} has {key!r}, which this model does not support")
        if value is None and key in ("n_kv_heads", "ffn_dim_multiplier"):
            continue
        if isinstance(value, bool) or not isinstance(value, types[key]):
            raise ValueError(f"{path}: {key} is {value!r}, not a number of the right kind")
    required = {"dim", "n_layers", "n_heads"} & types.keys()
    missing = required - params.keys()
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}")


def accepted_types(field: Field) -> type | tuple[type, ...]:
    """Return the types that the JSON value of a field may have."""
    if "float" in str(field.type):
        return float, int                            # In JSON a whole number may stand for a float.
    return str if field.type is str else int


def check_request(folder: Path, args: ModelArgs | RNNArgs, layers: int | None, init: str,
                  convert: Callable | None):
    """Raise ValueError for arguments of load_checkpoint that do not fit the folder's sizes."""
    if init not in ("checkpoint", "random"):
        raise ValueError(f"init is {init!r}, must be checkpoint or random")
    if layers is not None and (not isinstance(layers, int) or not 1 <= layers <= args.n_layers):
        raise ValueError(f"{folder} has {args.n_layers} layers, so layers must be 1 to "
                         f"{args.n_layers}, not {layers}")
    if convert and isinstance(args, RNNArgs):
        raise ValueError(f"{folder} is not a transformer: its blocks cannot be quantised to "
                         f"{convert.kind}")


class StoredWeights:
    """The weights in a folder's files, under the model's names.

    The files are mapped: nothing is in memory until it is used, and no pickled code runs.  A
    tensor may be cut into parts, one per shard.  is_tied: whether the output matrix is the
    embedding's.
    Raises FileNotFoundError or ValueError.
    """

    def __init__(self, folder: Path, args: ModelArgs | RNNArgs):
        self.folder = folder
        self.args = args
        self.is_huggingface = is_huggingface(folder)
        if self.is_huggingface:
            self.parts = huggingface.read_weights(folder)
            huggingface.drop_tied(self.parts, args, folder)
            self.is_tied = args.tie_embeddings
        else:
            self.parts = read_shards(folder)
            self.is_tied = "output.weight" not in self.parts

    def file_name(self, name: str) -> str:
        """Return what the files call a tensor of the model."""
        return huggingface.hf_name(name) if self.is_huggingface else name

    def check_keys(self, model: nn.Module):
        """Raise ValueError that names tensors which are missing, unexpected, or of another shape.

        model: with all blocks of the checkpoint; it may be on the meta device.
        """
        expected = {self.file_name(name): parameter.shape
                    for name, parameter in model.named_parameters()}
        misfits = set()
        for name in expected.keys() & self.parts.keys():
            try:
                joined_dim(self.parts[name], expected[name])
            except ValueError as error:
                misfits.add(f"{name} {error}")
        problems = {"missing": expected.keys() - self.parts.keys(),
                    "unexpected": self.parts.keys() - expected.keys(),
                    "of another shape": misfits}
        lines = [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]
        if lines:
            sizes = huggingface.CONFIG if self.is_huggingface else PARAMS
            raise ValueError(f"the weights in {self.folder} do not fit its {sizes}; "
                             f"{'; '.join(lines)}")

    def fill(self, layer: nn.Module, path: str, dtype: torch.dtype | None,
             device: torch.device | str):
        """Replace the parameters of the layer at `path` by those in the files.

        dtype: None keeps the file's.  Raises ValueError for values that are not finite.
        """
        if self.is_tied and path == "output":
            return
        for name, parameter in layer.named_parameters(recurse=False):
            tensor = self.read(f"{path}.{name}", parameter.shape, dtype, device)
            setattr(layer, name, nn.Parameter(tensor))
        if hasattr(layer, "flatten_parameters"):
            layer.flatten_parameters()               # cuDNN wants a GRU's weights side by side.

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype | None,
             device: torch.device | str) -> torch.Tensor:
        """Return one tensor of the model, with its rows in Meta's order, as a copy in memory."""
        file_name = self.file_name(name)
        parts = self.parts[file_name]
        tensor = join(parts, shape, dtype, device)
        if not tensor.is_meta and not all(map(is_finite, parts)):
            raise ValueError(f"{self.folder} has values that are not finite, in {file_name}")
        if dtype == torch.float16 and not tensor.is_meta and not is_finite(tensor):
            raise ValueError(f"{self.folder} has values that are too large for fp16, in "
                             f"{file_name}; bf16 holds them")
        if self.is_huggingface:
            return huggingface.as_pairs(tensor, huggingface.heads_in_rows(name, self.args))
        return tensor

    def as_stored(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return one tensor as it is in the files; if it is one part, without a copy."""
        parts = self.parts[self.file_name(name)]
        return parts[0] if len(parts) == 1 else join(parts, shape, None, "cpu")


def read_shards(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Return {name: parts} from consolidated.00.pth, consolidated.01.pth and so on, mapped.

    Raises FileNotFoundError for a shard that is missing, or ValueError.
    """
    shards = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    expected = [folder / f"consolidated.{i:02}.pth" for i in range(max(1, len(shards)))]
    for path in expected:
        if path not in shards:
            raise FileNotFoundError(f"no {path.name} in {folder}")
    parts = {}
    for path in shards:
        for name, part in read_tensors(path).items():
            parts.setdefault(name, []).append(part)
    parts.pop("rope.freqs", None)                   # Not needed: the model makes its own.
    uneven = [name for name in parts if len(parts[name]) < len(shards)]
    if uneven:
        raise ValueError(f"the shards in {folder} do not hold the same tensors: {listed(uneven)}")
    return parts


def joined_dim(parts: list[torch.Tensor], shape: torch.Size) -> int | None:
    """Return the dim along which the parts make up `shape`; None if each part is whole.

    Norms are whole in every shard.  Meta cuts wq, wk, wv, w1, w3 and output by rows, and wo, w2 and
    (in LLaMA 2) tok_embeddings by columns.  No name is needed: the shapes show the dim.
    Raises ValueError for parts that do not make up the shape.
    """
    shapes = [part.shape for part in parts]
    if all(part_shape == shape for part_shape in shapes):
        return None
    for dim in range(len(shape)):
        are_parts = all(differs_only_in(part_shape, shape, dim) for part_shape in shapes)
        if are_parts and sum(part_shape[dim] for part_shape in shapes) == shape[dim]:
            return dim
    listed_shapes = " + ".join(str(tuple(part_shape)) for part_shape in shapes)
    raise ValueError(f"{listed_shapes} for {tuple(shape)}")


def differs_only_in(part_shape: torch.Size, shape: torch.Size, dim: int) -> bool:
    """Return whether two shapes are equal in all dimensions except `dim`."""
    if len(part_shape) != len(shape):
        return False
    return part_shape[:dim] == shape[:dim] and part_shape[dim + 1:] == shape[dim + 1:]


def join(parts: list[torch.Tensor], shape: torch.Size, dtype: torch.dtype | None,
         device: torch.device | str) -> torch.Tensor:
    """Return the parts as one tensor in `dtype` (None: the file's), a copy in memory."""
    dim = joined_dim(parts, shape)
    tensor = torch.empty(shape, dtype=dtype or parts[0].dtype, device=device)
    if dim is None:
        if not all(torch.equal(part, parts[0]) for part in parts[1:]):
            raise ValueError("the shards differ where they should be alike: are they of one model?")
        return tensor.copy_(parts[0])
    places = tensor.split([part.shape[dim] for part in parts], dim)
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite numbers, in one pass over them."""
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def draw_weights(model: nn.Module, folder: Path, dtype: torch.dtype | None,
                 device: torch.device | str):
    """Give a model on the meta device memory and random weights.

    Raises ValueError, on the CPU, for a model that is larger than this machine's memory.
    """
    n_bytes = sum(parameter.nbytes for parameter in model.to(dtype).parameters())
    if torch.device(device).type == "cpu":
        try:
            # Ask for all memory at once.  Linux would grant many small requests and then kill the
            # process.
            torch.empty(n_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(f"{folder} describes a model of {n_bytes / 1e9:,.0f} GB, which this "
                             "machine cannot hold") from error
    model.to_empty(device=device)
    tie_output(model)
    model.init_weights()


def tie_output(model: nn.Module):
    """Use the embedding as the output matrix if model.args.tie_embeddings says so."""
    if model.args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight


def base_fingerprint(model: nn.Module, stored: StoredWeights | None) -> str | None:
    """Return the fingerprint of the files or of random weights; None for weights without memory."""
    norm = model.norm.weight
    embeddings = model.tok_embeddings.weight
    if stored:
        norm = stored.as_stored("norm.weight", norm.shape)
        embeddings = stored.as_stored("tok_embeddings.weight", embeddings.shape)
    return None if norm.is_meta else fingerprint(model.args, norm, embeddings)


def fingerprint(args: ModelArgs | RNNArgs, norm: torch.Tensor, embeddings: torch.Tensor) -> str:
    """Return 16 hex digits that tell one base from another, in any layout, dtype or quantisation.

    They come from the sizes and from `sample_bytes` of both tensors, as the files hold them.
    Weights that were first stored in bf16, as LLaMA's were, give the same digits in every dtype.
    Weights first stored in fp32 may give others after a conversion to fp16, because they are then
    rounded twice.
    """
    # As floats, because one file has a theta of 10000 and another one of 10000.0.
    norm_eps = float(args.norm_eps)
    rope_theta = float(args.rope_theta)
    sizes = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size,
             args.hidden_dim, norm_eps, rope_theta)
    digest = hashlib.sha256(repr(sizes).encode())
    for tensor in (norm, embeddings):
        digest.update(sample_bytes(tensor))
    return digest.hexdigest()[:16]


def sample_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of 64 values at evenly spaced places of a tensor, rounded to bf16.

    Magnitudes below 2^-14 count as 0, because fp16 cannot store them exactly.
    """
    flat = whole(tensor.detach()).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()
    sample = flat[places].float().bfloat16().float()
    return torch.where(sample.abs() < 2 ** -14, 0.0, sample).numpy(force=True).tobytes()


def state_to_save(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: tensor} with the names and tensors that a checkpoint has.

    Raises ValueError for an adapter that is not merged and for weights that are quantised.
    """
    if any(getattr(module, "merged", True) is False for module in model.modules()):
        raise ValueError("merge the adapter first (merge_lora): a checkpoint has no place for "
                         "lora_A and lora_B")
    if any(hasattr(module, "dequantize") for module in model.modules()):
        raise ValueError("dequantize the model first (lora.quantize.dequantize): a checkpoint has "
                         "no place for codes")
    state = {}
    for key, tensor in model.state_dict().items():
        if ".lora_" not in key:
            state[key.replace(".base.", ".")] = tensor
    if state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr():
        del state["output.weight"]                   # A tied matrix is stored once.
    return state


def save_weights(model: nn.Module, path: str | Path):
    """Write the weights alone, as consolidated.00.pth has them."""
    write_tensors(Path(path), state_to_save(model))


def save_checkpoint(model: nn.Module, tokenizer: Tokenizer, folder: str | Path,
                    layout: str = "meta", suffix: str = SAFETENSORS, shard_bytes: int = SHARD):
    """Write a model as a folder in Meta's or Hugging Face's layout, in the dtype that it has.

    layout: "meta" or "hf".  suffix (.safetensors or .bin) and shard_bytes are for "hf" alone.
    A merged adapter is part of the weights.  A file is written whole or not at all.
    Raises ValueError for an adapter that is not merged, for quantised weights, and for a folder
    with other weights, which a reader could take instead.
    """
    folder = Path(folder)
    state = state_to_save(model)
    if layout == "hf" and isinstance(model.args, RNNArgs):
        raise ValueError("Hugging Face's layout is for transformers, and this model is recurrent")
    if (folder / "consolidated.01.pth").exists():
        raise ValueError(f"{folder} holds a checkpoint in several files; write to another folder")
    other = huggingface.CONFIG if layout == "meta" else PARAMS
    if (folder / other).exists():
        raise ValueError(f"{folder} holds a model in the other layout ({other}); write to another "
                         "folder")
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "hf":
        huggingface.save(state, model.args, tokenizer, folder, suffix, shard_bytes)
        return
    params = asdict(model.args)
    # Meta's reader sets max_seq_len for each run, and does not know tie_embeddings.
    del params["max_seq_len"], params["tie_embeddings"]
    write_tensors(folder / WEIGHTS, state)
    if tokenizer.companions:
        tokenizer.companions.write_beside_meta(folder)
    else:
        (folder / COMPANIONS).unlink(missing_ok=True)    # of another model
    write_whole(folder / TOKENIZER, lambda file: file.write(tokenizer.model))
    write_whole(folder / PARAMS, lambda file: file.write(json.dumps(params).encode() + b"\n"))
