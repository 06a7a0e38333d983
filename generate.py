"""Let a LLaMA answer instructions, with an adapter or without.

    python generate.py                             the adapter in out/, else the demo's base, on a
                                                   few built-in instructions
    python generate.py --adapter none              the base alone, on the same instructions
    python generate.py --adapter out/7b/adapter.pt --instruction "Name three primary colours."
    python generate.py --interactive               type instructions; `:adapter PATH` switches,
                                                   `:new` begins a new conversation
    python generate.py --data questions.json > answers.jsonl
    python generate.py --data held_out.json --score        score base and adapter
"""
# First, because it ends a Ctrl-C while torch loads quietly.
from finetune.console import OUTPUT_CLOSED, run_command, write_error

import json
import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import NamedTuple

import torch

from finetune.answer_options import parse_args
from finetune.answers import Answerer, Decoding, QuestionFile
from finetune.errors import (
    BAD_INPUT,
    in_one_line,
    one_line_errors,
    short_path,
)
from finetune.exam import Exam
from finetune.examples import read_rows, to_examples
from finetune.forgetting import OtherText
from finetune.hardware import DTYPES, limit_threads, pick_hardware
from finetune.measures import intervals
from finetune.options import DEMO
from finetune.preflight import plural
from finetune.ranks import Ranks, connected_ranks, exit_now
from finetune.session import Session
from finetune.shard import UNSHARDED, Sharding
from finetune.templates import TEMPLATES, Template, template_name
from llama.checkpoint import PROBE, load_checkpoint, read_params
from llama.peft import adapter_at, is_peft, read_config
from llama.sampling import tokens_left
from lora import load_adapter, lora_disabled, merge_report, read_adapter, unmerge_lora
from lora.loftq import quantizer
from lora.prepack import prepack

INSTRUCTIONS = [                                     # The demo's adapter was not trained on these.
    {"instruction": "What is the opposite of slow?"},
    {"instruction": "Name the colour of grass."},
    {"instruction": "Which group does an apple belong to?"},
    {"instruction": "Give the past of the verb think."},
    {"instruction": "Name the place.", "input": "Leo found a green book in the kitchen."},
    {"instruction": "How does Lily feel?", "input": "Lily played in the sun."},
]


def main(argv=None):
    """Answer what the flags ask for."""
    if hasattr(sys.stdout, "reconfigure"):
        # Whatever the terminal's own encoding is, because answers.jsonl must be in UTF-8.  Half of
        # an emoji becomes \ud83d, as in JSON.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    with (connected_ranks("generate.py") as ranks, one_line_errors("generate.py", ranks),
          silence(ranks)):
        args = parse_args(argv, __doc__)
        device, precision = pick_hardware(args.device, args.precision, ranks.local_rank)
        with default_adapter_explained(args):
            saved = read_saved(args)
        template = template_of(args, saved)
        rows, examples = questions_of(args, template)
        ranks.agree(vars(args), "their flags")
        sharding = sharding_of(args, saved, ranks)
        model, tokenizer, summary = load(args, saved, device, precision, sharding)
        answerer = Answerer(model, tokenizer, template, decoding_of(args), args.verbose)
        # Fail before the first answer if a prompt is too long or an output is not in --choices.
        if args.score:
            exam = Exam(examples, tokenizer, model.args.max_seq_len, args.choices,
                        args.max_new_tokens, args.data, template=template)
            other = None
            if args.also:
                other = OtherText(args.also, tokenizer, model.args.max_seq_len)
        elif args.data:
            questions = QuestionFile(args.data, rows, examples, answerer)
        elif not args.interactive:
            tokens_left(model, [answerer.prompt(example) for example in examples],
                        args.max_new_tokens)
        ranks.exchange()                     # If a rank has failed so far, all ranks stop here.
        print(summary, file=sys.stderr, flush=True)
        with failure_ends_all(ranks):
            if args.score:
                score(model, exam, other, args)
            elif args.data:
                questions.print_answers()
            elif args.interactive:
                Session(answerer, args.template, has_adapter=bool(args.adapter)).run()
            else:
                show_answers(answerer, examples)


@contextmanager
def silence(ranks: Ranks):
    """Within the block, let only rank 0 print on standard error."""
    with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
        with nullcontext() if ranks.is_first else redirect_stderr(nowhere):
            yield


@contextmanager
def failure_ends_all(ranks: Ranks):
    """Exit at once if one rank cannot print: the others wait for its forward."""
    try:
        yield
    except OSError as error:
        if ranks.size == 1:
            raise
        if isinstance(error, BrokenPipeError):
            exit_now(OUTPUT_CLOSED)
        write_error(f"generate.py: {in_one_line(error)}\n")      # On other ranks stderr is silent.
        exit_now(BAD_INPUT)


class Saved(NamedTuple):
    """What is known of the adapter before its base is loaded.

    content: the adapter file's dict; None for a PEFT folder, which needs the base's number of heads
    to be read.  base_info: what it says of its base, as model.origin has it; empty without an
    adapter.
    """
    content: dict | None
    base_info: dict


def read_saved(args) -> Saved:
    """Return the adapter that args name.  Raises ValueError or FileNotFoundError."""
    if not args.adapter:
        return Saved(None, {})
    if is_peft(args.adapter):                        # PEFT may not say which base it belongs to.
        _, base_name = read_config(args.adapter)
        if not args.checkpoint and not base_name:
            raise ValueError(f"{args.adapter} does not say what its base is; name its folder with "
                             "--checkpoint")
        return Saved(None, {"folder": base_name})
    content = adapter_at(args.adapter)
    return Saved(content, read_adapter(content)["base"])


@contextmanager
def default_adapter_explained(args):
    """If the default adapter fails within the block, say that it was the default."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not args.adapter_by_default:
            raise
        raise ValueError(f"{error}; {args.adapter} was chosen because it exists; --adapter "
                         "none runs without it") from error


def template_of(args, saved: Saved) -> Template:
    """Return the prompt format: --template, else the adapter's, else Alpaca's."""
    with default_adapter_explained(args):
        template = TEMPLATES[template_name(args.template, saved.base_info, args.adapter)]
    if args.score and template.continues:
        raise ValueError("--score compares answers, and plain text has none: train.py measures the "
                         "loss of text with --val-data")
    return template


def questions_of(args, template: Template) -> tuple[list, list]:
    """Return (rows as --data has them, examples to answer)."""
    if args.instruction:
        return [], [{"instruction": args.instruction, "input": args.input}]
    if args.data:
        required = ("instruction", "output") if args.score else ("instruction",)
        rows = read_rows(args.data, template)
        return rows, to_examples(rows, args.data, required, template)
    return [], INSTRUCTIONS


def load(args, saved: Saved, device: torch.device, precision: str,
         sharding: Sharding = UNSHARDED):
    """Return (model, tokenizer, a line about them): base and adapter, merged if asked."""
    with default_adapter_explained(args):
        folder, layers = base_of(args, saved.base_info)
    quantize = args.quantize or saved.base_info.get("quantize", "none")
    sharding = sharding.connected(device)
    model, tokenizer = load_checkpoint(folder, layers, DTYPES[precision], device,
                                       convert=quantizer(quantize, saved.content),
                                       sharding=sharding)
    limit_threads(model)
    model.eval()
    if args.shard:
        sharding.keep_in_step(model)
    else:
        prepack(model)                               # a faster layout on a CPU
    number_format = precision if quantize == "none" else f"{precision} and {quantize}"
    n_layers = plural(model.args.n_layers, "layer")
    summary = f"base {short_path(folder)}, {n_layers}, {number_format} on {device}"
    if args.adapter:
        with default_adapter_explained(args):
            load_adapter(model, saved.content or adapter_at(args.adapter, model.args))
        config = model.lora_config
        summary += (f"; adapter {args.adapter}, {config.method} r {config.r} on "
                    f"{','.join(config.targets)}")
        if is_peft(args.adapter):
            summary += ", whose base PEFT does not record"
    if tokenizer.eos_note:
        summary += f"\neos: {tokenizer.eos_note}"
    if args.merge:
        probe = torch.tensor([tokenizer.encode(PROBE, bos=True)], device=device)
        summary += "\n" + merge_report(model, probe, "--precision fp32")
        prepack(model)                               # the merged layers too
    return model, tokenizer, summary


def sharding_of(args, saved: Saved, ranks: Ranks) -> Sharding:
    """Return how the ranks share the base.  Raises ValueError for ranks that share nothing."""
    if args.shard:
        with default_adapter_explained(args):
            folder, _ = base_of(args, saved.base_info)
            model_args, _ = read_params(folder)
        return Sharding.planned(ranks.size, ranks, model_args)
    if ranks.size > 1:
        raise ValueError(f"{ranks.size} processes would give the same answers: --shard cuts the "
                         "base over them; without it, start generate.py without torchrun")
    return UNSHARDED


def base_of(args, base_info: dict) -> tuple[str, int | None]:
    """Return (folder, number of blocks; None: all) of the base that the flags or the adapter name.

    Raises ValueError or FileNotFoundError for one that cannot be loaded.
    """
    folder = args.checkpoint or base_info.get("folder", str(DEMO))
    layers = args.layers or base_info.get("layers")
    if not isinstance(folder, str) or not isinstance(layers, int | None):
        raise ValueError(f"{args.adapter} is not an adapter file: it names its base by {folder!r} "
                         f"and {layers!r}")
    if base_info.get("init") == "random":
        raise ValueError(f"{args.adapter} was trained over random weights (--init random), which "
                         "were not kept")
    if not args.checkpoint and base_info and not os.path.isdir(folder):
        raise FileNotFoundError(f"no checkpoint folder at {folder}, which {args.adapter} names as "
                                "its base; if it has moved, name its folder with --checkpoint")
    return folder, layers


def show_answers(answerer: Answerer, examples: list):
    """Print each example and its answer, as it comes."""
    for example in examples:
        print(f"\n### {example['instruction']}")
        if example.get("input"):
            print(f"# {example['input']}")
        answerer.show(example)


def score(model, exam: Exam, other: OtherText | None, args):
    """Print one JSON line: facts about the examples, then [value, low, high] per measure.

    The measures are of the base; with an adapter also of the adapter, and of their difference.
    other: the text of --also, whose results stand in the field "also".
    """
    tables = {}

    def measure(name):
        def report(n):
            print(f"{name}: {n}/{len(exam.rows)} answered", file=sys.stderr, flush=True)

        tables[name] = exam.score(model, report)
        if other:
            other.measure(model, name)

    if args.adapter:
        measure("adapter")
        if args.merge:
            unmerge_lora(model)
    with lora_disabled(model):
        measure("base")
    line = {"data": args.data, **exam.about(), "seed": args.seed, **intervals(tables, args.seed)}
    if other:
        line["also"] = other.results(args.seed)
    print(json.dumps(line, ensure_ascii=False))


def decoding_of(args) -> Decoding:
    """Return what the flags say about decoding."""
    return Decoding(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.beams,
                    args.no_repeat_ngram, args.seed)


if __name__ == "__main__":
    run_command(main, "generate.py")
