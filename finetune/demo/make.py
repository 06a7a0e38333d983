"""Make the demo's small world: a base text, questions for fine-tuning and a tokenizer.

Three commands make the demo.  The second trains the base, the third stores it in half the space:

    python -m finetune.demo.make world
    python train.py --init random --method full --checkpoint world --data world/text.jsonl \\
        --out base --lr 3e-3 --epochs 6 --batch-size 32 --accumulation-steps 1 \\
        --max-seq-len 128 --precision bf16
    python -c "import llama, torch; llama.save_checkpoint(
        *llama.load_checkpoint('base', dtype=torch.bfloat16), 'demo')"

The first command writes these files, with the same bytes every time:

    text.jsonl       plain prose about a small world, for the base model
    prose.jsonl      the first of that prose as documents, for --template text
    train.json       questions with short answers, for instruction tuning
    held_out.json    questions about words and events that train.json never asks about
    chat.json        conversations of two turns; the second question is about the first answer
    chat_held_out.json    the same about the held-out questions
    tokenizer.model  sentencepiece BPE over text and questions
    params.json      the shape of the base model

The base reads prose only.  Its text says in many ways that a young dog is called a puppy, but it
contains no question and no answer.  Fine-tuning shows the model some hundred questions with their
answers.  The held-out questions ask about other words, so that the model can answer them only
from what the base has read.
"""

from finetune.console import run_command     # First: it ends a Ctrl-C while torch loads quietly.

import io
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece as spm

from finetune.demo.facts import (
    CHAT_QUESTIONS,
    CONTINUE,
    GOODS,
    INSTRUCTIONS,
    MOOD_PROSE,
    MOOD_QUESTIONS,
    MOODS,
    OBJECT_PRONOUNS,
    PAINTS,
    PARTS,
    PLACES,
    POSSESSIVES,
    PRONOUNS,
    SUCCESSORS,
    TOPICS,
    TOPICS_OF_THINGS,
    VERBS,
    capitalised,
    with_article,
)
from finetune.templates.alpaca import format_prompt

SEED = 7
TEXT_ROWS = 24000
DOCUMENTS = 2000                                     # in prose.jsonl
CHATS = 600                                          # conversations in chat.json
VOCAB = 1280
PARAMS = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4,
          "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 10000.0}


def example(instruction: str, output: str, text: str = "") -> dict:
    """Return one row of a data file."""
    return {"instruction": instruction, "input": text, "output": output}


# ---- The base's text --------------------------------------------------------

# The order in which these functions draw from rng decides the bytes of the files.

def all_facts():
    """Return [(name of the topic, word)] of every fact."""
    pairs = []
    for name, topic in TOPICS.items():
        pairs.extend((name, word) for word in topic.facts)
    return pairs


def fact_text(rng, facts):
    """Make an example of two or three sentences about one of the facts or its word."""
    name, word = rng.choice(facts)
    if rng.random() < 0.35:
        sentences, subject = all_about(rng, name, word)
    else:
        sentences, subject = one_side(rng, TOPICS[name], word)
    without_repeats = dict.fromkeys(sentences)
    return example(rng.choice(INSTRUCTIONS).format(subject), " ".join(without_repeats))


def all_about(rng, name, word):
    """Return (three sentences on any of the word's topics, their subject)."""
    topics = [topic for topic in TOPICS.values() if word in topic.facts]
    sentences = [state(rng, topic, word) for topic in rng.choices(topics, k=3)]
    subject = with_article(word) if name in TOPICS_OF_THINGS else "the word " + word
    return sentences, subject


def one_side(rng, topic, word):
    """Return (two sentences on one topic, their subject), at times on a second word as well."""
    sentences = [state(rng, topic, word) for _ in range(2)]
    subject = topic.fill(rng.choice(topic.subjects), word)
    if rng.random() < 0.2:
        second = rng.choice(list(topic.facts))
        sentences[1] = state(rng, topic, second)
        subject += " and " + topic.fill(rng.choice(topic.subjects), second)
    return sentences, subject


def state(rng, topic, word):
    """Return a sentence that states the fact about the word."""
    return topic.fill(rng.choice(topic.prose), word)


def mood_story(rng, event):
    """Return (what happened to a person, two sentences on the mood, the person's name)."""
    name = rng.choice(list(PRONOUNS))
    he = PRONOUNS[name]
    words = {"name": name, "He": capitalised(he), "him": OBJECT_PRONOUNS[he], "mood": MOODS[event]}
    continuation = " ".join(rng.sample(MOOD_PROSE, 2)).format(**words)
    return f"{name} {event.format(his=POSSESSIVES[he])}.", continuation, name


def scene(rng):
    """Return (a story of one sentence, {field of a template: its words})."""
    words = {
        "name": rng.choice(list(PRONOUNS)),
        "thing": f"{rng.choice(PAINTS)} {rng.choice(GOODS)}",
        "place": rng.choice(PLACES),
    }
    return "{name} {verb} a {thing} {place}.".format(verb=rng.choice(VERBS), **words), words


def story_text(rng):
    """Make an example that continues a story, freely or on one side of it."""
    if rng.random() < 0.45:
        story, continuation, _ = mood_story(rng, rng.choice(list(MOODS)))
        subject = "the feeling in this story"
    else:
        story, words = scene(rng)
        part = PARTS[rng.choice(list(PARTS))]
        subject = rng.choice(part.subjects)
        continuation = " ".join(rng.sample(part.prose, 2)).format(**words)
    if rng.random() < 0.4:
        instruction = rng.choice(CONTINUE)
    else:
        instruction = rng.choice(INSTRUCTIONS).format(subject)
    return example(instruction, continuation, story)


def base_text(rng: random.Random) -> Iterator[dict]:
    """Yield the examples of the base's text."""
    facts = all_facts()
    for _ in range(TEXT_ROWS):
        yield fact_text(rng, facts) if rng.random() < 0.68 else story_text(rng)


# ---- The questions ----------------------------------------------------------

def held_out_words(rng, name):
    """Choose the words of a topic that only held-out questions ask about, one in five."""
    facts = TOPICS[name].facts
    words = list(facts)
    if name != "opposite":
        return set(rng.sample(words, math.ceil(len(words) / 5)))
    # A question about either word of a pair gives away the other, so both are held out.
    first_words = words[:len(words) // 2]
    chosen = set(rng.sample(first_words, len(first_words) // 5))
    return chosen | {facts[word] for word in chosen}


def fact_questions(rng, name):
    """Return (train, held_out): the examples of one topic."""
    topic = TOPICS[name]
    for_test = held_out_words(rng, name)
    train = []
    held_out = []
    for word in topic.facts:
        is_held_out = word in for_test
        examples = held_out if is_held_out else train
        for question in rng.sample(topic.questions, 1 if is_held_out else 2):
            instruction = topic.fill(question, word)
            examples.append(example(instruction, topic.fill(topic.answer, word)))
    return train, held_out


def mood_questions(rng):
    """Return (train, held_out): examples that ask how a person feels after an event."""
    train = []
    held_out = []
    for mood in ("happy", "sad"):
        events = [event for event in MOODS if MOODS[event] == mood]
        for_test = set(rng.sample(events, len(events) // 5))
        for event in events:
            is_held_out = event in for_test
            examples = held_out if is_held_out else train
            for question in rng.sample(MOOD_QUESTIONS, 2 if is_held_out else 3):
                story, _, name = mood_story(rng, event)
                examples.append(example(question.format(name=name), mood, story))
    return train, held_out


def scene_questions(rng, part, count):
    """Return (train, held_out): examples about different scenes, the first fifth held out."""
    by_story = {}
    while len(by_story) < count:
        story, words = scene(rng)
        question = rng.choice(part.questions)
        by_story[story] = example(question, part.answer.format(**words), story)
    examples = list(by_story.values())
    return examples[count // 5:], examples[:count // 5]


def all_questions(rng: random.Random) -> dict:
    """Return {kind: (train, held_out)}, two lists of examples per kind of question.

    Raises AssertionError if a held-out question is also asked in training, or if the usual answer
    of a kind is right in more than half of its held-out examples.
    """
    kinds = {name: fact_questions(rng, name) for name in TOPICS}
    kinds["mood"] = mood_questions(rng)
    for name, part in PARTS.items():
        kinds[name] = scene_questions(rng, part, 50)
    train_questions = {asked(row) for row in halves(kinds)[0]}
    for kind, (train, held_out) in kinds.items():
        assert not any(asked(row) in train_questions for row in held_out), kind
        counts = Counter(row["output"] for row in train)
        usual = max(counts, key=counts.get)
        assert sum(row["output"] == usual for row in held_out) <= len(held_out) / 2, kind
    return kinds


def asked(row):
    """Return what an example asks, without its answer."""
    return row["instruction"], row["input"]


def halves(kinds):
    """Return (train, held_out): the examples of all kinds of questions."""
    train = []
    held_out = []
    for train_of_kind, held_out_of_kind in kinds.values():
        train += train_of_kind
        held_out += held_out_of_kind
    return train, held_out


def chat(rng: random.Random, kind: str, row: dict) -> dict:
    """Return a conversation of two turns: a question of this kind, then one about its answer."""
    first_answer = row["output"]
    if kind == "next" and first_answer in SUCCESSORS:
        question = rng.choice(CHAT_QUESTIONS["next"])
        second_answer = SUCCESSORS[first_answer]
    elif kind == "what":
        question = rng.choice(CHAT_QUESTIONS["colour"])
        _, second_answer, _ = first_answer.split()   # "a green doll"
    else:
        question = rng.choice(CHAT_QUESTIONS["again"])
        second_answer = first_answer
    texts = [f"{row['instruction']}\n{row['input']}".strip(), first_answer, question,
             second_answer]
    messages = [{"role": role, "content": text}
                for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
    return {"messages": messages}


def all_chats(rng: random.Random, kinds: dict) -> tuple[list, list]:
    """Return (train, held_out): conversations about the questions of all kinds, shuffled."""
    train = []
    held_out = []
    for kind, (train_of_kind, held_out_of_kind) in kinds.items():
        train += [chat(rng, kind, row) for row in train_of_kind]
        held_out += [chat(rng, kind, row) for row in held_out_of_kind]
    return rng.sample(train, CHATS), held_out


def train_tokenizer(examples: list) -> bytes:
    """Train a BPE tokenizer on prompts and answers; return its model file."""
    texts = [format_prompt(row) for row in examples] + [row["output"] for row in examples]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model, model_type="bpe", vocab_size=VOCAB, hard_vocab_limit=False,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    return model.getvalue()


def write_json(path: Path, examples: list):
    """Write a JSON list with one example per line."""
    lines = ",\n".join(json.dumps(row) for row in examples)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def make(folder: Path):
    """Write the files into the folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    text = list(base_text(random.Random(SEED)))
    rng = random.Random(SEED)
    kinds = all_questions(rng)
    train, held_out = halves(kinds)
    rng.shuffle(train)
    chats, held_out_chats = all_chats(random.Random(SEED), kinds)
    lines = [json.dumps(row) + "\n" for row in text]
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    documents = [json.dumps({"text": row["output"]}) + "\n" for row in text[:DOCUMENTS]]
    (folder / "prose.jsonl").write_text("".join(documents), encoding="utf-8")
    write_json(folder / "train.json", train)
    write_json(folder / "held_out.json", held_out)
    write_json(folder / "chat.json", chats)
    write_json(folder / "chat_held_out.json", held_out_chats)
    tokenizer = train_tokenizer(text + train)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    vocab_size = spm.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    params = PARAMS | {"vocab_size": vocab_size}
    (folder / "params.json").write_text(json.dumps(params, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {len(text)} rows of text, {len(train)} + {len(held_out)} questions")


def main():
    """Make the demo in the folder that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m finetune.demo.make DIR", file=sys.stderr)
        sys.exit(2)
    make(Path(sys.argv[1]))


if __name__ == "__main__":
    run_command(main, "finetune.demo.make")
