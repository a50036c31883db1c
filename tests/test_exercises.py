"""tests/exercises.py: each check fails before its exercise is solved and passes with the solution in tests/solutions.md,
applied to a copy of the repository; near misses get the right hint."""
import contextlib
import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import config
from tests import exercises
from tests.test_readme import settings_of

NUMBERS = range(1, len(exercises.EXERCISES) + 1)
SOLUTIONS = (config.REPO / "tests" / "solutions.md").read_text(encoding="utf-8")
DIFFS = {int(number): diff for number, diff in re.findall(
    r"^## (\d+)\..*?```diff\n(.*?)```", SOLUTIONS, re.MULTILINE | re.DOTALL)}
TOGETHER = ((1, 2, 4, 5, 6, 8), (3, 7))  # solutions that change different lines share a copy


def copy_with(folder, numbers):
    """Copy the repository's code to a folder and apply these solutions."""
    for name in ("config", "data", "runtime", "tests"):
        shutil.copytree(config.REPO / name, folder / name, ignore=lambda where, names: [
            n for n in names if n == "__pycache__" or Path(where, n).is_dir() and n != "instruction"])
    for path in config.REPO.glob("*.py"):
        shutil.copy(path, folder)
    for number in numbers:
        for file, hunks in re.findall(r"^--- a/(.+)\n\+\+\+ b/\1\n((?:(?!--- ).*\n)+)", DIFFS[number], re.MULTILINE):
            for hunk in re.split(r"^@@ .+ @@\n", hunks, flags=re.MULTILINE)[1:]:
                old, new = ("".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] != sign)
                            for sign in "+-")
                replace(folder / file, f"\n{old}", f"\n{new}")
    return folder


def replace(path, old, new):
    """Replace the only occurrence of a text in a file."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: not there exactly once: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8", newline="\n")


@contextlib.contextmanager
def modules_of(folder):
    """Context manager: import the repository's modules from a copy of it."""
    def take():
        ours = ("chat", "config", "data", "model", "runtime", "tests")
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ours}

    kept = take()
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        take()
        sys.modules.update(kept)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_unsolved_exercise_shows_what_was_seen_and_a_hint(number):
    solved, text = exercises.result(number)
    assert not solved
    assert re.fullmatch(rf"Exercise {number} does not pass yet: .+\nHint: .+", text)


@pytest.mark.parametrize("numbers", TOGETHER, ids=str)
def test_a_solution_passes_its_check(numbers, tmp_path, capsys):
    with modules_of(copy_with(tmp_path, numbers)):
        importlib.import_module("tests.exercises").main([])
    marks = re.findall(r"^(\d)  (passes|not yet) ", capsys.readouterr().out, re.MULTILINE)
    assert marks == [(str(n), "passes" if n in numbers else "not yet") for n in NUMBERS]


def test_the_commands_shown_after_a_check_have_valid_settings(monkeypatch):
    monkeypatch.chdir(config.REPO)
    source = Path(exercises.__file__).read_text(encoding="utf-8")
    commands = re.findall(r"['\"]  python (.+?)(?:\\n)?['\"]\)?$", source, re.MULTILINE)
    assert len(commands) > 10
    for name, *argv in (shlex.split(line.removeprefix("-m ")) for line in commands):
        if settings := settings_of(name):
            config.load(settings, [word for word in argv if "min_p" not in word])


def test_a_solved_fifth_exercise_trains_on_products(tmp_path, monkeypatch):
    copy_with(tmp_path, [5])
    with modules_of(tmp_path):
        solved = importlib.import_module("tests.exercises")
        solved.PRODUCT_STEPS = 2
        assert re.search(r"computes \d+ of \d\d products that it has never seen, such as 'What is \d+", solved.train_on_products())


# (exercise, whether its solution is applied first, file, old text, new text, what the check prints)
ROTATE = "q, k = rotate(q, start), rotate(k, start)"
NEAR_MISSES = [
    (1, True, "data/tokenizer.py", r"\\d{1,3}", r"\\d+", "numbers are 12345|678|2024"),
    (1, True, "data/tokenizer.py", r"\\d{1,3}", r"\\d{3}", "characters are lost"),
    (2, True, "data/conversation.py", "(ids != end)", "(ids == end)", "in the loss: '<|end|><|end|>'"),
    (2, True, "data/conversation.py", "(ids[last] == assistant) & ", "", "it should be 'HelloSalut'"),
    (3, False, "model.py", "is_causal=start == 0", "is_causal=False", "The fused kernel is not checked"),
    (4, True, "model.py", "triu(S - T - 7)", "triu(-7)", "(T = 1): head 1 at token 20 attends to tokens [1, 2"),
    (4, True, "model.py", "mask[0] = mask[0].triu", "mask = mask.triu", "head 2 at token 20 attends to tokens [13"),
    (5, True, "data/wordings.txt", "[product]", "[times]", "a rule asks for 'product'"),
    (5, True, "data/rules.py", "str(a * b)", "str(a + b)", "has the answer"),
    (5, True, "data/rules.py", "[*steps, str(a * b)]", "[str(a * b)]", "without steps"),
    (5, True, "data/rules.py", "a, b = d.numbers(2, 99, 9)", "a, b = d.rng.randint(2, 99), d.rng.randint(2, 9)", "a held-out row"),
    (5, True, "data/rules.py", "a, b = d.numbers(2, 99, 9)", "a, b = __import__('random').randint(2, 99), 3", "the same seed"),
    (6, True, "model.py", ".mean(dim=-1", ".sum(dim=-1", "1 2 3 4 becomes 0.183 "),
    (7, True, "model.py", ROTATE, "q = rotate(q, start)", "were swapped"),
    (7, True, "model.py", ROTATE, "k = rotate(k, start)", "7 positions later"),
    (7, True, "model.py", ROTATE, "q, k, v = (rotate(z, start) for z in (q, k, v))", "7 positions later"),
    (7, True, "model.py", ROTATE, "q, k = rotate(q, 0), rotate(k, 0)", "from token 2 on"),
    (8, True, "model.py", "probs < min_p * probs.max()", "probs < min_p", "should sample [1, 2, 3]"),
    (8, True, "chat.py", '"top_p", "min_p", ', '"top_p", ', "does not give the same reply"),
]


@pytest.mark.parametrize("number, solved, file, old, new, said", NEAR_MISSES)
def test_a_near_miss_gets_its_hint(number, solved, file, old, new, said, tmp_path):
    copy_with(tmp_path, [number] if solved else [])
    replace(tmp_path / file, old, new)
    with modules_of(tmp_path):
        passed, text = importlib.import_module("tests.exercises").result(number)
    assert not passed and said in text and "\nHint: " in text
