"""Download files: model weights, data sets. A file gets its final name only when it is complete."""
import hashlib
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import config

CHUNK = 1 << 18  # bytes


def hub():
    """The URL of the model hub: huggingface.co, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def name_in(url):
    """The file name at the end of a URL."""
    return urlsplit(url).path.rpartition("/")[2] or "source"


def sha256_of(*paths):
    """The SHA-256 of a file, or of several as if they were one, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()


def fetch(source, folder):
    """The path of `source`, a local file or a URL, which is downloaded into `folder`."""
    is_url = source.startswith(("http://", "https://"))
    return download(source, folder / name_in(source)) if is_url else config.local_path(source)


def download(url, path, sha256=None):
    """Download `url` to `path`, unless it exists, and return the path. An interrupted download
    resumes from `path.part`. Raises OSError, including if the SHA-256 differs."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists():
        if sha256 and sha256_of(path) != sha256:
            raise OSError(f"{path}: checksum mismatch; delete it to download it again")
        return path
    print(f"downloading {url} to {path}", file=sys.stderr)
    import requests  # slow
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait in (1, 2, 4, 8, 16, None):  # seconds
        try:
            fetch_rest(url, part)
            break
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 0)  # 0: the connection failed
            problem = f"HTTP status {status}" if status else type(error).__name__
            if wait is None or (0 < status < 500 and status not in (408, 416, 429)):
                raise OSError(f"{url}: {problem}; try again later, or save it as {path}") from error
            print(f"{path.name}: {problem}, trying again", file=sys.stderr)
            time.sleep(wait)
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise OSError(f"{url}: checksum mismatch; try again later, or save it as {path}")
    os.replace(part, path)
    return path


def fetch_rest(url, part):
    """Append the missing bytes to `part`. Raises requests.RequestException or OSError."""
    import requests
    headers = {"Accept-Encoding": "identity"}
    if part.exists():
        headers["Range"] = f"bytes={part.stat().st_size}-"
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:  # `part` is not shorter than the file
            part.unlink()
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise OSError(f"{url}: a web page, perhaps a login page; save the file as {part.stem}")
        with open(part, "ab" if response.status_code == 206 else "wb") as f:  # 206: the rest
            total = f.tell() + int(response.headers.get("Content-Length", 0))
            for block in response.iter_content(CHUNK):
                f.write(block)
                if sys.stderr.isatty():
                    print(f"\r{part.stem}: {f.tell() / 1e6:,.1f} of {total / 1e6:,.1f} MB ",
                          end="\n" if f.tell() == total else "", file=sys.stderr, flush=True)
