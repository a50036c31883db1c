"""GPT-2's weights as files: fetch them, read them, reject what is not a plain GPT-2.

A name such as gpt2-medium is downloaded once into GPT2_CACHE_DIR, or ~/.cache/gpt2. A folder has
model.safetensors or pytorch_model.bin, usually with a config.json, or nanoGPT's ckpt.pt.
"""
import json
import os
import sys
import zipfile
from pathlib import Path

from config import UserError
from data.download import download, hub
from data.safetensors import read_safetensors
from data.tokenizer import GPT2_VOCAB_SIZE, ROLE_TOKENS

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_URL = "{hub}/openai-community/{name}/resolve/main/model.safetensors"
FILES = ("model.safetensors", "pytorch_model.bin", "ckpt.pt")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # older files have them among the weights
# Keys of config.json that change the computation, and what model.py computes.
SUPPORTED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "tie_word_embeddings": (True,), "quantization_config": (None,)}
GPT2_WORDS = {"the": 1169, "of": 1659, "and": 392}  # some ids of its vocabulary


def read_gpt2(name_or_path):
    """Return ({GPT-2's name, without "transformer.": float32 tensor}, {field of GPTConfig: value}).

    Matrices have GPT-2's layout, (in, out), including those of nanoGPT (its exact GELU and
    ours differ by about 0.001 in a logit). Rows of wte for added tokens or padding are left out
    with a note. Raises OSError, and UserError for what model.py would not compute correctly.
    """
    file = fetch_gpt2(name_or_path) if name_or_path in GPT2_NAMES else find_file(Path(name_or_path))
    try:
        return parse(file)
    except UserError:
        raise
    except Exception as error:  # any type, for a damaged file
        reason = f"{type(error).__name__}: {error!s:.200}".split("\n")[0]
        raise UserError(f"{file}: it or its config.json is damaged, or not from a plain GPT-2 "
                        f"({reason}); use GPT-2's files, or --checkpoint for a best.pt") from error


def parse(file):
    """Return what read_gpt2 returns. Raises an exception of any type for an unsuitable file."""
    content, config = read_file(file), read_json(file.with_name("config.json"))
    if "model_args" in content:  # nanoGPT's, whose matrices are (out, in)
        config = content["model_args"]
        content = {name.removeprefix("_orig_mod."): tensor.t() if ".h." in name else tensor
                   for name, tensor in content["model"].items()}
    weights = {name.removeprefix("transformer."): tensor.detach().float()
               for name, tensor in content.items() if not name.endswith(CAUSAL_MASKS)}
    wte = weights["wte.weight"]
    if not weights.pop("lm_head.weight", wte).equal(wte):
        raise ValueError("lm_head.weight differs from wte.weight, but GPT-2 ties them")
    sizes = read_sizes(config, weights)
    if len(wte) >= GPT2_VOCAB_SIZE:  # a smaller vocabulary is never treated as GPT-2's
        check_vocabulary(file)
    n_added, n_roles = len(wte) - GPT2_VOCAB_SIZE, len(ROLE_TOKENS)
    if 0 < n_added <= 47 and n_added != n_roles:  # 47: nanoGPT's padding; n_roles: our own export
        print(f"{file}: only the first {GPT2_VOCAB_SIZE} rows of wte.weight are used; the other "
              f"{n_added} are added tokens or padding", file=sys.stderr)
        sizes["vocab_size"], weights["wte.weight"] = GPT2_VOCAB_SIZE, wte[:GPT2_VOCAB_SIZE]
    return weights, sizes


def fetch_gpt2(name):
    """Return the local model.safetensors of one of GPT2_NAMES, downloaded on first use."""
    folder = Path(os.path.expanduser(os.environ.get("GPT2_CACHE_DIR") or "~/.cache/gpt2"))
    return download(GPT2_URL.format(hub=hub(), name=name), folder / name / "model.safetensors")


def find_file(path):
    """Return the file of weights that a path names: itself, or the first of FILES in a folder."""
    for file in (path, *(path / name for name in FILES)):
        if file.is_file():
            return file
    raise UserError(f"{path}: contains none of {', '.join(FILES)}; name a file or folder of "
                    f"weights, or one of {', '.join(GPT2_NAMES)}")


def read_file(file):
    """Return what a file contains, {name: tensor} if it has weights, without executing it."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    import torch
    mmap = zipfile.is_zipfile(file)  # only zip files, which newer versions write, can be mapped
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def read_json(path):
    """Return the object in a JSON file, an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_sizes(config, weights):
    """Return {field of GPTConfig: value}. Raises ValueError if model.py does not support them."""
    (vocab_size, n_embd), (block_size, _) = weights["wte.weight"].shape, weights["wpe.weight"].shape
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "n_layer": n_layer}
    fixed = {key: (size,) for key, size in (sizes | {"n_inner": 4 * n_embd}).items()}
    for key, values in (SUPPORTED | fixed).items():
        if config.get(key) not in (None, *values):
            raise ValueError(f"{key}={config[key]!r}: must be {values[0]!r}")
    n_head = config.get("n_head") or max(n_embd // 64, 1)
    if n_embd % n_head:
        raise ValueError(f"n_head={n_head!r} does not divide n_embd={n_embd}")
    return {**sizes, "n_head": n_head, "block_size": block_size,
            "bias": any(name.endswith(".bias") for name in weights)}


def check_vocabulary(file):
    """Raise ValueError if a vocab.json or tokenizer.json next to the weights is not GPT-2's."""
    vocab = (read_json(file.with_name("vocab.json")) or
             read_json(file.with_name("tokenizer.json")).get("model", {}).get("vocab"))
    if vocab and any(vocab.get(word) != i for word, i in GPT2_WORDS.items()):
        raise ValueError("the tokenizer in its folder is not GPT-2's")
