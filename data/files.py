"""Write files atomically, lock folders."""
import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
import time
from pathlib import Path


def write_atomically(path, write):
    """Call write(f) so that `path` is never half-written: to a new file beside it, to the disk,
    then renamed over it. A link stays, and what it names is replaced; the mode of an older file
    stays too. What is no file (a device, a pipe) is written to. Raises OSError (disk full, no
    permission); an older file then stays."""
    path = Path(path)
    try:
        if is_special(path):
            with open(path, "ab") as f:
                write(f)
        else:
            replace_file(Path(os.path.realpath(path)), write)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: could not be saved ({cause}); "
                      "an earlier file there is untouched") from error


def is_special(path):
    """Whether a path is no file that can be replaced: a device, a pipe, a folder."""
    in_dev = path.parent == Path("/dev")  # /dev/stdout is a file where a shell's > leads into one
    return in_dev or (path.exists() and not path.is_file())


def replace_file(path, write):
    """write_atomically, where a plain file is or will be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process has: each of two that write at once leaves a whole file.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as f:
            if path.exists():
                shutil.copymode(path, part)
            write(f)
            f.flush()
            os.fsync(f.fileno())
        rename(part, path)
    except BaseException:  # Ctrl-C among them
        part.unlink(missing_ok=True)
        raise


def rename(source, target):
    """os.replace. On Windows a virus scanner may have a new file open, so there it is tried for a
    second."""
    for _ in range(10 if sys.platform == "win32" else 0):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.1)
    os.replace(source, target)


def write_text(path, text):
    """Write a text as UTF-8; see write_atomically."""
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


def write_json(path, value):
    """Write a value as JSON; see write_atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock_folder(folder):
    """Within it no other process gets into a lock_folder() of the same folder: what two write at once
    is a mixture. Raises OSError that names the one that is there. The lock is the system's, and
    goes with its process however that ends."""
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    f = open_locked(path)
    try:
        with contextlib.suppress(OSError):  # a full disk: then nobody can read who it is
            f.truncate(0)
            f.write(f"process {os.getpid()} has been writing there since "
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')}".encode())
        yield
    finally:
        if os.name == "nt":  # which removes no file that is open, here or in another process
            f.close()
        with contextlib.suppress(OSError):
            path.unlink()
        f.close()
        if is_new:
            with contextlib.suppress(OSError):  # something was written into it
                folder.rmdir()


def open_locked(path):
    """The file `path`, open and lock_folder. Raises OSError where another process has lock_folder it."""
    while True:
        f = open(path, "ab+", buffering=0)
        try:
            lock(f)
        except (BlockingIOError, PermissionError):
            f.seek(0)
            who = f.read(200).decode("utf-8", "replace") or "another process is writing there"
            f.close()
            raise OSError(f"{path.parent}: {who}; let it end, or use another folder") from None
        except OSError:
            pass  # some network disks know no locks
        if os.fstat(f.fileno()).st_nlink:
            return f
        f.close()  # the process before removed it between our two lines


def lock(f):
    """Lock an open file, or raise OSError at once."""
    try:
        import fcntl
    except ImportError:  # Windows, where nobody else can read a byte that is lock_folder: one far behind
        import msvcrt
        f.seek(1 << 20)
        msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def new_files(folder, deciding="meta.json"):
    """A temporary folder inside `folder`; if the block succeeds all its files move up into
    `folder`, if it fails none do, and earlier files stay.

    Nothing opens a folder without the file `deciding`. It goes first and comes last, so that one
    who is killed leaves no old files among new ones that open. Raises OSError where another process
    is writing there.
    """
    folder = Path(folder)
    part = folder / ".part"
    with lock_folder(folder):
        shutil.rmtree(part, ignore_errors=True)  # of one that was killed
        part.mkdir()
        try:
            yield part
            Path(os.path.realpath(folder / deciding)).unlink(missing_ok=True)
            for path in sorted(part.iterdir(), key=lambda p: p.name == deciding):
                move_up(path, folder / path.name)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise OSError(f"{folder}: could not be written ({error.strerror}); free some space "
                          "and run it again") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def move_up(part, path):
    """Put the file `part` in the place of `path`: where that is a link, of what it names; with the
    mode of a file that is there."""
    if path.is_symlink():  # perhaps to another disk
        shutil.copyfile(part, path)
        return
    if path.exists():
        shutil.copymode(path, part)
    with open(part, "rb+") as f:
        os.fsync(f.fileno())
    rename(part, path)
