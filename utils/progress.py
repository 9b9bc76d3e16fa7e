"""Progress of a long loop: a bar in a terminal, a line every half minute in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30


def progress_bar(
    iterable: Iterable[Any] | None = None, *, title: str, total: int, unit: str, visible: bool = True
) -> "tqdm | Lines":
    """A tqdm bar on stderr in a terminal, Lines in a log. A bar with visible=False shows nothing.

    Iterate over the bar, or call its `update` with the number of units that are done, out of `total`.
    A notebook gets a bar and never lines, because it stores what its cells print.
    """
    visible = visible and sys.stderr is not None
    if visible and not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return Lines(() if iterable is None else iterable, title, total, unit)
    # disable=None lets tqdm decide: it shows a bar in a terminal only.
    return tqdm(iterable, desc=title, total=total, unit=unit, leave=False, disable=None if visible else True)


class Lines:
    """The part of tqdm's interface that this project uses, for a log: a loop of under half a minute prints nothing."""

    disable = False

    def __init__(self, iterable: Iterable[Any], title: str, total: int, unit: str) -> None:
        self.iterable, self.title, self.total, self.unit = iterable, title, total, unit
        self.done = 0
        self.values: dict[str, str] = {}
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, count: int) -> None:
        """Count units that are done, and print a line if the last one is half a minute old."""
        self.done += count
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            values = "".join(f", {name} {value}" for name, value in self.values.items())
            counts = f"{self.done:,} of {self.total:,} {self.unit}s, {now - self.start:.0f} s"
            print(f"{self.title}: {counts}{values}", file=sys.stderr, flush=True)

    def set_postfix(self, **values: str) -> None:
        """Values to print at the end of the next line, by name."""
        self.values = values
