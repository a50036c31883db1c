"""Token files and the batches made of them.

A prepared folder holds train.bin and val.bin (token ids as raw uint16, nothing else, so np.memmap
opens them) and meta.json, which says what the ids mean. TokenDataset cuts plain text into windows,
ChatDataset keeps conversations whole; training calls both the same way: batch(split, index) is a
pure function of the seed and the index, so a run that is resumed, or spread over machines, sees the
same batches.
"""
import functools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import UserError
from data.conversation import special_ids, supervised
from data.files import write_text
from data.tokenizer import bytes_per_id, count_ids, get_tokenizer, read_spec

SPLITS = ("train", "val")
CHECKED = 10_000_000  # ids that opening a file checks; of the others each batch checks its own


def write_tokens(path, chunks):
    """Write lists or arrays of ids, one after the other, as uint16; returns how many. Raises
    ValueError for an id that uint16 cannot hold."""
    total = 0
    with open(path, "wb") as f:
        for ids in chunks:
            ids = np.asarray(ids)
            if ids.size and not 0 <= ids.min() <= ids.max() < 2**16:
                wrong = ids.max() if ids.max() >= 2**16 else ids.min()
                raise UserError(f"{path}: token id {wrong} does not fit in 16 bits; use a smaller "
                                 "vocabulary")
            f.write(ids.astype(np.uint16).tobytes())
            total += ids.size
    return total


def write_meta(folder, meta):
    """Write meta.json, which open_dataset reads."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())
    write_text(Path(folder) / "meta.json", f"{{\n{lines}\n}}\n")


def read_meta(folder):
    """meta.json of a prepared folder, or a ValueError that says how to prepare one."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        for name, wanted in (("kind", str), ("tokenizer", str), ("vocab_size", int)):
            if type(meta[name]) is not wanted:
                raise TypeError
        if not 0 < meta["vocab_size"] <= 2**16:
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{folder}: no meta.json there; prepare the data first: "
                         "python prepare_alpaca.py config/prepare_instruction.py (chats), "
                         "or python -m data.text (plain text)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a meta.json of this project; "
                         "prepare the folder again") from error
    return meta


def folder_tokenizer(folder):
    """What a checkpoint keeps of the tokenizer of a prepared folder (see data/tokenizer.py's
    read_spec)."""
    meta = read_meta(folder)
    name = meta["tokenizer"]
    spec = read_spec(Path(folder) / name if name.endswith(".json") else name)
    if (ids := count_ids(spec)) != meta["vocab_size"]:
        raise UserError(f"{folder}/meta.json: vocab_size={meta['vocab_size']}, but its tokenizer "
                         f"{name} has {ids} ids; prepare the folder again")
    return spec


def row_categories(folder, split, count):
    """The category of each of a split's `count` conversations, in their order; "" where the folder
    knows none. Raises ValueError."""
    meta = read_meta(folder)
    try:
        names = [meta["categories"][number] for number in meta[f"{split}_categories"]]
        fits = len(names) in (0, count) and all(type(name) is str for name in names)
    except (KeyError, IndexError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{folder}/meta.json: its categories or {split}_categories are missing or "
                         f"do not fit {split}.bin; prepare the folder again")
    return names or [""] * count


def open_dataset(folder, block_size, batch_size, seed=0, prompt_loss_batches=0):
    """The TokenDataset or ChatDataset of a prepared folder, as its meta.json says. Raises
    ValueError."""
    kind = read_meta(folder)["kind"]
    if kind == "text":
        return TokenDataset(folder, block_size, batch_size, seed)
    if kind == "chat":
        return ChatDataset(folder, block_size, batch_size, seed, prompt_loss_batches)
    raise UserError(f"{folder}/meta.json: kind {kind!r} is neither 'text' nor 'chat'")


def shards(folder, split):
    """The paths of a split's token files: train.bin, or train_000.bin, train_001.bin and so on.
    Raises ValueError where there is none."""
    whole = Path(folder) / f"{split}.bin"
    paths = [whole] if whole.is_file() else sorted(Path(folder).glob(f"{split}_*.bin"))
    if not paths:
        raise UserError(f"{whole}: no such file; prepare the folder again")
    return paths


def open_split(folder, split, meta):
    """The ids of a split, those of each of its files as a read-only memmap (n,), in a list. Raises
    ValueError for a file that cannot be right, or not as many ids as `meta` says."""
    tokens = [open_tokens(path, meta["vocab_size"]) for path in shards(folder, split)]
    found, stated = sum(map(len, tokens)), meta.get(f"{split}_tokens")
    if stated not in (None, found):
        raise UserError(f"{Path(folder) / split}.bin: holds {found} tokens, but meta.json says "
                         f"{stated}; a file was cut or exchanged, prepare the folder again")
    return tokens


def open_tokens(path, vocab_size):
    """The ids in a file as a read-only memmap (n,). Raises ValueError for a file that cannot be
    right."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path}: {size} bytes are not 16-bit token ids; the file is cut short "
                         "or empty, prepare the folder again")
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    check_ids(tokens[:CHECKED], vocab_size, path)
    return tokens


def check_ids(ids, vocab_size, path):
    """Raise ValueError where `ids`, those of the file `path`, are not all below vocab_size."""
    if ids.max() >= vocab_size:
        raise UserError(f"{path}: holds token id {ids.max()}, but the vocabulary has "
                         f"{vocab_size}; it was made with another tokenizer, "
                         "prepare the folder again")


def check_turns(ids, enc, path):
    """Raise ValueError where ids (n,) are not conversations one after the other: <|endoftext|>,
    then turns of <|user|> ... <|end|> <|assistant|> ... <|end|>."""
    first = special_ids(enc)[0]  # <|endoftext|>; then come <|user|>, <|assistant|> and <|end|>
    places = np.flatnonzero(ids >= first)
    kinds = np.minimum(ids[places] - first, 4)
    letters = np.frombuffer(b"SUAE?", np.uint8)[kinds]  # ?: no id at all
    in_turns = re.fullmatch(b"(S(UEAE)+)+", letters.tobytes())
    # No text stands before the first, nor between <|endoftext|> or <|end|> and what follows it.
    at_once = np.diff(places, append=len(ids))[np.isin(kinds, (0, 3))] == 1
    if not in_turns or not at_once.all() or places[0] != 0:
        raise UserError(f"{path}: holds no conversation, or not only conversations in turns of "
                         "user and assistant; prepare the folder again")


def fingerprint(meta):
    """What tells one prepared folder from another: its source's sha256 and how many tokens came of
    it."""
    return [str(meta.get(name))
            for name in ("kind", "sha256", "seed", "train_tokens", "val_tokens")]


@functools.lru_cache(4)  # it is the same at each evaluation, and reads all of them
def count_targets(dataset, split, max_tokens):
    """(how many targets eval_batches has, how many bytes of UTF-8 they stand for).

    Text counts as many bytes as it is written with, whatever its tokens are, so losses per byte
    compare where losses per token do not. A chat's bytes are those of the assistant's words.
    Special tokens (<|endoftext|>, a reply's <|end|>) stand for none; the model has to foresee them
    all the same, so they are targets, and cost bits.
    """
    lengths = np.array(bytes_per_id(get_tokenizer(dataset.tokenizer), dataset.vocab_size))
    n_targets = n_bytes = 0
    for _, targets, _ in dataset.eval_batches(split, max_tokens):
        n_targets += targets.size
        n_bytes += int(lengths[targets].sum())
    return n_targets, n_bytes


class TokenDataset:
    """Plain text: windows of block_size tokens from random places, each target the token after. The
    text may lie in several shards; no window crosses from one to the next. A batch depends on the
    seed and its number alone: a resumed run finds its place in the data by its step."""

    kind = "text"
    turns = 0

    def __init__(self, folder, block_size, batch_size, seed=0):
        self.folder, self.block_size, self.batch_size, self.seed = (
            Path(folder), block_size, batch_size, seed)
        meta = read_meta(folder)
        self.tokenizer, self.vocab_size = folder_tokenizer(folder), meta["vocab_size"]
        self.fingerprint = fingerprint(meta)
        self.tokens, self.ends = {}, {}  # of each shard; and how many windows end with it
        for split in SPLITS:
            self.tokens[split] = open_split(folder, split, meta)
            for path, tokens in zip(shards(folder, split), self.tokens[split]):
                if len(tokens) <= block_size:
                    raise UserError(f"{path}: {len(tokens)} tokens are too few for "
                                     f"block_size={block_size}; use more text, or "
                                     f"--block_size={max(len(tokens) - 1, 1)}")
            self.ends[split] = np.cumsum([len(tokens) - block_size
                                          for tokens in self.tokens[split]])

    def n_tokens(self, split):
        return sum(map(len, self.tokens[split]))

    def batch(self, split, index):
        """The index-th batch of random windows: ids (B, T) int64, targets (B * T,) int64, where
        None: every position has a target."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        return self.windows(split, rng.integers(0, self.ends[split][-1], self.batch_size))

    def n_targets(self, split, index):
        """Number of targets in a batch, without reading it."""
        return self.batch_size * self.block_size

    def epochs(self, split, index):
        """How many times a token has been read, on average, in the batches before `index`."""
        return index * self.batch_size * self.block_size / self.n_tokens(split)

    def eval_batches(self, split, max_tokens):
        """Fixed windows, spread evenly, without overlap and together at most max_tokens (at least
        one window), in batches like those of batch(). max_tokens None: all windows and, after
        them, the shorter rest of each shard, so that every token but a shard's first is a target
        once."""
        first = np.append(0, self.ends[split][:-1])  # the number of each shard's first window
        apart = np.concatenate([np.arange(a, b, self.block_size)
                                for a, b in zip(first, self.ends[split])])
        wanted = len(apart)
        if max_tokens is not None:
            wanted = min(wanted, max(max_tokens // self.block_size, 1))
        numbers = apart[np.linspace(0, len(apart) - 1, wanted).round().astype(np.int64)]
        for i in range(0, wanted, self.batch_size):
            yield self.windows(split, numbers[i:i + self.batch_size])
        if max_tokens is None:
            yield from self.rests(split)

    def rests(self, split):
        """What each shard has left behind its last window, as a batch of one shorter window."""
        for tokens in self.tokens[split]:
            read = (len(tokens) - 1) // self.block_size * self.block_size  # by whole windows
            rest = tokens[read:].astype(np.int64)
            if len(rest) > 1:
                check_ids(rest, self.vocab_size, self.folder / f"{split}.bin")
                yield rest[None, :-1], rest[1:], None

    def windows(self, split, numbers):
        """A batch of the windows with these numbers, counted from the first shard's first token
        on."""
        ids = np.empty((len(numbers), self.block_size + 1), np.int64)
        for row, number in zip(ids, numbers):
            shard = int(np.searchsorted(self.ends[split], number, side="right"))
            start = number - self.ends[split][shard - 1] if shard else number
            row[:] = self.tokens[split][shard][start:start + self.block_size + 1]
        check_ids(ids, self.vocab_size, self.folder / f"{split}.bin")
        return ids[:, :-1], ids[:, 1:].reshape(-1), None


class ReadAhead:
    """A TokenDataset that reads its next batches while a GPU computes: windows of a file that is
    not in memory yet take longer to read than a step to compute. Of batches `stride` apart, as one
    of so many processes asks for them, `ahead` are read before they are asked for."""

    def __init__(self, dataset, stride, ahead):
        self.dataset, self.stride, self.ahead = dataset, stride, ahead
        self.reader, self.reading = ThreadPoolExecutor(1), {}

    def __getattr__(self, name):  # all else is the dataset's
        return getattr(self.dataset, name)

    def batch(self, split, index):
        for number in range(index, index + (self.ahead + 1) * self.stride, self.stride):
            if (split, number) not in self.reading:
                self.reading[split, number] = self.reader.submit(self.dataset.batch, split, number)
        return self.reading.pop((split, index)).result()


class ChatDataset:
    """Chats: whole conversations, each from position 0, batched with others of about its length.

    A batch holds as many conversations as fit into batch_size * block_size tokens, padding counted,
    so it costs the memory that a batch of text does. Every epoch sorts by length, equals in a new
    random order, cuts at a random phase and shuffles the batches. Only the assistant's tokens are
    targets; in training's first `prompt_loss_batches` batches the questions' are too. A conversation
    longer than block_size + 1 is cut there; one that has no target left is dropped (`dropped`
    counts them by split).
    """

    kind = "chat"
    turns = 1  # of the longest conversation, once it is open

    def __init__(self, folder, block_size, batch_size, seed=0, prompt_loss_batches=0):
        self.folder, self.block_size, self.seed = Path(folder), block_size, seed
        self.budget = batch_size * block_size  # tokens per batch, padding counted
        self.prompt_loss_batches = prompt_loss_batches
        meta = read_meta(folder)
        self.tokenizer, self.vocab_size = folder_tokenizer(folder), meta["vocab_size"]
        self.fingerprint = fingerprint(meta)
        enc = get_tokenizer(self.tokenizer)
        self.pad_id = special_ids(enc)[0]
        self.tokens, self.targets, self.starts, self.lengths, self.dropped = {}, {}, {}, {}, {}
        self.row_targets = {}
        for split in SPLITS:
            parts = open_split(folder, split, meta)
            tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
            check_turns(tokens, enc, f"{folder}/{split}.bin")
            # Every conversation opens with <|endoftext|>.
            starts = np.flatnonzero(tokens == self.pad_id)
            lengths = np.minimum(np.diff(starts, append=len(tokens)), block_size + 1)
            is_target = supervised(tokens, enc)
            before = np.concatenate([[0], np.cumsum(is_target)])  # targets before each position
            row_targets = before[starts + lengths] - before[starts]
            kept = row_targets > 0
            self.dropped[split] = int((~kept).sum())
            if not kept.any():
                raise UserError(f"{folder}/{split}.bin: at block_size={block_size} no "
                                 "conversation has anything of the assistant's left; "
                                 "use a larger block_size")
            # The <|user|>s of each conversation.
            turns = np.add.reduceat(tokens == special_ids(enc)[1], starts)
            self.turns = max(self.turns, int(turns.max()))
            self.tokens[split], self.targets[split] = tokens, is_target
            self.starts[split], self.lengths[split] = starts[kept], lengths[kept]
            self.row_targets[split] = row_targets[kept]
        self._plans = {}  # the newest epoch's batches, by split
        self._first_batch = {split: [0] for split in SPLITS}  # of each epoch, as far as known

    def n_tokens(self, split):
        return len(self.tokens[split])

    def plan(self, split, epoch):
        """Which chats share a batch: those of about one length, drawn anew in each epoch. A list of
        arrays of row numbers."""
        if self._plans.get(split, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, SPLITS.index(split), epoch])
            lengths = self.lengths[split]
            order = np.lexsort((rng.random(len(lengths)), lengths))  # by length, equals at random
            first_budget = int(rng.integers(self.budget)) + 1  # so that cuts fall elsewhere
            batches = cut(order, lengths, self.budget, first_budget)
            self._plans[split] = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return self._plans[split][1]

    def batches_until(self, split, epoch):
        """How many batches the epochs before `epoch` have."""
        known = self._first_batch[split]
        while len(known) <= epoch:
            known.append(known[-1] + len(self.plan(split, len(known) - 1)))
        return known[epoch]

    def find(self, split, index):
        """The epoch that the index-th batch belongs to, and its place in it."""
        epoch = 0
        while self.batches_until(split, epoch + 1) <= index:
            epoch += 1
        return epoch, index - self.batches_until(split, epoch)

    def epochs(self, split, index):
        """How many epochs the batches before `index` make, as a fraction."""
        epoch, place = self.find(split, index)
        return epoch + place / len(self.plan(split, epoch))

    def batch(self, split, index):
        """The index-th batch, counted from the first epoch on: ids (B, T) int64, targets (N,)
        int64, and where (N,), the flat positions b * T + t whose next token is targets."""
        epoch, place = self.find(split, index)
        all_tokens = split == "train" and index < self.prompt_loss_batches
        return self.rows(split, self.plan(split, epoch)[place], all_tokens)

    def n_targets(self, split, index):
        """Number of targets in the index-th batch, without reading it."""
        epoch, place = self.find(split, index)
        numbers = self.plan(split, epoch)[place]
        if split == "train" and index < self.prompt_loss_batches:
            return int((self.lengths[split][numbers] - 1).sum())
        return int(self.row_targets[split][numbers].sum())

    def eval_batches(self, split, max_tokens):
        """Fixed conversations, spread evenly and together about max_tokens at most, in batches like
        batch()'s. max_tokens None: all of them."""
        lengths = self.lengths[split]
        wanted = len(lengths)
        if max_tokens is not None:
            wanted = max(1, min(wanted, int(max_tokens / lengths.mean())))
        rows = np.linspace(0, len(lengths) - 1, wanted).round().astype(np.int64)
        for batch in cut(rows[np.argsort(lengths[rows], kind="stable")], lengths, self.budget):
            yield self.rows(split, batch)

    def rows(self, split, numbers, all_tokens=False):
        """The batch made of these conversations, shorter ones padded at the end. all_tokens: the
        questions' tokens are targets too."""
        lengths, starts = self.lengths[split][numbers], self.starts[split][numbers]
        inside = np.arange(lengths.max()) < lengths[:, None]  # (B, T + 1)
        at = np.where(inside, starts[:, None] + np.arange(lengths.max()), 0)
        ids = np.where(inside, self.tokens[split][at], self.pad_id).astype(np.int64)
        check_ids(ids, self.vocab_size, self.folder / f"{split}.bin")
        is_target = inside if all_tokens else inside & self.targets[split][at]
        is_target = is_target[:, 1:]  # what follows each position
        return ids[:, :-1], ids[:, 1:][is_target], np.flatnonzero(is_target)

    def conversations(self, split):
        """Every conversation's ids, whole, in the order of the file."""
        bounds = np.append(np.flatnonzero(self.tokens[split] == self.pad_id),
                           len(self.tokens[split]))
        return [self.tokens[split][a:b].tolist() for a, b in zip(bounds, bounds[1:])]


def cut(order, lengths, budget, first_budget=None):
    """Cut rows sorted by length into batches of at most `budget` tokens once padded to their
    longest row; a batch has at least one row. The first may be given a smaller budget, so that cuts
    fall elsewhere."""
    batches, batch, limit = [], [], first_budget or budget
    for row in order:
        # The last token is a target only.
        if batch and (len(batch) + 1) * (lengths[row] - 1) > limit:
            batches.append(np.array(batch))
            batch, limit = [], budget
        batch.append(row)
    return batches + [np.array(batch)]
