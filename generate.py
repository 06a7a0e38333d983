"""Let a LLaMA answer instructions, with an adapter or without.

    python generate.py                             what `python train.py` just made, on a few built-in instructions
    python generate.py --adapter none              the base alone, on the same
    python generate.py --adapter out/7b/adapter.pt --instruction "Name three primary colours."
    python generate.py --interactive               type instructions; `:adapter PATH` or `:adapter none` switches
    python generate.py --data questions.json > answers.jsonl
    python generate.py --data held_out.json --score       how good are the answers, with the adapter and without?
"""
import argparse
import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from finetune.arguments import Parser, add_hardware_flags, number, text, utf8
from finetune.dataset import encode_prompt, read_examples
from finetune.errors import one_line_errors, in_one_line, short_path
from finetune.evaluate import Exam, intervals
from finetune.hardware import DTYPES, pick_hardware
from llama.checkpoint import PROBE, load_checkpoint
from llama.peft import adapter_at, is_peft, read_config
from llama.sampling import beam_search, generate, room, stream
from lora import load_adapter, lora_disabled, merge_report, read_adapter, unmerge_lora
from lora.prepack import prepack
from lora.quantize import KINDS as QUANTIZED
from lora.quantize import quantizer

DEMO = Path(__file__).parent / "finetune" / "demo"
BATCH = 8                                            # prompts at a time for --data
INSTRUCTIONS = [                                     # the demo's adapter was trained on none of these
    {"instruction": "What is the opposite of slow?"},
    {"instruction": "Name the colour of grass."},
    {"instruction": "Which group does an apple belong to?"},
    {"instruction": "Give the past of the verb think."},
    {"instruction": "Name the place.", "input": "Leo found a green book in the kitchen."},
    {"instruction": "How does Lily feel?", "input": "Lily played in the sun."},
]


def parse_args(argv=None):
    parser = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument_group("who answers").add_argument
    flag("--adapter", metavar="PATH", type=text,
         help="our file or PEFT's folder; none: the base alone (default: out/adapter.pt if it is there)")
    flag("--checkpoint", metavar="DIR", type=text, help="base model (default: the adapter's, else the demo's)")
    flag("--layers", metavar="N", type=number(int, 1), help="the first N blocks only (default: the adapter's, else all)")
    flag("--quantize", choices=("none", *QUANTIZED), help="hold the base in 8 or 4 bits (default: as the adapter's was, else none)")
    flag("--merge", action="store_true", help="merge the adapter into the weights first")
    group = parser.add_argument_group("what is asked (default: a few built-in instructions)")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--instruction", metavar="TEXT", type=text, help="what to do")
    flag("--data", metavar="FILE", type=text, help="answer a .json or .jsonl file of examples: JSON lines on stdout")
    flag("--interactive", action="store_true", help="answer what is typed, a line an instruction")
    group.add_argument("--score", action="store_true",
                       help="of --data, say how good base and adapter are at its outputs: one JSON line on stdout")
    group.add_argument("--choices", metavar="A,B,...", type=lambda names: utf8(names).split(","),
                       help="answers to choose from with --score (default: the outputs in --data, where they are up to 20)")
    group.add_argument("--input", metavar="TEXT", type=utf8, default="", help="what to do it with")
    flag = parser.add_argument_group("how").add_argument
    flag("--max-new-tokens", metavar="N", type=number(int, 1), default=128,
         help="tokens an answer (default: 128; with --score also at most twice the longest output)")
    flag("--temperature", metavar="F", type=number(float, 0), default=0.0, help="0: always the likeliest token (default: 0)")
    flag("--top-k", metavar="N", type=number(int, 0), default=0, help="draw from the N likeliest; 0: from all (default: 0)")
    flag("--top-p", metavar="F", type=number(float, 0, 1, open_low=True), default=1.0,
         help="draw from the likeliest that together reach this probability (default: 1)")
    flag("--seed", metavar="N", type=number(int, 0, 2 ** 63 - 1), default=0, help="of what is drawn, by --score too (default: 0)")
    flag("--beams", metavar="N", type=number(int, 1, 256), default=1, help="search with N beams (default: 1, greedy)")
    flag("--no-repeat-ngram", metavar="N", type=number(int, 0), default=0,
         help="never repeat N tokens in a row in an answer; 0: may (default: 0)")
    flag("--verbose", action="store_true", help="say how many tokens a forward gave and a second, on stderr")
    add_hardware_flags(parser.add_argument_group("on what"))
    args = parser.parse_args(argv)
    if args.input and not args.instruction:
        parser.error("--input needs an --instruction")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        parser.error("--top-k and --top-p choose what is drawn from; nothing is drawn without --temperature")
    if args.beams > 1 and args.temperature > 0:
        parser.error("--beams searches and --temperature draws; give one")
    if args.score and not args.data:
        parser.error("--score needs --data, whose outputs are what is right")
    if args.choices and not args.score:
        parser.error("--choices are what --score chooses from")
    if args.choices and (len(args.choices) < 2 or len(set(args.choices)) < len(args.choices) or not all(map(str.strip, args.choices))):
        parser.error(f"--choices {','.join(args.choices)}: give two answers or more, each once, with commas between them")
    if args.score and (args.temperature > 0 or args.beams > 1 or args.no_repeat_ngram):
        parser.error("--score takes the likeliest tokens as they come: no --temperature, --beams or --no-repeat-ngram")
    args.adapter_by_default, args.pool = args.adapter is None, {}      # of what was said, for the answers to come
    if args.adapter is None and os.path.exists("out/adapter.pt"):
        args.adapter = "out/adapter.pt"
    if args.adapter == "none":
        args.adapter = None
    if args.merge and not args.adapter:
        parser.error("--merge needs an adapter")
    return args


def load(args, device):
    """(model, tokenizer, a line about them): the base that flags or adapter file name, the adapter, merged if asked."""
    base = {}
    if args.adapter and is_peft(args.adapter):       # whose base may have any name, or none
        base = {"folder": args.checkpoint or read_config(args.adapter)[1]}
        if not base["folder"]:
            raise ValueError(f"{args.adapter} does not say what its base is; name its folder with --checkpoint")
    elif args.adapter:
        base = read_adapter(adapter_at(args.adapter))["base"]
    folder, layers = args.checkpoint or base.get("folder", str(DEMO)), args.layers or base.get("layers")
    if not isinstance(folder, str) or not isinstance(layers, int | None):
        raise ValueError(f"{args.adapter} is not an adapter file: it names its base by {folder!r} and {layers!r}")
    if base.get("init") == "random":
        raise ValueError(f"{args.adapter} was trained over random weights (--init random), which were not kept")
    quantize = args.quantize or base.get("quantize", "none")
    model, tokenizer = load_checkpoint(folder, layers, DTYPES[args.precision], device, convert=quantizer(quantize))
    prepack(model.eval())
    said = f"base {short_path(folder)}, {model.args.n_layers} layers, {args.precision}{f' and {quantize}' * (quantize != 'none')} on {device}"
    if args.adapter:
        load_adapter(model, adapter_at(args.adapter, model.args))
        config = model.lora_config
        said += f"; adapter {args.adapter}, {config.method} r {config.r} on {','.join(config.targets)}"
        said += ", which may be of another base: PEFT does not say" * is_peft(args.adapter)
    if args.merge:
        probe = torch.tensor([tokenizer.encode(PROBE, bos=True)], device=device)
        said += "\n" + merge_report(model, probe, "--precision fp32")
        prepack(model)                               # what the merge left
    return model, tokenizer, said


@contextmanager
def tallied(model, ids, verbose):
    """`ids` to iterate over; when done with, how many there were and how many forwards they took is said, if `verbose`."""
    tokens = forwards = 0

    def counted():
        nonlocal tokens
        for tokens, token in enumerate(ids, 1):
            yield token

    def ran(*_):
        nonlocal forwards
        forwards += 1
    hook, began = model.register_forward_hook(ran), time.perf_counter()
    try:
        yield counted()
    finally:
        hook.remove()
    if verbose:
        print(f"{tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} a forward; "
              f"{tokens / (time.perf_counter() - began):.1f} tokens/s", file=sys.stderr, flush=True)


def answers(model, tokenizer, examples, args):
    """Iterate over (i, id): the next tokens of the answer to examples[i]."""
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    if args.beams == 1:
        return generate(model, prompts, args.max_new_tokens, tokenizer.eos_id, args.temperature,
                        args.top_k, args.top_p, args.no_repeat_ngram, args.seed, args.pool)
    return ((i, token) for i, prompt in enumerate(prompts) for token in beam_search(
        model, prompt, args.max_new_tokens, tokenizer.eos_id, args.beams, args.no_repeat_ngram))


def show(model, tokenizer, example, args):
    with tallied(model, answers(model, tokenizer, [example], args), args.verbose) as ids:
        for piece in stream(tokenizer, (token for _, token in ids)):
            print(piece, end="", flush=True)
        print(flush=True)


def answer_file(model, tokenizer, examples, args):
    """One JSON line an example on stdout, in their order; progress on stderr."""
    for start in range(0, len(examples), BATCH):
        some = examples[start:start + BATCH]
        answered = [[] for _ in some]
        with tallied(model, answers(model, tokenizer, some, args), args.verbose) as ids:
            for i, token in ids:
                answered[i].append(token)
        for example, ids in zip(some, answered):
            print(json.dumps({**example, "answer": tokenizer.decode(ids)}, ensure_ascii=False), flush=True)
        print(f"{start + len(some)}/{len(examples)} answered", file=sys.stderr, flush=True)


def score(model, exam, args):
    """One JSON line: what Exam knows of the examples, then [value, low, high] of each measure for the base and, where
    there is one, for the adapter and for the difference between the two."""
    tables = {}

    def take(name):
        tables[name] = exam.take(model, lambda n: print(f"{name}: {n}/{len(exam.rows)} answered", file=sys.stderr, flush=True))
    if args.adapter:
        take("adapter")
        if args.merge:
            unmerge_lora(model)
    with lora_disabled(model):
        take("base")
    line = {"data": args.data, **exam.about(), "seed": args.seed, **intervals(tables, args.seed)}
    print(json.dumps(line, ensure_ascii=False))


def interact(model, tokenizer, args):
    """Read instructions from stdin until it ends.  An adapter is switched on the base that is loaded already."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")      # a stray byte is no reason to end
    adapter = args.adapter
    while True:
        print("\n### ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return print()
        line = line.strip()
        words = line.split(maxsplit=1)
        try:
            if line.startswith(":") and (words[0] != ":adapter" or len(words) < 2):
                print("type an instruction, or :adapter PATH, or :adapter none", file=sys.stderr, flush=True)
            elif line.startswith(":"):
                name = words[1]
                if name != "none":
                    source = adapter_at(name, model.args)
                    read_adapter(source)             # a file that is none changes nothing
                if args.merge:
                    unmerge_lora(model)
                    args.merge = False
                if name != "none":
                    load_adapter(model, source)
                    if (kind := (read_adapter(source)["base"] or {}).get("quantize", "none")) != model.origin["quantize"]:
                        print(f"it was trained over the base in {kind}, here it is {model.origin['quantize']}", file=sys.stderr)
                adapter = None if name == "none" else name
                print(f"adapter {name}", file=sys.stderr, flush=True)
            elif words:
                with nullcontext() if adapter else lora_disabled(model):
                    show(model, tokenizer, {"instruction": line}, args)
        except (ValueError, OSError) as error:
            print(f"generate.py: {in_one_line(error)}", file=sys.stderr, flush=True)


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")     # whatever the terminal's or the file's own would be
    with one_line_errors("generate.py"):
        args = parse_args(argv)
        device, args.precision = pick_hardware(args.device, args.precision)
        required = ("instruction", "output") if args.score else ("instruction",)
        examples = read_examples(args.data, required) if args.data else INSTRUCTIONS
        if args.instruction:
            examples = [{"instruction": args.instruction, "input": args.input}]
        try:
            model, tokenizer, said = load(args, device)
        except (ValueError, OSError) as error:
            if not (args.adapter and args.adapter_by_default):
                raise
            raise ValueError(f"{error}; {args.adapter} was taken because it is there, --adapter none leaves it out") from error
        # What is too long, or no choice, shows before the first is answered.
        exam = args.score and Exam(examples, tokenizer, model.args.max_seq_len, args.choices, args.max_new_tokens, args.data)
        room(model, [encode_prompt(example, tokenizer) for example in examples], args.max_new_tokens)
        print(said, file=sys.stderr, flush=True)
        if args.interactive:
            interact(model, tokenizer, args)
        elif args.score:
            score(model, exam, args)
        elif args.data:
            answer_file(model, tokenizer, examples, args)
        else:
            for example in examples:
                print(f"\n### {example['instruction']}")
                if example.get("input"):
                    print(f"# {example['input']}")
                show(model, tokenizer, example, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:                        # the way to leave --interactive, or a text that goes on
        sys.exit(130)
    except BrokenPipeError:                          # `| head` has read enough; Python must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
