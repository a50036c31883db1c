"""Instruction data -> chats -> token files.

    python prepare_alpaca.py config/prepare_instruction.py     # the small data set of this repository
    python prepare_alpaca.py                                   # Stanford Alpaca, 52,002 rows, 23 MB
    python prepare_alpaca.py --source=my.jsonl --out_dir=data/mine

The source is a JSON list or JSON lines of {"instruction", "input", "output"} or {"messages": [...]}. It
writes chat_corpus.txt (the same chats for people to read), train.bin, val.bin and meta.json, and reports what
it kept.
"""
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from data.conversation import (
    decode_conversation,
    encode_conversations,
    read_conversations,
    special_ids,
    supervised,
    to_text,
)
from data.download import download, name_in, sha256_of
from data.tokenizer import get_tokenizer, read_spec, train_bpe, write_spec
from data.tokens import SPLITS, new_files, write_meta, write_tokens

ALPACA_URL = "https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json"
ALPACA_SHA256 = "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"
NO_INPUT = re.compile(r"\W*no ?input( required| needed)?\W*", re.IGNORECASE)  # Alpaca's ways of saying so
BATCH = 2000  # conversations encoded at a time


@dataclass
class Settings:
    source: str = ALPACA_URL  # a JSON or JSON-lines file, or the http(s) address of one
    out_dir: Path = Path("data/alpaca")  # where train.bin, val.bin, meta.json and chat_corpus.txt go
    tokenizer: str = "gpt2"  # gpt2, bytes, bpe (trained on this data) or the path of a tokenizer.json
    vocab_size: int = 1024  # ids that bpe makes
    val_fraction: float = 0.05  # rows held out for validation, of every category alike
    seed: int = 1337  # which rows are held out
    max_tokens: int = 1024  # longest conversation, in tokens
    too_long: str = "cut"  # what happens to longer ones: cut (the end of the last answer) or drop
    drop_duplicates: bool = True  # keep only the first of identical rows


def fetch(source, out_dir):
    """The local path of a source; an address is downloaded into out_dir first. Raises OSError."""
    if not source.startswith(("http://", "https://")):
        return config.local_path(source)
    path = download(source, out_dir / name_in(source))
    actual = sha256_of(path)
    print(f"{path}: {path.stat().st_size:,} bytes, sha256 {actual}", file=sys.stderr)
    if source == ALPACA_URL and actual != ALPACA_SHA256:
        print(f"  note: this is not the file that was known in 2023 (sha256 {ALPACA_SHA256}); going on with "
              "it", file=sys.stderr)
    return path


def select(conversations, drop_duplicates):
    """Drop what cannot teach: returns (kept conversations, Counter of reasons). Alpaca writes "<noinput>"
    and the like where a row has no input; such placeholders are removed."""
    kept, dropped, seen = [], Counter(), set()
    for messages, category in conversations:
        question, _, placeholder = messages[0]["content"].rpartition("\n")
        if NO_INPUT.fullmatch(placeholder):
            messages[0]["content"] = question
        key = tuple(m["content"] for m in messages)
        if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
            dropped["empty output"] += 1
        elif not messages[0]["content"].strip():
            dropped["empty instruction"] += 1
        elif drop_duplicates and key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            kept.append((messages, category))
    return kept, dropped


def split_rows(conversations, val_fraction, seed):
    """{"train": [...], "val": [...]}: the same share of every category is held out, at least one row where
    a category has two. Raises ValueError when nothing is left for one side."""
    by_category = defaultdict(list)
    for number, (_, category) in enumerate(conversations):
        by_category[category].append(number)
    held_out = set()
    rng = random.Random(seed)
    for category in sorted(by_category):
        numbers = by_category[category]
        count = min(max(round(len(numbers) * val_fraction), 1), len(numbers) - 1)
        held_out.update(rng.sample(numbers, count))
    splits = {"train": [c for i, c in enumerate(conversations) if i not in held_out],
              "val": [c for i, c in enumerate(conversations) if i in held_out]}
    if not splits["train"] or not splits["val"]:
        raise ValueError(f"{len(conversations)} rows are too few to train on some and hold out others; use "
                         "at least two rows of one category")
    return splits


def cut_answer(ids, enc, max_tokens):
    """Conversation ids cut to at most max_tokens, inside the last of the assistant's turns that still has
    some text then, and ended with <|end|>; what came after is left out."""
    _, _, assistant, end = special_ids(enc)
    last = max((i for i, token in enumerate(ids[:max_tokens - 2]) if token == assistant), default=0)
    return ids[:min(ids.index(end, last), max_tokens - 1)] + [end]


def encode_split(conversations, enc, max_tokens, too_long, report):
    """Encode one split: returns its (ids, messages, category) triples, counting into `report`. What is cut
    from the ids is cut from the messages too."""
    rows = []
    for start in range(0, len(conversations), BATCH):
        batch = conversations[start:start + BATCH]
        for ids, (messages, category) in zip(encode_conversations([m for m, _ in batch], enc), batch):
            report["longest"] = max(report["longest"], len(ids))
            if len(ids) > max_tokens:
                report[f"longer than {max_tokens} tokens"] += 1
                if too_long == "drop":
                    continue
                ids = cut_answer(ids, enc, max_tokens)
                messages = decode_conversation(ids, enc)
            ids = np.array(ids)
            targets = int(supervised(ids, enc).sum())
            if targets < 2:  # <|end|> alone teaches nothing
                report["nothing of the answer fits"] += 1
                continue
            report["supervised"] += targets
            rows.append((ids, messages, category))
        if sys.stderr.isatty():
            print(f"\rencoded {start + len(batch):,} of {len(conversations):,}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def check_settings(settings):
    """Raise ValueError for the first setting out of its range."""
    if settings.too_long not in ("cut", "drop"):
        raise ValueError(f"too_long={settings.too_long!r}: use cut or drop")
    if not 0 < settings.val_fraction < 1:
        raise ValueError(f"val_fraction={settings.val_fraction}: use a value between 0 and 1, such as 0.05")
    if settings.max_tokens < 8:
        raise ValueError(f"max_tokens={settings.max_tokens}: no conversation fits; use 8 or more")


def tokenizer_spec(settings, conversations):
    """The tokenizer that the settings name, as data/tokenizer.py's read_spec has it; bpe is learned from
    these conversations."""
    name = settings.tokenizer
    if name == "bpe":
        return train_bpe((m["content"] for messages, _ in conversations for m in messages),
                         settings.vocab_size)
    return read_spec(config.local_path(name) if name.endswith(".json") else name)


def print_report(settings, path, conversations, dropped, report, meta):
    """Say what was kept, and what was dropped and why."""
    tokens = meta["train_tokens"] + meta["val_tokens"]
    lines = [("rows read", len(conversations))]
    lines += [(f"  dropped: {reason}", count) for reason, count in sorted(dropped.items())]
    for reason in (f"longer than {settings.max_tokens} tokens", "nothing of the answer fits"):
        cut = settings.too_long == "cut" and reason.startswith("longer")
        lines += [(f"  {'answer cut' if cut else 'dropped'}: {reason}", report[reason])] * (reason in report)
    lines += [("training rows", meta["train_rows"]), ("held-out rows", meta["val_rows"]), ("tokens", tokens),
              ("  supervised", report["supervised"]), ("longest conversation read", report["longest"]),
              ("ids in the vocabulary", meta["vocab_size"])]
    print(f"{path} -> {settings.out_dir}")
    for name, count in lines:
        print(f"  {name:<42}{count:>12,}")


def main(argv):
    """Turn a file of rows into a prepared folder, and report what was kept. Raises ValueError or OSError for
    a mistake that a user can fix."""
    settings = config.load(Settings, argv, __doc__)
    check_settings(settings)
    path = fetch(settings.source, settings.out_dir)
    conversations = read_conversations(path)
    if not conversations:
        raise ValueError(f"{path}: holds no row")
    kept, dropped = select(conversations, settings.drop_duplicates)
    splits = split_rows(kept, settings.val_fraction, settings.seed)
    with new_files(settings.out_dir) as part, \
            open(part / "chat_corpus.txt", "w", encoding="utf-8", newline="\n") as corpus:
        spec = tokenizer_spec(settings, splits["train"])
        enc = get_tokenizer(spec)
        if isinstance(spec, dict):
            write_spec(part / "tokenizer.json", spec)
        meta = {"kind": "chat", "tokenizer": "tokenizer.json" if isinstance(spec, dict) else spec,
                "vocab_size": enc.n_vocab, "seed": settings.seed, "source": path.name,
                "sha256": sha256_of(path)}
        names = sorted({category for rows in splits.values() for _, category in rows})
        meta["categories"] = names
        report = Counter()
        for split in SPLITS:
            rows = encode_split(splits[split], enc, settings.max_tokens, settings.too_long, report)
            if not rows:
                raise ValueError(f"{path}: no {split} row is left at max_tokens={settings.max_tokens}; use "
                                 "more")
            meta[f"{split}_rows"] = len(rows)
            meta[f"{split}_tokens"] = write_tokens(part / f"{split}.bin", (ids for ids, _, _ in rows))
            meta[f"{split}_categories"] = [names.index(c) for _, _, c in rows] if names != [""] else []
            corpus.writelines(f"{to_text(messages)}\n\n" for _, messages, _ in rows)
        meta |= {"supervised_tokens": report["supervised"], "longest": report["longest"]}
        write_meta(part, meta)
    print_report(settings, path, conversations, dropped, report, meta)


if __name__ == "__main__":
    config.run(main)
