"""GGUF out, against llama.cpp itself, which serves the files on this computer."""
import json
import math
import random
import re
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from data.export import ids_may_differ

import chat
import model as m
from data.conversation import encode_conversation, special_ids
from data.tokenizer import SPACE_BEHIND_PATTERN, SPLIT_PATTERN, get_tokenizer, train_bpe
from model import GPT, GPTConfig
from tests.conftest import largest_file

REPO = Path(__file__).parent.parent
ROWS = json.loads((REPO / "data/instruction/instruction-data.json").read_text(encoding="utf-8"))
CHATS = [f"{row['instruction']}\n{row['output']}" for row in ROWS]
CODE = (REPO / "data/export.py").read_text(encoding="utf-8")
PARAGRAPH = ("Où est le café?  Ça, c'est à 3.14 km; naïve Ærøskøbing, Straße, 東京都, здравствуйте, नमस्ते. e\u0301'"
             "\n\n\tif x_1 == 10**6:\n        return '👋🏽 👨\u200d👩\u200d👧 🇫🇷'   \r\n \n\n  I'll we've they'D  "
             " 1,234,567   ...!?  __init__ \u00a0\u2003 “end”…  ² Ⅷ x² م٣٤؟ สวัสดี 안녕하세요 ")
JAPANESE = "今日はとてもよい日です。「東京」へ行きました。きのうは雨でしたが、あしたは晴れるでしょう！本を読みますか？はい、読みます。"
HINDI = "नमस्ते। आप कैसे हैं? यह एक छोटी-सी फ़ाइल है. फ़ाइलें (दो) नहीं मिलीं: 'हिंदी', 'में' और \"कुछ\"... "


def several_texts():
    """200 texts: chats, some with odd things put in, and cuts of a paragraph of everything."""
    draw = random.Random(4)
    texts = draw.sample(CHATS, 60)
    for text in draw.sample(CHATS, 60):
        for odd in draw.choices(["  ", "\n\n", " \n", "\t", "é", "👋", "12", "345", "'s", "²", "…", "東", "\r\n", "_",
                                 "<|end|>", "<|user|>"], k=3):
            place = draw.randrange(len(text))
            text = text[:place] + odd + text[place:]
        texts.append(text)
    for _ in range(80):
        start = draw.randrange(len(PARAGRAPH))
        texts.append(PARAGRAPH[start:start + draw.randrange(1, 80)])
    return texts


class Server:
    """llama.cpp with a file, in this process; it answers over HTTP."""

    def __init__(self, path, use_jinja=True):
        llama = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
        params = llama.CommonParams()
        params.model.path, params.use_jinja = str(path), use_jinja
        params.warmup = params.ui = params.fit_params = False
        params.verbosity, params.cpuparams.n_threads = 0, 1
        # As exact as we are.
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama.Server(params)
        self.post("completion", prompt=[0], n_predict=1)  # ended before its loop runs, it would hang

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


def save(path, gpt, spec, kind="chat", **extra):
    m.save_checkpoint(path, m.model_checkpoint(gpt, spec, kind, step=1, max_iters=1, **extra))


def export(checkpoint, to, **flags):
    m.main([f"--checkpoint={checkpoint}", f"--export={to}", *(f"--{k}={v}" for k, v in flags.items())])
    return to


def random_model(spec, **shape):
    torch.manual_seed(3)
    shape = dict(block_size=64, n_layer=2, n_head=2, n_embd=32) | shape
    gpt = GPT(GPTConfig(vocab_size=get_tokenizer(spec).n_vocab, **shape)).eval()
    with torch.no_grad():
        for p in gpt.parameters():  # biases and norms too, so that none is forgotten
            p.add_(torch.randn_like(p) * 0.15)
    return gpt


# ---- tokens ----

def tokenizer(name, request):
    if name == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    return {"gpt2": lambda: "gpt2", "bytes": lambda: "bytes",
            "bpe": lambda: train_bpe(CHATS, 1024),
            "bpe of code": lambda: train_bpe([CODE], 1024),
            "space behind": lambda: train_bpe(CHATS, 512, SPACE_BEHIND_PATTERN)}[name]()


def test_the_export_says_where_llama_may_cut_other_ids(tmp_path, capsys):
    spec = train_bpe([JAPANESE] * 2, 400)  # its merges reach from half a letter over a comma
    save(tmp_path / "best.pt", random_model(spec), spec)
    llama = Server(export(tmp_path / "best.pt", tmp_path / "it.gguf"))
    assert "punctuation beside letters of several bytes" in capsys.readouterr().out
    draw = random.Random(1)
    cuts = ["".join(draw.choices(JAPANESE, k=20)) for _ in range(100)]
    assert any(llama.ids(text) != get_tokenizer(spec).encode_ordinary(text) for text in cuts), "else why say it?"


@pytest.mark.parametrize("name", ["gpt2", "bytes", "bpe", "bpe of code", "space behind"])
def test_llama_makes_the_same_ids_and_the_same_text(name, request, tmp_path, capsys):
    spec = tokenizer(name, request)
    enc = get_tokenizer(spec)
    gpt = random_model(spec, bias=name != "bytes", n_embd=48 if name == "bytes" else 32)
    save(tmp_path / "best.pt", gpt, spec)
    llama = Server(export(tmp_path / "best.pt", tmp_path / "it.gguf"))
    assert "may cut" not in capsys.readouterr().out
    for text in several_texts():
        ids = llama.ids(text)
        assert ids == enc.encode_ordinary(text), text
        assert llama.post("detokenize", tokens=ids)["content"] == text
    for token, i in enc._special_tokens.items():
        assert llama.ids(token, parse_special=True) == [i] and llama.ids(token) == enc.encode_ordinary(token)
    prompt = enc.encode_ordinary("What is 2+2?")[:20]
    assert_same_probabilities(llama, gpt, prompt, 8, ends=())


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, SPACE_BEHIND_PATTERN], ids=["space alone", "space behind"])
def test_accents_that_stand_alone_make_the_same_ids(pattern, tmp_path):
    spec = train_bpe([HINDI] * 3, 512, pattern)
    save(tmp_path / "best.pt", random_model(spec), spec)
    llama, enc = Server(export(tmp_path / "best.pt", tmp_path / "it.gguf")), get_tokenizer(spec)
    for start in range(0, len(HINDI) - 20):
        assert llama.ids(HINDI[start:start + 20]) == enc.encode_ordinary(HINDI[start:start + 20])


def test_a_space_goes_to_the_word_before_it_and_where_not_the_export_says_so(tmp_path, capsys):
    spec = train_bpe([CODE], 600, SPACE_BEHIND_PATTERN)
    save(tmp_path / "best.pt", random_model(spec), spec)
    llama, enc = Server(export(tmp_path / "best.pt", tmp_path / "it.gguf")), get_tokenizer(spec)
    lines = [line for line in CODE.splitlines() if line.strip()]
    differ = [line for line in lines if llama.ids(line) != enc.encode_ordinary(line)]
    assert sum("  " in line.strip() for line in lines) > 8, "several spaces within a line"
    assert len(differ) <= 0.02 * len(lines)
    assert "may cut into other tokens than chat.py: texts with several spaces behind a word" in capsys.readouterr().out


def test_an_older_pattern_is_told():
    assert "older" in ids_may_differ({"pattern": r" ?\w+|\W", "merges": []})
    assert ids_may_differ({"pattern": SPACE_BEHIND_PATTERN, "merges": [[97, 32]]}) is None


# ---- a trained model ----

ALPHABET = "a is for ant, b is for bee, c is for cat, d is for dog, e is for elk, f is for fox, g is for goat."
TALKS = [["Say the alphabet.", ALPHABET, "Once more.", ALPHABET], ["Hello!", "Hello.", "Bye!", "Goodbye."],
         ["What is 2+2?", "4", "And 3+1?", "4"], ["Name a pet.", "a dog", "Another.", "a cat"]]
NEW = "Name a pet: a is for ant, b is for dog. Say Hello, 2+2 is 4, d is for elk, and once more the fox. What is that?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of chats of two turns, trained to know them, and its checkpoint."""
    torch.manual_seed(1)
    spec = train_bpe([" ".join(talk) for talk in TALKS], 320, SPACE_BEHIND_PATTERN)
    enc = get_tokenizer(spec)
    gpt = GPT(GPTConfig(vocab_size=enc.n_vocab, block_size=128, n_layer=2, n_head=2, n_embd=64))
    chats = [[{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
             for talk in TALKS]
    ids = [torch.tensor([encode_conversation(messages, enc)]) for messages in chats]
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(gpt(x[:, :-1], x[:, 1:].flatten()) / x.numel() for x in ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    save(folder / "best.pt", gpt, spec, turns=2)
    return SimpleNamespace(gpt=gpt.eval(), enc=enc, spec=spec, path=folder / "best.pt")


@torch.no_grad()
def log_probabilities(gpt, ids):
    """(T, V), with GELU as llama.cpp has it, looked up in a table of float16. (With ours the trained
    model's differ by up to 0.002.)"""
    exact = F.gelu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "gelu", lambda x, **how: exact(x.half().float(), **how).half().float())
        return gpt(torch.tensor([ids]))[0].log_softmax(-1)


def assert_same_probabilities(llama, gpt, prompt, count, ends):
    """Greedily the same tokens, and of each step the same five likeliest with the same
    log-probabilities."""
    theirs = llama.post("completion", prompt=prompt, n_predict=count, temperature=0, n_probs=5, return_tokens=True)
    ours = list(gpt.generate(prompt, count, temperature=0, stop_ids=ends))
    assert [i for i in theirs["tokens"] if i not in ends] == ours
    expected = log_probabilities(gpt, prompt + ours)[len(prompt) - 1:]
    for step, row in zip(theirs["completion_probabilities"], expected):
        assert [top["id"] for top in step["top_logprobs"]] == row.topk(5).indices.tolist()
        for top in step["top_logprobs"]:
            assert abs(top["logprob"] - row[top["id"]].item()) < 0.001
    return ours


def test_llama_answers_greedily_with_the_same_tokens_and_probabilities(trained, tmp_path):
    llama, ends = Server(export(trained.path, tmp_path / "it.gguf")), special_ids(trained.enc)
    end_of_text, user, assistant, end = ends

    def asked(text):
        return [end_of_text, user, *trained.enc.encode_ordinary(text), end, assistant]
    said = assert_same_probabilities(llama, trained.gpt, asked("Say the alphabet."), 30, ends)
    assert len(said) == 30 and ALPHABET.startswith(trained.enc.decode(said)), "it has learned"
    for text in ("Name a pet.", NEW, "Once more the dog?"):
        assert_same_probabilities(llama, trained.gpt, asked(text), 30, ends)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 1e-3), ("q8_0", 0.01)])
def test_perplexity_stays(trained, tmp_path, dtype, tolerance):
    llama = Server(export(trained.path, tmp_path / "it.gguf", dtype=dtype))
    ids, n = trained.enc.encode_ordinary(NEW), trained.enc.n_vocab
    expected = log_probabilities(trained.gpt, ids)
    ours = theirs = 0
    for i in range(1, len(ids)):
        answer = llama.post("completion", prompt=ids[:i], n_predict=1, n_probs=n, temperature=0)
        found = {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}
        theirs += found[ids[i]] / (len(ids) - 1)
        ours += expected[i - 1, ids[i]].item() / (len(ids) - 1)
    assert abs(math.exp(ours - theirs) - 1) < tolerance
    size = (tmp_path / "it.gguf").stat().st_size
    bits = {"float32": 32, "float16": 16, "q8_0": 8.5}[dtype]
    assert abs(size - trained.gpt.num_params() * bits / 8) < 60_000, "the rest is vocabulary and positions"


# ---- chats ----

def answers(gpt, enc, turns, questions):
    talk = chat.Talk(gpt, enc, turns)
    for question in questions:
        list(chat.reply(talk, enc.encode_ordinary(question), chat.Settings(temperature=0, max_new_tokens=20)))
        yield talk.last["text"]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_chat_endpoint_answers_as_chat_py_does(trained, tmp_path, turns):
    save(tmp_path / "best.pt", trained.gpt, trained.spec, turns=turns)
    llama, messages = Server(export(tmp_path / "best.pt", tmp_path / "it.gguf")), []
    questions = ["Hello!", "Name a pet.", "Another.", " Once  more.\n"]
    talk = chat.Talk(trained.gpt, trained.enc, turns)
    for question, expected in zip(questions, answers(trained.gpt, trained.enc, turns, questions)):
        messages.append({"role": "user", "content": question})
        prompt = llama.post("apply-template", messages=messages)["prompt"]
        asked = trained.enc.encode_ordinary(question)
        ours, _ = chat.make_prompt(talk, asked, chat.Settings(max_new_tokens=20))
        assert llama.ids(prompt, parse_special=True) == ours
        answer = llama.post("v1/chat/completions", messages=messages, temperature=0, max_tokens=20)
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["usage"]["prompt_tokens"] == len(ours)
        messages.append({"role": "assistant", "content": expected})
        talk.history.append((asked, trained.enc.encode_ordinary(expected)))


def test_a_system_text_goes_before_the_first_question(trained, tmp_path):
    llama = Server(export(trained.path, tmp_path / "it.gguf"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    assert llama.post("apply-template", messages=messages)["prompt"] == \
        "<|endoftext|><|user|>Be brief.\nHello!<|end|><|assistant|>"


def test_without_jinja_llama_refuses_rather_than_write_another_format(trained, tmp_path):
    llama = Server(export(trained.path, tmp_path / "it.gguf"), use_jinja=False)
    for where in ("apply-template", "v1/chat/completions"):
        answer = llama.post(where, messages=[{"role": "user", "content": "Hello!"}])
        assert "--jinja" in answer["error"]["message"]


def test_a_model_of_plain_text_goes_on_with_the_message(trained, tmp_path):
    save(tmp_path / "best.pt", trained.gpt, trained.spec, kind="text")
    llama = Server(export(tmp_path / "best.pt", tmp_path / "it.gguf"))
    for text, prompt in (("a is for", "a is for"), ("", "<|endoftext|>")):
        assert llama.post("apply-template", messages=[{"role": "user", "content": text}])["prompt"] == prompt
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "it.Modelfile").read_text(encoding="utf-8")


def test_every_special_token_ends_a_reply(trained, tmp_path):
    llama = Server(export(trained.path, tmp_path / "it.gguf"))
    for i in special_ids(trained.enc):
        answer = llama.post("completion", prompt="Hello", n_predict=3, logit_bias=[[i, 1000]])
        assert answer["stop_type"] == "eos" and answer["content"] == ""


def test_the_modelfile_names_the_file_the_format_and_the_context(trained, tmp_path):
    export(trained.path, tmp_path / "it.gguf")
    lines = (tmp_path / "it.Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./it.gguf" and "PARAMETER num_ctx 128" in lines
    assert 'PARAMETER stop "<|end|>"' in lines
    assert lines[1].startswith('TEMPLATE """<|endoftext|>{{ range') and lines[1].endswith('<|assistant|>"""')
    assert "(le (len (slice $.Messages $i)) 3)" in lines[1], "two questions, and the answer between"


# ---- bad input ----

@pytest.fixture
def small(tmp_path):
    save(tmp_path / "best.pt", random_model("bytes", n_embd=48), "bytes")
    return tmp_path / "best.pt"


@pytest.mark.parametrize("to, dtype, told", [
    ("it.gguf", "q8_0", r"dtype=q8_0: .*n_embd=48; use --dtype=float16"),
    ("it.gguf", "int8", r"dtype='int8': use float32, float16, q8_0"),
    ("folder", "float16", r"dtype=float16: a folder .* use --export=FILE.gguf")])
def test_a_dtype_that_cannot_be_is_told_and_nothing_is_written(small, tmp_path, to, dtype, told):
    with pytest.raises(ValueError, match=told):
        export(small, tmp_path / to, dtype=dtype)
    assert list(tmp_path.iterdir()) == [small]


def test_onto_a_folder_is_told_and_into_a_missing_one_makes_it(small, tmp_path):
    (tmp_path / "it.gguf").mkdir()
    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'it.gguf'}: could not be saved")):
        export(small, tmp_path / "it.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "it.gguf"]
    export(small, tmp_path / "new" / "folder" / "IT.GGUF")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["IT.GGUF", "IT.Modelfile"]


def test_a_full_disk_leaves_the_earlier_file_as_it_was(small, tmp_path):
    export(small, tmp_path / "it.gguf", dtype="float16")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for size in (5_000, 200_000):  # within the vocabulary, within the tensors
        told = re.escape(f"{tmp_path / 'it.gguf'}: could not be saved")
        with largest_file(size), pytest.raises(OSError, match=told):
            export(small, tmp_path / "it.gguf")
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
