"""Preparing chats and plain text: what is kept, cut, dropped and held out, and what a failing run leaves."""
import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.tokens import open_dataset

import data.text
import prepare_alpaca
from data.tokenizer import get_tokenizer, train_bpe, write_spec
from tests.conftest import error_of_script, largest_file

REPO = Path(__file__).parent.parent
START, USER, ASSISTANT, END = 256, 257, 258, 259  # of the bytes tokenizer


def row(question, answer, category="x", **more):
    return {"instruction": question, "input": "", "output": answer, "category": category, **more}


def rows_of(count, category="x"):
    return [row(f"{category} question {i}", f"answer {i}", category) for i in range(count)]


def prepare(tmp_path, rows, *flags, tokenizer="bytes"):
    """Run prepare_alpaca.main on these rows; returns the prepared folder."""
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare_alpaca.main([f"--source={tmp_path / 'rows.json'}", f"--out_dir={tmp_path / 'out'}",
                         f"--tokenizer={tokenizer}", *flags])
    return tmp_path / "out"


def prepare_text(tmp_path, content, *flags, tokenizer="bytes"):
    """Run data.text.main on these bytes; returns the prepared folder."""
    (tmp_path / "my.txt").write_bytes(content)
    data.text.main([f"--source={tmp_path / 'my.txt'}", f"--out_dir={tmp_path / 'out'}",
                    f"--tokenizer={tokenizer}", *flags])
    return tmp_path / "out"


def read_ids(folder, split):
    return np.fromfile(folder / f"{split}.bin", np.uint16).tolist()


def read_chats(folder, split, enc=None):
    """A split's conversations, each as the list of its texts."""
    enc = enc or get_tokenizer("bytes")
    text = enc.decode(read_ids(folder, split))
    return [re.findall(r"<\|(?:user|assistant)\|>(.*?)<\|end\|>", part, re.DOTALL)
            for part in text.split("<|endoftext|>")[1:]]


def read_rows(folder):
    """All conversations as lists of ids."""
    ids = read_ids(folder, "train") + read_ids(folder, "val")
    starts = [i for i, token in enumerate(ids) if token == START] + [len(ids)]
    return [ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def read_meta(folder):
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def files(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def report(capsys):
    """The numbers of the printed report, by name."""
    lines = re.findall(r"^ +(\S.*?) {2,}([\d,]+)$", capsys.readouterr().out, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in lines}


def assert_ends_with_one_line(monkeypatch, capsys, script, argv, *parts):
    line = error_of_script(monkeypatch, script, argv)
    assert capsys.readouterr() == ("", "")
    assert line.startswith("error: ") and all(part in line for part in parts), line


def test_the_report_counts_what_is_kept_and_dropped(tmp_path, capsys):
    good = rows_of(10)
    bad = [row("empty", ""), row("blank", " \n"), row("", "no question"), row(" ", "none"),
           row("<noinput>", "none"), good[3], row(" x question 4 ", "answer 4 "),
           row("x question 4", "answer 4", "another category")]
    folder = prepare(tmp_path, good[:5] + bad + good[5:], "--val_fraction=0.2")
    found, meta = report(capsys), read_meta(folder)
    assert found["rows read"] == 18
    assert found["dropped: empty output"] == 2 and found["dropped: empty instruction"] == 3
    assert found["dropped: duplicate"] == 3
    assert found["training rows"] == meta["train_rows"] == 8
    assert found["held-out rows"] == meta["val_rows"] == 2
    length = len("x question 1") + len("answer 1") + 5  # start, user, end, assistant, end
    assert found["tokens"] == 10 * length
    assert found["longest conversation read"] == meta["longest"] == length
    assert found["supervised"] == meta["supervised_tokens"] == 10 * len("answer 1 ")  # and the end
    assert found["ids in the vocabulary"] == meta["vocab_size"] == 260
    chats = read_chats(folder, "train") + read_chats(folder, "val")
    assert sorted(chats) == sorted([r["instruction"], r["output"]] for r in good)
    assert (len(read_ids(folder, "train")), len(read_ids(folder, "val"))) == (8 * length, 2 * length)
    assert meta["sha256"] == hashlib.sha256((tmp_path / "rows.json").read_bytes()).hexdigest()


def test_duplicates_are_kept_on_request(tmp_path, capsys):
    folder = prepare(tmp_path, rows_of(5) + rows_of(5), "--drop_duplicates=False", "--val_fraction=0.2")
    assert len(read_chats(folder, "train") + read_chats(folder, "val")) == 10
    assert not any("dropped" in name for name in report(capsys))


@pytest.mark.parametrize("placeholder", ["<noinput>", "No input", "<No Input>", "noinput", "No input.",
                                         "<noinput>.", '"<noinput>"', "(noinput)"])
def test_a_placeholder_for_no_input_is_left_out(tmp_path, placeholder):
    folder = prepare(tmp_path, [*rows_of(3), row("Write a poem.", "Roses.", input=placeholder)])
    assert ["Write a poem.", "Roses."] in read_chats(folder, "train") + read_chats(folder, "val")


def test_an_input_that_speaks_of_input_is_kept(tmp_path):
    folder = prepare(tmp_path, [*rows_of(3), row("Define.", "Data.", input="input")])
    assert ["Define.\ninput", "Data."] in read_chats(folder, "train") + read_chats(folder, "val")


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


def test_extra_rows_are_for_training_only_and_the_source_is_repeated(tmp_path):
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps([row(f"extra {i}", f"yes {i}") for i in range(30)]), encoding="utf-8")
    alone = read_chats(prepare(tmp_path, rows_of(20), "--val_fraction=0.2"), "val")
    folder = prepare(tmp_path, rows_of(20), "--val_fraction=0.2", f"--extra={extra}", "--repeat=3")
    assert read_chats(folder, "val") == alone and len(alone) == 4
    counts = Counter(question for question, _ in read_chats(folder, "train"))
    assert set(counts.values()) == {1, 3} and len(counts) == 16 + 30
    assert all((count == 1) == question.startswith("extra") for question, count in counts.items())


def test_joined_rows_are_all_there_in_chats_of_every_length_up_to_the_most(tmp_path):
    folder = prepare(tmp_path, rows_of(400), "--join=3")
    train, val = (read_chats(folder, split) for split in ("train", "val"))
    assert {len(chat) // 2 for chat in train} == {1, 2, 3} and {len(chat) for chat in val} == {2}
    questions = [text for chat in train + val for text in chat[::2]]
    assert sorted(questions) == sorted(f"x question {i}" for i in range(400))
    assert read_chats(prepare(tmp_path, rows_of(400), "--join=3"), "train") == train
    assert read_chats(prepare(tmp_path, rows_of(400), "--join=3", "--seed=8"), "train") != train


@pytest.mark.parametrize("flag", ["--repeat=0", "--join=0", "--extra=nowhere.json"])
def test_extra_rows_that_cannot_be_are_refused_by_name(tmp_path, flag):
    with pytest.raises((ValueError, OSError), match=flag[2:].partition("=")[0] + "|nowhere.json"):
        prepare(tmp_path, rows_of(20), flag)


def test_the_corpus_for_people_holds_every_chat(tmp_path):
    folder = prepare(tmp_path, [*rows_of(6), row("Wie heißt\ndu?", "Käse <|end|>")])
    text = (folder / "chat_corpus.txt").read_bytes().decode("utf-8")
    assert "<|user|>Wie heißt\ndu?<|end|>\n<|assistant|>Käse <|end|><|end|>\n\n" in text
    assert all(f"<|user|>x question {i}<|end|>\n<|assistant|>answer {i}<|end|>\n\n" in text for i in range(6))
    assert text.count("<|user|>") == 7


def test_long_answers_are_cut_and_end_all_the_same(tmp_path, capsys):
    rows = [*rows_of(4), row("long", "abcdefghijklmnopqrstuvwxyz", "y"),
            row("a question that fills it all up", "yes", "z"), row("but for the answer's id", "yes", "w")]
    folder = prepare(tmp_path, rows, "--max_tokens=28")
    found = report(capsys)
    assert found["answer cut: longer than 28 tokens"] == 3
    assert found["dropped: nothing of the answer fits"] == 2
    assert found["training rows"] + found["held-out rows"] == 5
    chats = read_chats(folder, "train") + read_chats(folder, "val")
    assert ["long", "abcdefghijklmnopqrs"] in chats  # 28 - 4 - 5 letters
    corpus = (folder / "chat_corpus.txt").read_text(encoding="utf-8")  # what was made, not what was read
    assert "\n<|assistant|>abcdefghijklmnopqrs<|end|>\n" in corpus and corpus.count("<|user|>") == 5
    assert max(len(ids) for ids in read_rows(folder)) == 28


def test_long_rows_are_dropped_on_request(tmp_path, capsys):
    rows = [*rows_of(4), row("long", "abcdefghijklmnopqrstuvwxyz", "y")]
    folder = prepare(tmp_path, rows, "--max_tokens=28", "--too_long=drop")
    found = report(capsys)
    assert found["dropped: longer than 28 tokens"] == 1 and not any("cut" in name for name in found)
    assert sorted(read_chats(folder, "train") + read_chats(folder, "val")) == sorted(
        [r["instruction"], r["output"]] for r in rows_of(4))


@pytest.mark.parametrize("max_tokens", range(8, 30))
def test_a_chat_of_two_turns_is_cut_within_an_answer_or_not_at_all(tmp_path, max_tokens):
    texts = ["four", "answer", "then", "more"]  # with a start, and a role and an end of each: 27 ids
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    others = [row(letter, letter) for letter in "abcd"]
    folder = prepare(tmp_path, [*others, {"messages": turns}], f"--max_tokens={max_tokens}")
    for ids in read_rows(folder):
        roles = [i for i, token in enumerate(ids) if token in (USER, ASSISTANT)]
        assert len(ids) <= max_tokens and ids[roles[-1]] == ASSISTANT and ids[-1] == END
        assert ids.count(END) == len(roles)  # one for each message
        assert ids[roles[-1] + 1] < START  # the last answer is not empty
    if max_tokens >= 27:
        assert texts in read_chats(folder, "train")


def test_a_trained_tokenizer_is_stored_and_learned_from_the_training_rows(tmp_path):
    rows = [row(f"zoo{i} zoo{i}", f"answer{'abcdefghij'[i % 10] * 3} {i}") for i in range(60)]
    folder = prepare(tmp_path, rows, "--vocab_size=280", tokenizer="bpe")
    meta, spec = read_meta(folder), json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert meta["tokenizer"] == "tokenizer.json"
    assert meta["vocab_size"] == 256 + len(spec["merges"]) + 4 == 284
    enc = get_tokenizer(folder / "tokenizer.json")
    train, val = read_chats(folder, "train", enc), read_chats(folder, "val", enc)
    assert sorted(train + val) == sorted([r["instruction"], r["output"]] for r in rows) and len(val) == 3
    assert spec == train_bpe([text for texts in train for text in texts], 280)
    assert open_dataset(folder, 64, 2).dropped == {"train": 0, "val": 0}


def test_a_space_behind_a_word_is_asked_for_and_saves_tokens(tmp_path):
    rows = [row(f"What is the plural of word {i}?", "these are words") for i in range(40)]
    counts = {}
    for flag in ("False", "True"):
        folder = prepare(tmp_path, rows, f"--space_behind={flag}", "--vocab_size=300", tokenizer="bpe")
        counts[flag] = read_meta(folder)["train_tokens"]
        enc = get_tokenizer(folder / "tokenizer.json")
        assert any(chat[1] == "these are words" for chat in read_chats(folder, "train", enc))
    assert counts["True"] < 0.9 * counts["False"]


def test_a_tokenizer_made_elsewhere_comes_along(tmp_path):
    write_spec(tmp_path / "other.json", train_bpe(["answer answer question"], 270))
    folder = prepare(tmp_path, rows_of(6), tokenizer=tmp_path / "other.json")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    folder = prepare_text(tmp_path, b"the answer to the question", tokenizer=tmp_path / "other.json")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert read_meta(folder)["tokenizer"] == "tokenizer.json"


def test_a_relative_source_is_looked_for_here_and_then_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "data/instruction/instruction-data.json"
    assert prepare_alpaca.fetch(name, tmp_path).resolve() == (REPO / name).resolve()
    (tmp_path / "data" / "instruction").mkdir(parents=True)
    (tmp_path / name).write_text("[]", encoding="utf-8")
    assert prepare_alpaca.fetch(name, tmp_path).resolve() == (tmp_path / name).resolve()


@pytest.mark.parametrize("flag, parts", [
    ("--too_long=shorten", ("too_long", "'shorten'", "cut or drop")),
    ("--val_fraction=0", ("val_fraction=0",)), ("--val_fraction=1", ("val_fraction=1",)),
    ("--max_tokens=7", ("max_tokens=7",)), ("--bad_rows=skip", ("bad_rows='skip'", "error or drop")),
    ("--tokenizer=none.json", ("none.json",)), ("--vocab=3", ("'vocab'", "'vocab_size'")),
])
def test_a_setting_out_of_its_range_is_named(tmp_path, flag, parts):
    with pytest.raises(ValueError) as caught:
        prepare(tmp_path, rows_of(6), flag)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [rows_of(1), [row("a", "b", "x"), row("c", "d", "y")], [row("a", "")] * 3])
def test_too_few_rows_to_hold_out_some_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="too few"):
        prepare(tmp_path, rows)


def test_a_failing_run_leaves_the_earlier_files_as_they_were(tmp_path):
    before = files(prepare(tmp_path, rows_of(6)))
    assert set(before) == {"train.bin", "val.bin", "meta.json", "chat_corpus.txt"}
    for rows, flag in (([{"bad": 1}], "--seed=1"), (rows_of(6), "--tokenizer=none.json"),
                       (rows_of(6), "--max_tokens=8")):  # fails before, at the start of and amid the writing
        with pytest.raises(ValueError):
            prepare(tmp_path, rows, flag)
        assert files(tmp_path / "out") == before
    with pytest.raises(ValueError):
        prepare_text(tmp_path, b"text, then \xff and more", "--val_fraction=0.5")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("limit", [200, 1800], ids=["train.bin", "chat_corpus.txt"])
def test_a_full_disk_is_one_line_and_leaves_the_earlier_files_as_they_were(tmp_path, monkeypatch, capsys, limit):
    before = files(prepare(tmp_path, rows_of(6)))
    (tmp_path / "rows.json").write_text(json.dumps(rows_of(34)), encoding="utf-8")
    argv = [f"--source={tmp_path / 'rows.json'}", f"--out_dir={tmp_path / 'out'}", "--tokenizer=bytes"]
    capsys.readouterr()
    with largest_file(limit):
        assert_ends_with_one_line(monkeypatch, capsys, prepare_alpaca, argv, "File too large")
    assert files(tmp_path / "out") == before


def conversation_ids(*texts):
    """The ids of a conversation, written out for the bytes tokenizer."""
    ids = [START]
    for i, text in enumerate(texts):
        ids += [(USER, ASSISTANT)[i % 2], *text.encode(), END]
    return ids


def test_files_of_several_layouts_are_prepared_together(tmp_path, capsys):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo!"}]
    marv = [{"role": "system", "content": "Be Ed."}, {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Ed."}]
    contents = {
        "share, gpt.json": json.dumps([{"id": "1", "conversations": turns + turns}]),
        "openai.jsonl": json.dumps({"messages": marv}) + "\n",
        "dolly.jsonl.gz": json.dumps({"instruction": "a", "context": "b", "response": "c", "category": "qa"}),
        "pairs.json.gz": json.dumps([{"prompt": "d", "completion": " e"}, {"prompt": "d", "completion": "e "}]),
        "questions.jsonl": json.dumps({"question": "f", "answer": "g", "idx": 1}) + "\n\n"}
    for name, text in contents.items():
        content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (tmp_path / name.replace(", ", "_")).write_bytes(content)
    paths = [tmp_path / name.replace(", ", "_") for name in contents]
    flags = [f"--out_dir={tmp_path / 'out'}", "--tokenizer=bytes", "--val_fraction=0.2"]
    prepare_alpaca.main([f"--source={','.join(map(str, paths[:3]))}, {paths[3]},{paths[4]}", *flags])
    found, meta = report(capsys), read_meta(tmp_path / "out")
    assert sorted(read_rows(tmp_path / "out")) == sorted([
        conversation_ids("Hi", "Yo!", "Hi", "Yo!"), conversation_ids("Be Ed.\nWho?", "Ed."),
        conversation_ids("a\nb", "c"), conversation_ids("d", "e"), conversation_ids("f", "g")])
    told = {name: count for name, count in found.items() if re.match("rows|dropped|not|sys", name)}
    assert told == {"rows read": 6, "dropped: duplicate": 1, "not used: 'id'": 1, "not used: 'idx'": 1,
                    "system text before the question": 1}
    assert meta["source"] == ",".join(path.name for path in paths) and meta["categories"] == ["", "qa"]
    assert meta["sha256"] == ",".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def test_a_comma_in_a_files_own_name_does_not_part_it(tmp_path):
    (tmp_path / "a, b.json").write_text(json.dumps(rows_of(9)), encoding="utf-8")
    prepare_alpaca.main([f"--source={tmp_path / 'a, b.json'}", f"--out_dir={tmp_path / 'out'}", "--tokenizer=bytes"])
    assert len(read_rows(tmp_path / "out")) == 9


@pytest.mark.parametrize("name, parts", [
    ("rows.json", ("name each once",)), ("none.json", ("none.json", "no such file")), ("", ("is a folder",)),
    ("cut.jsonl.gz", ("cut.jsonl.gz", "gzip file that is cut short")), ("empty.json", ("empty.json", "holds no row")),
])
def test_a_second_source_that_cannot_be_read_is_named(tmp_path, name, parts):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-3])
    (tmp_path / "empty.json").write_text("[]", encoding="utf-8")
    second = tmp_path / name if name else name
    with pytest.raises((ValueError, OSError)) as caught:
        prepare(tmp_path, rows_of(6), f"--source={tmp_path / 'rows.json'},{second}")
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


def test_bad_rows_are_dropped_from_the_source_and_the_extra_rows_on_request(tmp_path, capsys):
    unanswered = {"messages": [{"role": "user", "content": "Hm?"}]}
    (tmp_path / "extra.json").write_text(json.dumps([unanswered, row("more", "yes", id=1)]), encoding="utf-8")
    flags = [f"--extra={tmp_path / 'extra.json'}", "--bad_rows=drop"]
    folder = prepare(tmp_path, [*rows_of(6), unanswered, row("bad", "x", label=False)], *flags)
    found = report(capsys)
    assert found["dropped: ends with the user"] == 2 and found["dropped: marked as a bad answer"] == 1
    assert found["rows read"] == 10 and found["not used: 'id'"] == 1
    assert ["more", "yes"] in read_chats(folder, "train") and found["training rows"] == 6
    with pytest.raises(ValueError, match=r"extra.json, row 1, .*--bad_rows=drop"):
        prepare(tmp_path, rows_of(6), flags[0])


def test_bad_rows_end_the_program_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([*rows_of(3), {"instruction": "a"}]), encoding="utf-8")
    assert_ends_with_one_line(monkeypatch, capsys, prepare_alpaca,
                              [f"--source={tmp_path / 'rows.json'}", f"--out_dir={tmp_path / 'out'}"],
                              str(tmp_path / "rows.json"), "row 4", "found the fields 'instruction'", "'instruction' and 'output'",
                              "--bad_rows=drop")
    assert not (tmp_path / "out").exists()


def test_a_missing_text_ends_the_program_with_one_line(tmp_path, monkeypatch, capsys):
    assert_ends_with_one_line(monkeypatch, capsys, data.text,
                              [f"--source={tmp_path / 'none.txt'}", f"--out_dir={tmp_path / 'out'}"],
                              str(tmp_path / "none.txt"), "--source")
    assert not (tmp_path / "out").exists()


def test_training_and_validation_together_are_the_text(tmp_path, capsys):
    content = b"\xef\xbb\xbf" + "Zeile eins\r\nZwölf\n\n  你好 👋\tend".encode() * 20  # first what Notepad writes
    folder = prepare_text(tmp_path, content, "--val_fraction=0.25")
    train, val = read_ids(folder, "train"), read_ids(folder, "val")
    text = content[3:].replace(b"\r\n", b"\n")  # a line ends in one byte, on Windows too
    assert bytes(train + val) == text and abs(len(val) - len(text) * 0.25) <= 10
    meta = read_meta(folder)
    assert (meta["kind"], meta["tokenizer"], meta["vocab_size"]) == ("text", "bytes", 260)
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))
    assert meta["sha256"] == hashlib.sha256(content).hexdigest()
    assert f"{len(train):,}" in capsys.readouterr().out


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16])
def test_no_character_is_torn_at_the_split_or_at_a_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(data.text, "BLOCK", block)
    content = "aé€👋\r\nü".encode() * 3  # characters of one to four bytes
    text = content.replace(b"\r", b"")
    for percent in range(10, 100, 5):
        folder = prepare_text(tmp_path, content, f"--val_fraction={percent / 100}")
        train, val = bytes(read_ids(folder, "train")), bytes(read_ids(folder, "val"))
        assert train + val == text and train and val
        assert (train.decode("utf-8") + val.decode("utf-8")).encode("utf-8") == text
        assert abs(len(train) - int(len(text) * (1 - percent / 100))) <= 4


def test_no_word_is_torn_at_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 13)
    text = "some words\nand naïve\nwords once\nmore words\n" * 9
    folder = prepare_text(tmp_path, text.encode(), "--vocab_size=300", "--val_fraction=0.1", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    train, val = read_ids(folder, "train"), read_ids(folder, "val")
    split = len(enc.decode(train))
    assert enc.decode(train) + enc.decode(val) == text and len(train) < split / 2
    assert train == enc.encode_ordinary(text[:split]) and val == enc.encode_ordinary(text[split:])


def test_the_tokenizer_learns_from_the_training_text_only(tmp_path):
    folder = prepare_text(tmp_path, b"aaaa " * 50 + b"zzzz " * 50, "--val_fraction=0.5", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    assert enc.encode_ordinary("zzzz") == list(b"zzzz") and len(enc.encode_ordinary("aaaa")) == 1


@pytest.mark.parametrize("bpe_bytes", [0, -1])
def test_a_beginning_of_no_bytes_is_refused_by_name(tmp_path, bpe_bytes):
    with pytest.raises(ValueError, match=f"bpe_bytes={bpe_bytes}: must be 1 or more"):
        prepare_text(tmp_path, b"some text", f"--bpe_bytes={bpe_bytes}", tokenizer="bpe")


@pytest.mark.parametrize("bpe_bytes", range(1, 9))
def test_the_tokenizer_may_learn_from_a_beginning_that_ends_inside_a_character(tmp_path, bpe_bytes):
    content = "é👋".encode() * 30
    folder = prepare_text(tmp_path, content, f"--bpe_bytes={bpe_bytes}", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    assert enc.decode(read_ids(folder, "train") + read_ids(folder, "val")).encode() == content


@pytest.mark.parametrize("content, parts", [
    (b"latin caf\xe9 text, long enough", ("UTF-8", "byte 9")),
    (b"plain text, then a torn \xe2\x82", ("UTF-8",)), ("wide".encode("utf-16"), ("UTF-8", "byte 0")),
    (b"", ("0 bytes",)), (b"a", ("1 bytes",)),
])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_text_that_is_not_utf8_or_too_short_is_refused(tmp_path, content, parts, tokenizer):
    with pytest.raises(ValueError) as caught:
        prepare_text(tmp_path, content, tokenizer=tokenizer)
    assert all(part in str(caught.value) for part in (str(tmp_path / "my.txt"), *parts)), caught.value
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")


def test_no_text_named_is_refused_with_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--source"):
        data.text.main([f"--out_dir={tmp_path}"])
