"""LLaMA 2's own chat format (Touvron et al. 2023; `chat_completion` in Meta's llama/generation.py).

    <s>[INST] <<SYS>>\\nSYSTEM\\n<</SYS>>\\n\\nQUESTION [/INST] ANSWER </s><s>[INST] ...

<s> and </s> are the ids bos and eos.  [INST] and <<SYS>> are plain text; what stands in a question
is text as well, "</s>" included.
"""
from .conversation import conversation_of
from .template import Piece, Template


def pieces(example: dict) -> list[Piece]:
    """Return question and answer of each turn.  Raises ValueError for an invalid conversation."""
    conversation = conversation_of(example)
    result = []
    for i, turn in enumerate(conversation.turns):
        question = turn.question
        if i == 0 and conversation.system is not None:
            question = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n{question}"
        result.append(Piece(f"[INST] {question.strip()} [/INST]", bos=True))
        if turn.answer is not None:
            # The space after the answer is Meta's.  The one before it is sentencepiece's: it puts
            # a space before every text.
            result.append(Piece(f"{turn.answer.strip()} ", is_target=True, eos=True))
    return result


# The same in Jinja.  There an answer needs its first space, because all is one text.
CHAT_TEMPLATE = """\
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'assistant' -%}
{{ ' ' + message.content.strip() + ' ' + eos_token }}
{%- else -%}
{%- set system = '' -%}
{%- if loop.first and messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- endif -%}
{{ bos_token + '[INST] ' + (system + message.content).strip() + ' [/INST]' }}
{%- endif -%}
{%- endfor -%}
"""

TEMPLATE = Template(pieces, holds_turns=True, chat_template=CHAT_TEMPLATE, fields=(
    "instruction", "input", "output", "history", "system", "messages", "conversations"))
