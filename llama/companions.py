"""What a Hugging Face folder holds besides weights and sizes, and how it comes along.

Added tokens, special tokens, the chat template, the settings for generation, the ids and the
context length are read with the model and written with it.  Meta's layout has no place for them:
there they are kept in one more file, huggingface.json.  fields.py lists the fields.
"""
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .fields import (
    CONFIG,
    DEFAULTS,
    FIELDS,
    GENERATION_CONFIG,
    LOST,
    TOKENIZER_CONFIG,
    fate,
)
from .files import JSON_BYTES, POINTER, listed, read_object, write_json, write_text
from .tokenizer import Tokenizer

COMPANIONS = "huggingface.json"    # in Meta's layout: {file name: text}
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json",
                   "added_tokens.json")
PATTERNS = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, "chat_template.*",
            "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
TOTAL_BYTES = 4 * JSON_BYTES       # No tokenizer has more in all its files.
CONTEXT_KEY = "max_position_embeddings"


@dataclass
class Companions:
    """The texts of these files, {file name: text}, and the path that messages name."""
    source: Path
    texts: dict[str, str]

    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields of one of the JSON files, or none if it is not there.

        Raises ValueError for a file that is not a JSON object.
        """
        self.check_text(name)
        try:
            content = json.loads(self.texts.get(name, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.source}: {name} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.source}: {name} holds a {type(content).__name__}, not an "
                             "object")
        return content

    def copied_fields(self, name: str) -> dict[str, Any]:
        """Return the fields of one of the JSON files without those that are lost."""
        fields = self.fields(name)
        return {field: fields[field] for field in fields if fate(name, field) != LOST}

    def lost_fields(self) -> list[str]:
        """Return "FIELD of FILE" for each field that is not copied."""
        names = []
        for file in FIELDS:
            lost_names = self.fields(file).keys() - self.copied_fields(file).keys()
            names += [f"{field} of {file}" for field in sorted(lost_names)]
        return names

    def context(self) -> int:
        """Return the context length in tokens that config.json states.  Raises ValueError."""
        length = self.fields(CONFIG).get(CONTEXT_KEY, DEFAULTS[CONTEXT_KEY])
        if isinstance(length, bool) or not isinstance(length, int):
            raise ValueError(f"{self.source}: {CONTEXT_KEY} is {length!r}, not a number of tokens")
        return length

    def check_text(self, name: str):
        """Raise ValueError for a text that only stands for the file."""
        if self.texts.get(name, "").startswith(POINTER):
            raise ValueError(f"{self.source / name} is a git-lfs pointer, not the file: git lfs "
                             "pull")

    def check(self):
        """Raise ValueError for a text that must not be copied, because it is not the file."""
        for name in self.texts:
            self.check_text(name)
        self.lost_fields()                           # It reads all the JSON.

    def write(self, folder: Path):
        """Write the files into a Hugging Face folder; config.json is the caller's."""
        for name, text in self.texts.items():
            if name == CONFIG:
                continue
            (folder / name).parent.mkdir(exist_ok=True)
            if name in FIELDS and self.copied_fields(name) != self.fields(name):
                write_json(folder / name, self.copied_fields(name))
            else:
                write_text(folder / name, text)

    def write_beside_meta(self, folder: Path):
        """Write the one file that keeps them in Meta's layout."""
        write_json(folder / COMPANIONS, self.texts)


def is_companion(name: str) -> bool:
    """Return whether a file of this name comes along.  It is a plain name within the folder."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        return False
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
               for pattern in PATTERNS)


def from_huggingface(folder: Path) -> Companions:
    """Return the companions in a Hugging Face folder.  Raises ValueError."""
    paths = []
    for pattern in PATTERNS:
        paths += filter(Path.is_file, folder.glob(pattern))
    if sum(path.stat().st_size for path in paths) > TOTAL_BYTES:
        raise ValueError(f"{folder}: the files beside the weights have more than {TOTAL_BYTES:,} "
                         f"bytes: {listed(path.name for path in paths)}")
    texts = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue                                 # left_behind names it.
        if is_companion(name):
            texts[name] = text
    return Companions(folder, texts)


def beside_meta(folder: Path) -> Companions | None:
    """Return what is kept beside a checkpoint in Meta's layout, or None.  Raises ValueError."""
    path = folder / COMPANIONS
    if not path.exists():
        return None
    texts = read_object(path, 2 * TOTAL_BYTES)
    for name, text in texts.items():
        is_text = isinstance(text, str) and not re.search("[\ud800-\udfff]", text)
        if not is_companion(name) or not is_text:
            raise ValueError(f"{path} holds {name!r}, which is no text file of a tokenizer or a "
                             "config")
    return Companions(path, texts)


def left_behind(folder: Path, companions: Companions) -> list[str]:
    """Return the names of the files of a Hugging Face folder that no conversion copies."""
    weights = r"tokenizer\.model|\..*|.*\.(safetensors|bin|pth|pt|index\.json)"
    return [path.name for path in folder.iterdir() if path.is_file()
            and path.name not in companions.texts and not re.fullmatch(weights, path.name)]


def add_companions(tokenizer: Tokenizer, companions: Companions, vocab_size: int):
    """Attach companions to a tokenizer, and set where answers end as they say.

    Raises ValueError for ids that are no whole numbers.
    """
    tokenizer.companions = companions
    piece = tokenizer.sp.id_to_piece(tokenizer.eos_id)
    # repr shows control characters, which would act on a terminal.
    tokenizer_eos = f"{repr(piece[:40])[1:-1]} ({tokenizer.eos_id})"
    # A config.json that was converted from LLaMA 1 says bos 0 and eos 1, which are unk and bos.
    not_ends = {tokenizer.sp.unk_id(), tokenizer.bos_id}
    files_of = {}                                    # {ids: the files that say so}
    for name in (CONFIG, GENERATION_CONFIG):
        files_of.setdefault(eos_ids(companions, name), []).append(name)
    end_ids = {tokenizer.eos_id}
    notes = []
    for ids, names in files_of.items():
        places = (f"at {first_ids(ids)} in {' and '.join(names)}, at {tokenizer_eos} in "
                  "tokenizer.model")
        wrong_ids = {i for i in ids if i in not_ends or not 0 <= i < vocab_size}
        end_ids |= ids - wrong_ids
        if wrong_ids:
            notes.append(f"texts end {places}; {first_ids(wrong_ids)} cannot be an end of text and "
                         "is ignored")
        elif ids and ids != {tokenizer.eos_id}:
            notes.append(f"texts end {places}; answers end at any of these, and training teaches "
                         f"{tokenizer_eos}")
    tokenizer.end_ids = frozenset(end_ids)
    tokenizer.eos_note = "; ".join(notes)


def first_ids(ids: Collection[int]) -> str:
    """Return the first ids in order as one text, and how many more there are."""
    text = ", ".join(map(str, sorted(ids)[:6]))
    if len(ids) > 6:
        text += f" and {len(ids) - 6} more"
    return text


def eos_ids(companions: Companions, name: str) -> frozenset[int]:
    """Return the ids that a config gives as ends of a text: one, several or none."""
    value = companions.fields(name).get("eos_token_id")
    if value is None:
        return frozenset()
    ids = value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise ValueError(f"{companions.source}: eos_token_id of {name} is {value!r}, not an id "
                             "or a list of ids")
    return frozenset(ids)
