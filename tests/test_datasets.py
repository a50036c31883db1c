"""Token files and batches: every batch is recounted in plain Python from the ids of the file."""
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data.tokens import (
    ChatDataset,
    ReadAhead,
    TokenDataset,
    count_targets,
    open_dataset,
    row_categories,
    write_meta,
    write_tokens,
)

from data.tokenizer import get_tokenizer

START, USER, ASSISTANT, END = 256, 257, 258, 259  # of the bytes tokenizer
META = {"tokenizer": "bytes", "vocab_size": 260}


def text_folder(folder, train, val=None, **meta):
    """A prepared folder of plain text, from lists of ids."""
    for split, ids in (("train", train), ("val", train if val is None else val)):
        write_tokens(folder / f"{split}.bin", [ids])
    write_meta(folder, {"kind": "text", **META, **meta})
    return folder


def chat_folder(folder, train, val=None, **meta):
    """A prepared folder of chats, from lists of conversations in ids."""
    for split, conversations in (("train", train), ("val", train if val is None else val)):
        write_tokens(folder / f"{split}.bin", conversations)
    write_meta(folder, {"kind": "chat", **META, **meta})
    return folder


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def random_chats(count, longest=12, seed=0):
    """Conversations of one to three turns, all different."""
    rng = np.random.default_rng(seed)

    def text(low):
        return rng.integers(0, 256, rng.integers(low, longest)).tolist()

    chats = []
    for number in range(count):
        ids = [START]
        for turn in range(rng.integers(1, 4)):
            asked = [number // 256, number % 256] if turn == 0 else []
            ids += [USER, *asked, *text(0), END, ASSISTANT, *text(1), END]
        chats.append(ids)
    return chats


def recount(ids):
    """(position, token) of everything that the assistant is to say in a conversation."""
    said, speaking = [], False
    for position, token in enumerate(ids):
        if token in (START, USER, ASSISTANT):
            speaking = token == ASSISTANT
        elif speaking:
            said.append((position, token))
    return said


def check_chat_batch(batch, conversations, budget):
    """Assert that a batch is right in all, and return which conversations it holds."""
    ids, targets, where = batch
    rows, length = ids.shape
    assert ids.dtype == targets.dtype == where.dtype == np.int64 and rows * length <= budget
    by_start = {tuple(c[:4]): i for i, c in enumerate(conversations)}  # START, USER, its number in two bytes
    found, wanted = [], []
    for b, row in enumerate(ids.tolist()):
        number = by_start[tuple(row[:4])]
        whole = conversations[number][:length + 1]
        assert row == (whole + [START] * length)[:length]
        wanted += [(token, b * length + position - 1) for position, token in recount(whole)]
        found.append(number)
    assert list(zip(targets.tolist(), where.tolist(), strict=True)) == wanted
    assert any(len(conversations[i]) > length for i in found)  # no wider than the longest needs
    return found


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def whole_epoch(dataset, conversations, start, split="train"):
    """Read batches from `start` on until each conversation came once: the next index, and the batches."""
    seen, index, batches = [], start, []
    while len(seen) < len(conversations):
        batches.append(dataset.batch(split, index))
        seen += check_chat_batch(batches[-1], conversations, dataset.budget)
        index += 1
    assert sorted(seen) == list(range(len(conversations)))
    return index, batches


def test_tokens_are_written_as_raw_uint16(tmp_path):
    count = write_tokens(tmp_path / "a.bin", [[1, 2], np.array([65535]), [], [0, 300]])
    assert count == 5
    assert (tmp_path / "a.bin").read_bytes() == b"\x01\x00\x02\x00\xff\xff\x00\x00\x2c\x01"
    assert np.fromfile(tmp_path / "a.bin", np.uint16).tolist() == [1, 2, 65535, 0, 300]


def test_an_id_beyond_16_bits_is_refused(tmp_path):
    for ids, wrong in (([1, 65536], "65536"), ([-1], "-1")):
        with pytest.raises(ValueError, match=rf"token id {wrong}\b"):
            write_tokens(tmp_path / "a.bin", [ids])


def test_a_batch_of_text_is_runs_of_the_file_with_the_next_tokens_as_targets(tmp_path):
    train, val = random_ids(300), random_ids(300, seed=1)
    dataset = TokenDataset(text_folder(tmp_path, train, val), block_size=8, batch_size=5)
    for split, ids in (("train", train), ("val", val)):
        runs = {tuple(ids[i:i + 9]) for i in range(len(ids) - 8)}
        for index in range(20):
            x, targets, where = dataset.batch(split, index)
            assert x.shape == (5, 8) and targets.shape == (40,) and where is None
            assert x.dtype == targets.dtype == np.int64
            for row, nexts in zip(x.tolist(), targets.reshape(5, 8).tolist(), strict=True):
                assert row[1:] == nexts[:-1] and (*row, nexts[-1]) in runs


def test_batches_of_text_reach_every_window_from_the_first_to_the_last(tmp_path):
    ids = random_ids(20)
    dataset = TokenDataset(text_folder(tmp_path, ids), block_size=8, batch_size=30)
    seen = {(*row.tolist(), last) for index in range(20) for x, y, _ in [dataset.batch("train", index)]
            for row, last in zip(x, y.reshape(30, 8)[:, -1].tolist(), strict=True)}
    assert seen == {tuple(ids[i:i + 9]) for i in range(12)}


def test_read_ahead_the_batches_are_the_same_and_are_read_before_they_are_asked_for(tmp_path):
    plain, read = TokenDataset(text_folder(tmp_path, random_ids(300)), block_size=8, batch_size=5), []

    class Noted(TokenDataset):
        def batch(self, split, index):
            read.append(index)
            return super().batch(split, index)

    dataset = ReadAhead(Noted(tmp_path, block_size=8, batch_size=5), stride=2, ahead=3)
    assert (dataset.kind, dataset.n_tokens("train"), dataset.block_size) == ("text", 300, 8)
    for index in range(1, 21, 2):  # the second of two processes, a run that is resumed, and gone on with
        for found, wanted in zip(dataset.batch("train", index), plain.batch("train", index)):
            assert np.array_equal(found, wanted)
    dataset.reader.shutdown()
    assert read == list(range(1, 27, 2)), "each once, in turn, and three more than asked for"


def test_what_goes_wrong_ahead_is_told_when_its_turn_comes(tmp_path):
    def batch(split, index):
        return 10 // (2 - index)
    dataset = ReadAhead(SimpleNamespace(batch=batch), stride=1, ahead=4)
    assert [dataset.batch("train", index) for index in (0, 1)] == [5, 10]
    with pytest.raises(ZeroDivisionError):
        dataset.batch("train", 2)


def test_one_token_more_than_block_size_is_enough(tmp_path):
    ids = random_ids(9)
    dataset = TokenDataset(text_folder(tmp_path, ids), block_size=8, batch_size=2)
    x, targets, _ = dataset.batch("val", 3)
    assert x.tolist() == [ids[:8]] * 2 and targets.tolist() == ids[1:] * 2


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_batch_depends_on_seed_split_and_index_only(tmp_path, kind):
    if kind == "text":
        folder = text_folder(tmp_path, random_ids(5000))
    else:
        folder = chat_folder(tmp_path, random_chats(200))
    one, two = (open_dataset(folder, 64, 3, seed=5) for _ in range(2))
    order = [7, 60, 0, 7, 3, 200, 1, 60]
    ahead = {index: one.batch("train", index) for index in range(201)}
    for index in order:  # any order, with evaluations and the other split in between
        assert same([a for a in two.batch("train", index) if a is not None],
                    [a for a in ahead[index] if a is not None])
        two.batch("val", index)
        list(two.eval_batches("val", 500))
    other = open_dataset(folder, 64, 3, seed=6)
    for index in range(5):
        assert ahead[index][0].tolist() != ahead[index + 1][0].tolist()
        assert ahead[index][0].tolist() != other.batch("train", index)[0].tolist()
        assert ahead[index][0].tolist() != two.batch("val", index)[0].tolist()


def test_evaluation_windows_of_text_are_fixed_and_do_not_overlap(tmp_path):
    ids = list(range(104))  # each id is its own position; the last 8 have no 8 targets
    folder = text_folder(tmp_path, ids)
    for max_tokens, count in ((1, 1), (8, 1), (31, 3), (50, 6), (96, 12), (10**6, 12)):
        starts = []
        for x, targets, where in TokenDataset(folder, 8, 5).eval_batches("train", max_tokens):
            assert x.shape[0] <= 5 and where is None and targets.tolist() == (x + 1).reshape(-1).tolist()
            starts += x[:, 0].tolist()
            assert x.tolist() == [list(range(start, start + 8)) for start in x[:, 0]]
        assert len(starts) == count and all(b - a >= 8 for a, b in zip(starts, starts[1:], strict=False))
        other = TokenDataset(folder, 8, 5, seed=9)
        other.batch("train", 0)
        assert starts == [i for x, _, _ in other.eval_batches("train", max_tokens) for i in x[:, 0].tolist()]
    assert starts == list(range(0, 96, 8))  # all that there are


# Shards

def sharded(folder, *parts, val=None):
    """A prepared folder of plain text in several files: train_000.bin, train_001.bin and so on."""
    text_folder(folder, [0], parts[0] if val is None else val)
    (folder / "train.bin").unlink()
    for number, ids in enumerate(parts):
        write_tokens(folder / f"train_{number:03}.bin", [ids])
    return folder


def windows_read(batches, block_size):
    """Every window of the batches, with the token after it."""
    return [(*row, nexts[-1]) for x, y, _ in batches
            for row, nexts in zip(x.tolist(), y.reshape(-1, block_size).tolist(), strict=True)]


def test_windows_of_shards_cross_no_border_and_reach_every_place_alike(tmp_path):
    shards = [list(range(0, 20)), list(range(20, 29)), list(range(29, 60)), list(range(60, 70))]
    dataset = TokenDataset(sharded(tmp_path, *shards), block_size=8, batch_size=50)
    assert dataset.n_tokens("train") == 70 and dataset.n_tokens("val") == 20
    seen = Counter(windows_read([dataset.batch("train", i) for i in range(80)], 8))
    wanted = {tuple(ids[i:i + 9]) for ids in shards for i in range(len(ids) - 8)}
    assert seen.keys() == wanted and len(wanted) == 12 + 1 + 23 + 2
    expected = 80 * 50 / len(wanted)  # of a fair draw; 7 standard deviations are far more than chance
    assert all(abs(count - expected) < 7 * expected**0.5 for count in seen.values())


def test_evaluation_windows_of_shards_cross_no_border_and_do_not_overlap(tmp_path):
    shards = [list(range(0, 20)), list(range(20, 29)), list(range(29, 60)), list(range(60, 70))]
    dataset = TokenDataset(sharded(tmp_path, *shards), block_size=8, batch_size=3)
    every = [ids[i:i + 9] for ids in shards for i in range(0, len(ids) - 8, 8)]
    assert windows_read(dataset.eval_batches("train", 10**6), 8) == [tuple(window) for window in every]
    for max_tokens, count in ((1, 1), (16, 2), (39, 4)):
        some = windows_read(dataset.eval_batches("train", max_tokens), 8)
        assert len(some) == len(set(some)) == count and all(list(window) in every for window in some)
        assert windows_read(dataset.eval_batches("train", max_tokens), 8) == some


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_an_evaluation_of_all_has_each_token_but_a_shards_first_as_a_target_once(tmp_path, batch_size):
    lengths = (20, 9, 17, 10, 16, 25)  # whole windows of 8 and a target leave 3, 0, 0, 1, 7 and 0 over
    ends = np.cumsum(lengths).tolist()
    shards = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    dataset = TokenDataset(sharded(tmp_path, *shards), 8, batch_size)
    read, targets = [], []
    for x, y, where in dataset.eval_batches("train", None):
        assert where is None and len(x) <= batch_size and x.dtype == y.dtype == np.int64
        assert y.reshape(x.shape).tolist() == (x + 1).tolist(), "each id is its own position"
        read += [len(row) for row in x]
        targets += y.tolist()
    assert sorted(targets) == [i for ids in shards for i in ids[1:]]
    assert Counter(read) == {8: 2 + 1 + 2 + 1 + 1 + 3, 3: 1, 1: 1, 7: 1}
    assert count_targets(dataset, "train", None) == (97 - 6, 97 - 6)


def test_the_bytes_of_targets_are_those_of_their_tokens_and_special_tokens_have_none(tmp_path):
    merges = [[97, 97], [256, 98], [0xc3, 0xa9]]  # 256: aa, 257: aab, 258: é; 259 is <|endoftext|>
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pattern": "\\S+|\\s+", "merges": merges}), encoding="utf-8")
    ids = [257, 256, 98, 258, 259, 257, 0xc3, 32, 256]  # windows of 4, and no rest
    folder = text_folder(tmp_path, ids, [257, 262, 262, 262, 257], tokenizer="tokenizer.json", vocab_size=263)
    dataset = TokenDataset(folder, 4, 1)
    assert count_targets(dataset, "train", None) == (8, 2 + 1 + 2 + 0 + 3 + 1 + 1 + 2)
    assert count_targets(dataset, "train", 4) == (4, 2 + 1 + 2 + 0), "of the first window"
    assert count_targets(dataset, "val", None) == (4, 3)


def test_the_bytes_of_a_chats_targets_are_the_assistants_words(tmp_path):
    hello = [START, USER, *b"Hello", END, ASSISTANT, *"é!".encode(), END, USER, *b"?", END, ASSISTANT, *b"ok", END]
    dataset = ChatDataset(chat_folder(tmp_path, [hello, [START, USER, END, ASSISTANT, *b"abcd", END]]), 64, 2)
    assert count_targets(dataset, "train", None) == (3 + 1 + 2 + 1 + 4 + 1, 3 + 2 + 4)
    short = ChatDataset(tmp_path, 9, 2)  # cut after ten tokens: there is the first letter of an é
    assert count_targets(short, "train", None) == (1 + 4 + 1, 1 + 4)


def test_one_shard_gives_what_one_file_gives(tmp_path):
    (tmp_path / "one").mkdir()
    ids = random_ids(500)
    file = TokenDataset(text_folder(tmp_path, ids, ids[:99]), 16, 4)
    shard = TokenDataset(sharded(tmp_path / "one", ids, val=ids[:99]), 16, 4)
    for index in range(30):
        assert same(file.batch("train", index)[:2], shard.batch("train", index)[:2])
    for a, b in zip(file.eval_batches("train", 300), shard.eval_batches("train", 300), strict=True):
        assert same(a[:2], b[:2])
    assert file.epochs("train", 7) == shard.epochs("train", 7) and file.fingerprint == shard.fingerprint


def test_a_shard_too_short_for_a_window_or_of_another_vocabulary_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"train_001\.bin: 8 tokens.*block_size=8"):
        TokenDataset(sharded(tmp_path, random_ids(50), random_ids(8)), 8, 2)
    write_tokens(tmp_path / "train_001.bin", [[300] * 50])
    with pytest.raises(ValueError, match=r"train_001\.bin.*id 300\b"):
        TokenDataset(tmp_path, 8, 2)


def test_chats_in_shards_are_all_read(tmp_path):
    chats = random_chats(40)
    chat_folder(tmp_path, chats)
    (tmp_path / "train.bin").unlink()
    for number in range(2):
        write_tokens(tmp_path / f"train_{number:03}.bin", chats[20 * number:20 * number + 20])
    assert ChatDataset(tmp_path, 128, 2).conversations("train") == chats


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells how much memory is used")
def test_memory_stays_flat_over_thousands_of_batches(tmp_path):
    def used():  # bytes, without what is only mapped from the token files
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])

    ids = np.random.default_rng(0).integers(0, 256, 4_000_000)
    dataset = TokenDataset(sharded(tmp_path, ids, ids, ids, val=ids[:1000]), 256, 8)
    for index in range(300):
        dataset.batch("train", index)
    before = used()
    for index in range(300, 3300):
        x, targets, _ = dataset.batch("train", index)
    assert used() - before < 4e6 < 3000 * x.nbytes / 10


# Chats

def test_every_epoch_of_chats_has_every_conversation_once_and_exact_targets(tmp_path):
    train, val = random_chats(90), random_chats(20, seed=1)
    dataset = ChatDataset(chat_folder(tmp_path, train, val), block_size=128, batch_size=2)
    epochs, index = [], 0
    for _ in range(4):
        index, batches = whole_epoch(dataset, train, index)
        epochs.append([batch[0].tolist() for batch in batches])
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    whole_epoch(dataset, val, 0, split="val")
    assert dataset.dropped == {"train": 0, "val": 0}


def test_the_first_batches_on_request_have_every_token_for_a_target(tmp_path):
    chats = random_chats(60)
    folder = chat_folder(tmp_path, chats, random_chats(9, seed=1))
    plain, reading = (ChatDataset(folder, 128, 2, read_batches=n) for n in (0, 5))
    by_start = {tuple(chat[:4]): chat for chat in chats}
    for index in range(5):
        ids, targets, where = reading.batch("train", index)
        assert np.array_equal(ids, plain.batch("train", index)[0]), "the conversations are the same"
        wanted = [(token, b * ids.shape[1] + t) for b, row in enumerate(ids.tolist())
                  for t, token in enumerate(by_start[tuple(row[:4])][1:])]
        assert list(zip(targets.tolist(), where.tolist(), strict=True)) == wanted
    assert all(same(plain.batch("train", i), reading.batch("train", i)) for i in range(5, 20))
    assert all(same(plain.batch("val", i), reading.batch("val", i)) for i in range(3))
    for split in ("train", "val"):
        for a, b in zip(plain.eval_batches(split, 10**6), reading.eval_batches(split, 10**6), strict=True):
            assert same(a, b), "evaluation is of the answers alone"


def test_a_batch_of_chats_wastes_little_on_padding(tmp_path):
    chats = random_chats(400, longest=60)
    dataset = ChatDataset(chat_folder(tmp_path, chats), block_size=256, batch_size=8)
    _, batches = whole_epoch(dataset, chats, 0)
    padded = sum(ids.size for ids, _, _ in batches)
    assert sum(len(c) - 1 for c in chats) > 0.9 * padded


def test_a_conversation_as_long_as_the_budget_is_a_batch_of_its_own(tmp_path):
    chats = [[START, USER, 0, i, END, ASSISTANT, *[65] * 26, END] for i in range(3)]  # 33 ids each
    dataset = ChatDataset(chat_folder(tmp_path, chats), block_size=32, batch_size=1)
    _, batches = whole_epoch(dataset, chats, 0)
    assert [ids.shape for ids, _, _ in batches] == [(1, 32)] * 3


def test_a_short_block_size_cuts_conversations_and_drops_those_without_a_target(tmp_path):
    block_size = 16
    chats = random_chats(120)
    kept = [c[:block_size + 1] for c in chats if recount(c[:block_size + 1])]
    dataset = ChatDataset(chat_folder(tmp_path, chats), block_size, batch_size=4)
    assert dataset.dropped == {"train": 120 - len(kept), "val": 120 - len(kept)} and 0 < len(kept) < 120
    assert any(len(c) > block_size + 1 for c in chats if recount(c[:block_size + 1]))
    whole_epoch(dataset, kept, whole_epoch(dataset, kept, 0)[0])


def test_a_block_size_that_leaves_nothing_is_refused(tmp_path):
    folder = chat_folder(tmp_path, [[START, USER, *[65] * 50, END, ASSISTANT, 66, END]])
    with pytest.raises(ValueError, match="block_size=20"):
        ChatDataset(folder, 20, 4)


def test_evaluation_of_chats_is_fixed_without_repeats_and_whole_when_there_is_room(tmp_path):
    chats = random_chats(80)
    folder = chat_folder(tmp_path, chats)
    sizes = []
    for max_tokens in (1, 500, 10**7):
        one, two = ChatDataset(folder, 128, 2), ChatDataset(folder, 128, 2, seed=9)
        two.batch("train", 0)
        batches = list(one.eval_batches("train", max_tokens))
        assert all(same(a, b) for a, b in zip(batches, two.eval_batches("train", max_tokens), strict=True))
        numbers = [i for batch in batches for i in check_chat_batch(batch, chats, 256)]
        assert len(set(numbers)) == len(numbers)
        sizes.append(sum(len(chats[i]) for i in numbers))
    assert len(chats[0]) <= sizes[0] < 250 < sizes[1] < 750 and sizes[2] == sum(map(len, chats))


def test_conversations_come_back_whole_and_in_order(tmp_path):
    train, val = random_chats(9), random_chats(4, seed=3)
    dataset = ChatDataset(chat_folder(tmp_path, train, val), block_size=16, batch_size=4)
    assert dataset.conversations("train") == train and dataset.conversations("val") == val


def test_the_kind_in_meta_chooses_the_dataset(tmp_path):
    (tmp_path / "a").mkdir()
    text = open_dataset(text_folder(tmp_path, random_ids(50)), 8, 2)
    chat = open_dataset(chat_folder(tmp_path / "a", random_chats(5)), 64, 2)
    assert (type(text), type(chat)) == (TokenDataset, ChatDataset)
    assert text.vocab_size == chat.vocab_size == 260
    write_meta(tmp_path, {"kind": "pictures", **META})
    with pytest.raises(ValueError, match="'pictures'"):
        open_dataset(tmp_path, 8, 2)


def test_fewer_tokens_than_block_size_is_refused_with_both_numbers_and_the_flag(tmp_path):
    folder = text_folder(tmp_path, random_ids(100), random_ids(30))
    with pytest.raises(ValueError, match=r"val\.bin: 30 tokens.*block_size=32.*--block_size=29"):
        TokenDataset(folder, 32, 2)
    assert TokenDataset(folder, 29, 2).batch("val", 0)[0].shape == (2, 29)  # the advice works


@pytest.mark.parametrize("content", [b"", b"\x01\x00\x02"], ids=["empty", "odd"])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_an_empty_or_odd_sized_file_is_refused_with_its_name_and_size(tmp_path, kind, content):
    text_folder(tmp_path, random_ids(50), kind=kind)
    (tmp_path / "val.bin" if kind == "text" else tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"\.bin: {len(content)} bytes"):
        open_dataset(tmp_path, 8, 2)


def test_a_missing_token_file_is_refused_with_its_name(tmp_path):
    text_folder(tmp_path, random_ids(50))
    (tmp_path / "val.bin").unlink()
    with pytest.raises(ValueError, match=r"val\.bin"):
        open_dataset(tmp_path, 8, 2)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_ids_beyond_the_vocabulary_are_refused_with_both_numbers(tmp_path, kind):
    ids = [START, USER, 65, END, ASSISTANT, *[66] * 20, 260, END]
    (chat_folder if kind == "chat" else text_folder)(tmp_path, [ids] if kind == "chat" else ids)
    with pytest.raises(ValueError, match=r"train\.bin.*id 260\b.*has 260\b"):
        open_dataset(tmp_path, 8, 2)


def test_chats_without_a_conversation_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no conversation"):
        ChatDataset(chat_folder(tmp_path, [[65, 66, 67]]), 8, 2)


def test_a_folder_without_meta_says_how_to_prepare_one(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="prepare_alpaca.py") as caught:
            open_dataset(folder, 8, 2)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}",
                                     b'{"kind": "text", "tokenizer": "bytes"}',
                                     b'{"kind": "text", "vocab_size": 260}',
                                     b'{"tokenizer": "bytes", "vocab_size": 260}',
                                     b'{"kind": "text", "tokenizer": "bytes", "vocab_size": 0}',
                                     b'{"kind": "text", "tokenizer": "bytes", "vocab_size": 2147483648}'])
def test_a_broken_meta_is_refused_with_its_path(tmp_path, content):
    text_folder(tmp_path, random_ids(50))
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        open_dataset(tmp_path, 8, 2)
    assert str(tmp_path / "meta.json") in str(caught.value)


def test_a_tokenizer_file_is_looked_for_in_the_folder(tmp_path):
    spec = r'{"pattern": "a+|[\s\S]", "merges": [[97, 97]]}'.replace("\\", "\\\\")
    (tmp_path / "tokenizer.json").write_text(spec, encoding="utf-8")
    dataset = TokenDataset(text_folder(tmp_path, random_ids(50), tokenizer="tokenizer.json", vocab_size=261), 8, 2)
    assert get_tokenizer(dataset.tokenizer).encode_ordinary("aab") == [256, 98]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_token_file_that_is_not_as_long_as_meta_json_says_is_refused(tmp_path, kind):
    chat = [START, USER, 1, END, ASSISTANT, 2, END] * 10
    if kind == "text":
        text_folder(tmp_path, chat, train_tokens=70, val_tokens=70)
    else:
        chat_folder(tmp_path, [chat], train_tokens=70, val_tokens=70)
    open_dataset(tmp_path, 8, 2)
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[:42])  # a kill, a full disk, a copy that broke off
    with pytest.raises(ValueError, match=r"train.bin: holds 21 tokens, but meta.json says 70; .*prepare"):
        open_dataset(tmp_path, 8, 2)


A, B = [USER, 65, END], [ASSISTANT, 66, END]


@pytest.mark.parametrize("wrong", [
    [[START, *B]], [[START, *A]], [[START, *A, *A, *B]], [[START, *A, *B, *B]], [[START, *A, *B, *A]],
    [[START, USER, 65, *B]], [[START, 65, *A, *B]], [[START, *A, 65, *B]], [[START, *A, *B, 65]], [[65], [START, *A, *B]],
    [[START, *A, ASSISTANT, 66]], [[START], [START, *A, *B]], [[START, *A, *B, END]], [[START, *A, ASSISTANT, USER, END]]])
def test_chats_without_turns_are_refused(tmp_path, wrong):
    right = [START, *A, *B, *A, *B]
    for n, chats in enumerate((wrong, [right, *wrong], [*wrong, right], [right, *wrong, right])):
        folder = tmp_path / str(n)
        folder.mkdir()
        with pytest.raises(ValueError, match=r"train\.bin: .*turns"):
            ChatDataset(chat_folder(folder, chats, [right]), 16, 2)


def test_a_vocabulary_of_another_size_than_the_tokenizers_is_refused_with_both(tmp_path):
    for kind in (text_folder, chat_folder):
        kind(tmp_path, [[65] * 50], vocab_size=300)
        with pytest.raises(ValueError, match="vocab_size=300.*bytes has 260"):
            open_dataset(tmp_path, 8, 2)


@pytest.mark.parametrize("meta", [{}, {"categories": ["a"]}, {"categories": ["a"], "val_categories": [0]},
                                  {"categories": ["a"], "val_categories": [0, 1]}, {"val_categories": [0, 0]},
                                  {"categories": [3], "val_categories": [0, 0]}, {"categories": 5, "val_categories": [0, 0]}])
def test_categories_that_do_not_fit_are_one_line(tmp_path, meta):
    chat_folder(tmp_path, [[START, *A, *B]] * 2, **meta)
    with pytest.raises(ValueError, match=r"meta\.json: .*val_categories.*val\.bin; prepare"):
        row_categories(tmp_path, "val", 2)


def test_the_categories_of_rows(tmp_path):
    chat_folder(tmp_path, [[START, *A, *B]] * 2, categories=["a", "b"], val_categories=[1, 0], train_categories=[])
    assert row_categories(tmp_path, "val", 2) == ["b", "a"] and row_categories(tmp_path, "train", 2) == ["", ""]
