"""data.download against a local server that breaks connections, refuses requests, and sends wrong files."""
import contextlib
import functools
import hashlib
import http.server
import re

import pytest

import data.download
from data.download import download, hub, name_in, sha256_of
from tests.conftest import limit_file_size, serving

BODY = bytes(range(256)) * 40
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the server's answers in order, then repeats the last one."""

    def do_GET(self):
        self.server.ranges.append(self.headers["Range"])
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        status, headers, body = answer(self.headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def whole(request, body=BODY, **headers):
    """Answer with the whole file, whatever the request's Range is."""
    return 200, {"Content-Length": len(body)} | headers, body


def part(request, body=BODY, sent=None):
    """Answer with the requested range, like a server that can resume; break the connection after `sent` bytes."""
    start = int(re.fullmatch(r"bytes=(\d+)-", request["Range"] or "bytes=0-")[1])
    if start >= len(body):
        return 416, {"Content-Length": 0}, b""
    return 206 if start else 200, {"Content-Length": len(body) - start}, body[start:][:sent]


def status(code):
    return lambda request: (code, {"Content-Length": 4}, b"oops")


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, ...) starts a server and returns it; server.url is the file's, server.ranges the requested ranges."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data.download, "CHUNK", 1000)
    waits = []
    monkeypatch.setattr(data.download.time, "sleep", waits.append)
    with contextlib.ExitStack() as servers:
        def start(*answers):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            server.url = f"http://127.0.0.1:{server.server_port}/folder/file.bin?download=true"
            server.answers, server.ranges, server.waits = list(answers), [], waits
            servers.enter_context(serving(server))
            return server

        yield start


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupt(server, path):
    """Leave the files of a download that failed after 7,000 bytes."""
    server.answers = [functools.partial(part, sent=7000), status(404)]
    with pytest.raises(OSError, match="404"):
        download(server.url, path)
    assert not path.exists() and names(path.parent) == ["file.bin.part"]
    server.ranges.clear()


def test_names_and_checksums(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    assert sha256_of(*(tmp_path / name for name in "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert name_in("https://a.b/c/d.json?download=true") == "d.json" and name_in("https://a.b/") == "source"
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror/")
    assert hub() == "https://mirror"


@pytest.mark.parametrize("headers", [{"Content-Length": len(BODY)}, {}])
def test_a_file_arrives_complete_in_a_new_folder(tmp_path, serve, headers):
    server = serve(lambda request: (200, headers, BODY))
    path = download(server.url, tmp_path / "new" / "file.bin", sha256=SHA256)
    assert path == tmp_path / "new" / "file.bin" and path.read_bytes() == BODY
    assert names(path.parent) == ["file.bin"] and server.ranges == [None]


def test_a_broken_connection_resumes_where_it_stopped(tmp_path, serve):
    server = serve(*(functools.partial(part, sent=sent) for sent in (5000, 2500, None)))
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    starts = [int(requested[6:-1]) for requested in server.ranges[1:]]
    assert server.ranges[0] is None and 0 < starts[0] <= 5000 and starts[0] < starts[1] <= starts[0] + 2500
    assert names(tmp_path) == ["file.bin"] and server.waits == [1, 2]


@pytest.mark.parametrize("answer", [part, whole])  # whole: a server that ignores Range
def test_a_later_run_resumes_an_interrupted_one(tmp_path, serve, answer):
    server = serve(part)
    interrupt(server, tmp_path / "file.bin")
    server.answers = [answer]
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY
    assert re.fullmatch("bytes=[67]000-", server.ranges[0]) and len(server.ranges) == 1 and names(tmp_path) == ["file.bin"]


def test_a_part_that_is_as_long_as_the_file_is_downloaded_again(tmp_path, serve):
    server = serve(part)
    interrupt(server, tmp_path / "file.bin")
    (tmp_path / "file.bin.part").write_bytes(BODY)
    server.answers = [part]
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY
    assert server.ranges == [f"bytes={len(BODY)}-", None]


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_busy_server_is_retried(tmp_path, serve, code):
    server = serve(status(code), status(code), whole)
    assert download(server.url, tmp_path / "file.bin").read_bytes() == BODY and len(server.ranges) == 3


@pytest.mark.parametrize("answer, problem, waits", [
    (status(404), "HTTP status 404", []), (status(503), "HTTP status 503", [1, 2, 4, 8, 16]),
    (functools.partial(whole, **{"Content-Length": len(BODY) + 100}), "ChunkedEncodingError", [1, 2, 4, 8, 16])])
def test_a_server_that_cannot_send_the_file_is_an_error(tmp_path, serve, capsys, answer, problem, waits):
    server, path = serve(answer), tmp_path / "file.bin"
    with pytest.raises(OSError, match=f"^{re.escape(f'{server.url}: {problem}; try again later, or save it as {path}')}$"):
        download(server.url, path)
    assert server.waits == waits and len(server.ranges) == len(waits) + 1 and not path.exists()
    assert len(capsys.readouterr().err.splitlines()) == 1 + len(waits)


def test_an_unreachable_server_is_an_error(tmp_path, serve):
    with pytest.raises(OSError, match="^http://127.0.0.1:9/a: ConnectionError; "):
        download("http://127.0.0.1:9/a", tmp_path / "a")
    assert names(tmp_path) == []


def test_a_wrong_file_is_not_kept(tmp_path, serve):
    server = serve(whole)
    with pytest.raises(OSError, match="checksum mismatch"):
        download(server.url, tmp_path / "file.bin", sha256="0" * 64)
    assert names(tmp_path) == []


def test_a_login_page_is_not_accepted_as_the_file(tmp_path, serve):
    page = b"<!doctype html><title>Log in</title>"
    server = serve(functools.partial(whole, body=page, **{"Content-Type": "text/html; charset=utf-8"}))
    with pytest.raises(OSError, match=f"^{re.escape(server.url)}: a web page, .*file.bin$"):
        download(server.url, tmp_path / "file.bin")
    assert names(tmp_path) == [] and len(server.ranges) == 1


def test_a_file_that_exists_is_not_downloaded_again(tmp_path, serve):
    server, path = serve(whole), tmp_path / "file.bin"
    path.write_bytes(b"mine")
    assert download(server.url, path).read_bytes() == b"mine" and server.ranges == []
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: checksum mismatch"):
        download(server.url, path, sha256=SHA256)


def test_after_a_full_disk_a_later_run_resumes(tmp_path, serve):
    server = serve(part)
    with limit_file_size(4500), pytest.raises(OSError, match="File too large"):
        download(server.url, tmp_path / "file.bin")
    assert download(server.url, tmp_path / "file.bin", sha256=SHA256).read_bytes() == BODY and server.ranges[1]


def test_progress_is_shown_on_a_terminal(tmp_path, serve, capsys, monkeypatch):
    server = serve(functools.partial(whole, body=bytes(3_000_000)))
    monkeypatch.setattr(data.download.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(data.download, "CHUNK", 1_000_000)
    download(server.url, tmp_path / "file.bin")
    assert capsys.readouterr().err.split("\n", 1)[1] == "\rfile.bin: 1.0 of 3.0 MB \rfile.bin: 2.0 of 3.0 MB \rfile.bin: 3.0 of 3.0 MB \n"
