"""data/rules.py: every answer is right, nothing held out is in a training row, the same seed gives
the same bytes. Questions are read back by their wordings, and answered here a second, slow way."""
import json
import re
import zlib
from functools import cache

import pytest

import config
from data import rules
from data.conversation import to_messages

WORDS = (rules.FOLDER / "words.txt").read_text(encoding="utf-8")
OF_PAIRS = ("rule/sum", "rule/subtraction", "rule/comparison")
SLOTS = {"a": r"\d+", "b": r"\d+", "n": r"\d[\d, ]*", "c": "[a-z]", "measures": r"\w+ \d+ .+"}


@cache
def rows_of(seed, operands, count=2000):
    return rules.make_rows(count, seed, operands)


def turns_of(row):
    """The (question, answer) pairs of a row, after to_messages has checked it."""
    messages, _ = to_messages(row, "a row")
    return [(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2])]


@cache
def patterns():
    """(section, what a wording matches, how much of it is no slot), the most exact first."""
    found = []
    for section, lines in rules.read_sections(rules.FOLDER / "wordings.txt").items():
        for line in lines if section != "sentence" else ():
            line = line.partition("|")[0] if section == "polite" else line.replace("|", "\n")
            parts = re.split(r"\{(\w+)\}", line)
            seen, pattern = set(), ""
            for i, part in enumerate(parts):
                pattern += re.escape(part) if i % 2 == 0 else f"(?P={part})" if part in seen else \
                    f"(?P<{part}>{SLOTS.get(part, '.+')})"
                seen.update([part] if i % 2 else [])
            found.append((section, re.compile(pattern), len("".join(parts[::2]))))
    return sorted(found, key=lambda entry: -entry[2])


@cache
def parse(question):
    """(section, slots) of the wording that a question is made of."""
    for section, pattern, _ in patterns():
        if match := pattern.fullmatch(question):
            return section, match.groupdict()
    raise AssertionError(f"no wording for {question!r}")


def irregular(word, section):
    entries = re.search(rf"\[{section}\](.*?)\n\[", WORDS, re.DOTALL)[1]
    found = re.search(rf"(?:,|\n)\s*{word} (\w+)", entries)
    return found and found[1]


def inflect(word, section, usual, after_y):
    """A plural or a past, ending by ending."""
    if form := irregular(word, section):
        return form
    if word[-1] == "y" and word[-2] not in "aeiou":
        return word[:-1] + after_y
    return word + usual(word)


def past_ending(word):
    if word[-1] == "e":
        return "d"
    vowels = [c in "aeiou" for c in word.replace("qu", "q")]  # the u of "quib" is none
    doubled = vowels[-2:] == [True, False] and sum(vowels) == 1 and word[-1] not in "wxy"
    return word[-1] + "ed" if doubled else "ed"


def plural_ending(word):
    return "es" if word[-1] in "sxz" or word[-2:] in ("ch", "sh") else "s"


def plural(word):
    return inflect(word, "nouns", plural_ending, "ies")


def past(word):
    return inflect(word, "verbs", past_ending, "ied")


def negated(text):
    words = text.split(" ")
    verbs = ("is", "was", "are", "can", "will")
    at = next(i for i, word in enumerate(words) if i and word in verbs)
    words[at] = "cannot" if words[at] == "can" else words[at] + " not"
    return " ".join(words)


def position(slots):
    first = slots.get("which") == "first" or slots.get("verb") in ("start", "begin")
    return 0 if first else 1 if slots.get("which") == "middle" else -1


def smaller(slots):
    return slots.get("more", slots.get("most")) in ("smaller", "less", "lower")


def yes(is_so):
    return "yes" if is_so else "no"


def ordered(slots):
    return sorted([int(slots["a"]), int(slots["b"])])


def converted(slots):
    if "measures" in slots:
        n, unit = re.search(r"(\d+) ([a-z]+)", slots["measures"]).groups()
        slots = {**slots, "n": n, "unit": unit}
    size = {"kilo": 1000, "": 1, "centi": 0.01, "milli": 0.001}
    if slots["unit"] in ("dollars", "euros", "weeks"):
        return f"{int(slots['n']) * {'cents': 100, 'days': 7}[slots['to']]} {slots['to']}"
    prefix = "(kilo|centi|milli|)(meters|grams|liters)"
    unit, to = (re.fullmatch(prefix, slots[name])[1] for name in ("unit", "to"))
    return f"{round(int(slots['n']) * size[unit] / size[to])} {slots['to']}"


def words_in(text):
    return re.findall("[a-z]+", text.lower())


ANSWERS = {
    "plural": lambda s: plural(s["w"]),
    "past tense": lambda s: past(s["w"]),
    "unit conversion": converted,
    "sum": lambda s: str(sum(ordered(s))),
    "subtraction": lambda s: str(len(range(*ordered(s)))),
    "sum, story": lambda s: str(sum(ordered(s))),
    "subtraction, story": lambda s: str(len(range(*ordered(s)))),
    "sorting": lambda s: ", ".join(sorted(s["w"].split(", "))),
    "letters": lambda s: s["w"][position(s)],
    "comparison": lambda s: str(ordered(s)[0 if smaller(s) else 1]),
    "even": lambda s: "even" if s["n"][-1] in "02468" else "odd",
    "after": lambda s: str(int(s["n"]) + 1),
    "before": lambda s: str(int(s["n"]) - 1),
    "sequence": lambda s: str(2 * int(s["n"].split(", ")[2]) - int(s["n"].split(", ")[1])),
    "negation": lambda s: negated(s["s"]),
    "repeat": lambda s: s["w"],
    "repeat one": lambda s: s["w"],
    "word picking": lambda s: s["w"].split(", ")[position(s)],
    "middle word": lambda s: s["w"].split(", ")[1],
    "word of a sentence": lambda s: words_in(s["w"])[position(s)],
    "reverse": lambda s: "".join(reversed(s["w"])),
    "length": lambda s: str(sum(1 for _ in s["w"])),
    "upper case": lambda s: "".join(chr(ord(c) - 32) for c in s["w"]),
    "yes or no, letters": lambda s: yes(s["w"][position(s)] == s["c"]),
    "yes or no, numbers": lambda s: yes(int(s["a"]) != int(s["b"]) and
                                      int(s["a"]) == ordered(s)[0 if smaller(s) else 1]),
}


def check_turns(turns):
    """Every answer of a conversation, in the light of what was said before."""
    told, last = {}, None
    for question, answer in turns:
        section, slots = parse(question)
        if section == "other word":
            section, slots = last[0], {**last[1], "w": slots["w"]}
        if section == "other letter":
            section, slots = "letters", {"w": last[1]["w"], "which": slots["which"]}
        if section == "more":
            expected = str(int(last[2]) + int(slots["b"]))
        elif section in ANSWERS:
            expected = ANSWERS[section](slots)
        elif section.startswith("tell "):
            told[section[5:]] = expected = slots["x"]
        elif section.startswith("ask "):
            expected = told[section[4:]]
        else:
            expected = answer
            assert section == "polite" and answer.endswith(("!", ".", "?"))
        if section.startswith(("tell ", "ask ")):
            assert re.search(rf"\b{expected}\b", answer), (question, answer)
        else:
            assert answer == expected, (question, answer, expected)
        if section != "more" or last:
            last = (section, slots, answer)


@pytest.mark.parametrize("operands", rules.OPERANDS)
def test_every_answer_is_right(operands):
    for row in rows_of(1, operands):
        check_turns(turns_of(row))


def test_every_rule_and_every_section_of_wordings_is_asked():
    rows, asked = rows_of(1, "train"), set()
    for row in rows:
        asked.update(parse(question)[0] for question, _ in turns_of(row))
    assert {row["category"] for row in rows} == set(rules.RULES)
    assert asked == {section for section, _, _ in patterns()}


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_held_out_is_trained_on(seed):
    """The words and numbers of held-out questions that the hash picks are in no training row."""
    known = rules.Draw(seed, "train").known
    text = (rules.FOLDER / "instruction" / "instruction-data.json").read_text(encoding="utf-8")

    def picked(operand):
        return operand not in known and zlib.crc32(f"{seed} {operand}".encode()) % 10 == 0

    def questions(operands):
        return [question for row in rows_of(seed, operands) for question, _ in turns_of(row)]

    def pairs(operands):
        rows = [row for row in rows_of(seed, operands) if row["category"] in OF_PAIRS]
        found = [re.findall(r"\d+", turns_of(row)[0][0]) for row in rows]
        return {"{} {}".format(*sorted(map(int, two))) for two in found if len(two) == 2}

    words = rules.read_words(rules.FOLDER / "words.txt")[0]
    several = {plural(noun) for noun in words["nouns"]}  # whatever "boxes" hashes to
    trained = {word for question in questions("train") for word in words_in(question)} - several
    for operands in ("held_out", "made_up"):
        asked = {word for question in questions(operands) for word in words_in(question)}
        held_out = set(filter(picked, asked))
        assert len(held_out) > 100 and not held_out & trained
    assert not trained & set(rules.MADE_UP)
    for row in rows_of(seed, "train"):
        if row["category"] == "chat/more":  # each turn adds to the answer before it
            turns = turns_of(row)
            for (_, total), (question, _) in zip(turns, turns[1:]):
                added = re.findall(r"\d+", question)[0]
                assert not picked("{} {}".format(*sorted((int(total), int(added))))), (total, question)
    assert not pairs("train") & pairs("held_out")
    assert all(map(picked, pairs("held_out"))) and not any(map(picked, pairs("train")))
    sections = ("nouns", "verbs", "adjectives", "names", "colors", "animals", "foods")
    entries = [entry for name in sections for entry in words[name]]
    held_out = {entry.lower() for entry in entries if picked(entry.lower())}
    assert 50 < len(held_out) and not held_out & trained
    assert not any(re.search(rf"\b{word}\b", text.lower()) for word in held_out)


def test_questions_of_held_out_rows_are_of_held_out_operands():
    """A sum, a plural and so on of the held-out side has no operand of the other."""
    draw = rules.Draw(1, "held_out")
    for row in rows_of(1, "held_out"):
        for question, _ in turns_of(row):
            section, slots = parse(question)
            if section in ("plural", "past tense", "letters", "length", "upper case", "reverse"):
                assert draw.is_held_out(slots["w"])
            elif section in ("word picking", "middle word", "sorting"):
                assert all(map(draw.is_held_out, slots["w"].split(", ")))


@pytest.mark.parametrize("operands", rules.OPERANDS)
def test_no_hand_written_question_is_made(operands):
    path = rules.FOLDER / "instruction" / "instruction-data.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    written = {turns_of(row)[0][0] for row in rows}
    assert not written & {question for row in rows_of(1, operands) for question, _ in turns_of(row)}


def test_made_up_words_do_not_exist():
    words = set(re.findall(r"[a-z]+", WORDS))
    assert not words & set(rules.MADE_UP)
    assert {"blick", "florp", "wug"} <= set(rules.MADE_UP)


def test_irregular_forms_are_not_invented():
    draw = rules.Draw(3, "train")
    assert not {draw.invented() for _ in range(20_000)} & {"feet", "men", "sang", "dug", "rang", "went"}


def test_held_out_numbers_are_of_the_size_that_is_trained():
    def numbers(operands):
        rows = [row for row in rows_of(1, operands) if row["category"] == "rule/sum"]
        return [int(n) for row in rows for n in re.findall(r"\d+", turns_of(row)[0][0])]
    assert max(numbers("held_out")) <= max(numbers("train")) + 3


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        rules.main(["--rows=300", f"--seed={seed}", f"--out={tmp_path / name / 'rules.json'}"])
        made.append((tmp_path / name / "rules.json").read_bytes())
    assert made[0] == made[1] != made[2]
    assert len(json.loads(made[0])) == 300


@pytest.mark.parametrize("flags, said", [
    (["--rows=0"], "rows=0: must be 1 or more"), (["--rows=many"], "rows='many'"),
    (["--seed=x"], "seed='x'"),
    (["--operands=all"], "operands='all': use train, held_out, made_up")])
def test_a_wrong_setting_gets_one_line(flags, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        rules.main([*flags, f"--out={tmp_path / 'rules.json'}"])
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_gets_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "rules.json"
    monkeypatch.setattr("sys.argv", ["rules", "--rows=5", f"--out={out}"])
    with pytest.raises(SystemExit) as caught:
        config.run(rules.main)
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
