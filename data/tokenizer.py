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
from array import array
from collections import Counter, defaultdict
from pathlib import Path

import tiktoken
from tiktoken.load import read_file_cached

import config
from config import UserError

END_OF_TEXT = "<|endoftext|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")
SPECIAL_TOKENS = (END_OF_TEXT, *ROLE_TOKENS)
MAX_VOCAB_SIZE = 2**16 - len(SPECIAL_TOKENS)  # ordinary ids in 16-bit token files
GPT2_VOCAB_SIZE = 50257  # ids in GPT-2's own files, which have no role tokens

# How text is split before bytes are paired (no pair crosses a split): words, single digits (so that
# sums can be learned), punctuation, white space. GPT-2 joins a space to the word after it. Here it
# is separate, so a word has the same ids everywhere. Regex engines disagree on whether the joiners
# in emoji (U+200C, U+200D) are letters: here they are not.
SPLIT_PATTERN = "[^\\W\\d_\u200c\u200d]+|\\d|(?:[^\\s\\w]|[_\u200c\u200d])+|\\s+"
# The same with a space joined to the word or punctuation before it: a fifth fewer tokens.
TRAILING_SPACE_PATTERN = "[^\\W\\d_\u200c\u200d]+ ?|\\d|(?:[^\\s\\w]|[_\u200c\u200d])+ ?|\\s+"
SAMPLE = "It's 30°, naïve_x.\n\n\t你好 क्षि👩\u200d🚀\x00  "  # a pattern must match all of it

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_MERGES = ("https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
               "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")  # SHA-256
# GPT-2's files spell each byte as one character: printable ones as themselves, the others as the
# characters from U+0100 on. This dict is in the order of GPT-2's ids.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
GPT2_CHARACTERS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}


# ---- byte-pair encoding, the naive way ----

def learn_merges(text, n_merges, pattern=SPLIT_PATTERN):
    """Learn a byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): a list of pairs of
    ids, where merge i makes the new id 256 + i.

    Start from the 256 bytes. Each step merges the most frequent adjacent pair into a new id.
    "aab aab" first merges (a, a), which occurs twice, then (aa, b): [(97, 97), (256, 98)].
    """
    words = [list(word.encode("utf-8")) for word in re.findall(pattern, text)]
    merges = []
    for i in range(n_merges):
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))  # its adjacent pairs
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
    """Learn as `learn_merges` does, but visit only the places that a merge changes. Returns
    {"pattern": ..., "merges": [[id, id], ...]}. texts: an iterable; no pair crosses from one to the
    next. Raises UserError for a vocab_size out of range."""
    if not 256 <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size}: must be from 256 (the bytes) to "
                        f"{MAX_VOCAB_SIZE}: token files have 16-bit ids, four of which are special")
    word_counts = Counter(word for text in texts for word in re.findall(pattern, text))
    # All distinct words as one doubly linked list of ids. -1 separates words, and also marks the
    # second place of a merged pair, which is no longer linked.
    ids, counts = array("i", [-1]), array("q", [0])
    for word, n in word_counts.items():
        ids.extend([*word.encode("utf-8"), -1])
        counts.extend([n] * (len(ids) - len(counts)))
    before, after = array("i", range(-1, len(ids) - 1)), array("i", range(1, len(ids) + 1))
    pair_counts, places = Counter(), defaultdict(lambda: array("i"))  # of each pair
    changed, heap, merges = set(), [], []

    def count(i, j, sign):  # add or subtract the pair at i and the place after it, j
        pair = ids[i], ids[j]
        if -1 not in pair:
            pair_counts[pair] += sign * counts[i]
            changed.add(pair)
            if sign > 0:
                places[pair].append(i)

    for i in range(len(ids) - 1):
        count(i, i + 1, 1)
    for new_id in range(256, vocab_size):
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
        for i in sorted(places.pop(pair)):  # left to right
            j = after[i]
            if (ids[i], ids[j]) == pair:  # not changed since
                left, right = before[i], after[j]
                for neighbors in ((left, i), (i, j), (j, right)):
                    count(*neighbors, -1)
                ids[i], ids[j], after[i], before[right] = new_id, -1, right, i
                count(left, i, 1)
                count(i, right, 1)
    return {"pattern": pattern, "merges": merges}


def make_tokenizer(name, folder, texts, vocab_size, pattern=SPLIT_PATTERN):
    """Return (tokenizer, its name in meta.json) for a script's setting `tokenizer`. "bpe" is
    trained on `texts`; a trained one is written to folder/tokenizer.json. Raises UserError."""
    if name == "bpe":
        print("learning byte pairs (minutes for a large text)", file=sys.stderr)
        spec = train_bpe(texts, vocab_size, pattern)
    else:
        spec = read_spec(name)
    if isinstance(spec, dict):
        name = "tokenizer.json"
        (folder / name).write_text(json.dumps(spec) + "\n", encoding="utf-8")
    return get_tokenizer(spec), name


def get_tokenizer(spec):
    """Return the tokenizer for a spec or the path of a tokenizer.json. Raises UserError, including
    for a pattern that does not match all of a sample text."""
    spec = read_spec(spec)
    if spec == "gpt2":
        return load_gpt2_tokenizer()
    if spec == "bytes":
        spec = {"pattern": r"[\s\S]", "merges": []}
    if "".join(re.findall(spec["pattern"], SAMPLE)) != SAMPLE:
        raise UserError(f"the pattern {spec['pattern']!r} must match every part of a text")
    tokens = [bytes([i]) for i in range(256)]
    for a, b in spec["merges"]:
        tokens.append(tokens[a] + tokens[b])
    return build("bpe", spec["pattern"], tokens)


def load_gpt2_tokenizer():
    """Return GPT-2's tokenizer. Raises UserError if its merges cannot be downloaded."""
    try:
        merges = read_file_cached(*GPT2_MERGES).decode().split("\n")[1:-1]  # "Ġ t", ...
    except Exception as error:  # requests, urllib3 and tiktoken each have their own
        raise UserError(
            f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): tiktoken downloads "
            "it once; without a network, copy tiktoken's cache folder from another machine and set "
            f"TIKTOKEN_CACHE_DIR to it (now {os.environ.get('TIKTOKEN_CACHE_DIR')})") from error
    byte_of = str.maketrans({c: b for b, c in GPT2_CHARACTERS.items()} | {" ": None})
    tokens = [token.translate(byte_of).encode("latin-1")
              for token in (*GPT2_CHARACTERS.values(), *merges)]  # bytes, then each merge's
    return build("gpt2", GPT2_PATTERN, tokens)


def build(name, pattern, tokens):
    """Build a tiktoken.Encoding from the bytes of each ordinary token, in the order of the ids."""
    specials = {token: len(tokens) + i for i, token in enumerate(SPECIAL_TOKENS)}
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


def read_spec(spec):
    """Return what a checkpoint stores as its tokenizer: "gpt2", "bytes", or the dict {"pattern",
    "merges"} of the tokenizer.json at the path `spec`. Raises UserError."""
    if isinstance(spec, dict) or spec in ("gpt2", "bytes"):
        return spec
    try:
        content = json.loads(config.local_path(str(spec)).read_text(encoding="utf-8"))
        spec_in_file = {"pattern": content["pattern"], "merges": content["merges"]}
        get_tokenizer(spec_in_file)
    except (OSError, UserError, ValueError, TypeError, LookupError, re.error) as error:
        raise UserError(f"{spec}: not a tokenizer: {error}; use gpt2, bytes or the path of a "
                        "tokenizer.json") from error
    return spec_in_file


def token_pieces(enc, ids):
    """Return each id's own text. Bytes of an incomplete character are shown as <e2> and so on."""
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

def main(argv):
    """Print six ways to split the text on the command line. Raises UserError if
    GPT-2's tokenizer cannot be loaded."""
    text = " ".join(argv)
    if text.strip() in ("", "-h", "--help"):
        return print((__doc__ or "").strip())
    sys.stdout.reconfigure(encoding="utf-8")
    source = Path(__file__).parent / "instruction" / "instruction-data.json"
    learned = train_bpe([source.read_text(encoding="utf-8")], 1024)
    print(f"{len(text)} characters, {len(text.encode('utf-8'))} bytes (· is a space)")
    for title, why, how in (
            ("1. White space", "Simple, but 'world!' and 'world' are unrelated.", r"\S+"),
            ("2. And punctuation", "Better, but unseen words are unknown.", r"\w+|[^\w\s]"),
            ("3. Characters", "None is unknown, but there are 150,000.", r"[\s\S]"),
            ("4. Bytes", "256 ids cover everything, but texts get long.", "bytes"),
            ("5. BPE, learned here", f"{len(learned['merges'])} merges of frequent "
             f"neighbors in {source.name}: common words are one piece, and nothing is unknown.",
             learned),
            ("6. GPT-2's BPE", "The same method with 50,000 merges, learned on 40 GB of web "
             "pages.", "gpt2")):
        enc = None if title[0] in "123" else get_tokenizer(how)
        ids = enc.encode_ordinary(text) if enc else []
        pieces = token_pieces(enc, ids) if enc else re.findall(how, text)
        print(f"\n{title}: {len(pieces)} pieces. {why}\n  {show_spaces('|'.join(pieces))}")
        if enc:
            print("  " + " ".join(map(str, ids)))
        if how is learned:
            ids = list(max(re.findall(SPLIT_PATTERN, text), key=len).encode("utf-8"))
            for i, pair in enumerate(learned["merges"]):
                before, ids = ids, merge(ids, pair, 256 + i)
                if ids != before:
                    print(f"    merge {i + 1:>4}: {'|'.join(token_pieces(enc, ids))}")


if __name__ == "__main__":
    config.run(main)
