"""data.fineweb against a small server on this computer that breaks off, and goes on where it is asked to."""
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from data.tokens import open_dataset

import data.download
from data.fineweb import main
from tests.conftest import serving

FOLDER = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
NAMES = {"val_000.bin": "fineweb_val_000000.bin", "train_000.bin": "fineweb_train_000001.bin",
         "train_001.bin": "fineweb_train_000002.bin", "train_002.bin": "fineweb_train_000003.bin"}


def shard(ids, magic=20240520, version=1, count=None):
    """A file of FineWeb, as llm.c describes it: 256 int32, then the ids as uint16, all little-endian."""
    header = [magic, version, len(ids) if count is None else count, *[0] * 253]
    return np.array(header, "<i4").tobytes() + np.array(ids, "<u2").tobytes()


class Handler(BaseHTTPRequestHandler):
    """Sends what is wanted of a file, but breaks off as often as server.cuts says for it."""

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path.removeprefix(FOLDER))
        if body is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"1"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        broken = self.server.asked.count(self.path) <= self.server.cuts
        self.server.sent = len(body) - start
        self.wfile.write(body[start:start + 3000] if broken else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A mirror of the hub with three shards to train on, which HF_ENDPOINT names; .ids are what they hold."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    rng = np.random.default_rng(0)
    server.ids = {name: rng.integers(0, 50257, 4000 + 7 * i).tolist() for i, name in enumerate(NAMES)}
    server.files = {theirs: shard(server.ids[ours]) for ours, theirs in NAMES.items()}
    server.asked, server.cuts = [], 0
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(data.download, "CHUNK", 1000)
    monkeypatch.setattr(data.download.time, "sleep", lambda seconds: None)
    with serving(server):
        yield server


def fetch(folder, shards):
    main([f"--shards={shards}", f"--out_dir={folder}"])


def assert_folder(folder, server, *names):
    """Assert that it holds these token files, exactly their ids, a right meta.json and nothing else."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "meta.json"])
    for name in names:
        assert np.fromfile(folder / name, "<u2").tolist() == server.ids[name]
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert (meta["kind"], meta["tokenizer"], meta["vocab_size"]) == ("text", "gpt2", 50260)
    for split in ("train", "val"):
        assert meta[f"{split}_tokens"] == sum(len(server.ids[name]) for name in names if split in name)


@pytest.mark.parametrize("cuts", [0, 3])
def test_the_files_hold_exactly_the_ids_however_often_the_connection_breaks(tmp_path, server, cuts):
    server.cuts = cuts
    fetch(tmp_path / "web", 2)
    assert_folder(tmp_path / "web", server, "val_000.bin", "train_000.bin", "train_001.bin")
    assert [server.asked.count(FOLDER + theirs) for theirs in NAMES.values()] == [cuts + 1] * 3 + [0]


def test_what_is_fetched_is_a_dataset_of_all_its_shards(tmp_path, server):
    fetch(tmp_path, 3)
    dataset = open_dataset(tmp_path, 64, 4)
    assert dataset.kind == "text" and dataset.vocab_size == 50260
    assert dataset.n_tokens("train") == sum(len(ids) for name, ids in server.ids.items() if "train" in name)


def test_a_second_call_downloads_nothing_and_one_for_more_only_those(tmp_path, server):
    fetch(tmp_path, 1)
    before = (tmp_path / "train_000.bin").stat().st_mtime_ns
    server.asked.clear()
    fetch(tmp_path, 1)
    assert server.asked == []
    fetch(tmp_path, 3)
    assert server.asked == [FOLDER + NAMES["train_001.bin"], FOLDER + NAMES["train_002.bin"]]
    assert (tmp_path / "train_000.bin").stat().st_mtime_ns == before
    assert_folder(tmp_path, server, *NAMES)


def test_a_call_that_broke_off_is_gone_on_with(tmp_path, server):
    body = server.files.pop(NAMES["train_001.bin"])
    with pytest.raises(OSError, match="404"):
        fetch(tmp_path, 2)
    assert np.fromfile(tmp_path / "train_000.bin", "<u2").tolist() == server.ids["train_000.bin"]
    server.files[NAMES["train_001.bin"]] = body
    raw = NAMES["train_001.bin"]  # as a kill leaves them
    (tmp_path / f"{raw}.part").write_bytes(body[:5000])
    url = f"http://127.0.0.1:{server.server_port}{FOLDER}{raw}"
    (tmp_path / f"{raw}.from").write_text(f'{url}\n"1"\n', encoding="utf-8")
    (tmp_path / "train_001.bin.part").write_bytes(b"half")
    server.asked.clear()
    fetch(tmp_path, 2)
    assert len(server.asked) == 1 and server.sent < len(body)
    assert_folder(tmp_path, server, "val_000.bin", "train_000.bin", "train_001.bin")


def test_a_shard_that_was_fetched_but_not_unpacked_is_not_fetched_again(tmp_path, server):
    for name in ("val_000.bin", "train_000.bin"):
        (tmp_path / NAMES[name]).write_bytes(server.files[NAMES[name]])
    fetch(tmp_path, 1)
    assert server.asked == []
    assert_folder(tmp_path, server, "val_000.bin", "train_000.bin")


@pytest.mark.parametrize("wrong", [
    shard([1, 2, 3], magic=20240521), shard([1, 2, 3], version=2), shard([1, 2, 3], count=4),
    shard([1, 2, 3], count=2), shard([1, 2, 3], count=-1), shard([1, 2, 3])[:-1], shard([])[:1020],
    b"\0" * 2000, b"<html>An error page.</html>", b"", b"\x28"],
    ids=["magic", "version", "more told", "fewer told", "negative", "odd", "short header", "zeros", "page",
         "empty", "one byte"])
def test_what_is_no_shard_is_refused_in_one_line_that_names_it(tmp_path, server, wrong):
    server.files[NAMES["train_000.bin"]] = wrong
    with pytest.raises((ValueError, OSError)) as caught:
        fetch(tmp_path, 1)
    line = str(caught.value)
    assert NAMES["train_000.bin"] in line and "\n" not in line
    assert not (tmp_path / "train_000.bin").exists() and not (tmp_path / "meta.json").exists()


def test_after_a_refusal_and_what_its_line_says_a_good_shard_is_taken(tmp_path, server):
    good, server.files[NAMES["train_000.bin"]] = server.files[NAMES["train_000.bin"]], shard([1], version=3)
    with pytest.raises(ValueError, match="delete it"):
        fetch(tmp_path, 1)
    (tmp_path / NAMES["train_000.bin"]).unlink()
    server.files[NAMES["train_000.bin"]] = good
    fetch(tmp_path, 1)
    assert_folder(tmp_path, server, "val_000.bin", "train_000.bin")


@pytest.mark.parametrize("count", [0, -1, 104])
def test_a_number_of_shards_that_there_is_not_is_refused_before_anything_is_fetched(tmp_path, server, count):
    with pytest.raises(ValueError, match=f"shards={count}"):
        fetch(tmp_path, count)
    assert server.asked == [] and not list(tmp_path.iterdir())


def test_the_url_is_a_setting(tmp_path, server):
    server.files = {"mine/" + name: body for name, body in server.files.items()}
    url = "{mirror}" + FOLDER + "mine/fineweb_{split}_{number:06}.bin"
    main(["--shards=1", f"--out_dir={tmp_path}", f"--url={url}"])
    assert_folder(tmp_path, server, "val_000.bin", "train_000.bin")
