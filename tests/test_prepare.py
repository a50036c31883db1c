"""Preparing chats: what is kept, cut, dropped and held out, and which files a failing run leaves."""
import gzip
import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest

import data.text
import prepare_alpaca
from config import UserError
from data.datasets import open_dataset
from data.tokenizer import get_tokenizer, train_bpe
from tests.conftest import error_of_script

START, USER, ASSISTANT, END = 256, 257, 258, 259  # of the bytes tokenizer


def row(question, answer, category="x", **more):
    return {"instruction": question, "input": "", "output": answer, "category": category, **more}


def rows_of(count, category="x"):
    return [row(f"{category} question {i}", f"answer {i}", category) for i in range(count)]


def prepare(tmp_path, rows, *flags, tokenizer="bytes"):
    """Run prepare_alpaca.main on these rows; return the prepared folder."""
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_alpaca.main([f"--source={tmp_path / 'rows.json'}", f"--out_dir={tmp_path / 'out'}",
                         f"--tokenizer={tokenizer}", *flags])
    return tmp_path / "out"


def read_ids(folder, split):
    return np.fromfile(folder / f"{split}.bin", np.uint16).tolist()


def read_chats(folder, split, enc=None):
    """Return a split's conversations, each as the list of its texts."""
    text = (enc or get_tokenizer("bytes")).decode(read_ids(folder, split))
    return [re.findall(r"<\|(?:user|assistant)\|>(.*?)<\|end\|>", part, re.DOTALL)
            for part in text.split("<|endoftext|>")[1:]]


def all_chats(folder):
    return read_chats(folder, "train") + read_chats(folder, "val")


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def report(capsys):
    """Return the numbers of the printed report, by name."""
    lines = re.findall(r"^ +(\S.*?) {2,}([\d,]+)$", capsys.readouterr().out, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in lines}


def test_the_report_counts_what_is_kept_and_dropped(tmp_path, capsys):
    good = rows_of(10)
    bad = [row("empty", ""), row("blank", " \n"), row("", "no question"), row(" ", "none"),
           row("<noinput>", "none"), good[3], row(" x question 4 ", "answer 4 "), row("x question 4", "answer 4", "other")]
    folder = prepare(tmp_path, good[:5] + bad + good[5:], "--val_fraction=0.2")
    meta, length = read_meta(folder), len("x question 1") + len("answer 1") + 5  # start, user, end, assistant, end
    assert report(capsys) == {
        "rows read": 18, "dropped: empty output": 2, "dropped: empty instruction": 3, "dropped: duplicate": 3,
        "training rows": 8, "held-out rows": 2, "tokens": 10 * length, "supervised tokens": 10 * len("answer 1 "),
        "longest conversation read": length, "ids in the vocabulary": 260}
    assert [meta[key] for key in ("train_rows", "val_rows", "supervised_tokens", "longest")] == [8, 2, 90, length]
    assert sorted(all_chats(folder)) == sorted([r["instruction"], r["output"]] for r in good)
    assert (len(read_ids(folder, "train")), len(read_ids(folder, "val"))) == (8 * length, 2 * length)
    assert meta["sha256"] == hashlib.sha256((tmp_path / "rows.json").read_bytes()).hexdigest()


def test_duplicates_are_kept_on_request(tmp_path, capsys):
    folder = prepare(tmp_path, rows_of(5) + rows_of(5), "--drop_duplicates=False", "--val_fraction=0.2")
    assert len(all_chats(folder)) == 10


@pytest.mark.parametrize("placeholder", ["<noinput>", "No input", "noinput", "No input.", '"<noinput>"', "(noinput)"])
def test_a_placeholder_for_no_input_is_left_out(tmp_path, placeholder):
    folder = prepare(tmp_path, [*rows_of(3), row("Write a poem.", "Roses.", input=placeholder), row("Define.", "D", input="input")])
    assert ["Write a poem.", "Roses."] in all_chats(folder) and ["Define.\ninput", "D"] in all_chats(folder)


def test_the_corpus_contains_every_chat(tmp_path):
    folder = prepare(tmp_path, [*rows_of(6), row("Wie heißt\ndu?", "Käse <|end|>")])
    text = (folder / "chat_corpus.txt").read_bytes().decode("utf-8")
    assert "<|user|>Wie heißt\ndu?<|end|>\n<|assistant|>Käse <|end|><|end|>\n\n" in text and text.count("<|user|>") == 7


def test_every_category_has_its_share_held_out_and_one_seed_gives_the_same_rows(tmp_path):
    rows = rows_of(20, "x") + rows_of(10, "y") + rows_of(2, "few") + rows_of(1, "single")
    category = {r["instruction"]: r["category"] for r in rows}
    held_out = []
    for seed in (1, 1, 2):
        folder = prepare(tmp_path, rows[::-1] if seed == 2 else rows, "--val_fraction=0.2", f"--seed={seed}")
        meta = read_meta(folder)
        for split, wanted in (("train", [16, 8, 1, 1]), ("val", [4, 2, 1, 0])):
            found = [category[question] for question, _ in read_chats(folder, split)]
            assert [found.count(name) for name in ("x", "y", "few", "single")] == wanted
            assert found == [meta["categories"][i] for i in meta[f"{split}_categories"]]
        held_out.append(sorted(read_chats(folder, "val")))
    assert held_out[0] == held_out[1] != held_out[2]


def test_rows_that_share_their_first_question_are_in_one_split(tmp_path):
    rows = [row(f"question {i // 3}", f"answer {i}") for i in range(300)]
    for seed in range(5):
        folder = prepare(tmp_path, rows, "--val_fraction=0.1", f"--seed={seed}")
        train, val = ({question for question, _ in read_chats(folder, split)} for split in ("train", "val"))
        assert not train & val and len(train | val) == 100 and len(val) == 10


@pytest.mark.parametrize("rows, wanted", [
    (rows_of(2), 1), ([row(f"q{i}", "a", f"category {i}") for i in range(100)], 10),  # categories of one row
    ([row("the same", f"answer {i}") for i in range(100)], 10), ([row(f"q{i % 2}", f"{i}") for i in range(100)], 10),
    ([row(f"q{i}", "a", f"{i // 2}") for i in range(100)], 10), ([row("hi", f"{i}") for i in range(50)] + rows_of(50), 10)])
def test_the_fraction_is_held_out_for_any_questions_and_categories(tmp_path, rows, wanted):
    folder = prepare(tmp_path, rows, "--val_fraction=0.1")
    assert read_meta(folder)["val_rows"] == wanted and read_meta(folder)["train_rows"] == len(rows) - wanted


def test_extra_rows_are_for_training_only_and_the_source_is_repeated(tmp_path):
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps([row(f"extra {i}", f"yes {i}") for i in range(30)]), encoding="utf-8")
    alone = read_chats(prepare(tmp_path, rows_of(20), "--val_fraction=0.2"), "val")
    folder = prepare(tmp_path, rows_of(20), "--val_fraction=0.2", f"--extra={extra}", "--repeat=3")
    assert read_chats(folder, "val") == alone and len(alone) == 4
    counts = Counter(question for question, _ in read_chats(folder, "train"))
    assert set(counts.values()) == {1, 3} and len(counts) == 16 + 30
    assert all((count == 1) == question.startswith("extra") for question, count in counts.items())


def test_joined_rows_are_all_kept_in_chats_of_one_to_three_turns(tmp_path):
    folder = prepare(tmp_path, rows_of(400), "--join=3")
    train, val = (read_chats(folder, split) for split in ("train", "val"))
    assert {len(chat) // 2 for chat in train} == {1, 2, 3} and {len(chat) for chat in val} == {2}
    assert sorted(text for chat in train + val for text in chat[::2]) == sorted(f"x question {i}" for i in range(400))
    assert read_chats(prepare(tmp_path, rows_of(400), "--join=3"), "train") == train
    assert read_chats(prepare(tmp_path, rows_of(400), "--join=3", "--seed=8"), "train") != train


def test_long_answers_are_cut_and_still_end(tmp_path, capsys):
    rows = [*rows_of(9), row("long", "abcdefghijklmnopqrstuvwxyz"), row("a question that fills it all up", "yes"),
            row("but for the answer's id", "yes")]
    folder = prepare(tmp_path, rows, "--max_tokens=28", "--val_fraction=0.4")
    found = report(capsys)
    assert found["answer cut: longer than 28 tokens"] == 3 and found["dropped: no part of the answer fits"] == 2
    assert ["long", "abcdefghijklmnopqrs"] in all_chats(folder) and len(all_chats(folder)) == 10  # 28 - 4 - 5 letters
    corpus = (folder / "chat_corpus.txt").read_text(encoding="utf-8")  # the same as in training
    assert "\n<|assistant|>abcdefghijklmnopqrs<|end|>\n" in corpus and corpus.count("<|user|>") == 10
    folder = prepare(tmp_path, rows[:10], "--max_tokens=28", "--val_fraction=0.4", "--too_long=drop")
    assert report(capsys)["dropped: longer than 28 tokens"] == 1
    assert sorted(all_chats(folder)) == sorted([r["instruction"], r["output"]] for r in rows_of(9))


@pytest.mark.parametrize("max_tokens", range(8, 30))
def test_a_chat_of_two_turns_is_cut_within_an_answer_or_not_at_all(tmp_path, max_tokens):
    texts = ["four", "answer", "then", "more"]  # plus one start token, and a role and an end token for each: 27 ids
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    folder = prepare(tmp_path, [*(row(c, c) for c in "abcd"), {"messages": turns}], f"--max_tokens={max_tokens}", "--val_fraction=0.4")
    dataset = open_dataset(folder, 64, 2)
    for ids in dataset.conversations("train") + dataset.conversations("val"):
        roles = [i for i, token in enumerate(ids) if token in (USER, ASSISTANT)]
        assert len(ids) <= max_tokens and ids[roles[-1]] == ASSISTANT and ids[-1] == END
        assert ids.count(END) == len(roles) and ids[roles[-1] + 1] < START  # the last answer is not empty
    assert (texts in all_chats(folder)) == (max_tokens >= 27)


def test_a_trained_tokenizer_is_learned_from_the_training_rows_and_stored(tmp_path):
    rows = [row(f"zoo{i} zoo{i}", f"these are words{'abcdefghij'[i % 10] * 3} {i}") for i in range(60)]
    folder = prepare(tmp_path, rows, "--vocab_size=280", tokenizer="bpe")
    meta, spec = read_meta(folder), json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == "tokenizer.json" and meta["vocab_size"] == 256 + len(spec["merges"]) + 4 == 284
    enc = get_tokenizer(folder / "tokenizer.json")
    train, val = read_chats(folder, "train", enc), read_chats(folder, "val", enc)
    assert sorted(train + val) == sorted([r["instruction"], r["output"]] for r in rows) and len(val) == 3
    assert spec == train_bpe([text for texts in train for text in texts], 280)
    trailing = prepare(tmp_path, rows, "--vocab_size=280", "--trailing_space=True", tokenizer="bpe")
    assert read_meta(trailing)["train_tokens"] < 0.95 * meta["train_tokens"]
    (tmp_path / "other.json").write_text(json.dumps(spec), encoding="utf-8")
    copied = prepare(tmp_path, rows, tokenizer=tmp_path / "other.json")
    assert json.loads((copied / "tokenizer.json").read_bytes()) == spec


def test_files_of_several_layouts_are_prepared_together(tmp_path, capsys):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo!"}]
    contents = {
        "share.json": json.dumps([{"id": "1", "conversations": turns + turns}]).encode(), "questions.csv": b"question,answer\nf,g\n",
        "dolly.jsonl.gz": gzip.compress(json.dumps({"instruction": "a", "context": "b", "response": "c", "category": "qa"}).encode()),
        "pairs.json": json.dumps([{"prompt": "d", "completion": " e"}, {"prompt": "d", "completion": "e "}]).encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths, flags = [tmp_path / name for name in contents], [f"--out_dir={tmp_path / 'out'}", "--tokenizer=bytes", "--val_fraction=0.2"]
    prepare_alpaca.main([f"--source={paths[0]},{paths[1]}, {paths[2]}", f"--extra={paths[3]}", *flags])
    assert sorted(all_chats(tmp_path / "out")) == [["Hi", "Yo!", "Hi", "Yo!"], ["a\nb", "c"], ["d", "e"], ["d", "e"], ["f", "g"]]
    found, meta = report(capsys), read_meta(tmp_path / "out")
    assert found["rows read"] == 5 and found["not used: 'id'"] == 1 and meta["categories"] == ["", "qa"]
    assert meta["source"] == "share.json,questions.csv,dolly.jsonl.gz"
    assert meta["sha256"] == ",".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths[:3])


@pytest.mark.parametrize("name, part", [
    ("rows.json", "list each file once, or rename one"), ("none.json", "none.json"), ("empty.json", "empty.json: contains no rows")])
def test_a_second_source_that_cannot_be_read_is_named(tmp_path, name, part):
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    with pytest.raises((UserError, OSError), match=part):
        prepare(tmp_path, rows_of(6), f"--source={tmp_path / 'rows.json'},{tmp_path / name}")


def test_bad_rows_are_dropped_from_the_source_and_the_extra_rows_on_request(tmp_path, capsys, monkeypatch):
    unanswered = {"messages": [{"role": "user", "content": "Hm?"}]}
    (tmp_path / "extra.json").write_text(json.dumps([unanswered, row("more", "yes")]), encoding="utf-8")
    folder = prepare(tmp_path, [*rows_of(6), unanswered, row("bad", "x", images=["a.png"])], f"--extra={tmp_path / 'extra.json'}", "--bad_rows=drop")
    found = report(capsys)
    assert found["dropped: no answer to a question"] == 2 and found["dropped: has 'images'"] == 1
    assert ["more", "yes"] in read_chats(folder, "train") and (found["rows read"], found["training rows"]) == (10, 6)
    line = error_of_script(monkeypatch, prepare_alpaca, [f"--source={tmp_path / 'extra.json'}", f"--out_dir={tmp_path / 'new'}"])
    assert re.match(r"error: .*extra.json, row 1: .*--bad_rows=drop", line) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("rows, flag, part", [
    (rows_of(6), "--too_long=shorten", "too_long=shorten"), (rows_of(6), "--val_fraction=-0.1", "val_fraction=-0.1"),
    (rows_of(6), "--val_fraction=1.1", "val_fraction=1.1"), (rows_of(6), "--max_tokens=7", "max_tokens=7"),
    (rows_of(6), "--bad_rows=skip", "bad_rows=skip"), (rows_of(6), "--repeat=0", "repeat=0"), (rows_of(6), "--join=0", "join=0"),
    (rows_of(6), "--extra=nowhere.json", "nowhere.json"), (rows_of(6), "--tokenizer=none.json", "none.json"),
    (rows_of(6), "--vocab=3", "'vocab'.*'vocab_size'"), (rows_of(1), "--seed=1", "validation split is empty.*'rows read': 1"),
    ([row("a", "")] * 3, "--seed=1", "validation split is empty.*'rows read': 3, 'dropped: empty output': 3"), ([{"bad": 1}], "--seed=1", "row 1"),
    (rows_of(6), "--max_tokens=8", "validation split is empty.*'rows read': 6, .*'dropped: no part of the answer fits': 5.*max_tokens above 8"),
    ([{"bad": 1}] * 2, "--bad_rows=drop", "rows.json: contains no rows that can become a chat: .*'dropped: unknown layout': 2")])
def test_a_failing_run_gives_a_one_line_error_and_leaves_the_earlier_files_as_they_were(tmp_path, rows, flag, part):
    before = files(prepare(tmp_path, rows_of(6)))
    assert set(before) == {"train.bin", "val.bin", "meta.json", "chat_corpus.txt"}
    with pytest.raises((UserError, OSError), match=part) as caught:
        prepare(tmp_path, rows, flag)
    assert "\n" not in str(caught.value) and files(tmp_path / "out") == before


def test_a_vocabulary_that_16_bits_cannot_hold_is_refused(tmp_path):
    (tmp_path / "my.txt").write_text("some text " * 9, encoding="utf-8")
    for main, source in ((prepare_alpaca.main, prepare(tmp_path, rows_of(6)).parent / "rows.json"), (data.text.main, tmp_path / "my.txt")):
        flags = [f"--source={source}", f"--out_dir={tmp_path / 'new'}", "--tokenizer=bpe"]
        main([*flags, "--vocab_size=65532"])
        with pytest.raises(UserError, match="vocab_size=65533: .*16-bit"):
            main([*flags, "--vocab_size=65533"])
