"""Shared by the tests: one thread, GPT-2's vocabulary, short trainings, error lines, a full disk, HTTP servers."""
import contextlib
import io
import os
import sys
import threading

import pytest

from config import UserError

# Faster for toy tensors. Set before the tests import torch, which reads it then.
os.environ["OMP_NUM_THREADS"] = "1"
if os.name == "posix":  # processes that train together connect on this machine only
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, pipes, links, locks and torchrun")


@pytest.fixture(scope="module")
def neither_drawn_nor_measured():
    """Skip the plot and the measurement of peak FLOP/s, which take far longer than a toy training."""
    import runtime.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.report.plot_losses", lambda *args: None)
        patch.setattr(runtime.log, "peak_flops", lambda *args: 1e12)
        yield


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """tiktoken's GPT-2; skips the test if it is not on this computer."""
    from data.tokenizer import get_tokenizer
    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


def error_of_script(monkeypatch, script, flags):
    """Return the one line that a script ends with."""
    import config
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        config.run(script.main)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code  # then the exit code is 1
    return ended.value.code


def error_of(monkeypatch, *flags):
    """Return the one line that chat.py ends with."""
    import chat
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    return error_of_script(monkeypatch, chat, flags)


@contextlib.contextmanager
def largest_file(size):
    """Context manager: limit the size of files in bytes, to act like a full disk."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def serving(server):
    """Context manager: run an HTTP server in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
