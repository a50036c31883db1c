"""Preparing plain text: encodings, line ends, the split, blocks, tokenizers, mistakes."""
import hashlib

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
    for percent in range(10, 100, 5):
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


@pytest.mark.parametrize("bpe_bytes", range(1, 7))
def test_bpe_bytes_may_end_inside_a_character(tmp_path, bpe_bytes):
    content = "é👋".encode() * 30
    folder = prepare(tmp_path, content, f"--bpe_bytes={bpe_bytes}", tokenizer="bpe")
    enc = get_tokenizer(folder / "tokenizer.json")
    assert enc.decode(read_ids(folder, "train") + read_ids(folder, "val")).encode() == content


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("content, message", [
    (b"latin caf\xe9 text, long enough", "my.txt: not UTF-8 text .byte 9.; save"), (b"text, then a torn \xe2\x82", "my.txt: not UTF-8"),
    ("wide".encode("utf-16"), "my.txt: not UTF-8 text .byte 0."), (b"", "my.txt: 0 bytes cannot be split"), (b"a", "my.txt: 1 bytes")])
def test_a_text_that_is_not_utf8_or_too_short_is_refused(tmp_path, content, message, tokenizer):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, content, tokenizer=tokenizer)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_mistakes_give_a_one_line_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"some text " * 1000)
    flags = [f"--source={tmp_path / 'a.txt'}", f"--out_dir={tmp_path / 'out'}"]
    for more, message in ([f"--source={tmp_path / 'none.txt'}"], f"error: {tmp_path / 'none.txt'}: No such file"), (
            ["--source="], "error: no text given; use --source=FILE"), (["--bpe_bytes=0"], "error: bpe_bytes=0: must be at least 1"), (
            ["--val_fraction=1.5"], "error: val_fraction=1.5: must be at most 1"), (["--val_fraction=0"], f"error: {tmp_path / 'a.txt'}: "):
        assert error_of_script(monkeypatch, data.text, [*flags, *more]).startswith(message)
    with limit_file_size(5000):
        assert error_of_script(monkeypatch, data.text, flags) == f"error: {tmp_path / 'out'}: File too large"
    assert list((tmp_path / "out").iterdir()) == []
