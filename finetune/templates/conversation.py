"""The forms in which data files hold questions and answers, read into one.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}],
     "system": "..."}
    {"instruction": "...", "input": "...", "output": "...", "system": "...",
     "history": [["question", "answer"], ...]}

The first is the usual form of chat data, the second ShareGPT's, the third Alpaca's with
LLaMA-Factory's two fields.  Messages of either list may have the other list's names.  A first
message may be the system prompt, or the field `system` beside the list.
"""
from typing import NamedTuple

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}
# Name of the list: names of role and text in each of its messages.
MESSAGE_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ALPACA_FIELDS = ("instruction", "input", "output", "history")


class Turn(NamedTuple):
    """A question and its answer; None for the answer that is to be generated."""
    question: str
    answer: str | None


class Conversation(NamedTuple):
    """A system prompt, None without one, and one turn or several."""
    system: str | None
    turns: list[Turn]


def has_messages(example: dict) -> bool:
    """Return whether the example is a list of messages, not an instruction.

    In a table that has both columns, the list of an instruction is empty.
    """
    lists = [example[name] for name in MESSAGE_FIELDS if example.get(name) is not None]
    if not any(lists) and example.get("instruction"):
        return False
    return bool(lists)


def conversation_of(example: dict) -> Conversation:
    """Return the conversation of an example in any of the forms above.

    Raises ValueError for forms that are mixed, and for messages in a wrong order.
    """
    if not has_messages(example):
        return from_instruction(example)
    present = [name for name in (*MESSAGE_FIELDS, *ALPACA_FIELDS) if example.get(name)]
    if len(present) > 1:
        raise ValueError(f"has both {present[0]!r} and {present[1]!r}; give one form")
    messages = read_messages(example)
    system = system_prompt(example)
    if messages[0][0] == "system":
        if system is not None:
            raise ValueError("has a system prompt in 'system' and one in its first message; "
                             "give one")
        system = messages[0][1]
        messages = messages[1:]
    return Conversation(system, turns_of(messages))


def from_instruction(example: dict) -> Conversation:
    """Return the conversation of an Alpaca example; its input follows on a line of its own."""
    question = example["instruction"]
    if example.get("input"):
        question += "\n" + example["input"]
    turns = []
    history = example.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"'history' is {shown(history)}, not a list of [question, answer]")
    for n, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_filled, pair)):
            raise ValueError(f"'history', turn {n}, is {shown(pair)}, not [question, answer]")
        turns.append(Turn(*pair))
    return Conversation(system_prompt(example), [*turns, Turn(question, example.get("output"))])


def system_prompt(example: dict) -> str | None:
    """Return the example's own field `system`; None if it has no text.  Raises ValueError."""
    system = example.get("system") or None
    if system is not None and not isinstance(system, str):
        raise ValueError(f"'system' is {shown(system)}, not text")
    return system


def read_messages(example: dict) -> list[tuple[str, str]]:
    """Return [(role, text)] of the example's messages.  Errors number them from 1."""
    names = [name for name in MESSAGE_FIELDS if example.get(name) is not None]
    name = next((name for name in names if example[name]), names[0])
    if not isinstance(example[name], list) or not example[name]:
        raise ValueError(f"{name!r} is {shown(example[name])}, not a list of messages")
    role_field, text_field = field_names(name, example[name])
    messages = []
    for n, message in enumerate(example[name], 1):
        place = f"{name!r}, message {n}"
        if not isinstance(message, dict):
            raise ValueError(f"{place} is {shown(message)}, not an object")
        if role_field not in message:
            raise ValueError(f"{place}, has the keys {shown(list(message))}; give each message "
                             f"{role_field!r} and {text_field!r}")
        for field, value in message.items():
            if field not in (role_field, text_field, "id") and value not in (None, "", [], {}):
                raise ValueError(f"{place}: the template has no place for {field!r}")
        role = message.get(role_field)
        text = message.get(text_field)
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{place}: unknown {role_field} {shown(role)}, must be one of "
                             f"{', '.join(ROLES)}")
        role = ROLES[role]
        if not isinstance(text, str):
            raise ValueError(f"{place}: {text_field!r} is {shown(text)}, not text")
        if not text.strip() and role != "system":
            raise ValueError(f"{place}: {text_field!r} is empty")
        messages.append((role, text))
    return messages


def field_names(name: str, messages: list) -> tuple[str, str]:
    """Return the names of role and text in the messages of the list `name`.

    They are that list's own, unless all messages have those of the other list and none of its own.
    """
    own = MESSAGE_FIELDS[name]
    keys = [set(message) for message in messages if isinstance(message, dict)]
    for names in MESSAGE_FIELDS.values():
        has_all = all(keys_of_one.issuperset(names) for keys_of_one in keys)
        if has_all and all(keys_of_one.isdisjoint(own) for keys_of_one in keys):
            return names
    return own


def turns_of(messages: list[tuple[str, str]]) -> list[Turn]:
    """Return the turns of messages after the system prompt.

    They go user, assistant, user, assistant.  The last may lack its answer.
    """
    for n, (role, _) in enumerate(messages):
        expected = "assistant" if n % 2 else "user"
        if role != expected:
            raise ValueError(f"a message of {role} stands where one of {expected} is expected: "
                             "after a first system prompt, user and assistant must alternate")
    if not messages:
        raise ValueError("has a system prompt alone")
    turns = []
    for i in range(0, len(messages), 2):
        answer = messages[i + 1][1] if i + 1 < len(messages) else None
        turns.append(Turn(messages[i][1], answer))
    return turns


def last_answer_text(example: dict) -> str:
    """Return the text of the last answer, as the example has it."""
    if not has_messages(example):
        return example["output"]
    return conversation_of(example).turns[-1].answer


def is_filled(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def shown(value: object) -> str:
    """Return a value as a message shows it, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
