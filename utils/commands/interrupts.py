"""Ctrl-C while a command starts: a script imports this file first, before the libraries that take time to load."""

import os
import sys
from types import TracebackType


def end_in_one_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show an error that nobody caught as Python does; but Ctrl-C as one line, with status 130."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, traceback)
    os.write(2, b"interrupted\n")
    os._exit(130)  # Python itself would end by a signal, which is another status


sys.excepthook = end_in_one_line
