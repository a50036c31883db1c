"""GPT-2's weights as files: fetch them, read them, and their sizes.

A name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) is downloaded once into GPT2_CACHE_DIR, or
~/.cache/gpt2, from the model hub, or the mirror that HF_ENDPOINT names. A folder has
model.safetensors or pytorch_model.bin and a config.json beside it; a file is one of the two.
"""
import json
import os
import sys
from pathlib import Path

from config import UserError
from data.download import download, hub
from data.safetensors import read_safetensors

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_URL = "{hub}/openai-community/{name}/resolve/main/model.safetensors"
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias",  # the causal mask
               "lm_head.weight")  # wte.weight again


def read_gpt2(name_or_path):
    """Return ({GPT-2's name, without "transformer.": float32 tensor}, {field of GPTConfig: size}).
    Raises UserError or OSError."""
    path = fetch_gpt2(name_or_path) if name_or_path in GPT2_NAMES else Path(name_or_path)
    files = [path] if path.is_file() else [path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise UserError(f"{path}: no model.safetensors or pytorch_model.bin there; use a folder "
                        f"that has one, or one of {', '.join(GPT2_NAMES)}")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pytorch(file)
    weights = {name.removeprefix("transformer."): tensor.float()
               for name, tensor in tensors.items() if not name.endswith(NOT_WEIGHTS)}
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise UserError(f"{file}: contains no matrix {name}, so these are not GPT-2's weights")
    vocab_size, n_embd = weights["wte.weight"].shape
    n_head = read_n_head(file) or max(n_embd // 64, 1)
    if n_embd % n_head:
        raise UserError(f"{file}: n_embd={n_embd} cannot be split into {n_head} heads; check "
                        "n_head in the config.json beside it")
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    return weights, {"vocab_size": vocab_size, "block_size": weights["wpe.weight"].shape[0],
                     "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}


def fetch_gpt2(name):
    """Return the local model.safetensors of one of GPT2_NAMES, downloaded at first use. Raises
    OSError."""
    folder = Path(os.environ.get("GPT2_CACHE_DIR") or "~/.cache/gpt2").expanduser() / name
    path = folder / "model.safetensors"
    if not path.exists():  # whichever mirror it came from
        print(f"downloading {name} into {folder}", file=sys.stderr)
        try:
            download(GPT2_URL.format(hub=hub(), name=name), path)
        except OSError as error:
            raise OSError(f"{error} (HF_ENDPOINT names a mirror, --init_from=FILE.safetensors a "
                          "file)") from error
    return path


def read_pytorch(file):
    """{name: tensor} of a pytorch_model.bin; never executes anything. Raises UserError."""
    import torch
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises many types for a damaged file
        raise UserError(f"{file}: not a file of weights, or damaged "
                        f"({type(error).__name__})") from error


def read_n_head(file):
    """The number of heads in the config.json beside a file, or None: it cannot be inferred from
    tensor shapes."""
    try:
        text = (file.parent / "config.json").read_text(encoding="utf-8")
        return int(json.loads(text)["n_head"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
