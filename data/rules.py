"""Write instruction rows whose answers follow a rule: synthetic data in any amount.

    python -m data.rules                                            # data/rules/rules.json
    python -m data.rules --rows=2500 --operands=held_out --out=data/rules/held_out.json
    python -m data.rules --rows=1200 --operands=made_up --out=data/rules/made_up.json

Test questions use only held-out words, numbers and pairs of numbers (data/operands.py). All rows
use wordings from data/wordings.txt, and none repeats a hand-written row's question word for word.

Where one step is too hard for a small model, the answer shows its work (Nye et al. 2021), in steps
of one digit or letter each: "4+7=11, 5+9=14, 14+1=15, 151" for 54 plus 97.
"""
import json
import re
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path

import config
from config import UserError
from data.files import write_text
from data.operands import Draw, operand


@dataclass
class Settings:
    rows: int = 90_000  # number of rows
    seed: int = 1  # chooses the held-out operands and the rows
    operands: str = "train"  # train; held_out: none from training; made_up: invented words only
    work: bool = True  # False: only the answers, without the steps that lead to them
    out: Path = Path("data/rules/rules.json")  # prepare_alpaca.py reads it


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


def compare_letters(a, b):
    """Return the comparisons of letters or digits, up to the first that differ: ["4=4", "2<7"].
    "-" marks the end of a word."""
    steps = []
    for x, y in zip_longest(a, b, fillvalue="-"):  # "-" is smaller than all letters
        steps.append(f"{x}{'<' if x < y else '>' if x > y else '='}{y}")
        if x != y:
            break
    return steps


def compare_in_steps(a, b, wanted):
    """Return the comparisons of digits, the order of the numbers, and the wanted one: "4=4, 2<7,
    42<47, 47". A missing digit is a 0."""
    width = len(str(max(a, b)))
    steps = compare_letters(f"{a:0{width}}", f"{b:0{width}}")
    return ", ".join([*steps, f"{min(a, b)}<{max(a, b)}", str(wanted)])


def sort_in_steps(words):
    """Return the comparisons of each pair of words, and all words in order: "t>d, t=t, o>a, d<t:
    dog, tap, top" for "top, dog, tap"."""
    steps = [step for a, b in combinations(words, 2) for step in compare_letters(a, b)]
    return f"{', '.join(steps)}: {', '.join(sorted(words))}"


def result_of(answer):
    """Return an answer without its work: "151" for "4+7=11, 5+9=14, 14+1=15, 151", and "dog, top"
    for "t>d: dog, top"."""
    if not re.search("[=<>]", answer):
        return answer
    _, colon, result = answer.rpartition(": ")
    return result if colon else answer.rpartition(", ")[2]


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


# Category of a question about a word: (section of words.txt, function that returns the answer).
WORD_RULES = {"plural": ("nouns", plural_of), "past tense": ("verbs", past_of)}


def about_word(rule, section=None):
    """Return a rule of WORD_RULES, in the wordings of `section`. Three in four words are invented:
    what must be learned is the rule, not the list of irregular words."""
    def ask(d):
        words, answer = WORD_RULES[rule]
        word = d.invented() if d.rng.random() < 0.5 else d.word(words)
        return d.ask(section or rule, w=word), answer(d, word)
    return ask


def convert(d):
    unit, to, factor, measures = d.rng.choice(d.units)
    n, = d.numbers(2, 99, operand=lambda n: f"{n} {unit}")
    slots = dict(n=n, unit=unit, to=to, w=d.word("nouns"), measures=measures.format(f"{n} {unit}"))
    return d.ask("unit conversion", **slots), f"{n * int(factor)} {to}"


SUMS = ((20, 20), (60, 60), (60, 60), (99, 99), (99, 9), (9, 99))
DIFFERENCES = ((30, 30), (99, 99), (99, 9), (30, 9))


def arithmetic(*sections):
    """Return a rule for sums or differences: "7 + 3", or "Tom has 7 coins and finds 3 more"."""
    is_sum = "sum" in sections[0]

    def ask(d):
        a, b = d.numbers(0, *d.rng.choice(SUMS if is_sum else DIFFERENCES))
        if not is_sum:
            a, b = max(a, b), min(a, b)
        slots = dict(a=a, b=b, name=d.entry("names"), things=plural_of(d, d.word("nouns")))
        question = d.ask(*sections[:1 + (min(a, b) > 1)], **slots)  # no story about "1 coins"
        return question, (add_in_steps if is_sum else subtract_in_steps)(a, b)
    return ask


add, subtract = arithmetic("sum", "sum, story"), arithmetic("subtraction", "subtraction, story")


def sort_words(d):
    words = d.words(3)
    return d.ask("sorting", w=", ".join(words)), sort_in_steps(words)


PLACES = (("first", "start", 0), ("first", "begin", 0), ("last", "end", -1), ("last", "end", -1))


def letter(d):
    word, (which, verb, place) = d.word(), d.rng.choice(PLACES)
    return d.ask("letters", w=word, which=which, verb=verb), word[place]


def compare(d, section="comparison", more=None):
    """Ask for the larger or smaller of two numbers. more: the word for it; None: any."""
    tens = 10 * d.rng.randint(1, 9)  # numbers with the same tens are the harder ones
    a, b = d.numbers(*d.rng.choice((
        (1, 99, 99), (1, 99, 99), (1, 99, 99), (1, 99, 9), (1, 9, 99), (1, 999, 99), (1, 999, 999),
        (1, 9999, 9999), (tens, tens + 9, tens + 9), (tens, tens + 9, tens + 9))))
    if a == b:
        return compare(d, section, more)
    words = "larger larger bigger greater smaller smaller smaller lower"
    more = more or d.rng.choice(words.split())
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
    if not d.made_up and d.rng.random() < 0.3:
        return d.entry("sentences")
    return d.ask("sentence", a=d.word("nouns"), b=d.word("nouns"), c=d.word("adjectives"))


def repeat(d):
    """Ask to repeat words, numbers or a sentence, which may lack its capital and period."""
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
            x = d.numbers(1, 999)[0] if section == "numbers" else d.word(section)
            if section in ("names", "places"):
                x = d.rng.choice((x, d.invented()))
                x = x[0].upper() + x[1:]
            told.append((d.ask(f"tell {kind}", x=x), reply.format(x=x)))
            asked.append((d.ask(f"ask {kind}"), answer.format(x=x)))
        return told + [between_turn(d) for _ in range(between)] + d.rng.sample(asked, count)
    return chat


def between_turn(d):
    """Return a turn between stating a fact and the question about it."""
    if d.rng.random() < 0.15:
        return d.ask("polite").split("\n")
    return d.rng.choice((about_word("plural"), about_word("past tense"), add, subtract, sort_words,
                         letter, letter, compare, count, repeat, pick_word))(d)


def more(d):
    """Ask for a sum, then ask to add more to it."""
    turns = [add(d)]
    for _ in range(d.rng.choice((1, 1, 2))):
        total = int(turns[-1][1].split(", ")[-1])
        if total > 70:  # three digits are rare elsewhere
            return more(d)
        b, = d.numbers(1, 20, operand=lambda b, total=total: operand(total, b))
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
    """Ask for the larger or smaller of two numbers, then of others: "And 7 or 12?"."""
    more = d.rng.choice(("larger", "smaller"))
    return followed(lambda d: compare(d, more=more),
                    lambda d: compare(d, "other comparison", more))(d)


other_sum = followed(add, arithmetic("other sum"), arithmetic("other subtraction"))


def other_letter(d):
    """Ask for the first letter of a word, then for the last, or the other way around."""
    word, (which, verb, place) = d.word(), d.rng.choice(PLACES)
    other = "last" if which == "first" else "first"
    return [(d.ask("letters", w=word, which=which, verb=verb), word[place]),
            (d.ask("other letter", which=other), word[-1 - place])]


# ---- all of them ----

# The category of a row: (what makes it, its relative frequency). For made-up words: only these.
# Answers of a category that ends in "(work)" show their work.
ABOUT_WORDS = {
    "rule/plural": (about_word("plural"), 8), "rule/past tense": (about_word("past tense"), 12),
    "rule/sorting (work)": (sort_words, 16),
    "rule/letters": (letter, 6), "rule/negation": (negate, 4), "rule/repeat": (repeat, 13),
    "rule/word picking": (pick_word, 7), "chat/other word": (other_word, 3),
    "chat/other letter": (other_letter, 1)}
RULES = ABOUT_WORDS | {
    "rule/sum (work)": (add, 7), "rule/subtraction (work)": (subtract, 10),
    "rule/unit conversion": (convert, 4), "rule/comparison (work)": (compare, 9),
    "rule/counting": (count, 7), "chat/more (work)": (more, 1),
    "chat/other sum (work)": (other_sum, 2), "chat/other comparison (work)": (other_comparison, 2),
    "chat/told 1 turn ago": (remember(1), 3),
    "chat/told 2 turns ago": (remember(1, 1), 1), "chat/told 3 turns ago": (remember(1, 2), 1),
    "chat/told 4 turns ago": (remember(1, 3), 1), "chat/told 5 turns ago": (remember(1, 4), 1),
    "chat/two told": (remember(2), 1)}


def make_rows(count, seed, operands, work=True):
    """Return `count` rows, as dicts that data/conversation.py reads. Training rows have random
    categories; test rows are spread evenly over them and all different. The same arguments give the
    same rows. operands, work: see Settings."""
    draw, rows, asked, repeated = Draw(seed, operands), [], set(), 0
    rules = ABOUT_WORDS if draw.made_up else RULES
    frequencies = [frequency for _, frequency in rules.values()]
    while len(rows) < count:
        [name] = draw.rng.choices(list(rules), frequencies)
        if draw.held_out:
            name = list(rules)[len(rows) % len(rules)]
        made = rules[name][0](draw)
        turns = made if isinstance(made, list) else [made]
        questions = [question for question, _ in turns]
        if draw.questions.intersection(questions):
            continue  # a hand-written row, perhaps one that is held out
        if draw.held_out and str(questions) in asked:
            repeated += 1
            if repeated > 100 * count:
                raise UserError(f"{name}: has too few different questions for rows={count}")
            continue
        asked.add(str(questions))
        if not work:
            turns = [(question, result_of(answer)) for question, answer in turns]
        messages = [{"role": role, "content": text} for turn in turns
                    for role, text in zip(("user", "assistant"), turn)]
        rows.append({"messages": messages, "category": name})
    return rows


def main(argv):
    """Write rows as JSON. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, rows=(1, None), operands=("train", "held_out", "made_up"))
    lines = map(json.dumps, make_rows(cfg.rows, cfg.seed, cfg.operands, cfg.work))
    write_text(cfg.out, "[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{cfg.rows:,} rows -> {cfg.out}")


if __name__ == "__main__":
    config.run(main)
