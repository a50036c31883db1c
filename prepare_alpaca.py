"""Instruction data -> chats -> token files.

    python prepare_alpaca.py config/prepare_instruction.py    # the small data of this repository
    python prepare_alpaca.py                                  # Stanford Alpaca, 52,002 rows, 23 MB
    python prepare_alpaca.py --source=my.jsonl,more.json.gz --out_dir=data/mine

A source is a JSON list, or JSON lines, of {"instruction", "input", "output"}, of {"messages":
[{"role", "content"}, ...]}, or of another layout that data/conversation.py knows. The script writes
chat_corpus.txt (the same chats for people to read), train.bin, val.bin and meta.json, and reports
what it kept.
"""
import random
import re
import sys
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


@dataclass
class Settings:
    source: str = ALPACA_URL  # JSON or JSON-lines files, or addresses of such; commas between
    bad_rows: str = "error"  # rows that give no chat: error, or drop (and count them)
    out_dir: Path = Path("data/alpaca")  # where train.bin, val.bin, meta.json, chat_corpus.txt go
    tokenizer: str = "gpt2"  # gpt2, bytes, bpe (learned here) or a tokenizer.json's path
    vocab_size: int = 1024  # how many ids bpe makes
    space_behind: bool = False  # bpe glues a space to the word before it: fewer tokens
    val_fraction: float = 0.05  # rows held out for validation, of every category alike
    seed: int = 1337  # which rows are held out
    max_tokens: int = 1024  # longest conversation, in tokens
    too_long: str = "cut"  # longer ones: cut (inside an answer, then <|end|>) or drop
    drop_duplicates: bool = True  # keep only the first of identical rows
    extra: Path | None = None  # a file of more rows, all for training (see data/rules.py)
    repeat: int = 1  # how often each training row of the source is there
    join: int = 1  # join up to this many training rows into a chat; 1: do not


def main(argv):
    """Turn a file of rows into a prepared folder, and report what was kept. Raises ValueError or
    OSError for a mistake that a user can fix."""
    s = config.load(Settings, argv, __doc__)
    check_settings(s)
    paths, report = fetch_all(s.source, s.out_dir), Counter()
    # A conversation is a pair: its messages, and the category that they belong to.
    conversations = read_files(paths, s.bad_rows, report)
    kept = select(conversations, s.drop_duplicates, report)
    splits = split_rows(kept, s.val_fraction, s.seed)
    splits["train"] *= s.repeat
    if s.extra:
        splits["train"] += read_files([s.extra], s.bad_rows, report)
    if s.join > 1:
        splits["train"] = join_rows(splits["train"], s.join, random.Random(s.seed))
    with new_files(s.out_dir) as folder:  # all of them are written, or none
        spec = make_tokenizer(s, splits["train"], folder)
        enc = tokenizers.get_tokenizer(spec)
        rows = {split: encode_split(splits[split], enc, s, report) for split in SPLITS}
        check_rows(rows, s)
        for split in SPLITS:
            write_tokens(folder / f"{split}.bin", (row.ids for row in rows[split]))
        write_corpus(folder / "chat_corpus.txt", rows)
        meta = describe(rows, spec, enc, s, paths, report)
        write_meta(folder, meta)
    print_report(s, paths, report, meta)


def select(conversations, drop_duplicates, report):
    """The conversations without empty ones and duplicates, which are counted in `report`."""
    kept, seen = [], set()
    for messages, category in conversations:
        remove_placeholder(messages)  # Alpaca's "<noinput>" and the like
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        texts = tuple(m["content"] for m in messages)
        if not all(answer.strip() for answer in answers):
            report["dropped: empty output"] += 1
        elif not messages[0]["content"].strip():
            report["dropped: empty instruction"] += 1
        elif drop_duplicates and texts in seen:
            report["dropped: duplicate"] += 1
        else:
            seen.add(texts)
            kept.append((messages, category))
    return kept


def split_rows(conversations, val_fraction, seed):
    """{"train": [...], "val": [...]}: the same share of every category is held out, at least one
    row where it has two, so that each is scored. Raises ValueError when a side has nothing left."""
    by_category = defaultdict(list)
    for number, (_, category) in enumerate(conversations):
        by_category[category].append(number)
    held_out, rng = set(), random.Random(seed)
    for _, numbers in sorted(by_category.items()):
        count = round(len(numbers) * val_fraction)
        count = min(max(count, 1), len(numbers) - 1)  # at least one, but never all
        held_out.update(rng.sample(numbers, count))
    splits = {"train": [c for number, c in enumerate(conversations) if number not in held_out],
              "val": [c for number, c in enumerate(conversations) if number in held_out]}
    if not splits["train"] or not splits["val"]:
        raise UserError(f"{len(conversations)} rows are too few to train on some and hold out "
                         "others; use at least two rows of one category")
    return splits


@dataclass
class Row:
    """A conversation as it is written: its ids (n,), the same as messages, and its category."""
    ids: np.ndarray
    messages: list
    category: str
    targets: int  # how many of its ids are supervised


def encode_split(conversations, enc, s, report):
    """A split's conversations as Rows, none longer than s.max_tokens; what is cut or dropped, and
    the longest that was read, goes into `report`."""
    rows = []
    for ids, messages, category in encode(conversations, enc):
        report["longest"] = max(report["longest"], len(ids))
        if len(ids) > s.max_tokens and s.too_long == "drop":
            report[f"dropped: longer than {s.max_tokens} tokens"] += 1
            continue
        if len(ids) > s.max_tokens:
            report[f"answer cut: longer than {s.max_tokens} tokens"] += 1
            ids = cut_answer(ids, enc, s.max_tokens)
            messages = chats.decode_conversation(ids, enc)
        ids = np.array(ids)
        targets = int(chats.supervised(ids, enc).sum())
        if targets < 2:  # <|end|> alone teaches nothing
            report["dropped: nothing of the answer fits"] += 1
            continue
        rows.append(Row(ids, messages, category, targets))
    return rows


# ==================================================================================================
# The idea ends here. Below: fetching, checks, the tokenizer's file, the report.
# ==================================================================================================

# Alpaca's words for a row without an input.
NO_INPUT = re.compile(r"\W*no ?input( required| needed)?\W*", re.IGNORECASE)
BATCH = 2000  # conversations encoded at a time


def fetch(source, out_dir):
    """The local path of a source; an address is downloaded into out_dir first. Raises OSError."""
    if not source.startswith(("http://", "https://")):
        return config.local_path(source)
    path = download(source, out_dir / name_in(source))
    print(f"{path}: {path.stat().st_size:,} bytes, sha256 {sha256_of(path)}", file=sys.stderr)
    return path


def fetch_all(sources, out_dir):
    """The local paths of sources with commas between them, or of one with commas in its name; see
    fetch."""
    names = [sources] if config.is_file(sources) else sources.split(",")
    paths = [fetch(name.strip(), out_dir) for name in names]
    if len(set(paths)) < len(paths):
        raise UserError(f"source={sources}: two files are one, or have one name; name each once")
    return paths


def read_files(paths, bad_rows, report):
    """The conversations of all these files; what their readers tell goes into `report`. Raises
    ValueError or OSError."""
    conversations = []
    for path in paths:
        try:
            found = chats.read_conversations(path, report, drop=bad_rows == "drop")
        except chats.BadRow as error:
            raise UserError(f"{error} (--bad_rows=drop leaves such rows out)") from error
        if not found:
            raise UserError(f"{path}: holds no row")
        conversations += found
    return conversations


def remove_placeholder(messages):
    """Alpaca writes "<noinput>" and the like where a row has no input: take it out, in place."""
    question, _, placeholder = messages[0]["content"].rpartition("\n")
    if NO_INPUT.fullmatch(placeholder):
        messages[0]["content"] = question


def make_tokenizer(s, conversations, folder):
    """The tokenizer that the settings name, as data/tokenizer.py's read_spec has it; bpe is learned
    from these conversations. A dict is written into the folder too."""
    name = s.tokenizer
    if name == "bpe":
        texts = (m["content"] for messages, _ in conversations for m in messages)
        pattern = tokenizers.SPACE_BEHIND_PATTERN if s.space_behind else tokenizers.SPLIT_PATTERN
        spec = tokenizers.train_bpe(texts, s.vocab_size, pattern)
    else:
        spec = tokenizers.read_spec(config.local_path(name) if name.endswith(".json") else name)
    if isinstance(spec, dict):
        tokenizers.write_spec(folder / "tokenizer.json", spec)
    return spec


def encode(conversations, enc):
    """Yield (ids, messages, category) of each conversation: many at a time are faster."""
    for start in range(0, len(conversations), BATCH):
        batch = conversations[start:start + BATCH]
        batch_ids = chats.encode_conversations([messages for messages, _ in batch], enc)
        for ids, (messages, category) in zip(batch_ids, batch):
            yield ids, messages, category
        done = start + len(batch)
        if sys.stderr.isatty():
            print(f"\rencoded {done:,} of {len(conversations):,}",
                  end="" if done < len(conversations) else "\n", file=sys.stderr)


def join_rows(conversations, most, rng):
    """Conversations in a random order, joined into chats of 1 to `most` turns, as many as chance
    says: a model learns to answer after other things were said. A chat has its last's category,
    since its last answer is what is scored."""
    joined, room = [], 0
    for messages, category in rng.sample(conversations, len(conversations)):
        if joined and len(joined[-1][0]) + len(messages) <= room:
            joined[-1] = joined[-1][0] + messages, category
        else:
            joined.append((messages, category))
            room = 2 * rng.randint(1, most)  # messages
    return joined


def cut_answer(ids, enc, max_tokens):
    """Conversation ids cut to at most max_tokens, within the last assistant turn that keeps a token
    of text before <|end|> (hence - 2), and ended with <|end|>; what came after is left out."""
    _, _, assistant, end = chats.special_ids(enc)
    last = max((i for i, token in enumerate(ids[:max_tokens - 2]) if token == assistant), default=0)
    turn_ends = ids.index(end, last)  # where no answer fits last is 0, and this the question's end
    return ids[:min(turn_ends, max_tokens - 1)] + [end]


def write_corpus(path, rows):
    """The same chats for people to read."""
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for split in SPLITS:
            f.writelines(f"{chats.to_text(row.messages)}\n\n" for row in rows[split])


def describe(rows, spec, enc, s, paths, report):
    """What meta.json says of the folder."""
    names = sorted({row.category for split in SPLITS for row in rows[split]})
    meta = {"kind": "chat", "tokenizer": "tokenizer.json" if isinstance(spec, dict) else spec,
            "vocab_size": enc.n_vocab, "seed": s.seed,
            "source": ",".join(path.name for path in paths),
            "sha256": ",".join(map(sha256_of, paths)), "categories": names}
    for split in SPLITS:
        meta[f"{split}_rows"] = len(rows[split])
        meta[f"{split}_tokens"] = sum(len(row.ids) for row in rows[split])
        numbers = [names.index(row.category) for row in rows[split]]
        meta[f"{split}_categories"] = numbers if names != [""] else []
    meta["supervised_tokens"] = sum(row.targets for split in SPLITS for row in rows[split])
    meta["longest"] = report["longest"]
    return meta


def print_report(s, paths, report, meta):
    """Say what was kept, what was dropped and why, and what was not used."""
    rest = sorted(report.keys() - {"rows read", "longest"})
    lines = {"rows read": report["rows read"], **{f"  {what}": report[what] for what in rest},
             "training rows": meta["train_rows"], "held-out rows": meta["val_rows"],
             "tokens": meta["train_tokens"] + meta["val_tokens"],
             "  supervised": meta["supervised_tokens"],
             "longest conversation read": meta["longest"],
             "ids in the vocabulary": meta["vocab_size"]}
    print(f"{', '.join(map(str, paths))} -> {s.out_dir}")
    for name, count in lines.items():
        print(f"  {name:<42}{count:>12,}")


def check_settings(s):
    """Raise ValueError for the first setting out of its range."""
    if s.too_long not in ("cut", "drop"):
        raise UserError(f"too_long={s.too_long!r}: use cut or drop")
    if s.bad_rows not in ("error", "drop"):
        raise UserError(f"bad_rows={s.bad_rows!r}: use error or drop")
    if not 0 < s.val_fraction < 1:
        raise UserError(f"val_fraction={s.val_fraction}: must be between 0 and 1, such as 0.05")
    for name, low in (("repeat", 1), ("join", 1), ("max_tokens", 8)):
        value = getattr(s, name)
        if value < low:
            raise UserError(f"{name}={value}: must be {low} or more")


def check_rows(rows, s):
    """Raise ValueError where a split has no row left."""
    for split in SPLITS:
        if not rows[split]:
            raise UserError(f"{s.source}: no {split} row is left at max_tokens={s.max_tokens}; "
                             "use more")


if __name__ == "__main__":
    config.run(main)
