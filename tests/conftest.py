"""What the tests share: one thread, GPT-2's vocabulary, short trainings, a line of an error, a server."""
import contextlib
import io
import os
import sys
import threading

import pytest

# Toy tensors are faster so. It is read when torch is first imported, which the tests do after this.
os.environ["OMP_NUM_THREADS"] = "1"
# Processes that train together meet on this machine alone, whatever its name and network are.
if os.name == "posix":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and torchrun's processes as POSIX has them")


@pytest.fixture(scope="module")
def neither_drawn_nor_measured():
    """Drawing the losses and measuring the machine take far longer than a short run itself."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda *args: None)
        patch.setattr(train, "peak_flops", lambda *args: 1e12)
        yield


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """tiktoken's GPT-2; a test that needs it is skipped where it is not on this computer."""
    from data.tokenizer import get_tokenizer
    try:
        return get_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))


def error_of_script(monkeypatch, script, flags):
    """The line that a script ends with; a text as the exit code means that line, and code 1."""
    import config
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        config.run(script.main)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    return ended.value.code


def error_of(monkeypatch, *flags):
    """The line that chat.py ends with."""
    import chat
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    return error_of_script(monkeypatch, chat, flags)


@contextlib.contextmanager
def largest_file(size):
    """Within it no file can have more bytes, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of file size are a thing of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def serving(server):
    """Within it an HTTP server answers, in a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
