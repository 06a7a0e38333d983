"""A session of generate.py --interactive: questions that are typed, and adapters that change."""
import sys
from contextlib import nullcontext

import torch.nn as nn

from llama.peft import adapter_at
from lora import load_adapter, lora_disabled, read_adapter, unmerge_lora
from lora.layers import lora_layers

from .answers import Answerer
from .errors import in_one_line
from .templates import TEMPLATES, template_name

COMMANDS = ("type an instruction, or :adapter PATH, or :adapter none, or :new for a new "
            "conversation")


class Session:
    """A conversation on a terminal, over one base and one adapter after another.

    turns: the messages so far, if the template supports several turns.
    given_template: the name that --template gives; None: each adapter's own.
    """

    def __init__(self, answerer: Answerer, given_template: str | None, has_adapter: bool):
        self.answerer = answerer
        self.given_template = given_template
        self.has_adapter = has_adapter
        self.turns = []

    def run(self):
        """Read lines from stdin until it ends, and obey or answer each.

        A line that fails is explained, and the session goes on.  Raises OSError if stdout cannot be
        written.
        """
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # Invalid UTF-8 does not end the session.
        while True:
            print("\n### ", end="", flush=True)
            line = sys.stdin.readline()
            if not line:
                print()
                return
            try:
                self.obey_or_answer(line.strip())
            except ValueError as error:
                hint = "; :new begins a new conversation" if self.turns else ""
                print(f"generate.py: {in_one_line(error)}{hint}", file=sys.stderr, flush=True)

    def obey_or_answer(self, line: str):
        """Do what a command asks, or answer a question; an empty line does nothing."""
        if line == ":new":
            self.turns = []
        elif line.startswith(":"):
            command, *rest = line.split(maxsplit=1)
            if command == ":adapter" and rest:
                try:
                    self.switch_adapter(rest[0])
                except OSError as error:             # of its file; elsewhere it is stdout's
                    raise ValueError(error) from error
            else:
                print(COMMANDS, file=sys.stderr, flush=True)
        elif line:
            with nullcontext() if self.has_adapter else lora_disabled(self.answerer.model):
                self.reply(line)

    def reply(self, question: str):
        """Print the answer to a question, which follows the turns before it."""
        if not self.answerer.template.holds_turns:
            self.answerer.show({"instruction": question})
            return
        messages = [*self.turns, {"role": "user", "content": question}]
        answer = self.answerer.show({"messages": messages})
        if answer.strip():                           # An empty answer is not kept.
            self.turns = [*messages, {"role": "assistant", "content": answer}]

    def switch_adapter(self, name: str):
        """Put another adapter over the base, or none.

        The adapter's template is used from then on, or the default one without an adapter, unless
        --template was given.
        Raises ValueError or OSError, and keeps the adapter before it, if this one cannot be loaded.
        """
        model = self.answerer.model
        source = None
        base_info = {}
        if name != "none":
            source = adapter_at(name, model.args)
            base_info = read_adapter(source)["base"] or {}
        template = TEMPLATES[template_name(self.given_template, base_info, name)]
        if is_merged(model):
            unmerge_lora(model)
        if source:
            load_adapter(model, source)
            if base_info:                            # PEFT does not record its base.
                warn_of_quantisation(base_info.get("quantize", "none"), model.origin["quantize"])
        if template is not self.answerer.template:
            print("the template is another one: a new conversation begins", file=sys.stderr)
            self.turns = []
        self.answerer.template = template
        print(f"adapter {name}", file=sys.stderr, flush=True)
        self.has_adapter = source is not None


def warn_of_quantisation(trained: str, loaded: str):
    """Warn if an adapter was trained over a base with another quantisation than the loaded one."""
    if trained != loaded:
        print(f"warning: trained over a base with quantisation {trained}, this base: {loaded}",
              file=sys.stderr)


def is_merged(model: nn.Module) -> bool:
    return any(layer.merged for layer in lora_layers(model).values())
