"""What the README, docstrings and comments refer to exists: the settings in their commands, files, functions, pictures."""
import importlib
import re
import shlex
from pathlib import Path

import pytest

import config
from tests import bench

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
OVERVIEW = README[README.index("# The journey"):README.index("## 1. ")]  # the table of files to read
SOURCES = [path for folder in (".", "config", "data", "runtime") for path in sorted((REPO / folder).glob("*.py"))]


def settings_of(name):
    """Return the settings class of a script, such as "train.py" or "data.rules"; None if it has no settings."""
    module = importlib.import_module(name.removesuffix(".py"))
    return getattr(module, "Settings", None)


def commands():
    """Return the words of each python or torchrun command in the README, in docstrings and in comments."""
    found = set()
    for path in (REPO / "README.md", REPO / "tests" / "bench.py", *SOURCES):
        text = path.read_text(encoding="utf-8")
        lines = re.findall(r"^(?:    |# )((?:python|torchrun) .+)", text, re.MULTILINE)
        lines += re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
        for line in (part for whole in lines for part in re.split(" && |; (?=python )", whole)):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                continue
            ends = [i for i, word in enumerate(words) if word in "<|" or word.startswith(("(", "config/..."))]
            found.add(tuple(words[:min(ends, default=None)]))
    return sorted(found)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_has_valid_settings(words, monkeypatch):
    monkeypatch.chdir(REPO)
    skipped = 2 if words[:2] == ("python", "-m") else 1
    ours = [word for word in words[skipped:] if not re.match("--(nproc_per_node|max-restarts)=", word)]
    if not ours or ours[0] == "venv" or "--help" in ours:
        return
    name, *argv = ours
    if name == "tests.bench":
        assert {word for word in argv if not word.startswith("-")} <= bench.PARTS.keys()
        argv = [word for word in argv if word.startswith("-")]
    if settings := settings_of(name):
        config.load(settings, argv)


def test_every_script_has_a_command():
    named = {word for words in commands() for word in words[:3]}
    assert named >= {"train.py", "finetune.py", "chat.py", "prepare_alpaca.py", "data.text", "data.rules", "data.fineweb",
                     "data.tokenizer", "runtime.export", "tests.bench", "tests.exercises", "torchrun"}
    assert len(commands()) > 40


def test_everything_the_readme_recommends_reading_exists():
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    steps = re.findall(r"\*\*Read\*\*(.+?)\n- \*\*Exercise", README, re.DOTALL)
    assert len(steps) == 8, "one in each step"
    for name in re.findall(r"`([\w./]+)`", " ".join(steps)):
        assert (REPO / name).is_file() or re.search(rf"(def|class) {name.split('.')[-1]}\b", code), name
    places = re.findall(r"^\| `(\S+?)` \|.*\|([^|]*)\|$", OVERVIEW, re.MULTILINE)
    assert len(places) >= 5
    for file, names in places:
        text = (REPO / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w./]+)`", names):
            assert (REPO / name).is_file() or re.search(rf"(def|class) {name.split('.')[-1]}\b", text), name


def test_the_line_counts_are_right():
    counts = {file: int(lines) for file, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+)", OVERVIEW, re.MULTILINE)}
    actual = {file: (REPO / file).read_text(encoding="utf-8").count("\n") for file in counts}
    assert counts and all(abs(counts[file] - actual[file]) <= 5 for file in counts), f"they are {actual}"
    total = int(re.search(r"They have ([\d,]+) lines", OVERVIEW)[1].replace(",", ""))
    assert total == sum(counts.values())


def test_quoted_code_is_in_the_files():
    for line in re.findall(r"`(\w+\.\w+\([^`]+\))` is the line", README):
        assert line in (REPO / "model.py").read_text(encoding="utf-8")


def test_the_table_lists_every_recipe():
    table = README[README.index("## Recipes"):README.index("## Your own data")]
    named = {name for cell in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in re.findall(r"\w+\.py", cell)}
    assert named == {path.name for path in REPO.glob("config/*.py") if re.match("train|finetune", path.name)}


def test_pictures_exist_and_are_small():
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert {REPO / name for name in named} == set((REPO / "pictures").glob("*.png"))
    assert all((REPO / name).stat().st_size < 300_000 for name in named)


def test_the_sizes_of_gpt2_are_right():
    shapes = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
    section = README[README.index("## 7. GPT-2's weights"):README.index("## 8. ")]
    first, rest = re.search(r"a download of ([\d.]+) GB", section), re.search(r"downloads of (.+?) GB", section)
    downloads = [float(n) for text in (first[1], rest[1]) for n in re.findall(r"\d\.\d+", text)]
    millions = [int(n.replace(",", "")) for n in re.findall(
        r"[\d,]*\d", re.search(r"16 bytes for each of (.+?) million", section)[1])]
    for (layers, width), gigabytes, parameters in zip(shapes.values(), downloads, millions, strict=True):
        count = 50257 * width + 1024 * width + layers * (12 * width**2 + 13 * width) + 2 * width
        masks = layers * 1024**2 * 4  # the file contains them, too
        assert gigabytes == round((4 * count + masks) / 1e9, 2) and parameters == round(count / 1e6)
        cache = 2 * layers * 1024 * width * 4  # chatting needs it instead of the masks
        assert 4 * count + cache == pytest.approx(gigabytes * 1e9, rel=0.1), "about as much memory"


def test_the_readme_is_short_and_every_step_has_an_exercise():
    lines = README.splitlines()
    assert len(lines) <= 260 and not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    steps = re.findall(r"^## (\d)\. ", README, re.MULTILINE)
    exercises = re.findall(r"^- \*\*Exercise (\d)\.\*\*", README, re.MULTILINE)
    assert steps == exercises == list("12345678")
