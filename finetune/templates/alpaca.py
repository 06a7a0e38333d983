"""Stanford Alpaca's format (Taori et al. 2023): one instruction, one answer."""
from .conversation import conversation_of, has_messages
from .template import Piece, Template

# Stanford's two prompts, to the letter.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:")


def format_prompt(example: dict) -> str:
    """Return the text before the answer."""
    template = PROMPT_WITH_INPUT if example.get("input") else PROMPT_WITHOUT_INPUT
    return template.format_map(example)


def pieces(example: dict) -> list[Piece]:
    """Return prompt and answer.  Raises ValueError for several turns or a system prompt."""
    if has_messages(example):
        example = single_turn(example)
    prompt = Piece(format_prompt(example), bos=True)
    answer = example.get("output")
    if answer is None:
        return [prompt]
    return [prompt, Piece(answer, is_target=True, eos=True)]


def single_turn(example: dict) -> dict:
    """Return an example of messages as one of instruction and output."""
    conversation = conversation_of(example)
    if conversation.system is not None:
        raise ValueError("has a system prompt, which the template alpaca has no place for: use "
                         "--template llama2")
    if len(conversation.turns) > 1:
        raise ValueError(f"has {len(conversation.turns)} turns, and the template alpaca has one: "
                         "use --template llama2")
    turn = conversation.turns[0]
    return {"instruction": turn.question, "output": turn.answer}


TEMPLATE = Template(pieces, fields=("instruction", "input", "output", "messages", "conversations"))
