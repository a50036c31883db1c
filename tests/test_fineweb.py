"""data.fineweb against a local mirror of the hub, whose connections break and resume."""
import http.server
import re

import numpy as np
import pytest

import data.download
from config import UserError
from data.datasets import open_dataset
from data.fineweb import main
from tests.conftest import serving

FOLDER = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
NAMES = {"val_000.bin": "fineweb_val_000000.bin"} | {f"train_00{n}.bin": f"fineweb_train_00000{n + 1}.bin" for n in range(3)}


def shard(ids):
    """llm.c's format: 256 int32, then the ids as uint16, all little-endian."""
    header = [20240520, 1, len(ids), *[0] * 253]
    return np.array(header, "<i4").tobytes() + np.array(ids, "<u2").tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends files, honoring Range; the first server.cuts answers for each file are cut off."""

    def do_GET(self):
        self.server.asked.append(self.path.removeprefix(FOLDER))
        body = self.server.files.get(self.path.removeprefix(FOLDER))
        if body is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        is_cut = self.server.asked.count(self.server.asked[-1]) <= self.server.cuts
        self.wfile.write(body[start:start + 3000] if is_cut else body[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A mirror with three training shards; .ids has their tokens."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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


@pytest.mark.parametrize("cuts", [0, 3])
def test_shards_become_a_dataset_of_exactly_their_ids_and_a_second_run_downloads_only_new_ones(tmp_path, server, cuts):
    server.cuts = cuts
    main(["--shards=1", f"--out_dir={tmp_path}"])
    main(["--shards=3", f"--out_dir={tmp_path}"])
    assert [server.asked.count(name) for name in NAMES.values()] == [cuts + 1] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, "meta.json"])
    for name, ids in server.ids.items():
        assert np.fromfile(tmp_path / name, "<u2", offset=1024).tolist() == ids
    dataset = open_dataset(tmp_path, 64, 4)
    n_tokens = sum(len(server.ids[name]) for name in NAMES if "train" in name)
    assert (dataset.kind, dataset.vocab_size, dataset.n_tokens("train")) == ("text", 50260, n_tokens)
    assert dataset.tokens["train"][1].tolist() == server.ids["train_001.bin"]


def test_an_impossible_number_of_shards_is_refused(tmp_path):
    with pytest.raises(UserError, match="shards=104: must be at most 103"):
        main(["--shards=104", f"--out_dir={tmp_path}"])
