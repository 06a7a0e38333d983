"""Models in and out: Meta's folder of params.json, consolidated.00.pth (or several) and tokenizer.model, or Hugging Face's."""
import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn as nn

from . import huggingface
from .files import SAFETENSORS, listed, read_object, read_tensors, write_tensors, write_whole
from .model import ModelArgs, Transformer
from .rnn import RNN, RNNArgs
from .tokenizer import Tokenizer

PARAMS, WEIGHTS, TOKENIZER = "params.json", "consolidated.00.pth", "tokenizer.model"
CONTEXT = 4096                     # tokens that LLaMA 2 was trained to look back; params.json does not say
PROBE = "Below is an instruction that describes a task."          # what a merge is tried on
SHARD = 5 * 10 ** 9                # bytes of a file in Hugging Face's layout


def is_huggingface(folder):
    return not (folder / PARAMS).exists() and (folder / huggingface.CONFIG).exists()


def read_params(folder, max_seq_len=None):
    """(ModelArgs, Tokenizer) from params.json and tokenizer.model in `folder`, vocab_size -1 taken from the latter;
    or from Hugging Face's config.json, if that is what is there.

    max_seq_len: what the folder says by default, and 4096 where it says nothing.  Raises FileNotFoundError, or
    ValueError for what is not JSON, does not fit, or names a feature we lack (a llama 3.1 `use_scaled_rope`, say):
    run without it, the model would be another one.
    """
    folder = Path(folder)
    path = folder / PARAMS
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}")
    if is_huggingface(folder):
        return huggingface.read_config(folder, max_seq_len)
    if not path.is_file():
        raise FileNotFoundError(f"no {PARAMS} in {folder}, nor {huggingface.CONFIG}: give the folder of a LLaMA checkpoint in "
                                "Meta's or Hugging Face's layout")
    tokenizer = Tokenizer(folder / TOKENIZER)
    params = read_object(path)
    kind = RNNArgs if "rnn" in params else ModelArgs              # rnn.py: the only other model there is
    types = {f.name: (float, int) if "float" in str(f.type) else str if f.type is str else int for f in fields(kind)}
    optional = ("n_kv_heads", "ffn_dim_multiplier")
    for key in ("max_seq_len", "max_batch_size"):                 # limits of a run, not of the model
        params.pop(key, None)
    for key, value in params.items():
        if key not in types or key == "tie_embeddings":
            raise ValueError(f"{path} has {key!r}, which this model does not know")
        if not (value is None and key in optional) and (isinstance(value, bool) or not isinstance(value, types[key])):
            raise ValueError(f"{path}: {key} is {value!r}, not a number of the right kind")
    if missing := ({"dim", "n_layers", "n_heads"} & types.keys()) - params.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}")
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = tokenizer.vocab_size
    if params["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"{path}: vocab_size {params['vocab_size']} is less than the tokenizer's {tokenizer.vocab_size}")
    try:
        return kind(**params, max_seq_len=max_seq_len or CONTEXT), tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(folder):
    """{name: list of that tensor's pieces, one a shard}, mapped from consolidated.00.pth, .01.pth, ... or, with their
    own names, from Hugging Face's files.

    Nothing is in memory until it is touched, however many the shards; and no pickled code runs.
    """
    if is_huggingface(folder):
        return huggingface.read_weights(folder)
    shards = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    expected = [folder / f"consolidated.{i:02}.pth" for i in range(max(1, len(shards)))]
    if shards != expected:
        lacking = next(path for path in expected if path not in shards)
        raise FileNotFoundError(f"no {lacking.name} in {folder}")
    pieces = {}
    for path in shards:
        for name, piece in read_tensors(path).items():
            pieces.setdefault(name, []).append(piece)
    pieces.pop("rope.freqs", None)                                # Meta's stale table: the model makes its own
    if uneven := {name for name, parts in pieces.items() if len(parts) < len(shards)}:
        raise ValueError(f"the shards in {folder} do not hold the same tensors: {listed(uneven)}")
    return pieces


def joined_dim(pieces, shape):
    """The dim along which the pieces make up `shape`; None where each is whole (norms, a single shard).

    Raises ValueError where they do not.  Meta cuts wq, wk, wv, w1, w3 and output by rows, wo, w2 and (for
    LLaMA 2) tok_embeddings by columns; the shapes say as much, whatever was cut.
    """
    if all(piece.shape == shape for piece in pieces):
        return None
    for dim in range(len(shape)):
        rest = [(*piece.shape[:dim], *piece.shape[dim + 1:]) for piece in pieces]
        if all(piece.dim() == len(shape) for piece in pieces) and set(rest) == {(*shape[:dim], *shape[dim + 1:])} \
                and sum(piece.shape[dim] for piece in pieces) == shape[dim]:
            return dim
    raise ValueError(f"{' + '.join(str(tuple(piece.shape)) for piece in pieces)} for {tuple(shape)}")


def join(pieces, shape, dtype, device):
    """One tensor from its pieces, a copy in memory of its own, in `dtype` (None: the file's)."""
    dim = joined_dim(pieces, shape)
    whole = torch.empty(shape, dtype=dtype or pieces[0].dtype, device=device)
    if dim is None:
        if not all(torch.equal(piece, pieces[0]) for piece in pieces[1:]):
            raise ValueError("the shards differ where they should be alike: are they of one model?")
        return whole.copy_(pieces[0])
    for part, piece in zip(whole.split([piece.shape[dim] for piece in pieces], dim), pieces):
        part.copy_(piece)
    return whole


def check_keys(pieces, model, folder, file_name):
    """Raise ValueError naming the keys that are missing, unexpected, or of another shape than `model` has.

    file_name: the model's name of a tensor -> the files'.
    """
    expected = {file_name(name): parameter.shape for name, parameter in model.named_parameters()}
    shapes = set()
    for name in expected.keys() & pieces.keys():
        try:
            joined_dim(pieces[name], expected[name])
        except ValueError as error:
            shapes.add(f"{name} {error}")
    named = {"missing": expected.keys() - pieces.keys(), "unexpected": pieces.keys() - expected.keys(), "of another shape": shapes}
    if wrong := [f"{kind}: {listed(keys)}" for kind, keys in named.items() if keys]:
        sizes = huggingface.CONFIG if is_huggingface(folder) else PARAMS
        raise ValueError(f"the weights in {folder} do not fit its {sizes}; {'; '.join(wrong)}")


def fingerprint(args, norm, embeddings):
    """16 hex digits that tell one base from another, whatever its layout, dtype or quantisation.

    From the sizes and 64 fixed values of each tensor, rounded to bf16 (what fp16 holds inexactly, under 2^-14,
    counts as 0), as they are in the file.  Weights that were made in bf16, as LLaMA's were, give the same in every
    dtype; of weights made in fp32 an fp16 file may give another than a bf16 file, being rounded twice.
    """
    sizes = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size, args.hidden_dim,
             float(args.norm_eps), float(args.rope_theta))        # one file says 10000, another 10000.0
    digest = hashlib.sha256(repr(sizes).encode())
    for tensor in (norm, embeddings):
        digest.update(sampled(tensor))
    return digest.hexdigest()[:16]


def sampled(tensor):
    """Bytes of 64 fixed values of a tensor, rounded as `fingerprint` says."""
    flat = tensor.detach().reshape(-1)
    sample = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()].float().bfloat16().float()
    return torch.where(sample.abs() < 2 ** -14, 0.0, sample).numpy(force=True).tobytes()


def load_checkpoint(folder, layers=None, dtype=None, device="cpu", max_seq_len=None, init="checkpoint", convert=None):
    """(model, tokenizer) from a folder in Meta's or Hugging Face's layout.

    layers: the first so many blocks only, the others are never read.  dtype: of the weights, the file's own
    by default.  init="random" needs sizes and tokenizer only and draws weights from torch's seed.
    device="meta" then gives sizes without memory.
    convert: nn.Linear -> what takes its place, for each of the blocks' as soon as it is read (random ones are all drawn
    before), so that a base that is quantised never stands in memory whole.
    A checkpoint without an output matrix ties it to the embedding.  model.origin says where the weights come
    from; adapter files carry it.  Raises FileNotFoundError or ValueError for whatever does not fit.
    """
    if init not in ("checkpoint", "random"):
        raise ValueError(f"init is {init!r}, must be checkpoint or random")
    folder = Path(folder)
    args, tokenizer = read_params(folder, max_seq_len)
    if layers is not None and (not isinstance(layers, int) or not 1 <= layers <= args.n_layers):
        raise ValueError(f"{folder} has {args.n_layers} layers, so layers must be 1 to {args.n_layers}, not {layers}")
    if convert and isinstance(args, RNNArgs):
        raise ValueError(f"{folder} is no transformer: its blocks have no form in {convert.kind}")
    pieces = read_weights(folder) if init == "checkpoint" else {}
    hf = is_huggingface(folder)
    file_name = huggingface.theirs if hf else str
    if hf:
        huggingface.drop_tied(pieces, args, folder)
    else:
        args.tie_embeddings = init == "checkpoint" and "output.weight" not in pieces
    with torch.device("meta"):                                    # sizes without memory
        model = RNN(args) if isinstance(args, RNNArgs) else Transformer(args)
    if init == "checkpoint":
        check_keys(pieces, model, folder, file_name)
    model.layers = model.layers[:layers]
    args.n_layers = len(model.layers)
    if init == "random":
        size = sum(parameter.nbytes for parameter in model.to(dtype).parameters())
        try:                                                      # all at once: piece by piece it would be granted, then killed
            torch.empty(size if torch.device(device).type == "cpu" else 0, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(f"{folder} describes a model of {size / 1e9:,.0f} GB, which this machine cannot hold") from error
        model.to_empty(device=device)
        if args.tie_embeddings:
            model.output.weight = model.tok_embeddings.weight
        model.init_weights()
    for path in [path for path, _ in model.named_modules()]:      # only what the model keeps ever leaves the files
        layer = model.get_submodule(path)                         # (a list of the layers would keep what is converted)
        converts = convert and isinstance(layer, nn.Linear) and path.startswith("layers.")
        for name, parameter in layer.named_parameters(recurse=False):
            if init == "checkpoint" and not (args.tie_embeddings and path == "output"):
                parts = pieces[file_name(f"{path}.{name}")]
                whole = join(parts, parameter.shape, None if converts else dtype, device)
                if not (whole.is_meta or all(bound.isfinite() for part in parts for bound in part.aminmax())):     # one pass
                    raise ValueError(f"{folder} holds values that are no finite numbers, in {file_name(f'{path}.{name}')}")
                setattr(layer, name, nn.Parameter(huggingface.as_pairs(whole, huggingface.heads(path, args)) if hf else whole))
        if converts:                                              # of what the file holds; then cast
            model.set_submodule(path, convert(layer).to(dtype))
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    if init == "random":
        stored = model.norm.weight, model.tok_embeddings.weight
    else:
        stored = [parts[0] if len(parts) == 1 else join(parts, model.get_parameter(name).shape, None, "cpu")
                  for name in ("norm.weight", "tok_embeddings.weight") for parts in [pieces[file_name(name)]]]
    model.origin = {"folder": str(folder.resolve()), "layers": args.n_layers, "init": init, "quantize": getattr(convert, "kind", "none"),
                    "fingerprint": None if stored[0].is_meta else fingerprint(args, *stored)}
    return model, tokenizer


def weights(model):
    """{name: tensor} as a checkpoint has them.  Raises ValueError while an adapter is not merged."""
    if any(getattr(module, "merged", True) is False for module in model.modules()):
        raise ValueError("merge the adapter first (merge_lora): a checkpoint has no place for lora_A and lora_B")
    if any(hasattr(module, "dequantize") for module in model.modules()):
        raise ValueError("dequantize the model first (lora.quantize.dequantize): a checkpoint has no place for codes")
    state = {key.replace(".base.", "."): tensor for key, tensor in model.state_dict().items() if ".lora_" not in key}
    if state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr():
        del state["output.weight"]                                # tied: stored once
    return state


def save_weights(model, path):
    """Write the weights alone, as consolidated.00.pth has them."""
    write_tensors(Path(path), weights(model))


def save_checkpoint(model, tokenizer, folder, layout="meta", suffix=SAFETENSORS, shard_bytes=SHARD):
    """Write `model` as a folder in Meta's or ("hf") Hugging Face's layout, in the dtype it has; each file is whole or
    not there.  suffix (or .bin) and shard_bytes are of the latter's files.

    Merged adapters are part of the weights.  Raises ValueError while an adapter is not merged.
    """
    state, folder = weights(model), Path(folder)
    if (folder / "consolidated.01.pth").exists():
        raise ValueError(f"{folder} holds a checkpoint in several files; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "hf":
        return huggingface.save(state, model.args, tokenizer, folder, suffix, shard_bytes)
    args = asdict(model.args)
    del args["max_seq_len"], args["tie_embeddings"]               # Meta's reader sets the first and lacks the second
    write_tensors(folder / WEIGHTS, state)
    write_whole(folder / TOKENIZER, lambda file: file.write(tokenizer.model))
    write_whole(folder / PARAMS, lambda file: file.write(json.dumps(args).encode() + b"\n"))
