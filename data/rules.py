"""Write instruction rows whose answers follow a rule: synthetic data in any amount.

    python -m data.rules                                            # data/rules/rules.json
    python -m data.rules --rows=2500 --operands=held_out --out=data/rules/held_out.json
    python -m data.rules --rows=1200 --operands=made_up --out=data/rules/made_up.json

An operand is what a question is about: a word, a sentence, a pair of numbers. A tenth of them,
chosen by a hash of the seed, are held out: they are in no training row, and test questions use only
them, so that correct answers show that the rule was learned. Words are from data/words.txt, and a
third are invented, since the rules hold for "florp" too. Questions are worded as in
data/wordings.txt. Operands of the hand-written rows are never held out, and none of their questions
is repeated word for word.

Where one step is too hard for a small model, the answer shows its work (Nye et al. 2021), in steps
that use only one-digit facts: "4+7=11, 5+9=14, 14+1=15, 151" for 54 plus 97.
"""
import json
import random
import re
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import config
from data.conversation import read_conversations
from data.files import write_text

FOLDER = Path(__file__).parent


@dataclass
class Settings:
    rows: int = 100_000  # number of rows
    seed: int = 1  # chooses the held-out operands and the rows
    operands: str = "train"  # train; held_out: none of training's; made_up: words of no language
    out: Path = Path("data/rules/rules.json")  # prepare_alpaca.py reads it


# ---- operands ----

# Invented words are an onset and a rime of data/words.txt, or an onset, a vowel, a middle, a vowel
# and a coda. These were chosen so that no combination is or contains a rude word.
ONSETS = "bl br cl dr fl fr gl gr j l m pl qu r sk sm spl st sw thr tr v y z".split()
VOWELS = "a e i o u ee oo ai ou".split()
MIDDLES = "dlmrv"
CODAS = "b d f ft l ll lt m n nd nt rm rn sh x".split()


def read_sections(path):
    """Return {section: lines} of a text file; "[name]" opens a section, "#" a comment."""
    sections = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def read_words(path):
    """Return ({section: entries}, {("nouns" or "verbs", word): irregular form}) of words.txt."""
    words, irregular = read_sections(path), {}
    for name in words.keys() - {"sentences"}:
        entries = [entry.split() for line in words[name] for entry in line.split(",")]
        if name in ("nouns", "verbs"):
            irregular |= {(name, entry[0]): entry[1] for entry in entries if len(entry) == 2}
            entries = [entry[:1] for entry in entries]
        words[name] = [" ".join(entry) for entry in entries if entry]
    return words, irregular


def operand(*numbers):
    """Return numbers as one operand, in which 3 and 5 are the same as 5 and 3: "3 5"."""
    return " ".join(map(str, sorted(numbers)))


def operands_in(text):
    """Return the operands in a text that people wrote: words, numbers, "3 5", "3 kilometers"."""
    numbers = re.findall("[0-9]+", text)
    return {*re.findall("[a-z]+", text.lower()), *re.findall("[0-9]+ [a-z]+s", text), *numbers,
            operand(*map(int, numbers))}


class Draw:
    """Draws random operands and wordings. All operands are on one side of the split: "train" draws
    no held-out ones, "held_out" and "made_up" draw only those."""

    def __init__(self, seed, operands):
        self.seed, self.held_out, self.made_up = seed, operands != "train", operands == "made_up"
        self.rng = random.Random(f"{seed} {operands}")
        self.wordings = read_sections(FOLDER / "wordings.txt")
        written = [[m["content"] for m in messages] for messages, _ in
                   read_conversations(FOLDER / "instruction" / "instruction-data.json")]
        self.questions = {text for texts in written for text in texts[::2]}
        self.known = set().union(*map(operands_in, chain(*written, *self.wordings.values())))
        words, self.irregular = read_words(FOLDER / "words.txt")
        self.made_up_words, self.rimes = words.pop("made up"), words.pop("rimes")
        self.real = set().union(*words.values())
        self.units, self.facts = ([line.split("; ") for line in self.wordings.pop(name)]
                                  for name in ("units", "facts"))
        self.lists = {name: list(filter(self.fits, entries)) or entries
                      for name, entries in words.items()}

    def is_held_out(self, operand):
        """Whether an operand is one of the tenth that training never sees."""
        is_tenth = zlib.crc32(f"{self.seed} {operand}".encode()) % 10 == 0
        return operand in self.made_up_words or is_tenth and operand not in self.known

    def fits(self, text):
        """Whether a text is on this side of the split. One held-out word makes it held out."""
        return any(map(self.is_held_out, re.findall("[a-z]+", text.lower()))) == self.held_out

    def entry(self, section):
        return self.rng.choice(self.lists[section])

    def invented(self):
        """Return a word that does not exist but could."""
        choose = self.rng.choice
        if self.made_up and self.rng.random() < 0.3:
            return choose(self.made_up_words)
        while True:
            word = choose(ONSETS)
            if self.rng.random() < 0.6:
                word += choose(self.rimes)
            else:
                word += choose(VOWELS) + choose(MIDDLES) + choose("aeiou") + choose(CODAS)
            if word not in self.real and self.fits(word):
                return word

    def word(self, *sections):
        """Return a word of one of these sections, or an invented one."""
        if self.made_up or self.rng.random() < 0.33:
            return self.invented()
        return self.entry(self.rng.choice(sections or ("nouns", "nouns", "verbs", "adjectives")))

    def words(self, count):
        words = []
        while len(words) < count:
            word = self.word()
            if word not in words:
                words.append(word)
        return words

    def numbers(self, low, *highs, operand=operand):
        """Return a number from low to each of `highs`; operand(*numbers) is on this side of the
        split. Where that is true of none, larger ones are drawn. 0 and 1 make most questions
        trivial: tests have none."""
        low = max(low, 2) if self.held_out else low
        while True:
            numbers = [self.rng.randint(low, int(high)) for high in highs]
            if self.is_held_out(operand(*numbers)) == self.held_out:
                return numbers
            highs = [high + 0.02 for high in highs]  # larger by one after 50 misses

    def ask(self, *sections, **slots):
        """Return a wording of one of the sections, with its slots filled in."""
        lines = [line for section in sections for line in self.wordings[section]]
        return self.rng.choice(lines).replace("|", "\n").format(**slots)


# ---- work shown ----

def add_in_steps(a, b):
    """Return the steps of a sum and the sum: "4+7=11, 5+9=14, 14+1=15, 151"."""
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    steps = [f"{a % 10}+{b % 10}={ones}"]
    if max(a, b) > 9:
        steps += [f"{a // 10}+{b // 10}={tens}"] + [f"{tens}+1={tens + 1}"] * (ones > 9)
    return ", ".join([*steps, str(a + b)])


def subtract_in_steps(a, b):
    """Return the steps of a difference and the difference: "13-8=5, 9-1=8, 8-1=7, 75"."""
    borrows, tens = a % 10 < b % 10, a // 10 - b // 10
    ones = a % 10 + 10 * borrows
    steps = [f"{ones}-{b % 10}={ones - b % 10}"]
    if a > 9:
        steps += [f"{a // 10}-{b // 10}={tens}"] + [f"{tens}-1={tens - 1}"] * borrows
    return ", ".join([*steps, str(a - b)])


def compare_in_steps(a, b, wanted):
    """Return the comparisons of digits, up to the first that differ, and the wanted number:
    "4=4, 7>2, 47". A missing digit is a 0."""
    steps, width = [], len(str(max(a, b)))
    for x, y in zip(f"{a:0{width}}", f"{b:0{width}}"):
        steps.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
        if x != y:
            break
    return ", ".join([*steps, str(wanted)])


def sort_in_steps(words):
    """Return the shortest prefixes that tell the words apart, and the words, both in order:
    "d, pep, per: deep, pepper, perp"."""
    def prefix(word):
        others = [other for other in words if other != word]
        lengths = (n for n in range(1, len(word))
                   if not any(other.startswith(word[:n]) for other in others))
        return word[:next(lengths, len(word))]
    return f"{', '.join(map(prefix, sorted(words)))}: {', '.join(sorted(words))}"


# ---- the rules: each draws operands and returns a question and its answer ----

def plural_of(d, noun):
    usual = noun + ("es" if re.search("(s|x|z|ch|sh)$", noun) else "s")
    if re.search("[^aeiou]y$", noun):
        usual = noun[:-1] + "ies"
    return d.irregular.get(("nouns", noun), usual)


def past_of(d, verb):
    usual = verb + ("d" if verb.endswith("e") else "ed")
    if re.search("[^aeiou]y$", verb):
        usual = verb[:-1] + "ied"
    if re.search("^(qu|[^aeiou])*[aeiou][^aeiouwxy]$", verb):  # hug: hugged
        usual = verb + verb[-1] + "ed"
    return d.irregular.get(("verbs", verb), usual)


# The category of such a question: the section of its words, and its answer.
WORD_RULES = {"plural": ("nouns", plural_of), "past tense": ("verbs", past_of),
              "upper case": ("nouns", lambda d, word: word.upper())}


def about_word(rule, section=None):
    def ask(d):
        words, answer = WORD_RULES[rule]
        word = d.word(words)
        return d.ask(section or rule, w=word), answer(d, word)
    return ask


def convert(d):
    unit, to, factor, measures = d.rng.choice(d.units)
    n, = d.numbers(2, 12 if unit == "weeks" else 60, operand=lambda n: f"{n} {unit}")
    slots = dict(n=n, unit=unit, to=to, w=d.word("nouns"), measures=measures.format(f"{n} {unit}"))
    return d.ask("unit conversion", **slots), f"{n * int(factor)} {to}"


SUMS = ((20, 20), (60, 60), (60, 60), (99, 99), (99, 9), (9, 99))
DIFFERENCES = ((30, 30), (99, 99), (99, 99), (99, 9), (30, 9))


def arithmetic(d, *sections):
    """Ask for a sum or a difference: "7 + 3", or "Tom has 7 coins and finds 3 more"."""
    a, b = d.numbers(0, *d.rng.choice(SUMS if "sum" in sections[0] else DIFFERENCES))
    if "subtraction" in sections[0]:
        a, b = max(a, b), min(a, b)
    steps = (add_in_steps if "sum" in sections[0] else subtract_in_steps)(a, b)
    slots = dict(a=a, b=b, name=d.entry("names"), things=plural_of(d, d.word("nouns")))
    return d.ask(*sections[:1 + (min(a, b) > 1)], **slots), steps  # no story about "1 coins"


def add(d):
    return arithmetic(d, "sum", "sum, story")


def subtract(d):
    return arithmetic(d, "subtraction", "subtraction, story")


def sort_words(d):
    words = d.words(3)
    return d.ask("sorting", w=", ".join(words)), sort_in_steps(words)


ENDS = (("first", "start", 0), ("first", "begin", 0), ("last", "end", -1), ("last", "end", -1))


def letter(d):
    word, (which, verb, place) = d.word(), d.rng.choice(ENDS)
    return d.ask("letters", w=word, which=which, verb=verb), word[place]


def compare(d, section="comparison", more=None):
    tens = 10 * d.rng.randint(1, 9)  # numbers with the same tens are the harder ones
    a, b = d.numbers(*d.rng.choice((
        (1, 99, 99), (1, 99, 9), (1, 9, 99), (tens, tens + 9, tens + 9), (1, 999, 999),
        (1, 9999, 999), (1, 9999, 9999))))
    if a == b:
        return compare(d, section, more)
    more = more or d.rng.choice(("larger", "bigger", "greater", "smaller", "smaller", "lower"))
    wanted, most = (min, "less") if more in ("smaller", "lower") else (max, "greater")
    return d.ask(section, a=a, b=b, more=more, most=most), compare_in_steps(a, b, wanted(a, b))


def count(d):
    n, = d.numbers(1, d.rng.choice((99, 99, 999, 9999)))
    answers = {"even": ("even", "odd")[n % 2], "after": n + 1, "before": n - 1}
    name = d.rng.choice(list(answers))
    return d.ask(name, n=n), str(answers[name])


def statement(d):
    """Return the parts of a short sentence: its subject, its verb, and the rest."""
    verb = d.rng.choice(("is", "was", "are", "can", "will"))
    noun = plural_of(d, d.word("nouns")) if verb == "are" else d.word("nouns")
    subject = f"{d.rng.choice('The The The My Our Her His Your'.split())} {noun}"
    if not d.held_out and d.rng.random() < 0.3:
        subject = d.entry("things" if verb == "are" else "people")
    if verb in ("can", "will"):
        return subject, verb, d.entry("actions")
    return subject, verb, d.word("adjectives", "adjectives", "colors")


def negate(d):
    subject, verb, rest = statement(d)
    negated = "cannot" if verb == "can" else f"{verb} not"
    return d.ask("negation", s=f"{subject} {verb} {rest}."), f"{subject} {negated} {rest}."


def sentence(d):
    """Return a sentence of data/words.txt, or one made of words."""
    if not d.made_up and d.rng.random() < 0.3:
        return d.entry("sentences")
    if d.rng.random() < 0.3:
        return "{} {} {}.".format(*statement(d))
    return d.ask("sentence", a=d.word("nouns"), b=d.word("nouns"), c=d.word("adjectives"))


def repeat(d):
    """Ask to repeat words, numbers or a sentence, half of them in lower case, without a mark."""
    what = d.rng.choice("words words words sentence sentence sentence word number numbers".split())
    if d.made_up:
        what = what.replace("number", "word")
    several = d.rng.randint(2, 4) if what.endswith("s") else 1
    if what == "sentence":
        texts = [sentence(d)]
        if d.rng.random() < 0.5 and not texts[0].startswith("I "):
            texts = [(texts[0][0].lower() + texts[0][1:]).strip(".?!")]
    else:
        texts = (d.words(several) if what.startswith("word") else
                 [str(d.numbers(1, 9999)[0]) for _ in range(several)])
    text = d.rng.choice((", ", ", ", " ", " and ")).join(texts)
    sections = ["repeat", "repeat one"] if what in ("word", "number") else ["repeat"]
    these = f"these {what}" if what.endswith("s") else f"this {what}"
    return d.ask(*sections, w=text, these=these, what=what), text


def pick_word(d):
    which = d.rng.choice(("first", "last", "middle"))
    if which != "middle" and d.rng.random() < 0.25:
        text = sentence(d)
        words, name = re.findall("[a-z]+", text.lower()), "word of a sentence"
    else:
        words = d.words(3 if which == "middle" else d.rng.choice((3, 3, 4)))
        text, name = ", ".join(words), "middle word" if which == "middle" else "word picking"
    return d.ask(name, w=text, which=which), words[{"first": 0, "middle": 1, "last": -1}[which]]


# ---- chats: each draws operands and returns a list of questions and answers ----

def remember(count, between=0):
    """Return a chat rule: `count` facts are told, `between` other turns follow, then the facts are
    asked for in any order."""
    def chat(d):
        told, asked = [], []
        for kind, section, reply, answer in d.rng.sample(d.facts, count):
            x = d.entry(section) if section != "numbers" else d.numbers(1, 999)[0]
            told.append((d.ask(f"tell {kind}", x=x), reply.format(x=x)))
            asked.append((d.ask(f"ask {kind}"), answer.format(x=x)))
        return told + [between_turn(d) for _ in range(between)] + d.rng.sample(asked, count)
    return chat


def between_turn(d):
    if d.rng.random() < 0.15:
        return polite(d)
    return d.rng.choice((about_word("plural"), about_word("past tense"), add, subtract, sort_words,
                         letter, letter, compare, count, repeat, pick_word))(d)


def polite(d):
    question, answer = d.ask("polite").split("\n")
    return question, answer


def more(d):
    """Ask for a sum, then to add more to it."""
    turns = [add(d)]
    for _ in range(d.rng.choice((1, 1, 2))):
        total = int(turns[-1][1].split(", ")[-1])
        b, = d.numbers(1, 12, operand=lambda b, total=total: operand(total, b))
        turns.append((d.ask("more", b=b), add_in_steps(total, b)))
    return turns


def followed(first, *others):
    """Return a chat rule: a question, then one or two shorter ones of the same kind."""
    def chat(d):
        return [first(d)] + [d.rng.choice(others)(d) for _ in range(d.rng.choice((1, 1, 2)))]
    return chat


def other_word(d):
    """Ask a question about a word, then the same about others: "And of cat?"."""
    rule = d.rng.choice(list(WORD_RULES))
    return followed(about_word(rule), about_word(rule, "other word"))(d)


def other_comparison(d):
    """Ask which of two numbers is larger, or smaller, then the same of others: "And 7 or 12?"."""
    more = d.rng.choice(("larger", "smaller"))
    return followed(lambda d: compare(d, more=more),
                    lambda d: compare(d, "other comparison", more))(d)


other_sum = followed(add, lambda d: arithmetic(d, "other sum"),
                     lambda d: arithmetic(d, "other subtraction"))


def other_letter(d):
    """Ask for the first letter of a word, then for the last, or the other way round."""
    word, (which, verb, place) = d.word(), d.rng.choice(ENDS)
    other = "last" if which == "first" else "first"
    return [(d.ask("letters", w=word, which=which, verb=verb), word[place]),
            (d.ask("other letter", which=other), word[-1 - place])]


# ---- all of them ----

# The category of a row: (what makes it, its relative frequency). Made-up words get the first kind.
# Answers of a category that ends in "(work)" show their work.
ABOUT_WORDS = {
    "rule/plural": (about_word("plural"), 5), "rule/past tense": (about_word("past tense"), 6),
    "rule/upper case": (about_word("upper case"), 3), "rule/sorting (work)": (sort_words, 12),
    "rule/letters": (letter, 4), "rule/negation": (negate, 4), "rule/repeat": (repeat, 10),
    "rule/word picking": (pick_word, 5), "chat/other word": (other_word, 3),
    "chat/other letter": (other_letter, 1)}
RULES = ABOUT_WORDS | {
    "rule/sum (work)": (add, 14), "rule/subtraction (work)": (subtract, 12),
    "rule/unit conversion": (convert, 6), "rule/comparison (work)": (compare, 8),
    "rule/counting": (count, 7), "chat/more (work)": (more, 1),
    "chat/other sum (work)": (other_sum, 4), "chat/other comparison (work)": (other_comparison, 2),
    "chat/polite": (polite, 1), "chat/told 1 turn ago": (remember(1), 2),
    "chat/told 2 turns ago": (remember(1, 1), 1), "chat/told 3 turns ago": (remember(1, 2), 1),
    "chat/told 4 turns ago": (remember(1, 3), 1), "chat/told 5 turns ago": (remember(1, 4), 1),
    "chat/two told": (remember(2), 1)}


def make_rows(count, seed, operands):
    """Return `count` rows, as dicts that data/conversation.py reads: random categories for
    training, for tests as many of each, all different. The same arguments give the same rows.
    operands: see Settings."""
    draw, rows, asked = Draw(seed, operands), [], set()
    rules = dict(ABOUT_WORDS if draw.made_up else RULES)
    if draw.held_out:
        rules.pop("chat/polite", None)  # it has no operands
    while len(rows) < count:
        [name] = draw.rng.choices(list(rules), [frequency for _, frequency in rules.values()])
        if draw.held_out:
            name = list(rules)[len(rows) % len(rules)]
        made = rules[name][0](draw)
        turns = made if isinstance(made, list) else [made]
        questions = tuple(question for question, _ in turns)
        if draw.questions & {*questions} or draw.held_out and questions in asked:
            continue  # a hand-written row asks this and may be held out, or this is a repetition
        asked.add(questions)
        if len(turns) == 1:
            instruction, _, rest = turns[0][0].partition("\n")
            row = {"instruction": instruction, "input": rest, "output": turns[0][1]}
        else:
            row = {"messages": [{"role": role, "content": text} for turn in turns
                                for role, text in zip(("user", "assistant"), turn)]}
        rows.append({**row, "category": name})
    return rows


def main(argv):
    """Write rows as JSON. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, rows=(1, None), operands=("train", "held_out", "made_up"))
    lines = map(json.dumps, make_rows(cfg.rows, cfg.seed, cfg.operands))
    write_text(cfg.out, "[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{cfg.rows:,} rows -> {cfg.out}")


if __name__ == "__main__":
    config.run(main)
