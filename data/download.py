"""The one downloader: weights, Alpaca, Shakespeare, FineWeb. A file gets its name only when it is
whole."""
import hashlib
import itertools
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from data.files import rename

RETRIES = 5
CHUNK = 1 << 16  # bytes read at a time; what a broken connection loses
TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next bytes


def hub():
    """The model hub's address: of huggingface.co, or of the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


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
    after 1, 2, 4 ... seconds (`wait` times that), if the server says that the file is still the
    same one. `path.from` notes the address, and by what the server knows the file again. Proxies
    are those `requests` finds in the environment. The size and the sha256 that the server states,
    or `size` and `sha256` where given, must be met before the file gets its name. Raises OSError
    with the address and what to do.
    """
    path = Path(path)
    part, note = (path.with_name(path.name + ending) for ending in (".part", ".from"))
    by_hand = f"fetch the file by hand, as {path}"
    if path.exists():
        came_from, _ = read_note(note)  # "" where there is no note: somebody put it there
        if sha256 and sha256_of(path) != sha256:
            raise OSError(f"{path}: is not the file that is known (its sha256 is another); move it "
                          "away")
        if not sha256 and came_from not in ("", without_password(url)):
            raise OSError(f"{path}: came from {came_from}, not from {without_password(url)}; move "
                          "it away, or use another folder")
        return path
    import requests  # here, so that a chat need not wait for it
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(retries + 1):
        try:
            total, stated = fetch_rest(url, part, note)
            break
        except requests.HTTPError as error:
            status = error.response.status_code
            problem = f"{status} {error.response.reason}"
            if status == 200:
                problem = "with a web page, perhaps one to log in"
            if status < 500 and status not in (408, 429):
                raise OSError(f"{url}: the server answers {problem}; check the address, or "
                              f"{by_hand}") from error
        except (requests.RequestException, ConnectionError) as error:
            problem = type(error).__name__
        except OSError as error:  # the disk's
            kept = f"; what came is kept in {part.name}" if part.exists() else ""
            raise OSError(f"{path}: could not be written ({error.strerror}){kept}; free some space "
                          "or use another folder, and run it again") from error
        if attempt == retries:
            raise OSError(f"{url}: {problem}, {retries + 1} times; run it again to go on where "
                          f"it stopped, or {by_hand}")
        print(f"{path.name}: {problem}; trying again", file=sys.stderr)
        time.sleep(wait * 2**attempt)
    if problem := what_is_wrong(part, size or total, sha256 or stated):
        part.unlink()
        note.unlink()
        raise OSError(f"{url}: {problem}; nothing was kept, try again later, or {by_hand}")
    rename(part, path)
    return path


def what_is_wrong(part, size, sha256):
    """Why the file that came is not the one that was asked for, or None. size, sha256: None where
    they are not known."""
    found = part.stat().st_size
    if size and found != size:
        return f"{found:,} bytes came, {size:,} were expected"
    if not found:
        return "an empty file came"
    if sha256 and (actual := sha256_of(part)) != sha256:
        return f"the sha256 is {actual}, expected {sha256}"
    return None


def without_password(url):
    """An address as it is noted and compared: without the name and the password of a user."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def read_note(note):
    """(address, version) that the lines of a `.from` file tell, each "" where they do not."""
    lines = note.read_text(encoding="utf-8", errors="replace").split("\n") if note.exists() else []
    return tuple((lines + ["", ""])[:2])


def delete(path):
    """Delete a file that was downloaded, and the note beside it."""
    path.unlink()
    path.with_name(path.name + ".from").unlink(missing_ok=True)


def fetch_rest(url, part, note):
    """One attempt: append to `part` what it lacks. Returns the whole size and the sha256 as the
    server states them, each None where it does not."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    came_from, version = read_note(note)
    headers = {"Accept-Encoding": "identity"}
    if have and version and came_from == without_password(url):
        # What is left of it; or where the server has another version by now, the whole file.
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, place = response.status_code, response.headers.get("Content-Range", "")
        # Nothing after what we have: it is whole, or not this file at all.
        if status == 416 and place == f"bytes */{have}":
            return have, stated_sha256(response)
        goes_on = place.startswith(f"bytes {have}-") and stated_version(response) in ("", version)
        is_other_part = status == 206 and not goes_on
        if status == 416 or is_other_part:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the partial file does not fit")
        response.raise_for_status()
        blocks = response.iter_content(CHUNK)
        first = next(blocks, b"")
        is_file = status == 206 or (status == 200 and not is_page(url, response, first))
        if not is_file:
            raise requests.HTTPError(response=response)
        if status == 200:
            have = 0
            lines = f"{without_password(url)}\n{stated_version(response)}\n"
            note.write_text(lines, encoding="utf-8")
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        write_blocks(itertools.chain([first], blocks), part, have, total)
    if total and part.stat().st_size < total:
        raise requests.ConnectionError("the connection broke")
    return total, stated_sha256(response)


def is_page(url, response, first):
    """Whether a web page came, such as one to log in, where the address names none. first: the
    answer's first bytes."""
    named = name_in(url).lower().endswith((".htm", ".html"))
    said = response.headers.get("Content-Type", "").startswith("text/html")
    return not named and (said or first.lstrip().lower().startswith((b"<!doctype html", b"<html")))


def stated_version(response):
    """By what the server knows this version of the file, for If-Range: a strong ETag or the date of
    the last change; or ""."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


def stated_sha256(response):
    """The sha256 in a model hub's X-Linked-ETag header, which may stand in a redirect, or None."""
    for r in (*response.history, response):
        tag = r.headers.get("X-Linked-ETag", "").strip('"').lower()
        if len(tag) == 64 and set(tag) <= set("0123456789abcdef"):
            return tag
    return None


def write_blocks(blocks, part, have, total):
    """Stream an answer's bytes to `part`, from byte `have` on, with a line of progress on standard
    error."""
    started, done, shown = time.monotonic(), have, 0.0
    with open(part, "r+b" if have else "wb") as f:
        f.seek(have)
        f.truncate()
        for block in blocks:
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
