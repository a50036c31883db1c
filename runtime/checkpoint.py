"""Checkpoint files: a model's config, weights and tokenizer, and how it was trained.

`best.pt` holds what chat.py needs, `last.pt` also what an exact resume needs (runtime/resume.py).
Both are torch.save files of tensors and plain values, opened with weights_only=True: loading one
never executes anything.
"""
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from config import UserError
from data.files import write_atomically
from data.tokenizer import count_ids
from model import GPTConfig, empty_model, load_weights

SCHEMA = {"config": dict, "model": dict, "tokenizer": (str, dict), "kind": str, "step": int,
          "max_iters": int}


def model_state(model, tokenizer_spec, kind, **extra):
    """The dict that save_checkpoint writes: all that chat.py needs, and `extra`. kind: "chat" or
    "text"."""
    return {"config": asdict(model.config), "model": model.state_dict(),
            "tokenizer": tokenizer_spec, "kind": kind, **extra}


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values atomically. Raises OSError."""
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path, hint=""):
    """Return the dict that save_checkpoint wrote. Its tensors are mapped from the file (except on
    Windows, where a mapped file cannot be replaced).

    Raises UserError for a file that is missing (`hint` says how to make it), damaged, or not a
    checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder; name the best.pt in it" if path.is_dir() else "no such checkpoint"
        raise UserError(f"{path}: {problem}. {hint}".strip())
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True,
                                mmap=sys.platform != "win32")
        for name, kind in SCHEMA.items():
            if not isinstance(checkpoint[name], kind):
                raise TypeError(f"its {name} is of type {type(checkpoint[name]).__name__}")
        GPTConfig(**checkpoint["config"])
        ids, wanted = count_ids(checkpoint["tokenizer"]), checkpoint["config"]["vocab_size"]
        if ids != wanted:
            raise ValueError(f"its tokenizer has {ids} ids, its model {wanted}")
    except PermissionError:
        raise
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = str(error).split("\n")[0][:100]
        raise UserError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}: {reason}); "
                        "use another, or train again") from error
    return checkpoint


def load_model(checkpoint, dropout=0.0, source="the checkpoint"):
    """Return the GPT in a checkpoint's dict. Raises UserError, naming the source, where the weights
    do not fit model.py."""
    model = empty_model(GPTConfig(**checkpoint["config"] | {"dropout": dropout}))
    load_weights(model, checkpoint["model"], source)
    return model


def max_turns(checkpoint):
    """How many questions the longest chat had that the model was trained on; 0 for plain text."""
    return checkpoint.get("turns", 1) if checkpoint["kind"] == "chat" else 0
