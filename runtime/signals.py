"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save, exit."""
import contextlib
import errno
import os
import signal
import sys
import time


@contextlib.contextmanager
def stop_signals():
    """Context manager: note the first SIGINT, SIGTERM or SIGHUP in the list that it yields, for
    the loop to save and end. Another one more than a second later raises KeyboardInterrupt."""
    caught, first_at = [], 0.0
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Those that a shell ignores stay ignored: SIGHUP under nohup, SIGINT behind & in a script.
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def handler(number, frame):
        nonlocal first_at
        if not caught:
            caught.append(number)
            first_at = time.monotonic()
            with contextlib.suppress(OSError):  # a terminal that is closed cannot be printed to
                print(f"\n{signal.Signals(number).name}: finishing the step, then saving (press "
                      "again to quit now)", file=sys.stderr, flush=True)
        elif time.monotonic() - first_at >= 1:  # a shell and torchrun may both pass on the first
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_on_broken_pipe(signals):
    """Context manager for printing: a reader that has left (`| head`), or a closed terminal, is
    noted as SIGPIPE in the list of stop_signals; after that nothing is printed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        signals.append(getattr(signal, "SIGPIPE", signal.SIGTERM))
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
