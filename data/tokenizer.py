"""Text to token ids and back: GPT-2's tokenizer, plain bytes, or a byte-pair encoding trained here.

    python -m data.tokenizer "Hello,   world! naïve 👋"    # see how text becomes tokens

Every tokenizer is a tiktoken.Encoding, so encode_ordinary, decode and n_vocab work on all of them,
and every one knows `<|endoftext|>` and the three role tokens of a chat as single ids after its last
ordinary id.
"""
import heapq
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

from config import UserError

END_OF_TEXT = "<|endoftext|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")
GPT2_VOCAB_SIZE = 50257  # ids in GPT-2's own files, which know no role tokens

# How text is cut before bytes are paired (no pair crosses a cut): words, single digits (so that
# numbers are spelled, and sums can be learned), runs of punctuation, white space. GPT-2 glues a
# space to the word behind it; here it stands alone, so that a word is the same id wherever it
# stands and a small model learns it once. It is written for Python's re, which trains, tiktoken's
# engine, which encodes, and that of exported tokenizers; they disagree on whether the joiners in
# emoji (U+200C, U+200D) are letters: here not.
SPLIT_PATTERN = "[^\\W\\d_\u200c\u200d]+|\\d|(?:[^\\s\\w]|[_\u200c\u200d])+|\\s+"
# The same with a space glued to the word or the punctuation before it: a fifth fewer tokens.
SPACE_BEHIND_PATTERN = "[^\\W\\d_\u200c\u200d]+ ?|\\d|(?:[^\\s\\w]|[_\u200c\u200d])+ ?|\\s+"


# ---- byte-pair encoding, as it is taught ----

def learn_merges(text, n_merges, pattern=SPLIT_PATTERN):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2), the plain way: the merges as
    a list of pairs of ids, where merge i makes the new id 256 + i.

    Start from the 256 bytes; again and again the most frequent pair of neighbours becomes a new id.
    "aab aab" first merges (a, a), which occurs twice, then (aa, b): [(97, 97), (256, 98)].
    """
    words = [list(word.encode("utf-8")) for word in re.findall(pattern, text)]
    merges = []
    for i in range(n_merges):
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))  # its pairs of neighbours
        if max(counts.values(), default=0) < 2:  # no pair occurs twice
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))  # among equals the smallest pair
        merges.append(best)
        words = [merge(word, best, 256 + i) for word in words]
    return merges


def apply_merges(text, merges, pattern=SPLIT_PATTERN):
    """The ids of a text: each word's bytes, merged in the order in which the merges were learned.
    With the two merges above "aabb" is first [97, 97, 98, 98], then [256, 98, 98], then [257,
    98]."""
    ids = []
    for word in re.findall(pattern, text):
        word = list(word.encode("utf-8"))
        for i, pair in enumerate(merges):
            word = merge(word, pair, 256 + i)
        ids += word
    return ids


def merge(ids, pair, new_id):
    """Replace each `pair` in a list of ids, from the left: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1,
    2]."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


# ---- the same, fast: tiktoken encodes, and train_bpe learns ----

BYTES = [bytes([i]) for i in range(256)]  # the first tokens of every vocabulary of ours


def build(name, pattern, token_bytes):
    """A tiktoken.Encoding from the bytes of each ordinary token, in the order of their ids."""
    specials = {token: len(token_bytes) + i for i, token in enumerate((END_OF_TEXT, *ROLE_TOKENS))}
    ranks = {token: i for i, token in enumerate(token_bytes)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def get_tokenizer(spec):
    """The tokenizer named by `spec`: "gpt2", "bytes", the path of a tokenizer.json, or what
    read_spec returns.

    Raises ValueError where there is none of that name, the file is not one, or GPT-2's vocabulary
    can neither be found nor downloaded.
    """
    spec = read_spec(spec)
    if spec == "bytes":
        return build("bytes", r"[\s\S]", BYTES)
    if spec == "gpt2":
        base = load_gpt2()
        ranks = base._mergeable_ranks
        return build("gpt2", base._pat_str, sorted(ranks, key=ranks.get))
    token_bytes = list(BYTES)
    for a, b in spec["merges"]:
        token_bytes.append(token_bytes[a] + token_bytes[b])
    return build("bpe", spec["pattern"], token_bytes)


def read_spec(spec):
    """What a checkpoint keeps of a tokenizer: "gpt2", "bytes", or the dict {"pattern", "merges"} of
    a tokenizer.json at the path `spec`. Raises ValueError."""
    if isinstance(spec, dict) or spec in ("gpt2", "bytes"):
        return spec
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"tokenizer {str(spec)!r}: no such file; use gpt2, bytes or the path of a "
                         "tokenizer.json")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        count_ids(spec)
    except (ValueError, RecursionError) as error:
        why = f" ({error})" if type(error) is ValueError else ""  # of JSON and UTF-8: no reason
        raise UserError(f"{path}: not a tokenizer.json of this project{why}; "
                         "prepare the data again to make a new one") from error
    return {"pattern": spec["pattern"], "merges": spec["merges"]}


def count_ids(spec):
    """How many ids the tokenizer of a spec has, which is checked on the way. Raises ValueError."""
    if spec in ("gpt2", "bytes"):
        return (GPT2_VOCAB_SIZE if spec == "gpt2" else 256 + 1) + len(ROLE_TOKENS)
    if not isinstance(spec, dict) or not isinstance(spec.get("merges"), list):
        raise ValueError("no pattern and merges in it")
    check_pattern(spec.get("pattern"))
    tokens = list(BYTES)
    for pair in spec["merges"]:
        if not isinstance(pair, list) or len(pair) != 2 or \
                not all(type(i) is int and 0 <= i < len(tokens) for i in pair):
            raise ValueError(f"{str(pair)[:40]} is no merge of two ids that exist already")
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        if len(tokens[-1]) > LONGEST_TOKEN:
            raise ValueError(f"a token of more than {LONGEST_TOKEN:,} bytes")
    if len(set(tokens)) < len(tokens):
        raise ValueError("two merges make the same token")
    return len(tokens) + 1 + len(ROLE_TOKENS)


LONGEST_TOKEN = 100_000  # bytes; merges that double each time would soon fill the memory
# Letters, digits, punctuation, white space and characters made of several: a pattern must find all.
ALL_KINDS = "It's 30°, naïve_x.\r\n\n\t\u3000क्षि你好 \u200c\u200d👩\u200d🚀\x00\u00ad  "


# What can match nothing where no text of ours shows it, at which tiktoken panics, or take for ever:
# anchors, references, groups that look around. The first version's patterns had (?!\S), which is
# safe. What is left runs in linear time in tiktoken, but not in Python's re.
UNSAFE = re.compile(r"\\[1-9bBAZzGKk]|[\^$]|\(\?(?!:|!\\S\))|[*+?}]\+")


def check_pattern(pattern):
    """Raise ValueError for a pattern that would lose text, make tiktoken panic or never end."""
    if not isinstance(pattern, str):
        raise ValueError("its pattern is no text")
    # Without classes and escaped characters, in which ^ and $ mean something else.
    plain = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[^1-9bBAZzGKkS]", "x", pattern)
    try:
        safe = not UNSAFE.search(plain) and not re.match(pattern.replace("(?!\\S)", ""), "")
        enc = build("pattern", pattern, BYTES) if safe else None
    except (ValueError, re.error, OverflowError, RecursionError):
        enc = None
    if not enc or enc.decode(enc.encode_ordinary(ALL_KINDS)) != ALL_KINDS:
        raise ValueError(f"its pattern {pattern[:60]!r} does not cut every text into pieces")


def write_spec(path, spec):
    """Save a trained tokenizer as tokenizer.json; read_spec reads it."""
    Path(path).write_text(json.dumps(spec) + "\n", encoding="utf-8")


def load_gpt2():
    """tiktoken's GPT-2 encoding, or a ValueError that says what to do without a network."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests, urllib3 and tiktoken each have their own
        folder = (os.environ.get("TIKTOKEN_CACHE_DIR") or
                  os.environ.get("DATA_GYM_CACHE_DIR") or "unset")
        raise UserError(
            f"GPT-2's vocabulary could not be loaded ({type(error).__name__}). It is two files, "
            "vocab.bpe and encoder.json, that tiktoken downloads once. Without a network, copy "
            "tiktoken's cache folder from another machine and set TIKTOKEN_CACHE_DIR to it "
            f"(now: {folder})") from error


def train_bpe(texts, vocab_size, pattern=SPLIT_PATTERN):
    """The merges of `learn_merges` that make vocab_size ids, without counting anew for each of
    them.

    texts: an iterable of strings; words are not joined across two of them. Returns {"pattern": ...,
    "merges": [[id, id], ...]}. Raises ValueError for fewer than 256 ids.
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size={vocab_size}: a byte-pair encoding starts from 256 bytes; "
                         "use 256 or more")
    splitter, word_counts = re.compile(pattern), Counter()
    for text in texts:
        word_counts.update(splitter.findall(text))
    # Each word once, however often it occurs; and for each pair, how often and in which words.
    words = [list(word.encode("utf-8")) for word in word_counts]
    counts = list(word_counts.values())
    pair_counts, pair_words = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            pair_words[pair].add(i)
    # A heap finds the most frequent pair. Counts change as words merge: changed pairs are pushed
    # anew, and entries whose count is no longer true are skipped when they come up.
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges, sizes = [], [1] * 256  # sizes: bytes of each id
    while heap and len(merges) < vocab_size - 256:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            continue
        if -count < 2:
            break
        if sizes[pair[0]] + sizes[pair[1]] > LONGEST_TOKEN:  # of a text that is all one letter
            continue
        sizes.append(sizes[pair[0]] + sizes[pair[1]])
        new_id = 256 + len(merges)
        merges.append(list(pair))
        changed = Counter()  # how the counts of pairs change, in the words that hold this one
        for i in pair_words.pop(pair):
            old, new = words[i], merge(words[i], pair, new_id)
            words[i] = new
            for p in zip(old, old[1:]):
                changed[p] -= counts[i]
            for p in zip(new, new[1:]):
                changed[p] += counts[i]
                if new_id in p:
                    pair_words[p].add(i)
        for p, change in changed.items():
            if change:
                pair_counts[p] += change
                if pair_counts[p] > 0:
                    heapq.heappush(heap, (-pair_counts[p], p))
                else:
                    del pair_counts[p]
    return {"pattern": pattern, "merges": merges}


def bytes_per_id(enc, n_ids):
    """How many bytes each of the ids 0 to n_ids - 1 (at least all that enc has) stands for, as a
    list; 0 for special tokens and for ids of padding, which stand for no text."""
    lengths = [0] * max(n_ids, enc.n_vocab)
    for token, i in enc._mergeable_ranks.items():
        lengths[i] = len(token)
    return lengths


def token_pieces(enc, ids):
    """Each id's own text; bytes that are only a part of a character show as <e2> and so on."""
    pieces = []
    for token in enc.decode_tokens_bytes(ids):
        try:
            pieces.append(token.decode("utf-8"))
        except UnicodeDecodeError:
            pieces.append("".join(f"<{b:02x}>" if b > 127 else chr(b) for b in token))
    return pieces


def paint(pieces, colour):
    """Pieces on backgrounds that alternate, or between bars where there is no colour."""
    shown = [p.replace(" ", "·").replace("\n", "↵").replace("\t", "→") for p in pieces]
    if not colour:
        return "|".join(shown)
    return "".join(f"\x1b[{(30, 97)[i % 2]};{(106, 44)[i % 2]}m{p}\x1b[0m"
                   for i, p in enumerate(shown))


def show(text, colour):
    """Yield the lines of the tokenization lesson for `text`."""
    def step(title, why, pieces, ids=None):
        yield f"\n{title}: {len(pieces)} pieces. {why}"
        yield "  " + paint(pieces, colour)
        if ids is not None:
            yield "  " + " ".join(map(str, ids))

    yield f"{len(text)} characters, {len(text.encode('utf-8'))} bytes (· is a space)"
    yield from step("1. White space", "Simple, but 'world!' and 'world' are strangers.",
                    text.split())
    yield from step("2. White space and punctuation",
                    "Better; yet every unseen word is an unknown one.",
                    re.findall(r"\w+|[^\w\s]", text))
    yield from step("3. Characters",
                    "Nothing unknown in one script, but 150,000 of them exist, and texts get long.",
                    list(text), [ord(c) for c in text])
    enc = get_tokenizer("bytes")
    ids = enc.encode_ordinary(text)
    yield from step("4. Bytes", "256 ids write everything; texts get longer still.",
                    token_pieces(enc, ids), ids)
    source = Path(__file__).parent / "instruction" / "instruction-data.json"
    spec = train_bpe([source.read_text(encoding="utf-8")], 1024)
    enc = get_tokenizer(spec)
    ids = enc.encode_ordinary(text)
    yield from step("5. Byte pairs, learned here",
                    f"{len(spec['merges'])} merges of frequent neighbours in {source.name}: "
                    "common words are one piece, nothing is unknown.",
                    token_pieces(enc, ids), ids)
    word = max(re.findall(spec["pattern"], text), key=lambda w: len(w.encode("utf-8")), default="")
    ids = list(word.encode("utf-8"))
    yield f"   Merge by merge, the longest word: {paint(token_pieces(enc, ids), False)}"
    for i, pair in enumerate(map(tuple, spec["merges"])):
        merged = merge(ids, pair, 256 + i)
        if merged != ids:
            ids = merged
            yield f"     merge {i + 1:>4}: {paint(token_pieces(enc, ids), False)}"
    try:
        enc = get_tokenizer("gpt2")
    except UserError as error:
        yield f"\n6. GPT-2's byte pairs: not shown. {error}"
        return
    ids = enc.encode_ordinary(text)
    yield from step("6. GPT-2's byte pairs",
                    "The same method with 50,000 merges, learned on 40 GB of web pages.",
                    token_pieces(enc, ids), ids)
    yield "   In a chat, role tokens follow: " + ", ".join(
        f"{t} is id {enc.encode_single_token(t)}" for t in ROLE_TOKENS)


if __name__ == "__main__":
    if sys.argv[2:3] == ["#"]:  # a comment that zsh and cmd take for arguments
        del sys.argv[2:]
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__.strip())
    sys.stdout.reconfigure(encoding="utf-8")
    if os.name == "nt":
        os.system("")  # from here on its console obeys colours
    # A broken byte becomes a question mark.
    text = sys.argv[1].encode("utf-8", "replace").decode("utf-8")
    for line in show(text, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ):
        print(line)
