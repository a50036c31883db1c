"""The downloader against a small server on this computer that breaks off, refuses and lies."""
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data.download
from data.download import download, sha256_of

BODY = bytes(range(256)) * 40
SHA256 = hashlib.sha256(BODY).hexdigest()
CHUNK = data.download.CHUNK


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's replies in turn, the last one again and again."""

    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        status, headers, body = reply(self.headers["Range"])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def whole(wanted):
    """The whole file, whatever part of it is wanted."""
    return 200, {"Content-Length": len(BODY)}, BODY


def part(wanted):
    """What is wanted of the file, as a server does that can resume."""
    if not wanted:
        return whole(wanted)
    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
    if start >= len(BODY):
        return 416, {"Content-Range": f"bytes */{len(BODY)}", "Content-Length": 0}, b""
    return 206, {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}",
                 "Content-Length": len(BODY) - start}, BODY[start:]


def cut(count):
    """A reply that breaks off after `count` bytes of what `part` would send."""
    def reply(wanted):
        status, headers, body = part(wanted)
        return status, headers, body[:count]
    return reply


def status(code):
    return lambda wanted: (code, {"Content-Length": 4}, b"oops")


@pytest.fixture
def serve(monkeypatch):
    """serve(reply, ...) starts a server and returns it; server.url is the file's address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data.download, "CHUNK", 1000)
    servers = []

    def start(*replies):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.url = f"http://127.0.0.1:{server.server_port}/folder/file.bin"
        server.replies, server.ranges = list(replies), []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_good_file_arrives_whole_in_a_new_folder(tmp_path, serve):
    server = serve(whole)
    path = download(server.url, tmp_path / "new" / "file.bin", sha256=SHA256, size=len(BODY))
    assert path == tmp_path / "new" / "file.bin" and path.read_bytes() == BODY
    assert names(path.parent) == ["file.bin"] and server.ranges == [None]


def test_without_a_stated_length_the_file_is_what_comes(tmp_path, serve):
    server = serve(lambda wanted: (200, {}, BODY))
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY


def test_an_empty_file_is_a_file(tmp_path, serve):
    server = serve(lambda wanted: (200, {"Content-Length": 0}, b""))
    assert download(server.url, tmp_path / "file.bin").read_bytes() == b""


def test_a_broken_connection_is_taken_up_where_it_stopped(tmp_path, serve):
    server = serve(cut(5000), cut(2500), part)
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256, wait=0).read_bytes() == BODY
    starts = [int(wanted[6:-1]) for wanted in server.ranges[1:]]
    assert server.ranges[0] is None and len(starts) == 2 and 0 < starts[0] <= 5000
    assert starts[0] < starts[1] <= starts[0] + 2500 and names(tmp_path) == ["file.bin"]


def test_a_line_that_breaks_every_half_megabyte_gets_on(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(data.download, "CHUNK", CHUNK)
    monkeypatch.setitem(globals(), "BODY", BODY * 120)  # 1.2 MB
    server = serve(cut(500_000), cut(500_000), cut(500_000), part)
    assert download(server.url, tmp_path / "file.bin", wait=0).read_bytes() == BODY
    starts = [int(wanted[6:-1]) for wanted in server.ranges[1:] if wanted]
    assert len(starts) >= 2 and 300_000 < starts[0] <= 500_000 < starts[1]


def test_an_earlier_run_is_gone_on_with(tmp_path, serve):
    server = serve(part)
    (tmp_path / "file.bin.part").write_bytes(BODY[:7000])
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY
    assert server.ranges == ["bytes=7000-"] and names(tmp_path) == ["file.bin"]


def test_an_earlier_run_that_had_it_all_only_gives_it_its_name(tmp_path, serve):
    server = serve(part)
    (tmp_path / "file.bin.part").write_bytes(BODY)
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]


def test_a_part_longer_than_the_file_is_thrown_away(tmp_path, serve):
    server = serve(part)
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    assert download(server.url, tmp_path / "file.bin", wait=0).read_bytes() == BODY
    assert len(server.ranges) == 2 and server.ranges[1] is None


def test_a_server_that_ignores_range_sends_the_whole_file_again(tmp_path, serve):
    server = serve(cut(5000), whole)
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256, wait=0).read_bytes() == BODY
    assert server.ranges[1].startswith("bytes=")


def test_404_is_one_error_and_no_second_try(tmp_path, serve):
    server = serve(status(404))
    with pytest.raises(OSError, match=f"^{re.escape(server.url)}.*404") as caught:
        download(server.url, tmp_path / "file.bin", wait=0)
    assert "\n" not in str(caught.value) and len(server.ranges) == 1 and names(tmp_path) == []


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_busy_server_is_asked_again(tmp_path, serve, code):
    server = serve(status(code), status(code), whole)
    assert download(server.url, tmp_path / "file.bin", wait=0).read_bytes() == BODY
    assert len(server.ranges) == 3


def test_a_server_that_stays_busy_is_given_up_after_ever_longer_waits(tmp_path, serve, monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(data.download.time, "sleep", waits.append)
    server = serve(status(503))
    with pytest.raises(OSError, match="503") as caught:
        download(server.url, tmp_path / "file.bin", retries=3, wait=0.5)
    assert len(server.ranges) == 4 and waits == [0.5, 1, 2] and names(tmp_path) == []
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_server_that_nobody_runs_is_given_up(tmp_path, serve):
    server = serve(whole)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match=re.escape(server.url)):
        download(server.url, tmp_path / "file.bin", retries=1, wait=0)
    assert names(tmp_path) == []


def test_a_wrong_sha256_keeps_nothing(tmp_path, serve):
    server = serve(whole)
    with pytest.raises(OSError, match=f"{SHA256}.*{'0' * 64}"):
        download(server.url, tmp_path / "file.bin", sha256="0" * 64)
    assert names(tmp_path) == []


@pytest.mark.parametrize("tag, fits", [(SHA256, True), ("0" * 64, False), ("no sha256", True)])
def test_a_sha256_that_the_servers_redirect_states_must_be_met(tmp_path, serve, tag, fits):
    headers = {"Location": "/real", "X-Linked-ETag": f'"{tag}"', "Content-Length": 0}
    server = serve(lambda wanted: (302, headers, b""), whole)
    if fits:
        assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY
    else:
        with pytest.raises(OSError, match=SHA256):
            download(server.url, tmp_path / "file.bin")
        assert names(tmp_path) == []


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1, 3 * len(BODY)])
def test_a_wrong_size_keeps_nothing(tmp_path, serve, size):
    server = serve(whole)
    with pytest.raises(OSError, match=f"10,240.*{size:,}"):
        download(server.url, tmp_path / "file.bin", size=size, wait=0)
    assert names(tmp_path) == []


def test_a_file_shorter_than_stated_never_gets_its_name(tmp_path, serve):
    server = serve(lambda wanted: (200, {"Content-Length": len(BODY) + 100}, BODY))
    with pytest.raises(OSError, match=re.escape(server.url)):
        download(server.url, tmp_path / "file.bin", retries=2, wait=0)
    assert len(server.ranges) == 3 and "file.bin" not in names(tmp_path)


def test_a_file_that_is_there_is_not_fetched_again(tmp_path, serve):
    server = serve(whole)
    (tmp_path / "file.bin").write_bytes(b"mine")
    assert download(server.url, tmp_path / "file.bin").read_bytes() == b"mine" and server.ranges == []
