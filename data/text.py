"""Turn plain text, which may be larger than memory, into token files.

    python -m data.text config/prepare_shakespeare.py    # downloads tiny Shakespeare
    python -m data.text --source=my.txt --out_dir=data/mine --tokenizer=bpe

A source is UTF-8 text or JSON lines ({"text": "..."}), gzipped or not, or a folder of such
files. <|endoftext|> in a text becomes the token that separates documents. One is added between the
rows of JSON lines and between the files of a folder.
"""
import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from data.datasets import write_meta, write_tokens
from data.download import fetch, sha256_of
from data.files import new_files
from data.tokenizer import END_OF_TEXT, make_tokenizer

BLOCK = 1 << 20  # characters read at a time
JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
IN_FOLDERS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")  # which files of a folder are read


@dataclass
class Settings:
    source: str = ""  # a .txt, .jsonl, .txt.gz or .jsonl.gz, its http(s) URL, or a folder of them
    out_dir: Path = Path("data/text")  # where train.bin, val.bin and meta.json go
    tokenizer: str = "bytes"  # bytes, gpt2, bpe (trained on this text) or a tokenizer.json
    vocab_size: int = 4096  # size of a bpe vocabulary, without the four special tokens
    bpe_chars: int = 100_000_000  # train bpe on at most this many characters: the first ones
    val_fraction: float = 0.1  # fraction held out for validation, from the end of the text


def read_documents(files):
    """Yield the text of files in pieces of whole lines, about BLOCK characters each, and
    END_OF_TEXT as its own piece. Windows line endings become "\\n". Raises UserError, OSError."""
    for number, path in enumerate(files):
        if number:
            yield END_OF_TEXT
        for piece in read_file(path):
            yield from filter(None, re.split(f"({re.escape(END_OF_TEXT)})", piece))


def read_file(path):
    """Yield the text of a file in pieces. Raises UserError, or OSError if there is no file."""
    try:  # -sig: without the byte-order mark that Notepad writes
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as f:
            if path.name.endswith(JSON_LINES):
                yield from read_json_lines(path, f)
            while block := f.read(BLOCK) + f.readline():
                yield block
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.object[:error.end][-20:]}; save it as "
                        "UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be decompressed: {error}; download it again") from error


def read_json_lines(path, lines):
    """Yield the "text" of each row, and END_OF_TEXT before each but the first."""
    separator = ""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"].replace("\r\n", "\n")
                text.encode("utf-8")  # raises a ValueError for a lone surrogate
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UserError(f"{path}, line {number}: must be a row of JSON lines, {{\"text\": "
                                "\"...\"}; if the JSON itself is the text, name it .txt") from error
            yield separator + text
            separator = END_OF_TEXT


def cut(pieces, start, stop):
    """Yield characters start..stop of a text in pieces. Never cut END_OF_TEXT."""
    at = 0
    for piece in pieces:
        if at >= stop:
            return
        if piece == END_OF_TEXT and at >= start:
            yield piece
        elif piece != END_OF_TEXT and at + len(piece) > start:
            yield piece[max(start - at, 0):stop - at]
        at += len(piece)


def main(argv):
    """Turn a text into a prepared folder. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    if not cfg.source:
        raise UserError("no text given; use --source=FILE, or config/prepare_shakespeare.py")
    config.check(cfg, val_fraction=(0, 1), bpe_chars=(1, None))
    path = fetch(cfg.source, cfg.out_dir)
    files = [path] if not path.is_dir() else sorted(
        file for file in path.rglob("*") if file.name.endswith(IN_FOLDERS))
    size = sum(map(len, read_documents(files)))
    split = int(size * (1 - cfg.val_fraction))
    with new_files(cfg.out_dir) as folder:
        learned_from = cut(read_documents(files), 0, min(split, cfg.bpe_chars))
        enc, name = make_tokenizer(
            cfg.tokenizer, folder, (piece for piece in learned_from if piece != END_OF_TEXT),
            cfg.vocab_size)
        separator = [enc.encode_single_token(END_OF_TEXT)]
        train, val = (
            write_tokens(folder / f"{part}.bin", (
                separator if piece == END_OF_TEXT else enc.encode_ordinary(piece)
                for piece in cut(read_documents(files), *span)))
            for part, span in (("train", (0, split)), ("val", (split, size))))
        if not train or not val:
            raise UserError(f"{path}: {size} characters in {len(files)} files cannot be split at "
                            f"val_fraction={cfg.val_fraction}; use more text (in a folder, only "
                            f"{', '.join(IN_FOLDERS)} files are read)")
        write_meta(folder, {"kind": "text", "tokenizer": name, "vocab_size": enc.n_vocab,
                            "train_tokens": train, "val_tokens": val, "source": path.name,
                            "sha256": sha256_of(*files)})
    print(f"{path}: {size:,} characters -> {cfg.out_dir}: {train:,} training tokens, {val:,} "
          f"validation tokens, {enc.n_vocab} ids ({name})")


if __name__ == "__main__":
    config.run(main)
