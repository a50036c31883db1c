"""Plain text -> token files, in a stream, so that a file may be larger than memory.

    python -m data.text config/prepare_shakespeare.py    # downloads tiny Shakespeare
    python -m data.text --source=my.txt --out_dir=data/mine --tokenizer=bpe
"""
import config  # isort: skip  # first: from here on Ctrl-C leaves no traceback
import codecs
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from data.download import download, name_in
from data.files import new_files
from data.tokenizer import get_tokenizer, train_bpe, write_spec
from data.tokens import write_meta, write_tokens

BLOCK = 1 << 20  # bytes read at a time


@dataclass
class Settings:
    source: str = ""  # a UTF-8 text file, or the http(s) address of one
    out_dir: Path = Path("data/text")  # where train.bin, val.bin and meta.json go
    tokenizer: str = "bytes"  # bytes, gpt2, bpe (trained on this text) or a tokenizer.json's path
    vocab_size: int = 4096  # ids that bpe makes
    bpe_bytes: int = 100_000_000  # bpe learns from at most so much of the text's beginning
    val_fraction: float = 0.1  # the last part of the text is kept for validation


def read_text(path, start, stop, digest=None):
    """Yield bytes start..stop of a UTF-8 file as strings of about BLOCK bytes, cut after line ends
    where there are any, so that no word is torn. Feeds `digest` what it reads. Raises ValueError
    for other encodings."""
    decoder, kept = codecs.getincrementaldecoder("utf-8")(), ""
    with open(path, "rb") as f:
        f.seek(start)
        while start < stop:
            block = f.read(min(BLOCK, stop - start))
            if not block:
                raise ValueError(f"{path}: became shorter while it was read; run it again")
            start += len(block)
            if digest:
                digest.update(block)
            try:
                kept += decoder.decode(block, final=start >= stop)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 text "
                                 f"(near byte {start - len(block) + error.start}); "
                                 "save it as UTF-8") from error
            at = kept.rfind("\n") + 1 or len(kept)
            yield kept[:at]
            kept = kept[at:]
    if kept:
        yield kept


def find_split(path, val_fraction):
    """(train bytes, all bytes): where validation starts."""
    size = path.stat().st_size
    return character_start(path, int(size * (1 - val_fraction))), size


def character_start(path, at):
    """The first byte at or after `at` where a UTF-8 character starts, or the end of the file."""
    with open(path, "rb") as f:
        f.seek(at)
        while (byte := f.read(1)) and byte[0] & 0xC0 == 0x80:  # inside a character
            at += 1
    return at


def main(argv):
    """Turn a text into a prepared folder. Raises ValueError or OSError for a mistake that a user
    can fix."""
    settings = config.load(Settings, argv, __doc__)
    if not settings.source:
        raise ValueError("no text given: use --source=FILE, or config/prepare_shakespeare.py")
    if not 0 < settings.val_fraction < 1:
        raise ValueError(f"val_fraction={settings.val_fraction}: "
                         "use a value between 0 and 1, such as 0.1")
    if settings.bpe_bytes < 1:
        raise ValueError(f"bpe_bytes={settings.bpe_bytes}: must be 1 or more")
    path = config.local_path(settings.source)
    if settings.source.startswith(("http://", "https://")):
        path = download(settings.source, settings.out_dir / name_in(settings.source))
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a text with --source=FILE")
    split, size = find_split(path, settings.val_fraction)
    if not 0 < split < size:
        raise ValueError(f"{path}: {size} bytes are too few to split into training and validation")
    name = settings.tokenizer
    name = config.local_path(name) if name.endswith(".json") else name
    with new_files(settings.out_dir) as part:
        if name == "bpe":
            print(f"training a byte-pair encoding of {settings.vocab_size} ids ...",
                  file=sys.stderr)
            learned = min(split, character_start(path, settings.bpe_bytes))
            write_spec(part / "tokenizer.json",
                       train_bpe(read_text(path, 0, learned), settings.vocab_size))
            name = part / "tokenizer.json"
        enc = get_tokenizer(name)
        digest = hashlib.sha256()
        counts = {f"{which}_tokens": write_tokens(part / f"{which}.bin", map(
            enc.encode_ordinary, read_text(path, start, stop, digest)))
            for which, start, stop in (("train", 0, split), ("val", split, size))}
        # Made elsewhere: comes along.
        if str(name).endswith(".json") and settings.tokenizer != "bpe":
            (part / "tokenizer.json").write_bytes(Path(name).read_bytes())
        stored = "tokenizer.json" if str(name).endswith(".json") else name
        write_meta(part, {"kind": "text", "tokenizer": stored, "vocab_size": enc.n_vocab, **counts,
                          "source": path.name, "sha256": digest.hexdigest()})
    print(f"{path}: {size:,} bytes -> {settings.out_dir}: "
          f"{counts['train_tokens']:,} training tokens, "
          f"{counts['val_tokens']:,} validation tokens, {enc.n_vocab} ids ({stored})")


if __name__ == "__main__":
    config.run(main)
