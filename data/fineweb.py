"""FineWeb, web pages that others tokenized for GPT-2 -> token files, shard by shard.

    python -m data.fineweb --shards=9    # 0.9 billion tokens to train on, 0.1 to validate: 2 GB
    python -m data.fineweb               # all ten billion, for config/train_gpt2.py: 21 GB

A shard that is there already is not fetched again. The variable HF_ENDPOINT names a mirror of the
hub. FineWeb: Penedo et al. 2024; these shards: the hub's kjj0/fineweb10B-gpt2, in the format of
Karpathy's llm.c.
"""
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from data.datasets import SPLITS, shards, write_meta
from data.download import delete, download, hub, name_in
from data.files import lock_folder, rename
from data.tokenizer import GPT2_VOCAB_SIZE, ROLE_TOKENS

URL = "{mirror}/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{split}_{number:06}.bin"
# The first numbers of a shard's header; the third is the count of tokens.
MAGIC, VERSION = 20240520, 1
HEADER = 256 * 4  # bytes


@dataclass
class Settings:
    shards: int = 103  # of training, 100 million tokens each; 103 are all
    out_dir: Path = Path("data/fineweb")  # where train_000.bin ..., val_000.bin and meta.json go
    url: str = URL  # where shards come from; {mirror}, {split}, {number} are filled in


def unpack(raw, path):
    """Turn a downloaded shard into plain uint16 ids at `path`. Raises ValueError for a file that is
    none."""
    with open(raw, "rb") as f:
        header = np.frombuffer(f.read(HEADER).ljust(HEADER, b"\0"), "<i4")
        if header[0] != MAGIC or header[1] != VERSION:
            raise UserError(f"{raw}: no shard of tokens (its header begins "
                             f"{header[:3].tolist()}, not {MAGIC}, {VERSION}); "
                             "delete it and try again")
        size = raw.stat().st_size
        if size != HEADER + 2 * int(header[2]):
            raise UserError(f"{raw}: {size:,} bytes, but its header tells of {header[2]:,} "
                             "tokens; delete it and try again")
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as out:
            shutil.copyfileobj(f, out, 1 << 20)
    rename(part, path)
    delete(raw)


def count_tokens(path):
    """How many tokens a file of uint16 ids holds."""
    return path.stat().st_size // 2


def main(argv):
    """Fetch and unpack the shards that are not there yet. Raises ValueError or OSError."""
    s = config.load(Settings, argv, __doc__)
    if not 1 <= s.shards <= 103:
        raise UserError(f"shards={s.shards}: must be from 1 to 103")
    wanted = [("val", "val_000.bin")]
    wanted += [("train", f"train_{n:03}.bin") for n in range(s.shards)]
    with lock_folder(s.out_dir):
        for number, (split, name) in enumerate(wanted):  # the hub counts on from val's 0
            path = s.out_dir / name
            if not path.exists():
                url = s.url.format(mirror=hub(), split=split, number=number)
                unpack(download(url, s.out_dir / name_in(url)), path)
                print(f"{path}: {count_tokens(path):,} tokens", flush=True)
            if split == "train":  # the folder can be trained on from here on
                counts = {f"{part}_tokens": sum(map(count_tokens, shards(s.out_dir, part)))
                          for part in SPLITS}
                write_meta(s.out_dir, {"kind": "text", "tokenizer": "gpt2",
                                       "vocab_size": GPT2_VOCAB_SIZE + len(ROLE_TOKENS), **counts,
                                       "source": "fineweb10B-gpt2"})
    print(f"{s.out_dir}: {counts['train_tokens']:,} training tokens, "
          f"{counts['val_tokens']:,} for validation")


if __name__ == "__main__":
    config.run(main)
