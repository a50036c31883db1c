"""Finetune a model on chats: turn one that goes on with text into one that answers.

    python finetune.py config/finetune_chat.py           # a model of train.py, minutes on a CPU
    python finetune.py config/finetune_instruction.py    # GPT-2 on the small instruction data
    python finetune.py config/finetune_alpaca.py         # GPT-2 on Stanford Alpaca, for a GPU
    python finetune.py --init_from=out/mine/best.pt --data_dir=data/my_chats --out_dir=out/my_chat

The loop, the checkpoints, --resume and the signals are train.py's; what differs is the defaults,
and that it counts epochs. Only the assistant's words and its <|end|> are learned
(data/conversation.py, `supervised`, by which data/tokens.py makes a batch's targets).
"""
import config  # isort: skip  # first: from here on Ctrl-C leaves no traceback
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import train
from data.tokens import read_meta
from model import pick_device


@dataclass
class Settings(train.LoopSettings):
    """The loop's settings with other defaults, and what to start from."""
    init_from: str = "gpt2"  # gpt2, gpt2-medium, ...; a best.pt; a Hugging Face model's folder
    data_dir: Path = Path("data/alpaca")  # a folder that prepare_alpaca.py made
    out_dir: Path = Path("out/alpaca")  # where best.pt and last.pt go
    block_size: int = 0  # a shorter context than the model has learned; 0: all of it
    epochs: int = 3  # times each conversation is seen; the last step may see a few more
    max_iters: int = 0  # steps; 0: as many as the epochs have
    eval_interval: int = 0  # steps between evaluations; 0: one after each epoch, 20 in all
    optimizer: str = "adamw"  # adamw (all), or muon (the blocks' matrices; AdamW for the rest)
    learning_rate: float = 5e-5  # peak
    embedding_learning_rate: float = 5e-5  # peak, of the AdamW beside muon
    dropout: float = 0.1  # share of activations zeroed while training; slows memorizing


def main(argv):
    """Finetune as the settings say. Raises ValueError or OSError for a mistake of the user's."""
    s = train.load_settings(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = pick_device(s.device, s.dtype)
    with train.processes(device) as device, train.alone_in(s):
        model, dataset, resumed = train.set_up(s, device, train.load_base)
        if not s.eval_only:
            count_steps(s, dataset)
        say_what_is_read(s, dataset)
        train.run(s, model, dataset, device, dtype, why, resumed)


def count_steps(s, dataset):
    """Fill in max_iters and eval_interval where they are 0: all epochs in steps, and an evaluation
    for each epoch."""
    steps = ceil(dataset.batches_until("train", s.epochs) / s.gradient_accumulation)
    s.max_iters = s.max_iters or steps
    s.eval_interval = s.eval_interval or ceil(steps / min(s.epochs, 20))


# ==================================================================================================
# The idea ends here. Below: checks and messages.
# ==================================================================================================

def check_settings(s):
    """Raise ValueError for the first setting out of its range, or data that holds no chats."""
    train.check_settings(s, may_be_0=("block_size", "max_iters", "eval_interval"))
    if read_meta(s.data_dir)["kind"] != "chat":
        raise ValueError(f"data_dir={s.data_dir}: holds plain text; finetune on chats "
                         "(prepare_alpaca.py), or go on with text by train.py --init_from")


def say_what_is_read(s, dataset):
    """Print what the steps come to, and what of the data they leave out."""
    if not s.eval_only:
        print(f"{s.init_from}: {s.max_iters:,} steps are "
              f"{train.epochs(dataset, s.max_iters, s):.1f} epochs of "
              f"{len(dataset.starts['train']):,} conversations")
    if dropped := dataset.dropped["train"]:
        print(f"{dropped:,} conversations are left out: nothing of the answer lies in their first "
              f"{dataset.block_size} tokens")


if __name__ == "__main__":
    config.run(main)
