"""Checkpoint files: a model's config, weights and tokenizer, and how it was trained. best.pt has
what chat.py needs; last.pt also has what an exact resume needs (runtime/resume.py). Loading one
never executes code (weights_only=True)."""
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from config import UserError, local_path
from data.files import write_atomically
from data.weights import GPT2_NAMES
from model import GPTConfig, empty_model, load_gpt2, load_weights


def model_state(model, tokenizer_spec, kind, **extra):
    """Return a dict for save_checkpoint: what chat.py needs, plus extra. kind: "chat" or "text"."""
    return {"config": asdict(model.config), "model": model.state_dict(),
            "tokenizer": tokenizer_spec, "kind": kind, **extra}


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values atomically. Raises OSError."""
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path):
    """Return the dict that save_checkpoint wrote. Raises UserError for a file that is missing,
    damaged, or not a checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint. Run make chat, or train with the config file "
                        "that writes it.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True,
                                mmap=sys.platform != "win32")  # Windows locks mapped files
        GPTConfig(**checkpoint["config"])
    except Exception as error:  # torch.load raises many types of error for a damaged file
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}: {reason}); "
                        "use a different one, or train again") from error
    return checkpoint


def load_model(checkpoint, dropout=0.0, source="the checkpoint"):
    """Return the GPT in a checkpoint's dict. Raises UserError if it does not fit model.py."""
    model = empty_model(GPTConfig(**checkpoint["config"] | {"dropout": dropout}))
    load_weights(model, checkpoint["model"], source)
    return model


def load_pretrained(source, dropout=0.0):
    """Load a trained model: return (GPT, tokenizer spec, number of questions in the longest
    training chat, 0 for plain text). source: a checkpoint's .pt, or GPT-2's weights: gpt2,
    gpt2-medium, gpt2-large, gpt2-xl (downloaded once), or a folder or file that data/weights.py
    reads. A run's folder stands for its best.pt. Raises UserError or OSError."""
    path = local_path(str(source))
    if (path / "best.pt").is_file():  # the folder of a run
        path = path / "best.pt"
    if path.suffix == ".pt" and path.name != "ckpt.pt":  # ckpt.pt is nanoGPT's
        checkpoint = load_checkpoint(path)
        turns = checkpoint.get("turns", 1) if checkpoint["kind"] == "chat" else 0
        return load_model(checkpoint, dropout, path), checkpoint["tokenizer"], turns
    model = load_gpt2(source if source in GPT2_NAMES else path, dropout=dropout)
    if model.config.vocab_size != GPTConfig.vocab_size:
        raise UserError(f"{source}: its {model.config.vocab_size} token ids are not GPT-2's, and "
                        "their tokenizer is unknown; use a best.pt of train.py")
    return model, "gpt2", 0
