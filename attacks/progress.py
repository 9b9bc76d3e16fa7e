"""How far an attack is: it reports the fraction of its work that is done, and a caller may listen."""

from collections.abc import Callable
from contextvars import ContextVar

# What is called with each fraction that is reported; by default, nothing happens.
listener: ContextVar[Callable[[float], None]] = ContextVar("listener", default=lambda fraction: None)


def report_progress(fraction: float) -> None:
    """Tell the listener that this fraction of the work is done: in [0, 1], and never smaller than the last time."""
    listener.get()(fraction)
