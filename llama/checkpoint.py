"""Models in and out: Meta's folder of params.json, consolidated.00.pth (or several) and tokenizer.model."""
import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch

from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

PARAMS, WEIGHTS, TOKENIZER = "params.json", "consolidated.00.pth", "tokenizer.model"
CONTEXT = 4096                     # tokens that LLaMA 2 was trained to look back; params.json does not say


def read_params(folder, max_seq_len=CONTEXT):
    """(ModelArgs, Tokenizer) from params.json and tokenizer.model in `folder`, vocab_size -1 taken from the latter.

    Raises FileNotFoundError, or ValueError for what is not JSON, does not fit, or names a feature we lack
    (a llama 3.1 `use_scaled_rope`, say): run without it, the model would be another one.
    """
    folder = Path(folder)
    path = folder / PARAMS
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"no {PARAMS} in {folder}: give the folder of a LLaMA checkpoint in Meta's layout")
    tokenizer = Tokenizer(folder / TOKENIZER)
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:                 # bytes that are no text are a ValueError too
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}, not an object")
    types = {f.name: (float, int) if "float" in str(f.type) else int for f in fields(ModelArgs)}
    optional = ("n_kv_heads", "ffn_dim_multiplier")
    for key in ("max_seq_len", "max_batch_size"):                 # limits of a run, not of the model
        params.pop(key, None)
    for key, value in params.items():
        if key not in types or key == "tie_embeddings":
            raise ValueError(f"{path} has {key!r}, which this model does not know")
        if not (value is None and key in optional) and (isinstance(value, bool) or not isinstance(value, types[key])):
            raise ValueError(f"{path}: {key} is {value!r}, not a number of the right kind")
    if missing := {"dim", "n_layers", "n_heads"} - params.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}")
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = tokenizer.vocab_size
    if params["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(f"{path}: vocab_size {params['vocab_size']} is less than the tokenizer's {tokenizer.vocab_size}")
    try:
        return ModelArgs(**params, max_seq_len=max_seq_len), tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_weights(folder):
    """{name: list of that tensor's pieces, one a shard}, mapped from consolidated.00.pth, .01.pth, ...

    Nothing is in memory until it is touched, however many the shards; and no pickled code runs.
    """
    shards = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    expected = [folder / f"consolidated.{i:02}.pth" for i in range(max(1, len(shards)))]
    if shards != expected:
        lacking = next(path for path in expected if path not in shards)
        raise FileNotFoundError(f"no {lacking.name} in {folder}")
    pieces = {}
    for path in shards:
        if path.is_file() and path.stat().st_size == 0:
            raise ValueError(f"{path} is not a checkpoint of tensors: it is empty")
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:                                # a broken pickle raises whatever it happens to hit
            raise ValueError(f"{path} is not a checkpoint of tensors: {[*str(error).splitlines(), type(error).__name__][0]}") from error
        if not isinstance(state, dict) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
                and tensor.layout is torch.strided and tensor.device.type == "cpu" for name, tensor in state.items()):
            raise ValueError(f"{path} does not hold a dict of floating-point tensors")
        for name, piece in state.items():
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
        if pieces[0].dim() == len(shape) and set(rest) == {(*shape[:dim], *shape[dim + 1:])} \
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


def listed(keys, most=6):
    return ", ".join(sorted(keys)[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def check_keys(pieces, model, folder):
    """Raise ValueError naming the keys that are missing, unexpected, or of another shape than `model` has."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    shapes = set()
    for name in expected.keys() & pieces.keys():
        try:
            joined_dim(pieces[name], expected[name])
        except ValueError as error:
            shapes.add(f"{name} {error}")
    named = {"missing": expected.keys() - pieces.keys(), "unexpected": pieces.keys() - expected.keys(), "of another shape": shapes}
    if wrong := [f"{kind}: {listed(keys)}" for kind, keys in named.items() if keys]:
        raise ValueError(f"the weights in {folder} do not fit its {PARAMS}; {'; '.join(wrong)}")


def fingerprint(args, norm, embeddings):
    """16 hex digits that tell one base from another, whatever its layout, dtype or quantisation.

    From the sizes and 64 fixed values of each tensor, rounded to bf16 (what fp16 holds inexactly, under 2^-14,
    counts as 0), as they are in the file.  Weights that were made in bf16, as LLaMA's were, give the same in every
    dtype; of weights made in fp32 an fp16 file may give another than a bf16 file, being rounded twice.
    """
    sizes = (args.dim, args.n_layers, args.n_heads, args.n_kv_heads, args.vocab_size, args.hidden_dim,
             args.norm_eps, args.rope_theta)
    digest = hashlib.sha256(repr(sizes).encode())
    for tensor in (norm, embeddings):
        flat = tensor.detach().reshape(-1)
        sample = flat[torch.linspace(0, flat.numel() - 1, 64, dtype=torch.float64).long()].float().bfloat16().float()
        digest.update(torch.where(sample.abs() < 2 ** -14, 0.0, sample).numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


def load_checkpoint(folder, layers=None, dtype=None, device="cpu", max_seq_len=CONTEXT, init="checkpoint"):
    """(model, tokenizer) from a folder in Meta's layout.

    layers: the first so many blocks only, the others are never read.  dtype: of the weights, the file's own
    by default.  init="random" needs params.json and tokenizer.model only and draws weights from torch's seed.
    device="meta" then gives sizes without memory.
    A checkpoint without an output matrix ties it to the embedding.  model.origin says where the weights come
    from; adapter files carry it.  Raises FileNotFoundError or ValueError for whatever does not fit.
    """
    if init not in ("checkpoint", "random"):
        raise ValueError(f"init is {init!r}, must be checkpoint or random")
    folder = Path(folder)
    args, tokenizer = read_params(folder, max_seq_len)
    if layers is not None and not 1 <= layers <= args.n_layers:
        raise ValueError(f"{folder} has {args.n_layers} layers, so layers must be 1 to {args.n_layers}, not {layers}")
    pieces = read_weights(folder) if init == "checkpoint" else {}
    args.tie_embeddings = init == "checkpoint" and "output.weight" not in pieces
    with torch.device("meta"):                                    # sizes without memory
        model = Transformer(args)
    if init == "checkpoint":
        check_keys(pieces, model, folder)
    model.layers = model.layers[:layers]
    args.n_layers = len(model.layers)
    if init == "random":
        model.to(dtype).to_empty(device=device).init_weights()
        stored = model.norm.weight, model.tok_embeddings.weight
    else:                                                         # only what the model keeps ever leaves the file
        weights = {name: join(pieces[name], parameter.shape, dtype, device) for name, parameter in model.named_parameters()}
        if args.tie_embeddings:
            weights["output.weight"] = weights["tok_embeddings.weight"]
        model.load_state_dict(weights, assign=True)
        if args.tie_embeddings:
            model.output.weight = model.tok_embeddings.weight
        stored = [parts[0] if len(parts) == 1 else join(parts, model.get_parameter(name).shape, None, "cpu")
                  for name in ("norm.weight", "tok_embeddings.weight") for parts in [pieces[name]]]
    model.origin = {"folder": str(folder.resolve()), "layers": args.n_layers, "init": init,
                    "fingerprint": None if stored[0].is_meta else fingerprint(args, *stored)}
    return model, tokenizer


def save_checkpoint(model, tokenizer, folder):
    """Write `model` as a folder in Meta's layout, in the dtype it has; each file is whole or not there.

    Merged adapters are part of the weights.  Raises ValueError while an adapter is not merged.
    """
    if any(getattr(module, "merged", True) is False for module in model.modules()):
        raise ValueError("merge the adapter first (merge_lora): a checkpoint has no place for lora_A and lora_B")
    state = {key.replace(".base.", "."): tensor for key, tensor in model.state_dict().items() if ".lora_" not in key}
    args = asdict(model.args)
    del args["max_seq_len"], args["tie_embeddings"]               # Meta's reader sets the first and lacks the second
    if state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr():
        del state["output.weight"]                                # tied: stored once
    folder = Path(folder)
    if (folder / "consolidated.01.pth").exists():
        raise ValueError(f"{folder} holds a checkpoint in several files; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Through an open handle: given a path, torch.save would write the file's name into the file.
    write_whole(folder / WEIGHTS, lambda file: torch.save({k: v.contiguous() for k, v in state.items()}, file))
    write_whole(folder / TOKENIZER, lambda file: file.write(tokenizer.model))
    write_whole(folder / PARAMS, lambda file: file.write(json.dumps(args).encode() + b"\n"))


def write_whole(path, write):
    """Call write(file) on a file beside `path`, then rename it: `path` is the old file or the new, never a part."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
