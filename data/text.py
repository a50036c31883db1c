"""Prepare plain text: a UTF-8 file, which may be larger than memory, becomes token files.

    python -m data.text config/prepare_shakespeare.py    # downloads tiny Shakespeare
    python -m data.text --source=my.txt --out_dir=data/mine --tokenizer=bpe
"""
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from data.datasets import write_meta, write_tokens
from data.download import fetch, sha256_of
from data.files import new_files
from data.tokenizer import make_tokenizer

BLOCK = 1 << 20  # bytes read at a time


@dataclass
class Settings:
    source: str = ""  # a UTF-8 text file, or the http(s) URL of one
    out_dir: Path = Path("data/text")  # where train.bin, val.bin and meta.json go
    tokenizer: str = "bytes"  # bytes, gpt2, bpe (trained on this text) or a tokenizer.json
    vocab_size: int = 4096  # of bpe
    bpe_bytes: int = 100_000_000  # bpe is trained on the first bytes of the text, at most
    val_fraction: float = 0.1  # fraction held out for validation, from the end of the text


def read_text(path, start, stop):
    """Yield bytes start..stop of a UTF-8 file as strings of whole lines, together about BLOCK bytes
    each. Windows line ends become "\\n". Raises UserError for other encodings."""
    with open(path, "rb") as f:
        f.seek(start)
        while start < stop:
            block = b"".join(f.readlines(BLOCK))[:stop - start]
            try:  # -sig: without the byte-order mark that Notepad writes
                text = block.decode("utf-8" if start else "utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text (byte {start + error.start}); save it as "
                                "UTF-8") from error
            yield text.replace("\r\n", "\n").replace("\r", "\n")
            start += len(block)


def character_start(path, at):
    """Return the first position from `at` on that splits neither a UTF-8 character nor a Windows
    line ending, so never one before "\\n"; or the end of the file."""
    with open(path, "rb") as f:
        f.seek(at)
        while (byte := f.read(1)) and (byte == b"\n" or byte[0] & 0xC0 == 0x80):
            at += 1
    return at


def main(argv):
    """Turn a text into a prepared folder. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    if not cfg.source:
        raise UserError("no text given; use --source=FILE, or config/prepare_shakespeare.py")
    config.check(cfg, val_fraction=(0, 1), bpe_bytes=(1, None))
    path = fetch(cfg.source, cfg.out_dir)
    size = path.stat().st_size
    split = character_start(path, int(size * (1 - cfg.val_fraction)))
    if not 0 < split < size:
        raise UserError(f"{path}: {size} bytes cannot be split at val_fraction={cfg.val_fraction}; "
                        "use more text")
    with new_files(cfg.out_dir) as folder:
        learned_from = read_text(path, 0, min(split, character_start(path, cfg.bpe_bytes)))
        enc, name = make_tokenizer(cfg.tokenizer, folder, learned_from, cfg.vocab_size)
        train, val = (
            write_tokens(folder / f"{part}.bin", map(enc.encode_ordinary, read_text(path, *span)))
            for part, span in (("train", (0, split)), ("val", (split, size))))
        write_meta(folder, {"kind": "text", "tokenizer": name, "vocab_size": enc.n_vocab,
                            "train_tokens": train, "val_tokens": val, "source": path.name,
                            "sha256": sha256_of(path)})
    print(f"{path}: {size:,} bytes -> {cfg.out_dir}: {train:,} training tokens, {val:,} validation "
          f"tokens, {enc.n_vocab} ids ({name})")


if __name__ == "__main__":
    config.run(main)
