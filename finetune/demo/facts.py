"""The demo's small world: what is true in it, and the templates that state it or ask for it."""

from dataclasses import dataclass
from itertools import pairwise


# ---- Facts of this world: one table {word: answer} per topic ----------------

def one_line(text: str) -> str:
    """Replace each run of white space with one space."""
    return " ".join(text.split())


def table(text: str) -> dict:
    """Read 'dog puppy, cat kitten' as {'dog': 'puppy', 'cat': 'kitten'}."""
    return dict(pair.split(maxsplit=1) for pair in one_line(text).split(", "))


def groups(text: str) -> dict:
    """Read 'red: rose, cherry; green: pea' as {'rose': 'red', 'cherry': 'red', 'pea': 'green'}."""
    answers = {}
    for group in one_line(text).split("; "):
        answer, words = group.split(": ")
        for word in words.split(", "):
            answers[word] = answer
    return answers


def both_ways(pairs: dict) -> dict:
    """Add the reverse of every pair, after all pairs."""
    return pairs | {answer: word for word, answer in pairs.items()}


def chain(text: str) -> dict:
    """Read 'one two three' as {'one': 'two', 'two': 'three'}."""
    return dict(pairwise(text.split()))


YOUNG_ANIMALS = table("""dog puppy, cat kitten, cow calf, sheep lamb, pig piglet,
    horse foal, hen chick, duck duckling, goose gosling, goat kid, lion cub,
    bear cub, tiger cub, frog tadpole, deer fawn, owl owlet, swan cygnet,
    kangaroo joey, elephant calf, whale calf, eagle eaglet, donkey foal,
    penguin chick, fox cub, giraffe calf, seal pup, shark pup, wolf pup""")

NOISES = table("""dog barks, cat meows, cow moos, sheep bleats, pig grunts,
    horse neighs, hen clucks, duck quacks, goose honks, goat bleats,
    lion roars, bear growls, tiger roars, wolf howls, frog croaks, bee buzzes,
    owl hoots, mouse squeaks, snake hisses, crow caws, donkey brays,
    elephant trumpets, bird sings, dove coos, fly buzzes, monkey chatters,
    parrot squawks, rat squeaks""")

HOMES = table("""dog in a kennel, cow in a barn, horse in a stable,
    pig in a sty, hen in a coop, bee in a hive, spider in a web,
    bird in a nest, whale in the sea, shark in the sea, seal in the sea,
    camel in the desert, penguin on the ice, lion in the grassland,
    elephant in the grassland, giraffe in the grassland,
    zebra in the grassland, monkey in the jungle, tiger in the jungle,
    parrot in the jungle, bear in the forest, wolf in the forest,
    deer in the forest, owl in the forest, rabbit in a burrow,
    frog in a pond, duck in a pond, swan on a lake, snail in a shell,
    sheep in a field, eagle in the mountains, mouse in a hole""")

COLOURS = groups("""yellow: banana, lemon, sun, chick, butter, duckling;
    green: grass, leaf, frog, pea, spinach, cabbage, lettuce;
    blue: sky, sea, bluebell; red: blood, strawberry, tomato, cherry, poppy;
    white: snow, milk, salt, swan, cloud, sugar, flour, sheep;
    black: coal, crow, night, tar, ink; orange: carrot, pumpkin, apricot;
    pink: pig, flamingo; purple: plum, violet;
    brown: mud, chocolate, bear, wood, coffee, potato, deer;
    grey: elephant, stone, mouse, ash, donkey, shark, wolf""")

KINDS_OF_THING = groups("""animal: dog, cat, cow, horse, pig, sheep, lion, bear, tiger,
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

OPPOSITES = both_ways(table("""hot cold, big small, fast slow, high low,
    happy sad, full empty, wet dry, open closed, day night, up down, in out,
    early late, hard soft, rich poor, clean dirty, near far, strong weak,
    thick thin, long short, loud quiet, first last, good bad, right wrong,
    true false, sweet sour, rough smooth, deep shallow, wide narrow,
    heavy light, safe dangerous, always never, love hate, push pull, win lose,
    buy sell, friend enemy, summer winter, kind cruel, old young, begin end"""))

PLURALS = table("""mouse mice, goose geese, child children, man men,
    woman women, foot feet, tooth teeth, leaf leaves, wolf wolves,
    knife knives, sheep sheep, deer deer, box boxes, bus buses, baby babies,
    city cities, puppy puppies, cherry cherries, dog dogs, cat cats,
    tree trees, house houses, book books, car cars, ball balls, fox foxes,
    shelf shelves, potato potatoes, tomato tomatoes, loaf loaves,
    thief thieves, lady ladies, story stories, apple apples, chair chairs,
    bird birds, cow cows, horse horses, hat hats, shoe shoes, hand hands,
    glass glasses, dish dishes, brush brushes, king kings""")

PAST_TENSES = table("""go went, come came, see saw, eat ate, drink drank, run ran,
    swim swam, sing sang, sit sat, stand stood, give gave, take took,
    make made, find found, lose lost, buy bought, bring brought,
    think thought, catch caught, teach taught, know knew, grow grew,
    fly flew, throw threw, draw drew, write wrote, ride rode, drive drove,
    speak spoke, break broke, wake woke, get got, tell told, sell sold,
    say said, hear heard, sleep slept, keep kept, feel felt, meet met,
    win won, begin began, fall fell, hide hid, leave left, send sent,
    build built, walk walked, play played, jump jumped, help helped,
    look looked, wash washed""")

DAYS = chain("Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday")
MONTHS = chain("""January February March April May June July August September
    October November December January""")
NUMBERS = chain("""one two three four five six seven eight nine ten eleven
    twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty""")
SUCCESSORS = DAYS | MONTHS | NUMBERS


# ---- Articles and capital letters -------------------------------------------

WITHOUT_ARTICLE = {
    "snow", "milk", "salt", "sugar", "flour", "coal", "tar", "ink", "mud", "chocolate", "wood",
    "coffee", "ash", "butter", "grass", "spinach", "lettuce", "blood", "tea", "water", "juice",
}
WITH_THE = {"sun", "sky", "sea", "night"}


def capitalised(text: str) -> str:
    """Return the text with a capital first letter and the rest unchanged."""
    return text[0].upper() + text[1:]


def with_article(word: str) -> str:
    """Return the word as a sentence names it: "a dog", "an owl", "the sun" or "snow"."""
    if word in WITHOUT_ARTICLE:
        return word
    if word in WITH_THE:
        return "the " + word
    article = "an " if word[0] in "aeiou" else "a "
    return article + word


# ---- How the base text states a fact, and how fine-tuning asks for it -------

@dataclass(frozen=True)
class Topic:
    """Hold the facts of one topic and the templates for texts and questions about them.

    In a template x is the word and y its answer.  ax is the word with its article: "a dog",
    "an owl" or "snow"; ay is the answer with its article.  AX and AY begin with a capital letter.
    """

    facts: dict[str, str]    # {word: answer}
    subjects: list[str]      # What an instruction of the base text says it is about.
    prose: list[str]         # Sentences that state the fact.
    questions: list[str]     # Only fine-tuning uses these.
    answer: str = "{y}"

    def fill(self, template: str, word: str) -> str:
        """Fill a template with a word of the topic and its answer."""
        answer = self.facts[word]
        ax = with_article(word)
        ay = with_article(answer)
        return template.format(x=word, y=answer, ax=ax, ay=ay, AX=capitalised(ax),
                               AY=capitalised(ay))


TOPICS = {
    "young": Topic(
        facts=YOUNG_ANIMALS,
        subjects=["the young of {ax}", "a young {x}", "{x} babies"],
        prose=["A young {x} is called {ay}.", "{AY} is a young {x}.", "The {x} and her {y} sleep.",
               "{AY} will grow up to be {ax}.", "{AX} looks after a little {y}.",
               "This {y} has {ax} for a mother."],
        questions=["What is a young {x} called?", "Give the name for the young of {ax}.",
                   "What do we call a baby {x}?"]),
    "sound": Topic(
        facts=NOISES,
        subjects=["the sound of {ax}", "the noise {ax} makes", "how {ax} sounds"],
        prose=["{AX} {y}.", "It {y}, for it is {ax}.", "The {x} {y} all day long.",
               "When it {y}, you know it is {ax}.", "If it {y}, it is {ax}.",
               "Listen, the {x} {y} again."],
        questions=["What sound does {ax} make?", "Say in two words how {ax} sounds.",
                   "Which noise does {ax} make?"],
        answer="it {y}"),
    "home": Topic(
        facts=HOMES,
        subjects=["the home of {ax}", "the place where {ax} lives", "{ax} at home"],
        prose=["{AX} lives {y}.", "Look {y} and you will see {ax}.", "The {x} sleeps {y}.",
               "The home of {ax} is {y}.", "Here {y} lives {ax}.", "Life {y} is good for {ax}."],
        questions=["Where does {ax} live?", "Name the place where {ax} lives.",
                   "Where would you find the home of {ax}?"]),
    "colour": Topic(
        facts=COLOURS,
        subjects=["the colour of {ax}", "{ax} and its colour", "how {ax} looks"],
        prose=["{AX} is {y}.", "The colour {y} is the colour of {ax}.",
               "The colour of {ax} is {y}.", "Many things are {y}, such as {ax}.",
               "I can see something {y}: it is {ax}.", "As {y} as {ax}, people say."],
        questions=["What colour is {ax}?", "Name the colour of {ax}.",
                   "Which colour does {ax} have?"]),
    "group": Topic(
        facts=KINDS_OF_THING,
        subjects=["the kind of thing {ax} is", "what {ax} is", "{ax} and its kind"],
        prose=["{AX} is a kind of {y}.", "The group {y} has {ax} in it.",
               "One kind of {y} is {ax}.", "The word {y} fits {ax}.",
               "Think of {y} when you see {ax}.", "We call {ax} a kind of {y}."],
        questions=["What kind of thing is {ax}?", "Which group does {ax} belong to?",
                   "Name the kind of thing that {ax} is."]),
    "opposite": Topic(
        facts=OPPOSITES,
        subjects=["the opposite of {x}", "the word {x} and its opposite", "{x} and not {x}"],
        prose=["The opposite of {x} is {y}.", "The word {y} is the opposite of {x}.",
               "What is not {x} may be {y}.", "The words {x} and {y} are opposites.",
               "The words {y} and {x} are opposites.", "If it is not {y}, it may be {x}."],
        questions=["What is the opposite of {x}?", "Give the opposite of the word {x}.",
                   "Which word means the opposite of {x}?"]),
    "plural": Topic(
        facts=PLURALS,
        subjects=["more than one {x}", "the plural of {x}", "many of the word {x}"],
        prose=["One {x}, two {y}.", "The plural of {x} is {y}.",
               "The word {y} is the plural of {x}.", "Two {y} are more than one {x}.",
               "I had one {x}, now I have many {y}.", "Many {y} are here, and not one {x}."],
        questions=["What is the plural of {x}?", "Give the plural of the word {x}.",
                   "What is the word for more than one {x}?"]),
    "past": Topic(
        facts=PAST_TENSES,
        subjects=["the past of {x}", "the verb {x} and its past", "how they {x}"],
        prose=["Today they {x}; yesterday they {y}.", "The past of {x} is {y}.",
               "The word {y} is the past of {x}.", "They {y} yesterday, and today they {x}.",
               "Say {y} for the past of {x}.", "We {x} now as we {y} before."],
        questions=["What is the past tense of {x}?", "Give the past of the verb {x}.",
                   "Put the verb {x} into the past."]),
    "next": Topic(
        facts=SUCCESSORS,
        subjects=["what follows {x}", "{x} and the next one", "the time after {x}"],
        prose=["After {x} comes {y}.", "Now {y} comes after {x}.", "Then {y} follows {x}.",
               "First {x}, then {y}.", "And {y} is next when {x} is over.",
               "It is {y} that comes after {x}."],
        questions=["What comes after {x}?", "Which one comes next after {x}?",
                   "Name the one that follows {x}."]),
}
# In these topics a word is a thing and takes an article; in the others it is "the word ...".
TOPICS_OF_THINGS = ("young", "sound", "home", "colour", "group")

INSTRUCTIONS = ["Tell me about {}.", "Write about {}.", "Say something about {}.",
                "Write a few lines about {}.", "Talk about {}.", "A short text about {}, please."]

# ---- Little stories: how a person feels; who has what, and where ------------

PRONOUNS = table("""Mia she, Tom he, Ben he, Anna she, Leo he, Sara she, Max he, Lily she,
    Emma she, Jack he""")
POSSESSIVES = {"she": "her", "he": "his"}
OBJECT_PRONOUNS = {"she": "her", "he": "him"}
MOODS = groups("""happy: won the race, found {his} lost ball, got a new bike, met an old friend,
    had a birthday party, went to the zoo, saw a funny show, ate a sweet cake,
    won a big prize, found a gold coin, got a nice letter, sang with {his} friends,
    played in the sun, got a little puppy, heard good news, flew a kite with {his} father,
    made a new friend, went to the sea, got a kind word from the teacher,
    built a big castle, caught a big fish, rode a white horse,
    got well again, danced all day, had a good dream;
    sad: lost the race, lost {his} new ball, broke {his} new bike, missed {his} old friend,
    had no party, fell into the mud, hurt {his} hand, dropped the sweet cake,
    lost the big prize, lost a gold coin, got a bad letter, had a fight with {his} friends,
    had to stay in bed, lost the little puppy, heard bad news, tore {his} best kite,
    had no friend, missed the train to the sea, got an angry word from the teacher,
    broke the big castle, had a bad tooth, fell from the horse,
    was ill again, cried all day, had a bad dream""")
MOOD_PROSE = ["{He} was {mood}.", "{He} was very {mood}.", "A {mood} {name} went home.",
              "That made {him} {mood}.", "{name} was {mood} all day.",
              "It was a {mood} day for {name}."]
MOOD_QUESTIONS = ["How does {name} feel?", "Name the feeling of {name}.",
                  "Which feeling does {name} have?"]

VERBS = ["found", "saw", "lost", "had", "hid", "bought"]
PAINTS = ["red", "blue", "green", "yellow", "white", "black"]
GOODS = ["ball", "hat", "book", "kite", "bag", "drum", "doll", "mug", "box", "shirt", "cup", "pen"]
PLACES = ["in the park", "in the garden", "at school", "at the zoo", "on the bus",
          "in the forest", "in the kitchen", "at the beach", "in the shop", "on the bridge"]


@dataclass(frozen=True)
class Part:
    """Hold the templates about one part of a scene: its person, its thing or its place."""

    subjects: list[str]
    prose: list[str]
    questions: list[str]
    answer: str


PARTS = {
    "who": Part(
        subjects=["the person in this story", "the one it is about"],
        prose=["This is a story of {name}.", "It was {name} who was there.",
               "All looked at {name}.", "The person here is {name}."],
        questions=["Who is in the story?", "Name the person.", "Who is this about?"],
        answer="{name}"),
    "what": Part(
        subjects=["the thing in this story", "the thing here"],
        prose=["There was a {thing}.", "What a nice {thing}!",
               "It was a {thing}, not a big one.", "A {thing} is a good thing."],
        questions=["Which thing is in the story?", "Name the thing.", "What thing is this about?"],
        answer="a {thing}"),
    "where": Part(
        subjects=["the place in this story", "the place here"],
        prose=["It was {place}.", "All this was {place}.", "Many people were {place}.",
               "It is nice {place}."],
        questions=["Where does this happen?", "Name the place.", "In which place is this?"],
        answer="{place}"),
}
# The second questions of a conversation, about its first answer.
CHAT_QUESTIONS = {
    "next": ["And what comes after that?", "Which one comes after that?", "And the one after?"],
    "colour": ["Which colour is it?", "What colour is that?", "Name its colour."],
    "again": ["Say that again.", "Say it once more.", "And again?"],
}
CONTINUE = ["Go on with the story.", "Write the next lines.", "Tell the rest of the story.",
            "Continue this little story.", "Write on."]
