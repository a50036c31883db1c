"""Multiple choice: against float64 by transformers, hand-made models, spoiled files and a small server."""
import hashlib
import json
import math
import os
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import chat
import config
import data.download
from data import hellaswag
from data.tokenizer import get_tokenizer
from model import GPT, GPTConfig, model_checkpoint, save_checkpoint, to_gpt2_names
from tests.conftest import error_of, serving

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

START, USER, ASSISTANT, END = 256, 257, 258, 259  # behind the 256 bytes
BLOCK = 48


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save(path, model, kind):
    save_checkpoint(path, model_checkpoint(model, "bytes", kind, step=1, max_iters=1, turns=1))
    return path


@pytest.fixture
def score(tmp_path, capsys):
    """Score a file with a model in this process: (what is printed, the JSON file, what is noted)."""
    def call(model, kind, source, *flags):
        path = tmp_path / "answers.json"
        chat.main([f"--checkpoint={save(tmp_path / 'model.pt', model, kind)}", f"--score={source}",
                   f"--score_file={path}", "--device=cpu", *flags])
        out, err = capsys.readouterr()
        return out, json.loads(path.read_text(encoding="utf-8")), err
    return call


# ---- likelihoods ----

@pytest.fixture(scope="module")
def gpt():
    """A model whose every number is random, far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(260, BLOCK, 2, 2, 32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def double(gpt):
    """The same weights in transformers, in float64."""
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=260, n_positions=BLOCK, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager"))
    missing = hf.load_state_dict(to_gpt2_names(gpt), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    hf.tie_weights()
    return hf.double().eval()


@torch.no_grad()
def expected_likelihood(hf, context, ending):
    """The log-probability of an ending's ids behind a context's, read by themselves."""
    log_probs = hf(torch.tensor([context + ending[:-1]])).logits[0].log_softmax(-1)
    return sum(log_probs[len(context) - 1 + n, i].item() for n, i in enumerate(ending))


def random_rows(count=40, longest=20):
    """Questions of many lengths, several of each, and three choices of unequal lengths."""
    rng = random.Random(0)

    def text(low, high):
        return "".join(rng.choice("abc dé?") for _ in range(rng.randint(low, high)))

    return [{"question": text(0, longest), "choices": [text(1, 9) + "." for _ in range(3)],
             "answer": rng.randrange(3)} for _ in range(count)]


def framed(kind, question, choice):
    """What the model reads and what it is to say, as ids; of a question that is too long only the end."""
    ending = [*choice.encode(), END] if kind == "chat" else list(f" {choice}".encode())
    room = BLOCK + 1 - len(ending) - (4 if kind == "chat" else 0)
    question = list(question.encode())[-room:]
    if kind == "chat":
        return [START, USER, *question, END, ASSISTANT], ending
    return question or [START], ending


@pytest.fixture(scope="module")
def expected(double):
    """What float64 finds for random_rows: {kind: [[log-likelihood, ...], ...]}."""
    return {kind: [[expected_likelihood(double, *framed(kind, row["question"], choice))
                    for choice in row["choices"]] for row in random_rows()] for kind in ("text", "chat")}


@pytest.mark.parametrize("budget", [1, 300, 4096])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_every_likelihood_is_that_of_transformers_in_float64(
        gpt, expected, score, tmp_path, monkeypatch, kind, budget):
    monkeypatch.setattr(chat, "BATCH_TOKENS", budget)  # one row at a time, a few, all of a length
    rows = random_rows()
    _, saved, err = score(gpt, kind, write(tmp_path / "rows.jsonl", rows))
    assert [a["row"] for a in saved["answers"]] == list(range(1, 41)) and "only their ends" not in err
    right = {"sum": 0, "mean": 0}
    for row, answer, likelihoods in zip(rows, saved["answers"], expected[kind]):
        assert [answer[k] for k in ("question", "choices", "right")] == list(row.values())
        assert answer["log_likelihoods"] == pytest.approx(likelihoods, rel=1e-4)
        lengths = [len(choice.encode()) + 1 for choice in row["choices"]]  # a space, or <|end|>
        assert answer["tokens"] == lengths
        means = [x / n for x, n in zip(likelihoods, lengths)]
        right["sum"] += likelihoods[row["answer"]] == max(likelihoods)
        right["mean"] += means[row["answer"]] == max(means)
    assert {t["by"]: (t["n"], t["right"]) for t in saved["summary"]} == {by: (40, n) for by, n in right.items()}


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_what_the_choices_share_is_read_once(gpt, score, tmp_path, monkeypatch, kind):
    read, hidden, make_fast = [], GPT.hidden, chat.gpt.make_fast

    def counting(self, idx, *args, **named):
        read.append(idx.numel())
        return hidden(self, idx, *args, **named)

    monkeypatch.setattr(GPT, "hidden", counting)
    monkeypatch.setattr(chat.gpt, "make_fast",  # which tries a token
                        lambda *args, **named: make_fast(*args, **named) or read.clear())
    rows = [{"question": 20 * "q", "choices": ["a.", "bcd."], "answer": 0}]
    score(gpt, kind, write(tmp_path / "rows.jsonl", rows))
    context, _ = framed(kind, 20 * "q", "bcd.")
    assert read == [len(context) - 1, 2 * 5]  # then its last id and the endings, at most five ids each


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_of_a_question_that_is_too_long_only_the_end_is_read(gpt, double, score, tmp_path, kind):
    long = "".join(map(chr, range(40, 120)))
    choices = ["one", "two"]  # equally long, so that both are asked for the same rest
    fits = long[:BLOCK + 1 - 4 - (4 if kind == "chat" else 0)]
    rows = [{"question": q, "choices": choices, "answer": 1} for q in (long, fits, fits + "!", "short")]
    _, saved, err = score(gpt, kind, write(tmp_path / "rows.jsonl", rows))
    assert "2 questions are too long" in err and "only their ends" in err
    for row, answer in zip(rows, saved["answers"]):
        likelihoods = [expected_likelihood(double, *framed(kind, row["question"], c)) for c in choices]
        assert answer["log_likelihoods"] == pytest.approx(likelihoods, rel=1e-4)


@pytest.mark.parametrize("kind, longest", [("text", BLOCK - 1), ("chat", BLOCK - 5)])
def test_rows_with_a_choice_that_is_too_long_are_left_out(gpt, score, tmp_path, monkeypatch, kind, longest):
    rows = [{"question": "Q", "choices": ["a", n * "b"], "answer": 0} for n in (longest, longest + 1, 1)]
    _, saved, err = score(gpt, kind, write(tmp_path / "rows.jsonl", rows))
    assert [a["row"] for a in saved["answers"]] == [1, 3] and "1 rows" in err and "left out" in err
    line = error_of(monkeypatch, f"--checkpoint={tmp_path / 'model.pt'}",
                    f"--score={write(tmp_path / 'long.jsonl', rows[1:2])}")
    assert "long.jsonl" in line and "short enough" in line


# ---- what is counted ----

@pytest.fixture(scope="module")
def unigram():
    """A model for which "x" is e ** 4 times as likely as any other byte, wherever it stands."""
    model = GPT(GPTConfig(260, BLOCK, 1, 1, 4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.ln_f.bias[0] = 1  # all that the head sees, so the logits are the table's first column
        model.wte.weight[ord("x"), 0] = 4
    return model


# An "x" costs log Z - 4 = 1.75 nats, any other byte log Z = 5.75, the space before a choice too.
FORCED = [{"question": "Q", "choices": ["x", "a"], "answer": 0},  # 7.5 or 11.5, 3.7 or 5.7 a token
          {"question": "", "choices": ["aa", "aaxxx"], "answer": 0},  # 17.2 or 22.5, 5.7 or 3.7 a token
          {"question": "Why?", "choices": ["a", "xxxx"], "answer": 1},  # 11.5 or 12.7, 5.7 or 2.5 a token
          {"question": "Q", "choices": ["aaxxx", "aa"], "answer": "aa"}]


def test_what_is_right_is_what_the_weights_force(unigram, score, tmp_path):
    out, saved, err = score(unigram, "text", write(tmp_path / "rows.jsonl", FORCED))
    log_z = math.log(259 + math.exp(4))
    for row, answer in zip(FORCED, saved["answers"]):
        assert answer["log_likelihoods"] == pytest.approx(
            [4 * choice.count("x") - (len(choice) + 1) * log_z for choice in row["choices"]], rel=1e-5)
    assert [(a["right"], a["sum"], a["mean"]) for a in saved["answers"]] == [
        (0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)]
    # Three of four are right by the sum, the standard error is sqrt(3/4 * 1/4 / 4); two by the mean.
    assert [(t["by"], t["n"], t["right"], t["accuracy"]) for t in saved["summary"]] == [
        ("sum", 4, 3, 0.75), ("mean", 4, 2, 0.5)]
    assert [t["standard_error"] for t in saved["summary"]] == pytest.approx([math.sqrt(3 / 64), 0.25])
    assert [line.split() for line in out.splitlines()[1:]] == [
        "sum 3 of 4 75.00% ± 21.65%".split(), "mean 2 of 4 50.00% ± 25.00%".split(), "chance 50.00%".split()]
    assert str(tmp_path / "answers.json") in err


def test_hellaswags_own_rows_are_read_as_the_plain_ones(unigram, score, tmp_path):
    theirs = [{"ind": 24, "activity_label": "Roof", "ctx_a": row["question"], "ctx_b": "he", "split": "val",
               "ctx": row["question"], "endings": row["choices"],
               "label": row["answer"] if type(row["answer"]) is int else row["choices"].index(row["answer"]),
               "split_type": "indomain", "source_id": "activitynet~v_1"} for row in FORCED]
    plain = score(unigram, "text", write(tmp_path / "plain.jsonl", FORCED))
    own = score(unigram, "text", write(tmp_path / "own.jsonl", theirs))
    assert own[0] == plain[0] and own[1]["answers"] == plain[1]["answers"]
    (tmp_path / "list.json").write_text(json.dumps(theirs), encoding="utf-8")
    assert score(unigram, "text", tmp_path / "list.json")[1]["answers"] == plain[1]["answers"]


def test_score_rows_takes_so_many_spread_over_the_file(unigram, score, tmp_path):
    _, saved, _ = score(unigram, "text", write(tmp_path / "rows.jsonl", FORCED), "--score_rows=2")
    assert [a["row"] for a in saved["answers"]] == [1, 3] and saved["summary"][0]["n"] == 2


def test_gpt2s_weights_are_scored_from_their_folder(
        score, gpt2_vocabulary, tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_positions=32, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5))
    hf.save_pretrained(tmp_path / "my_gpt2")
    hf = hf.double().eval()
    row = {"ctx": "A man is sitting on a roof. he", "label": 1,
           "endings": ["is using wrap to wrap a pair of skis.", "starts pulling up roofing on a roof."]}
    monkeypatch.setattr(config, "REPO", tmp_path)
    chat.main([f"--init_from={tmp_path / 'my_gpt2'}", f"--score={write(tmp_path / 'row.jsonl', [row])}",
               "--device=cpu"])
    out, err = capsys.readouterr()
    path = tmp_path / "out" / "my_gpt2" / "score.json"  # no checkpoint has it beside itself
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["model"] == str(tmp_path / "my_gpt2") and str(path) in err
    enc = get_tokenizer("gpt2")
    assert saved["answers"][0]["log_likelihoods"] == pytest.approx(
        [expected_likelihood(hf, enc.encode_ordinary(row["ctx"]), enc.encode_ordinary(" " + ending))
         for ending in row["endings"]], rel=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_other_precisions_find_about_the_same(gpt, expected, score, tmp_path, dtype):
    _, saved, _ = score(gpt, "text", write(tmp_path / "rows.jsonl", random_rows()), f"--dtype={dtype}")
    for answer, likelihoods in zip(saved["answers"], expected["text"]):
        assert answer["log_likelihoods"] == pytest.approx(likelihoods, rel=0.1)


# ---- bad input ----

GOOD = {"question": "Q", "choices": ["a", "b", "c"], "answer": 0}
OWN = {"ctx": "Q", "endings": ["a", "b", "c"], "label": 0}


@pytest.mark.parametrize("row, wanted", [
    ({**GOOD, "choices": ["a", "b"]}, "2 choices, but row 1 has 3"),
    ({**GOOD, "choices": ["a"]}, "'choices' must be a list of two texts or more, found \"['a']\""),
    ({**GOOD, "choices": []}, "two texts or more"), ({**GOOD, "choices": None}, "two texts or more, found 'None'"),
    ({**OWN, "endings": "abc"}, "'endings' must be a list of two texts or more, found 'abc'"),
    ({**OWN, "endings": {"0": "a", "1": "b"}}, "'endings' must be a list"),
    ({**GOOD, "choices": ["a", "", "c"]}, "choices[1] must be a text that is not empty, found ''"),
    ({**OWN, "endings": ["a", "b", " \n"]}, "endings[2] must be a text that is not empty"),
    ({**GOOD, "choices": ["a", 2, "c"]}, "choices[1] must be a text that is not empty, found '2'"),
    ({**GOOD, "answer": 3}, "'answer' must be a number from 0 to 2, or the text of just one of the choices; found 3"),
    ({**GOOD, "answer": -1}, "found -1"), ({**GOOD, "answer": 1.0}, "found 1.0"), ({**GOOD, "answer": True}, "found True"),
    ({**GOOD, "answer": None}, "found None"), ({**GOOD, "answer": [0]}, "found [0]"),
    ({**GOOD, "answer": "d"}, "found 'd'"),
    ({**GOOD, "choices": ["a", "b", "a"], "answer": "a"}, "the text of just one of the choices; found 'a'"),
    ({**OWN, "label": "7"}, "'label' must be a number from 0 to 2, or the text of just one of the endings; found 7"),
    ({**OWN, "label": ""}, "found ''"), ({**OWN, "label": 4}, "found 4"),
    ({**GOOD, "question": None}, "'question' must be text, found NoneType None"), ({**OWN, "ctx": 5}, "'ctx' must be text, found int"),
    ({"question": "Q", "answer": 0}, "{'question', 'choices', 'answer'}, found 'question', 'answer'"),
    ({"question": "Q", "choices": ["a", "b", "c"]}, "found 'question', 'choices'"),
    ({"ctx_a": "Q", "endings": ["a", "b", "c"], "label": 0}, "{'ctx', 'endings', 'label'} or"),
    ({}, "found no field"), ([], "found list"), ("a", "found str"), (None, "found NoneType"),
    ({**GOOD, "question": "\ud800"}, "half of a surrogate pair"), ({**GOOD, "choices": ["a", "\ud83d", "c"]}, "surrogate"),
])
def test_a_row_of_another_shape_is_one_line_that_names_it(tmp_path, row, wanted):
    path = write(tmp_path / "rows.jsonl", [GOOD, OWN, row])
    with pytest.raises(ValueError) as caught:
        hellaswag.read_choices(path)
    line = str(caught.value)
    assert line.startswith(f"{path}, row 3: ") and wanted in line and "\n" not in line and len(line) < 300


def test_a_file_that_is_none_is_one_line(unigram, tmp_path, monkeypatch):
    flag = f"--checkpoint={save(tmp_path / 'model.pt', unigram, 'text')}"
    path = tmp_path / "rows.jsonl"
    whole = json.dumps(GOOD)
    for text, wanted in (("", "the file is empty"), (" \n", "the file is empty"), (whole[:-9], "line 1"),
                         (f"{whole}\n{whole[:-9]}", "line 2: not JSON"), ("[]", "knows no chats"),
                         ('{"instruction": "a", "output": "b"}', "knows no chats")):
        path.write_text(text, encoding="utf-8")
        line = error_of(monkeypatch, flag, f"--score={path}")
        assert str(path) in line and wanted in line
    write(path, [{"question": "Q", "answer": "A"}, GOOD])  # the first row may be the bad one
    assert f"{path}, row 1: expected" in error_of(monkeypatch, flag, f"--score={path}")
    write(path, [GOOD])
    line = error_of(monkeypatch, flag, f"--score={path}", f"--score_file={tmp_path}")
    assert f"score_file={tmp_path}" in line and "folder" in line


# ---- python -m data.hellaswag ----

BODY = "".join(json.dumps({**OWN, "ctx": f"Row {n}"}) + "\n" for n in range(1200)).encode()


class Handler(BaseHTTPRequestHandler):
    """Sends the file, the first time only its beginning."""

    def do_GET(self):
        self.server.asked.append(self.path)
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[start:start + 5000] if len(self.server.asked) == 1 else BODY[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}/data/hellaswag_val.jsonl"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data.download, "CHUNK", 1000)
    monkeypatch.setattr(data.download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hellaswag, "SIZE", len(BODY))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(BODY).hexdigest())
    with serving(server):
        yield server


def test_the_file_is_fetched_whole_and_once(server, tmp_path, capsys):
    for _ in range(2):
        hellaswag.main([f"--url={server.url}", f"--out_dir={tmp_path}"])
        assert capsys.readouterr().out == f"{tmp_path / 'hellaswag_val.jsonl'}: 1,200 rows\n"
    assert (tmp_path / "hellaswag_val.jsonl").read_bytes() == BODY and len(server.asked) == 2
    assert hellaswag.read_choices(tmp_path / "hellaswag_val.jsonl")[7] == ("Row 7", ["a", "b", "c"], 0)


def test_another_file_than_the_known_one_is_not_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "SHA256", 64 * "0")
    with pytest.raises(OSError, match="the sha256 is .*, expected 000"):
        hellaswag.main([f"--url={server.url}", f"--out_dir={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_by_itself_it_fetches_all_10042_rows_of_the_authors(monkeypatch):
    asked = []
    monkeypatch.setattr(hellaswag, "download", lambda *args: asked.append(args) or "rows.jsonl")
    monkeypatch.setattr(hellaswag, "read_choices", lambda path: [])
    hellaswag.main([])
    url, path, sha256, size = asked[0]
    assert url == "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
    assert path.as_posix().endswith("data/hellaswag/hellaswag_val.jsonl")
    assert len(sha256) == 64 and size == 12_246_618
