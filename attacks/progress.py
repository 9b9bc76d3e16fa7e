"""How far an attack is: it reports the fraction of its work that is done, and a caller may listen."""

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

# What is called with each fraction that is reported; by default, nothing happens.
listener: ContextVar[Callable[[float], None]] = ContextVar("listener", default=lambda fraction: None)


def report_progress(fraction: float) -> None:
    """Tell the listener that this fraction of the work is done: in [0, 1], and never smaller than the last time."""
    listener.get()(fraction)


def in_turn(items: Iterable[Item], count: int) -> Iterator[Item]:
    """Each of `count` items in turn; what is reported during an item's turn counts as a part of its share."""
    report = listener.get()
    for number, item in enumerate(items):
        token = listener.set(lambda fraction, before=number: report((before + fraction) / count))  # type: ignore[misc]
        try:
            yield item
        finally:
            listener.reset(token)
        report((number + 1) / count)
