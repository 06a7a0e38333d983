"""Make the demo's small world: a base text, questions for fine-tuning, a tokenizer.  Then train its base on it:

    python -m finetune.demo.make world
    python train.py --init random --method full --checkpoint world --data world/text.jsonl --out base \\
        --lr 3e-3 --epochs 6 --batch-size 32 --accumulation-steps 1 --max-seq-len 128 --precision bf16
    python -c "import llama, torch; llama.save_checkpoint(*llama.load_checkpoint('base', dtype=torch.bfloat16), 'demo')"

The last stores the base in half the space.  The first writes, the same bytes every time:

    text.jsonl       plain prose about a small world, for the base model
    train.json       questions with short answers, for instruction tuning
    held_out.json    questions about words and events that train.json never asks about
    tokenizer.model  sentencepiece BPE over text and questions
    params.json      the shape of the base model

The base reads prose only.  Its text says in many ways that a young dog is called a puppy, but it holds no
question and no answer.  Fine-tuning shows it some hundred questions with their answers.  It is then asked
about words it was never asked about, and can only know those from what it read as a base.
"""

import io
import json
import random
import sys
from collections import Counter
from pathlib import Path

import sentencepiece as spm

from finetune.dataset import format_prompt

SEED = 7
TEXT_ROWS = 24000
VOCAB = 1280
PARAMS = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4,
          "multiple_of": 32, "norm_eps": 1e-5, "rope_theta": 10000.0}


# ---- what is true in this world: "word answer" pairs, one table per kind ----

def table(text):
    """'dog puppy, cat kitten' -> {'dog': 'puppy', 'cat': 'kitten'}."""
    return dict(pair.split(maxsplit=1) for pair in " ".join(text.split()).split(", "))


def groups(text):
    """'red: rose, cherry; green: pea' -> {'rose': 'red', ...}."""
    rows = (group.split(": ") for group in " ".join(text.split()).split("; "))
    return {word: answer for answer, words in rows for word in words.split(", ")}


def both_ways(pairs):
    return pairs | {answer: word for word, answer in pairs.items()}


def chain(text):
    words = text.split()
    return dict(zip(words, words[1:]))


YOUNG = table("""dog puppy, cat kitten, cow calf, sheep lamb, pig piglet,
    horse foal, hen chick, duck duckling, goose gosling, goat kid, lion cub,
    bear cub, tiger cub, frog tadpole, deer fawn, owl owlet, swan cygnet,
    kangaroo joey, elephant calf, whale calf, eagle eaglet, donkey foal,
    penguin chick, fox cub, giraffe calf, seal pup, shark pup, wolf pup""")

SOUND = table("""dog barks, cat meows, cow moos, sheep bleats, pig grunts,
    horse neighs, hen clucks, duck quacks, goose honks, goat bleats,
    lion roars, bear growls, tiger roars, wolf howls, frog croaks, bee buzzes,
    owl hoots, mouse squeaks, snake hisses, crow caws, donkey brays,
    elephant trumpets, bird sings, dove coos, fly buzzes, monkey chatters,
    parrot squawks, rat squeaks""")

HOME = table("""dog in a kennel, cow in a barn, horse in a stable,
    pig in a sty, hen in a coop, bee in a hive, spider in a web,
    bird in a nest, whale in the sea, shark in the sea, seal in the sea,
    camel in the desert, penguin on the ice, lion in the grassland,
    elephant in the grassland, giraffe in the grassland,
    zebra in the grassland, monkey in the jungle, tiger in the jungle,
    parrot in the jungle, bear in the forest, wolf in the forest,
    deer in the forest, owl in the forest, rabbit in a burrow,
    frog in a pond, duck in a pond, swan on a lake, snail in a shell,
    sheep in a field, eagle in the mountains, mouse in a hole""")

COLOUR = groups("""yellow: banana, lemon, sun, chick, butter, duckling;
    green: grass, leaf, frog, pea, spinach, cabbage, lettuce;
    blue: sky, sea, bluebell; red: blood, strawberry, tomato, cherry, poppy;
    white: snow, milk, salt, swan, cloud, sugar, flour, sheep;
    black: coal, crow, night, tar, ink; orange: carrot, pumpkin, apricot;
    pink: pig, flamingo; purple: plum, violet;
    brown: mud, chocolate, bear, wood, coffee, potato, deer;
    grey: elephant, stone, mouse, ash, donkey, shark, wolf""")

GROUP = groups("""animal: dog, cat, cow, horse, pig, sheep, lion, bear, tiger,
    wolf, goat, rabbit, elephant, monkey, fox, deer;
    fruit: apple, banana, pear, plum, cherry, grape, lemon, strawberry, peach, melon;
    vegetable: carrot, pea, onion, potato, cabbage, bean, spinach, lettuce;
    tool: hammer, saw, spade, rake, drill, axe, spanner;
    clothing: shirt, coat, hat, sock, glove, scarf, dress, shoe;
    drink: milk, tea, water, juice, coffee;
    vehicle: car, bus, train, bike, lorry, van, tractor;
    furniture: table, chair, bed, sofa, desk, shelf;
    instrument: drum, flute, piano, violin, guitar, harp;
    toy: doll, kite, ball, puzzle, teddy;
    flower: rose, tulip, daisy, violet, poppy""")

OPPOSITE = both_ways(table("""hot cold, big small, fast slow, high low,
    happy sad, full empty, wet dry, open closed, day night, up down, in out,
    early late, hard soft, rich poor, clean dirty, near far, strong weak,
    thick thin, long short, loud quiet, first last, good bad, right wrong,
    true false, sweet sour, rough smooth, deep shallow, wide narrow,
    heavy light, safe dangerous, always never, love hate, push pull, win lose,
    buy sell, friend enemy, summer winter, kind cruel, old young, begin end"""))

PLURAL = table("""mouse mice, goose geese, child children, man men,
    woman women, foot feet, tooth teeth, leaf leaves, wolf wolves,
    knife knives, sheep sheep, deer deer, box boxes, bus buses, baby babies,
    city cities, puppy puppies, cherry cherries, dog dogs, cat cats,
    tree trees, house houses, book books, car cars, ball balls, fox foxes,
    shelf shelves, potato potatoes, tomato tomatoes, loaf loaves,
    thief thieves, lady ladies, story stories, apple apples, chair chairs,
    bird birds, cow cows, horse horses, hat hats, shoe shoes, hand hands,
    glass glasses, dish dishes, brush brushes, king kings""")

PAST = table("""go went, come came, see saw, eat ate, drink drank, run ran,
    swim swam, sing sang, sit sat, stand stood, give gave, take took,
    make made, find found, lose lost, buy bought, bring brought,
    think thought, catch caught, teach taught, know knew, grow grew,
    fly flew, throw threw, draw drew, write wrote, ride rode, drive drove,
    speak spoke, break broke, wake woke, get got, tell told, sell sold,
    say said, hear heard, sleep slept, keep kept, feel felt, meet met,
    win won, begin began, fall fell, hide hid, leave left, send sent,
    build built, walk walked, play played, jump jumped, help helped,
    look looked, wash washed""")

NEXT = (chain("Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday")
        | chain("""January February March April May June July August September
                October November December January""")
        | chain("""one two three four five six seven eight nine ten eleven
                twelve thirteen fourteen fifteen sixteen seventeen eighteen
                nineteen twenty"""))

# ---- how the base text says it, and how fine-tuning asks for it -------------
# x is the word and y its answer; ax is "a dog", "an owl" or "snow"; AX and AY
# begin with a capital letter.  "about" names the subject in the base's
# instructions, "prose" says it, "ask" is used in fine-tuning only.

FACTS = {
    "young": dict(facts=YOUNG, about=["the young of {ax}", "a young {x}", "{x} babies"],
        prose=["A young {x} is called {ay}.", "{AY} is a young {x}.", "The {x} and her {y} sleep.",
               "{AY} will grow up to be {ax}.", "{AX} looks after a little {y}.",
               "This {y} has {ax} for a mother."],
        ask=["What is a young {x} called?", "Give the name for the young of {ax}.",
             "What do we call a baby {x}?"]),
    "sound": dict(facts=SOUND, about=["the sound of {ax}", "the noise {ax} makes", "how {ax} sounds"],
        prose=["{AX} {y}.", "It {y}, for it is {ax}.", "The {x} {y} all day long.",
               "When it {y}, you know it is {ax}.", "If it {y}, it is {ax}.", "Listen, the {x} {y} again."],
        ask=["What sound does {ax} make?", "Say in two words how {ax} sounds.",
             "Which noise does {ax} make?"], answer="it {y}"),
    "home": dict(facts=HOME, about=["the home of {ax}", "the place where {ax} lives", "{ax} at home"],
        prose=["{AX} lives {y}.", "Look {y} and you will see {ax}.", "The {x} sleeps {y}.",
               "The home of {ax} is {y}.", "Here {y} lives {ax}.", "Life {y} is good for {ax}."],
        ask=["Where does {ax} live?", "Name the place where {ax} lives.",
             "Where would you find the home of {ax}?"]),
    "colour": dict(facts=COLOUR, about=["the colour of {ax}", "{ax} and its colour", "how {ax} looks"],
        prose=["{AX} is {y}.", "The colour {y} is the colour of {ax}.", "The colour of {ax} is {y}.",
               "Many things are {y}, such as {ax}.", "I can see something {y}: it is {ax}.",
               "As {y} as {ax}, people say."],
        ask=["What colour is {ax}?", "Name the colour of {ax}.", "Which colour does {ax} have?"]),
    "group": dict(facts=GROUP, about=["the kind of thing {ax} is", "what {ax} is", "{ax} and its kind"],
        prose=["{AX} is a kind of {y}.", "The group {y} has {ax} in it.", "One kind of {y} is {ax}.",
               "The word {y} fits {ax}.", "Think of {y} when you see {ax}.", "We call {ax} a kind of {y}."],
        ask=["What kind of thing is {ax}?", "Which group does {ax} belong to?",
             "Name the kind of thing that {ax} is."]),
    "opposite": dict(facts=OPPOSITE, about=["the opposite of {x}", "the word {x} and its opposite", "{x} and not {x}"],
        prose=["The opposite of {x} is {y}.", "The word {y} is the opposite of {x}.", "What is not {x} may be {y}.",
               "The words {x} and {y} are opposites.", "The words {y} and {x} are opposites.",
               "If it is not {y}, it may be {x}."],
        ask=["What is the opposite of {x}?", "Give the opposite of the word {x}.",
             "Which word means the opposite of {x}?"]),
    "plural": dict(facts=PLURAL, about=["more than one {x}", "the plural of {x}", "many of the word {x}"],
        prose=["One {x}, two {y}.", "The plural of {x} is {y}.", "The word {y} is the plural of {x}.",
               "Two {y} are more than one {x}.", "I had one {x}, now I have many {y}.",
               "Many {y} are here, and not one {x}."],
        ask=["What is the plural of {x}?", "Give the plural of the word {x}.",
             "What is the word for more than one {x}?"]),
    "past": dict(facts=PAST, about=["the past of {x}", "the verb {x} and its past", "how they {x}"],
        prose=["Today they {x}; yesterday they {y}.", "The past of {x} is {y}.", "The word {y} is the past of {x}.",
               "They {y} yesterday, and today they {x}.", "Say {y} for the past of {x}.",
               "We {x} now as we {y} before."],
        ask=["What is the past tense of {x}?", "Give the past of the verb {x}.",
             "Put the verb {x} into the past."]),
    "next": dict(facts=NEXT, about=["what follows {x}", "{x} and the next one", "the time after {x}"],
        prose=["After {x} comes {y}.", "Now {y} comes after {x}.", "Then {y} follows {x}.",
               "First {x}, then {y}.", "And {y} is next when {x} is over.", "It is {y} that comes after {x}."],
        ask=["What comes after {x}?", "Which one comes next after {x}?", "Name the one that follows {x}."]),
}

TELL = ["Tell me about {}.", "Write about {}.", "Say something about {}.",
        "Write a few lines about {}.", "Talk about {}.", "A short text about {}, please."]

BARE = set("""snow milk salt sugar flour coal tar ink mud chocolate wood coffee
    ash butter grass spinach lettuce blood tea water juice""".split())
ONLY = {"sun", "sky", "sea", "night"}

# ---- little stories: how somebody feels; who has what, and where -------------

NAMES = table("Mia she, Tom he, Ben he, Anna she, Leo he, Sara she, Max he, Lily she, Emma she, Jack he")
HIS = {"she": "her", "he": "his"}
HIM = {"she": "her", "he": "him"}
GLAD = """won the race, found {his} lost ball, got a new bike, met an old friend,
    had a birthday party, went to the zoo, saw a funny show, ate a sweet cake,
    won a big prize, found a gold coin, got a nice letter, sang with {his} friends,
    played in the sun, got a little puppy, heard good news, flew a kite with {his} father,
    made a new friend, went to the sea, got a kind word from the teacher,
    built a big castle, caught a big fish, rode a white horse,
    got well again, danced all day, had a good dream"""
BLUE = """lost the race, lost {his} new ball, broke {his} new bike, missed {his} old friend,
    had no party, fell into the mud, hurt {his} hand, dropped the sweet cake,
    lost the big prize, lost a gold coin, got a bad letter, had a fight with {his} friends,
    had to stay in bed, lost the little puppy, heard bad news, tore {his} best kite,
    had no friend, missed the train to the sea, got an angry word from the teacher,
    broke the big castle, had a bad tooth, fell from the horse,
    was ill again, cried all day, had a bad dream"""
MOOD = {" ".join(event.split()): mood for mood, events in (("happy", GLAD), ("sad", BLUE))
        for event in events.split(",")}
MOOD_PROSE = ["{He} was {mood}.", "{He} was very {mood}.", "A {mood} {name} went home.",
              "That made {him} {mood}.", "{name} was {mood} all day.", "It was a {mood} day for {name}."]
MOOD_ASK = ["How does {name} feel?", "Name the feeling of {name}.", "Which feeling does {name} have?"]
DID = ["found", "saw", "lost", "had", "hid", "bought"]
PAINT = "red blue green yellow white black".split()
GOODS = "ball hat book kite bag drum doll mug box shirt cup pen".split()
PLACES = """in the park, in the garden, at school, at the zoo, on the bus, in the forest,
    in the kitchen, at the beach, in the shop, on the bridge"""
SCENE = {
    "who": dict(about=["the person in this story", "the one it is about"], value="{name}",
        prose=["This is a story of {name}.", "It was {name} who was there.", "All looked at {name}.",
               "The person here is {name}."],
        ask=["Who is in the story?", "Name the person.", "Who is this about?"]),
    "what": dict(about=["the thing in this story", "the thing here"], value="a {thing}",
        prose=["There was a {thing}.", "What a nice {thing}!", "It was a {thing}, not a big one.",
               "A {thing} is a good thing."],
        ask=["Which thing is in the story?", "Name the thing.", "What thing is this about?"]),
    "where": dict(about=["the place in this story", "the place here"], value="{place}",
        prose=["It was {place}.", "All this was {place}.", "Many people were {place}.", "It is nice {place}."],
        ask=["Where does this happen?", "Name the place.", "In which place is this?"]),
}
STORY = ["Go on with the story.", "Write the next lines.", "Tell the rest of the story.",
         "Continue this little story.", "Write on."]


def example(instruction, output, text=""):
    return {"instruction": instruction, "input": text, "output": output}


def capital(text):
    return text[0].upper() + text[1:]


def with_article(word):
    if word in BARE:
        return word
    if word in ONLY:
        return "the " + word
    return ("an " if word[0] in "aeiou" else "a ") + word


def fields(word, answer):
    ax, ay = with_article(word), with_article(answer)
    return dict(x=word, y=answer, ax=ax, ay=ay, AX=capital(ax), AY=capital(ay))


# ---- the base's text --------------------------------------------------------

ALL_FACTS = [(kind, word) for kind in FACTS for word in FACTS[kind]["facts"]]
THINGS = ("young", "sound", "home", "colour", "group")


def fact_text(rng):
    """Two or three sentences about a word, or about one side of it."""
    kind, word = rng.choice(ALL_FACTS)
    if rng.random() < 0.35:                       # all that is known of the word
        known = [k for k in FACTS if word in FACTS[k]["facts"]]
        lines = [say(rng, k, word) for k in rng.choices(known, k=3)]
        subject = with_article(word) if kind in THINGS else "the word " + word
    else:
        lines = [say(rng, kind, word) for _ in range(2)]
        subject = about(rng, kind, word)
        if rng.random() < 0.2:                    # and about another word as well
            other = rng.choice(list(FACTS[kind]["facts"]))
            lines[1] = say(rng, kind, other)
            subject += " and " + about(rng, kind, other)
    return example(rng.choice(TELL).format(subject), " ".join(dict.fromkeys(lines)))


def about(rng, kind, word):
    return rng.choice(FACTS[kind]["about"]).format(**fields(word, FACTS[kind]["facts"][word]))


def say(rng, kind, word):
    return rng.choice(FACTS[kind]["prose"]).format(**fields(word, FACTS[kind]["facts"][word]))


def mood_story(rng, event):
    """(input, its continuation, name)."""
    name = rng.choice(list(NAMES))
    he = NAMES[name]
    words = dict(name=name, He=capital(he), him=HIM[he], mood=MOOD[event])
    more = " ".join(rng.sample(MOOD_PROSE, 2)).format(**words)
    return f"{name} {event.format(his=HIS[he])}.", more, name


def scene(rng):
    """(input, what there is to say about it)."""
    words = dict(name=rng.choice(list(NAMES)), thing=f"{rng.choice(PAINT)} {rng.choice(GOODS)}",
                 place=rng.choice(" ".join(PLACES.split()).split(", ")))
    return "{name} {did} a {thing} {place}.".format(did=rng.choice(DID), **words), words


def story_text(rng):
    """A story goes on, freely or with one side of it."""
    if rng.random() < 0.45:
        story, more, _ = mood_story(rng, rng.choice(list(MOOD)))
        subject = "the feeling in this story"
    else:
        story, words = scene(rng)
        part = SCENE[rng.choice(list(SCENE))]
        subject = rng.choice(part["about"])
        more = " ".join(rng.sample(part["prose"], 2)).format(**words)
    order = rng.choice(STORY) if rng.random() < 0.4 else rng.choice(TELL).format(subject)
    return example(order, more, story)


def base_text(rng):
    for _ in range(TEXT_ROWS):
        yield fact_text(rng) if rng.random() < 0.68 else story_text(rng)


# ---- the questions ----------------------------------------------------------

def fact_questions(rng, kind):
    """(train, held out) examples of one kind; every fifth word is held out."""
    spec = FACTS[kind]
    words = list(spec["facts"])
    if kind == "opposite":                        # both words of a pair together
        half = words[:len(words) // 2]
        held = set(rng.sample(half, len(half) // 5))
        held |= {spec["facts"][word] for word in held}
    else:
        held = set(rng.sample(words, -(-len(words) // 5)))
    train, test = [], []
    for word in words:
        asks = rng.sample(spec["ask"], 1 if word in held else 2)
        values = fields(word, spec["facts"][word])
        rows = [example(ask.format(**values), spec.get("answer", "{y}").format(**values)) for ask in asks]
        (test if word in held else train).extend(rows)
    return train, test


def mood_questions(rng):
    train, test = [], []
    for mood in ("happy", "sad"):
        events = [event for event in MOOD if MOOD[event] == mood]
        held = set(rng.sample(events, len(events) // 5))
        for event in events:
            for ask in rng.sample(MOOD_ASK, 2 if event in held else 3):
                story, _, name = mood_story(rng, event)
                (test if event in held else train).append(example(ask.format(name=name), mood, story))
    return train, test


def scene_questions(rng, kind, count):
    """Every story is another one; the first fifth is held out."""
    rows = {}
    while len(rows) < count:
        story, words = scene(rng)
        rows[story] = example(rng.choice(SCENE[kind]["ask"]), SCENE[kind]["value"].format(**words), story)
    rows = list(rows.values())
    return rows[count // 5:], rows[:count // 5]


def questions(rng):
    """{kind: (train, held out)}."""
    made = {kind: fact_questions(rng, kind) for kind in FACTS}
    made["mood"] = mood_questions(rng)
    for kind in SCENE:
        made[kind] = scene_questions(rng, kind, 50)
    asked = {(e["instruction"], e["input"]) for train, _ in made.values() for e in train}
    for kind, (train, held_out) in made.items():
        assert not any((e["instruction"], e["input"]) in asked for e in held_out), kind
        usual = Counter(e["output"] for e in train).most_common(1)[0][0]
        assert sum(e["output"] == usual for e in held_out) <= len(held_out) / 2, kind
    return made


def train_tokenizer(examples):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([format_prompt(e) for e in examples] + [e["output"] for e in examples]),
        model_writer=model, model_type="bpe", vocab_size=VOCAB, hard_vocab_limit=False,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    return model.getvalue()


def write_json(path, examples):
    rows = ",\n".join(json.dumps(e) for e in examples)
    path.write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    text = list(base_text(random.Random(SEED)))
    rng = random.Random(SEED)
    made = questions(rng)
    train = [e for rows, _ in made.values() for e in rows]
    held_out = [e for _, rows in made.values() for e in rows]
    rng.shuffle(train)
    (folder / "text.jsonl").write_text("".join(json.dumps(e) + "\n" for e in text), encoding="utf-8")
    write_json(folder / "train.json", train)
    write_json(folder / "held_out.json", held_out)
    tokenizer = train_tokenizer(text + train)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    params = PARAMS | {"vocab_size": spm.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()}
    (folder / "params.json").write_text(json.dumps(params, indent=1) + "\n", encoding="utf-8")
    print(f"{folder}: {len(text)} rows of text, {len(train)} + {len(held_out)} questions")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m finetune.demo.make DIR", file=sys.stderr)
        sys.exit(2)
    make(Path(sys.argv[1]))
