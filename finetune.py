"""Finetune a model on chats: turn one that goes on with text into one that answers.

    python finetune.py config/finetune_instruction.py    # GPT-2 on the small instruction data
    python finetune.py config/finetune_alpaca.py         # GPT-2 on Stanford Alpaca, for a GPU
    python finetune.py config/finetune_chat_small.py     # a model of train.py, minutes on a CPU
    python finetune.py --init_from=out/mine/best.pt --data_dir=data/mine

The loop, the checkpoints, --resume and the signals are those of train.py; what differs is where the weights
come from and that it counts epochs. Only the assistant's words and its <|end|> are learned.
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import config
import train
from data.tokens import open_dataset, read_meta
from model import GPT, load_checkpoint, model_from_checkpoint, pick_device


@dataclass
class Settings(train.LoopSettings):
    """The loop's settings with other defaults, and what to start from."""
    init_from: str = "gpt2"  # gpt2, gpt2-medium, ...; a best.pt; or a folder that transformers opens
    data_dir: Path = Path("data/alpaca")  # a folder that prepare_alpaca.py made
    out_dir: Path = Path("out/alpaca")  # where best.pt and last.pt go
    block_size: int = 0  # a shorter context than the model has learned; 0: all it has
    epochs: int = 3  # how often each conversation is seen
    max_iters: int = 0  # steps; 0: as many as the epochs have
    eval_interval: int = 0  # steps between evaluations; 0: an evaluation after each epoch
    optimizer: str = "adamw"  # adamw (all), or muon (the blocks' matrices; AdamW for the rest)
    learning_rate: float = 5e-5  # peak
    embedding_learning_rate: float = 5e-5  # peak, of the AdamW beside muon
    dropout: float = 0.1  # share of activations zeroed while training; slows memorizing


def load_base(s, dataset, device):
    """The model to finetune, with a context of s.block_size. Raises ValueError or OSError: no such model, or
    one that does not know the ids of the data."""
    path = config.local_path(s.init_from)
    if path.suffix == ".pt":
        checkpoint = load_checkpoint(path, "Train one first: python train.py config/train_chat.py")
        model, tokenizer = model_from_checkpoint(checkpoint, device, s.dropout), checkpoint["tokenizer"]
        model.crop_block_size(s.block_size or model.config.block_size)
    else:
        name = str(path) if path.exists() else s.init_from
        model = GPT.from_pretrained(name, dataset.vocab_size, s.block_size or None, s.dropout).to(device)
        tokenizer = "gpt2"
    if tokenizer != dataset.tokenizer:
        raise ValueError(f"init_from={s.init_from}: does not know the tokenizer and role tokens of "
                         f"data_dir={s.data_dir}; prepare the data with the model's own: prepare_alpaca.py "
                         "--tokenizer=gpt2, or --tokenizer=FILE, the tokenizer.json it was trained with")
    return model


def count_steps(s, dataset):
    """Fill in max_iters and eval_interval where they are 0: epochs in steps, and an evaluation per epoch."""
    steps = -(-dataset.batches_until("train", s.epochs) // s.gradient_accumulation)
    s.max_iters = s.max_iters or steps
    s.eval_interval = s.eval_interval or max(steps // s.epochs, 1)


def main(argv):
    s = config.load(Settings, argv, __doc__)
    if s.epochs < 1 or s.block_size < 0 or s.max_iters < 0 or s.eval_interval < 0:
        raise ValueError(f"epochs={s.epochs} must be 1 or more, block_size={s.block_size}, max_iters="
                         f"{s.max_iters} and eval_interval={s.eval_interval} 0 or more")
    if read_meta(s.data_dir)["kind"] != "chat":
        raise ValueError(f"data_dir={s.data_dir}: holds plain text; finetune on chats (prepare_alpaca.py), or "
                         "go on with text by train.py --init_from")
    device, dtype, why = pick_device(s.device, s.dtype)
    torch.manual_seed(s.seed)
    resumed = load_checkpoint(s.out_dir / "last.pt", "Start without --resume=True.") if s.resume else None
    block_size = resumed["config"]["block_size"] if resumed else s.block_size
    dataset = open_dataset(s.data_dir, block_size or 1024, s.batch_size, s.seed)
    model = load_base(s, dataset, device)
    if model.config.block_size < dataset.block_size:
        dataset = open_dataset(s.data_dir, model.config.block_size, s.batch_size, s.seed)
    count_steps(s, dataset)
    train.check_settings(s)
    if resumed:
        resumed = train.load_resumed(s, dataset)
        model = model_from_checkpoint(resumed, device, s.dropout)
    if dropped := dataset.dropped["train"]:
        print(f"{dropped} conversations are left out: nothing of the answer within {dataset.block_size} tokens")
    print(f"{s.epochs} epochs of {len(dataset.starts['train']):,} conversations: {s.max_iters} steps")
    train.run(s, model, dataset, device, dtype, why, resumed)


if __name__ == "__main__":
    config.run(main)
