"""Preparing plain text: encodings, line endings, the split, blocks, tokenizers, mistakes."""
import gzip
import hashlib
import json

import numpy as np
import pytest

import data.text
from config import UserError
from data.datasets import read_meta
from data.tokenizer import get_tokenizer
from tests.conftest import error_of_script, limit_file_size


def prepare(tmp_path, content, *flags, tokenizer="bytes"):
    """Prepare these bytes; return the folder."""
    (tmp_path / "my.txt").write_bytes(content)
    data.text.main([f"--source={tmp_path / 'my.txt'}", f"--out_dir={tmp_path / 'out'}", f"--tokenizer={tokenizer}", *flags])
    return tmp_path / "out"


def prepare_source(source, *flags):
    """Prepare a file or folder with the bytes tokenizer; return its training and validation ids, and the folder."""
    folder = source.parent / "out"
    data.text.main([f"--source={source}", f"--out_dir={folder}", *flags])
    return read_ids(folder, "train"), read_ids(folder, "val"), folder


def read_ids(folder, split):
    return np.fromfile(folder / f"{split}.bin", np.uint16).tolist()


def test_training_and_validation_together_are_the_text_without_bom_and_carriage_returns(tmp_path, capsys):
    content = b"\xef\xbb\xbf" + "Zeile eins\r\nZwölf\n\n  你好 👋\tend".encode() * 20
    folder = prepare(tmp_path, content, "--val_fraction=0.25")
    train, val = read_ids(folder, "train"), read_ids(folder, "val")
    text = content[3:].replace(b"\r\n", b"\n")
    assert bytes(train + val) == text and abs(len(val) - len(text) * 0.25) <= 10
    meta = read_meta(folder)
    assert (meta["kind"], meta["tokenizer"], meta["vocab_size"], meta["source"]) == ("text", "bytes", 260, "my.txt")
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))
    assert meta["sha256"] == hashlib.sha256(content).hexdigest()
    assert f"{len(train):,} training tokens" in capsys.readouterr().out


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16])
def test_characters_stay_whole_at_the_split_and_between_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(data.text, "BLOCK", block)
    content = "aé€👋\r\nü".encode() * 3  # characters of one to four bytes
    text = content.replace(b"\r", b"")
    for percent in range(10, 95, 5):
        folder = prepare(tmp_path, content, f"--val_fraction={percent / 100}")
        train, val = bytes(read_ids(folder, "train")), bytes(read_ids(folder, "val"))
        assert train.decode("utf-8") + val.decode("utf-8") == text.decode("utf-8") and train and val
        assert abs(len(train) - int(len(text) * (1 - percent / 100))) <= 4


def test_words_stay_whole_between_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(data.text, "BLOCK", 13)
    text = "some words\nand naïve\nwords once\nmore words\n" * 9
    folder = prepare(tmp_path, text.encode(), "--vocab_size=300", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    train, val = read_ids(folder, "train"), read_ids(folder, "val")
    split = len(enc.decode(train))
    assert enc.decode(train) + enc.decode(val) == text and len(train) < split / 2
    assert train == enc.encode_ordinary(text[:split]) and val == enc.encode_ordinary(text[split:])


def test_bpe_is_trained_on_the_training_text_and_a_different_text_can_use_its_tokenizer(tmp_path):
    folder = prepare(tmp_path, b"aaaa " * 50 + b"zzzz " * 50, "--val_fraction=0.5", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    assert enc.encode_ordinary("zzzz") == list(b"zzzz") and len(enc.encode_ordinary("aaaa")) == 1
    data.text.main([f"--source={tmp_path / 'my.txt'}", f"--out_dir={tmp_path / 'b'}", f"--tokenizer={folder / 'tokenizer.json'}"])
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert read_ids(tmp_path / "b", "train")[:50] == read_ids(folder, "train")[:50]


def test_bpe_is_trained_on_the_first_characters_and_never_on_the_separator(tmp_path):
    content = ("é👋é👋<|endoftext|>" * 30 + "zz" * 30).encode()
    folder = prepare(tmp_path, content, "--bpe_chars=300", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    ids = read_ids(folder, "train") + read_ids(folder, "val")
    assert enc.decode(ids).encode() == content and ids.count(enc.eot_token) == 30
    assert not {"zz", "en", "<|"} & {enc.decode([i]) for i in range(256, enc.eot_token)} and enc.eot_token > 256


# ---- documents ----

TEXTS = ["one\ntwo", "drei 👋\n", "vier"]
IDS = [*b"one\ntwo", 256, *"drei 👋\n".encode(), 256, *b"vier"]
ROWS = "\n".join([json.dumps({"text": TEXTS[0], "url": "x"}), "", json.dumps({"text": TEXTS[1].replace("\n", "\r\n")}),
                  json.dumps({"text": TEXTS[2]}), ""]).encode()


@pytest.mark.parametrize("name, content", [
    ("a.txt", "<|endoftext|>".join(TEXTS).encode()), ("a.md", "<|endoftext|>".join(TEXTS).replace("\n", "\r\n").encode()),
    ("a.txt.gz", gzip.compress("<|endoftext|>".join(TEXTS).encode())), ("a.jsonl", ROWS), ("a.json", b"\xef\xbb\xbf" + ROWS),
    ("a.jsonl.gz", gzip.compress(ROWS)), ("a.jsonl", b'{"text": "one\\ntwo<|endoftext|>drei \\ud83d\\udc4b\\n"}\n{"text": "vier"}'),
    ("folder", {"1.txt": TEXTS[0].encode(), "2/b.txt.gz": gzip.compress(TEXTS[1].encode()), "3.jsonl": b'{"text": "vier"}',
                "0.json": b"{}", "no.md": b"no"})], ids=range(8))
def test_documents_are_separated_by_the_token_and_the_split_never_cuts_it(tmp_path, monkeypatch, name, content):
    source = tmp_path / name
    for path, part in ({source / file: part for file, part in content.items()} if name == "folder" else {source: content}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    monkeypatch.setattr(data.text, "BLOCK", 7)
    for percent in range(8, 96, 8):
        train, val, folder = prepare_source(source, f"--val_fraction={percent / 100}")
        assert train + val == IDS and train and val and read_meta(folder)["source"] == name
    assert len(read_meta(folder)["sha256"]) == 64


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}', "a.jsonl, line 2: must be a row of JSON lines"), ("a.jsonl", b'["a"]', "line 1"),
    ("a.json", b'[\n{"text": "a"}]', "a.json, line 1: .*name it .txt"), ("a.jsonl", b'{"text": null}', "line 1"),
    ("a.jsonl", b'{"text": "\\ud83d"}', "line 1"), ("a.jsonl", b"7", "line 1"), ("a.txt.gz", b"text", "a.txt.gz: cannot be decompressed"),
    ("a.txt.gz", gzip.compress(bytes(range(128)) * 9)[:-20], "a.txt.gz: cannot be decompressed"), ("a.jsonl.gz", b"\x1f\x8b\x08\0" + b"x" * 20, "decompressed"),
    ("none", None, "none: 0 characters in 0 files cannot be split"), ("a.jsonl", b"", "a.jsonl: 0 characters in 1 files")], ids=range(11))
def test_a_source_that_cannot_be_read_gives_a_one_line_error(tmp_path, name, content, message):
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_source(tmp_path / name)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("content, message", [
    (b"latin caf\xe9 text, long enough", "my.txt: not UTF-8 text: b'latin caf.xe9'; save"), (b"text, then a torn \xe2\x82", "my.txt: not UTF-8"),
    ("wide".encode("utf-16"), "my.txt: not UTF-8 text: "), (b"", "my.txt: 0 characters in 1 files cannot be split"), (b"a", "my.txt: 1 characters")])
def test_a_text_that_is_not_utf8_or_too_short_is_refused(tmp_path, content, message, tokenizer):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, content, tokenizer=tokenizer)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_mistakes_give_a_one_line_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"some text " * 1000)
    flags = [f"--source={tmp_path / 'a.txt'}", f"--out_dir={tmp_path / 'out'}"]
    for more, message in ([f"--source={tmp_path / 'none.txt'}"], f"error: {tmp_path / 'none.txt'}: No such file"), (
            ["--source="], "error: no text given; use --source=FILE"), (["--bpe_bytes=0"], "error: bpe_chars=0: must be at least 1"), (
            ["--val_fraction=1.5"], "error: val_fraction=1.5: must be at most 1"), (["--val_fraction=0"], f"error: {tmp_path / 'a.txt'}: "):
        assert error_of_script(monkeypatch, data.text, [*flags, *more]).startswith(message)
    with limit_file_size(5000):
        assert error_of_script(monkeypatch, data.text, flags) == "error: [Errno 27] File too large"
    assert list((tmp_path / "out").iterdir()) == []
