"""Tokenizers: training against a slow reference, round trips, role tokens, GPT-2, errors, the lesson."""
import json
import random
import re

import pytest
import requests
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import UserError
from data import tokenizer
from data.tokenizer import (
    END_OF_TEXT,
    ROLE_TOKENS,
    SPLIT_PATTERN,
    TRAILING_SPACE_PATTERN,
    apply_merges,
    get_tokenizer,
    learn_merges,
    merge,
    read_spec,
    show_spaces,
    token_pieces,
    train_bpe,
)

PROPERTY = settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
SPECIAL = (END_OF_TEXT, *ROLE_TOKENS)
PARAGRAPH = """The quick brown fox jumped over the lazy dog, and the dog, being lazy, did nothing about
it. "Why not?" asked the fox; it was the 3rd time in 2024 that nobody had answered.  Zwölf Boxkämpfer jagen
Viktor quer über den großen Sylter Deich. Привет, мир! 你好. The end of the end is the end, they said, and
then they said it again."""
HARD = ("", "naïve 👋🏽 café", "a\r\n\r\n\tb  c   ", "日本", "x_1__y--z.", "\x00\ufeff\u200b", "It's")
TEXT = st.text() | st.lists(st.sampled_from([*PARAGRAPH.split(" "), *SPECIAL, *HARD])).map(" ".join)
A, B = ord("a"), ord("b")


@pytest.fixture(scope="module")
def bpe():
    return get_tokenizer(train_bpe([PARAGRAPH] * 2, 300))


@PROPERTY
@given(st.text(["a", "b", "é", " ", "1"], max_size=60), st.integers(0, 30))
@example("aaaa aaaaa aaaaaaa aaaaaaaaa", 30)
@example("abababab babababa bababab", 30)
@example("".join(random.Random(1).choices("ACGT", k=3000)), 44)
@example(PARAGRAPH, 150)
def test_the_naive_functions_equal_the_fast_ones(text, n_merges):
    for pattern in (SPLIT_PATTERN, TRAILING_SPACE_PATTERN):
        merges, spec = learn_merges(text, n_merges, pattern), train_bpe([text], 256 + n_merges, pattern)
        assert [list(pair) for pair in merges] == spec["merges"]
        assert apply_merges(text, merges, pattern) == get_tokenizer(spec).encode_ordinary(text)


def test_the_naive_encoder_equals_tiktoken_on_unseen_text(bpe):
    merges = [tuple(pair) for pair in train_bpe([PARAGRAPH] * 2, 300)["merges"]]
    for text in (*HARD, PARAGRAPH[::-1]):
        assert apply_merges(text, merges) == bpe.encode_ordinary(text)


def test_merges_by_hand():
    assert learn_merges("aab aab", 9) == [(A, A), (256, B)]  # " aab" occurs once: no third merge
    assert apply_merges("aabb", [(A, A), (256, B)]) == [257, B]
    assert apply_merges("aaaab", [(A, A), (256, B)]) == [256, 257]
    assert [merge(ids, (1, 1), 9) for ids in ([1, 1, 1, 2], [1, 1, 1, 1], [])] == [[9, 1, 2], [9, 9], []]
    assert train_bpe(["aab aab"], 300)["merges"] == [[A, A], [256, B]]
    assert re.findall(TRAILING_SPACE_PATTERN, "Sort a,  b: 12.") == ["Sort ", "a", ", ", " ", "b", ": ", "1", "2", "."]
    assert get_tokenizer(train_bpe(["aab aab"], 300)).encode_ordinary("aab aab b") == [257, 32, 257, 32, B]


@pytest.mark.parametrize("texts, vocab_size, merges", [
    (["aab aab"], 257, [[97, 97]]), (["abc"], 300, []), (["a", "b"] * 5, 300, []), (["12 12 12 12"], 300, [])])
def test_training_stops_at_vocab_size_and_never_pairs_across_texts_or_digits(texts, vocab_size, merges):
    assert train_bpe(texts, vocab_size)["merges"] == merges


@pytest.mark.parametrize("vocab_size", [255, 65_533])
def test_a_vocab_size_out_of_range_is_refused(vocab_size):
    assert train_bpe(["abab"], 65_532)["merges"] == [[A, B]]
    with pytest.raises(UserError, match=f"vocab_size={vocab_size}: must be from 256.* 65532: .*16-bit"):
        train_bpe(["abab"], vocab_size)


@PROPERTY
@given(TEXT)
def test_any_text_survives_encoding(bpe, text):
    assert "".join(re.findall(TRAILING_SPACE_PATTERN, text)) == text
    for enc in (bpe, get_tokenizer(train_bpe([PARAGRAPH], 280, TRAILING_SPACE_PATTERN))):
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text and all(0 <= i < 300 for i in ids)
    assert get_tokenizer("bytes").encode_ordinary(text) == list(text.encode("utf-8"))


def test_role_tokens_are_the_ids_after_the_ordinary_ones_and_typed_ones_never_become_them(bpe, gpt2_vocabulary):
    for enc, first in ((get_tokenizer("bytes"), 256), (bpe, 300), (gpt2_vocabulary, 50256)):
        assert [enc.encode_single_token(token) for token in SPECIAL] == list(range(first, first + 4))
        assert enc.n_vocab == first + 4
        for token in SPECIAL:
            for text in (token, f"a{token}b", token * 3, f" {token}\n{token} "):
                ids = enc.encode_ordinary(text)
                assert max(ids) < first and enc.decode(ids) == text


@settings(PROPERTY, max_examples=30)
@given(st.text())
@example(PARAGRAPH)
def test_gpt2s_ordinary_ids_are_tiktokens_own(gpt2_vocabulary, text):
    assert gpt2_vocabulary.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2_vocabulary.encode_ordinary("Hello world") == [15496, 995]


def test_a_spec_survives_its_file_and_gives_the_same_tokenizer(tmp_path, bpe):
    spec, path = train_bpe([PARAGRAPH] * 2, 300), tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    assert read_spec(path) == read_spec(str(path)) == spec == read_spec(spec)
    assert read_spec("bytes") == "bytes" and read_spec("gpt2") == "gpt2"
    assert get_tokenizer(path).encode_ordinary(PARAGRAPH) == bpe.encode_ordinary(PARAGRAPH)
    assert [get_tokenizer(s).n_vocab for s in (spec, "bytes", "gpt2")] == [304, 260, 50260]


OLD_PATTERNS = [r" ?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", r"[^\W\d_]+|\d|(?:[^\s\w]|_)+|\s+"]
EXERCISE_1 = SPLIT_PATTERN.replace(r"\d|", r"\d{1,3}|")  # as GPT-4 splits numbers


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, TRAILING_SPACE_PATTERN, *OLD_PATTERNS, EXERCISE_1, r"[\s\S]", r"\w+|\W"])
def test_a_pattern_that_splits_every_text_is_accepted(tmp_path, pattern):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"pattern": pattern, "merges": [[97, 98], [256, 99]]}), encoding="utf-8")
    enc = get_tokenizer(path)
    assert enc.n_vocab == get_tokenizer(read_spec(path)).n_vocab == 262 and enc.decode(enc.encode_ordinary("abc  é\n")) == "abc  é\n"


BAD_PATTERNS = ["x*", "", "a", "(", 7, None]
BAD_MERGES = [3, [[1]], [[1, "x"]], [[97, 256]], [[97, 98.5]], {"97": 98}]


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", "{}", *(json.dumps({"pattern": pattern, "merges": []}) for pattern in BAD_PATTERNS),
    *(json.dumps({"pattern": SPLIT_PATTERN, "merges": merges}) for merges in BAD_MERGES)])
def test_a_broken_tokenizer_file_gives_a_one_line_error_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*; use gpt2, bytes or the path") as caught:
        get_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_or_missing_file_gives_a_one_line_error_with_the_choices():
    for name in ("gtp2", "none.json"):
        with pytest.raises(UserError, match=f"^{name}: not a tokenizer: .*gpt2, bytes"):
            get_tokenizer(name)


@pytest.mark.parametrize("error", [requests.ConnectionError("no route"), OSError("full"), ValueError("hash")])
def test_without_gpt2s_vocabulary_the_error_names_the_variable_to_set(monkeypatch, error):
    def fail(url, sha256):
        raise error
    monkeypatch.setattr("data.tokenizer.read_file_cached", fail)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/a/cache/folder")
    with pytest.raises(UserError) as caught:
        get_tokenizer("gpt2")
    assert re.fullmatch(f".*{type(error).__name__}.*TIKTOKEN_CACHE_DIR.*/a/cache/folder.*", str(caught.value))


def test_pieces_show_parts_of_a_character_as_bytes():
    assert token_pieces(get_tokenizer("bytes"), list("aé€".encode())) == ["a", "<c3>", "<a9>", "<e2>", "<82>", "<ac>"]
    assert show_spaces("a b\n\tc") == "a·b↵→c"


def test_the_lesson_splits_the_text_in_six_ways_and_merges_its_longest_word(gpt2_vocabulary, capsys):
    text = "Hello, big world! I understand 2024."
    tokenizer.main([text])
    lesson = capsys.readouterr().out
    lines = re.findall(r"^(\d)\. [^:]+: (\d+) pieces\. .*\n  (.*)$", lesson, re.MULTILINE)
    for number, count, line in lines:
        pieces = line.replace("·", " ").split("|")
        assert "".join(pieces) == (text if number in "3456" else text.replace(" ", "")) and len(pieces) == int(count)
    assert [number for number, _, _ in lines] == list("123456")
    assert [int(count) for _, count, _ in lines[:4]] == [6, 9, len(text), len(text)]
    merged = re.findall(r"^ +merge +\d+: (.*)", lesson, re.MULTILINE)
    assert len(merged) > 2 and all(line.replace("|", "") == "understand" for line in merged)
    assert [line.count("|") for line in merged] == sorted({line.count("|") for line in merged}, reverse=True)
    tokenizer.main([])
    assert capsys.readouterr().out.startswith("Text to token ids and back")
