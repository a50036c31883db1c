"""Instruction data -> chats -> token files.

    python prepare_alpaca.py config/prepare_instruction.py    # this repository's small data set
    python prepare_alpaca.py                                  # Stanford Alpaca, 52,002 rows, 23 MB
    python prepare_alpaca.py --source=my.jsonl,more.csv --out_dir=data/mine
    python finetune.py --data_dir=data/mine --out_dir=out/mine    # then finetune GPT-2 on them

A source is a JSON, JSON-lines or CSV file. Each row has a question and an answer, or a list of
messages; data/rows.py lists the field names. The script writes train.bin, val.bin, meta.json and
chat_corpus.txt (the same chats as readable text), and reports what it kept.
"""
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from data import conversation as chats
from data.datasets import SPLITS, write_chats, write_meta
from data.download import sha256_of
from data.files import new_files, write_text
from data.rows import read_sources
from data.tokenizer import SPLIT_PATTERN, TRAILING_SPACE_PATTERN, make_tokenizer

ALPACA_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
# What Alpaca writes as the input of a row that has none.
NO_INPUT = re.compile(r"\W*no ?input( required| needed)?\W*", re.IGNORECASE)


@dataclass
class Settings:
    source: str = ALPACA_URL  # JSON, JSON-lines or CSV files, or URLs, separated by commas
    bad_rows: str = "error"  # rows that cannot become a chat: error, or drop (and count them)
    out_dir: Path = Path("data/alpaca")  # where train.bin, val.bin, meta.json, chat_corpus.txt go
    tokenizer: str = "gpt2"  # gpt2, bytes, bpe (learned here) or a tokenizer.json's path
    vocab_size: int = 1024  # size of a bpe vocabulary, without the four special tokens
    trailing_space: bool = False  # bpe joins a space to the word before it: fewer tokens
    val_fraction: float = 0.05  # fraction of each category's rows held out for validation
    seed: int = 1337  # chooses the held-out rows, and the order in which rows are joined
    max_tokens: int = 1024  # longest conversation, in tokens: the model's block_size + 1, or less
    too_long: str = "cut"  # longer conversations: cut (inside an answer, then <|end|>) or drop
    drop_duplicates: bool = True  # keep only the first of identical rows
    extra: Path | None = None  # more training rows, not split or deduplicated (see data/rules.py)
    repeat: int = 1  # how many times to use each training row of the source
    join: int = 1  # join up to this many training rows into a chat; 1: no joining


def main(argv):
    """Turn files of rows into a prepared folder, and print counts. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, too_long=("cut", "drop"), bad_rows=("error", "drop"), repeat=(1, None),
                 join=(1, None), max_tokens=(8, None), val_fraction=(0, 1))
    report, drop = Counter(), cfg.bad_rows == "drop"
    # A conversation is a pair: its messages, and the category that they belong to.
    conversations, paths = read_sources(cfg.source, cfg.out_dir, drop, report)
    kept = select(conversations, cfg.drop_duplicates, report)
    splits = split_rows(kept, cfg.val_fraction, cfg.seed)
    splits["train"] *= cfg.repeat
    if cfg.extra:
        splits["train"] += read_sources(str(cfg.extra), cfg.out_dir, drop, report)[0]
    if cfg.join > 1:
        splits["train"] = join_rows(splits["train"], cfg.join, random.Random(cfg.seed))
    with new_files(cfg.out_dir) as folder:  # all of them are written, or none
        texts = (m["content"] for messages, _ in splits["train"] for m in messages)
        enc, name = make_tokenizer(cfg.tokenizer, folder, texts, cfg.vocab_size,
                                   TRAILING_SPACE_PATTERN if cfg.trailing_space else SPLIT_PATTERN)
        rows = {split: encode_split(splits[split], enc, cfg, report) for split in SPLITS}
        write_text(folder / "chat_corpus.txt", "".join(
            f"{chats.to_text(messages)}\n\n" for split in SPLITS for _, messages, _ in rows[split]))
        written = write_chats(folder, rows)  # train.bin and val.bin
        meta = {"kind": "chat", "tokenizer": name, "vocab_size": enc.n_vocab, "seed": cfg.seed,
                "source": ",".join(path.name for path in paths),
                "sha256": ",".join(map(sha256_of, paths)), **written,
                "supervised_tokens": report["supervised tokens"],
                "longest": report["longest conversation read"]}
        write_meta(folder, meta)
    print(f"{', '.join(map(str, paths))} -> {cfg.out_dir}")
    counts = {"training rows": meta["train_rows"], "held-out rows": meta["val_rows"],
              "tokens": meta["train_tokens"] + meta["val_tokens"],
              "ids in the vocabulary": enc.n_vocab}
    for what, count in [*report.items(), *counts.items()]:
        print(f"  {what:<42}{count:>12,}")


def select(conversations, drop_duplicates, report):
    """Return the conversations except empty ones and duplicates, which `report` counts. Remove
    Alpaca's "<noinput>" from the rest."""
    kept, seen = [], set()
    for messages, category in conversations:
        question, _, row_input = messages[0]["content"].rpartition("\n")  # see data/rows.py
        if NO_INPUT.fullmatch(row_input):
            messages = [{"role": "user", "content": question}, *messages[1:]]
        texts = tuple(m["content"] for m in messages)  # question, answer, question, ...
        if not all(texts[1::2]):
            report["dropped: empty output"] += 1
        elif not all(texts[::2]):
            report["dropped: empty instruction"] += 1
        elif drop_duplicates and texts in seen:
            report["dropped: duplicate"] += 1
        else:
            seen.add(texts)
            kept.append((messages, category))
    return kept


def split_rows(conversations, val_fraction, seed):
    """Return {"train": [...], "val": [...]}. Hold out a random share of each category's rows, or
    of all rows if there are many categories. Rows with the same question share a split."""
    total = len(conversations)
    questions = defaultdict(list)  # {first question: the numbers of its rows}
    for number, (messages, _) in enumerate(conversations):
        questions[messages[0]["content"]].append(number)
    categories = defaultdict(list)  # {category: the lists in `questions` of its rows}
    for numbers in questions.values():
        _, category = conversations[numbers[0]]
        categories[category].append(numbers)
    if len(categories) > val_fraction * total:  # too many to hold out a row of each
        categories = {"": list(questions.values())}
    held_out, rng = set(), random.Random(seed)
    for _, groups in sorted(categories.items()):
        size = sum(map(len, groups))
        quota = min(max(round(size * val_fraction), 1), size - 1)  # at least one, but never all
        for numbers in rng.sample(groups, min(quota, len(groups))):
            if len(numbers) <= quota:  # larger groups stay in training
                held_out.update(numbers)
                quota -= len(numbers)
    if total and not held_out:  # no question's rows fit the quota: hold out single rows
        held_out.update(rng.sample(range(total), max(round(total * val_fraction), 1)))
    return {"train": [c for number, c in enumerate(conversations) if number not in held_out],
            "val": [c for number, c in enumerate(conversations) if number in held_out]}


def join_rows(conversations, max_turns, rng):
    """Join conversations, in random order, into chats of max_turns / 2 to max_turns turns, so a
    model learns to answer after earlier turns. A chat has its last row's category, since its last
    answer is the one that is scored."""
    joined, max_messages = [], 0
    for messages, category in rng.sample(conversations, len(conversations)):  # shuffled
        if joined and len(joined[-1][0]) + len(messages) <= max_messages:
            joined[-1] = joined[-1][0] + messages, category
        else:
            joined.append((messages, category))
            max_messages = 2 * rng.randint((max_turns + 1) // 2, max_turns)
    return joined


def encode_split(conversations, enc, cfg, report):
    """Return a split as (ids, messages, category) rows of at most cfg.max_tokens ids. Raises
    UserError if none is left."""
    rows = []
    for messages, category in conversations:
        ids = chats.encode_conversation(messages, enc)
        report["longest conversation read"] = max(report["longest conversation read"], len(ids))
        if len(ids) > cfg.max_tokens and cfg.too_long == "drop":
            report[f"dropped: longer than {cfg.max_tokens} tokens"] += 1
            continue
        if len(ids) > cfg.max_tokens:
            report[f"answer cut: longer than {cfg.max_tokens} tokens"] += 1
            ids = cut_answer(ids, enc, cfg.max_tokens)
            messages = chats.decode_conversation(ids, enc)
        targets = int(chats.supervised(ids, enc).sum())
        if targets < 2:  # <|end|> alone teaches nothing
            report["dropped: no part of the answer fits"] += 1
            continue
        report["supervised tokens"] += targets
        rows.append((np.array(ids, np.uint16), messages, category))
    if not rows:
        raise UserError(f"{cfg.source}: the training or validation split is empty ({dict(report)});"
                        f" use more rows, or a max_tokens above {cfg.max_tokens}")
    return rows


def cut_answer(ids, enc, max_tokens):
    """Cut a conversation to at most max_tokens ids, inside the last answer that keeps a token of
    text before <|end|> (hence the - 2). Everything after it is left out."""
    _, _, assistant, end = chats.special_ids(enc)
    last = max((i for i, token in enumerate(ids[:max_tokens - 2]) if token == assistant), default=0)
    turn_end = ids.index(end, last)  # the question's if no answer fits
    return ids[:min(turn_end, max_tokens - 1)] + [end]


if __name__ == "__main__":
    config.run(main)
