"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save, exit."""
import contextlib
import errno
import os
import signal
import sys
import time


@contextlib.contextmanager
def stop_signals():
    """Context manager: yield a list that collects SIGINT, SIGTERM and SIGHUP, so that the loop can
    save and stop. A signal a second or more after the first raises KeyboardInterrupt."""
    caught, times = [], []

    def handler(number, frame):
        caught.append(number)
        times.append(time.monotonic())
        if len(times) == 1:
            with contextlib.suppress(OSError):  # printing to a closed terminal fails
                print(f"\n{signal.Signals(number).name}: finishing the step, then saving "
                      "(Ctrl-C now quits immediately)", file=sys.stderr, flush=True)
        elif times[-1] - times[0] >= 1:  # a shell and torchrun may both send the first
            raise KeyboardInterrupt

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # Ignored signals stay ignored: SIGHUP under nohup, SIGINT of a background job in a script.
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_on_broken_pipe(signals):
    """Context manager for printing: if the reader has exited (`| head`, a closed terminal), add
    SIGPIPE to the list of stop_signals, and discard all later output."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        signals.append(getattr(signal, "SIGPIPE", signal.SIGTERM))
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
