"""Questions whose answers follow a rule, as many as you like: rows that a program writes.

    python -m data.rules                                            # data/rules/rules.json
    python -m data.rules --rows=1000 --operands=held_out --out=data/rules/held_out.json
    python -m data.rules --rows=500 --operands=made_up --out=data/rules/made_up.json

An operand is what a question is about: a word, a sentence, a pair of numbers. A tenth of them,
chosen by the seed, are in no training row, and questions for a test are made of those alone:
whoever answers them has learned the rule. Words are those of data/words.txt, and one in three is
invented, since the rules hold for "florp" too; questions are worded as in data/wordings.txt. No
operand of the hand-written rows is of the tenth, and none of their questions is asked again, though
the same may be asked in other words.
"""
import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from data.conversation import read_conversations
from data.files import write_text

FOLDER = Path(__file__).parent
OPERANDS = ("train", "held_out", "made_up")


@dataclass
class Settings:
    rows: int = 80_000  # how many
    seed: int = 1  # which operands are held out, and which rows are drawn
    operands: str = "train"  # train; held_out: none of training; made_up: words of no language
    out: Path = Path("data/rules/rules.json")  # prepare_alpaca.py reads it


# ---- operands ----

MADE_UP = ("blick florp wug dax zib gorp snarf tove mimsy spong quib flonk trell blorb nerp glim "
           "plonk vorp sneg drib yolp zorch klim brox tazz fep lunt strib mofty wibble").split()
ONSETS = ("b bl br c cl cr d dr f fl fr g gl gr h j k l m n p pl pr r s sh sk sl sm sn sp st str t "
          "th tr tw v w z").split()
VOWELS = "a a e e i i o o u u ee oo ai ou".split()
CODAS = "b ck d f g k l ll m mp n nd ng nk nt p r rb rd rk rm rn rp rt sh sk sp ss st t x".split()
# Not to be invented: verbs that exist and follow no rule, and what is not fit for children.
EXIST = ("bet bid bind bit bleed breed bust cast cling creep fit fling rend rid seek shed shoot "
         "sling slink slit span sped speed spill spit stank stink stood string wed wind").split()
RUDE = re.compile("f[uoa](ck|k|g)|[ck]un?t|[ck]o(ck|k)|d[iy]ck|cum|sh[ia]t|sl[ua]t|tw[ao]t|"
                  "piss|poo|po(rn|p)|boo?b|t[iu]t|n[ie]g|sex|wank|crap|prick|gook|[ck]oon|"
                  "spi[ck]|ass|jap|wog|tard|turd|fart|skank|pimp")


def read_sections(path):
    """A text as {section: lines}; "[name]" opens a section, "#" a line that does not count."""
    sections = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def read_words(path):
    """data/words.txt as (words, irregular): {section: entries}, and of those that follow no rule
    {"nouns": {noun: plural}, "verbs": {verb: past}}."""
    words, irregular = read_sections(path), {}
    for name in words.keys() - {"sentences"}:
        entries = [entry.strip() for line in words[name] for entry in line.split(",")]
        words[name] = [entry for entry in entries if entry]
    for name in ("nouns", "verbs"):
        irregular[name] = dict(entry.split() for entry in words[name] if " " in entry)
        words[name] = [entry.split()[0] for entry in words[name]]
    return words, irregular


def read_known(path):
    """(operands, questions) of the hand-written rows: words, numbers, pairs, "3 kilometers"."""
    operands, questions = set(), set()
    for messages, _ in read_conversations(path):
        questions.update(m["content"] for m in messages if m["role"] == "user")
        for text in (m["content"].lower() for m in messages):
            numbers = re.findall("[0-9]+", text)
            operands.update(re.findall("[a-z]+", text), numbers)
            operands.update(re.findall("[0-9]+ [a-z]+s", text))
            if len(numbers) == 2:
                operands.add(pair(*numbers))
    return operands, questions


def pair(a, b):
    """Two numbers as one operand: 3 and 5 are the same as 5 and 3."""
    return "{} {}".format(*sorted((int(a), int(b))))


class Draw:
    """Draws operands and wordings at random: operands of training alone, or held-out ones alone."""

    def __init__(self, seed, operands):
        self.seed, self.held_out, self.made_up = seed, operands != "train", operands == "made_up"
        self.rng = random.Random(f"{seed} {operands}")
        self.wordings = read_sections(FOLDER / "wordings.txt")
        self.known, self.questions = read_known(FOLDER / "instruction" / "instruction-data.json")
        for lines in self.wordings.values():
            self.known.update(re.findall("[a-z]+", " ".join(lines).lower()))
        words, self.irregular = read_words(FOLDER / "words.txt")
        forms = [form for known in self.irregular.values() for form in known.values()]
        self.real = {*words["nouns"], *words["verbs"], *words["adjectives"], *forms, *EXIST}
        self.lists = {name: list(filter(self.fits, entries)) or entries
                      for name, entries in words.items()}

    def is_held_out(self, operand):
        """Whether an operand is of the tenth that training never sees; crc32 never changes."""
        is_tenth = zlib.crc32(f"{self.seed} {operand}".encode()) % 10 == 0
        return operand in MADE_UP or is_tenth and operand not in self.known

    def fits(self, text):
        """Whether a text is on this draw's side: one word that is held out makes it held out."""
        return any(map(self.is_held_out, re.findall("[a-z]+", text.lower()))) == self.held_out

    def chance(self, share):
        return self.rng.random() < share

    def entry(self, section):
        return self.rng.choice(self.lists[section])

    def invented(self):
        """A word that does not exist but could."""
        if self.made_up and self.chance(0.5):
            return self.rng.choice(MADE_UP)
        while True:
            word = self.rng.choice(ONSETS) + self.rng.choice(VOWELS)
            if self.chance(0.3):
                word += self.rng.choice("bdfklmnprstvz") + self.rng.choice("aeiou")
            word += self.rng.choice(CODAS)
            if word not in self.real and not RUDE.search(word) and self.fits(word):
                return word

    def word(self, *sections):
        """A word of one of these sections, or an invented one."""
        if self.made_up or self.chance(0.33):
            return self.invented()
        return self.entry(self.rng.choice(sections or ("nouns", "nouns", "verbs", "adjectives")))

    def words(self, count):
        words = []
        while len(words) < count:
            word = self.word()
            if word not in words:
                words.append(word)
        return words

    def numbers(self, low, high, operand, count=1):
        """So many numbers from low to high; operand(*numbers) is what they are as an operand. Where
        all that are so small are on the other side, larger ones are drawn."""
        while True:
            numbers = [self.rng.randint(low, int(high)) for _ in range(count)]
            if self.is_held_out(operand(*numbers)) == self.held_out:
                return numbers
            high += 0.02  # one larger after 50 misses

    def number(self, low, high):
        return self.numbers(low, high, str)[0]

    def pair(self, low, high):
        return self.numbers(low, high, pair, 2)

    def ask(self, *sections, **slots):
        """One of the wordings, filled in; "|" stands for a new line."""
        lines = [line for section in sections for line in self.wordings[section]]
        return self.rng.choice(lines).replace("|", "\n").format(**slots)


# ---- the rules: each draws operands, and returns a question and its answer ----

def plural_of(d, noun):
    if noun in d.irregular["nouns"]:
        return d.irregular["nouns"][noun]
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search("(s|x|z|ch|sh)$", noun) else "s")


def past_of(d, verb):
    if verb in d.irregular["verbs"]:
        return d.irregular["verbs"][verb]
    if re.search("[^aeiou]y$", verb):
        return verb[:-1] + "ied"
    if re.search("^(qu|[^aeiou])*[aeiou][^aeiouwxy]$", verb):  # hug: hugged
        return verb + verb[-1] + "ed"
    return verb + ("d" if verb.endswith("e") else "ed")


WORD_RULES = {"plural": plural_of, "past tense": past_of,
              "upper case": lambda d, word: word.upper(),
              "length": lambda d, word: str(len(word)),
              "reverse": lambda d, word: word[::-1]}


def word_for(d, rule):
    sections = {"plural": ["nouns"], "past tense": ["verbs"]}.get(rule, [])
    while len(word := d.word(*sections)) > 5 and rule == "reverse":
        pass  # a long word backwards is too hard
    return word


def about_word(rule):
    def ask(d):
        word = word_for(d, rule)
        return d.ask(rule, w=word), WORD_RULES[rule](d, word)
    return ask


UNITS = {("kilometers", "meters"): 1000, ("meters", "centimeters"): 100,
         ("meters", "millimeters"): 1000, ("centimeters", "millimeters"): 10,
         ("kilograms", "grams"): 1000, ("liters", "milliliters"): 1000,
         ("dollars", "cents"): 100, ("euros", "cents"): 100, ("weeks", "days"): 7}
MEASURES = {"kilograms": "weighs {}", "liters": "holds {}", "dollars": "costs {}",
            "euros": "costs {}", "weeks": "is {} old"}  # all others: is 8 meters long


def convert(d):
    unit, to = d.rng.choice(list(UNITS))
    n, = d.numbers(2, 12 if unit == "weeks" else 30, lambda n: f"{n} {unit}")
    measures = MEASURES.get(unit, "is {} long").format(f"{n} {unit}")
    question = d.ask("unit conversion", n=n, unit=unit, to=to, w=d.word("nouns"), measures=measures)
    return question, f"{n * UNITS[unit, to]} {to}"


def calculate(d, name, a, b):
    """The question of a sum or a difference: "7 + 3", or "Tom has 7 coins and finds 3 more"."""
    sections = [name, f"{name}, story"] if min(a, b) > 1 else [name]  # not "1 coins"
    things = plural_of(d, d.word("nouns"))
    return d.ask(*sections, a=a, b=b, name=d.entry("names"), things=things)


def add(d):
    a, b = d.pair(0, d.rng.choice((12, 12, 20, 99)))
    if d.chance(0.1):
        a, b = 100, d.numbers(0, 20, lambda b: pair(100, b))[0]
    return calculate(d, "sum", a, b), str(a + b)


def subtract(d):
    b, a = sorted(d.pair(0, d.rng.choice((12, 12, 20, 99))))
    return calculate(d, "subtraction", a, b), str(a - b)


def sort_words(d):
    words = d.words(3)
    return d.ask("sorting", w=", ".join(words)), ", ".join(sorted(words))


def letter(d):
    word, which = d.word(), d.rng.choice(("first", "last"))
    verb = d.rng.choice(("start", "begin")) if which == "first" else "end"
    return d.ask("letters", w=word, which=which, verb=verb), word[0 if which == "first" else -1]


def compare(d):
    a, b = d.pair(1, d.rng.choice((9, 99, 99, 999)))
    if a == b:
        return compare(d)
    more = d.rng.choice(("larger", "bigger", "greater", "smaller", "smaller", "lower"))
    wanted = min if more in ("smaller", "lower") else max
    most = "less" if wanted is min else "greater"
    return d.ask("comparison", a=a, b=b, more=more, most=most), str(wanted(a, b))


def count(d):
    n = d.number(1, d.rng.choice((99, 99, 999)))
    answers = {"even": ("even", "odd")[n % 2], "after": n + 1, "before": n - 1}
    name = d.rng.choice(list(answers))
    return d.ask(name, n=n), str(answers[name])


def sequence(d):
    start, step = d.numbers(1, 10, lambda start, step: f"{start} by {step}", 2)
    terms = [str(start + i * step) for i in range(4)]
    return d.ask("sequence", n=", ".join(terms[:3])), terms[3]


def statement(d):
    """The parts of a short sentence: what stands before the verb, the verb, the rest."""
    verb = d.rng.choice(("is", "was", "are", "can", "will"))
    whose = d.rng.choice("The The The My Our Her His Your".split())
    subject = f"{whose} {plural_of(d, d.word('nouns')) if verb == 'are' else d.word('nouns')}"
    if not d.held_out and d.chance(0.3):
        subject = d.entry("things" if verb == "are" else "people")
    if verb in ("can", "will"):
        return subject, verb, d.entry("actions")
    return subject, verb, d.word("adjectives", "adjectives", "colors")


def negate(d):
    subject, verb, rest = statement(d)
    no = "cannot" if verb == "can" else f"{verb} not"
    return d.ask("negation", s=f"{subject} {verb} {rest}."), f"{subject} {no} {rest}."


def sentence(d):
    """A sentence of the list, or one made of words."""
    if not d.made_up and d.chance(0.3):
        return d.entry("sentences")
    if d.chance(0.4):
        return "{} {} {}.".format(*statement(d))
    return d.ask("sentence", a=d.word("nouns"), b=d.word("nouns"), c=d.word("adjectives"))


def repeat(d):
    """Words, numbers or a sentence, to be said again as they are."""
    what = d.rng.choice("words words words sentence sentence word number numbers".split())
    if d.made_up:
        what = what.replace("number", "word")
    several = d.rng.randint(2, 4)
    text = {"words": lambda: d.rng.choice((", ", ", ", " ")).join(d.words(several)),
            "numbers": lambda: ", ".join(str(d.number(1, 999)) for _ in range(several)),
            "sentence": lambda: sentence(d),
            "word": d.word,
            "number": lambda: str(d.number(1, 999))}[what]()
    sections = ["repeat", "repeat one"] if what in ("word", "number") else ["repeat"]
    these = f"these {what}" if what.endswith("s") else f"this {what}"
    return d.ask(*sections, w=text, these=these, what=what), text


def pick_word(d):
    which = d.rng.choice(("first", "last", "middle"))
    if which != "middle" and d.chance(0.25):
        text = sentence(d)
        words, name = re.findall("[a-z]+", text.lower()), "word of a sentence"
    else:
        words = d.words(3 if which == "middle" else d.rng.choice((3, 3, 4)))
        text, name = ", ".join(words), "middle word" if which == "middle" else "word picking"
    return d.ask(name, w=text, which=which), words[{"first": 0, "middle": 1, "last": -1}[which]]


def yes_or_no(d):
    if not d.made_up and d.chance(0.4):
        a, b = d.pair(1, d.rng.choice((9, 99)))
        more = d.rng.choice(("larger", "bigger", "more", "smaller", "less"))
        is_so = a < b if more in ("smaller", "less") else a > b
        return d.ask("yes or no, numbers", a=a, b=b, more=more), "yes" if is_so else "no"
    word, which = d.word(), d.rng.choice(("first", "last"))
    right = word[0 if which == "first" else -1]
    c = right if d.chance(0.5) else d.rng.choice(word + "abcdefghijklmnopqrstuvwxyz")
    verb = d.rng.choice(("start", "begin")) if which == "first" else "end"
    question = d.ask("yes or no, letters", w=word, c=c, which=which, verb=verb)
    return question, "yes" if c == right else "no"


# ---- chats: each draws operands and returns a list of questions and answers ----

FACTS = {  # what is told: (the section of its words, the answer to it, the answer when it is asked)
    "name": ("names", "Hello, {x}! It is nice to meet you.", "Your name is {x}."),
    "color": ("colors", "I will remember: you like {x} best.", "Your favorite color is {x}."),
    "number": ("", "I will remember the number {x}.", "Your number is {x}."),
    "pet": ("animals", "I will remember your {x}.", "Your pet is a {x}."),
    "pet's name": ("names", "{x} is a good name for a pet.", "Your pet is called {x}."),
    "food": ("foods", "I will remember that you like {x}.", "Your favorite food is {x}."),
    "place": ("places", "I hear that {x} is nice.", "You live in {x}."),
}


def fact(d, kind):
    section = FACTS[kind][0]
    return d.entry(section) if section else str(d.number(1, 999))


def tell(d, kind, x):
    return d.ask(f"tell {kind}", x=x), FACTS[kind][1].format(x=x)


def recall(d, kind, x):
    return d.ask(f"ask {kind}"), FACTS[kind][2].format(x=x)


def told(ago):
    """A fact is told, and asked so many turns later."""
    def chat(d):
        kind = d.rng.choice(list(FACTS))
        x = fact(d, kind)
        return [tell(d, kind, x), *[between_turn(d) for _ in range(ago - 1)], recall(d, kind, x)]
    return chat


def two_told(d):
    """Two facts are told, and then asked in any order."""
    facts = [(kind, fact(d, kind)) for kind in d.rng.sample(list(FACTS), 2)]
    return [*[tell(d, *f) for f in facts], *[recall(d, *f) for f in d.rng.sample(facts, 2)]]


def between_turn(d):
    if d.chance(0.15):
        return polite(d)
    return d.rng.choice((about_word("plural"), about_word("past tense"), about_word("length"), add,
                         letter, letter, compare, count, repeat, pick_word))(d)


def polite(d):
    question, answer = d.ask("polite").split("\n")
    return question, answer


def more(d):
    """A sum, and then some more."""
    turns = [add(d)]
    for _ in range(d.rng.choice((1, 1, 2))):
        total = int(turns[-1][1])
        b, = d.numbers(1, 12, lambda b, total=total: pair(total, b))
        turns.append((d.ask("more", b=b), str(total + b)))
    return turns


def other_word(d):
    """A question about a word, and then the same about others: "And of cat?"."""
    rule = d.rng.choice(list(WORD_RULES))
    turns = [about_word(rule)(d)]
    for _ in range(d.rng.choice((1, 1, 2))):
        word = word_for(d, rule)
        turns.append((d.ask("other word", w=word), WORD_RULES[rule](d, word)))
    return turns


def other_letter(d):
    """The first letter of a word, and then the last; or the other way round."""
    word, ends = d.word(), d.rng.sample((("first", "start", 0), ("last", "end", -1)), 2)
    (which, verb, at), (other, _, there) = ends
    return [(d.ask("letters", w=word, which=which, verb=verb), word[at]),
            (d.ask("other letter", which=other), word[there])]


# ---- all of them ----

RULES = {f"rule/{name}": (about_word(name), share) for name, share in (
    ("plural", 5), ("past tense", 6), ("upper case", 2), ("length", 3), ("reverse", 4))}
RULES |= {  # the category of a row: (what makes it, how often)
    "rule/unit conversion": (convert, 7), "rule/sum": (add, 20), "rule/subtraction": (subtract, 7),
    "rule/comparison": (compare, 10), "rule/counting": (count, 12), "rule/sequence": (sequence, 2),
    "rule/sorting": (sort_words, 13), "rule/letters": (letter, 4), "rule/negation": (negate, 4),
    "rule/repeat": (repeat, 8), "rule/word picking": (pick_word, 5),
    "rule/yes or no": (yes_or_no, 5), "chat/other word": (other_word, 2),
    "chat/other letter": (other_letter, 1), "chat/more": (more, 2), "chat/polite": (polite, 1),
    "chat/told 1 turn ago": (told(1), 2), "chat/told 2 turns ago": (told(2), 1),
    "chat/told 3 turns ago": (told(3), 1), "chat/told 4 turns ago": (told(4), 1),
    "chat/two told": (two_told, 1)}
OF_WORDS = {f"rule/{name}" for name in (*WORD_RULES, "sorting", "letters", "negation", "repeat",
                                        "word picking", "yes or no")}
OF_WORDS |= {"chat/other word", "chat/other letter"}  # what made-up words are asked


def make_rows(count, seed, operands):
    """Rows as data/conversation.py's to_messages reads them, of all categories; of made-up words
    those that are about words."""
    draw, rows = Draw(seed, operands), []
    names = [name for name in RULES if name in OF_WORDS or not draw.made_up]
    shares = [RULES[name][1] for name in names]
    while len(rows) < count:
        [name] = draw.rng.choices(names, shares)
        made = RULES[name][0](draw)
        turns = made if isinstance(made, list) else [made]
        if any(question in draw.questions for question, _ in turns):
            continue  # a hand-written row asks this, perhaps one that is held out
        if len(turns) == 1:
            instruction, _, rest = turns[0][0].partition("\n")
            row = {"instruction": instruction, "input": rest, "output": turns[0][1]}
        else:
            row = {"messages": [{"role": role, "content": text} for turn in turns
                                for role, text in zip(("user", "assistant"), turn)]}
        rows.append({**row, "category": name})
    return rows


def main(argv):
    """Write rows. Raises ValueError or OSError for a mistake that a user can fix."""
    s = config.load(Settings, argv, __doc__)
    if s.rows < 1:
        raise UserError(f"rows={s.rows}: must be 1 or more")
    if s.operands not in OPERANDS:
        raise UserError(f"operands={s.operands!r}: use {', '.join(OPERANDS)}")
    lines = map(json.dumps, make_rows(s.rows, s.seed, s.operands))
    write_text(s.out, "[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{s.rows:,} rows -> {s.out}")


if __name__ == "__main__":
    config.run(main)
