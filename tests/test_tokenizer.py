"""Tokenizers: training against a slow reference, round trips, role tokens, GPT-2, errors, the lesson."""
import json
import re
from collections import Counter

import pytest
import requests
import tiktoken
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.tokenizer import (
    END_OF_TEXT,
    ROLE_TOKENS,
    SPACE_BEHIND_PATTERN,
    SPLIT_PATTERN,
    apply_merges,
    count_ids,
    get_tokenizer,
    learn_merges,
    merge,
    read_spec,
    show,
    token_pieces,
    train_bpe,
    write_spec,
)

SLOW = [HealthCheck.too_slow]  # a busy computer is no fault of the tests
PROPERTY = settings(max_examples=100, deadline=None, database=None, suppress_health_check=SLOW)
SPECIAL = (END_OF_TEXT, *ROLE_TOKENS)
PARAGRAPH = """The quick brown fox jumped over the lazy dog, and the dog, being lazy, did nothing about
it. "Why not?" asked the fox; it was the 3rd time in 2024 that nobody had answered.  Zwölf Boxkämpfer jagen
Viktor quer über den großen Sylter Deich. Привет, мир! 你好. The end of the end is the end, they said, and
then they said it again."""
HARD = ("", "naïve 👋🏽 café", "a\r\n\r\n\tb  c   ", "日本", "x_1__y--z.", "\x00\ufeff\u200b", "It's")


def slow_bpe(texts, vocab_size):
    """Byte-pair encoding as the book says it: count every pair anew for each merge."""
    words = [list(word.encode("utf-8")) for text in texts for word in re.findall(SPLIT_PATTERN, text)]
    merges = []
    while 256 + len(merges) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [256 + len(merges)]
                i += 1
        merges.append(list(best))
    return merges


@pytest.fixture(scope="module")
def bpe():
    return get_tokenizer(train_bpe([PARAGRAPH] * 2, 300))


@pytest.fixture(scope="module")
def gpt2(gpt2_vocabulary):
    return gpt2_vocabulary


@PROPERTY
@given(st.lists(st.sampled_from(["ab", "ab c", "aé1_ \n."]).flatmap(lambda few: st.text(few, max_size=40)),
                max_size=4), st.integers(256, 290))
@example(["aaaa aaaaa aaaaaaa aaaaaaaaa"], 290)
@example(["abababab babababa bababab"], 290)
def test_training_equals_a_slow_reference(texts, vocab_size):
    assert train_bpe(texts, vocab_size)["merges"] == slow_bpe(texts, vocab_size)


def test_training_equals_a_slow_reference_on_a_paragraph():
    merges = train_bpe([PARAGRAPH, PARAGRAPH[:200]], 400)["merges"]
    assert merges == slow_bpe([PARAGRAPH, PARAGRAPH[:200]], 400) and len(merges) > 50


@PROPERTY
@given(st.text(["a", "b", "é", " ", "1"], max_size=60), st.integers(0, 30))
@example("aaaa aaaaa aaaaaaa aaaaaaaaa", 30)
def test_the_plain_way_learns_and_encodes_as_the_fast_ones_do(text, n_merges):
    assert train_bpe([text], 256 + n_merges)["merges"] == slow_bpe([text], 256 + n_merges)
    for pattern in (SPLIT_PATTERN, SPACE_BEHIND_PATTERN):
        merges, spec = learn_merges(text, n_merges, pattern), train_bpe([text], 256 + n_merges, pattern)
        assert [list(pair) for pair in merges] == spec["merges"]
        assert apply_merges(text, merges, pattern) == get_tokenizer(spec).encode_ordinary(text)


@PROPERTY
@given(st.text() | st.lists(st.sampled_from([*PARAGRAPH.split(" "), *SPECIAL, *HARD])).map(" ".join))
def test_a_space_may_stand_behind_a_word_and_any_text_comes_back(text):
    assert "".join(re.findall(SPACE_BEHIND_PATTERN, text)) == text
    enc = get_tokenizer(train_bpe([PARAGRAPH], 280, SPACE_BEHIND_PATTERN))
    assert enc.decode(enc.encode_ordinary(text)) == text


def test_a_space_behind_by_hand():
    assert re.findall(SPACE_BEHIND_PATTERN, "Sort a,  b: 12 x.") == ["Sort ", "a", ", ", " ", "b", ": ", "1", "2",
                                                                     " ", "x", "."]


def test_the_plain_way_encodes_what_it_has_not_learned_from_as_tiktoken_does(bpe):
    merges = [tuple(pair) for pair in train_bpe([PARAGRAPH] * 2, 300)["merges"]]
    for text in (*HARD, PARAGRAPH[::-1]):
        assert apply_merges(text, merges) == bpe.encode_ordinary(text)


def test_the_plain_way_by_hand():
    a, b = ord("a"), ord("b")
    assert learn_merges("aab aab", 9) == [(a, a), (256, b)]
    assert apply_merges("aabb", [(a, a), (256, b)]) == [257, b]
    assert apply_merges("aaaab", [(a, a), (256, b)]) == [256, 257]


def test_the_example_of_the_docstring():
    a, b = ord("a"), ord("b")
    assert train_bpe(["aab aab"], 300)["merges"] == [[a, a], [256, b]]  # " aab" occurs once: no third merge


def test_training_stops_at_vocab_size_and_where_no_pair_occurs_twice():
    assert train_bpe(["aab aab"], 257)["merges"] == [[97, 97]]
    assert train_bpe(["abc"], 300)["merges"] == []


def test_words_are_not_joined_across_texts():
    assert train_bpe(["a", "b"] * 5, 300)["merges"] == []


def test_digits_stay_single():
    assert train_bpe(["12 12 12 12"], 300)["merges"] == []


def test_fewer_than_256_ids_are_refused():
    with pytest.raises(ValueError, match="vocab_size=255"):
        train_bpe(["text"], 255)


def test_merge_goes_from_the_left():
    assert merge([1, 1, 1, 2], (1, 1), 9) == [9, 1, 2]
    assert merge([1, 2, 1, 2, 1], (1, 2), 9) == [9, 9, 1]
    assert merge([], (1, 2), 9) == []


def test_every_id_of_a_trained_tokenizer_has_bytes_of_its_own(bpe):
    pieces = [bpe.decode_single_token_bytes(i) for i in range(300)]
    assert len(set(pieces)) == 300 and pieces[:256] == [bytes([i]) for i in range(256)]
    spec = train_bpe([PARAGRAPH] * 2, 300)
    for i, (left, right) in enumerate(spec["merges"]):
        assert pieces[256 + i] == pieces[left] + pieces[right]


def test_a_trained_tokenizer_uses_its_merges():
    enc = get_tokenizer(train_bpe(["aab aab"], 300))
    assert enc.encode_ordinary("aab aab b") == [257, 32, 257, 32, 98]


@PROPERTY
@given(st.text())
def test_bytes_are_the_utf8_bytes_and_come_back(text):
    enc = get_tokenizer("bytes")
    assert enc.encode_ordinary(text) == list(text.encode("utf-8"))
    assert enc.decode(enc.encode_ordinary(text)) == text


@PROPERTY
@given(st.text() | st.lists(st.sampled_from([*PARAGRAPH.split(" "), *SPECIAL, *HARD])).map(" ".join))
def test_any_text_comes_back_from_a_trained_tokenizer(bpe, text):
    ids = bpe.encode_ordinary(text)
    assert bpe.decode(ids) == text and all(0 <= i < 300 for i in ids)


def test_role_tokens_are_single_ids_after_the_ordinary_ones(bpe):
    for enc, first in ((get_tokenizer("bytes"), 256), (bpe, 300)):
        assert [enc.encode_single_token(token) for token in SPECIAL] == list(range(first, first + 4))
        assert enc.n_vocab == first + 4


def test_the_role_tokens_of_gpt2_are_50257_to_50259(gpt2):
    assert [gpt2.encode_single_token(token) for token in SPECIAL] == [50256, 50257, 50258, 50259]
    assert gpt2.n_vocab == 50260


def test_typed_role_tokens_never_make_their_ids(bpe):
    for enc in (get_tokenizer("bytes"), bpe):
        for token in SPECIAL:
            for text in (token, f"a{token}b", token * 3, f" {token}\n{token} "):
                ids = enc.encode_ordinary(text)
                assert max(ids) < enc.n_vocab - 4 and enc.decode(ids) == text


def test_typed_role_tokens_never_make_their_ids_in_gpt2(gpt2):
    for token in SPECIAL:
        ids = gpt2.encode_ordinary(f"a{token}b")
        assert max(ids) < 50256 and gpt2.decode(ids) == f"a{token}b"


@settings(PROPERTY, max_examples=50)
@given(st.text())
@example(PARAGRAPH)
def test_gpt2s_ordinary_ids_are_tiktokens_own(gpt2, text):
    assert gpt2.encode_ordinary(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_known_ids_of_gpt2(gpt2):
    assert gpt2.encode_ordinary("Hello world") == [15496, 995]


def test_a_spec_comes_back_from_its_file_and_makes_the_same_tokenizer(tmp_path, bpe):
    spec = train_bpe([PARAGRAPH] * 2, 300)
    write_spec(tmp_path / "tokenizer.json", spec)
    assert read_spec(tmp_path / "tokenizer.json") == read_spec(str(tmp_path / "tokenizer.json")) == spec
    assert read_spec(spec) == spec and read_spec("bytes") == "bytes" and read_spec("gpt2") == "gpt2"
    again = get_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode_ordinary(PARAGRAPH) == bpe.encode_ordinary(PARAGRAPH)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"3", b"\xff\xfe", b"{}", b'{"pattern": "a"}', b'{"merges": []}',
    b'{"pattern": "a", "merges": 3}', b'{"pattern": "a", "merges": [[1]]}',
    b'{"pattern": "a", "merges": [[1, "x"]]}', b'{"pattern": "a", "merges": [[97, 256]]}',
    b'{"pattern": "a", "merges": [[-1, 97]]}', b'{"pattern": "(", "merges": []}',
])
def test_a_broken_tokenizer_file_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        get_tokenizer(path)


def test_a_missing_tokenizer_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none.json"))):
        get_tokenizer(tmp_path / "none.json")


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match="'gtp2'.*gpt2, bytes"):
        get_tokenizer("gtp2")


@pytest.mark.parametrize("error", [requests.ConnectionError("no route"), OSError("full"), ValueError("hash")])
def test_without_gpt2s_vocabulary_the_error_says_what_to_set(monkeypatch, error):
    def fail(name):
        raise error
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/a/cache/folder")
    with pytest.raises(ValueError) as caught:
        get_tokenizer("gpt2")
    message = str(caught.value)
    for part in ("TIKTOKEN_CACHE_DIR", "/a/cache/folder", "vocab.bpe", "encoder.json", type(error).__name__):
        assert part in message
    assert "\n" not in message


def test_pieces_show_parts_of_a_character_as_bytes():
    enc = get_tokenizer("bytes")
    assert token_pieces(enc, list("aé€".encode())) == ["a", "<c3>", "<a9>", "<e2>", "<82>", "<ac>"]


TEXT = "Hello, big world! It's 2024."
TITLES = ["1. White space", "2. White space and punctuation", "3. Characters", "4. Bytes",
          "5. Byte pairs, learned here", "6. GPT-2's byte pairs"]


def lesson(text, colour=False):
    """{title: line of pieces} of the six steps, and the whole lesson."""
    lines = list(show(text, colour))
    steps = {line.strip().partition(":")[0]: lines[i + 1] for i, line in enumerate(lines[:-1])
             if re.match(r"\n\d\. ", line)}
    return steps, "\n".join(lines)


def test_the_lesson_has_six_steps_whose_pieces_join_to_the_text(gpt2):
    steps, _ = lesson(TEXT)
    assert list(steps) == TITLES
    for title, line in steps.items():
        pieces = line.strip().replace("·", " ").split("|")
        wanted = TEXT if title[0] in "3456" else TEXT.replace(" ", "")
        assert "".join(pieces) == wanted and len(pieces) > 1, title
    counts = [len(line.split("|")) for line in steps.values()]
    assert counts[:4] == [5, 10, len(TEXT), len(TEXT)]


def test_the_lesson_shows_colours_on_request(gpt2):
    steps, _ = lesson(TEXT, colour=True)
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line).strip().replace("·", " ") for line in steps.values()]
    assert all("\x1b[" in line for line in steps.values()) and plain[2:] == [TEXT] * 4


def test_the_lesson_goes_on_without_gpt2(monkeypatch):
    def fail(name):
        raise requests.ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    _, whole = lesson("Hello")
    assert all(title in whole for title in TITLES) and "not shown" in whole and "TIKTOKEN_CACHE_DIR" in whole


def test_the_lesson_merges_the_longest_word_step_by_step_to_one_or_more_pieces():
    _, whole = lesson("I understand")
    shown = re.findall(r"^ +(?:merge +\d+|Merge by merge.*): (.*)", whole, re.MULTILINE)
    assert len(shown) > 2 and all(line.replace("|", "").strip("·") == "understand" for line in shown)
    assert [line.count("|") for line in shown] == sorted({line.count("|") for line in shown}, reverse=True)


FIRST_VERSIONS = r" ?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, SPACE_BEHIND_PATTERN, FIRST_VERSIONS, r"[\s\S]", r"\w+|\W",
                                     r"(?:[\s\S]+)+☃|[\s\S]"])  # Python's re would need years for this one
def test_a_pattern_that_cuts_every_text_is_taken(tmp_path, pattern):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"pattern": pattern, "merges": [[97, 98], [256, 99]]}), encoding="utf-8")
    enc = get_tokenizer(path)
    assert enc.n_vocab == count_ids(read_spec(path)) == 262
    assert enc.decode(enc.encode_ordinary("abc  é\n")) == "abc  é\n"


@pytest.mark.parametrize("pattern, merges, told", [
    ("x*", [], "pattern"), ("", [], "pattern"), (r"\b|[\s\S]", [], "pattern"), ("a", [], "pattern"),
    (r"(?=(a+))b|[\s\S]", [], "pattern"), (r"(\w)\1|[\s\S]", [], "pattern"), ("(" * 1000, [], "pattern"),
    (r"(?=q)|[\s\S]", [], "pattern"), (r"(?<=q)|[\s\S]", [], "pattern"),  # no q is in the trial's text
    ("a{4294967296}|.", [], "pattern"), (r"(?:[\s\S]{1000}){1000}{1000}|[\s\S]", [], "pattern"), (7, [], "no text"),
    (r"$|[\s\S]", [], "pattern"), (SPLIT_PATTERN, [[97, 98], [97, 98]], "same token"),
    (SPLIT_PATTERN, [[97, 98], [256, 99], [98, 99], [97, 258]], "same token"), (SPLIT_PATTERN, [[97, 256]], "97, 256"),
    (SPLIT_PATTERN, [[97, -1]], "-1"), (SPLIT_PATTERN, [[97, 98.0]], "98.0"), (SPLIT_PATTERN, {"97": 98}, "merges"),
    (SPLIT_PATTERN, [[97, 97], *[[i, i] for i in range(256, 300)]], "bytes")])
def test_a_hostile_tokenizer_is_refused_before_tiktoken_panics(tmp_path, capfd, pattern, merges, told):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"pattern": pattern, "merges": merges}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(told)}.*prepare") as caught:
        read_spec(path)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_text_that_is_all_one_letter_makes_a_tokenizer_that_opens():
    assert count_ids(train_bpe(["=" * 600_000], 1024)) <= 1024 + 4
