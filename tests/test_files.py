"""Writing files: whole or not at all, to where a name leads, and by one process at a time."""
import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from data.tokens import read_meta

from data.files import is_special, locked, new_files, write_atomically, write_text

REPO = Path(__file__).parent.parent


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links and modes as POSIX has them")
def test_a_link_and_a_files_mode_stay_and_a_new_file_has_the_usual_mode(tmp_path):
    target, link = tmp_path / "elsewhere" / "best.pt", tmp_path / "best.pt"
    target.parent.mkdir()
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_atomically(link, lambda f: f.write(b"new"))
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert names(tmp_path) == ["best.pt", "elsewhere"] and names(target.parent) == ["best.pt"]
    (tmp_path / "usual").write_bytes(b"")
    write_atomically(tmp_path / "new", lambda f: f.write(b"new"))
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, lambda f: f.write(b"score"))
    assert os.read(reader, 100) == b"score" and pipe.is_fifo() and names(tmp_path) == ["pipe"]
    os.close(reader)
    assert is_special(Path("/dev/null")) and is_special(Path("/dev/stdout"))
    assert not is_special(tmp_path / "new") and not is_special(Path(__file__))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, RuntimeError])
def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "best.pt"
    path.write_bytes(b"old")

    def write(f):
        f.write(b"half")
        raise error("no more")
    with pytest.raises(OSError if error is RuntimeError else error):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["best.pt"]


def test_of_two_that_write_at_once_each_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.pt"

    def slow(f):
        f.write(b"slow, ")
        write_atomically(path, lambda f: f.write(b"quick"))
        assert path.read_bytes() == b"quick"
        f.write(b"whole")
    write_atomically(path, slow)
    assert path.read_bytes() == b"slow, whole" and names(tmp_path) == ["last.pt"]


def test_a_locked_folder_names_who_is_there_and_a_killed_process_leaves_no_lock(tmp_path):
    program = ("import os, sys, time; from pathlib import Path; from data.files import locked\n"
               "assert 'torch' not in sys.modules\n"  # half a second, for those who only write
               f"with locked(Path({str(tmp_path)!r})): print(os.getpid(), flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE)
    pid = other.stdout.readline().decode().strip()  # on Windows not other.pid, which is a launcher's
    with pytest.raises(OSError) as refused, locked(tmp_path):
        raise AssertionError("not reached")
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}: process {pid} has been writing there since "
                        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d; .*another folder", str(refused.value))
    other.kill()
    other.communicate()
    with locked(tmp_path):
        with pytest.raises(OSError, match=f"process {os.getpid()} "), locked(tmp_path):
            raise AssertionError("not reached")
    assert names(tmp_path) == []


def test_new_files_appear_together_and_only_after_the_block(tmp_path):
    folder = tmp_path / "deep" / "out"
    with new_files(folder) as part:
        for name in ("train.bin", "meta.json"):
            (part / name).write_text(name, encoding="utf-8")
        assert not (folder / "train.bin").exists()
        with pytest.raises(OSError, match=f"process {os.getpid()} "), new_files(folder):
            raise AssertionError("not reached")
    assert names(folder) == ["meta.json", "train.bin"]


def test_when_the_block_fails_earlier_files_stay_and_nothing_else(tmp_path):
    (tmp_path / "train.bin").write_text("old", encoding="utf-8")
    with pytest.raises(KeyError), new_files(tmp_path) as part:
        (part / "train.bin").write_text("new", encoding="utf-8")
        (part / "meta.json").write_text("new", encoding="utf-8")
        raise KeyError
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("train.bin", "old")]


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path):
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "stale.bin").write_text("stale", encoding="utf-8")
    with new_files(tmp_path) as part:
        (part / "train.bin").write_text("new", encoding="utf-8")
    assert names(tmp_path) == ["train.bin"]


@pytest.mark.parametrize("moved", range(3))
def test_a_folder_whose_files_were_half_replaced_does_not_open(tmp_path, monkeypatch, moved):
    files = "train.bin", "val.bin", "meta.json"
    for name in files:
        (tmp_path / name).write_text('{"kind": "text", "tokenizer": "old", "vocab_size": 9}', encoding="utf-8")
    real, done = os.replace, []

    def replace(*paths):
        if len(done) == moved:
            raise KeyboardInterrupt  # as a kill, but that the rest is cleaned up
        done.append(real(*paths))
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), new_files(tmp_path) as part:
        for name in files:
            (part / name).write_text("new", encoding="utf-8")
    with pytest.raises(ValueError, match="no meta.json there; prepare"):
        read_meta(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
def test_links_in_a_folder_stay_when_new_files_come(tmp_path):
    folder, disk = tmp_path / "data", tmp_path / "disk"
    folder.mkdir()
    disk.mkdir()
    for name in ("train.bin", "meta.json"):
        (folder / name).symlink_to(disk / name)
    with new_files(folder) as part:
        for name in ("train.bin", "meta.json"):
            (part / name).write_text("new", encoding="utf-8")
    for name in ("train.bin", "meta.json"):
        assert (folder / name).is_symlink() and (disk / name).read_text(encoding="utf-8") == "new"


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match=f"^{re.escape(str(tmp_path))}: could not be written.*No space.*free"):
        with new_files(tmp_path) as part:
            (part / "a").write_text("new", encoding="utf-8")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_on_windows_a_file_that_a_scanner_has_open_is_replaced_as_soon_as_it_may(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old", encoding="utf-8")
    real, refusals = os.replace, iter([True, True, False])

    def replace(source, target):
        if next(refusals):
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(OSError, match="denied"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    monkeypatch.setattr(sys, "platform", "win32")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and not list(tmp_path.glob(".a*"))
