"""Convert a model between Meta's and Hugging Face's layout, or an adapter to PEFT's or to int8.

    python -m finetune.convert llama-2-7b llama-2-7b-hf --to hf               back: --to meta
    python -m finetune.convert llama-2-7b merged --to hf --adapter out/7b/adapter.pt
    python -m finetune.convert llama-2-7b-hf out/7b/peft --to peft --adapter out/7b/adapter.pt
    python -m finetune.convert llama-2-7b out/7b/small --to int8 --adapter out/7b/adapter.pt

The second command merges the adapter into the model.  The last two write the adapter alone: the
third as PEFT's folder, the fourth in a quarter of the space.  The first folder may be in either
layout, and --adapter takes our file or PEFT's folder.  Tokenizer files, chat template, generation
settings and context length come along (docs/files.md).
"""
from .console import run_command             # First: it ends a Ctrl-C while torch loads quietly.

import warnings
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from llama.checkpoint import (
    PROBE,
    SHARD,
    is_huggingface,
    load_checkpoint,
    read_params,
    save_checkpoint,
)
from llama.companions import COMPANIONS, left_behind
from llama.fields import TOKENIZER_CONFIG
from llama.files import (
    SAFETENSORS,
    listed,
    new_folder,
    read_object,
    safetensors,
    write_json,
    write_whole,
)
from llama.peft import adapter_at, save_peft
from llama.rnn import RNNArgs
from llama.tokenizer import Tokenizer
from lora import load_adapter, lora_state_dict, merge_report, read_adapter
from lora.files import all_tensors
from lora.loftq import check_export, quantizer
from lora.matrices import replace_matrices
from lora.quantize import dequantize, in_int8
from lora.start import as_plain_lora

from .arguments import Parser, number, text
from .errors import in_one_line, one_line_errors
from .hardware import DTYPES
from .preflight import plural
from .templates import TEMPLATES

MEGABYTE = 10 ** 6


def main(argv=None):
    """Convert what the flags name, and print what was lost."""
    with one_line_errors("finetune.convert"):
        args = parse_args(argv)
        with new_folder(args.target) as folder:
            lines = convert(args, folder)
    for line in lines:
        print(in_one_line(line))
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
    flag("--shard-mb", metavar="N", type=number(int, 1),
         help=f"megabytes per file of weights, for hf (default: {SHARD // MEGABYTE})")
    args = parser.parse_args(argv)
    if args.to in ("peft", "int8") and (args.adapter is None or args.dtype):
        parser.error(f"--to {args.to} writes an --adapter, as it is: give one, and no --dtype")
    if args.bin and args.to not in ("hf", "peft"):
        parser.error(f"--bin is a choice for hf and peft; --to {args.to} has none")
    if args.shard_mb and args.to != "hf":
        parser.error(f"--shard-mb is for --to hf; --to {args.to} writes one file")
    args.shard_mb = args.shard_mb or SHARD // MEGABYTE
    return args


def convert(args: Namespace, folder: Path) -> list[str]:
    """Write what the flags ask for to `folder`; return lines about what it changed or lost.

    Raises FileNotFoundError or ValueError.
    """
    sizes, tokenizer = read_params(args.source)
    suffix = ".bin" if args.bin else SAFETENSORS
    if args.to in ("hf", "peft"):
        if isinstance(sizes, RNNArgs):
            raise ValueError(f"{args.source} is not a transformer: it cannot be written with --to "
                             f"{args.to}")
        if suffix == SAFETENSORS:
            safetensors(args.target)                 # Fail before any weights are loaded.
    if args.to in ("hf", "meta") and tokenizer.companions:
        tokenizer.companions.check()
    content = None
    base = {}
    if args.adapter:
        content = adapter_at(args.adapter, sizes)
        base = read_adapter(content)["base"] or {}
    layers = args.layers or base.get("layers")
    quantize = base.get("quantize", "none")
    if args.to == "peft":
        lines = write_peft(args, layers, content, sizes.n_layers, folder)
        return lines + template_lines(base)
    # An adapter of a quantised base is merged into the dequantised weights, because it was trained
    # on those.  The error of int8 is measured in fp32.
    dtype = torch.float32 if args.to == "int8" else DTYPES.get(args.dtype)
    model, tokenizer = load_checkpoint(args.source, layers, dtype,
                                       convert=quantizer(quantize, content))
    model.eval()
    probe = torch.tensor([tokenizer.encode(PROBE, bos=True)])
    if args.to == "int8":
        return [write_int8(content, model, probe, folder)]
    lines = []
    if content:
        lines += merge(content, model, probe, args.source) + template_lines(base)
    save_checkpoint(model, tokenizer, folder, args.to, suffix, args.shard_mb * MEGABYTE)
    if args.to == "hf":
        lines += write_chat_template(base, folder)
    return lines + companion_lines(args, model.args.vocab_size, tokenizer)


def template_lines(base: dict) -> list[str]:
    """Return a line about the adapter's prompt format, which only our adapter file stores.

    base: what that file says besides its tensors.
    """
    name = base.get("template", "alpaca")
    if name == "alpaca":
        return []
    return [f"template  {name} is not stored there: give --template {name} to generate.py and "
            "train.py"]


def write_chat_template(base: dict, folder: Path) -> list[str]:
    """Add the chat template of the adapter's prompt format to a folder for transformers.

    base: what the adapter's file says besides its tensors.  A chat template of the base stays.
    Returns a line about it, or none for a format that has no chat template.
    """
    name = base.get("template")
    path = folder / TOKENIZER_CONFIG
    if name not in TEMPLATES or not TEMPLATES[name].chat_template or not path.exists():
        return []
    fields = read_object(path)
    if fields.get("chat_template") or any(folder.glob("chat_template.*")):
        return [f"the base's own chat template is kept; the adapter was trained with {name}"]
    write_json(path, fields | {"chat_template": TEMPLATES[name].chat_template})
    return [f"chat template of {name} written to {path.name}, for transformers"]


def companion_lines(args: Namespace, vocab_size: int, tokenizer: Tokenizer) -> list[str]:
    """Return lines about the files beside the weights: kept elsewhere, or not copied."""
    companions = tokenizer.companions
    if not companions:
        return []
    lines = []
    if tokenizer.eos_note:
        lines.append(f"eos: {tokenizer.eos_note}; transformers ends texts as the configs say")
    if args.to == "meta":
        lines.append(f"kept in {COMPANIONS}, as Meta's layout has no place for it: "
                     f"{listed(companions.texts, 12)}; --to hf reads it")
        if vocab_size > tokenizer.vocab_size:
            lines.append(f"Meta's own code reads no more rows than tokenizer.model has pieces: "
                         f"{tokenizer.vocab_size} of these {vocab_size}")
    not_copied = companions.lost_fields()
    if is_huggingface(Path(args.source)):
        not_copied += left_behind(Path(args.source), companions)
    if not_copied:
        lines.append(f"not copied: {listed(not_copied, 12)}")
    return lines


def write_peft(args: Namespace, layers: int | None, content: dict, n_layers_of_source: int,
               folder: Path) -> list[str]:
    """Write the adapter as PEFT's folder; return lines about what that cannot say.

    Raises ValueError unless the adapter fits the base.
    """
    # Weights are needed only to be compared with those that the adapter brings, or for its start.
    adapter = read_adapter(content)
    check_export(adapter["config"])
    needs_weights = adapter["matrices"] or adapter["from_base"]
    model, _ = load_checkpoint(args.source, layers, device="cpu" if needs_weights else "meta")
    with warnings.catch_warnings(action="ignore"):   # torch warns that it copies nothing to meta.
        load_adapter(model, content)
    if needs_weights:                                # The model has what the file leaves out.
        adapter["tensors"] = lora_state_dict(model) | adapter["tensors"]
    else:
        adapter["tensors"] = all_tensors(adapter, model)
    adapter = as_plain_lora(adapter)
    n_layers = model.args.n_layers
    base = None
    if is_huggingface(Path(args.source)) and n_layers == n_layers_of_source:
        base = args.source
    save_peft(adapter, model.args, base, folder, ".bin" if args.bin else SAFETENSORS)
    return limits_of_peft(n_layers, n_layers_of_source, adapter["base"] or {}, base)


def limits_of_peft(n_layers: int, n_layers_of_source: int, base: dict,
                   base_named: str | None) -> list[str]:
    """Return lines about what PEFT's folder does not say."""
    lines = []
    quantize = base.get("quantize", "none")
    if n_layers < n_layers_of_source:
        lines.append(f"PEFT needs a base of {plural(n_layers, 'layer')} for it: --to hf --layers "
                     f"{n_layers}")
    elif not base_named:
        lines.append("it names no base, because PEFT cannot load Meta's layout: load it over what "
                     "--to hf writes")
    if quantize != "none":
        lines.append(f"it was trained over the base in {quantize}, which PEFT does not say")
    return lines


def merge(content: dict, model: nn.Module, probe: torch.Tensor, source: str) -> list[str]:
    """Merge an adapter into the weights; return lines about what replaced or survived.

    Raises ValueError for weights of several dtypes, because each dtype rounds the update otherwise.
    """
    # A quantised layer's dtype is that of its dtype_holder.
    dtypes = {tensor.dtype for name, tensor in model.state_dict().items()
              if name.endswith(("weight", "dtype_holder"))}
    if len(dtypes) > 1:
        raise ValueError(f"{source} has weights of several dtypes; name the one to merge in with "
                         "--dtype")
    lines = []
    replaced = replace_matrices(model, read_adapter(content))
    if replaced:
        dtype, = dtypes
        dtype = str(dtype).removeprefix("torch.")
        lines.append(f"replaced by the adapter's own, in {dtype}: {listed(replaced)}")
    load_adapter(model, content)
    lines.append(merge_report(model, probe, "--dtype fp32", keep_base=False))
    dequantize(model)
    return lines


@torch.no_grad()
def write_int8(content: dict, model: nn.Module, probe: torch.Tensor, folder: Path) -> str:
    """Write the adapter in int8; return a line about the change of the logits of `probe`."""
    adapter = read_adapter(content)
    load_adapter(model, content)
    before = model(probe).float()
    adapter["tensors"] = lora_state_dict(model) | adapter["tensors"]     # with what it leaves out
    adapter = as_plain_lora(adapter)
    tensors, scales = in_int8(adapter["tensors"])
    config = asdict(adapter["config"])
    config["targets"] = list(adapter["config"].targets)
    int8 = {"config": config, "base": adapter["base"] or model.origin, "tensors": tensors,
            "scales": scales}
    write_whole(folder / "adapter.pt", lambda file: torch.save(int8, file))
    load_adapter(model, adapter_at(folder / "adapter.pt"))
    change = (model(probe).float() - before).abs().max()
    return f"int8: logits of up to {before.abs().max():.3g} move by up to {change:.2g}"


if __name__ == "__main__":
    run_command(main, "finetune.convert")
