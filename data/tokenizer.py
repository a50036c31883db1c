"""Text to token ids and back: GPT-2's tokenizer, plain bytes, or a byte-pair encoding trained here.

    python -m data.tokenizer "Hello,   world! naïve 👋"    # see how text becomes tokens

Every tokenizer is a tiktoken.Encoding, with `<|endoftext|>` and the three role tokens of a chat as
single ids after its ordinary ids.
"""
import heapq
import json
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken

import config
from config import UserError

END_OF_TEXT = "<|endoftext|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")
SPECIAL_TOKENS = (END_OF_TEXT, *ROLE_TOKENS)
GPT2_VOCAB_SIZE = 50257  # ids in GPT-2's own files, which have no role tokens

# How text is split before bytes are paired (no pair crosses a split): words, single digits (so that
# sums can be learned), punctuation, white space. GPT-2 joins a space to the word after it. Here it
# is separate, so a word has the same ids everywhere. Regex engines disagree on whether the joiners
# in emoji (U+200C, U+200D) are letters: here they are not.
SPLIT_PATTERN = "[^\\W\\d_\u200c\u200d]+|\\d|(?:[^\\s\\w]|[_\u200c\u200d])+|\\s+"
# The same with a space joined to the word or punctuation before it: a fifth fewer tokens.
SPACE_BEHIND_PATTERN = "[^\\W\\d_\u200c\u200d]+ ?|\\d|(?:[^\\s\\w]|[_\u200c\u200d])+ ?|\\s+"


# ---- byte-pair encoding, the naive way ----

def learn_merges(text, n_merges, pattern=SPLIT_PATTERN):
    """Learn a byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): a list of pairs of
    ids, where merge i makes the new id 256 + i.

    Start from the 256 bytes. Each step turns the most frequent pair of neighbours into a new id.
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
        best = min(counts, key=lambda pair: (-counts[pair], pair))  # on a tie, the smallest pair
        merges.append(best)
        words = [merge(word, best, 256 + i) for word in words]
    return merges


def apply_merges(text, merges, pattern=SPLIT_PATTERN):
    """Encode a text: merge each word's bytes in the order in which the merges were learned. With
    the two merges above "aabb" is first [97, 97, 98, 98], then [256, 98, 98], then [257, 98]."""
    ids = []
    for word in re.findall(pattern, text):
        word = list(word.encode("utf-8"))
        for i, pair in enumerate(merges):
            word = merge(word, pair, 256 + i)
        ids += word
    return ids


def merge(ids, pair, new_id):
    """Replace each `pair` in a list, left to right: merge([1, 1, 1, 2], (1, 1), 9) -> [9, 1, 2]."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


# ---- the same, fast: train_bpe learns, tiktoken encodes ----

def train_bpe(texts, vocab_size, pattern=SPLIT_PATTERN):
    """Learn as `learn_merges` does, but recount only the words that a merge changes.

    texts: an iterable of strings; no pair crosses from one to the next. Returns {"pattern": ...,
    "merges": [[id, id], ...]}. Raises UserError for a vocab_size out of range.
    """
    if not 256 <= vocab_size <= 2**16 - len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size={vocab_size}: must be from 256 (the bytes) to 65,532 (token "
                        "files have 16-bit ids, and four are special tokens)")
    word_counts = Counter(word for text in texts for word in re.findall(pattern, text))
    words, counts = [list(w.encode("utf-8")) for w in word_counts], list(word_counts.values())
    pair_counts, pair_words, changed, heap, merges = Counter(), defaultdict(set), set(), [], []

    def count(i, sign):  # add or subtract the pairs of one word
        for pair in zip(words[i], words[i][1:]):
            pair_counts[pair] += sign * counts[i]
            pair_words[pair].add(i)
            changed.add(pair)

    for i in range(len(words)):
        count(i, 1)
    while len(merges) < vocab_size - 256:
        # A heap finds the most frequent pair. Entries with an outdated count are skipped.
        for pair in changed:
            if pair_counts[pair] > 1:
                heapq.heappush(heap, (-pair_counts[pair], pair))
        changed.clear()
        while heap and -heap[0][0] != pair_counts[heap[0][1]]:
            heapq.heappop(heap)
        if not heap:
            break
        _, pair = heapq.heappop(heap)
        merges.append(list(pair))
        for i in pair_words.pop(pair):
            count(i, -1)
            words[i] = merge(words[i], pair, 255 + len(merges))
            count(i, 1)
    return {"pattern": pattern, "merges": merges}


def get_tokenizer(spec):
    """Return the tokenizer of a spec or of the path of a tokenizer.json. Raises UserError, also
    where GPT-2's vocabulary cannot be downloaded."""
    spec = read_spec(spec)
    if spec == "bytes":
        return build("bytes", r"[\s\S]", all_tokens([]))
    if spec != "gpt2":
        return build("bpe", spec["pattern"], all_tokens(spec["merges"]))
    try:
        base = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests, urllib3 and tiktoken each have their own
        cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        raise UserError(
            f"GPT-2's vocabulary could not be loaded ({type(error).__name__}). It is two files, "
            "vocab.bpe and encoder.json, that tiktoken downloads once. Without a network, copy "
            "tiktoken's cache folder from another machine and set TIKTOKEN_CACHE_DIR to it "
            f"(now: {cache or 'unset'})") from error
    ranks = base._mergeable_ranks
    return build("gpt2", base._pat_str, sorted(ranks, key=ranks.get))


def build(name, pattern, tokens):
    """Build a tiktoken.Encoding from the bytes of each ordinary token, in the order of the ids."""
    specials = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def all_tokens(merges):
    """The bytes of each ordinary token: the 256 single bytes, then what each merge makes."""
    tokens = [bytes([i]) for i in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    return tokens


def read_spec(spec):
    """Return what a checkpoint stores of a tokenizer: "gpt2", "bytes", or the dict {"pattern",
    "merges"} of the tokenizer.json at the path `spec`. Raises UserError."""
    if isinstance(spec, dict) or spec in ("gpt2", "bytes"):
        return spec
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"tokenizer {str(spec)!r}: no such file; use gpt2, bytes or the path of a "
                        "tokenizer.json")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        count_ids(spec)
    except (UserError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise UserError(f"{path}: not a tokenizer.json: {error}; prepare the data again") from error
    return {"pattern": spec["pattern"], "merges": spec["merges"]}


def write_spec(path, spec):
    """Save a trained tokenizer as tokenizer.json, which read_spec reads."""
    Path(path).write_text(json.dumps(spec) + "\n", encoding="utf-8")


def count_ids(spec):
    """Return how many ids the tokenizer of a spec has, special ones included. Raises UserError for
    a spec whose merges or pattern cannot encode a sample text."""
    if spec in ("gpt2", "bytes"):
        return (GPT2_VOCAB_SIZE if spec == "gpt2" else 256 + 1) + len(ROLE_TOKENS)
    sample = "It's 30°, naïve_x.\n\n\t你好 क्षि👩\u200d🚀\x00  "
    try:
        tokens = all_tokens(spec["merges"])
        has_empty_match = not all(match[0] for match in re.finditer(spec["pattern"], sample))
        if has_empty_match or len(set(tokens)) < len(tokens):
            raise ValueError  # tiktoken would panic
        enc = build("bpe", spec["pattern"], tokens)
        if enc.decode(enc.encode_ordinary(sample)) != sample:
            raise ValueError
    except (TypeError, LookupError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise UserError("its pattern must split every text, and its merges join two earlier ids, "
                        "each pair to a new token") from error
    return enc.n_vocab


def bytes_per_id(enc, n_ids):
    """Return how many bytes of text each of the ids 0 to n_ids - 1 (at least all of enc's) stands
    for, as a list: 0 for special tokens and padding ids."""
    lengths = [0] * max(n_ids, enc.n_vocab)
    for token, i in enc._mergeable_ranks.items():
        lengths[i] = len(token)
    return lengths


def token_pieces(enc, ids):
    """Return each id's own text. Bytes that are part of a character become <e2> and so on."""
    pieces = []
    for token in enc.decode_tokens_bytes(ids):
        try:
            pieces.append(token.decode("utf-8"))
        except UnicodeDecodeError:
            pieces.append("".join(f"<{b:02x}>" if b > 127 else chr(b) for b in token))
    return pieces


def show_spaces(text):
    """Make spaces, newlines and tabs visible."""
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


# ---- the lesson on the command line ----

def show(text):
    """Yield the lines of the lesson: six ways to split `text`. Raises UserError without GPT-2."""
    source = Path(__file__).parent / "instruction" / "instruction-data.json"
    spec = train_bpe([source.read_text(encoding="utf-8")], 1024)
    yield f"{len(text)} characters, {len(text.encode('utf-8'))} bytes (· is a space)"
    for title, why, how in (
            ("1. White space", "Simple, but 'world!' and 'world' are unrelated.", r"\S+"),
            ("2. And punctuation", "Better, but unseen words are unknown.", r"\w+|[^\w\s]"),
            ("3. Characters", "None is unknown, but there are 150,000.", r"[\s\S]"),
            ("4. Bytes", "256 ids write everything, but texts get long.", "bytes"),
            ("5. Byte pairs, learned here", f"{len(spec['merges'])} merges of frequent neighbours "
             f"in {source.name}: common words are one piece, nothing is unknown.", spec),
            ("6. GPT-2's byte pairs", "The same method with 50,000 merges, learned on 40 GB of web "
             "pages.", "gpt2")):
        enc = None if title[0] in "123" else get_tokenizer(how)
        ids = enc.encode_ordinary(text) if enc else []
        pieces = token_pieces(enc, ids) if enc else re.findall(how, text)
        yield f"\n{title}: {len(pieces)} pieces. {why}\n  {show_spaces('|'.join(pieces))}"
        if ids:
            yield "  " + " ".join(map(str, ids))
        if how == spec:
            yield from show_merges(max(re.findall(SPLIT_PATTERN, text), key=len), spec)


def show_merges(word, spec):
    """Yield a line for each merge that changes a word."""
    ids, enc = list(word.encode("utf-8")), get_tokenizer(spec)
    for i, pair in enumerate(map(tuple, spec["merges"])):
        before, ids = ids, merge(ids, pair, 256 + i)
        if ids != before:
            yield f"    merge {i + 1:>4}: {'|'.join(token_pieces(enc, ids))}"


def main(argv):
    """Print the lesson for the text on the command line."""
    text = " ".join(argv).encode("utf-8", "replace").decode("utf-8")  # broken bytes become "?"
    if text.strip() in ("", "-h", "--help"):
        return print(__doc__.strip())
    sys.stdout.reconfigure(encoding="utf-8")
    for line in show(text):
        print(line)


if __name__ == "__main__":
    config.run(main)
