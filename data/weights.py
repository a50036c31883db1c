"""GPT-2's weights as files: fetch them, read them, refuse what is not a plain GPT-2.

A name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) is downloaded once into GPT2_CACHE_DIR, or
~/.cache/gpt2, from the model hub, or the mirror that HF_ENDPOINT names. A folder has
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
from data.tokenizer import GPT2_VOCAB_SIZE, ROLE_TOKENS, get_tokenizer

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_URL = "{hub}/openai-community/{name}/resolve/main/model.safetensors"
FILES = ("model.safetensors", "pytorch_model.bin", "ckpt.pt")
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # older files have them among the weights
# Keys of config.json that change the computation, and what model.py computes; None: no such key.
SUPPORTED = {
    "model_type": (None, "gpt2"), "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (None, 1e-5), "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False),
    "tie_word_embeddings": (None, True), "quantization_config": (None,)}
NANOGPT_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}


def read_gpt2(name_or_path):
    """Return ({GPT-2's name, without "transformer.": float32 tensor}, {field of GPTConfig: value}).

    Matrices have GPT-2's layout, (in, out), also those of nanoGPT (whose exact GELU GPT-2's
    approximates to about 0.001 in a logit). Rows of wte beyond GPT-2's 50257, for added tokens or
    padding, are left out with a note on stderr. Raises OSError, and UserError for a damaged file or
    a model that model.py would not compute correctly.
    """
    file = fetch_gpt2(name_or_path) if name_or_path in GPT2_NAMES else find_file(Path(name_or_path))
    config = read_json(file.with_name("config.json"))
    tensors, config = ((read_safetensors(file), config) if file.suffix == ".safetensors" else
                       read_torch(file, config))
    weights = {name.removeprefix("transformer."): tensor.float()
               for name, tensor in tensors.items() if not name.endswith(CAUSAL_MASKS)}
    dims = {name: tensor.dim() for name, tensor in weights.items() if tensor.numel()}
    if dims.get("wte.weight") != 2 or dims.get("wpe.weight") != 2 or max(dims.values()) > 2:
        raise UserError(f"{file}: wte.weight or wpe.weight is missing, or a tensor has a wrong "
                        "number of dimensions; use GPT-2's weights")
    wte = weights["wte.weight"]
    if not weights.pop("lm_head.weight", wte).equal(wte):
        raise UserError(f"{file}: lm_head.weight differs from wte.weight; use a model that ties "
                        "them, as GPT-2 does")
    sizes, rows = read_sizes(file, config, weights), len(wte)
    check_vocabulary(file, rows)
    exported = GPT2_VOCAB_SIZE + len(ROLE_TOKENS)  # rows that runtime/export.py writes
    if GPT2_VOCAB_SIZE < rows <= 50304 and rows != exported:  # 50304: nanoGPT's padding
        print(f"{file}: only the first {GPT2_VOCAB_SIZE} rows of wte.weight are used; the other "
              f"{rows - GPT2_VOCAB_SIZE} are added tokens or padding", file=sys.stderr)
        sizes["vocab_size"], weights["wte.weight"] = GPT2_VOCAB_SIZE, wte[:GPT2_VOCAB_SIZE]
    return weights, sizes


def fetch_gpt2(name):
    """Return the local model.safetensors of one of GPT2_NAMES, downloaded at first use."""
    folder = Path(os.environ.get("GPT2_CACHE_DIR") or "~/.cache/gpt2").expanduser() / name
    path = folder / "model.safetensors"
    if not path.exists():  # whichever mirror it came from
        print(f"downloading {name} into {folder} (HF_ENDPOINT names a mirror)", file=sys.stderr)
        download(GPT2_URL.format(hub=hub(), name=name), path)
    return path


def find_file(path):
    """Return the file of weights that a path names: itself, or the first of FILES in a folder."""
    for file in (path, *(path / name for name in FILES)):
        if file.is_file():
            return file
    raise UserError(f"{path}: contains none of {', '.join(FILES)}; name a file or folder of "
                    f"weights, or one of {', '.join(GPT2_NAMES)}")


def read_torch(file, config):
    """Return ({name: tensor}, config) of a file of torch.save; the config is nanoGPT's if the file
    has one. Never executes what is in the file. Raises UserError."""
    import torch
    try:  # only zip files, which newer versions write, can be mapped
        content = torch.load(file, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(file))
        if is_nanogpt := "model_args" in content:
            content, config = content["model"], dict(content["model_args"])
            if unknown := config.keys() - NANOGPT_ARGS:
                raise ValueError(f"unknown model_args {sorted(unknown)}")
        # nanoGPT's matrices are (out, in), as nn.Linear has them.
        return {name.removeprefix("_orig_mod."):
                tensor.t() if is_nanogpt and ".h." in name else tensor.detach()
                for name, tensor in content.items()}, config
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = f"{type(error).__name__}: {str(error)[:80]}".split("\n")[0]
        raise UserError(f"{file}: not a file of weights, or damaged ({reason}); use GPT-2's, or "
                        "--checkpoint for a best.pt") from error


def read_json(path):
    """Return the dict in a JSON file, an empty one if there is no file. Raises UserError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object; fetch it again, or remove it") from error


def read_sizes(file, config, weights):
    """Return {field of GPTConfig: value}, from the shapes of the weights, and n_head from the
    config. Raises UserError for a config that does not fit them or model.py."""
    vocab_size, n_embd = weights["wte.weight"].shape
    n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
    sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "n_layer": n_layer}
    for key, values in (SUPPORTED | {key: (None, size) for key, size in sizes.items()}
                        | {"n_inner": (None, 4 * n_embd)}).items():
        if config.get(key) not in values:
            raise UserError(f"{file}: its config has {key}={config[key]!r:.60}, and model.py "
                            f"computes {values[-1]!r}; use a plain GPT-2")
    n_head = config.get("n_head", max(n_embd // 64, 1))
    if type(n_head) is not int or n_head < 1 or n_embd % n_head:
        raise UserError(f"{file}: n_embd={n_embd} cannot be split into n_head={n_head!r:.60}; "
                        "correct n_head in its config.json")
    return {**sizes, "n_head": n_head, "block_size": len(weights["wpe.weight"]),
            "bias": any(name.endswith(".bias") for name in weights)}


def check_vocabulary(file, rows):
    """Raise UserError where a vocab.json or tokenizer.json beside weights of GPT-2's vocabulary
    size assigns ids that are not GPT-2's."""
    vocab = (read_json(file.with_name("vocab.json")) or
             read_json(file.with_name("tokenizer.json")).get("model", {}).get("vocab"))
    if vocab and rows >= GPT2_VOCAB_SIZE:  # fewer are never taken for GPT-2's
        enc = get_tokenizer("gpt2")
        for i in range(0, GPT2_VOCAB_SIZE, 100):
            token = enc.decode([i])
            if token.isascii() and token.isalpha() and (token not in vocab or vocab[token] != i):
                raise UserError(f"{file}: the tokenizer beside it is not GPT-2's ({token!r} has "
                                f"not the id {i}); use a model with GPT-2's tokenizer")
