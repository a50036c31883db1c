"""Download FineWeb, 10 billion tokens of web pages, tokenized for GPT-2 in shards of 100 million.

    python -m data.fineweb --shards=9    # 0.9 billion training tokens: 2 GB
    python -m data.fineweb               # all of them, for config/train_gpt2.py: 21 GB

Shards that exist are kept. FineWeb: Penedo et al. 2024; the shards: kjj0/fineweb10B-gpt2 on the
model hub, in the format of Karpathy's llm.c.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from config import UserError
from data.datasets import SPLITS, write_meta
from data.download import download, hub, name_in
from data.files import lock_folder, write_atomically
from data.tokenizer import GPT2_VOCAB_SIZE, ROLE_TOKENS

URL = "{hub}/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{split}_{number:06}.bin"
MAGIC, VERSION = 20240520, 1  # the first numbers of a shard's header; the third counts its tokens
HEADER_BYTES = 256 * 4


@dataclass
class Settings:
    shards: int = 103  # training shards of 100 million tokens; there are 103
    out_dir: Path = Path("data/fineweb")  # where train_000.bin ..., val_000.bin and meta.json go


def unpack(raw, path):
    """Turn a downloaded shard into plain uint16 ids at `path`, then delete the download. Raises
    UserError for a file in a different format."""
    n_tokens = (raw.stat().st_size - HEADER_BYTES) // 2
    header = np.fromfile(raw, "<i4", 3).tolist()
    if header != [MAGIC, VERSION, n_tokens]:
        raise UserError(f"{raw}: not a complete shard of tokens (its header starts with {header}); "
                        "delete it and try again")
    ids = np.fromfile(raw, "<u2", offset=HEADER_BYTES)
    write_atomically(path, lambda f: f.write(ids))
    raw.unlink()


def main(argv):
    """Download and unpack the shards that are missing. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, shards=(1, 103))
    names = ["val_000.bin", *(f"train_{n:03}.bin" for n in range(cfg.shards))]
    with lock_folder(cfg.out_dir):
        for number, name in enumerate(names):  # the hub numbers val 0, and train from 1
            path, split = cfg.out_dir / name, name.partition("_")[0]
            if not path.exists():
                url = URL.format(hub=hub(), split=split, number=number)
                unpack(download(url, cfg.out_dir / name_in(url)), path)
                print(f"{path}: {path.stat().st_size // 2:,} tokens", flush=True)
        train, val = (sum(path.stat().st_size // 2 for path in cfg.out_dir.glob(f"{split}_*.bin"))
                      for split in SPLITS)
        write_meta(cfg.out_dir, {
            "kind": "text", "tokenizer": "gpt2", "train_tokens": train, "val_tokens": val,
            "source": "fineweb10B-gpt2", "vocab_size": GPT2_VOCAB_SIZE + len(ROLE_TOKENS)})
    print(f"{cfg.out_dir}: {train:,} training tokens, {val:,} validation tokens")


if __name__ == "__main__":
    config.run(main)
