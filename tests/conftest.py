"""Shared by the tests: one thread, GPT-2's vocabulary, error messages, a full disk, HTTP servers."""
import contextlib
import os
import sys
import threading

import pytest

from config import UserError

# One thread is faster for toy tensors. torch reads this on import, so it is set before that.
os.environ["OMP_NUM_THREADS"] = "1"
if os.name == "posix":  # ranks connect on this machine only
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, pipes, links, locks and torchrun")


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """Return tiktoken's GPT-2 encoding; skip the test if it is not on this computer."""
    from data.tokenizer import get_tokenizer
    try:
        return get_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(str(error))


def error_of_script(monkeypatch, script, flags):
    """Run a script that fails; return its one-line error."""
    import config
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        config.run(script.main)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code  # then the exit code is 1
    return ended.value.code


@contextlib.contextmanager
def limit_file_size(size):
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
