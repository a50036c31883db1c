"""tests/exercises.py: each check fails before its exercise is done, with a hint, and passes with the solution of
tests/solutions.md, applied to a copy of the repository; what is nearly right is told from what is right."""
import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
from tests import exercises
from tests.test_readme import SETTINGS

REPO = Path(__file__).parent.parent
NUMBERS = range(1, len(exercises.EXERCISES) + 1)
# Solutions that do not touch each other are tried together, in one copy.
TOGETHER = ((1, 2, 4, 5, 6, 8), (3,), (7,))


def solutions():
    """{number: [(file, old lines, new lines), ...]}, the hunks of each solution as texts."""
    found = {}
    text = (REPO / "tests" / "solutions.md").read_text(encoding="utf-8")
    for number, diff in re.findall(r"^## (\d+)\..*?```diff\n(.*?)```", text, re.MULTILINE | re.DOTALL):
        for file, hunks in re.findall(r"^--- a/(.+)\n\+\+\+ b/\1\n((?:(?!--- ).*\n)+)", diff, re.MULTILINE):
            for hunk in re.split(r"^@@ .+ @@\n", hunks, flags=re.MULTILINE)[1:]:
                lines = hunk.splitlines(keepends=True)
                assert all(line[0] in " +-\n" for line in lines), hunk
                old = "".join(line[1:] for line in lines if line[0] != "+")
                new = "".join(line[1:] for line in lines if line[0] != "-")
                found.setdefault(int(number), []).append((file, old, new))
    return found


def replaced(text, old, new):
    """A text with `old`, which must be there once, as whole lines, replaced."""
    assert f"\n{text}".count(f"\n{old}") == 1, f"not there once:\n{old}"
    return f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:]


def copy_with(folder, numbers):
    """A copy of what the repository runs by, with these solutions."""
    for name in ("config", "data", "pictures", "tests"):
        shutil.copytree(REPO / name, folder / name, ignore=lambda where, names: [
            n for n in names if n == "__pycache__" or Path(where, n).is_dir() and n != "instruction"])
    for path in REPO.glob("*.py"):
        shutil.copy(path, folder)
    for number in numbers:
        for file, old, new in solutions()[number]:
            text = (folder / file).read_text(encoding="utf-8")
            (folder / file).write_text(replaced(text, old, new), encoding="utf-8", newline="\n")
    return folder


def ask(folder, *argv):
    """What python -m tests.exercises says in a folder: (exit code, standard output, standard error)."""
    ended = subprocess.run([sys.executable, "-m", "tests.exercises", *argv], cwd=folder, capture_output=True,
                           text=True, encoding="utf-8")
    return ended.returncode, ended.stdout, ended.stderr


def marks(listing):
    """{number: whether it is right} of the listing."""
    return {int(n): mark == "right" for n, mark in re.findall(r"^(\d)  (right|not yet) ", listing, re.MULTILINE)}


def test_every_solution_is_there_and_short():
    found = solutions()
    assert list(found) == list(NUMBERS)
    for number, hunks in found.items():
        text = (REPO / "tests" / "solutions.md").read_text(encoding="utf-8")
        diff = re.search(rf"^## {number}\..*?```diff\n(.*?)```", text, re.MULTILINE | re.DOTALL)[1]
        changed = re.findall(r"^(?:\+(?!\+\+ )|-(?!-- )).*", diff, re.MULTILINE)
        assert 0 < len(changed) <= 15, f"{number}: {len(changed)} changed lines"
        assert all(len(line) <= 101 for _, _, new in hunks for line in new.splitlines(keepends=True))


@pytest.mark.parametrize("number", NUMBERS)
def test_before_a_check_says_what_it_saw_and_gives_a_hint(number):
    is_right, text = exercises.result(number)
    assert not is_right
    assert re.fullmatch(rf"{number} is not right yet: .+\nHint: .+", text, re.DOTALL)
    assert len(text.splitlines()) <= 5


def test_the_list_names_all_eight_with_their_tasks_and_files():
    code, out, err = ask(REPO)
    assert (code, err, marks(out)) == (0, "", dict.fromkeys(NUMBERS, False))
    for name in re.findall(r"^ +(\S+\.py): (\w+)", out, re.MULTILINE):
        text = (REPO / name[0]).read_text(encoding="utf-8")
        assert re.search(rf"^(class |    def |def |){name[1]}\b", text, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 100


def test_the_commands_to_go_on_with_pass_the_scripts_own_check(monkeypatch):
    monkeypatch.chdir(REPO)
    source = Path(exercises.__file__).read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"['\"]  python (.+?)(?:\\n)?['\"]\)?$", source, re.MULTILINE)]
    assert len(commands) > 10
    for words in commands:
        name, *argv = words[1:] if words[0] == "-m" else words
        if name != "data.tokenizer":  # it has no settings
            config.load(SETTINGS[name], [word for word in argv if "min_p" not in word])


@pytest.mark.parametrize("numbers", TOGETHER, ids=str)
def test_after_a_solution_the_check_passes(numbers, tmp_path):
    code, out, err = ask(copy_with(tmp_path, numbers))
    assert (code, err) == (0, "")
    assert marks(out) == {number: number in numbers for number in NUMBERS}


def test_all_solutions_are_tried():
    assert sorted(n for numbers in TOGETHER for n in numbers) == list(NUMBERS)


# ---- what is nearly right ----

@contextlib.contextmanager
def modules_of(folder):
    """Within it, what is imported of the repository comes from a copy of it."""
    ours = {"chat", "config", "data", "model", "pictures", "tests"}
    kept = dict(sys.modules), sys.excepthook
    for name in kept[0]:
        if name.split(".")[0] in ours:
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.clear()
        sys.modules.update(kept[0])
        sys.excepthook = kept[1]


TURNED = "q, k = rotate(q, start), rotate(k, start)"
TWICE = 'lambda d, word: f"{word} {word}"'
OWN_LIST = """RULES["rule/own"] = lambda d: (d.ask("twice", w=d.rng.choice(["box", "tree"])), "so"), 4
OF_WORDS = {"""
# (exercise, whether its solution is there, file, what is replaced by what, what the check says of it)
WRONG = [
    (1, True, "data/tokenizer.py", r"\\d{1,3}", r"\\d+", "numbers are 12345|678|2024"),
    (1, True, "data/tokenizer.py", r"\\d{1,3}", r"\\d{3}", "some of it is lost"),
    (1, True, "data/tokenizer.py", r"\\d{1,3}", r"[0-9]{1,3}", "Arabic digits"),
    (1, True, "data/tokenizer.py", 'SPLIT_PATTERN = "[^', 'SPLIT_PATTERN = " ?[^', "what is no number is cut in another way"),
    (2, True, "data/conversation.py", "(ids != end)", "(ids == end)", "learned from: '<|end|><|end|>'"),
    (2, False, "data/conversation.py", "return (ids[nearest] == assistant) & ~is_marker",
     "return (ids != special_ids(enc)[3]) & ~is_marker", "learned from: 'HiHelloByeSalut', which should be 'HelloSalut'"),
    (2, False, "data/conversation.py", "*text, end]", "*text]", "a chat is now written"),
    (3, False, "model.py", "mask = causal_mask(T, S, x.device) if 1 < T < S else None", "mask = None", "place 8"),
    (3, False, "model.py", "masked_fill(~allowed, -math.inf)", "masked_fill(~allowed, 0)", "`attention` only shows"),
    (4, True, "model.py", "mask = head_masks(self.n_head, T, S, x.device)",
     "mask = head_masks(self.n_head, T, S, x.device) if T > 1 else None", "one new token behind cached ones"),
    (4, True, "model.py", "triu(S - T - 7)", "triu(S - T - 8)", "sees tokens 12 to 20; it should see tokens 13 to 20"),
    (4, True, "model.py", "triu(S - T - 7)", "triu(-7)", "(T = 1): head 1 of token 20 sees tokens 1 to 20"),
    (4, True, "model.py", "masks[0] = masks[0].triu", "masks = masks.triu", "head 2 of token 20 sees tokens 13 to 20"),
    (5, True, "data/rules.py", '("twice", 4)', "", "categories that it had before"),
    (5, True, "data/wordings.txt", "[twice]", "[two times]", "asks for 'twice', which is not there"),
    (5, True, "data/wordings.txt", "Write {w} two times.", "Write {word} two times.", "asks for 'word', which is not"),
    (5, True, "data/rules.py", TWICE, 'lambda d, word: f"{word} " * d.rng.randint(1, 2)', "is answered by"),
    (5, True, "data/rules.py", TWICE, "lambda d, word: 2 * len(word)", "rule/twice returned "),
    (5, True, "data/rules.py", TWICE, 'lambda d, word: f"{word} " * random.randint(1, 2)', "other rows from the same seed"),
    (5, True, "data/rules.py", "OF_WORDS = {", OWN_LIST, "is asked in training, and in held_out rows too"),
    (6, False, "model.py", "nn.LayerNorm(config.n_embd, bias=config.bias)", "nn.LayerNorm(config.n_embd, bias=False)",
     "the mean is taken off first"),
    (6, True, "model.py", ".mean(dim=-1", ".sum(dim=-1", "1 2 3 4 becomes 0.183 "),
    (6, True, "model.py", ".mean(dim=-1, keepdim=True)", ".mean(dim=1, keepdim=True)", "each token's alone"),
    (6, True, "model.py", " + 1e-5).sqrt() * self", ").sqrt() * self", "0 0 0 0 becomes nan"),
    (6, True, "model.py", ".sqrt() * self.weight", ".sqrt()", "with the scales"),
    (7, False, "model.py", "x = self.wte(idx) + self.wpe.weight[start:start + T]", "x = self.wte(idx)",
     "q is as it was"),
    (7, True, "model.py", TURNED, "q = rotate(q, start)", "k is as it was"),
    (7, True, "model.py", TURNED, "q, k, v = (rotate(z, start) for z in (q, k, v))", "v is turned"),
    (7, True, "model.py", TURNED, "q, k = rotate(q, 0), rotate(k, 0)", "from token 2 on"),
    (7, True, "model.py", "a * cos - b * sin", "a * cos + b * sin", "does not keep its lengths"),
    (7, True, "model.py", TURNED, "q, k = rotate(q, start), rotate(k, -start)", "from position 7 on than from 0 on"),
    (8, True, "model.py", "probs < min_p * probs.max()", "probs < min_p", "should draw 1 2 3"),
    (8, True, "model.py", "probs < min_p * probs.max()", "logits < min_p * logits.max()", "no id is left"),
    (8, True, "model.py", "min_p * probs.max(), 0, probs", "min_p * probs.max(), probs, 0", "no id is left"),
    (8, True, "chat.py", '"top_p", "min_p", ', '"top_p", ', "does not hand it to sample"),
]


@pytest.mark.parametrize("number, is_solved, file, old, new, said", WRONG)
def test_what_is_nearly_right_is_refused_with_a_hint(number, is_solved, file, old, new, said, tmp_path):
    copy_with(tmp_path, [number] if is_solved else [])
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    with modules_of(tmp_path):
        is_right, text = importlib.import_module("tests.exercises").result(number)
    assert not is_right and said in text and "\nHint: " in text
