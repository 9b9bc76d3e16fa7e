"""How far an attack is: it reports the fraction of its work that is done, and a caller may listen."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import TypeVar

Item = TypeVar("Item")

# What is called with each fraction that is reported; by default, nothing happens.
listener: ContextVar[Callable[[float], None]] = ContextVar("listener", default=lambda fraction: None)


def report_progress(fraction: float) -> None:
    """Tell the listener that this fraction of the work is done: in [0, 1], and never smaller than the last time."""
    listener.get()(fraction)


def in_turn(items: Iterable[Item], sizes: Sequence[float]) -> Iterator[Item]:
    """Each item in turn; what is reported during its turn counts as a part of its share.

    sizes: how much work each item is, in any unit, each above 0. Items without a size are left out.
    """
    report, total = listener.get(), sum(sizes)
    ends = [end / total for end in accumulate(sizes)]
    for start, end, item in zip([0.0, *ends], ends, items):  # noqa: B905, as documented
        token = listener.set(lambda fraction, a=start, b=end: report(a + (b - a) * fraction))  # type: ignore[misc]
        try:
            yield item
        finally:
            listener.reset(token)
        report(end)
