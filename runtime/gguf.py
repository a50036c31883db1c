"""Write GGUF files, for llama.cpp and tools built on it, such as Ollama, with the `gguf` package.

llama.cpp has neither this project's split pattern nor its chat format built in. So the file has a
chat template, and a tokenizer that gives the same ids for nearly every text.
"""
from config import UserError
from data.conversation import ASSISTANT, END, chat_template, special_ids
from data.files import write_atomically, write_text
from data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, get_tokenizer
from runtime.export import gpt2_weights, merge_pairs, to_gpt2_unicode

# The gguf package's names for a tensor type, and for a file with such matrices.
DTYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"),
          "q8_0": ("Q8_0", "MOSTLY_Q8_0")}


def export_gguf(path, model, spec, dtype, turns):
    """Write a GPT as a GGUF file, atomically, and a Modelfile. Raises UserError or OSError.

    dtype: of the matrices, "float32", "float16" or "q8_0" (blocks of 32 int8 and a float16 scale);
    the rest is float32. turns: how many questions the model sees; 0: a base model.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("--out=FILE.gguf needs the gguf package; pip install gguf") from error
    cfg, weights = model.config, gpt2_weights(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, cfg.n_layer)

    def write(f):
        writer = gguf.GGUFWriter(f.name, "gpt2")
        writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(cfg.block_size)
        writer.add_embedding_length(cfg.n_embd)
        writer.add_block_count(cfg.n_layer)
        writer.add_feed_forward_length(4 * cfg.n_embd)
        writer.add_head_count(cfg.n_head)
        writer.add_layer_norm_eps(1e-5)
        add_tokenizer(writer, spec)
        writer.add_chat_template(chat_template(turns))
        for name, tensor in weights.items():
            is_matrix = tensor.dim() == 2 and name != "wpe.weight"
            kind = gguf.GGMLQuantizationType[DTYPES[dtype if is_matrix else "float32"][0]]
            values = gguf.quantize(tensor.float().numpy(force=True), kind)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), values, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:  # NumPy's have neither errno nor file name
            raise OSError(f"{path}: {error}") from error
        finally:
            writer.close()

    write_atomically(path, write)
    write_modelfile(path.with_suffix(".Modelfile"), path.name, cfg.block_size, turns)
    if spec not in ("gpt2", "bytes"):
        print("note: llama.cpp may split texts with consecutive spaces, or with punctuation next "
              "to multi-byte letters, into different tokens than chat.py")


def add_tokenizer(writer, spec):
    """Add a tokenizer to a GGUFWriter. llama.cpp has GPT-2's pattern, "gpt-2". "superbpe" splits a
    text at numbers only and leaves the rest to the merges, which rarely cross one of our splits,
    because they were learned within the pieces between them."""
    enc = get_tokenizer(spec)
    end_of_text, user, assistant, end = special_ids(enc)
    ranks = enc._mergeable_ranks
    tokens = list(map(to_gpt2_unicode, sorted(ranks, key=ranks.get)))  # by id
    merges = merge_pairs(enc)
    if spec != "gpt2":
        # A few tokens never occur: a combining accent is punctuation for Python's re, with which
        # train_bpe splits, and a letter for tiktoken's regex engine.
        merges = [(a, b) for a, b in merges if not is_text(a + b) or
                  len(enc.encode_ordinary((a + b).decode("utf-8"))) == 1]
        # A space that may follow a word merges with it first, then with other white space.
        merges.sort(key=lambda pair: b"".join(pair).isspace())
    merges = [" ".join(map(to_gpt2_unicode, pair)) for pair in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if spec == "gpt2" else "superbpe")
    writer.add_token_list([*tokens, *SPECIAL_TOKENS])
    writer.add_token_types([1] * len(tokens) + [3] * len(SPECIAL_TOKENS))  # 1: normal, 3: control
    writer.add_token_merges(merges or [f"{END} {END}"])  # there must be one; this never applies
    writer.add_bos_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_pad_token_id(end_of_text)
    # Each of these ends a reply, as in chat.py. <|endoftext|> does so by its name.
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(user)
    writer.add_eom_token_id(assistant)


def is_text(token):
    """Whether the bytes of a token are whole characters."""
    return token.decode("utf-8", "ignore").encode("utf-8") == token


def write_modelfile(path, gguf_name, block_size, turns):
    """Write the Modelfile that `ollama create NAME -f FILE` needs. It has the chat format as a Go
    template, without system messages."""
    newest = 2 * turns - 1  # messages that the model sees
    chat = (END_OF_TEXT + "{{ range $i, $m := .Messages }}"
            f'{{{{ if and (ne $m.Role "system") (le (len (slice $.Messages $i)) {newest}) }}}}'
            "<|{{ $m.Role }}|>{{ $m.Content }}" + END + "{{ end }}{{ end }}" + ASSISTANT)
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{chat if turns else "{{ .Prompt }}"}"""',
             f"PARAMETER num_ctx {block_size}"]
    lines += [f'PARAMETER stop "{token}"' for token in SPECIAL_TOKENS]
    write_text(path, "\n".join(lines) + "\n")
