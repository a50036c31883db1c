"""A model for other tools: a folder that transformers opens with AutoModelForCausalLM and
AutoTokenizer.

    python model.py --checkpoint=out/chat/best.pt --export=out/chat/hf
"""
import re
import struct
from pathlib import Path

import torch

from data.conversation import chat_template
from data.files import write_atomically, write_json, write_safetensors
from data.tokenizer import END_OF_TEXT, GPT2_VOCAB_SIZE, ROLE_TOKENS, get_tokenizer


def write_hf_folder(folder, config, weights, tokenizer_spec):
    """Write the folder. config: a GPTConfig. weights: {GPT-2's name: tensor}, as model.py's
    to_gpt2_names makes them. tokenizer_spec: as data/tokenizer.py's read_spec has it. Raises
    OSError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_hf_model(folder, config, weights)
    write_hf_tokenizer(folder, tokenizer_spec, config.block_size)


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
    enc, letters = get_tokenizer(spec), printable_bytes()

    def written(token):
        return "".join(letters[b] for b in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": enc._pat_str}, "behavior": "Isolated",
             "invert": False}
    specials = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "post_processor": None,
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for token, i in specials],
        "pre_tokenizer": byte_level | {"use_regex": True} if spec == "gpt2" else
        {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
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


def printable_bytes():
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, others for letters
    from U+0100 on, so that tokens can be written in text files."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


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


# ---- GGUF: one file for llama.cpp and what is built on it (llama-server, Ollama, LM Studio) ----
# The magic, the version, the counts of tensors and of settings; the settings; the tensors' names,
# shapes, types and offsets; then their values, each from a multiple of 32 bytes on.

GGUF_TYPES = {"float32": 0, "float16": 1, "q8_0": 8}  # of tensors, as the format numbers them
GGUF_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7}  # of the whole file: other numbers
GGUF_NAMES = (("wte", "token_embd"), ("wpe", "position_embd"), ("ln_f", "output_norm"),
              ("h", "blk"), ("ln_1", "attn_norm"), ("attn.c_attn", "attn_qkv"),
              ("attn.c_proj", "attn_output"), ("ln_2", "ffn_norm"), ("mlp.c_fc", "ffn_up"),
              ("mlp.c_proj", "ffn_down"))
ALIGNMENT = 32
Q8_BLOCK = 32  # so many values share a scale


def write_gguf(path, config, weights, tokenizer_spec, dtype="float32", turns=1):
    """Write a model as a GGUF file, version 3, which llama.cpp runs; never half a file.

    config: a GPTConfig. weights: {our name: tensor}, as model.py's stored_weights has them.
    tokenizer_spec: as data/tokenizer.py's read_spec has it. dtype: of the matrices, float32,
    float16 or q8_0 (8.5 bits a weight); vectors and positions stay float32. turns: of how many
    questions the model sees the newest, 0 for a model of plain text. Raises ValueError or OSError.
    """
    if dtype not in GGUF_TYPES:
        raise ValueError(f"dtype={dtype!r}: use {', '.join(GGUF_TYPES)}")
    if dtype == "q8_0" and config.n_embd % Q8_BLOCK:
        raise ValueError(f"dtype=q8_0: stores {Q8_BLOCK} weights a block, and this model's "
                         f"n_embd={config.n_embd} is no multiple of that; use --dtype=float16")
    settings = gguf_settings(config, dtype) | gguf_tokenizer(tokenizer_spec, config.vocab_size,
                                                             turns)
    tensors, types = gguf_tensors(config, weights), {}
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    for key, value in settings.items():
        header += gguf_string(key) + gguf_value(value)
    offset = 0
    for name, tensor in tensors.items():
        is_matrix = tensor.dim() == 2 and name != "position_embd.weight"
        types[name] = dtype if is_matrix else "float32"
        header += gguf_string(name) + struct.pack("<I", tensor.dim())
        header += struct.pack(f"<{tensor.dim()}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", GGUF_TYPES[types[name]], offset)
        offset += aligned(gguf_size(tensor, types[name]))

    def write(f):
        f.write(header.ljust(aligned(len(header)), b"\0"))
        for name, tensor in tensors.items():
            data = gguf_bytes(tensor.detach().float().cpu(), types[name])
            f.write(data)
            f.write(b"\0" * (aligned(len(data)) - len(data)))

    write_atomically(path, write)


def aligned(size):
    """The next multiple of ALIGNMENT."""
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def gguf_settings(config, dtype):
    """What llama.cpp must know of the architecture: {key: value}."""
    return {"general.architecture": "gpt2", "general.alignment": ALIGNMENT,
            "general.file_type": GGUF_FILE_TYPES[dtype], "general.quantization_version": 2,
            "gpt2.context_length": config.block_size, "gpt2.embedding_length": config.n_embd,
            "gpt2.block_count": config.n_layer, "gpt2.feed_forward_length": 4 * config.n_embd,
            "gpt2.attention.head_count": config.n_head,
            "gpt2.attention.layer_norm_epsilon": 1e-5}


def gguf_tokenizer(spec, vocab_size, turns):
    """The tokenizer and the chat format, for llama.cpp: {key: value}."""
    enc, letters = get_tokenizer(spec), printable_bytes()

    def written(token):
        return "".join(letters[b] for b in token)

    names = {i: written(token) for token, i in enc._mergeable_ranks.items()}
    specials = {i: token for token, i in enc._special_tokens.items() if i < vocab_size}
    tokens = [(names | specials)[i] for i in range(vocab_size)]
    merges = merge_pairs(enc)
    if spec != "gpt2":
        # "superbpe" cuts text at numbers only, and leaves the rest to the merges. None of them
        # reaches over a cut of ours, but for white space behind a space that a word has taken: it
        # waits until words are done.
        merges.sort(key=lambda pair: b"".join(pair).isspace())
    end_of_text = enc.encode_single_token(END_OF_TEXT)
    end = enc.encode_single_token(ROLE_TOKENS[-1]) if turns else end_of_text
    return {"tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2" if spec == "gpt2" else "superbpe",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if i in specials else 1 for i in range(vocab_size)],
            "tokenizer.ggml.merges": [f"{written(a)} {written(b)}" for a, b in merges],
            "tokenizer.ggml.bos_token_id": end_of_text, "tokenizer.ggml.eos_token_id": end,
            "tokenizer.ggml.padding_token_id": end_of_text,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": chat_template(turns)}


def gguf_tensors(config, weights):
    """{llama.cpp's name: tensor}, with biases of 0 where the model has none."""
    tensors = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        for ours, theirs in GGUF_NAMES:
            module = re.sub(rf"(^|\.){re.escape(ours)}(\.|$)", rf"\g<1>{theirs}\g<2>", module)
        if name == "wte.weight":
            tensor = tensor[:config.vocab_size]  # without the padding
        tensors[f"{module}.{kind}"] = tensor
        if not config.bias and name not in ("wte.weight", "wpe.weight"):
            tensors[f"{module}.bias"] = torch.zeros(tensor.shape[0])
    return tensors


def gguf_string(text):
    """A text as GGUF stores it: its length, then its bytes."""
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def gguf_value(value):
    """A setting as GGUF stores it: the number of its type, then the value."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + gguf_string(value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        case _:  # a list of texts
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))


def gguf_size(tensor, dtype):
    """How many bytes gguf_bytes makes of it."""
    return {"float32": 4 * tensor.numel(), "float16": 2 * tensor.numel(),
            "q8_0": tensor.numel() // Q8_BLOCK * (2 + Q8_BLOCK)}[dtype]


def gguf_bytes(tensor, dtype):
    """A float32 tensor's values in the file. Q8_0: of every 32 values a float16 scale, the largest
    / 127, and 32 int8."""
    if dtype != "q8_0":
        return tensor.to(getattr(torch, dtype)).contiguous().numpy().tobytes()
    blocks = tensor.reshape(-1, Q8_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127  # (blocks, 1)
    quantized = (blocks / scale.clamp(min=1e-30)).round().to(torch.int8)
    stored = torch.cat((scale.half().view(torch.uint8), quantized.view(torch.uint8)), dim=1)
    return stored.numpy().tobytes()
