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
from data.conversation import chat_template
from data.files import new_files, write_json
from data.safetensors import write_safetensors
from data.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, ROLE_TOKENS, get_tokenizer
from model import transpose_conv1d
from runtime.checkpoint import load_checkpoint, load_model, max_turns


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # what to export
    out: Path = Path("out/chat/hf")  # a folder for transformers, or FILE.gguf for llama.cpp
    dtype: str = "float32"  # of the matrices in FILE.gguf: float32, float16 or q8_0 (8.5 bits)


def main(argv):
    """Export a checkpoint for other tools. Raises UserError or OSError."""
    cfg = config.load(Settings, argv, __doc__)
    config.check(cfg, dtype=("float32", "float16", "q8_0"))
    is_gguf = cfg.out.suffix.lower() == ".gguf"
    if cfg.dtype != "float32" and not is_gguf:
        raise UserError(f"dtype={cfg.dtype}: a folder for transformers has float32; use "
                        "--out=FILE.gguf")
    checkpoint = load_checkpoint(cfg.checkpoint, "Train one, or name it with --checkpoint=FILE.")
    model, spec = load_model(checkpoint, source=cfg.checkpoint), checkpoint["tokenizer"]
    if not is_gguf:
        write_hf_folder(cfg.out, model, spec)
        files = ", ".join(sorted(path.name for path in cfg.out.iterdir()))
        return print(f"{cfg.checkpoint} -> {cfg.out}: {files}")
    from runtime.gguf import ids_may_differ, write_gguf, write_modelfile
    turns, modelfile = max_turns(checkpoint), cfg.out.with_suffix(".Modelfile")
    write_gguf(cfg.out, model, spec, cfg.dtype, turns)
    write_modelfile(modelfile, cfg.out, model.config, turns)
    print(f"{cfg.checkpoint} -> {cfg.out}: {cfg.out.stat().st_size:,} bytes, and {modelfile}")
    if texts := ids_may_differ(spec):
        print(f"llama.cpp may split some texts into other tokens than chat.py: {texts}")


def gpt2_weights(model):
    """Return {name: tensor} of a GPT, without the vocabulary's padding and with zeros for biases
    that it does not have: the model as other tools know GPT-2. Raises UserError where it has other
    parameters than GPT-2, since other tools would compute something else."""
    cfg, C, weights = model.config, model.config.n_embd, model.state_dict()
    layer = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,),
             "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes = {f"h.{i}.{name}": shape for i in range(cfg.n_layer) for name, shape in layer.items()}
    shapes["ln_f"] = (C,)
    biases = {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    expected = {f"{name}.weight": shape for name, shape in shapes.items()} | {
        "wte.weight": (cfg.padded_vocab_size, C), "wpe.weight": (cfg.block_size, C)}
    expected |= biases if cfg.bias else {}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(dict(found.items() ^ expected.items())):
        raise UserError(f"{name} has the shape {found.get(name)}, in GPT-2 {expected.get(name)}; "
                        "exports need GPT-2's parameters, so undo your edit of model.py")
    return {name: torch.zeros(shape) for name, shape in biases.items()} | weights | {
        "wte.weight": weights["wte.weight"][:cfg.vocab_size]}


def write_hf_folder(folder, model, tokenizer_spec):
    """Write a GPT and its tokenizer as transformers stores them, all files or none. tokenizer_spec:
    see data/tokenizer.py's read_spec. Raises UserError or OSError."""
    with new_files(folder, deciding="config.json") as part:
        write_hf_model(part, model)
        write_hf_tokenizer(part, tokenizer_spec, model.config.block_size)


def write_hf_model(folder, model):
    """Write config.json, generation_config.json and model.safetensors of a GPT2LMHeadModel."""
    cfg = model.config
    has_role_tokens = cfg.vocab_size != GPT2_VOCAB_SIZE  # they follow <|endoftext|>
    end_of_text = cfg.vocab_size - 1 - len(ROLE_TOKENS) * has_role_tokens
    write_safetensors(folder / "model.safetensors", {
        f"transformer.{name}": t for name, t in transpose_conv1d(gpt2_weights(model)).items()})
    write_json(folder / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": cfg.vocab_size,
        "n_positions": cfg.block_size, "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer, "n_head": cfg.n_head, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "attn_pdrop": cfg.dropout, "embd_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout, "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": end_of_text, "eos_token_id": end_of_text})
    write_json(folder / "generation_config.json", {
        "bos_token_id": end_of_text,
        "eos_token_id": sorted({end_of_text, cfg.vocab_size - 1})})  # the last id is <|end|>


def write_hf_tokenizer(folder, spec, block_size):
    """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer opens as this tokenizer,
    with the chat format for its apply_chat_template."""
    enc = get_tokenizer(spec)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": enc._pat_str}, "behavior": "Isolated",
             "invert": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    if spec == "gpt2":  # ByteLevel has its pattern built in
        pre_tokenizer = byte_level | {"use_regex": True}
    specials = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for token, i in specials],
        "pre_tokenizer": pre_tokenizer, "decoder": byte_level,
        "model": {"type": "BPE",
                  "vocab": {to_gpt2_unicode(token): i for token, i in enc._mergeable_ranks.items()},
                  "merges": [list(map(to_gpt2_unicode, pair)) for pair in merge_pairs(enc)]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False, "chat_template": chat_template()})


# GPT-2's files spell each byte as one character: printable ones as themselves, the others as the
# characters from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
CHARACTERS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}


def to_gpt2_unicode(token):
    """Spell the bytes of a token as GPT-2's files do: b" the" is "Ġthe"."""
    return "".join(CHARACTERS[b] for b in token)


def merge_pairs(enc):
    """Return the byte-pair merges of a tokenizer, [(bytes, bytes), ...] in the order of the ids
    that they make. tiktoken keeps only the results, so each token is encoded with the tokens of
    lower ids, and the two pieces that remain are its pair."""
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
