"""data/rules.py: every answer is correct, no training row has a held-out operand, the same seed gives the same
bytes. Questions are parsed by their wordings and answered here in a second, independent way."""
import itertools
import json
import re
import tempfile
import zlib
from functools import cache

import pytest

from config import UserError
from data import operands as drawing
from data import rules
from data.conversation import read_conversations
from tests import exam
from tests import test_instruction_data as written

OPERANDS = ("train", "held_out", "made_up")
WRITTEN = drawing.FOLDER / "instruction" / "instruction-data.json"
WORDS = (drawing.FOLDER / "words.txt").read_text(encoding="utf-8")
SLOTS = {"a": r"\d+", "b": r"\d+", "n": r"\d[\d, ]*", "measures": r"\w+ \d+ .+"}


def section_of_words(name):
    section = re.search(rf"\[{name}\]\n(.*?)(\n\[|$)", re.sub("#.*", "", WORDS), re.DOTALL)[1]
    return [entry.strip() for entry in re.split(",|\n", section) if entry.strip()]


IRREGULAR = {name: dict(entry.split() for entry in section_of_words(name) if " " in entry) for name in ("nouns", "verbs")}
LONG = itertools.product(drawing.ONSETS, drawing.VOWELS, drawing.MIDDLES, drawing.ENDS)
RIMING = [onset + rime for onset in drawing.BEFORE_RIMES for rime in section_of_words("rimes")]
INVENTED = {*map("".join, LONG), *RIMING, *map("".join, itertools.product(drawing.SYLLABLES, RIMING))}
MADE_UP = set(section_of_words("made up"))
QUESTIONS = {messages[0]["content"] for messages, _ in read_conversations(WRITTEN)}


@cache
def chats_of(seed, operands, count=2000):
    """Return [(category, [(question, answer), ...]), ...] of generated rows, as read_conversations gives them."""
    with tempfile.TemporaryDirectory() as folder:
        rules.main([f"--rows={count}", f"--seed={seed}", f"--operands={operands}", f"--out={folder}/rows.json"])
        return [(category, [(q["content"], a["content"]) for q, a in zip(messages[::2], messages[1::2])])
                for messages, category in read_conversations(f"{folder}/rows.json")]


@cache
def patterns():
    """Return [(section, pattern of a wording), ...], those with the most fixed text first."""
    found = []
    for section, lines in drawing.read_sections(drawing.FOLDER / "wordings.txt").items():
        for line in lines if section not in ("sentence", "units", "facts") else ():
            line = line.partition("|")[0] if section == "polite" else line.replace("|", "\n")
            parts = re.split(r"\{(\w+)\}", line)
            pattern = "".join(
                re.escape(part) if i % 2 == 0 else f"(?P={part})" if part in parts[1:i:2] else f"(?P<{part}>{SLOTS.get(part, '.+')})"
                for i, part in enumerate(parts))
            found.append((len("".join(parts[::2])), section, re.compile(pattern)))
    return [(section, pattern) for _, section, pattern in sorted(found, key=lambda entry: -entry[0])]


@cache
def parse(question):
    """Return (section, slots) of the wording that a question was made from."""
    for section, pattern in patterns():
        if match := pattern.fullmatch(question):
            return section, match.groupdict()
    raise AssertionError(f"no wording for {question!r}")


# Short follow-up questions, each with the section whose rule answers it; None: the previous question's.
FOLLOWING = {"other word": None, "other letter": "letters", "other comparison": "comparison"}
WITH_WORK = ("sum", "more", "subtraction", "other sum", "other subtraction", "comparison", "sorting")


# ---- the answers ----

def place(s):
    is_first = s.get("which") == "first" or s.get("verb") in ("start", "begin")
    return 0 if is_first else 1 if s.get("which") == "middle" else -1


def ordered(s):
    return sorted([int(s["a"]), int(s["b"])])


def compared(s):
    return ordered(s)[0 if s.get("more", s.get("most")) in ("smaller", "less", "lower") else 1]


def words_in(text):
    return re.findall("[a-z]+", text.lower())


ANSWERS = {
    "plural": lambda s: IRREGULAR["nouns"].get(s["w"], written.plural("", s["w"])),
    "past tense": lambda s: IRREGULAR["verbs"].get(s["w"], written.past("", s["w"])),
    "unit conversion": lambda s: written.convert(s.get("measures", f"{s.get('n')} {s.get('unit')}") + f" to {s['to']}", ""),
    "sum": lambda s: sum(ordered(s)), "sum, story": lambda s: sum(ordered(s)), "more": lambda s: int(s["total"]) + int(s["b"]),
    "subtraction": lambda s: len(range(*ordered(s))), "subtraction, story": lambda s: len(range(*ordered(s))),
    "other sum": lambda s: sum(ordered(s)), "other subtraction": lambda s: len(range(*ordered(s))),
    "sorting": lambda s: ", ".join(sorted(s["w"].split(", "))), "letters": lambda s: s["w"][place(s)],
    "comparison": compared, "even": lambda s: "even" if s["n"][-1] in "02468" else "odd",
    "after": lambda s: int(s["n"]) + 1, "before": lambda s: int(s["n"]) - 1,
    "negation": lambda s: written.negate("", s["s"]), "repeat": lambda s: s["w"], "repeat one": lambda s: s["w"],
    "word picking": lambda s: s["w"].split(", ")[place(s)], "middle word": lambda s: s["w"].split(", ")[1],
    "word of a sentence": lambda s: words_in(s["w"])[place(s)]}


@pytest.mark.parametrize("operands", OPERANDS)
def test_every_answer_is_correct(operands):
    asked = set()
    for _, turns in chats_of(2, operands):
        told, section, slots, last_answer = {}, None, {}, None
        for question, answer in turns:
            last, (section, slots) = (section, slots), parse(question)
            asked.add(section)
            assert question not in QUESTIONS
            if section in FOLLOWING:  # with the previous turn's word or rule
                section, slots = FOLLOWING[section] or last[0], {**last[1], "verb": None, **slots}
            kind = section.partition(" ")[2]
            if section.startswith("tell "):
                told[kind] = slots["x"]
            if section.startswith(("tell ", "ask ")):
                assert re.search(rf"\b{told[kind]}\b", answer), (question, answer)
            elif section != "polite":
                if section.partition(",")[0] in WITH_WORK:
                    answer = written.without_work(section, answer)
                assert answer == str(ANSWERS[section]({**slots, "total": last_answer})), (question, answer)
            last_answer = answer
    if operands == "train":
        assert asked == {section for section, _ in patterns()}
        assert {category for category, _ in chats_of(2, operands)} == set(rules.RULES)
    else:
        assert len({str(turns) for _, turns in chats_of(2, operands)}) == 2000, "a question is repeated"


# ---- the split ----

def test_nothing_held_out_is_trained_on():
    """An operand is held out if the hash picks it and no hand-written row has it; computed here independently."""
    text = WRITTEN.read_text(encoding="utf-8") + (drawing.FOLDER / "wordings.txt").read_text(encoding="utf-8")
    numbers = [re.findall(r"\d+", m["content"]) for messages, _ in read_conversations(WRITTEN) for m in messages]
    known = {*words_in(text), *(" ".join(sorted(two, key=int)) for two in numbers if len(two) == 2)}

    def held_out(operand):
        return operand not in known and zlib.crc32(f"2 {operand}".encode()) % 10 == 0

    def slots_of(operands):
        return [parse(question) for _, turns in chats_of(2, operands) for question, _ in turns]

    def pairs(operands):
        return {" ".join(map(str, ordered(s))) for section, s in slots_of(operands) if section in ("sum", "subtraction", "comparison")}

    trained = {word for _, turns in chats_of(2, "train") for question, _ in turns for word in words_in(question)}
    assert not trained & MADE_UP and not [word for name in ("verbs", "adjectives", "names", "colors", "animals")
                                          for word in map(str.lower, section_of_words(name)) if held_out(word.split()[0]) and word.split()[0] in trained]
    assert not any(map(held_out, pairs("train"))) and all(map(held_out, pairs("held_out")))
    for operands in ("held_out", "made_up"):
        words = [word for section, s in slots_of(operands) if section in ("plural", "letters", "sorting", "word picking")
                 for word in s["w"].split(", ")]
        assert len(words) > 300 and all(held_out(word) or word in MADE_UP for word in words) and not trained & set(words)
    assert max(int(s["a"]) for section, s in slots_of("held_out") if section == "sum") < 105, "as large as in training"
    for _, turns in chats_of(2, "train"):
        for (_, total), (question, _) in itertools.pairwise(turns):
            if parse(question)[0] == "more":
                assert not held_out(" ".join(map(str, sorted([int(total.split(", ")[-1]), int(parse(question)[1]["b"])]))))


# ---- invented words ----

def test_no_invented_word_is_rude_or_irregular():
    rude = re.compile("f[uoa](ck|k|g)|[ck]un?t|[ck]o(ck|k)|d[iy](ck|k)|cum|sh[ia]t|sl[ua]t|tw[aiu]n?t|pis|poo|p[or]+n|pr(a|i)t|ass|"
                      "bo+[bn]|t[iu]t|n[ie]g|nazi|sex|wan[kg]|crap|prick|gook|[ck]oon|spi[ck]|jap|w[oi]p|wog|yid|lez|lesb|nud|klan|"
                      "t[ua]rd|fart|skank|pimp|anal|anus|rap[ei]|peni|semen|clit|vulv|vagi|whor|hoe|slag|moron|cretin|trull|murder|kill")
    assert len(INVENTED) > 50_000 and not [word for word in INVENTED if rude.search(word)]
    draw = drawing.Draw(3, "train")
    drawn = {draw.invented() for _ in range(5000)}
    assert len(drawn) > 4000 and drawn <= INVENTED
    assert not drawn & {"bled", "breed", "ground", "swear", *IRREGULAR["verbs"].values(), *IRREGULAR["nouns"].values()}


def test_the_exam_is_about_words_and_numbers_that_are_in_no_training_row():
    lists = set(words_in(WORDS + WRITTEN.read_text(encoding="utf-8") + (drawing.FOLDER / "wordings.txt").read_text(encoding="utf-8")))
    assert not {*exam.WORDS, *map(str.lower, exam.NAMES)} & {*lists, *INVENTED}
    trained = {" ".join(re.findall(r"\d+", question)) for _, turns in chats_of(2, "train") for question, _ in turns}
    chats = exam.alone(exam.Examiner(2))
    pairs = {" ".join(re.findall(r"\d+", question)) for [(_, question, _)] in chats} - {""}
    assert len(chats) >= 400 and len(pairs) > 100 and not trained & pairs
    assert all(len(chat) == 10 for chat in exam.sessions(exam.Examiner(2), 5))


@pytest.mark.parametrize("answer, result", [("4+7=11, 5+9=14, 14+1=15, 151", "151"), ("4=4, 7>2, 42<47, 47", "47"), ("a, b", "a, b"),
                                            ("t>d, t=t, o>a, d<t: dog, tap, top", "dog, tap, top"), ("boxes", "boxes")])
def test_the_result_of_an_answer_follows_its_work(answer, result):
    assert rules.result_of(answer) == result


def test_answers_without_work_are_the_results_of_those_with_it(tmp_path):
    made = []
    for flag in ("--work=True", "--work=False"):
        rules.main([flag, "--rows=500", f"--out={tmp_path / 'rules.json'}"])
        made.append([[m["content"] for m in messages] for messages, _ in read_conversations(tmp_path / "rules.json")])
    assert made[1] == [[rules.result_of(text) if n % 2 else text for n, text in enumerate(texts)] for texts in made[0]] != made[0]
    assert not [text for texts in made[1] for text in texts[1::2] if re.search("[=<>]", text)]


# ---- the command line ----

def test_the_same_seed_gives_the_same_bytes(tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        rules.main(["--rows=300", f"--seed={seed}", f"--out={tmp_path / name / 'rules.json'}"])
        made.append((tmp_path / name / "rules.json").read_bytes())
    assert made[0] == made[1] != made[2] and len(json.loads(made[0])) == 300


@pytest.mark.parametrize("flag, message", [("--rows=0", "rows=0: must be at least 1"), ("--seed=x", "seed='x'"),
                                           ("--operands=all", "operands=all: must be train or held_out or made_up")])
def test_a_wrong_setting_is_refused(flag, message, tmp_path):
    with pytest.raises(UserError, match=message):
        rules.main([flag, f"--out={tmp_path / 'rules.json'}"])
