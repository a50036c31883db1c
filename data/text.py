"""Plain text -> token files, in a stream, so that a file may be larger than memory.

    python -m data.text config/prepare_shakespeare.py    # downloads tiny Shakespeare
    python -m data.text --source=my.txt --out_dir=data/mine --tokenizer=bpe
"""
import codecs
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import config
from config import UserError
from data.datasets import write_meta, write_tokens
from data.download import download, name_in
from data.files import new_files
from data.tokenizer import get_tokenizer, read_spec, train_bpe, write_spec

BLOCK = 1 << 20  # bytes read at a time


@dataclass
class Settings:
    source: str = ""  # a UTF-8 text file, or the http(s) address of one
    out_dir: Path = Path("data/text")  # where train.bin, val.bin and meta.json go
    tokenizer: str = "bytes"  # bytes, gpt2, bpe (learned from this text) or a tokenizer.json
    vocab_size: int = 4096  # ids that bpe makes
    bpe_bytes: int = 100_000_000  # bpe learns from at most so much of the text's beginning
    val_fraction: float = 0.1  # the last part of the text is kept for validation


def read_text(path, start, stop, digest=None):
    """Yield bytes start..stop of a UTF-8 file as strings of about BLOCK bytes, cut after line ends
    where there are any, so that no word is torn. Windows' line ends become "\\n". Feeds `digest`
    what it reads. Raises ValueError for other encodings."""
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()  # sig: Notepad's
    decoder, kept = io.IncrementalNewlineDecoder(decoder, translate=True), ""
    with open(path, "rb") as f:
        f.seek(start)
        while start < stop:
            block = f.read(min(BLOCK, stop - start))
            if not block:
                raise UserError(f"{path}: became shorter while it was read; run it again")
            start += len(block)
            if digest:
                digest.update(block)
            try:
                kept += decoder.decode(block, final=start >= stop)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text "
                                 f"(near byte {start - len(block) + error.start}); "
                                 "save it as UTF-8") from error
            at = kept.rfind("\n") + 1 or len(kept)
            yield kept[:at]
            kept = kept[at:]
    if kept:
        yield kept


def character_start(path, at):
    """The first byte at or after `at` where a UTF-8 character starts, or the end of the file. (Not
    "\\n", which may be the second half of Windows' line end.)"""
    with open(path, "rb") as f:
        f.seek(at)
        while (byte := f.read(1)) and (byte == b"\n" or byte[0] & 0xC0 == 0x80):
            at += 1
    return at


def make_tokenizer(s, path, stop):
    """The tokenizer that the settings name, as data/tokenizer.py's read_spec has it; bpe is learned
    from the text before byte `stop`. Raises ValueError."""
    if s.tokenizer != "bpe":
        is_file = s.tokenizer.endswith(".json")
        return read_spec(config.local_path(s.tokenizer) if is_file else s.tokenizer)
    print(f"training a byte-pair encoding of up to {s.vocab_size} ids ...", file=sys.stderr)
    stop = min(stop, character_start(path, s.bpe_bytes))
    return train_bpe(read_text(path, 0, stop), s.vocab_size)


def main(argv):
    """Turn a text into a prepared folder. Raises ValueError or OSError for a mistake that a user
    can fix."""
    settings = config.load(Settings, argv, __doc__)
    if not settings.source:
        raise UserError("no text given: use --source=FILE, or config/prepare_shakespeare.py")
    if not 0 < settings.val_fraction < 1:
        raise UserError(f"val_fraction={settings.val_fraction}: "
                         "use a value between 0 and 1, such as 0.1")
    if settings.bpe_bytes < 1:
        raise UserError(f"bpe_bytes={settings.bpe_bytes}: must be 1 or more")
    path = config.local_path(settings.source)
    if settings.source.startswith(("http://", "https://")):
        path = download(settings.source, settings.out_dir / name_in(settings.source))
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a text with --source=FILE")
    size = path.stat().st_size
    split = character_start(path, int(size * (1 - settings.val_fraction)))  # here validation starts
    if not 0 < split < size:
        raise UserError(f"{path}: {size} bytes are too few to split into training and validation")
    with new_files(settings.out_dir) as part:
        spec = make_tokenizer(settings, path, split)
        enc, name = get_tokenizer(spec), spec
        if isinstance(spec, dict):
            name = "tokenizer.json"
            write_spec(part / name, spec)
        digest, counts = hashlib.sha256(), {}
        for which, start, stop in (("train", 0, split), ("val", split, size)):
            ids = map(enc.encode_ordinary, read_text(path, start, stop, digest))
            counts[f"{which}_tokens"] = write_tokens(part / f"{which}.bin", ids)
        write_meta(part, {"kind": "text", "tokenizer": name, "vocab_size": enc.n_vocab, **counts,
                          "source": path.name, "sha256": digest.hexdigest()})
    print(f"{path}: {size:,} bytes -> {settings.out_dir}: "
          f"{counts['train_tokens']:,} training tokens, "
          f"{counts['val_tokens']:,} validation tokens, {enc.n_vocab} ids ({name})")


if __name__ == "__main__":
    config.run(main)
