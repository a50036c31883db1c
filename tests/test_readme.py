"""What the README and the files' first lines promise is there: every command passes the scripts' own check of
settings, every file, function and picture that is named exists."""
import re
import shlex
from pathlib import Path

import data.hellaswag
import pytest

import chat
import config
import data.fineweb
import data.rules
import data.text
import finetune
import model
import prepare_alpaca
import train
from tests import bench

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
SETTINGS = {"train.py": train.Settings, "finetune.py": finetune.Settings, "chat.py": chat.Settings,
            "prepare_alpaca.py": prepare_alpaca.Settings, "model.py": model.ExportSettings,
            "data.text": data.text.Settings, "data.rules": data.rules.Settings, "data.fineweb": data.fineweb.Settings,
            "data.hellaswag": data.hellaswag.Settings, "tests.bench": bench.Settings}
SOURCES = [path for folder in (".", "config", "data", "pictures") for path in sorted((REPO / folder).glob("*.py"))]


def commands():
    """The words after "python" or "torchrun" of each command in the README, in docstrings and in comments."""
    found = set()
    for path in (REPO / "README.md", REPO / "tests" / "bench.py", *SOURCES):
        text = path.read_text(encoding="utf-8")
        lines = re.findall(r"^(?:    |# )((?:python|torchrun) .+)", text, re.MULTILINE)
        lines += re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
        for line in (part for whole in lines for part in whole.split(" && ")):
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                continue
            ends = [i for i, word in enumerate(words) if word in "<|" or word.startswith(("(", "config/..."))]
            found.add(tuple(words[:min(ends, default=None)]))
    return sorted(found)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_passes_the_scripts_own_check(words, monkeypatch):
    monkeypatch.chdir(REPO)
    skipped = 2 if words[:2] == ("python", "-m") else 1
    ours = [word for word in words[skipped:] if not re.match("--(nproc_per_node|max-restarts)=", word)]
    name, *argv = ours or ["torchrun"]
    if name in ("venv", "data.tokenizer", "tests.exercises", "torchrun") or "--help" in argv:  # no settings of ours
        return
    if name == "tests.bench":
        assert {word for word in argv if not word.startswith("-")} <= bench.PARTS.keys()
        argv = [word for word in argv if word.startswith("-")]
    if name == "tests.fuzz":
        pytest.importorskip("resource", reason="it needs POSIX")
        from tests import fuzz
        config.load(fuzz.Settings, argv)
        return
    config.load(SETTINGS[name], argv)


def test_there_are_commands_of_every_script():
    named = {word for words in commands() for word in words[:3]}
    assert named >= {*SETTINGS, "data.tokenizer", "torchrun"} and len(commands()) > 40


def test_what_the_readme_tells_to_read_is_there():
    everything = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    told = re.findall(r"\*\*Read\*\*(.+?)\n- \*\*Exercise", README, re.DOTALL)
    assert len(told) == 8, "one in each step"
    for name in re.findall(r"`([\w./]+)`", " ".join(told)):
        *owner, last = name.split(".")
        assert (REPO / name).is_file() or re.search(rf"(def|class) {last}\b", everything), name
    section = README[README.index("## Read to the line"):README.index("## 1. ")]
    looked_for = re.findall(r"^\| `(\S+?)` \|.*\|([^|]*)\|$", section, re.MULTILINE)
    looked_for += re.findall(r"`(\S+?)`[^`]*\(([^()]*`[^()]*)\)", section.split("They stand on")[1])
    assert len(looked_for) >= 8
    for file, told in looked_for:
        text = (REPO / file).read_text(encoding="utf-8") if file.endswith(".py") else ""
        assert (REPO / file).exists(), file
        for name in re.findall(r"`([\w./]+)`", told):
            last = name.split(".")[-1]
            assert (REPO / name).is_file() or re.search(rf"(def|class) {last}\b", text), name


def test_the_lines_to_the_line_are_counted():
    section = README[README.index("## Read to the line"):README.index("## 1. ")]
    told = {file: int(lines) for file, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+)", section, re.MULTILINE)}
    counted = {}
    for file in told:
        above, *below = (REPO / file).read_text(encoding="utf-8").split("\n# ====")
        counted[file] = above.count("\n") + 1
        assert len(below) == 2, f"{file}: not one ruled line, which is two rules and a sentence between"
    assert all(abs(told[file] - counted[file]) <= 5 for file in told), f"it is {counted}"
    total = int(re.search(r"that is ([\d,]+) lines", section)[1].replace(",", ""))
    assert total == sum(told.values())


def test_quoted_code_is_in_the_files():
    for line in re.findall(r"`(\w+\.\w+\([^`]+\))` is the line", README):
        assert line in (REPO / "model.py").read_text(encoding="utf-8")


def test_every_recipe_is_in_the_table_and_the_other_way_round():
    table = README[README.index("## Recipes"):README.index("## Your own data")]
    named = set(re.findall(r"^\| `(\w+\.py)`", table, re.MULTILINE))
    assert named == {path.name for path in REPO.glob("config/*.py") if re.match("train|finetune", path.name)}


def test_pictures_are_there_and_small():
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert {REPO / name for name in named} == set((REPO / "pictures").glob("*.png"))
    assert all((REPO / name).stat().st_size < 300_000 for name in named)


def test_the_sizes_of_gpt2_are_sums():
    shapes = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
    section = README[README.index("## 7. GPT-2's weights"):README.index("## 8. ")]
    first, rest = re.search(r"a download of ([\d.]+) GB", section), re.search(r"downloads of (.+?) GB", section)
    downloads = [float(n) for text in (first[1], rest[1]) for n in re.findall(r"\d\.\d+", text)]
    millions = [int(n.replace(",", "")) for n in re.findall(
        r"[\d,]*\d", re.search(r"16 bytes for each of (.+?) million", section)[1])]
    for (layers, width), gigabytes, parameters in zip(shapes.values(), downloads, millions, strict=True):
        count = 50257 * width + 1024 * width + layers * (12 * width**2 + 13 * width) + 2 * width
        masks = layers * 1024**2 * 4  # the file has them too
        assert gigabytes == round((4 * count + masks) / 1e9, 2) and parameters == round(count / 1e6)
        cache = 2 * layers * 1024 * width * 4  # what talking needs instead
        assert 4 * count + cache == pytest.approx(gigabytes * 1e9, rel=0.1), "about as much memory"


def test_it_is_short_and_every_step_has_its_exercise():
    assert README.count("\n") <= 300
    steps = re.findall(r"^## (\d)\. ", README, re.MULTILINE)
    exercises = re.findall(r"^- \*\*Exercise (\d)\.\*\*", README, re.MULTILINE)
    assert steps == exercises == list("12345678")
