"""Token files and batches: every batch is recomputed in plain Python from the ids of the file."""
import json
from collections import Counter

import numpy as np
import pytest

from config import UserError
from data.datasets import (
    ChatDataset,
    TextDataset,
    count_targets,
    open_dataset,
    row_categories,
    write_meta,
    write_tokens,
)
from data.tokenizer import get_tokenizer

START, USER, ASSISTANT, END = 256, 257, 258, 259  # of the bytes tokenizer
SHARDS = [list(range(0, 20)), list(range(20, 29)), list(range(29, 60)), list(range(60, 70))]  # each id is its position


def make_folder(folder, kind, train, val=None, /, **meta):
    folder.mkdir(exist_ok=True)
    for split, ids in (("train", train), ("val", train if val is None else val)):
        write_tokens(folder / f"{split}.bin", ids if kind == "chat" else [ids])
    write_meta(folder, {"kind": kind, "tokenizer": "bytes", "vocab_size": 260, **meta})
    return folder


def sharded(folder, *parts):
    make_folder(folder, "text", [0], parts[0])
    (folder / "train.bin").unlink()
    for number, ids in enumerate(parts):
        write_tokens(folder / f"train_{number:03}.bin", [ids])
    return folder


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def random_chats(count, longest=12, seed=0):
    """Conversations of one to three turns, all different."""
    rng = np.random.default_rng(seed)
    text = lambda low: rng.integers(0, 256, rng.integers(low, longest)).tolist()  # noqa: E731
    chats = []
    for number in range(count):
        ids = [START]
        for turn in range(rng.integers(1, 4)):
            asked = [number // 256, number % 256] if turn == 0 else []
            ids += [USER, *asked, *text(0), END, ASSISTANT, *text(1), END]
        chats.append(ids)
    return chats


def recount(ids):
    """Return (position, token) of each target in a conversation."""
    found, speaking = [], False
    for position, token in enumerate(ids):
        if token in (START, USER, ASSISTANT):
            speaking = token == ASSISTANT
        elif speaking:
            found.append((position, token))
    return found


def check_chat_batch(batch, conversations, budget):
    """Assert that a batch is correct, and return which conversations it contains."""
    ids, targets, positions = batch
    rows, length = ids.shape
    assert ids.dtype == targets.dtype == positions.dtype == np.int64 and rows * length <= budget
    by_start = {tuple(c[:4]): i for i, c in enumerate(conversations)}  # START, USER, its number in two bytes
    found, wanted = [], []
    for b, row in enumerate(ids.tolist()):
        number = by_start[tuple(row[:4])]
        whole = conversations[number][:length + 1]
        assert row == (whole + [START] * length)[:length]
        wanted += [(token, b * length + position - 1) for position, token in recount(whole)]
        found.append(number)
    assert list(zip(targets.tolist(), positions.tolist(), strict=True)) == wanted
    assert any(len(conversations[i]) > length for i in found)  # no wider than the longest needs
    return found


def dropped(dataset):
    return [split.dropped for split in dataset.splits.values()]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def whole_epoch(dataset, conversations, start, split="train"):
    """Read batches from `start` until each conversation has occurred once; return the next index, and the batches."""
    seen, index, batches = [], start, []
    while len(seen) < len(conversations):
        batches.append(dataset.batch(split, index))
        assert dataset.n_targets(split, index) == batches[-1][1].size
        seen += check_chat_batch(batches[-1], conversations, dataset.budget)
        index += 1
    assert sorted(seen) == list(range(len(conversations)))
    return index, batches


def windows(batches, block_size):
    """Return every window of these batches of text, with the token after it."""
    return [(*row, nexts[-1]) for x, y, _ in batches
            for row, nexts in zip(x.tolist(), y.reshape(-1, block_size).tolist(), strict=True)]


def test_tokens_are_written_as_raw_uint16(tmp_path):
    assert write_tokens(tmp_path / "a.bin", [[1, 2], np.array([65535]), [], [0, 300]]) == 5
    assert (tmp_path / "a.bin").read_bytes() == b"\x01\x00\x02\x00\xff\xff\x00\x00\x2c\x01"
    with pytest.raises(OverflowError):
        write_tokens(tmp_path / "a.bin", [[1, 65536]])


def test_a_batch_of_text_is_windows_of_the_file_with_the_next_tokens_as_targets(tmp_path):
    train, val = random_ids(300), random_ids(300, seed=1)
    dataset = TextDataset(make_folder(tmp_path, "text", train, val), block_size=8, batch_size=5)
    for split, ids in (("train", train), ("val", val)):
        runs = {tuple(ids[i:i + 9]) for i in range(len(ids) - 8)}
        for index in range(20):
            x, targets, positions = dataset.batch(split, index)
            assert x.shape == (5, 8) and x.dtype == targets.dtype == np.int64 and positions is None
            assert targets.shape == (dataset.n_targets(split, index),) == (40,)
            assert all(row.tolist()[1:] == nexts.tolist()[:-1] for row, nexts in zip(x, targets.reshape(5, 8)))
            assert set(windows([(x, targets, None)], 8)) <= runs
    assert dataset.epochs("train", 15) == 15 * 40 / 300


def test_windows_of_shards_are_drawn_uniformly_and_do_not_cross_files(tmp_path):
    dataset = TextDataset(sharded(tmp_path, *SHARDS), block_size=8, batch_size=50)
    assert dataset.n_tokens("train") == 70 and dataset.n_tokens("val") == 20
    seen = Counter(windows([dataset.batch("train", i) for i in range(80)], 8))
    wanted = {tuple(ids[i:i + 9]) for ids in SHARDS for i in range(len(ids) - 8)}
    assert seen.keys() == wanted and len(wanted) == 12 + 1 + 23 + 2
    expected = 80 * 50 / len(wanted)  # if drawn uniformly; 7 standard deviations are far more than chance
    assert all(abs(count - expected) < 7 * expected**0.5 for count in seen.values())


def test_evaluation_windows_are_fixed_and_do_not_overlap(tmp_path):
    folder = sharded(tmp_path, *SHARDS)
    every = [tuple(ids[i:i + 9]) for ids in SHARDS for i in range(0, len(ids) - 8, 8)]
    for max_tokens, count in ((1, 1), (16, 2), (39, 4), (10**6, len(every))):
        one, two = TextDataset(folder, 8, 3), TextDataset(folder, 8, 5, seed=9)
        two.batch("train", 0)
        some = windows(one.eval_batches("train", max_tokens), 8)
        assert len(some) == len(set(some)) == count and set(some) <= set(every)
        assert some == windows(two.eval_batches("train", max_tokens), 8)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_full_evaluation_has_every_token_except_a_shards_first_as_a_target_once(tmp_path, batch_size):
    lengths = (20, 9, 17, 10, 16, 25)  # windows of 8 leave tails of 3, 0, 0, 1, 7 and 0 targets
    ends = np.cumsum(lengths).tolist()
    shards = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    dataset = TextDataset(sharded(tmp_path, *shards), 8, batch_size)
    read, targets = [], []
    for x, y, positions in dataset.eval_batches("train", None):
        assert positions is None and len(x) <= batch_size and x.dtype == y.dtype == np.int64
        assert y.reshape(x.shape).tolist() == (x + 1).tolist(), "each id is its own position"
        read += [len(row) for row in x]
        targets += y.tolist()
    assert sorted(targets) == [i for ids in shards for i in ids[1:]]
    assert Counter(read) == {8: 2 + 1 + 2 + 1 + 1 + 3, 3: 1, 1: 1, 7: 1}
    assert count_targets(dataset, "train", None) == (97 - 6, 97 - 6)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_batch_depends_on_seed_split_and_index_only(tmp_path, kind):
    folder = make_folder(tmp_path, kind, random_ids(5000) if kind == "text" else random_chats(200))
    one, two, other = (open_dataset(folder, 64, 3, seed=seed) for seed in (5, 5, 6))
    ahead = {index: one.batch("train", index)[:2] for index in range(201)}
    for index in (7, 60, 0, 7, 3, 200, 1, 60):  # any order, with evaluations and the other split in between
        assert same(two.batch("train", index)[:2], ahead[index])
        two.batch("val", index)
        list(two.eval_batches("val", 500))
    for index in range(5):
        batches = [ahead[index][0], ahead[index + 1][0], other.batch("train", index)[0], two.batch("val", index)[0]]
        assert not any(np.array_equal(batches[0], batch) for batch in batches[1:])


def test_the_bytes_of_targets_are_those_of_their_text_and_special_tokens_have_none(tmp_path):
    merges = [[97, 97], [256, 98], [0xc3, 0xa9]]  # 256: aa, 257: aab, 258: é; 259 is <|endoftext|>
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pattern": "\\S+|\\s+", "merges": merges}), encoding="utf-8")
    ids = [257, 256, 98, 258, 259, 257, 0xc3, 32, 256]  # windows of 4, and no tail
    dataset = TextDataset(make_folder(tmp_path, "text", ids, tokenizer="tokenizer.json", vocab_size=263), 4, 1)
    assert count_targets(dataset, "train", None) == (8, 2 + 1 + 2 + 0 + 3 + 1 + 1 + 2)
    assert count_targets(dataset, "train", 4) == (4, 2 + 1 + 2 + 0), "of the first window"
    assert get_tokenizer(dataset.tokenizer).encode_ordinary("aab") == [257]
    hello = [START, USER, *b"Hello", END, ASSISTANT, *"é!".encode(), END, USER, *b"?", END, ASSISTANT, *b"ok", END]
    folder = make_folder(tmp_path / "chat", "chat", [hello, [START, USER, END, ASSISTANT, *b"abcd", END]])
    assert count_targets(ChatDataset(folder, 64, 2), "train", None) == (3 + 1 + 2 + 1 + 4 + 1, 3 + 2 + 4)
    assert count_targets(ChatDataset(folder, 9, 2), "train", None) == (1 + 4 + 1, 1 + 4), "cut inside the é"


def test_every_epoch_has_every_conversation_once_and_exact_targets(tmp_path):
    train, val = random_chats(90), random_chats(20, seed=1)
    dataset = ChatDataset(make_folder(tmp_path, "chat", train, val), block_size=128, batch_size=2)
    epochs, index = [], 0
    for epoch in range(4):
        assert dataset.batches_until("train", epoch) == index and dataset.epochs("train", index) == epoch
        index, batches = whole_epoch(dataset, train, index)
        epochs.append([batch[0].tolist() for batch in batches])
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    whole_epoch(dataset, val, 0, split="val")
    assert dropped(dataset) == [0, 0] and dataset.turns == 3
    assert dataset.conversations("train") == train and dataset.conversations("val") == val


def test_with_prompt_loss_batches_every_token_of_the_first_batches_is_a_target(tmp_path):
    chats = random_chats(60)
    folder = make_folder(tmp_path, "chat", chats, random_chats(9, seed=1))
    plain, reading = (ChatDataset(folder, 128, 2, prompt_loss_batches=n) for n in (0, 5))
    by_start = {tuple(chat[:4]): chat for chat in chats}
    for index in range(5):
        ids, targets, positions = reading.batch("train", index)
        assert np.array_equal(ids, plain.batch("train", index)[0]), "the conversations are the same"
        wanted = [(token, b * ids.shape[1] + t) for b, row in enumerate(ids.tolist())
                  for t, token in enumerate(by_start[tuple(row[:4])][1:])]
        assert list(zip(targets.tolist(), positions.tolist(), strict=True)) == wanted
        assert reading.n_targets("train", index) == len(wanted)
    assert all(same(plain.batch("train", i), reading.batch("train", i)) for i in range(5, 20))
    assert all(same(plain.batch("val", i), reading.batch("val", i)) for i in range(3))
    assert same(*(next(d.eval_batches("train", 10**6)) for d in (plain, reading))), "evaluation covers answers only"


def test_a_batch_has_little_padding(tmp_path):
    chats = random_chats(400, longest=60)
    dataset = ChatDataset(make_folder(tmp_path, "chat", chats), block_size=256, batch_size=8)
    _, batches = whole_epoch(dataset, chats, 0)
    assert sum(len(c) - 1 for c in chats) > 0.9 * sum(ids.size for ids, _, _ in batches)


def test_a_short_block_size_cuts_conversations_and_drops_those_without_a_target(tmp_path):
    chats = random_chats(120)
    kept = [c[:17] for c in chats if recount(c[:17])]
    dataset = ChatDataset(make_folder(tmp_path, "chat", chats), 16, batch_size=4)
    assert dropped(dataset) == [120 - len(kept)] * 2 and 0 < len(kept) < 120
    assert any(len(c) > 17 for c in chats if recount(c[:17])) and dataset.conversations("train") == chats
    whole_epoch(dataset, kept, whole_epoch(dataset, kept, 0)[0])


def test_evaluation_of_chats_is_fixed_without_repeats_and_complete_if_max_tokens_allows(tmp_path):
    chats, sizes = random_chats(80), []
    folder = make_folder(tmp_path, "chat", chats)
    for max_tokens in (1, 500, 10**7, None):
        one, two = ChatDataset(folder, 128, 2), ChatDataset(folder, 128, 2, seed=9)
        two.batch("train", 0)
        batches = list(one.eval_batches("train", max_tokens))
        assert all(same(a, b) for a, b in zip(batches, two.eval_batches("train", max_tokens), strict=True))
        numbers = [i for batch in batches for i in check_chat_batch(batch, chats, 256)]
        assert len(set(numbers)) == len(numbers)
        sizes.append(sum(len(chats[i]) for i in numbers))
    assert len(chats[0]) <= sizes[0] < 250 < sizes[1] < 750 and sizes[2] == sizes[3] == sum(map(len, chats))


CHAT = [START, USER, 1, END, ASSISTANT, 2, END] * 10


@pytest.mark.parametrize("kind, train, meta, part", [
    ("text", random_ids(32), {}, r"train: 32 tokens.*block_size=32.*--block_size=31"),
    ("chat", [[START, USER, *[65] * 50, END, ASSISTANT, 66, END]], {}, "block_size=32 no conversation"),
    ("text", [65] * 40 + [260], {}, r"train\.bin: 41 tokens with ids up to 260 do not match meta.json; prepare"),
    ("chat", [CHAT + [260]], {}, "up to 260"), ("text", CHAT, {"train_tokens": 71}, r"train\.bin: 70 tokens")])
def test_a_folder_that_does_not_fit_gives_a_one_line_error_that_names_it(tmp_path, kind, train, meta, part):
    make_folder(tmp_path, kind, train, **meta)
    with pytest.raises(UserError, match=part) as caught:
        open_dataset(tmp_path, 32, 2)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, part", [
    ("train.bin", None, r"train\.bin: 0 tokens"), ("meta.json", None, "prepare_alpaca.py"), *[("meta.json", content, "meta.json: cannot be read: .*prepare") for content in (
        b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}")]])
def test_a_missing_or_broken_file_is_named(tmp_path, name, content, part):
    path = make_folder(tmp_path, "text", random_ids(33)) / name
    assert open_dataset(tmp_path, 32, 2).batch("train", 0)[0].shape == (2, 32)  # one window is enough
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=part):
        open_dataset(tmp_path, 32, 2)


def test_the_categories_of_rows(tmp_path):
    make_folder(tmp_path, "chat", [CHAT], categories=["a", "b"], val_categories=[1, 0], train_categories=[])
    assert row_categories(tmp_path, "val", 2) == ["b", "a"] and row_categories(tmp_path, "train", 2) == ["", ""]
