"""The instruction data of this repository: its shape, and every rule row's answer computed again."""
import itertools
import json
import operator
import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROWS = json.loads((Path(__file__).parent.parent / "data" / "instruction" / "instruction-data.json")
                  .read_text(encoding="utf-8"))
UNITS = {("kilometers", "meters"): 1000, ("kilograms", "grams"): 1000, ("liters", "milliliters"): 1000,
         ("weeks", "days"): 7, ("week", "days"): 7, ("dollars", "cents"): 100, ("euros", "cents"): 100,
         ("meters", "centimeters"): 100, ("meters", "millimeters"): 1000, ("centimeters", "millimeters"): 10}


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def word_in(asked, given, before):
    """Return the word that a question is about: its input, or the one after `before`."""
    return given or re.search(rf"(?:{before}) '?([a-z]+)", asked, re.IGNORECASE)[1]


FACT = re.compile(r"(\d\d?)([+-])(\d)=(\d\d?)")  # a step: a one-digit fact
IS_SO = {"<": operator.lt, ">": operator.gt, "=": operator.eq, "+": operator.add, "-": operator.sub}


def without_work(category, answer):
    """Return the last term of an answer that shows its work; check every step."""
    if "sorting" in category:
        work, answer = answer.split(": ")
        for a, b in itertools.combinations(answer.split(", "), 2):  # some step shows that a comes before b
            n = len(os.path.commonprefix([a, b]))
            low, high = (a[n:] or "-")[0], b[n]
            assert f"{low}<{high}" in work or f"{high}>{low}" in work, (work, answer)
        assert all(IS_SO[sign](a, b) for a, sign, b in work.split(", ")), work
        return answer
    *steps, answer = answer.split(", ")
    assert steps
    for step in steps:
        if "comparison" in category:
            a, sign, b = re.split("([<=>])", step)
            assert IS_SO[sign](int(a), int(b)) and (sign == "=") == (step not in steps[-2:]), steps
        else:
            a, sign, b, c = FACT.fullmatch(step).groups()
            assert IS_SO[sign](int(a), int(b)) == int(c), steps
    return answer


# For each rule: the whole question and the input -> the expected output.

def compare(asked, given):
    larger, smaller = (re.search(words, asked) for words in ("larger|bigger|greater", "smaller|less"))
    assert bool(larger) != bool(smaller) and len(numbers(asked)) == 2
    return str((max if larger else min)(numbers(asked)))


def count(asked, given):
    number, = numbers(asked)
    if "even" in asked.lower():
        return "odd" if number % 2 else "even"
    step = 1 if re.search("after|next|Count on", asked) else -1
    assert step == 1 or re.search("before|back", asked)
    return str(number + step)


def letter(asked, given):
    word = word_in(asked, given, "letter of|does|first in|last in")
    first, last = (re.search(words, asked) for words in ("first|start|begin", r"\blast|\bend\b|final"))
    assert bool(first) != bool(last)
    return word[0] if first else word[-1]


def plural(asked, given):
    word = word_in(asked, given, "plural of|one")
    if re.search("[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search("(s|x|z|ch|sh)$", word) else "s")


def past(asked, given):
    verb = word_in(asked, given, "tense of|you write|Today I|Today they")
    if verb.endswith("e"):
        return verb + "d"
    if re.search("[^aeiou]y$", verb):
        return verb[:-1] + "ied"
    doubled = re.fullmatch("(qu|[^aeiou])*[aeiou][^aeiouwxy]", verb)  # stop, stopped
    return verb + (verb[-1] if doubled else "") + "ed"


def negate(asked, given):
    sentence = given or re.search(r"(?:: |')([A-Z][^':]+\.)", asked)[1]
    return re.sub(r"\b(is|are|was|will|can)\b", r"\1 not", sentence, count=1).replace("can not", "cannot")


def convert(asked, given):
    number, large = re.search(r"(\d+) ([a-z]+)", asked).groups()
    words = set(re.findall("[a-z]+", asked.replace(f"{number} {large}", "")))
    small, = words & {to for unit, to in UNITS if unit == large}
    return f"{int(number) * UNITS[large, small]} {small}"


@pytest.mark.parametrize("category, answer", [
    ("sum (work)", lambda asked, given: str(sum(numbers(asked)))), ("comparison (work)", compare), ("counting", count), ("letters", letter),
    ("sorting (work)", lambda asked, given: ", ".join(sorted(re.search(r"[a-z]+, [a-z]+, [a-z]+", asked)[0].split(", ")))),
    ("plural", plural), ("past tense", past), ("negation", negate), ("unit conversion", convert)])
def test_every_answer_follows_its_rule(category, answer):
    rows = [row for row in ROWS if row["category"] == f"rule/{category}"]
    assert len(rows) >= 60
    for row in rows:
        final = without_work(category, row["output"]) if "(work)" in category else row["output"]
        assert final == answer(f"{row['instruction']} {row['input']}".strip(), row["input"]), row


def test_every_row_has_four_texts_and_a_question_of_its_own():
    for row in ROWS:
        assert list(row) == ["instruction", "input", "output", "category"]
        assert all(isinstance(value, str) and value == value.strip() for value in row.values()), row
        assert row["instruction"] and row["output"] and re.fullmatch(r"(rule|fact)/[a-z ]+( \(work\))?", row["category"])
    asked = [" ".join(re.findall(r"\w+", f"{row['instruction']} {row['input']}".lower())) for row in ROWS]
    assert [question for question, times in Counter(asked).items() if times > 1] == []


@pytest.mark.parametrize("pair", "France Paris, Germany Berlin, Italy Rome, Norway Oslo, Iceland Reykjavik, Japan Tokyo".split(", "))
def test_capitals(pair):
    asked = re.compile(rf"\b({pair.replace(' ', '|')})\b")
    rows = [row for row in ROWS if row["category"] == "fact/capital" and asked.search(f"{row['instruction']} {row['input']}")]
    assert rows and all(name in row["output"] for row in rows for name in pair.split())
