"""Token files and the batches made from them.

A prepared folder has train.bin and val.bin (token ids as raw uint16) and meta.json. TextDataset
cuts plain text into windows, ChatDataset keeps conversations whole. batch(split, index) is a pure
function of the seed and the index, so a run that is resumed, or spread over machines, sees the same
batches.
"""
import functools
import json
from pathlib import Path

import numpy as np

from config import UserError
from data.conversation import special_ids, supervised
from data.files import write_text
from data.tokenizer import get_tokenizer, read_spec

SPLITS = ("train", "val")


def write_tokens(path, chunks):
    """Write lists or arrays of ids below 2**16, one after the other, as uint16. Return how many."""
    with open(path, "wb") as f:
        return sum(f.write(np.asarray(ids, np.uint16)) // 2 for ids in chunks)


def write_chats(folder, splits):
    """Write the token files of {split: [(ids, messages, category), ...]}. Return their entries for
    meta.json; row_categories reads the categories."""
    names = sorted({category for rows in splits.values() for _, _, category in rows})
    meta = {"categories": names}
    for split, rows in splits.items():
        ids, _, categories = zip(*rows)
        numbers = [names.index(category) for category in categories]
        meta |= {f"{split}_rows": len(rows),
                 f"{split}_tokens": write_tokens(folder / f"{split}.bin", ids),
                 f"{split}_categories": numbers if names != [""] else []}
    return meta


def write_meta(folder, meta):
    """Write meta.json, one line for each entry."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())
    write_text(Path(folder) / "meta.json", f"{{\n{lines}\n}}\n")


def read_meta(folder):
    """Return meta.json of a prepared folder. Raises UserError."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
        meta["kind"], meta["tokenizer"], meta["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/meta.json: cannot be read: {error!r}; prepare the data first: "
                        "python prepare_alpaca.py config/prepare_instruction.py (chats), "
                        "or python -m data.text (plain text)") from error
    return meta


def folder_tokenizer(folder):
    """Return the tokenizer spec of a prepared folder (see data/tokenizer.py). Raises UserError."""
    name = read_meta(folder)["tokenizer"]
    return read_spec(Path(folder) / name if name.endswith(".json") else name)


def row_categories(folder, split, count):
    """Return the category of each of a split's conversations; "" where meta.json has none."""
    meta = read_meta(folder)
    numbers = meta.get(f"{split}_categories") or []
    return [meta["categories"][number] for number in numbers] or [""] * count


def open_split(folder, split, meta):
    """Return the ids of a split as a list of read-only memmaps (n,): of train.bin, or of its shards
    train_000.bin, train_001.bin and so on. Raises UserError."""
    whole = Path(folder) / f"{split}.bin"
    paths = [whole] if whole.is_file() else sorted(Path(folder).glob(f"{split}_*.bin"))
    offset = meta.get("header_bytes", 0)  # data/fineweb.py's shards have a header
    shards = [np.memmap(path, np.uint16, "r", offset) for path in paths]
    found = sum(map(len, shards))
    largest = max((shard[:10_000_000].max() for shard in shards), default=0)  # checking all is slow
    if not found or found != meta.get(f"{split}_tokens", found) or largest >= meta["vocab_size"]:
        raise UserError(f"{whole}: {found} tokens with ids up to {largest} do not match meta.json; "
                        "prepare the folder again")
    return shards


def open_dataset(folder, block_size, batch_size, seed=0, prompt_loss_batches=0):
    """Open a prepared folder as a TextDataset or a ChatDataset. Raises UserError."""
    if read_meta(folder)["kind"] == "text":
        return TextDataset(folder, block_size, batch_size, seed)
    return ChatDataset(folder, block_size, batch_size, seed, prompt_loss_batches)


@functools.lru_cache(4)  # each evaluation calls it, and it reads every batch
def count_targets(dataset, split, max_tokens):
    """Return (number of targets of eval_batches, number of UTF-8 bytes that they represent): losses
    per byte are comparable across tokenizers. Special tokens are targets without bytes."""
    lengths = np.zeros(dataset.vocab_size, np.int64)
    for token, i in get_tokenizer(dataset.tokenizer)._mergeable_ranks.items():
        lengths[i] = len(token)
    n_targets = n_bytes = 0
    for _, targets, _ in dataset.eval_batches(split, max_tokens):
        n_targets += targets.size
        n_bytes += int(lengths[targets].sum())
    return n_targets, n_bytes


class Dataset:
    """A prepared folder: its tokenizer, and its ids in tokens[split], a list of memmaps."""

    def __init__(self, folder, block_size, batch_size, seed):
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        meta = read_meta(folder)
        self.tokenizer, self.vocab_size = folder_tokenizer(folder), meta["vocab_size"]
        self.fingerprint = [str(meta.get(name)) for name in  # a resumed run must match
                            ("kind", "sha256", "seed", "train_tokens", "val_tokens")]
        self.tokens = {split: open_split(folder, split, meta) for split in SPLITS}

    def n_tokens(self, split):
        return sum(map(len, self.tokens[split]))


class TextDataset(Dataset):
    """Plain text: windows of block_size tokens at random positions; each target is the next token.
    The text may be in several shards; no window crosses from one to the next."""

    kind = "text"
    turns = 0

    def __init__(self, folder, block_size, batch_size, seed=0):
        super().__init__(folder, block_size, batch_size, seed)
        self.ends = {}  # cumulative number of windows of the shards
        for split in SPLITS:
            shortest = min(map(len, self.tokens[split]))
            if shortest <= block_size:
                raise UserError(f"{folder}/{split}: {shortest} tokens are too few for block_size="
                                f"{block_size}; use more text, or --block_size={shortest - 1}")
            self.ends[split] = np.cumsum([len(t) - block_size for t in self.tokens[split]])

    def batch(self, split, index):
        """The index-th batch of random windows: ids (B, T) int64, targets (B * T,) int64, and None:
        every position has a target."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        return self.windows(split, rng.integers(0, self.ends[split][-1], self.batch_size))

    def n_targets(self, split, index):
        """Number of targets in a batch, without reading it."""
        return self.batch_size * self.block_size

    def epochs(self, split, index):
        """How many times a token is read, on average, in the batches before `index`."""
        return index * self.batch_size * self.block_size / self.n_tokens(split)

    def eval_batches(self, split, max_tokens):
        """Yield fixed windows, evenly spread, not overlapping, at most max_tokens in total (at
        least one window), in batches like those of batch(). max_tokens None: all windows and the
        shorter tail of each shard, so every token but a shard's first is a target once."""
        first = np.append(0, self.ends[split][:-1])  # the number of each shard's first window
        numbers = np.concatenate([np.arange(a, b, self.block_size)
                                  for a, b in zip(first, self.ends[split])])
        if max_tokens is not None:
            count = min(len(numbers), max(max_tokens // self.block_size, 1))
            numbers = numbers[np.linspace(0, len(numbers) - 1, count).round().astype(np.int64)]
        for i in range(0, len(numbers), self.batch_size):
            yield self.windows(split, numbers[i:i + self.batch_size])
        for tokens in self.tokens[split] if max_tokens is None else []:
            tail = tokens[(len(tokens) - 1) // self.block_size * self.block_size:].astype(np.int64)
            if len(tail) > 1:
                yield tail[None, :-1], tail[1:], None

    def windows(self, split, numbers):
        """The batch of the windows with these numbers, counted across all shards."""
        ids = np.empty((len(numbers), self.block_size + 1), np.int64)
        for row, number in zip(ids, numbers):
            shard = int(np.searchsorted(self.ends[split], number, side="right"))
            start = number - self.ends[split][shard - 1] if shard else number
            row[:] = self.tokens[split][shard][start:start + self.block_size + 1]
        return ids[:, :-1], ids[:, 1:].reshape(-1), None


class ChatDataset(Dataset):
    """Chats: whole conversations, each from position 0, batched with others of similar length.

    A batch has as many conversations as fit into batch_size * block_size tokens, padding included.
    Every epoch sorts by length, ties in random order, cuts at a random offset and shuffles the
    batches. Only supervised tokens are targets; in the first `prompt_loss_batches` of training,
    every token after the first is. A conversation longer than block_size + 1 is cut there, and left
    out if no target remains (`dropped` counts these).
    """

    kind = "chat"

    def __init__(self, folder, block_size, batch_size, seed=0, prompt_loss_batches=0):
        super().__init__(folder, block_size, batch_size, seed)
        self.budget = batch_size * block_size  # tokens per batch, padding included
        self.prompt_loss_batches = prompt_loss_batches
        enc = get_tokenizer(self.tokenizer)
        self.pad_id = special_ids(enc)[0]
        self.splits = {s: ChatSplit(self.tokens[s][0], block_size, enc) for s in SPLITS}
        self.turns = max(split.turns for split in self.splits.values())
        if not all(len(split.starts) for split in self.splits.values()):
            raise UserError(f"{folder}: at block_size={block_size} no conversation of a split has "
                            "any of the assistant's text; use a larger block_size")

    def batches_until(self, split, epoch):
        """Decide which rows share a batch, for all epochs before `epoch`; return the number of
        these batches."""
        chats = self.splits[split]
        while len(chats.epoch_starts) <= epoch:
            number = len(chats.epoch_starts) - 1
            rng = np.random.default_rng([self.seed, SPLITS.index(split), number])
            # Rows of similar length share a batch: sort by length, ties at random, then cut.
            order = np.lexsort((rng.random(len(chats.lengths)), chats.lengths))
            first_budget = int(rng.integers(self.budget)) + 1  # so that batch boundaries vary
            plan = cut(order, chats.lengths, self.budget, first_budget)
            chats.batches += [plan[i] for i in rng.permutation(len(plan))]
            chats.epoch_starts.append(len(chats.batches))
        return chats.epoch_starts[epoch]

    def batch_rows(self, split, index):
        """The row numbers of the index-th batch, counted from the first epoch."""
        chats = self.splits[split]
        while len(chats.batches) <= index:
            self.batches_until(split, len(chats.epoch_starts))
        return chats.batches[index]

    def epochs(self, split, index):
        """Number of epochs in the batches before `index`, as a fraction."""
        self.batch_rows(split, index)
        starts = self.splits[split].epoch_starts
        return float(np.interp(index, starts, range(len(starts))))

    def batch(self, split, index):
        """The index-th batch: ids (B, T) int64, targets (N,) int64, and loss_positions (N,), the
        flat positions b * T + t whose next tokens are the targets."""
        all_tokens = split == "train" and index < self.prompt_loss_batches
        return self.padded(split, self.batch_rows(split, index), all_tokens)

    def n_targets(self, split, index):
        """Number of targets in the index-th batch, without reading it."""
        chats, rows = self.splits[split], self.batch_rows(split, index)
        if split == "train" and index < self.prompt_loss_batches:
            return int((chats.lengths[rows] - 1).sum())
        return int(chats.n_targets[rows].sum())

    def eval_batches(self, split, max_tokens):
        """Yield fixed conversations, evenly spread, at most about max_tokens in total, in batches
        like those of batch(). max_tokens None: all of them."""
        lengths = self.splits[split].lengths
        count = len(lengths)
        if max_tokens is not None:
            count = max(1, min(count, int(max_tokens / lengths.mean())))
        rows = np.linspace(0, len(lengths) - 1, count).round().astype(np.int64)
        for batch in cut(rows[np.argsort(lengths[rows], kind="stable")], lengths, self.budget):
            yield self.padded(split, batch)

    def padded(self, split, rows, all_tokens=False):
        """The batch of these rows, padded at the end. all_tokens: questions are targets too."""
        chats = self.splits[split]
        lengths, starts = chats.lengths[rows], chats.starts[rows]
        inside = np.arange(lengths.max()) < lengths[:, None]  # (B, T + 1)
        at = np.where(inside, starts[:, None] + np.arange(lengths.max()), 0)
        ids = np.where(inside, self.tokens[split][0][at], self.pad_id).astype(np.int64)
        is_target = (inside if all_tokens else inside & chats.is_target[at])[:, 1:]
        return ids[:, :-1], ids[:, 1:][is_target], np.flatnonzero(is_target)

    def conversations(self, split):
        """The ids of every whole conversation, in the order of the file."""
        tokens = self.tokens[split][0]
        starts = np.flatnonzero(tokens == self.pad_id)
        return [ids.tolist() for ids in np.split(tokens, starts[1:])]


class ChatSplit:
    """The rows of a split (those that are not dropped), and its batches of all epochs so far."""

    def __init__(self, tokens, block_size, enc):
        end_of_text, user, _, _ = special_ids(enc)
        starts = np.flatnonzero(tokens == end_of_text)  # it opens a conversation
        lengths = np.minimum(np.diff(starts, append=len(tokens)), block_size + 1)
        self.is_target = supervised(tokens, enc)
        before = np.append(0, np.cumsum(self.is_target))  # targets before each position
        n_targets = before[starts + lengths] - before[starts]
        kept = n_targets > 0
        self.starts, self.lengths, self.n_targets = starts[kept], lengths[kept], n_targets[kept]
        self.dropped = int((~kept).sum())
        self.turns = int(np.add.reduceat(tokens == user, starts).max())  # of the longest one
        self.batches, self.epoch_starts = [], [0]  # the rows of each batch, and where epochs start


def cut(order, lengths, budget, first_budget=None):
    """Cut rows sorted by length into batches of at most `budget` tokens once padded to the longest
    row; a batch has at least one row. first_budget: a smaller budget for the first batch."""
    batches, batch, limit = [], [], first_budget or budget
    for row in order:
        n_inputs = lengths[row] - 1  # the last token is a target only
        if batch and (len(batch) + 1) * n_inputs > limit:
            batches.append(np.array(batch))
            batch, limit = [], budget
        batch.append(row)
    return batches + [np.array(batch)]
