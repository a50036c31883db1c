"""The instruction data of this repository: its shape, and every rule row's answer worked out anew."""
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROWS = json.loads((Path(__file__).parent.parent / "data" / "instruction" / "instruction-data.json")
                  .read_text(encoding="utf-8"))


def rule(category):
    """(everything asked, the input, the output) of each row of a rule category."""
    return [(f"{row['instruction']} {row['input']}".strip(), row["input"], row["output"])
            for row in ROWS if row["category"] == f"rule/{category}"]


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def word_in(asked, given, before):
    """The word that is asked about: the input, or the one that follows `before`."""
    return given or re.search(rf"(?:{before}) '?([a-z]+)", asked, re.IGNORECASE)[1]


def wrong(cases):
    """The (asked, expected, output) of a list of these whose output is another one."""
    cases = list(cases)
    assert len(cases) >= 60
    return [case for case in cases if case[1] != case[2]]


def test_every_row_has_the_four_texts_and_no_blanks_around_them():
    for row in ROWS:
        assert list(row) == ["instruction", "input", "output", "category"]
        assert all(isinstance(value, str) and value == value.strip() for value in row.values()), row
        assert row["instruction"] and row["output"]
        assert re.fullmatch(r"(rule|fact)/[a-z ]+", row["category"])


def test_no_question_comes_twice():
    asked = [f"{row['instruction']} {row['input']}".lower() for row in ROWS]
    counts = Counter(" ".join(re.findall(r"\w+", question)) for question in asked)
    assert [question for question, count in counts.items() if count > 1] == []


def test_there_are_enough_rows_of_enough_kinds_in_balance():
    counts = Counter(row["category"] for row in ROWS)
    rules = {name: count for name, count in counts.items() if name.startswith("rule/")}
    assert len(ROWS) >= 1200 and len(counts) >= 14
    assert min(rules.values()) >= 60 and 0.4 <= sum(rules.values()) / len(ROWS) <= 0.6


def test_answers_are_short():
    assert sum(len(row["output"].split()) < 40 for row in ROWS) >= 0.9 * len(ROWS)


def test_sums():
    assert wrong((asked, str(sum(numbers(asked))), output) for asked, _, output in rule("sum")) == []
    assert all(len(numbers(asked)) == 2 for asked, _, _ in rule("sum"))


def test_comparisons():
    def compare(asked):
        larger, smaller = (re.search(words, asked) for words in ("larger|bigger|greater", "smaller|less"))
        assert bool(larger) != bool(smaller) and len(numbers(asked)) == 2
        return str((max if larger else min)(numbers(asked)))

    assert wrong((asked, compare(asked), output) for asked, _, output in rule("comparison")) == []


def test_even_odd_next_and_previous_numbers():
    def answer(asked):
        number, = numbers(asked)
        if "even" in asked.lower():
            return "odd" if number % 2 else "even"
        step = 1 if re.search("after|next|Count on", asked) else -1
        assert step == 1 or re.search("before|back", asked)
        return str(number + step)

    assert wrong((asked, answer(asked), output) for asked, _, output in rule("counting")) == []


def test_first_and_last_letters():
    def answer(asked, given):
        word = word_in(asked, given, "letter of|does|first in|last in")
        first, last = (re.search(words, asked) for words in ("first|start|begin", r"\blast|\bend\b|final"))
        assert bool(first) != bool(last)
        return word[0] if first else word[-1]

    assert wrong((asked, answer(asked, given), output) for asked, given, output in rule("letters")) == []


def test_sorting():
    def answer(asked):
        return ", ".join(sorted(re.search(r"[a-z]+, [a-z]+, [a-z]+", asked)[0].split(", ")))

    assert wrong((asked, answer(asked), output) for asked, _, output in rule("sorting")) == []


def test_plurals():
    def plural(word):
        if re.search("[^aeiou]y$", word):
            return word[:-1] + "ies"
        return word + ("es" if re.search("(s|x|z|ch|sh)$", word) else "s")

    assert wrong((asked, plural(word_in(asked, given, "plural of|one")), output)
                 for asked, given, output in rule("plural")) == []


def test_past_tenses():
    def past(verb):
        if verb.endswith("e"):
            return verb + "d"
        if re.search("[^aeiou]y$", verb):
            return verb[:-1] + "ied"
        if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", verb):  # stop, stopped
            return verb + verb[-1] + "ed"
        return verb + "ed"

    assert wrong((asked, past(word_in(asked, given, "tense of|you write|Today I|Today they")), output)
                 for asked, given, output in rule("past tense")) == []


def test_negations():
    def answer(asked, given):
        sentence = given or re.search(r"(?:: |')([A-Z][^':]+\.)", asked)[1]
        return re.sub(r"\b(is|are|was|will|can)\b", r"\1 not", sentence, count=1).replace("can not", "cannot")

    assert wrong((asked, answer(asked, given), output) for asked, given, output in rule("negation")) == []


UNITS = {("kilometers", "meters"): 1000, ("kilograms", "grams"): 1000, ("liters", "milliliters"): 1000,
         ("weeks", "days"): 7, ("week", "days"): 7, ("dollars", "cents"): 100, ("euros", "cents"): 100,
         ("meters", "centimeters"): 100, ("meters", "millimeters"): 1000, ("centimeters", "millimeters"): 10}


def test_unit_conversions():
    def answer(asked):
        number, large = re.search(r"(\d+) ([a-z]+)", asked).groups()
        words = set(re.findall("[a-z]+", asked.replace(f"{number} {large}", "")))
        small, = words & {to for unit, to in UNITS if unit == large}
        return f"{int(number) * UNITS[large, small]} {small}"

    assert wrong((asked, answer(asked), output) for asked, _, output in rule("unit conversion")) == []


@pytest.mark.parametrize("country, capital", [
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"),
    ("Ireland", "Dublin"), ("Iceland", "Reykjavik"), ("Japan", "Tokyo"), ("Portugal", "Lisbon"),
])
def test_capitals(country, capital):
    rows = [row for row in ROWS if row["category"] == "fact/capital"
            and re.search(rf"\b({country}|{capital})\b", f"{row['instruction']} {row['input']}")]
    assert rows and all(country in row["output"] and capital in row["output"] for row in rows)
