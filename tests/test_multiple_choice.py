"""runtime/multiple_choice.py, through chat.py --score: against transformers in float64 and hand-made models."""
import json
import math
import random
import shlex

import pytest
import torch

import chat
from config import UserError
from model import GPT, GPTConfig, transpose_conv1d
from runtime import multiple_choice
from tests.test_scoring import LOG_Z, score, unigram, write  # noqa: F401

transformers = pytest.importorskip("transformers")

START, USER, ASSISTANT, END, BLOCK = 256, 257, 258, 259, 48


@pytest.fixture(scope="module")
def gpt():
    """Return a model whose weights are all random, far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(260, BLOCK, 2, 2, 32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def double(gpt):
    """Return the same weights in transformers, in float64."""
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=260, n_positions=BLOCK, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    weights = transpose_conv1d(gpt.state_dict())
    hf.transformer.load_state_dict(weights | {"wte.weight": weights["wte.weight"][:260]})
    return hf.double().eval()


@torch.no_grad()
def log_likelihood(hf, context, ending):
    """Return the log-probability of an ending's ids after a context's, computed without a batch."""
    log_probs = hf(torch.tensor([context + ending[:-1]])).logits[0].log_softmax(-1)
    return sum(log_probs[len(context) - 1 + n, i].item() for n, i in enumerate(ending))


def by_hand(hf, kind, row):
    """Return the log-likelihood of each choice of a row; None if the longest does not fit."""
    question = list(row["question"].encode())
    endings = [[*choice.encode(), END] if kind == "chat" else list(f" {choice}".encode()) for choice in row["choices"]]
    context = [START, USER, *question, END, ASSISTANT] if kind == "chat" else question or [START]
    if len(context) + max(map(len, endings)) - 1 <= BLOCK:  # the last id is never read
        return [log_likelihood(hf, context, ending) for ending in endings]


def random_rows(count):
    """Return questions and choices of many lengths; some questions are too long, some rows have two choices."""
    rng = random.Random(0)

    def text(low, high):
        return "".join(rng.choice("abc dé?") for _ in range(rng.randint(low, high)))
    return [{"question": text(0, rng.choice((20, 60))), "choices": [text(1, 9) + "." for _ in range(3 - (n % 5 == 0))],
             "answer": rng.randrange(2)} for n in range(count)]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_every_log_likelihood_is_that_of_transformers(gpt, double, score, tmp_path, kind):  # noqa: F811
    rows = random_rows(30)
    wanted = {number: sums for number, row in enumerate(rows, 1) if (sums := by_hand(double, kind, row))}
    out, saved, err = score(gpt, write(tmp_path / "rows.jsonl", rows), kind=kind)
    assert [answer["row"] for answer in saved["answers"]] == list(wanted)
    assert f"because they exceed this model's context: {30 - len(wanted)}\n" in err and 20 < len(wanted) < 30
    correct, chance = {"sum": 0, "mean": 0}, 0
    for answer in saved["answers"]:
        row, sums = rows[answer["row"] - 1], wanted[answer["row"]]
        assert [answer[name] for name in row] == list(row.values())
        assert answer["log_likelihoods"] == pytest.approx(sums, rel=1e-4)
        assert answer["tokens"] == [len(choice.encode()) + 1 for choice in row["choices"]]
        means = [x / n for x, n in zip(sums, answer["tokens"])]
        correct["sum"] += sums[row["answer"]] == max(sums)
        correct["mean"] += means[row["answer"]] == max(means)
        chance += 1 / len(sums) / len(wanted)
    assert {line["by"]: line["correct"] for line in saved["summary"]} == correct
    assert f"chance: accuracy {chance:.2%}" in out


@pytest.mark.parametrize("kind, longest", [("text", BLOCK - 1), ("chat", BLOCK - 5)])
def test_rows_with_a_choice_that_is_too_long_are_left_out(gpt, score, tmp_path, kind, longest):  # noqa: F811
    rows = [{"question": "Q", "choices": ["a", n * "b"], "answer": 0} for n in (longest, longest + 1, 1)]
    _, saved, err = score(gpt, write(tmp_path / "rows.jsonl", rows), kind=kind)
    assert [answer["row"] for answer in saved["answers"]] == [1, 3] and "model's context: 1\n" in err
    with pytest.raises(UserError, match="long.jsonl: no rows fit"):
        score(gpt, write(tmp_path / "long.jsonl", rows[1:2]), kind=kind)


# An "x" costs LOG_Z - 4 = 1.75 nats, any other byte LOG_Z = 5.75, the space before a choice too.
FORCED = [{"question": "Q", "choices": ["x", "a"], "answer": 0},  # 7.5 or 11.5; 3.7 or 5.7 per token
          {"question": "", "choices": ["aa", "aaxxx"], "answer": 0},  # 17.2 or 22.5; 5.7 or 3.7 per token
          {"question": "Why?", "choices": ["a", "xxxx"], "answer": 1},  # 11.5 or 12.7; 5.7 or 2.5 per token
          {"question": "Q", "choices": ["aaxxx", "aa"], "answer": 1}]


def test_accuracy_and_standard_error_are_those_computed_by_hand(score, tmp_path):  # noqa: F811
    out, saved, _ = score(unigram(), write(tmp_path / "rows.jsonl", FORCED), kind="text")
    for row, answer in zip(FORCED, saved["answers"]):
        assert answer["log_likelihoods"] == pytest.approx(
            [4 * choice.count("x") - (len(choice) + 1) * LOG_Z for choice in row["choices"]], rel=1e-5)
    assert [(a["answer"], a["sum"], a["mean"]) for a in saved["answers"]] == [(0, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)]
    assert saved["summary"] == [{"by": "sum", "n": 4, "correct": 3, "accuracy": 0.75, "standard_error": math.sqrt(3 / 64)},
                                {"by": "mean", "n": 4, "correct": 2, "accuracy": 0.5, "standard_error": 0.25}]
    assert "3 of 4 correct, accuracy 75.00% ± 21.65%" in out and "2 of 4 correct, accuracy 50.00% ± 25.00%" in out
    own = [{"ind": 24, "ctx": row["question"], "ctx_b": "he", "endings": row["choices"], "label": str(answer["answer"])}
           for row, answer in zip(FORCED, saved["answers"])]  # HellaSwag's fields, with the hub's labels
    _, again, _ = score(unigram(), write(tmp_path / "own.jsonl", own), kind="text")
    assert again["answers"] == saved["answers"]
    _, some, _ = score(unigram(), tmp_path / "own.jsonl", "--score_rows=2", kind="text")
    assert [answer["row"] for answer in some["answers"]] == [1, 3]


def test_gpt2s_weights_in_a_folder_are_scored(gpt2_vocabulary, tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=1,
                                                              initializer_range=0.5))
    hf.save_pretrained(tmp_path / "my_gpt2")
    hf = hf.double().eval()
    row = {"ctx": "A man is sitting on a roof. he", "endings": ["is using wrap.", "starts pulling up a roof."], "label": 1}
    monkeypatch.chdir(tmp_path)
    chat.main([f"--init_from={tmp_path / 'my_gpt2'}", f"--score={write(tmp_path / 'row.jsonl', [row])}", "--device=cpu"])
    saved = json.loads((tmp_path / "out" / "my_gpt2" / "score.json").read_text(encoding="utf-8"))
    assert saved["answers"][0]["log_likelihoods"] == pytest.approx(
        [log_likelihood(hf, *map(gpt2_vocabulary.encode_ordinary, (row["ctx"], " " + ending)))
         for ending in row["endings"]], rel=1e-4)


GOOD, OWN = {"question": "Q", "choices": ["a", "b", "c"], "answer": 0}, {"ctx": "Q", "endings": ["a", "b", "c"], "label": 0}


@pytest.mark.parametrize("row, message", [
    ({**GOOD, "choices": ["a"]}, r"'choices' must be a list of two or more texts.*found \['a'\]"),
    ({**GOOD, "choices": None}, "found None"), ({**OWN, "endings": "abc"}, "'endings' must be a list.*found 'abc'"),
    ({**GOOD, "choices": ["a", " \n", "c"]}, "none of them empty"), ({**GOOD, "choices": ["a", 2, "c"]}, "found"),
    ({**GOOD, "answer": 3}, "'answer' must be a number from 0 to 2, found 3"),
    ({**GOOD, "answer": -1}, "found -1"), ({**GOOD, "answer": 1.0}, "found 1.0"), ({**GOOD, "answer": True}, "found True"),
    ({**GOOD, "answer": "a"}, "found 'a'"),
    ({**OWN, "label": "7"}, "'label' must be a number from 0 to 2.*found '7'"), ({**OWN, "ctx": 5}, "'ctx' must be text"),
    ({"question": "Q", "answer": 0}, r"must have the fields \('ctx', .* found"), ([], "found"), (None, "found None"),
    ({**GOOD, "question": "\ud800"}, "surrogate")])
def test_a_row_of_a_different_layout_is_a_user_error_that_names_it(score, tmp_path, row, message):  # noqa: F811
    path = write(tmp_path / "rows.jsonl", [GOOD, OWN, row])
    with pytest.raises(UserError, match=message) as error:
        score(unigram(), path)
    assert str(error.value).startswith(f"{path}, row 3: ") and "\n" not in str(error.value)


def test_the_command_downloads_the_authors_file_and_verifies_its_checksum(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(multiple_choice, "download", lambda *args: asked.append(args) or args[1])
    multiple_choice.main([])
    assert capsys.readouterr().out == "python chat.py --score=data/hellaswag/hellaswag_val.jsonl\n"
    [(url, _, sha256)] = asked
    monkeypatch.setattr(multiple_choice, "download", lambda *args: "my data/rows.jsonl")
    multiple_choice.main([])
    assert shlex.split(capsys.readouterr().out) == ["python", "chat.py", "--score=my data/rows.jsonl"]
    assert url.startswith("https://raw.githubusercontent.com/rowanz/hellaswag/") and len(sha256) == 64
    multiple_choice.main(["--help"])
    assert len(asked) == 1 and "python -m runtime.multiple_choice" in capsys.readouterr().out
