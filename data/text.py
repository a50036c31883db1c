"""Prepare plain text: a UTF-8 file, which may be larger than memory, becomes token files.

    python -m data.text config/prepare_shakespeare.py    # downloads tiny Shakespeare
    python -m data.text --source=my.txt --out_dir=data/mine --tokenizer=bpe
"""
import codecs
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from data.datasets import write_meta, write_tokens
from data.download import download, name_in, sha256_of
from data.files import new_files
from data.tokenizer import get_tokenizer, read_spec, train_bpe, write_spec

BLOCK = 1 << 20  # bytes read at a time


@dataclass
class Settings:
    source: str = ""  # a UTF-8 text file, or the http(s) URL of one
    out_dir: Path = Path("data/text")  # where train.bin, val.bin and meta.json go
    tokenizer: str = "bytes"  # bytes, gpt2, bpe (trained on this text) or a tokenizer.json
    vocab_size: int = 4096  # of bpe
    bpe_bytes: int = 100_000_000  # bpe is trained on the first bytes of the text, at most
    val_fraction: float = 0.1  # the last part of the text is kept for validation


def read_text(path, start, stop):
    """Yield bytes start..stop of a UTF-8 file as strings of about BLOCK bytes, which end with a
    line if possible, so that words stay whole. Windows line ends become "\\n". Raises UserError
    for other encodings."""
    encoding = "utf-8" if start else "utf-8-sig"  # without the byte order mark that Notepad writes
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    rest = ""
    with open(path, "rb") as f:
        f.seek(start)
        for at in range(start, stop, BLOCK):
            block = f.read(min(BLOCK, stop - at))
            try:
                text = rest + decoder.decode(block, final=at + BLOCK >= stop)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text (near byte {at + error.start}); save it "
                                "as UTF-8") from error
            end = text.rfind("\n") + 1 or len(text)
            yield text[:end]
            rest = text[end:]
    yield rest


def character_start(path, at):
    """The position of the first UTF-8 character that starts at byte `at` or later and is not "\\n",
    the second half of a Windows line end; or the end of the file."""
    with open(path, "rb") as f:
        f.seek(at)
        while (byte := f.read(1)) and (byte == b"\n" or byte[0] & 0xC0 == 0x80):
            at += 1
    return at


def make_tokenizer(cfg, path, stop):
    """Return the tokenizer's spec (see data/tokenizer.py). bpe is trained on the text before byte
    `stop`. Raises UserError."""
    if cfg.tokenizer.endswith(".json"):
        return read_spec(config.local_path(cfg.tokenizer))
    if cfg.tokenizer != "bpe":
        return read_spec(cfg.tokenizer)
    print(f"training a byte-pair encoding of up to {cfg.vocab_size} ids ...", file=sys.stderr)
    stop = min(stop, character_start(path, cfg.bpe_bytes))
    return train_bpe(read_text(path, 0, stop), cfg.vocab_size)


def main(argv):
    """Turn a text into a prepared folder. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    if not cfg.source:
        raise UserError("no text given; use --source=FILE, or config/prepare_shakespeare.py")
    config.check(cfg, val_fraction=(0, 1), bpe_bytes=(1, None))
    path = config.local_path(cfg.source)
    if cfg.source.startswith(("http://", "https://")):
        path = download(cfg.source, cfg.out_dir / name_in(cfg.source))
    size = path.stat().st_size
    split = character_start(path, int(size * (1 - cfg.val_fraction)))
    if not 0 < split < size:
        raise UserError(f"{path}: {size} bytes cannot be split at val_fraction={cfg.val_fraction}; "
                        "use more text")
    with new_files(cfg.out_dir) as folder:
        spec = make_tokenizer(cfg, path, split)
        enc, name = get_tokenizer(spec), spec
        if isinstance(spec, dict):
            name = "tokenizer.json"
            write_spec(folder / name, spec)
        counts = {}
        for part, start, stop in (("train", 0, split), ("val", split, size)):
            ids = map(enc.encode_ordinary, read_text(path, start, stop))
            counts[f"{part}_tokens"] = write_tokens(folder / f"{part}.bin", ids)
        write_meta(folder, {"kind": "text", "tokenizer": name, "vocab_size": enc.n_vocab, **counts,
                            "source": path.name, "sha256": sha256_of(path)})
    print(f"{path}: {size:,} bytes -> {cfg.out_dir}: {counts['train_tokens']:,} training tokens, "
          f"{counts['val_tokens']:,} validation tokens, {enc.n_vocab} ids ({name})")


if __name__ == "__main__":
    config.run(main)
