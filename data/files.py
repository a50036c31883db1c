"""Write files atomically, and lock folders."""
import contextlib
import json
import os
import shutil
from pathlib import Path

from config import UserError


def write_atomically(path, write):
    """Call write(f) on a new binary file, then rename it over `path`: an error, such as a full
    disk, leaves the earlier file as it was. Symlinks are kept. Raises OSError."""
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a device or pipe is not replaced
        with open(path, "wb") as f:
            return write(f)
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # torch.save's, for a failed write
        raise error.__context__ or error from None
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text as UTF-8, atomically."""
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


def write_json(path, value):
    """Write a value as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock_folder(folder):
    """Context manager: make a folder and lock other processes out of it (not on Windows). The lock
    ends with the process. Raises UserError if the folder is already locked."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if os.name == "posix":
            import fcntl
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):  # others: a file system without locks
                    raise UserError(f"{folder}: another process is writing there; wait until it "
                                    "exits, or use a different folder") from None
        yield


@contextlib.contextmanager
def new_files(folder, marker="meta.json"):
    """Context manager: yield a temporary folder, whose files are moved into `folder` at the end, or
    deleted after an error. `marker`, a file required for opening the folder, is moved last, so a
    mixture of old and new files cannot be opened. Raises UserError or OSError."""
    folder = Path(folder)
    part = folder / ".part"
    with lock_folder(folder):
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
        part.mkdir()
        try:
            yield part
            (folder / marker).unlink(missing_ok=True)
            for path in sorted(part.iterdir(), key=lambda path: path.name == marker):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
