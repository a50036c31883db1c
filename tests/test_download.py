"""The downloader against a small server on this computer that breaks off, refuses and lies."""
import contextlib
import errno
import hashlib
import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data.download
from data.download import download, sha256_of
from tests.conftest import serving

BODY = bytes(range(256)) * 40
SHA256 = hashlib.sha256(BODY).hexdigest()
CHUNK = data.download.CHUNK


class Handler(BaseHTTPRequestHandler):
    """Answers with the server's replies in turn, the last one again and again."""

    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        self.server.versions.append(self.headers["If-Range"])
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


TAG = {"ETag": '"1"'}  # by which the server knows this version of the file


def whole(wanted):
    """The whole file, whatever part of it is wanted."""
    return 200, {"Content-Length": len(BODY), **TAG}, BODY


def part(wanted):
    """What is wanted of the file, as a server does that can resume."""
    if not wanted:
        return whole(wanted)
    start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
    if start >= len(BODY):
        return 416, {"Content-Range": f"bytes */{len(BODY)}", "Content-Length": 0}, b""
    return 206, {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}",
                 "Content-Length": len(BODY) - start, **TAG}, BODY[start:]


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
    with contextlib.ExitStack() as servers:
        def start(*replies):
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.url = f"http://127.0.0.1:{server.server_port}/folder/file.bin"
            server.replies, server.ranges, server.versions = list(replies), [], []
            servers.enter_context(serving(server))
            return server

        yield start


def note(server, path, version='"1"', url=None):
    """What an earlier run noted beside the file."""
    path.with_name(path.name + ".from").write_text(f"{url or server.url}\n{version}\n", encoding="utf-8")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_good_file_arrives_whole_in_a_new_folder(tmp_path, serve):
    server = serve(whole)
    path = download(server.url, tmp_path / "new" / "file.bin", sha256=SHA256, size=len(BODY))
    assert path == tmp_path / "new" / "file.bin" and path.read_bytes() == BODY
    assert names(path.parent) == ["file.bin", "file.bin.from"] and server.ranges == [None]


def test_without_a_stated_length_the_file_is_what_comes(tmp_path, serve):
    server = serve(lambda wanted: (200, {}, BODY))
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.parametrize("headers", [{"Content-Length": 0}, {}])
def test_an_empty_answer_is_no_file(tmp_path, serve, headers):
    server = serve(lambda wanted: (200, headers, b""))
    with pytest.raises(OSError, match=f"^{re.escape(server.url)}: an empty file"):
        download(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == []


@pytest.mark.parametrize("headers, body", [
    ({"Content-Type": "text/html; charset=utf-8"}, b"<!-- please --><p>Log in.</p>"),
    ({}, b"\n<!DOCTYPE html><title>Log in</title>"), ({"Content-Type": "text/plain"}, b"<HTML>Log in")])
def test_a_page_to_log_in_is_not_the_file_and_costs_nothing_that_came(tmp_path, serve, headers, body):
    server = serve(lambda wanted: (200, {"Content-Length": len(body), **headers}, body), part)
    (tmp_path / "file.bin.part").write_bytes(BODY[:7000])
    note(server, tmp_path / "file.bin")
    with pytest.raises(OSError, match=f"^{re.escape(server.url)}: .*page.*by hand"):
        download(server.url, tmp_path / "file.bin", wait=0)
    assert len(server.ranges) == 1 and not (tmp_path / "file.bin").exists()
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert server.ranges == ["bytes=7000-"] * 2


def test_a_page_that_was_asked_for_is_a_file(tmp_path, serve):
    server = serve(lambda wanted: (200, {"Content-Type": "text/html"}, b"<html>A text."))
    url = server.url.replace("file.bin", "page.html")
    assert download(url, tmp_path / "page.html").read_bytes() == b"<html>A text."


def test_no_content_is_no_file(tmp_path, serve):
    server = serve(lambda wanted: (204, {}, b""))
    with pytest.raises(OSError, match="204"):
        download(server.url, tmp_path / "file.bin", wait=0)
    assert names(tmp_path) == []


def test_a_broken_connection_is_taken_up_where_it_stopped(tmp_path, serve):
    server = serve(cut(5000), cut(2500), part)
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256, wait=0).read_bytes() == BODY
    starts = [int(wanted[6:-1]) for wanted in server.ranges[1:]]
    assert server.ranges[0] is None and len(starts) == 2 and 0 < starts[0] <= 5000
    assert starts[0] < starts[1] <= starts[0] + 2500 and names(tmp_path) == ["file.bin", "file.bin.from"]


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
    note(server, tmp_path / "file.bin")
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY
    assert server.ranges == ["bytes=7000-"] and server.versions == ['"1"'] and names(tmp_path) == ["file.bin", "file.bin.from"]


def test_an_earlier_run_that_had_it_all_only_gives_it_its_name(tmp_path, serve):
    server = serve(part)
    (tmp_path / "file.bin.part").write_bytes(BODY)
    note(server, tmp_path / "file.bin")
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert names(tmp_path) == ["file.bin", "file.bin.from"]


def test_a_part_longer_than_the_file_is_thrown_away(tmp_path, serve):
    server = serve(part)
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    note(server, tmp_path / "file.bin")
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


def test_another_address_of_the_same_name_is_not_taken_for_it(tmp_path, serve):
    first, second = serve(whole), serve(whole)
    path = download(first.url, tmp_path / "file.bin")
    assert download(first.url, path) == path and len(first.ranges) == 1
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: came from {first.url}, not from {second.url}; move"):
        download(second.url, path)
    assert path.read_bytes() == BODY and second.ranges == []
    with pytest.raises(OSError, match="came from"):
        download(first.url + "?version=2", path)


def test_a_password_in_an_address_is_not_noted(tmp_path, serve):
    server = serve(whole)
    path = download(server.url.replace("//", "//me:secret@"), tmp_path / "file.bin")
    assert "secret" not in (tmp_path / "file.bin.from").read_text(encoding="utf-8")
    assert download(server.url, path) == path and len(server.ranges) == 1


OLD = bytes(reversed(BODY))


@pytest.mark.parametrize("version, url, replies", [
    ('"0"', None, [whole]),  # another version: If-Range makes the server send it whole
    ('"0"', None, [part, whole]),  # a server that does not know If-Range, but states the ETag
    ("", None, [whole]), ("Mon, 01 Jan 2024 00:00:00 GMT", None, [part, whole]),
    ('"1"', "http://127.0.0.1:9/folder/file.bin", [whole]),
    ('"1"', None, [lambda wanted: (206, {**part(wanted)[1], "Content-Range": f"bytes 0-99/{len(BODY)}"}, BODY[:100]),
                   whole])],  # another part than was asked for
    ids=["If-Range", "ETag", "no version", "date", "address", "Content-Range"])
def test_what_came_of_another_version_or_address_is_not_mixed_in(tmp_path, serve, version, url, replies):
    server = serve(*replies)
    (tmp_path / "file.bin.part").write_bytes(OLD[:7000])
    note(server, tmp_path / "file.bin", version, url)
    assert download(server.url, tmp_path / "file.bin", wait=0).read_bytes() == BODY
    asked = version and not url
    assert server.versions[0] == (version if asked else None) and bool(server.ranges[0]) == bool(asked)
    assert names(tmp_path) == ["file.bin", "file.bin.from"]


def test_a_date_is_a_version_where_there_is_no_strong_etag(tmp_path, serve):
    date = "Mon, 01 Jan 2024 00:00:00 GMT"

    def dated(reply):
        def answer(wanted):
            status, headers, body = reply(wanted)
            return status, {**headers, "ETag": 'W/"1"', "Last-Modified": date}, body
        return answer
    server = serve(dated(cut(5000)), dated(part))
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256, wait=0).read_bytes() == BODY
    assert server.versions == [None, date] and server.ranges[1]


def test_a_part_of_unknown_origin_is_fetched_anew(tmp_path, serve):
    server = serve(part)
    (tmp_path / "file.bin.part").write_bytes(OLD[:7000])
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY and server.ranges == [None]


def test_a_full_disk_is_one_line_that_says_what_is_kept(tmp_path, serve, monkeypatch):
    server = serve(part)
    copy = data.download.write_blocks

    def fills(blocks, part, have, total):
        copy([next(blocks)], part, have, None)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(data.download, "write_blocks", fills)
        with pytest.raises(OSError, match=r"file.bin: could not be written \(No space.*file.bin.part; free"):
            download(server.url, tmp_path / "file.bin", wait=0)
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert server.ranges == [None, "bytes=1000-"]
