"""Finetune a model on chats: turn a base model, which continues text, into one that answers.

    python finetune.py config/finetune_chat.py           # a train.py model, minutes on a CPU
    python finetune.py config/finetune_instruction.py    # GPT-2 on the small instruction data
    python finetune.py config/finetune_alpaca.py         # GPT-2 on Stanford Alpaca, for a GPU
    python finetune.py --init_from=out/mine/best.pt --data_dir=data/my_chats --out_dir=out/my_chat

The loop, checkpoints, --resume and signals are train.py's. Only the defaults differ, and the
number of steps comes from epochs. The loss covers the assistant's text and its <|end|>
(`supervised` in data/conversation.py marks them, data/datasets.py turns them into targets).
"""
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import config
import train
from config import UserError
from data.datasets import read_meta
from runtime import setup


@dataclass
class Settings(train.LoopSettings):
    """The loop's settings with other defaults, and the model to start from."""
    init_from: str = "gpt2"  # gpt2, gpt2-medium, ...; a best.pt; a Hugging Face model's folder
    data_dir: Path = Path("data/alpaca")  # a folder that prepare_alpaca.py made
    out_dir: Path = Path("out/alpaca")  # where best.pt and last.pt go
    block_size: int = 0  # shorten the model's context to this many tokens; 0: do not
    epochs: int = 3  # passes over the conversations
    max_iters: int = 0  # steps; 0: computed from epochs
    eval_interval: int = 0  # steps between evaluations; 0: after each epoch, at most 20 times
    optimizer: str = "adamw"  # adamw (all), or muon (the blocks' matrices; AdamW for the rest)
    learning_rate: float = 5e-5  # peak
    embedding_learning_rate: float = 5e-5  # peak, of the AdamW used alongside Muon
    dropout: float = 0.1  # fraction of activations zeroed in training; slows overfitting


def main(argv):
    """Finetune as the settings say. Raises UserError or OSError for a mistake that a user can
    fix."""
    cfg = setup.load_settings(Settings, argv, __doc__, may_be_0=("max_iters", "eval_interval"))
    if read_meta(cfg.data_dir)["kind"] != "chat":
        raise UserError(f"data_dir={cfg.data_dir}: contains plain text; finetune on chats "
                        "(prepare_alpaca.py), or train on text with train.py --init_from")
    train.run(cfg, setup.load_base, set_steps)


def set_steps(cfg, dataset):
    """Return the settings with max_iters and eval_interval computed from epochs where they are 0;
    print both."""
    steps = ceil(dataset.batches_until("train", cfg.epochs) / cfg.gradient_accumulation)
    cfg = replace(cfg, max_iters=cfg.max_iters or steps, eval_interval=(
        cfg.eval_interval or ceil(steps / min(cfg.epochs, 20))))
    epochs = dataset.epochs("train", cfg.max_iters * cfg.gradient_accumulation)
    print(f"finetuning {cfg.init_from}: {cfg.max_iters:,} steps, {epochs:.1f} epochs of "
          f"{len(dataset.splits['train'].starts):,} conversations")
    if dropped := dataset.splits["train"].dropped:
        print(f"{dropped:,} conversations are left out: their reply starts after the first "
              f"{dataset.block_size} tokens")
    return cfg


if __name__ == "__main__":
    config.run(main)
