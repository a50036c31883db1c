"""Download files: model weights, data sets. A file gets its name only when it is complete."""
import hashlib
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from data.files import name_in_errors

RETRIES = 5
CHUNK = 1 << 16  # bytes


def hub():
    """The URL of the model hub: huggingface.co, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def name_in(url):
    """The file name at the end of a URL."""
    return urlsplit(url).path.rpartition("/")[2] or "source"


def sha256_of(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, sha256=None, size=None):
    """Download `url` to `path`, unless that exists, and return the path. A download that was
    interrupted resumes from `path.part`. Raises OSError, also where the file does not have the
    SHA-256 or the size in bytes that are given."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists():
        if sha256 is None:
            print(f"{path}: exists, so it is not downloaded again", file=sys.stderr)
        elif sha256_of(path) != sha256:
            raise OSError(f"{path}: checksum mismatch; delete it to download it again")
        return path
    import requests  # slow
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(RETRIES + 1):
        try:
            fetch_rest(url, part)
            break
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 0)  # 0: the connection failed
            problem = f"HTTP status {status}" if status else type(error).__name__
            if attempt == RETRIES or (0 < status < 500 and status not in (408, 416, 429)):
                raise OSError(f"{url}: {problem}; try again later, or save it as {path}") from error
            print(f"{path.name}: {problem}, trying again", file=sys.stderr)
            time.sleep(2**attempt)
    part.with_suffix(".etag").unlink()
    if (size and part.stat().st_size != size) or (sha256 and sha256_of(part) != sha256):
        part.unlink()
        raise OSError(f"{url}: checksum mismatch; try again later, or save it as {path}")
    os.replace(part, path)
    return path


def fetch_rest(url, part):
    """Append to `part` the bytes that it lacks. Raises requests.RequestException or OSError."""
    import requests
    etag_file = part.with_suffix(".etag")  # the version of the file that `part` is from
    have, headers = 0, {"Accept-Encoding": "identity"}
    if part.exists() and etag_file.exists():
        have = part.stat().st_size
        # If-Range: the rest of the same version, or else the whole file.
        headers |= {"Range": f"bytes={have}-", "If-Range": etag_file.read_text("utf-8")}
    with requests.get(url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:  # `part` is not shorter than the file
            part.unlink()
        response.raise_for_status()
        is_page = response.headers.get("Content-Type", "").startswith("text/html")
        if is_page and not name_in(url).endswith((".html", ".htm")):
            raise OSError(f"{url}: a web page, perhaps to log in; save the file as "
                          f"{part.with_suffix('')}")
        if response.status_code == 200:
            have = 0
            part.unlink(missing_ok=True)  # before the ETag of another version is written
            date = response.headers.get("Last-Modified", "unknown")
            etag_file.write_text(response.headers.get("ETag", date), "utf-8")
        total = have + int(response.headers.get("Content-Length", 0))
        with name_in_errors(part), open(part, "ab" if have else "wb") as f:
            for block in response.iter_content(CHUNK):
                f.write(block)
                have += len(block)
                if sys.stderr.isatty() and (have % 2**20 < CHUNK or have == total):
                    print(f"\r{part.stem}: {have / 1e6:,.1f} of {total / 1e6:,.1f} MB ",
                          end="\n" if have == total else "", file=sys.stderr, flush=True)
