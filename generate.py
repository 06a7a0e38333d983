"""Let a LLaMA answer instructions, with an adapter or without.

    python generate.py                             the run in out/, on a few built-in instructions
    python generate.py --adapter none              the base alone, on the same instructions
    python generate.py --adapter out/7b/adapter.pt --instruction "Name three primary colours."
    python generate.py --interactive               type instructions; `:adapter PATH` switches,
                                                   `:new` begins a new conversation
    python generate.py --data questions.json > answers.jsonl
    python generate.py --data held_out.json --score        score base and adapter
"""
from finetune.console import run_command     # First: it ends a Ctrl-C while torch loads quietly.

import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext

import torch

from finetune.arguments import Parser, add_hardware_flags, number, text, utf8
from finetune.batches import split
from finetune.dataset import encode_prompt
from finetune.errors import in_one_line, one_line_errors, short_path
from finetune.evaluate import Exam, intervals
from finetune.examples import read_rows, to_examples
from finetune.hardware import DTYPES, pick_hardware
from finetune.options import DEMO
from finetune.preflight import plural
from finetune.templates import TEMPLATES, Template, template_name
from llama.checkpoint import PROBE, load_checkpoint
from llama.guesses import NgramPool
from llama.peft import adapter_at, is_peft, read_config
from llama.sampling import beam_search, generate, stream, tokens_left
from lora import load_adapter, lora_disabled, merge_report, read_adapter, unmerge_lora
from lora.prepack import prepack
from lora.quantize import KINDS as QUANTIZED
from lora.quantize import quantizer

DEFAULT_ADAPTER = "out/adapter.pt"
BATCH = 8                                            # prompts answered at a time, for --data
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
    with one_line_errors("generate.py"):
        args = parse_args(argv)
        device, precision = pick_hardware(args.device, args.precision)
        with default_adapter_explained(args):
            template = template_of(args)
        rows, examples = questions_of(args, template)
        with default_adapter_explained(args):
            model, tokenizer, summary = load(args, device, precision)
        # Fail before the first answer if a prompt is too long or an output is not in --choices.
        answerer = Answerer(model, tokenizer, args, template)
        exam = None
        if args.score:
            exam = Exam(examples, tokenizer, model.args.max_seq_len, args.choices,
                        args.max_new_tokens, args.data, template=template)
        elif args.data:
            new_fields = free_fields(rows, args.data)
            problems = length_problems(answerer, examples, args.data)
        else:
            tokens_left(model, [answerer.prompt(example) for example in examples],
                        args.max_new_tokens)
        print(summary, file=sys.stderr, flush=True)
        if args.interactive:
            interact(answerer, args)
        elif args.score:
            score(model, exam, args)
        elif args.data:
            answerer.answer_file(rows, examples, new_fields, problems)
        else:
            for example in examples:
                print(f"\n### {example['instruction']}")
                if example.get("input"):
                    print(f"# {example['input']}")
                answerer.show(example)


def template_of(args) -> Template:
    """Return the prompt format: --template, else the adapter's, else Alpaca's."""
    base_info = {}
    if args.adapter and not is_peft(args.adapter):
        base_info = read_adapter(adapter_at(args.adapter))["base"] or {}
    template = TEMPLATES[template_name(args.template, base_info, args.adapter)]
    if args.score and template.continues:
        raise ValueError("--score compares answers, and plain text has none: train.py measures the "
                         "loss of text with --val-data")
    return template


def questions_of(args, template) -> tuple[list, list]:
    """Return (rows as --data has them, examples to answer)."""
    if args.instruction:
        return [], [{"instruction": args.instruction, "input": args.input}]
    if args.data:
        required = ("instruction", "output") if args.score else ("instruction",)
        rows = read_rows(args.data, template)
        return rows, to_examples(rows, args.data, required, template)
    return [], INSTRUCTIONS


def free_fields(rows, path) -> tuple[str, str]:
    """Return the names of the two fields that are added to rows: for the answer, and for an error.

    They are "answer" and "error", or where a row has one of these, "model_answer" and
    "model_error".  Raises ValueError where a row has one of these too.
    """
    taken = set().union(*rows)
    for prefix in ("", "model_"):
        names = (f"{prefix}answer", f"{prefix}error")
        if not taken.intersection(names):
            return names
    raise ValueError(f"{path} has fields of its own named answer and model_answer, or error and "
                     "model_error; rename one of the two")


def length_problems(answerer, examples, path) -> dict[int, str]:
    """Return {i: problem} for each example whose prompt leaves no space for an answer.

    Each is printed, too.  Raises ValueError if that is every example.
    """
    limit = answerer.model.args.max_seq_len
    problems = {}
    for i, example in enumerate(examples):
        n_tokens = len(answerer.prompt(example))
        if n_tokens >= limit:
            problems[i] = f"the prompt has {n_tokens} tokens and the model takes {limit}"
    if len(problems) == len(examples):
        raise ValueError(f"{path}: no example can be answered; in the first, {problems[0]}")
    for i, problem in problems.items():
        print(f"{path}, example {i + 1}: {problem}; it is not answered", file=sys.stderr)
    return problems


@contextmanager
def default_adapter_explained(args):
    """If the default adapter fails within the block, say that it was the default."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not args.adapter_by_default:
            raise
        raise ValueError(f"{error}; {args.adapter} is the default because it is there, --adapter "
                         "none runs without it") from error


def load(args, device, precision):
    """Return (model, tokenizer, a line about them): base and adapter, merged if asked."""
    base_info = {}
    if args.adapter and is_peft(args.adapter):       # PEFT may not say which base it belongs to.
        _, base_name = read_config(args.adapter)
        base_info = {"folder": args.checkpoint or base_name}
        if not base_info["folder"]:
            raise ValueError(f"{args.adapter} does not say what its base is; name its folder with "
                             "--checkpoint")
    elif args.adapter:
        base_info = read_adapter(adapter_at(args.adapter))["base"]
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
    quantize = args.quantize or base_info.get("quantize", "none")
    model, tokenizer = load_checkpoint(folder, layers, DTYPES[precision], device,
                                       convert=quantizer(quantize))
    prepack(model.eval())                            # a faster layout on a CPU
    number_format = precision if quantize == "none" else f"{precision} and {quantize}"
    n_layers = plural(model.args.n_layers, "layer")
    summary = f"base {short_path(folder)}, {n_layers}, {number_format} on {device}"
    if args.adapter:
        load_adapter(model, adapter_at(args.adapter, model.args))
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


class Answerer:
    """A model, its tokenizer, how it decodes (args), and the guesses that its answers share.

    turns: the messages of a conversation so far, if the template can say several turns.
    """

    def __init__(self, model, tokenizer, args, template):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args
        self.template = template
        self.pool = NgramPool()
        self.turns = []

    def prompt(self, example) -> list[int]:
        return encode_prompt(example, self.tokenizer, self.template)

    def answer_ids(self, examples):
        """Iterate over (i, id): the next tokens of the answer to examples[i]."""
        args = self.args
        prompts = [self.prompt(example) for example in examples]
        if args.beams == 1:
            return generate(self.model, prompts, args.max_new_tokens, self.tokenizer.end_ids,
                            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                            no_repeat_ngram=args.no_repeat_ngram, seed=args.seed, pool=self.pool)
        return self.beam_ids(prompts)

    def beam_ids(self, prompts):
        for i, prompt in enumerate(prompts):
            answer = beam_search(self.model, prompt, self.args.max_new_tokens,
                                 self.tokenizer.end_ids, self.args.beams, self.args.no_repeat_ngram)
            for token in answer:
                yield i, token

    def show(self, example) -> str:
        """Print the answer to one example as it comes, and return it."""
        answer = ""
        with counted(self.model, self.answer_ids([example]), self.args.verbose) as ids:
            for piece in stream(self.tokenizer, (token for _, token in ids)):
                print(piece, end="", flush=True)
                answer += piece
            print(flush=True)
        return answer

    def reply(self, question):
        """Print the answer to a question, which follows the turns before it."""
        if not self.template.holds_turns:
            self.show({"instruction": question})
            return
        asked = [*self.turns, {"role": "user", "content": question}]
        answer = self.show({"messages": asked})
        if answer.strip():                           # An empty one is no turn to go on from.
            self.turns = [*asked, {"role": "assistant", "content": answer}]

    def answer_file(self, rows, examples, new_fields, problems):
        """Print each row as a JSON line with its answer on stdout, and progress on stderr.

        new_fields: the names of the answer and of the error.  problems: {i: error} of the examples
        that are not answered; their answer is null.
        """
        answer_field, error_field = new_fields
        n_answered = 0
        for indices in split(range(len(examples)), BATCH):
            answered = [i for i in indices if i not in problems]
            answers = {i: [] for i in answered}
            asked = [examples[i] for i in answered]
            if asked:
                with counted(self.model, self.answer_ids(asked), self.args.verbose) as ids:
                    for place, token in ids:
                        answers[answered[place]].append(token)
            for i in indices:
                if i in problems:
                    added = {answer_field: None, error_field: problems[i]}
                else:
                    added = {answer_field: self.tokenizer.decode(answers[i])}
                print(json.dumps(rows[i] | added, ensure_ascii=False), flush=True)
            n_answered += len(answered)
            print(f"{n_answered}/{len(examples)} answered", file=sys.stderr, flush=True)


@contextmanager
def counted(model, ids, verbose):
    """Yield `ids` to iterate over; at the end, if verbose, print tokens, forwards and speed."""
    n_tokens = 0
    n_forwards = 0

    def count_tokens():
        nonlocal n_tokens
        for pair in ids:
            n_tokens += 1
            yield pair

    def count_forward(*_):
        nonlocal n_forwards
        n_forwards += 1

    hook = model.register_forward_hook(count_forward)
    began = time.perf_counter()
    try:
        yield count_tokens()
    finally:
        hook.remove()
    if verbose:
        speed = n_tokens / (time.perf_counter() - began)
        print(f"{plural(n_tokens, 'token')} in {plural(n_forwards, 'forward pass')}, "
              f"{n_tokens / n_forwards:.2f} tokens per pass; {speed:.1f} tokens/s", file=sys.stderr,
              flush=True)


def score(model, exam, args):
    """Print one JSON line: facts about the examples, then [value, low, high] per measure.

    The measures are those of the base and, with an adapter, of it and of the difference.
    """
    tables = {}

    def measure(name):
        def report(n):
            print(f"{name}: {n}/{len(exam.rows)} answered", file=sys.stderr, flush=True)

        tables[name] = exam.score(model, report)

    if args.adapter:
        measure("adapter")
        if args.merge:
            unmerge_lora(model)
    with lora_disabled(model):
        measure("base")
    line = {"data": args.data, **exam.about(), "seed": args.seed, **intervals(tables, args.seed)}
    print(json.dumps(line, ensure_ascii=False))


def interact(answerer, args):
    """Read instructions from stdin until it ends.

    `:adapter PATH` loads another adapter, and `:new` begins a new conversation.
    """
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")      # Invalid UTF-8 does not end the session.
    model = answerer.model
    has_adapter = bool(args.adapter)
    while True:
        print("\n### ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return
        words = line.split(maxsplit=1)
        try:
            if line.strip() == ":new":
                answerer.turns = []
            elif line.strip().startswith(":"):
                if words[0] != ":adapter" or len(words) < 2:
                    print("type an instruction, or :adapter PATH, or :adapter none, or :new for a "
                          "new conversation", file=sys.stderr, flush=True)
                    continue
                has_adapter = switch_adapter(answerer, words[1].strip())
            elif words:
                with nullcontext() if has_adapter else lora_disabled(model):
                    answerer.reply(line.strip())
        except (ValueError, OSError) as error:
            hint = "; :new begins a new conversation" if answerer.turns else ""
            print(f"generate.py: {in_one_line(error)}{hint}", file=sys.stderr, flush=True)


def switch_adapter(answerer, name) -> bool:
    """Put another adapter over the base, or none; return whether there is one now.

    The adapter's template is used from then on, unless --template was given.
    Raises ValueError or OSError, with all as it was, for a file that is not an adapter.
    """
    model = answerer.model
    given_template = answerer.args.template
    source = None
    if name != "none":
        source = adapter_at(name, model.args)
        base_info = read_adapter(source)["base"] or {}
        template = TEMPLATES[template_name(given_template, base_info, name)]
    if is_merged(model):
        unmerge_lora(model)
    if source:
        load_adapter(model, source)
        if template is not answerer.template:
            print("the template is another one: a new conversation begins", file=sys.stderr)
            answerer.turns = []
        answerer.template = template
        trained_quantize = base_info.get("quantize", "none")
        quantize = model.origin["quantize"]
        if trained_quantize != quantize:
            print(f"warning: trained over a base with quantisation {trained_quantize}, this base: "
                  f"{quantize}", file=sys.stderr)
    print(f"adapter {name}", file=sys.stderr, flush=True)
    return source is not None


def is_merged(model) -> bool:
    return any(getattr(layer, "merged", False) for layer in model.modules())


def parse_args(argv=None):
    """Return the arguments, checked and settled.  Raises ValueError."""
    parser = make_parser()
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
    if args.choices and not args.score:
        parser.error("--choices needs --score")
    if args.choices:
        distinct = {choice for choice in args.choices if choice.strip()}
        if len(args.choices) < 2 or len(distinct) < len(args.choices):
            parser.error(f"--choices {','.join(args.choices)}: give two answers or more, each "
                         "once, with commas between them")
    if args.score and (args.temperature > 0 or args.beams > 1 or args.no_repeat_ngram):
        parser.error("--score decodes greedily: no --temperature, --beams or --no-repeat-ngram")


def make_parser():
    parser = Parser(prog="generate.py", description=__doc__)
    add_model_flags(parser.add_argument_group("model"))
    add_question_flags(parser.add_argument_group(
        "input (default: a few built-in instructions)"))
    add_decoding_flags(parser.add_argument_group("decoding"))
    add_hardware_flags(parser.add_argument_group("hardware"))
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


if __name__ == "__main__":
    run_command(main, "generate.py")
