"""Download FineWeb, 10 billion tokens of web pages, tokenized for GPT-2 in shards of 100 million.

    python -m data.fineweb --shards=9    # 0.9 billion training tokens: 2 GB
    python -m data.fineweb               # all of them, for config/train_gpt2.py: 21 GB

Shards that exist are kept. FineWeb: Penedo et al. 2024; the shards: kjj0/fineweb10B-gpt2 on the
model hub, in the format of Karpathy's llm.c: a header of 1,024 bytes, then the ids as uint16.
"""
from dataclasses import dataclass
from pathlib import Path

import config
from data.datasets import SPLITS, write_meta
from data.download import download, hub
from data.files import lock_folder
from data.tokenizer import GPT2_VOCAB_SIZE, ROLE_TOKENS

URL = "{hub}/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{split}_{number:06}.bin"
HEADER_BYTES = 1024


@dataclass
class Settings:
    shards: int = 103  # training shards of 100 million tokens; there are 103
    out_dir: Path = Path("data/fineweb")  # where train_000.bin ..., val_000.bin and meta.json go


def main(argv):
    """Download the shards that are missing. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, shards=(1, 103))
    names = ["val_000.bin", *(f"train_{n:03}.bin" for n in range(cfg.shards))]
    with lock_folder(cfg.out_dir):
        for number, name in enumerate(names):  # the hub numbers val 0, and train from 1
            split = name.partition("_")[0]
            download(URL.format(hub=hub(), split=split, number=number), cfg.out_dir / name)
        train, val = (sum((path.stat().st_size - HEADER_BYTES) // 2
                          for path in cfg.out_dir.glob(f"{split}_*.bin")) for split in SPLITS)
        write_meta(cfg.out_dir, {
            "kind": "text", "tokenizer": "gpt2", "train_tokens": train, "val_tokens": val,
            "source": "fineweb10B-gpt2", "vocab_size": GPT2_VOCAB_SIZE + len(ROLE_TOKENS),
            "header_bytes": HEADER_BYTES})
    print(f"{cfg.out_dir}: {train:,} training tokens, {val:,} validation tokens")


if __name__ == "__main__":
    config.run(main)
