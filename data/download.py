"""The one downloader: weights, Alpaca, Shakespeare, FineWeb. A file gets its name only when it is
whole."""
import hashlib
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests

RETRIES = 5
CHUNK = 1 << 16  # bytes read at a time; what a broken connection loses
TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes


def sha256_of(path):
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def name_in(url):
    """The file name at the end of an address, without what follows a "?"."""
    return urlsplit(url).path.rpartition("/")[2] or "source"


def download(url, path, sha256=None, size=None, retries=RETRIES, wait=1.0):
    """Fetch `url` to `path`, unless it is there, and return the path.

    Bytes go to `path.part`; a connection that breaks is taken up where it stopped (HTTP Range),
    after 1, 2, 4 ... seconds (`wait` times that). Proxies are those `requests` finds in the
    environment. The size and the sha256 that the server states, or `size` and `sha256` where given,
    must be met before the file gets its name. Raises OSError with the address and what to do.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(retries + 1):
        try:
            total, stated = _fetch(url, part)
            break
        except requests.HTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):
                raise OSError(f"{url}: the server answers {status} {error.response.reason}; "
                              "check the address, or fetch the file by hand "
                              "and name it instead") from error
            problem = f"{status} {error.response.reason}"
        except (requests.RequestException, ConnectionError) as error:
            problem = type(error).__name__
        if attempt == retries:
            raise OSError(f"{url}: {problem}, {retries + 1} times; run it again to go on where "
                          "it stopped, or fetch the file by hand and name it instead")
        print(f"{path.name}: {problem}; trying again", file=sys.stderr)
        time.sleep(wait * 2**attempt)
    found = part.stat().st_size
    if found != (size or total or found):
        part.unlink()
        raise OSError(f"{url}: {found:,} bytes came, {size or total:,} were expected; "
                      "nothing was kept, try again")
    wanted = sha256 or stated
    if wanted and (actual := sha256_of(part)) != wanted:
        part.unlink()
        raise OSError(f"{url}: the sha256 is {actual}, expected {wanted}; "
                      "nothing was kept, try again later")
    os.replace(part, path)
    return path


def _fetch(url, part):
    """One attempt: append to `part` what it lacks. Returns the whole size and the sha256 as the
    server states them, each None where it does not."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        # Nothing after what we have: it is whole, or not this file at all.
        if response.status_code == 416:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return have, stated_sha256(response)
            part.unlink()
            raise requests.ConnectionError("the partial file does not fit")
        response.raise_for_status()
        if have and response.status_code != 206:
            have = 0  # Range was ignored: the whole file comes again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        _copy(response, part, have, total)
    if total and part.stat().st_size < total:
        raise requests.ConnectionError("the connection broke")
    return total, stated_sha256(response)


def stated_sha256(response):
    """The sha256 in a model hub's X-Linked-ETag header, which may stand in a redirect, or None."""
    for r in (*response.history, response):
        tag = r.headers.get("X-Linked-ETag", "").strip('"').lower()
        if len(tag) == 64 and set(tag) <= set("0123456789abcdef"):
            return tag
    return None


def _copy(response, part, have, total):
    """Stream a response's bytes to `part`, from byte `have` on, with a line of progress on standard
    error."""
    started, done, shown = time.monotonic(), have, 0.0
    with open(part, "r+b" if have else "wb") as f:
        f.seek(have)
        f.truncate()
        for block in response.iter_content(CHUNK):
            f.write(block)
            done += len(block)
            now = time.monotonic()
            if sys.stderr.isatty() and now - shown > 0.2:
                shown, speed = now, (done - have) / max(now - started, 1e-9)
                left = f", {(total - done) / max(speed, 1):.0f} s left" if total else ""
                of = f" of {total / 1e6:.1f}" if total else ""
                print(f"\r{part.stem}: {done / 1e6:.1f}{of} MB, {speed / 1e6:.1f} MB/s{left}   ",
                      end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
