"""HellaSwag, a test of common sense by multiple choice, and the reader of such rows.

    python -m data.hellaswag    # the validation file: 10,042 rows, 12 MB
    python chat.py --init_from=gpt2 --score=data/hellaswag/hellaswag_val.jsonl

Each row has a context and four endings: one that a person wrote, three that a model made up
(Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?").

`chat.py --score` reads a row's `ctx` as it stands, a space, and an ending, as Karpathy's
build-nanogpt does. That states for OpenAI's weights, on all rows, in hellaswag.py (h) and
play.ipynb (p):

                    likeliest by the sum    by the mean of a token
    gpt2                28.59 % (h)         29.55 % (h), 29.45 % (p)
    gpt2-medium                             37.52 % (p)
    gpt2-large                              43.20 % (p)
    gpt2-xl             38.42 % (h)         48.93 % (h), 48.89 % (p)

EleutherAI's lm-evaluation-harness prepares the text otherwise (the activity's name before it, no
brackets) and divides by characters instead of tokens. It finds 28.92 and 31.14 % for gpt2, 40.04
and 50.89 % for gpt2-xl, as hellaswag.py quotes it.
"""
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from data.conversation import check_characters, check_text, read_rows
from data.download import download, name_in

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SIZE = 12_246_618  # bytes
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"

# How files call a question, the choices and the right one: HellaSwag's own, and a plain one.
LAYOUTS = (("ctx", "endings", "label"), ("question", "choices", "answer"))


@dataclass
class Settings:
    out_dir: Path = Path("data/hellaswag")  # where hellaswag_val.jsonl goes
    url: str = URL  # where it comes from; a mirror must have the same bytes


def read_choices(path):
    """The rows of a file of multiple choice: [(question, choices, index of the right one), ...].
    None for a file in which no row has choices: it may hold chats.

    The right one is told by its index, from 0, or by its text. Raises what read_rows does, and
    ValueError naming the file and the row for one of another shape.
    """
    rows = read_rows(path)
    if not any(isinstance(row, dict) and layout_of(row) for row in rows):
        return None
    read = [to_choices(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    _, first, _ = read[0]
    for number, (_, choices, _) in enumerate(read, 1):
        if len(choices) != len(first):
            raise UserError(f"{path}, row {number}: {len(choices)} choices, but row 1 has "
                             f"{len(first)}; put rows of different counts into files of their own")
    return read


def layout_of(row):
    """The names of LAYOUTS that a row has its choices by, or None."""
    return next((names for names in LAYOUTS if names[1] in row), None)


def to_choices(row, where):
    """One row of a file as (question, choices, index of the right one). `where` names the file and
    row in the ValueError that a row of another shape raises."""
    expected = " or ".join("{" + ", ".join(map(repr, names)) + "}" for names in LAYOUTS)
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected {expected}, found {type(row).__name__}")
    names = layout_of(row)
    if not names or not all(name in row for name in names):
        raise UserError(f"{where}: expected {expected}, found "
                         f"{', '.join(map(repr, row)) or 'no field'}")
    question = check_text(row, names[0], where)
    choices, right = row[names[1]], row[names[2]]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{where}: field {names[1]!r} must be a list of two texts or more, found "
                         f"{str(choices)[:40]!r}")
    for n, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice.strip():
            raise UserError(f"{where}: {names[1]}[{n}] must be a text that is not empty, found "
                             f"{str(choice)[:40]!r}")
    check_characters([question, *choices], where)
    if isinstance(right, str) and choices.count(right) == 1:
        right = choices.index(right)
    elif isinstance(right, str) and right.isascii() and right.isdecimal():  # as the hub's rows
        right = int(right)
    if type(right) is not int or not 0 <= right < len(choices):
        raise UserError(f"{where}: field {names[2]!r} must be a number from 0 to "
                         f"{len(choices) - 1}, or the text of just one of the {names[1]}; found "
                         f"{right!r:.40}")
    return question, choices, right


def main(argv):
    """Fetch the validation file, unless it is there, and read it. Raises ValueError or OSError."""
    s = config.load(Settings, argv, __doc__)
    path = download(s.url, s.out_dir / name_in(s.url), SHA256, SIZE)
    print(f"{path}: {len(read_choices(path) or []):,} rows")


if __name__ == "__main__":
    config.run(main)
