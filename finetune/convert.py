"""Convert a model between Meta's and Hugging Face's layout, or an adapter to PEFT's or to int8.

    python -m finetune.convert llama-2-7b llama-2-7b-hf --to hf               back: --to meta
    python -m finetune.convert llama-2-7b merged --to hf --adapter out/7b/adapter.pt
    python -m finetune.convert llama-2-7b out/7b/peft --to peft --adapter out/7b/adapter.pt
    python -m finetune.convert llama-2-7b out/7b/small --to int8 --adapter out/7b/adapter.pt

The second command merges the adapter into the model.  The last two write the adapter alone: the
third as PEFT's folder, the fourth in a quarter of the space.  The first folder may be in either
layout, and --adapter takes our file or PEFT's folder.
"""
from .console import run_command             # First: it ends a Ctrl-C while torch loads quietly.

import warnings
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from llama.checkpoint import PROBE, SHARD, load_checkpoint, read_params, save_checkpoint
from llama.files import SAFETENSORS, new_folder, safetensors, write_whole
from llama.peft import adapter_at, save_peft
from llama.rnn import RNNArgs
from lora import load_adapter, merge_report, read_adapter
from lora.quantize import dequantize, in_int8, quantizer

from .arguments import Parser, number, text
from .errors import one_line_errors
from .hardware import DTYPES
from .preflight import plural

MEGABYTE = 10 ** 6


def main(argv=None):
    """Convert what the flags name, and print what was lost."""
    with one_line_errors("finetune.convert"):
        args = parse_args(argv)
        with new_folder(args.target) as folder:
            report = convert(args, folder)
    if report:
        print(report)
    print(f"written   {args.target}")


def parse_args(argv=None) -> Namespace:
    """Return the flags.  Raises ValueError for flags that contradict each other."""
    parser = Parser(prog="python -m finetune.convert", description=__doc__)
    flag = parser.add_argument
    flag("source", metavar="SRC", type=text, help="the base, a folder in either layout")
    flag("target", metavar="DST", type=text, help="the folder to write; it must be new or empty")
    flag("--to", choices=("meta", "hf", "peft", "int8"), required=True,
         help="write a model in Meta's or Hugging Face's layout, or the adapter for PEFT or in "
              "int8")
    flag("--adapter", metavar="PATH", type=text,
         help="merge this adapter, our file or PEFT's folder; with peft and int8: write it")
    flag("--dtype", choices=DTYPES,
         help="dtype of the written weights (default: each as it is in SRC)")
    flag("--layers", metavar="N", type=number(int, 1),
         help="keep the first N blocks (default: the adapter's, or all)")
    flag("--bin", action="store_true",
         help="write pytorch_model.bin or adapter_model.bin; safetensors is not needed then")
    flag("--shard-mb", metavar="N", type=number(int, 1), default=SHARD // MEGABYTE,
         help=f"megabytes per file of weights, for hf (default: {SHARD // MEGABYTE})")
    args = parser.parse_args(argv)
    if args.to in ("peft", "int8") and (args.adapter is None or args.dtype):
        parser.error(f"--to {args.to} writes an --adapter, as it is: give one, and no --dtype")
    if args.bin and args.to not in ("hf", "peft"):
        parser.error(f"--bin is a choice for hf and peft; --to {args.to} has none")
    return args


def convert(args: Namespace, folder: Path) -> str | None:
    """Write what the flags ask for to `folder`; return a line about what it lost, if anything.

    Raises FileNotFoundError or ValueError.
    """
    sizes, _ = read_params(args.source)
    suffix = ".bin" if args.bin else SAFETENSORS
    if args.to in ("hf", "peft"):
        if isinstance(sizes, RNNArgs):
            raise ValueError(f"{args.source} is not a transformer: it cannot be written with --to "
                             f"{args.to}")
        if suffix == SAFETENSORS:
            safetensors(args.target)                 # Fail before any weights are loaded.
    content = None
    base = {}
    if args.adapter:
        content = adapter_at(args.adapter, sizes)
        base = read_adapter(content)["base"] or {}
    layers = args.layers or base.get("layers")
    quantize = base.get("quantize", "none")
    if args.to == "peft":
        sizes_kept = check_fits(args.source, layers, content)
        save_peft(read_adapter(content), sizes_kept, args.source, folder, suffix)
        return limits_of_peft(sizes_kept.n_layers, sizes.n_layers, quantize)
    # An adapter of a quantised base is merged into the dequantised weights, because it was trained
    # on those.  The error of int8 is measured in fp32.
    dtype = torch.float32 if args.to == "int8" else DTYPES.get(args.dtype)
    model, tokenizer = load_checkpoint(args.source, layers, dtype, convert=quantizer(quantize))
    model.eval()
    probe = torch.tensor([tokenizer.encode(PROBE, bos=True)])
    if args.to == "int8":
        return write_int8(content, model, probe, folder)
    report = None
    if content:
        report = merge(content, model, probe, args.source)
    save_checkpoint(model, tokenizer, folder, args.to, suffix, args.shard_mb * MEGABYTE)
    return report


def check_fits(source: str, layers: int | None, content: dict):
    """Raise ValueError unless the adapter fits the base; return the base's ModelArgs."""
    model, _ = load_checkpoint(source, layers, device="meta")        # No weight is read.
    with warnings.catch_warnings(action="ignore"):   # torch warns that it copies nothing to meta.
        load_adapter(model, content)
    return model.args


def limits_of_peft(n_layers: int, n_layers_of_source: int, quantize: str) -> str:
    """Return a line about what PEFT's folder cannot say; it may be empty."""
    notes = []
    if n_layers < n_layers_of_source:
        notes.append(f"PEFT needs a base of {plural(n_layers, 'layer')} for it: --to hf --layers "
                     f"{n_layers}")
    if quantize != "none":
        notes.append(f"it was trained over the base in {quantize}, which PEFT does not say")
    return "; ".join(notes)


def merge(content: dict, model: nn.Module, probe: torch.Tensor, source: str) -> str:
    """Merge an adapter into the weights; return a line about how much of it survived.

    Raises ValueError for weights of several dtypes, because each dtype rounds the update otherwise.
    """
    dtypes = {tensor.dtype for name, tensor in model.state_dict().items()
              if name.endswith(("weight", "like"))}  # like: the dtype of a quantised layer
    if len(dtypes) > 1:
        raise ValueError(f"{source} has weights of several dtypes; name the one to merge in with "
                         "--dtype")
    load_adapter(model, content)
    report = merge_report(model, probe, "--dtype fp32", keep_base=False)
    dequantize(model)
    return report


@torch.no_grad()
def write_int8(content: dict, model: nn.Module, probe: torch.Tensor, folder: Path) -> str:
    """Write the adapter in int8; return a line about the change of the logits of `probe`."""
    adapter = read_adapter(content)
    load_adapter(model, content)
    before = model(probe).float()
    tensors, scales = in_int8(adapter["tensors"])
    config = asdict(adapter["config"])
    config["targets"] = list(adapter["config"].targets)
    small = {"config": config, "base": adapter["base"] or model.origin, "tensors": tensors,
             "scales": scales}
    write_whole(folder / "adapter.pt", lambda file: torch.save(small, file))
    load_adapter(model, adapter_at(folder / "adapter.pt"))
    moved = (model(probe).float() - before).abs().max()
    return f"int8: logits of up to {before.abs().max():.3g} move by up to {moved:.2g}"


if __name__ == "__main__":
    run_command(main, "finetune.convert")
