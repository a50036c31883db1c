"""Instruction data -> chats -> token files.

    python prepare_alpaca.py config/prepare_instruction.py    # the small data of this repository
    python prepare_alpaca.py                                  # Stanford Alpaca, 52,002 rows, 23 MB
    python prepare_alpaca.py --source=my.jsonl,more.csv --out_dir=data/mine

A source is a JSON, JSON-lines or CSV file with a question and an answer in each row, or a list of
messages; data/rows.py has the names of fields. The script writes train.bin, val.bin, meta.json and
chat_corpus.txt (the same chats as readable text), and reports what it kept.
"""
import random
import re
import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from data import conversation as chats
from data import tokenizer as tokenizers
from data.datasets import SPLITS, write_meta, write_tokens
from data.download import download, name_in, sha256_of
from data.files import new_files

ALPACA_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
# Alpaca's words for a row without an input.
NO_INPUT = re.compile(r"\W*no ?input( required| needed)?\W*", re.IGNORECASE)


@dataclass
class Settings:
    source: str = ALPACA_URL  # JSON, JSON-lines or CSV files, or URLs of such; commas between
    bad_rows: str = "error"  # rows that do not make a chat: error, or drop (and count them)
    out_dir: Path = Path("data/alpaca")  # where train.bin, val.bin, meta.json, chat_corpus.txt go
    tokenizer: str = "gpt2"  # gpt2, bytes, bpe (learned here) or a tokenizer.json's path
    vocab_size: int = 1024  # ids that bpe makes
    space_behind: bool = False  # bpe joins a space to the word before it: fewer tokens
    val_fraction: float = 0.05  # rows held out for validation, of every category alike
    seed: int = 1337  # which rows are held out
    max_tokens: int = 1024  # longest conversation, in tokens
    too_long: str = "cut"  # longer ones: cut (inside an answer, then <|end|>) or drop
    drop_duplicates: bool = True  # keep only the first of identical rows
    extra: Path | None = None  # a file of more rows, all for training (see data/rules.py)
    repeat: int = 1  # how often to use each training row of the source
    join: int = 1  # join up to this many training rows into a chat; 1: do not


def main(argv):
    """Turn files of rows into a prepared folder, and report what was kept. Raises UserError or
    OSError for a mistake that a user can fix."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, too_long=("cut", "drop"), bad_rows=("error", "drop"), repeat=(1, None),
                 join=(1, None), max_tokens=(8, None))
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"val_fraction={cfg.val_fraction}: must be between 0 and 1, such as 0.05")
    paths, report = fetch_all(cfg.source, cfg.out_dir), Counter()
    # A conversation is a pair: its messages, and the category that they belong to.
    kept = select(read_files(paths, cfg, report), cfg.drop_duplicates, report)
    splits = split_rows(kept, cfg.val_fraction, cfg.seed, report)
    splits["train"] *= cfg.repeat
    if cfg.extra:
        splits["train"] += read_files([cfg.extra], cfg, report)
    if cfg.join > 1:
        splits["train"] = join_rows(splits["train"], cfg.join, random.Random(cfg.seed))
    with new_files(cfg.out_dir) as folder:  # all of them are written, or none
        spec = make_tokenizer(cfg, splits["train"], folder)
        enc = tokenizers.get_tokenizer(spec)
        rows = {split: encode_split(splits[split], enc, cfg, report) for split in SPLITS}
        for split in SPLITS:
            write_tokens(folder / f"{split}.bin", (ids for ids, _, _ in rows[split]))
        with open(folder / "chat_corpus.txt", "w", encoding="utf-8", newline="\n") as f:
            for _, messages, _ in rows["train"] + rows["val"]:
                f.write(f"{chats.to_text(messages)}\n\n")
        meta = describe(rows, spec, enc, cfg, paths, report)
        write_meta(folder, meta)
    print(f"{' '.join(shlex.quote(str(p)) for p in paths)} -> {shlex.quote(str(cfg.out_dir))}")
    for what, count in {**report, "training rows": meta["train_rows"],
                        "held-out rows": meta["val_rows"],
                        "tokens": meta["train_tokens"] + meta["val_tokens"],
                        "ids in the vocabulary": enc.n_vocab}.items():
        print(f"  {what:<42}{count:>12,}")


def fetch_all(sources, out_dir):
    """Return the local paths of sources with commas between them. A URL is downloaded into out_dir
    first. Raises UserError or OSError."""
    paths = []
    for source in [sources] if config.is_file(sources) else sources.split(","):
        path = config.local_path(source.strip())
        if source.strip().startswith(("http://", "https://")):
            path = download(source.strip(), out_dir / name_in(source.strip()))
        if path in paths:
            raise UserError(f"source={sources}: two files have one name; name each once")
        paths.append(path)
    return paths


def read_files(paths, cfg, report):
    """Return the conversations of all these files. Raises UserError or OSError."""
    conversations = []
    for path in paths:
        try:
            found = chats.read_conversations(path, report, drop=cfg.bad_rows == "drop")
        except chats.BadRow as error:
            raise UserError(f"{error} (--bad_rows=drop leaves such rows out)") from error
        if not found:
            raise UserError(f"{path}: contains no rows")
        conversations += found
    return conversations


def select(conversations, drop_duplicates, report):
    """Return the conversations without empty ones and duplicates, which `report` counts, and
    without Alpaca's "<noinput>"."""
    kept, seen = [], set()
    for messages, category in conversations:
        question, _, context = messages[0]["content"].rpartition("\n")
        if NO_INPUT.fullmatch(context):
            messages = [{"role": "user", "content": question}, *messages[1:]]
        texts = tuple(m["content"] for m in messages)
        if not all(texts[1::2]):
            report["dropped: empty output"] += 1
        elif not texts[0]:
            report["dropped: empty instruction"] += 1
        elif drop_duplicates and texts in seen:
            report["dropped: duplicate"] += 1
        else:
            seen.add(texts)
            kept.append((messages, category))
    return kept


def split_rows(conversations, val_fraction, seed, report):
    """Return {"train": [...], "val": [...]}: the same share of every category is held out, at least
    one row of each if there are few categories. Rows with the same first question are on one side.
    Raises UserError for less than two rows."""
    total = len(conversations)
    if total < 2:
        raise UserError(f"{total} rows are left, too few to train on some and hold out others "
                        f"({why_dropped(report)})")
    questions, categories = defaultdict(list), defaultdict(list)  # of row numbers; of such lists
    for number, (messages, _) in enumerate(conversations):
        questions[messages[0]["content"]].append(number)
    for numbers in questions.values():
        categories[conversations[numbers[0]][1]].append(numbers)
        if len(numbers) > 1:
            report["rows that share a question"] += len(numbers)
    if len(categories) > val_fraction * total:  # too many to hold out a row of each
        categories = {"": list(questions.values())}
    held_out, rng = set(), random.Random(seed)
    for _, groups in sorted(categories.items()):
        size = sum(map(len, groups))
        room = min(max(round(size * val_fraction), 1), size - 1)  # at least one, but never all
        for numbers in rng.sample(groups, min(room, len(groups))):
            if len(numbers) <= room:
                held_out.update(numbers)
                room -= len(numbers)
    if not held_out:  # every question has too many rows
        held_out.update(rng.sample(range(total), max(round(total * val_fraction), 1)))
    return {"train": [c for number, c in enumerate(conversations) if number not in held_out],
            "val": [c for number, c in enumerate(conversations) if number in held_out]}


def why_dropped(report):
    """Return the counts of rows read and dropped, as text."""
    return ", ".join(f"{what}: {count:,}" for what, count in report.items()
                     if what.startswith(("rows read", "dropped")))


def join_rows(conversations, most, rng):
    """Join conversations, in random order, into chats of 1 to `most` turns at random: a model
    learns to answer after earlier turns. A chat has its last row's category, since its last answer
    is the one that is scored."""
    joined, room = [], 0
    for messages, category in rng.sample(conversations, len(conversations)):
        if joined and len(joined[-1][0]) + len(messages) <= room:
            joined[-1] = joined[-1][0] + messages, category
        else:
            joined.append((messages, category))
            room = 2 * rng.randint(1, most)  # messages
    return joined


def make_tokenizer(cfg, conversations, folder):
    """Return the spec of the tokenizer in the settings; bpe is learned from these conversations. A
    trained one is written into the folder too."""
    name = cfg.tokenizer
    if name == "bpe":
        texts = (m["content"] for messages, _ in conversations for m in messages)
        pattern = tokenizers.SPACE_BEHIND_PATTERN if cfg.space_behind else tokenizers.SPLIT_PATTERN
        spec = tokenizers.train_bpe(texts, cfg.vocab_size, pattern)
    else:
        spec = tokenizers.read_spec(config.local_path(name) if name.endswith(".json") else name)
    if isinstance(spec, dict):
        tokenizers.write_spec(folder / "tokenizer.json", spec)
    return spec


def encode_split(conversations, enc, cfg, report):
    """Return a split as (ids, messages, category) rows of at most cfg.max_tokens ids. Raises
    UserError if none is left."""
    rows = []
    for start in range(0, len(conversations), 2000):  # at a time: faster than one by one
        batch = conversations[start:start + 2000]
        encoded = chats.encode_conversations([messages for messages, _ in batch], enc)
        for ids, (messages, category) in zip(encoded, batch):
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
                report["dropped: nothing of the answer fits"] += 1
                continue
            report["supervised tokens"] += targets
            rows.append((np.array(ids, np.uint16), messages, category))
    if not rows:
        raise UserError(f"{cfg.source}: no row is left to train on or to validate with "
                        f"({why_dropped(report)}); use more than max_tokens={cfg.max_tokens}")
    return rows


def cut_answer(ids, enc, max_tokens):
    """Cut a conversation to at most max_tokens ids, inside the last answer that keeps a token of
    text before <|end|> (hence - 2). What comes after that answer is left out."""
    _, _, assistant, end = chats.special_ids(enc)
    last = max((i for i, token in enumerate(ids[:max_tokens - 2]) if token == assistant), default=0)
    turn_ends = ids.index(end, last)  # of the question, where no answer fits
    return ids[:min(turn_ends, max_tokens - 1)] + [end]


def describe(rows, spec, enc, cfg, paths, report):
    """Return the contents of meta.json."""
    names = sorted({category for split in SPLITS for _, _, category in rows[split]})
    meta = {"kind": "chat", "tokenizer": "tokenizer.json" if isinstance(spec, dict) else spec,
            "vocab_size": enc.n_vocab, "seed": cfg.seed,
            "source": ",".join(path.name for path in paths),
            "sha256": ",".join(map(sha256_of, paths)), "categories": names}
    for split in SPLITS:
        meta[f"{split}_rows"] = len(rows[split])
        meta[f"{split}_tokens"] = sum(len(ids) for ids, _, _ in rows[split])
        numbers = [names.index(category) for _, _, category in rows[split]]
        meta[f"{split}_categories"] = numbers if names != [""] else []
    meta["supervised_tokens"] = report["supervised tokens"]
    meta["longest"] = report["longest conversation read"]
    return meta


if __name__ == "__main__":
    config.run(main)
