"""Export a model: a folder for transformers (AutoModelForCausalLM, AutoTokenizer), or a GGUF file
for llama.cpp and Ollama.

    python -m runtime.export --checkpoint=out/chat/best.pt --out=out/chat/hf
    python -m runtime.export --checkpoint=out/chat/best.pt --out=out/chat.gguf --dtype=q8_0
"""
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import UserError
from data.conversation import chat_template, special_ids
from data.files import new_files, write_json
from data.safetensors import write_safetensors
from data.tokenizer import END_OF_TEXT, GPT2_CHARACTERS, get_tokenizer
from model import transpose_conv1d
from runtime.checkpoint import load_pretrained

BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # what to export
    out: Path = Path("out/chat/hf")  # a folder for transformers, or FILE.gguf for llama.cpp
    dtype: str = "float32"  # GGUF matrix type: float32, float16 or q8_0 (8.5 bits per weight)


def main(argv):
    """Export a checkpoint for other tools. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, dtype=("float32", "float16", "q8_0"))
    model, spec, turns = load_pretrained(cfg.checkpoint)
    if cfg.out.suffix.lower() == ".gguf":
        from runtime.gguf import export_gguf
        export_gguf(cfg.out, model, spec, cfg.dtype, turns)
    elif cfg.dtype == "float32":
        write_hf_folder(cfg.out, model, spec)
    else:
        raise UserError(f"dtype={cfg.dtype}: only for --out=FILE.gguf; folders are always float32")
    print(f"{cfg.checkpoint} -> {cfg.out}")


def gpt2_weights(model):
    """Return {name: tensor} of a GPT as other tools expect GPT-2: without the vocabulary's padding,
    with zeros for missing biases. Raises UserError if an edited model's parameters differ."""
    cfg, weights = model.config, model.state_dict()
    layers = [f"h.{i}.{name}" for i in range(cfg.n_layer) for name in BLOCK] + ["ln_f"]
    expected = {f"{name}.weight" for name in (*layers, "wte", "wpe")}
    if cfg.bias:
        expected |= {f"{name}.bias" for name in layers}
    if different := sorted(weights.keys() ^ expected):
        raise UserError(f"{different[0]} is missing, or is not one of GPT-2's parameters, which "
                        "exports need; undo your edit to model.py")
    zeros = {f"{name}.bias": torch.zeros(len(weights[f"{name}.weight"])) for name in layers}
    return zeros | weights | {"wte.weight": weights["wte.weight"][:cfg.vocab_size]}


def write_hf_folder(folder, model, spec):
    """Write a GPT and its tokenizer as transformers saves them. Raises UserError or OSError."""
    weights, enc = transpose_conv1d(gpt2_weights(model)), get_tokenizer(spec)
    with new_files(folder, marker="config.json") as part:
        write_safetensors(part / "model.safetensors",
                          {f"transformer.{name}": tensor for name, tensor in weights.items()})
        write_hf_config(part, model.config, enc)
        write_hf_tokenizer(part, model.config, enc)


def write_hf_config(folder, cfg, enc):
    """Write config.json and generation_config.json of a GPT2LMHeadModel."""
    end_of_text, _, _, end = special_ids(enc)
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": cfg.vocab_size,
        "n_positions": cfg.block_size, "n_embd": cfg.n_embd, "n_layer": cfg.n_layer,
        "n_head": cfg.n_head, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
        "torch_dtype": "float32", "bos_token_id": end_of_text, "eos_token_id": end_of_text})
    write_json(folder / "generation_config.json", {
        "bos_token_id": end_of_text, "eos_token_id": [end_of_text, end]})


def write_hf_tokenizer(folder, cfg, enc):
    """Write tokenizer.json and tokenizer_config.json for AutoTokenizer, chat format included."""
    split = {"type": "Split", "pattern": {"Regex": enc._pat_str}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, "special": True, **flags}
                         for token, i in enc._special_tokens.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE",
                  "vocab": {to_gpt2_unicode(token): i for token, i in enc._mergeable_ranks.items()},
                  "merges": [list(map(to_gpt2_unicode, pair)) for pair in merge_pairs(enc)]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": cfg.block_size,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False, "chat_template": chat_template()})


def to_gpt2_unicode(token):
    """Spell the bytes of a token as GPT-2's files do: b" the" is "Ġthe"."""
    return "".join(GPT2_CHARACTERS[b] for b in token)


def merge_pairs(enc):
    """Return a tokenizer's merges, [(bytes, bytes), ...]. tiktoken keeps only the results, so each
    token is encoded with the tokens of lower ids: the two pieces that remain are its pair."""
    ranks, pairs = enc._mergeable_ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = joined.index(min(joined))
            if joined[i] >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


if __name__ == "__main__":
    config.run(main)
