"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save, exit."""
import contextlib
import errno
import os
import signal
import sys
import time


@contextlib.contextmanager
def stop_signals():
    """Context manager: note SIGINT, SIGTERM and SIGHUP in the list that it yields, for the loop to
    save and end. One that comes a second after the first raises KeyboardInterrupt."""
    caught, times = [], []

    def handler(number, frame):
        caught.append(number)
        times.append(time.monotonic())
        if len(times) == 1:
            with contextlib.suppress(OSError):  # a terminal that is closed cannot be printed to
                print(f"\n{signal.Signals(number).name}: finishing the step, then saving (press "
                      "again to quit now)", file=sys.stderr, flush=True)
        elif times[-1] - times[0] >= 1:  # a shell and torchrun may both pass on the first
            raise KeyboardInterrupt

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # Those that a shell ignores stay ignored: SIGHUP under nohup, SIGINT behind & in a script.
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_on_broken_pipe(signals):
    """Context manager for printing: where the reader has left (`| head`, a closed terminal), add
    SIGPIPE to the list of stop_signals, and print nothing from then on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        signals.append(getattr(signal, "SIGPIPE", signal.SIGTERM))
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
