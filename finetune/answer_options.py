"""The flags of generate.py: what each means, their checks and defaults."""
import argparse
import os

from lora.quantize import KINDS as QUANTIZED

from .arguments import Parser, add_hardware_flags, number, text, utf8
from .templates import TEMPLATES

DEFAULT_ADAPTER = "out/adapter.pt"


def parse_args(argv=None, description: str | None = None) -> argparse.Namespace:
    """Return the checked arguments, with defaults filled in.

    adapter is None for the base alone.  adapter_by_default: whether out/adapter.pt was found and is
    used without --adapter.
    """
    parser = make_parser(description)
    args = parser.parse_args(argv)
    check_combinations(args, parser)
    args.adapter_by_default = args.adapter is None and os.path.exists(DEFAULT_ADAPTER)
    if args.adapter_by_default:
        args.adapter = DEFAULT_ADAPTER
    if args.adapter == "none":
        args.adapter = None
    if args.merge and not args.adapter:
        parser.error("--merge needs an adapter")
    return args


def check_combinations(args, parser):
    """Raise ValueError for flags that contradict each other."""
    if args.input and not args.instruction:
        parser.error("--input needs an --instruction")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        parser.error("--top-k and --top-p need a --temperature above 0")
    if args.beams > 1 and args.temperature > 0:
        parser.error("--beams searches and --temperature draws; give only one")
    if args.score and not args.data:
        parser.error("--score needs --data, whose outputs are the right answers")
    if args.shard and (args.interactive or args.merge):
        parser.error("--shard cuts the base over processes, which read no terminal and merge "
                     "nothing: leave --interactive and --merge out")
    if args.also and not args.score:
        parser.error("--also needs --score")
    if args.choices and not args.score:
        parser.error("--choices needs --score")
    if args.choices:
        distinct = {choice for choice in args.choices if choice.strip()}
        if len(args.choices) < 2 or len(distinct) < len(args.choices):
            parser.error(f"--choices {','.join(args.choices)}: give two answers or more, each "
                         "once, with commas between them")
    if args.score and (args.temperature > 0 or args.beams > 1 or args.no_repeat_ngram):
        parser.error("--score decodes greedily: no --temperature, --beams or --no-repeat-ngram")


def make_parser(description: str | None) -> Parser:
    parser = Parser(prog="generate.py", description=description)
    add_model_flags(parser.add_argument_group("model"))
    add_question_flags(parser.add_argument_group(
        "input (default: a few built-in instructions)"))
    add_decoding_flags(parser.add_argument_group("decoding"))
    hardware = parser.add_argument_group("hardware")
    add_hardware_flags(hardware)
    hardware.add_argument("--shard", action="store_true",
                          help="cut the base over the ranks of torchrun, if one GPU cannot hold "
                               "it; rank 0 prints")
    return parser


def add_model_flags(group):
    flag = group.add_argument
    flag("--adapter", metavar="PATH", type=text,
         help="an adapter.pt or a PEFT folder; none: the base alone (default: out/adapter.pt if it "
              "is there)")
    flag("--checkpoint", metavar="DIR", type=text,
         help="base model (default: the adapter's, else the demo's)")
    flag("--layers", metavar="N", type=number(int, 1),
         help="the first N blocks only (default: the adapter's, else all)")
    flag("--quantize", choices=("none", *QUANTIZED),
         help="hold the base in 8 or 4 bits (default: as the adapter was trained, else none)")
    flag("--template", choices=TEMPLATES,
         help="prompt format (default: the adapter's, else alpaca)")
    flag("--merge", action="store_true", help="merge the adapter into the weights first")


def add_question_flags(group):
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--instruction", metavar="TEXT", type=text, help="the instruction to answer")
    flag("--data", metavar="FILE", type=text,
         help="answer a file of examples, a JSON list or one per line: JSON lines on stdout")
    flag("--interactive", action="store_true",
         help="answer what is typed, one instruction per line")
    group.add_argument("--score", action="store_true",
                       help="measure how well base and adapter give the outputs in --data: one "
                            "JSON line on stdout")
    group.add_argument("--also", metavar="FILE", type=text,
                       help="with --score: the loss on other text too, rows of {\"text\": ...}: "
                            "what does the adapter forget?")
    group.add_argument("--choices", metavar="A,B,...", type=lambda value: utf8(value).split(","),
                       help="answers to choose from with --score (default: the outputs in --data, "
                            "if there are up to 20)")
    group.add_argument("--input", metavar="TEXT", type=utf8, default="",
                       help="input text for --instruction")


def add_decoding_flags(group):
    flag = group.add_argument
    flag("--max-new-tokens", metavar="N", type=number(int, 1), default=128,
         help="maximum tokens per answer (default: 128; with --score at most twice the longest "
              "output)")
    flag("--temperature", metavar="F", type=number(float, 0), default=0.0,
         help="0: always the likeliest token (default: 0)")
    flag("--top-k", metavar="N", type=number(int, 0), default=0,
         help="draw from the N likeliest tokens; 0: from all (default: 0)")
    flag("--top-p", metavar="F", type=number(float, 0, 1, open_low=True), default=1.0,
         help="draw from the likeliest tokens that together reach this probability (default: 1)")
    flag("--seed", metavar="N", type=number(int, 0, 2 ** 63 - 1), default=0,
         help="random seed for sampling and for --score's bootstrap (default: 0)")
    flag("--beams", metavar="N", type=number(int, 1, 256), default=1,
         help="search with N beams (default: 1, greedy)")
    flag("--no-repeat-ngram", metavar="N", type=number(int, 0), default=0,
         help="never repeat N tokens in a row in an answer; 0: no limit (default: 0)")
    flag("--verbose", action="store_true",
         help="print tokens per forward and per second, on stderr")
