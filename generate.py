"""Let a LLaMA answer instructions, with an adapter or without.

    python generate.py                             what `python train.py` just made, on a few built-in instructions
    python generate.py --adapter none              the base alone, on the same
    python generate.py --adapter out/7b/adapter.pt --instruction "Name three primary colours."
"""
import argparse
import os
import sys
from pathlib import Path

import torch

from llama.alpaca import encode_prompt
from llama.checkpoint import CONTEXT, load_checkpoint
from llama.cli import DTYPES, Parser, add_hardware_flags, bad_input_ends_in_one_line, number, pick_hardware, shown
from llama.sampling import generate, stream
from lora import load_adapter, merge_lora, read_adapter

DEMO = Path(__file__).parent / "llama" / "demo"
INSTRUCTIONS = [                                      # the demo's adapter was trained on none of these
    {"instruction": "What is the opposite of slow?"},
    {"instruction": "Name the colour of grass."},
    {"instruction": "Which group does an apple belong to?"},
    {"instruction": "Give the past of the verb think."},
    {"instruction": "Name the place.", "input": "Leo found a green book in the kitchen."},
    {"instruction": "How does Lily feel?", "input": "Lily played in the sun."},
]


def parse_args(argv=None):
    parser = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--adapter", metavar="FILE", help="none: the base alone (default: out/adapter.pt if it is there)")
    flag("--checkpoint", metavar="DIR", help="base model (default: the adapter's, else the demo's)")
    flag("--layers", metavar="N", type=number(int, 1), help="the first N blocks only (default: the adapter's, else all)")
    flag("--merge", action="store_true", help="merge the adapter into the weights first")
    flag("--instruction", metavar="TEXT", help="what to do (default: a few built-in instructions)")
    flag("--input", metavar="TEXT", default="", help="what to do it with")
    flag("--max-new-tokens", metavar="N", type=number(int, 1), default=128, help="tokens an answer (default: 128)")
    flag("--temperature", metavar="F", type=number(float, 0), default=0.0, help="0: always the likeliest token (default: 0)")
    flag("--seed", metavar="N", type=number(int, 0, 2 ** 63 - 1), default=0, help="of what --temperature draws (default: 0)")
    add_hardware_flags(parser)
    args = parser.parse_args(argv)
    if args.input and not args.instruction:
        parser.error("--input needs an --instruction")
    if args.adapter is None and os.path.exists("out/adapter.pt"):
        args.adapter = "out/adapter.pt"
    if args.adapter in (None, "none"):
        args.adapter = None
        if args.merge:
            parser.error("--merge needs an adapter")
    return args


def load(args, device):
    """(model, tokenizer, a line about them): the base that flags or adapter file name, the adapter, merged if asked."""
    base = read_adapter(args.adapter)["base"] if args.adapter else {}
    folder = args.checkpoint or base.get("folder") or str(DEMO)
    if base.get("init") == "random":
        raise ValueError(f"{args.adapter} was trained over random weights (--init random), which were not kept")
    layers = args.layers or (base.get("layers") if args.adapter else None)
    model, tokenizer = load_checkpoint(folder, layers, DTYPES[args.precision], device, CONTEXT)
    said = f"base {shown(folder)}, {model.args.n_layers} layers, {args.precision} on {device}"
    if args.adapter:
        load_adapter(model, args.adapter)
        config = model.lora_config
        said += f"; adapter {args.adapter}, {config.method} r {config.r} on {','.join(config.targets)}"
    if args.merge:
        said += f", merged: {100 * merge_lora(model):.1f} % of the update survives in {args.precision}"
    return model.eval(), tokenizer, said


def main(argv=None):
    args = parse_args(argv)
    with bad_input_ends_in_one_line("generate.py"):
        device, args.precision = pick_hardware(args.device, args.precision)
        model, tokenizer, said = load(args, device)
        examples = [{"instruction": args.instruction, "input": args.input}] if args.instruction else INSTRUCTIONS
        generator = torch.Generator().manual_seed(args.seed)
        answers = [generate(model, encode_prompt(example, tokenizer), args.max_new_tokens, tokenizer.eos_id,
                            args.temperature, generator) for example in examples]
    print(said, file=sys.stderr)
    for example, ids in zip(examples, answers):
        print(f"\n### {example['instruction']}")
        if example.get("input"):
            print(f"# {example['input']}")
        for text in stream(tokenizer, ids):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
