"""runtime/scoring.py, through chat.py --score: exact match, F1 and loss against numbers computed by hand."""
import json
import math
import re

import pytest
import torch

import chat
import data.text
import prepare_alpaca
from config import UserError
from model import GPT, GPTConfig
from runtime.checkpoint import model_state, save_checkpoint
from runtime.scoring import score_row, token_f1
from tests.test_chat import BYTES, framed, greedy_by_hand, noise

LOG_Z = math.log(259 + math.exp(4))


def unigram(block_size=64):
    """Return a model for which "x" is e ** 4 times as likely as any other id, everywhere: an "x" costs LOG_Z - 4 nats,
    any other id LOG_Z."""
    model = GPT(GPTConfig(260, block_size, 1, 1, 4)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.ln_f.bias[0] = 1  # all that the head sees, so the logits are the embedding's first column
        model.wte.weight[ord("x"), 0] = 4
    return model


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def score(tmp_path, capsys):
    """Score a folder or file with a model; return (standard output, the JSON file, the notes)."""
    def call(model, source, *flags, kind="chat", path=tmp_path / "score.json"):
        save_checkpoint(tmp_path / "best.pt", model_state(model, "bytes", kind, step=1, max_iters=1, turns=1))
        chat.main([f"--checkpoint={tmp_path / 'best.pt'}", f"--score={source}", "--device=cpu", *flags])
        out, err = capsys.readouterr()
        return out, json.loads(path.read_text(encoding="utf-8")), err
    return call


@pytest.fixture
def echo(monkeypatch):
    """Make every model answer with the question."""
    monkeypatch.setattr(GPT, "generate", lambda self, ids, *_, **__: iter(ids[2:-2]))


def test_only_the_result_of_an_answer_that_shows_its_work_counts(score, echo, tmp_path):
    rows = [{"question": "3+2=6, 5", "answer": "3+2=5, 5", "category": category} for category in ("sum", "sum (work)")]
    _, saved, _ = score(unigram(), write(tmp_path / "rows.jsonl", rows))
    assert [answer["exact"] for answer in saved["answers"]] == [False, True]


@pytest.mark.parametrize("answer, expected, f1", [
    ("a b c", "a b c", 1), ("c a b", "a b c", 1), (" a\n b ", "a b", 1), ("", "", 1), ("a", "", 0), ("", "a", 0),
    ("a", "b", 0), ("Cat", "cat", 0), ("a b", "b c", 1 / 2), ("the cat sat", "the cat", 4 / 5),  # 2 of 3, 2 of 2
    ("a a b", "a b b", 2 / 3), ("a a a", "a", 1 / 2)])  # words count as often as they occur
def test_f1_of_cases_computed_by_hand(answer, expected, f1):
    assert token_f1(answer, expected) == token_f1(expected, answer) == pytest.approx(f1)


@torch.no_grad()
def test_the_answer_and_the_loss_of_a_row_are_those_of_float64_without_a_cache():
    double, model = noise(128), noise(128).float()
    texts = ["Who are you?", "Wrong!", "How small?", "Somewhat big."]
    said = list(zip(("user", "assistant", "user", "assistant"), texts))
    prompt = framed([(role, text.encode()) for role, text in said[:3]])
    result = score_row(model, BYTES, [{"role": role, "content": text} for role, text in said])
    ids = [*prompt, *b"Somewhat big.", 259]
    log_probs = double(torch.tensor([ids]))[0].log_softmax(-1)
    losses = [-log_probs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
    assert result["loss"] == pytest.approx(sum(losses) / 14, rel=1e-5) and result["tokens"] == 14
    assert (result["question"], result["expected"]) == (texts[2], texts[3])
    assert result["answer"] == BYTES.decode(greedy_by_hand(double, prompt, 128))


def test_the_table_of_an_example_computed_by_hand(score, echo, tmp_path):
    rows = [{"instruction": "a x", "output": "a x", "category": "sum/easy"},
            {"instruction": "a b c", "output": "a b", "category": "sum/easy"},  # F1 4/5
            {"question": "c", "answer": "xxd", "category": "sum/hard"},
            {"messages": [{"role": "user", "content": "Hi x"}, {"role": "assistant", "content": "Hi\n x"}]}]
    out, saved, _ = score(unigram(), write(tmp_path / "rows.jsonl", rows))
    # Of 4, 4, 4 and 6 expected ids, <|end|> included, 1, 0, 2 and 1 are an "x", which is 4 nats cheaper.
    wanted = [("all", 4, 2, 0.7, LOG_Z - 4 * 4 / 18), ("sum", 3, 1, 0.6, LOG_Z - 4 * 3 / 12),
              ("sum/easy", 2, 1, 0.9, LOG_Z - 4 * 1 / 8), ("sum/hard", 1, 0, 0.0, LOG_Z - 4 * 2 / 4)]
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["sum", "sum/easy", "sum/hard", "all"]
    for name, n, exact, f1, loss in wanted:
        assert f"{name} rows {exact} of {n} {exact / n:.0%} {f1:.2f} {loss:.3f}" in re.sub(" +", " ", out)
        [line] = [line for line in saved["summary"] if line["category"] == name]
        assert line == {"category": name, "rows": "rows", "n": n, "exact": exact, "f1": pytest.approx(f1),
                        "loss": pytest.approx(loss)}
    assert [(answer["answer"], answer["exact"]) for answer in saved["answers"]] == [
        ("a x", True), ("a b c", False), ("c", False), ("Hi x", True)]
    assert (saved["model"], saved["scored"]) == (str(tmp_path / "best.pt"), str(tmp_path / "rows.jsonl"))
    path = tmp_path / "new" / "answers.json"
    _, again, err = score(unigram(), tmp_path / "rows.jsonl", f"--score_file={path}", path=path)
    assert again == saved and str(path) in err


def test_as_many_training_rows_as_held_out_ones_are_scored_evenly_spaced(score, echo, tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"instruction": f"Row {i}", "output": "x"} for i in range(20)])
    prepare_alpaca.main([f"--source={source}", f"--out_dir={tmp_path / 'data'}", "--tokenizer=bytes",
                         "--val_fraction=0.2"])
    corpus = re.findall(r"Row \d+", (tmp_path / "data" / "chat_corpus.txt").read_text(encoding="utf-8"))
    trained, held_out = corpus[:16], corpus[16:]
    for n, wanted in ((0, (held_out, trained[::4])), (2, (held_out[::2], trained[::8])), (8, (held_out, trained[::2]))):
        _, saved, _ = score(unigram(), tmp_path / "data", f"--score_rows={n}")
        for group, questions in zip(("held out", "trained on"), wanted):
            assert [a["question"] for a in saved["answers"] if a["rows"] == group] == questions
        assert [(line["rows"], line["n"]) for line in saved["summary"]] == [
            ("held out", len(wanted[0])), ("trained on", len(wanted[1]))]


def test_rows_longer_than_the_context_are_left_out_with_a_note(score, echo, tmp_path):
    rows = [{"instruction": "Say", "output": length * "h"} for length in (65 - 8, 1, 65 - 7)]  # 64 read, 1 predicted
    _, saved, err = score(unigram(), write(tmp_path / "rows.jsonl", rows))
    assert [answer["tokens"] for answer in saved["answers"]] == [58, 2] and "model's context: 1\n" in err
    with pytest.raises(UserError, match="no rows fit into this model's context"):
        score(unigram(), write(tmp_path / "long.jsonl", rows[2:]))


def test_what_cannot_be_scored_is_a_user_error(score, tmp_path):
    (tmp_path / "words.txt").write_text("words " * 100, encoding="utf-8")
    data.text.main([f"--source={tmp_path / 'words.txt'}", f"--out_dir={tmp_path / 'text'}"])
    good = write(tmp_path / "good.jsonl", [{"instruction": "a", "output": "b"}])
    bad = write(tmp_path / "bad.jsonl", [{"instruction": "a", "output": "b"}, {"prompt": "a", "reply": "b"}])
    for source, kind, message in ((tmp_path / "text", "chat", "contains plain text"), (bad, "chat", "bad.jsonl, row 2"),
                                  (tmp_path / "no.json", "chat", "no.json"), (good, "text", "base model")):
        with pytest.raises((UserError, OSError), match=message):
            score(unigram(), source, kind=kind)
