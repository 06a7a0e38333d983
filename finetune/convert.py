"""Models in and out: Meta's folder of params.json, consolidated.00.pth (or several) and tokenizer.model, or Hugging Face's.

    python -m finetune.convert llama-2-7b llama-2-7b-hf --to hf                            the other way: --to meta
    python -m finetune.convert llama-2-7b merged --to hf --adapter out/7b/adapter.pt       with the adapter merged into it
    python -m finetune.convert llama-2-7b out/7b/peft --to peft --adapter out/7b/adapter.pt      the adapter for PEFT
    python -m finetune.convert llama-2-7b out/7b/small --to int8 --adapter out/7b/adapter.pt     the adapter in a fourth of the space

The first folder may be of either layout, the adapter a file of ours or PEFT's folder.
"""
import argparse
import sys
import warnings
from dataclasses import asdict

import torch

from llama.checkpoint import PROBE, SHARD, load_checkpoint, read_params, save_checkpoint
from llama.files import SAFETENSORS, new_folder, safetensors, write_whole
from llama.peft import adapter_at, save_peft
from llama.rnn import RNNArgs
from lora import load_adapter, merge_report, read_adapter
from lora.quantize import dequantize, in_int8, quantizer

from .arguments import Parser, number, text
from .errors import bad_input_ends_in_one_line
from .hardware import DTYPES


def parse_args(argv=None):
    parser = Parser(prog="python -m finetune.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("source", metavar="SRC", type=text, help="the base, a folder in either layout")
    flag("target", metavar="DST", type=text, help="the folder to write; one that holds something is refused")
    flag("--to", choices=("meta", "hf", "peft", "int8"), required=True,
         help="a model in this layout, or the adapter for PEFT, or in int8")
    flag("--adapter", metavar="PATH", type=text, help="merge this adapter first, our file or PEFT's folder; for peft: write it")
    flag("--dtype", choices=DTYPES, help="of the weights that are written (default: each as it is in SRC)")
    flag("--layers", metavar="N", type=number(int, 1), help="the first N blocks only (default: the adapter's, else all)")
    flag("--bin", action="store_true", help="write pytorch_model.bin or adapter_model.bin, which need no safetensors package")
    flag("--shard-mb", metavar="N", type=number(int, 1), default=SHARD // 10 ** 6,
         help=f"megabytes a file of weights, for hf (default: {SHARD // 10 ** 6})")
    args = parser.parse_args(argv)
    if args.to in ("peft", "int8") and (args.adapter is None or args.dtype):
        parser.error(f"--to {args.to} writes an --adapter, as it is: give one, and no --dtype")
    if args.bin and args.to not in ("hf", "peft"):
        parser.error(f"--bin is a choice for hf and peft; --to {args.to} has none")
    return args


def convert(args, folder):
    """Write what the command line asks for to `folder`.  Returns a line about what that lost, if anything could be."""
    sizes, _ = read_params(args.source)
    if args.to in ("hf", "peft") and isinstance(sizes, RNNArgs):
        raise ValueError(f"{args.source} is no transformer: --to {args.to} has no form for it")
    suffix = ".bin" if args.bin else SAFETENSORS
    if args.to in ("hf", "peft") and suffix == SAFETENSORS:
        safetensors(args.target)                                  # its absence shows before the weights load
    source = args.adapter and adapter_at(args.adapter, sizes)
    adapter = read_adapter(source) if source else {}
    base = adapter.get("base") or {}
    layers = args.layers or base.get("layers")
    if args.to == "peft":
        model, _ = load_checkpoint(args.source, layers, device="meta")      # does the adapter fit?  No weight is read
        with warnings.catch_warnings(action="ignore"):            # that nothing is copied into such a model
            load_adapter(model, source)
        save_peft(adapter, model.args, args.source, folder, suffix)
        n, kind = model.args.n_layers, base.get("quantize", "none")
        return "; ".join([f"PEFT needs a base of {n} layers for it: --to hf --layers {n}"] * (n < sizes.n_layers)
                         + [f"it was trained over the base in {kind}, which PEFT does not say"] * (kind != "none"))
    # An adapter over a quantised base is merged into what it was trained on: the dequantised weights.
    convert = quantizer(base.get("quantize", "none"))
    dtype = torch.float32 if args.to == "int8" else DTYPES.get(args.dtype)         # where its error can be measured
    model, tokenizer = load_checkpoint(args.source, layers, dtype, convert=convert)
    probe, report = torch.tensor([tokenizer.encode(PROBE, bos=True)]), None
    if args.to == "int8":
        return shrink(adapter, model.eval(), source, probe, folder)
    if source:
        if len({tensor.dtype for name, tensor in model.state_dict().items() if name.endswith(("weight", "like"))}) > 1:
            raise ValueError(f"{args.source} has weights of several dtypes; name the one to merge in with --dtype")
        load_adapter(model, source)
        report = merge_report(model.eval(), probe, "--dtype fp32", keep_base=False)
        dequantize(model)
    save_checkpoint(model, tokenizer, folder, args.to, suffix, args.shard_mb * 10 ** 6)
    return report


@torch.no_grad()
def shrink(adapter, model, source, probe, folder):
    """Write the adapter in int8.  Returns a line about how far that moves the logits of `probe`."""
    load_adapter(model, source)
    before = model(probe).float()
    tensors, scales = in_int8(adapter["tensors"])
    config = {**asdict(adapter["config"]), "targets": list(adapter["config"].targets)}
    content = {"config": config, "base": adapter["base"] or model.origin, "tensors": tensors, "scales": scales}
    write_whole(folder / "adapter.pt", lambda file: torch.save(content, file))
    load_adapter(model, adapter_at(folder / "adapter.pt"))
    moved = (model(probe).float() - before).abs().max()
    return f"int8: logits of up to {before.abs().max():.3g} move by up to {moved:.2g}"


def main(argv=None):
    with bad_input_ends_in_one_line("finetune.convert"):
        args = parse_args(argv)
        with new_folder(args.target) as folder:
            report = convert(args, folder)
    if report:
        print(report)
    print(f"written   {args.target}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
