"""GGUF files, opened and served by llama.cpp itself, in this process."""
import json
import math
import random
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from config import UserError
from data.conversation import encode_conversation, encode_prompt, special_ids
from data.tokenizer import SPLIT_PATTERN, TRAILING_SPACE_PATTERN, get_tokenizer, train_bpe
from model import GPT, GPTConfig
from runtime import export
from runtime.checkpoint import model_state, save_checkpoint
from tests.conftest import limit_file_size

REPO = Path(__file__).parent.parent
ROWS = json.loads((REPO / "data/instruction/instruction-data.json").read_text(encoding="utf-8"))
CHATS = [f"{row['instruction']}\n{row['output']}" for row in ROWS]
CODE = (REPO / "model.py").read_text(encoding="utf-8")
PARAGRAPH = ("Où est le café?  Ça, c'est à 3.14 km; naïve Ærøskøbing, Straße, 東京都, здравствуйте, नमस्ते. e\u0301'"
             "\n\n\tif x_1 == 10**6:\n        return '👋🏽 👨\u200d👩\u200d👧 🇫🇷'   \r\n \n\n  I'll we've they'D  "
             " 1,234,567   ...!?  __init__ \u00a0\u2003 “end”…  ² Ⅷ x² م٣٤؟ สวัสดี 안녕하세요 ")
JAPANESE = "今日はとてもよい日です。「東京」へ行きました。きのうは雨でしたが、あしたは晴れるでしょう！本を読みますか？はい、読みます。"
HINDI = "नमस्ते। आप कैसे हैं? यह एक छोटी-सी फ़ाइल है. फ़ाइलें (दो) नहीं मिलीं: 'हिंदी', 'में' और \"कुछ\"... "


class Server:
    """llama.cpp's HTTP server with a GGUF file."""

    def __init__(self, path, use_jinja=True):
        llama = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
        params = llama.CommonParams()
        params.model.path, params.use_jinja = str(path), use_jinja
        params.warmup = params.ui = params.fit_params = False
        params.verbosity, params.cpuparams.n_threads = 0, 1
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32  # as precise as ours
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama.Server(params)
        self.post("completion", prompt=[0], n_predict=1)  # it would hang if it ended before its loop runs

    def post(self, where, **data):
        request = urllib.request.Request(f"{self.server.listening_address}/{where}", json.dumps(data).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def ids(self, text, parse_special=False):
        return self.post("tokenize", content=text, parse_special=parse_special)["tokens"]


def exported_to(folder, gpt, spec, kind="chat", turns=1, out="it.gguf", dtype="float32"):
    """Export a model on the command line; return the path."""
    save_checkpoint(folder / "best.pt", model_state(gpt, spec, kind, step=1, max_iters=1, turns=turns))
    export.main([f"--checkpoint={folder / 'best.pt'}", f"--out={folder / out}", f"--dtype={dtype}"])
    return folder / out


def random_model(spec, **shape):
    torch.manual_seed(3)
    shape = dict(block_size=64, n_layer=2, n_head=2, n_embd=32) | shape
    gpt = GPT(GPTConfig(vocab_size=get_tokenizer(spec).n_vocab, **shape)).eval()
    with torch.no_grad():
        for p in gpt.parameters():  # biases and norms too, so that a missing one changes logits
            p.add_(torch.randn_like(p) * 0.15)
    return gpt


@torch.no_grad()
def log_probabilities(gpt, ids):
    """Return (T, V), with GELU from a float16 table as in llama.cpp. (With ours they differ by up to 0.002.)"""
    exact = F.gelu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "gelu", lambda x, **how: exact(x.half().float(), **how).half().float())
        return gpt(torch.tensor([ids]))[0].log_softmax(-1)


def assert_same_continuation(llama, gpt, prompt, count, ends=()):
    """Assert that greedy decoding gives the same tokens, with the same log-probabilities for each step's top five."""
    theirs = llama.post("completion", prompt=prompt, n_predict=count, temperature=0, n_probs=5, return_tokens=True)
    ours = list(gpt.generate(prompt, count, temperature=0, stop_ids=ends))
    assert [i for i in theirs["tokens"] if i not in ends] == ours
    expected = log_probabilities(gpt, prompt + ours)[len(prompt) - 1:]
    for step, row in zip(theirs["completion_probabilities"], expected):
        assert [top["id"] for top in step["top_logprobs"]] == row.topk(5).indices.tolist()
        assert all(abs(top["logprob"] - row[top["id"]].item()) < 0.001 for top in step["top_logprobs"])
    return ours


# ---- tokens ----

def some_texts():
    """Chats, some with unusual characters between their words, and pieces of PARAGRAPH."""
    draw = random.Random(4)
    odd = ["  ", "\n\n", " \n", "\t", "é", "👋", "12", "345", "'s", "²", "…", "東", "\r\n", "_", "<|end|>", " é", "👋 ", " _", "². "]
    texts = draw.sample(CHATS, 30) + [draw.choice(odd).join(text.rsplit(" ", 4)) for text in draw.sample(CHATS, 60)]
    starts = [draw.randrange(len(PARAGRAPH)) for _ in range(60)]
    return texts + [PARAGRAPH[start:start + draw.randrange(1, 80)] for start in starts]


@pytest.mark.parametrize("name, learned_from, pattern", [
    ("gpt2", None, None), ("bytes", None, None), ("bpe", CHATS, SPLIT_PATTERN), ("bpe of code", [CODE], SPLIT_PATTERN),
    ("bpe, trailing space", CHATS, TRAILING_SPACE_PATTERN), ("separate accents", [HINDI] * 3, SPLIT_PATTERN),
    ("separate accents, trailing space", [HINDI] * 3, TRAILING_SPACE_PATTERN)])
def test_llama_gives_the_same_ids_text_and_logits(name, learned_from, pattern, request, tmp_path, capsys):
    if name == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    spec = train_bpe(learned_from, 600, pattern) if learned_from else name
    enc, is_hindi = get_tokenizer(spec), "accents" in name
    gpt = random_model(spec, bias=name != "bytes", n_embd=48 if name == "bytes" else 32)
    llama = Server(exported_to(tmp_path, gpt, spec))
    assert bool(learned_from) == ("may split" in capsys.readouterr().out)
    for text in [HINDI[start:start + 20] for start in range(len(HINDI) - 20)] if is_hindi else some_texts():
        ids = llama.ids(text)
        assert ids == enc.encode_ordinary(text), text
        assert llama.post("detokenize", tokens=ids)["content"] == text
    for token, i in enc._special_tokens.items():
        assert llama.ids(token, parse_special=True) == [i] and llama.ids(token) == enc.encode_ordinary(token)
    if not learned_from:
        assert_same_continuation(llama, gpt, enc.encode_ordinary("What is 2+2?"), 8)


@pytest.mark.parametrize("spec, pieces, least, most", [
    # Merges that cross from half a character into punctuation.
    (train_bpe([JAPANESE] * 2, 400), random.Random(1).choices(JAPANESE, k=2000), 0.01, 1),
    (train_bpe([CODE], 600, TRAILING_SPACE_PATTERN), list(CODE), 0, 0.02)], ids=["half characters", "spaces"])
def test_the_export_warns_if_ids_may_differ(spec, pieces, least, most, tmp_path, capsys):
    llama, enc = Server(exported_to(tmp_path, random_model(spec), spec)), get_tokenizer(spec)
    assert "llama.cpp may split texts with consecutive spaces, or with punctuation" in capsys.readouterr().out
    texts = ["".join(pieces[i:i + 20]) for i in range(0, len(pieces), 20)]
    assert least * len(texts) <= sum(llama.ids(text) != enc.encode_ordinary(text) for text in texts) <= most * len(texts)


# ---- a trained model ----

ALPHABET = "a is for ant, b is for bee, c is for cat, d is for dog, e is for elk, f is for fox, g is for goat."
TALKS = [["Say the alphabet.", ALPHABET, "Again.", ALPHABET], ["Hello!", "Hello.", "Bye!", "Goodbye."],
         ["What is 2+2?", "4", "And 3+1?", "4"], ["Name a pet.", "a dog", "Another.", "a cat"]]
NEW = "Name a pet: a is for ant, b is for dog. Say Hello, 2+2 is 4, d is for elk, and again the fox. What is that?"


def to_messages(texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def trained():
    """Return a model trained on chats of two turns until it repeats them, and its tokenizer."""
    torch.manual_seed(1)
    spec = train_bpe([" ".join(talk) for talk in TALKS], 320, TRAILING_SPACE_PATTERN)
    enc = get_tokenizer(spec)
    gpt = GPT(GPTConfig(vocab_size=enc.n_vocab, block_size=128, n_layer=2, n_head=2, n_embd=64))
    ids = [torch.tensor([encode_conversation(to_messages(talk), enc)]) for talk in TALKS]
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(gpt(x[:, :-1], x[:, 1:].flatten()) / x.numel() for x in ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return SimpleNamespace(gpt=gpt.eval(), enc=enc, spec=spec, ends=special_ids(enc))


def test_llama_replies_with_the_same_tokens_and_probabilities(trained, tmp_path):
    llama = Server(exported_to(tmp_path, trained.gpt, trained.spec))
    for question in ("Name a pet.", NEW, "Again the dog?", "Say the alphabet."):
        prompt = encode_prompt(to_messages([question]), trained.enc)
        reply = assert_same_continuation(llama, trained.gpt, prompt, 30, trained.ends)
    assert len(reply) == 30 and ALPHABET.startswith(trained.enc.decode(reply)), "it has learned"
    for i in trained.ends:  # each of the special tokens ends a reply
        answer = llama.post("completion", prompt="Hello", n_predict=3, logit_bias=[[i, 1000]])
        assert answer["stop_type"] == "eos" and answer["content"] == ""


@pytest.mark.parametrize("dtype, bits, tolerance", [("float32", 32, 1e-4), ("float16", 16, 1e-3), ("q8_0", 8.5, 0.01)])
def test_perplexity_and_size_of_each_dtype(dtype, bits, tolerance, trained, tmp_path):
    path = exported_to(tmp_path, trained.gpt, trained.spec, dtype=dtype)
    llama, ids, n = Server(path), trained.enc.encode_ordinary(NEW), trained.enc.n_vocab
    expected, difference = log_probabilities(trained.gpt, ids), 0
    for i in range(1, len(ids)):
        answer = llama.post("completion", prompt=ids[:i], n_predict=1, n_probs=n, temperature=0)
        found = {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}
        difference += (expected[i - 1, ids[i]].item() - found[ids[i]]) / (len(ids) - 1)
    assert abs(math.exp(difference) - 1) < tolerance
    assert abs(path.stat().st_size - trained.gpt.num_params() * bits / 8) < 60_000, "the rest is vocabulary and positions"


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_chat_endpoint_sees_the_newest_turns_and_replies_the_same(turns, trained, tmp_path):
    llama, texts = Server(exported_to(tmp_path, trained.gpt, trained.spec, turns=turns)), []
    for question in ("Hello!", "Name a pet.", "Another.", " Again  the\ndog.\n"):
        texts.append(question)
        messages = to_messages(texts)
        prompt = encode_prompt(messages[1 - 2 * turns:], trained.enc)
        assert llama.ids(llama.post("apply-template", messages=messages)["prompt"], parse_special=True) == prompt
        answer = llama.post("v1/chat/completions", messages=messages, temperature=0, max_tokens=20)
        texts.append(trained.enc.decode(list(trained.gpt.generate(prompt, 20, temperature=0, stop_ids=trained.ends))))
        assert answer["choices"][0]["message"]["content"] == texts[-1] and answer["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("kind, texts, prompt", [
    ("text", ["a is for"], "a is for"), ("text", [""], "<|endoftext|>"),  # a base model continues
    ("chat", ["Be brief.", "Hello!"], "<|endoftext|><|user|>Be brief.\nHello!<|end|><|assistant|>")])
def test_templates_of_base_models_and_system_messages(kind, texts, prompt, trained, tmp_path):
    path = exported_to(tmp_path, trained.gpt, trained.spec, kind, turns=2)
    messages = [{"role": role, "content": text} for role, text in zip(("system", "user")[-len(texts):], texts)]
    assert Server(path).post("apply-template", messages=messages)["prompt"] == prompt
    lines = (tmp_path / "it.Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./it.gguf" and "PARAMETER num_ctx 128" in lines and 'PARAMETER stop "<|end|>"' in lines
    if kind == "text":
        assert lines[1] == 'TEMPLATE """{{ .Prompt }}"""'
    else:
        assert lines[1].startswith('TEMPLATE """<|endoftext|>{{ range') and lines[1].endswith('<|assistant|>"""')
        assert "(le (len (slice $.Messages $i)) 3)" in lines[1], "two questions, and the answer between"
        answer = Server(path, use_jinja=False).post("v1/chat/completions", messages=messages)
        assert "--jinja" in answer["error"]["message"], "refused, not formatted differently"


# ---- errors ----

@pytest.mark.parametrize("out, dtype, message", [
    ("it.gguf", "int8", "dtype=int8: must be float32"),
    ("it.gguf", "float32", "pip install gguf"), ("folder", "float16", "dtype=float16: only for --out=FILE.gguf")])
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(out, dtype, message, tmp_path, monkeypatch):
    if "install" in message:
        monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=message):
        exported_to(tmp_path, random_model("bytes", n_embd=48), "bytes", out=out, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = exported_to(tmp_path, random_model("bytes"), "bytes", dtype="float16")
    before = path.read_bytes()
    for size in (5_000, 100_000):  # within the vocabulary, within the tensors
        with limit_file_size(size), pytest.raises(OSError):
            export.main([f"--checkpoint={tmp_path / 'best.pt'}", f"--out={path}"])
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3
