"""Ctrl-C in a training: once, it is heeded where nothing is lost; twice, at once."""

import contextlib
import os
import signal
import threading


@contextlib.contextmanager
def deferred(enabled=True):
    """Inside, the first SIGINT is noted and said on stderr, and the second raises KeyboardInterrupt.

    Yields a function that says whether one was noted; whoever asks raises. If nobody did, leaving raises it. Outside
    the main thread, and where SIGINT has another handler than Python's own, or enabled is False, nothing changes.
    """
    noted: list[int] = []

    def note(signal_number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(signal_number)
        # Not print, which may have been interrupted while it held the stream's lock.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    main = threading.current_thread() is threading.main_thread()
    if not (enabled and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if noted:
        raise KeyboardInterrupt
