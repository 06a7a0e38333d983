"""Read a file of examples in whatever form it has, and refuse what would be read wrongly.

An example is a dict with "instruction", "input" (may be absent or empty) and "output", all text;
or with "messages" (templates/conversation.py), or with "text".
"""
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from .templates import DEFAULT, TEMPLATES, Piece, Template
from .templates.conversation import has_messages

FIELDS = ("instruction", "input", "output")
TEXT_FIELDS = (*FIELDS, "text", "system")
# A further field that holds text is part of the prompt if the last word of its name is one of
# these, as singular or plural and in any capitals.
CONTEXT_WORDS = {
    "history", "system", "conversation", "dialog", "dialogue", "chat", "message", "turn", "prompt",
    "persona", "context", "document", "doc", "passage", "paragraph", "article", "background",
    "knowledge", "evidence", "content", "demonstration", "input", "question", "query", "option",
    "choice", "tool", "function", "image", "audio", "video", "chosen", "rejected"}
# How files begin that are not text in UTF-8 -> what they are.
OTHER_FILES = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a zip or Excel file; unpack it, or export its rows as JSON",
    b"PAR1": "a Parquet table; export its rows as JSON",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"version https://git-lfs": "a git-lfs pointer, not the file; run git lfs pull"}
FORMS = "give a list [{...}, {...}], or one object {...} per line"


class Number(float):
    """A number of a file that remembers how it is written there: 1.50 is not 1.5."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number


def read_examples(path: str | Path, required: Sequence[str] = ("instruction", "output"),
                  template: Template = DEFAULT) -> list[dict]:
    """Return the examples of a file.

    required: the fields that an example must have, where it has no messages.
    Raises FileNotFoundError, or ValueError that names the wrong line or example, counted from 1.
    """
    return to_examples(read_rows(path, template), path, required, template)


def read_rows(path: str | Path, template: Template = DEFAULT) -> list:
    """Return the rows of a file as they stand in it, unchecked; NaN, a blank cell, is None.

    The file is a JSON list, one object per line, one object, or an object around one list.  Its
    name does not matter.  But for a template of whole texts, a .txt file is one row, its text.
    Raises FileNotFoundError, or ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}")
    text = read_text(path)
    if template.continues and path.suffix.lower() == ".txt":
        return [{"text": text}]
    beginning = text.lstrip()
    if beginning and beginning[0] not in "[{":
        hint = "; for plain text: --template text" if path.suffix.lower() == ".txt" else ""
        raise ValueError(f"{path} begins with {beginning[:20]!r}, which is not JSON: {FORMS}{hint}")
    first_line, _, more = beginning.partition("\n")
    if not beginning:
        rows = []
    elif beginning[0] == "{" and more.strip() and is_json(first_line):
        rows = parse_lines(text, path)
    else:
        value = parse_json(text, path)
        rows = value if isinstance(value, list) else rows_of_object(value, path)
    if not rows:
        raise ValueError(f"{path} holds no example")
    return rows


def read_text(path: Path) -> str:
    """Return a file's text.  Raises ValueError for a file that is not UTF-8 text."""
    with open(path, "rb") as file:
        first_bytes = file.read(32)
    for beginning, kind in OTHER_FILES.items():
        if first_bytes.startswith(beginning):
            raise ValueError(f"{path} is {kind}")
    if b"\0" in first_bytes:
        place = first_bytes.index(0)
        raise ValueError(f"{path} is not UTF-8 text: byte {place} is 0, as in UTF-16; save it as "
                         "UTF-8")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from error


def parse_lines(text: str, path: Path) -> list:
    """Return the values of JSON lines; empty lines are skipped.  Raises ValueError."""
    values = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append(load(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {n}: not JSON ({json_problem(error)})") from error
    return values


def parse_json(text: str, path: Path) -> object:
    """Return the value of a JSON text.  Raises ValueError that names line and column."""
    try:
        return load(text)
    except (ValueError, RecursionError) as error:
        place = ""
        if isinstance(error, json.JSONDecodeError):
            place = f", line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}{place}: not JSON ({json_problem(error)})") from error


def is_json(text: str) -> bool:
    """Return whether a text is one JSON value, with or without a field that stands twice."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def load(text: str) -> object:
    """Return the value of a JSON text, with None for NaN.  Raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=number_or_none, parse_float=Number,
                      object_pairs_hook=to_object)


def number_or_none(constant: str) -> float | None:
    """Return infinity for "Infinity", and None for "NaN", which pandas writes for a blank cell."""
    return None if constant == "NaN" else float(constant)


def to_object(pairs: list[tuple]) -> dict:
    """Return an object's fields.  Raises ValueError for one that stands twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in {json.dumps(fields)[:60]}")
    return fields


def json_problem(error: Exception) -> str:
    """Return what json found wrong."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # For a number with thousands of digits json raises a ValueError that is not its own.
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return "there is more after the end of a value" if message == "Extra data" else message


def rows_of_object(value: dict, path: Path) -> list:
    """Return the rows of a file that holds one object: itself, or the one list in it."""
    is_table = any(isinstance(value.get(field), list | dict) for field in ("instruction", "output"))
    if is_table:
        raise ValueError(f"{path} holds columns, not rows: {FORMS}; pandas writes them with "
                         "orient='records'")
    names = [name for name, item in value.items() if isinstance(item, list | dict) and item]
    if any(field in value for field in (*FIELDS, "text")) or any(map(is_context, names)):
        return [value]
    if len(names) != 1 or not isinstance(value[names[0]], list):
        raise ValueError(f"{path} holds one object with the fields {quoted(value)}: {FORMS}")
    texts_beside = [name for name in value if is_context(name) and holds_text(value[name])]
    if texts_beside:
        raise ValueError(f"{path}: its examples are in {names[0]!r}, and none of them has the text "
                         f"in {quoted(texts_beside)} beside it; move it into each example")
    return value[names[0]]


def to_examples(rows: Sequence, path: str | Path, required: Sequence[str],
                template: Template = DEFAULT) -> list[dict]:
    """Return the examples of a file's rows.  Raises ValueError that names the wrong one."""
    examples = [to_example(row, f"{path}, example {n}", required, template)
                for n, row in enumerate(rows, 1)]
    if "output" in required and not any(map(has_answer_text, map(template.pieces, examples))):
        raise ValueError(f"{path}: every 'output' is empty, so there is no answer to learn or to "
                         "score; is it the right file?")
    return examples


def has_answer_text(pieces: Sequence[Piece]) -> bool:
    """Return whether any target has text other than white space."""
    return any(piece.is_target and piece.text.strip() for piece in pieces)


def to_example(row: object, place: str, required: Sequence[str], template: Template) -> dict:
    """Return a row as an example, checked by the template.

    place: the beginning of the message.  Raises ValueError.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {kind(row)}, not an object")
    example = dict(row)
    if "instruction" in template.fields and not has_messages(row):
        example = to_instruction(row, place, required)
    check_context(example, place, template.fields)
    try:
        pieces = template.pieces(example)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    for piece in pieces:
        check_characters(piece.text, place)
    if "output" in required and not pieces[-1].is_target:
        raise ValueError(f"{place} has no answer at its end")
    if "output" not in required and all(piece.is_target for piece in pieces):
        raise ValueError(f"{place} has no question to answer")
    return example


def to_instruction(row: dict, place: str, required: Sequence[str]) -> dict:
    """Return a row with its fields as text.

    place: the beginning of the message.  Fields that are not required may be absent or null.  Where
    the instruction is empty, the input is the instruction.
    Raises ValueError.
    """
    example = dict(row)
    for field in TEXT_FIELDS:
        value = row.get(field)
        if value is not None:
            example[field] = to_text(value, f"{place}: {field!r}")
        elif field in row and field in required:
            raise ValueError(f"{place}: {field!r} is null or NaN, as a blank cell is; write its "
                             "text, or remove the example")
        elif field in required:
            raise ValueError(f"{place} has no {field!r}; its fields are {quoted(row)}")
    if not example["instruction"].strip():
        if not (example.get("input") or "").strip():
            raise ValueError(f"{place}: 'instruction' is empty, and so is 'input'")
        example["instruction"] = example["input"]
        example["input"] = ""
    return example


def to_text(value: object, what: str) -> str:
    """Return a text, or a number as the file has it.  Raises ValueError for all else."""
    if isinstance(value, bool):
        raise ValueError(f"{what} is {kind(value)}, not text: is it True, true or yes? Write the "
                         "text in quotes")
    if isinstance(value, Number) and math.isfinite(value):
        return value.text
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {kind(value)}, not text")
    check_characters(value, what)
    return value


def check_characters(value: str, what: str):
    """Raise ValueError for a text with half of a character."""
    broken = re.search("[\ud800-\udfff]", value)
    if broken:
        raise ValueError(f"{what} has an incomplete character, such as half of an emoji: "
                         f"{ascii(broken[0])}")


def kind(value: object) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    return {list: "a list", dict: "an object", str: "a text"}[type(value)]


def check_context(row: dict, place: str, fields: Sequence[str]) -> None:
    """Raise ValueError for further fields whose text the prompt would lack.

    fields: those that the template reads.
    """
    names = [name for name in row if name not in fields and is_context(name)]
    names = [name for name in names if holds_text(row[name])]
    if not names:
        return
    others = [other for other, template in TEMPLATES.items() if set(names) <= set(template.fields)]
    remedy = "move it into 'instruction' or 'input', or remove the field"
    if others:
        remedy = f"use --template {others[0]}, or remove the field"
    raise ValueError(f"{place}: the template has no place for the text in {quoted(names)}; "
                     f"{remedy}")


def is_context(name: str) -> bool:
    """Return whether the last word of a field's name is one of CONTEXT_WORDS."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    last = words[-1].lower() if words else ""
    return last in CONTEXT_WORDS or last.removesuffix("s") in CONTEXT_WORDS


def holds_text(value: object) -> bool:
    """Return whether a value is text, or holds some, other than white space."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str) and item.strip():
            return True
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list):
            todo += item
    return False


def quoted(names: Sequence[str], limit: int = 6) -> str:
    """Return the first names in quotes, as one text."""
    text = ", ".join(repr(name) for name in list(names)[:limit])
    return f"{text} and others" if len(names) > limit else text or "none"
