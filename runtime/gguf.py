"""GGUF files for llama.cpp."""
import re
import struct

import torch

from config import UserError
from data.conversation import ASSISTANT, END, chat_template, special_ids
from data.files import write_atomically, write_text
from data.tokenizer import (
    END_OF_TEXT,
    ROLE_TOKENS,
    SPACE_BEHIND_PATTERN,
    SPLIT_PATTERN,
    get_tokenizer,
)
from runtime.export import merge_pairs, written

# ---- GGUF: one file for llama.cpp, and for what is built on it, such as Ollama ----
# "GGUF", the version, how many tensors and how many settings; the settings; of each tensor its
# name, shape, type and place; then the tensors' values, each from a multiple of 32 bytes on.

GGUF_TYPES = {  # the number of a tensor's type, of a file of that type, and the bytes of a value
    "float32": (0, 0, 4), "float16": (1, 1, 2), "q8_0": (8, 7, 34 / 32)}
GGUF_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "h": "blk",
              "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
              "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def write_gguf(path, config, weights, tokenizer_spec, dtype="float32", turns=1):
    """Write a model as a GGUF file, version 3, for llama.cpp's GPT-2; never half a file.

    config: a GPTConfig. weights: {our name: tensor}, as model.py's exported_weights has them.
    tokenizer_spec: as data/tokenizer.py's read_spec has it. dtype: of the matrices; float32,
    float16 or q8_0. turns: of how many questions the model sees the newest; 0: it knows no chats.
    Raises ValueError or OSError.
    """
    if dtype not in GGUF_TYPES:
        raise UserError(f"dtype={dtype!r}: use {', '.join(GGUF_TYPES)}")
    if dtype == "q8_0" and config.n_embd % 32:
        raise UserError(f"dtype=q8_0: its blocks of 32 weights do not fit into rows of n_embd="
                         f"{config.n_embd}; use --dtype=float16")
    settings = gguf_settings(config, GGUF_TYPES[dtype][1])
    settings |= gguf_tokenizer(tokenizer_spec, config.vocab_size)
    settings["tokenizer.chat_template"] = chat_template(turns)
    tensors = gguf_tensors(weights, dtype)
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings))
    header += b"".join(gguf_text(key) + gguf_value(value) for key, value in settings.items())
    start = 0
    for name, tensor, kind in tensors:
        number, _, value_bytes = GGUF_TYPES[kind]
        shape = tensor.shape[::-1]  # the format names the innermost dimension first
        header += gguf_text(name)
        header += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, start)
        start += align(int(tensor.numel() * value_bytes))

    def write(f):
        f.write(header.ljust(align(len(header)), b"\0"))
        for _, tensor, kind in tensors:
            values = gguf_bytes(tensor.detach().float().cpu(), kind)
            f.write(values.ljust(align(len(values)), b"\0"))

    write_atomically(path, write)


def align(size):
    """The multiple of 32 from `size` on."""
    return size + -size % 32


def gguf_settings(config, file_type):
    """What llama.cpp must know of the architecture, {key: value}."""
    return {"general.architecture": "gpt2", "general.alignment": 32,
            "general.file_type": file_type, "general.quantization_version": 2,
            "gpt2.context_length": config.block_size, "gpt2.embedding_length": config.n_embd,
            "gpt2.block_count": config.n_layer, "gpt2.feed_forward_length": 4 * config.n_embd,
            "gpt2.attention.head_count": config.n_head,
            "gpt2.attention.layer_norm_epsilon": 1e-5}


def gguf_tokenizer(spec, vocab_size):
    """What llama.cpp must know of the tokenizer, {key: value}.

    It knows GPT-2's pattern, "gpt-2", and none of ours. "superbpe" cuts a text at numbers only, and
    leaves the rest to the merges. Those of ours hardly ever reach over a cut of ours, for they come
    from pieces between cuts; see ids_may_differ.
    """
    enc = get_tokenizer(spec)
    end_of_text, user, assistant, end = special_ids(enc)
    names = {i: written(token) for token, i in enc._mergeable_ranks.items()}
    names |= {i: token for token, i in enc._special_tokens.items()}
    merges = merge_pairs(enc)
    if spec != "gpt2":
        merges = [(a, b) for a, b in merges if can_be_made(a + b, enc)]
        # A space that may stand behind a word goes to the word first, then to other white space.
        merges.sort(key=lambda pair: b"".join(pair).isspace())
    return {"tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2" if spec == "gpt2" else "superbpe",
            "tokenizer.ggml.tokens": [names[i] for i in range(vocab_size)],
            "tokenizer.ggml.token_type": [3 if i in enc._special_tokens.values() else 1
                                          for i in range(vocab_size)],  # 3: never a part of text
            "tokenizer.ggml.merges": [f"{written(a)} {written(b)}" for a, b in merges],
            "tokenizer.ggml.bos_token_id": end_of_text, "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.padding_token_id": end_of_text,
            # Each of these ends a reply, as in chat.py; so does <|endoftext|>, by its name.
            "tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.eot_token_id": user,
            "tokenizer.ggml.eom_token_id": assistant}


def can_be_made(token, enc):
    """Whether a token's own text becomes that token. Some never do: train_bpe cuts with Python's
    re, which takes accents that stand alone for punctuation, and tiktoken for letters."""
    try:
        return len(enc.encode_ordinary(token.decode("utf-8"))) == 1
    except UnicodeDecodeError:  # a part of a character
        return True


def ids_may_differ(spec):
    """Which texts llama.cpp may cut into other ids than this tokenizer does, or None."""
    if spec in ("gpt2", "bytes"):
        return None
    tokens = get_tokenizer(spec)._mergeable_ranks
    if spec["pattern"] not in (SPLIT_PATTERN, SPACE_BEHIND_PATTERN):
        return "any text: this tokenizer's pattern is an older one"
    if any(map(reaches_over, tokens)):
        return "texts with punctuation beside letters of several bytes"
    spaces = [token for token in tokens if token.isspace() and token[:1] == b" " and len(token) > 1]
    if spaces and spec["pattern"] == SPACE_BEHIND_PATTERN:
        return "texts with several spaces behind a word"
    return None


def reaches_over(token):
    """Whether a token has the edge of a character in it, and half a character. (llama.cpp's pattern
    cuts coarser than ours, so such merges may join there what we keep apart.)"""
    try:
        token.decode("utf-8")
        return False
    except UnicodeDecodeError:
        return any(byte & 0xC0 != 0x80 for byte in token[1:])


def gguf_tensors(weights, dtype):
    """[(llama.cpp's name, tensor, its dtype in the file), ...]. What is added, biases, norms and
    positions, stays float32."""
    tensors = []
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        for ours, theirs in GGUF_NAMES.items():
            module = re.sub(rf"\b{re.escape(ours)}\b", theirs, module)
        is_matrix = tensor.dim() == 2 and name != "wpe.weight"
        tensors.append((f"{module}.{kind}", tensor, dtype if is_matrix else "float32"))
    return tensors


def gguf_text(text):
    """A text: the number of its bytes, and they."""
    text = text.encode("utf-8")
    return struct.pack("<Q", len(text)) + text


def gguf_value(value):
    """A setting's value: the number of its type, and it."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + gguf_text(value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
        case _:  # texts
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_text, value))


def gguf_bytes(tensor, dtype):
    """A float32 tensor as it stands in the file. q8_0 takes 32 values at a time: a float16 scale,
    the largest / 127, then 32 int8."""
    if dtype != "q8_0":
        return tensor.to(getattr(torch, dtype)).contiguous().numpy().tobytes()
    blocks = tensor.reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (blocks, 1)
    rounded = (blocks / scale).round().to(torch.int8)
    return torch.cat((scale.half().view(torch.int8), rounded), dim=1).numpy().tobytes()


def write_modelfile(path, gguf, config, turns):
    """Write what `ollama create NAME -f FILE` needs beside a GGUF file: the chat format once more,
    as a template of Go's, but without system messages."""
    shown = 2 * turns - 1  # messages
    chat = (END_OF_TEXT + "{{ range $i, $m := .Messages }}"
            f'{{{{ if and (ne $m.Role "system") (le (len (slice $.Messages $i)) {shown}) }}}}'
            "<|{{ $m.Role }}|>{{ $m.Content }}" + END + "{{ end }}{{ end }}" + ASSISTANT)
    lines = [f"FROM ./{gguf.name}", f'TEMPLATE """{chat if turns else "{{ .Prompt }}"}"""',
             f"PARAMETER num_ctx {config.block_size}"]
    lines += [f'PARAMETER stop "{token}"' for token in (END_OF_TEXT, *ROLE_TOKENS)]
    write_text(path, "\n".join(lines) + "\n")
