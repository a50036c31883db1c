"""Writing files: complete or not at all, through links, and by one process at a time."""
import re
import subprocess
import sys

import pytest
import torch

from config import REPO, UserError
from data.datasets import read_meta
from data.files import lock_folder, new_files, write_atomically, write_json
from tests.conftest import POSIX, limit_file_size


def contents(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


@POSIX
def test_a_link_stays(tmp_path):
    target, link = tmp_path / "elsewhere" / "best.pt", tmp_path / "best.pt"
    write_atomically(target, lambda f: f.write(b"old"))
    link.symlink_to(target)
    write_atomically(link, lambda f: f.write(b"new"))
    assert link.is_symlink() and contents(target.parent) == {"best.pt": "new"}


@POSIX
def test_a_device_is_written_to_and_not_replaced(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    write_json(tmp_path / "null", 1)
    assert (tmp_path / "null").is_char_device() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, RuntimeError])
def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path, error):
    write_json(tmp_path / "a.json", "ä")

    def write(f):
        f.write(b"half")
        raise error("no more")
    with pytest.raises(error, match="no more"):
        write_atomically(tmp_path / "a.json", write)
    assert contents(tmp_path) == {"a.json": '"ä"\n'}


@pytest.mark.parametrize("write", [lambda f: f.write(bytes(90_000)), lambda f: torch.save(torch.zeros(90_000), f)])
def test_a_full_disk_is_an_oserror_and_leaves_the_earlier_file(tmp_path, write):
    write_json(tmp_path / "best.pt", 1)
    with limit_file_size(20_000), pytest.raises(OSError, match="File too large"):
        write_atomically(tmp_path / "best.pt", write)
    assert contents(tmp_path) == {"best.pt": "1\n"}


@POSIX
def test_a_locked_folder_is_refused_and_a_killed_process_leaves_no_lock(tmp_path):
    program = ("import sys, time; from data.files import lock_folder\n"
               f"with lock_folder({str(tmp_path)!r}): print('locked', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: another process"), new_files(tmp_path):
            pass
        other.kill()
    with lock_folder(tmp_path):
        assert contents(tmp_path) == {}


def test_new_files_appear_together_and_only_at_the_end(tmp_path):
    folder = tmp_path / "deep" / "out"
    write_json(folder / ".part" / "stale.bin", "of a process that was killed")
    write_json(folder / "val.bin", "old")
    with new_files(folder) as part:
        for name in ("train.bin", "meta.json", "val.bin"):
            (part / name).write_text(name, encoding="utf-8")
        assert sorted(path.name for path in folder.iterdir()) == [".part", "val.bin"]
    assert contents(folder) == {name: name for name in ("train.bin", "meta.json", "val.bin")}


def test_after_an_error_the_earlier_files_stay(tmp_path):
    write_json(tmp_path / "train.bin", "old")
    with pytest.raises(KeyError), new_files(tmp_path) as part:
        write_json(part / "train.bin", "new")
        raise KeyError
    with limit_file_size(9), pytest.raises(OSError), new_files(tmp_path) as part:
        (part / "train.bin").write_bytes(bytes(10))
    assert contents(tmp_path) == {"train.bin": '"old"\n'}


def test_a_folder_with_only_some_of_the_new_files_does_not_open(tmp_path):
    write_json(tmp_path / "meta.json", {"kind": "text", "tokenizer": "bytes", "vocab_size": 260})
    assert read_meta(tmp_path)["kind"] == "text"
    (tmp_path / "val.bin").mkdir()  # a file cannot replace it
    with pytest.raises(OSError), new_files(tmp_path) as part:
        for name in ("train.bin", "val.bin", "meta.json"):
            (part / name).write_text("new", encoding="utf-8")
    with pytest.raises(UserError, match="meta.json"):
        read_meta(tmp_path)
