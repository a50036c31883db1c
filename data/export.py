"""A model for other tools: a folder that transformers opens with AutoModelForCausalLM and
AutoTokenizer.

    python model.py --checkpoint=out/chat/best.pt --export=out/chat/hf
"""
from pathlib import Path

from data.conversation import CHAT_TEMPLATE
from data.files import write_json, write_safetensors
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
              "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
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
