"""A model for other tools: a folder that transformers opens with AutoModelForCausalLM and
AutoTokenizer, or a GGUF file for llama.cpp.

    python model.py --checkpoint=out/chat/best.pt --export=out/chat/hf
    python model.py --checkpoint=out/chat/best.pt --export=out/chat.gguf --dtype=q8_0
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import UserError
from data.conversation import chat_template
from data.files import new_files, write_json
from data.safetensors import write_safetensors
from data.tokenizer import (
    END_OF_TEXT,
    GPT2_VOCAB_SIZE,
    ROLE_TOKENS,
    get_tokenizer,
)
from model import transpose_conv1d
from runtime.checkpoint import load_checkpoint, load_model, max_turns


def write_hf_folder(folder, config, weights, tokenizer_spec):
    """Write the folder. config: a GPTConfig. weights: {GPT-2's name: tensor}, as model.py's
    to_gpt2_names makes them. tokenizer_spec: as data/tokenizer.py's read_spec has it. Raises
    OSError."""
    with new_files(folder, deciding="config.json") as part:
        write_hf_model(part, config, weights)
        write_hf_tokenizer(part, tokenizer_spec, config.block_size)


def write_hf_model(folder, config, weights):
    """Write config.json, generation_config.json and model.safetensors, as transformers has them for
    GPT-2 (GPT2LMHeadModel)."""
    end_of_text = config.vocab_size - 1
    if config.vocab_size != GPT2_VOCAB_SIZE:  # then role tokens follow <|endoftext|>
        end_of_text -= len(ROLE_TOKENS)
    ends = sorted({end_of_text, config.vocab_size - 1})  # <|end|> is the last id
    write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "attn_pdrop": config.dropout, "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout, "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": end_of_text, "eos_token_id": end_of_text})
    write_json(folder / "generation_config.json",
               {"bos_token_id": end_of_text, "eos_token_id": ends})


def write_hf_tokenizer(folder, spec, block_size):
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer opens as
    this tokenizer, with the chat format for its apply_chat_template."""
    enc = get_tokenizer(spec)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": enc._pat_str}, "behavior": "Isolated",
             "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    if spec == "gpt2":  # its pattern is the one that ByteLevel brings along
        pre_tokenizer = byte_level | {"use_regex": True}
    specials = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "post_processor": None,
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for token, i in specials],
        "pre_tokenizer": pre_tokenizer, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False,
                  "vocab": {written(token): i for token, i in enc._mergeable_ranks.items()},
                  "merges": [[written(a), written(b)] for a, b in merge_pairs(enc)]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
              "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
              "clean_up_tokenization_spaces": False, "chat_template": chat_template()}
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", config)


# GPT-2's letters for the 256 bytes, so that tokens can be written in text files: printable ones
# stand for themselves, others for letters from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTERS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}


def written(token):
    """A token's bytes in GPT-2's letters."""
    return "".join(LETTERS[b] for b in token)


def merge_pairs(enc):
    """The two tokens that each token of more than one byte is merged from, in the order of their
    ids: what is left of its bytes when only tokens of lower ids may be merged. [(bytes, bytes),
    ...]"""
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




def exported_weights(model):
    """{our name: tensor} for other tools: without the vocabulary's padding, and with biases of 0
    where the model has none, which change nothing."""
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = tensor[:model.config.vocab_size] if name == "wte.weight" else tensor
        if not model.config.bias and name.startswith(("h.", "ln_f")):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(tensor.shape[0])
    return weights


def to_gpt2_names(model):
    """exported_weights in GPT-2's layout and names."""
    return {f"transformer.{name}": tensor
            for name, tensor in transpose_conv1d(exported_weights(model)).items()}


# ---- by itself: a checkpoint for other tools ----

@dataclass
class ExportSettings:
    checkpoint: Path = Path("out/chat/best.pt")  # what to export
    export: Path = Path("out/chat/hf")  # a .gguf file for llama.cpp, or a folder for transformers
    dtype: str = "float32"  # of a .gguf file's matrices: float32, float16 or q8_0 (8.5 bits)


def main(argv):
    """Export a checkpoint for other tools. Raises UserError or OSError."""

    s = config.load(ExportSettings, argv, __doc__)
    is_gguf = s.export.suffix.lower() == ".gguf"
    if s.dtype != "float32" and not is_gguf:
        raise UserError(f"dtype={s.dtype}: a folder for transformers holds float32; "
                         "use --export=FILE.gguf")
    hint = "Train one first, or name it with --checkpoint=FILE."
    checkpoint = load_checkpoint(s.checkpoint, hint)
    model = load_model(checkpoint, source=s.checkpoint)
    if is_gguf:
        return export_gguf(s, model, checkpoint)
    write_hf_folder(s.export, model.config, to_gpt2_names(model), checkpoint["tokenizer"])
    print(f"{s.checkpoint} -> {s.export}: {', '.join(sorted(p.name for p in s.export.iterdir()))}")


def export_gguf(s, model, checkpoint):
    """Write a GGUF file and beside it an Ollama Modelfile. Raises UserError or OSError."""
    from runtime.gguf import ids_may_differ, write_gguf, write_modelfile
    tokenizer, turns = checkpoint["tokenizer"], max_turns(checkpoint)
    modelfile = s.export.with_suffix(".Modelfile")
    write_gguf(s.export, model.config, exported_weights(model), tokenizer, s.dtype, turns)
    write_modelfile(modelfile, s.export, model.config, turns)
    print(f"{s.checkpoint} -> {s.export}: {s.export.stat().st_size:,} bytes, and {modelfile}")
    if texts := ids_may_differ(tokenizer):
        print(f"llama.cpp may cut into other tokens than chat.py: {texts}")


if __name__ == "__main__":
    config.run(main)
