"""Progress of a long loop: a bar in a terminal, a line every half minute in a log, both with the time that is left."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from attacks.progress import listener

SECONDS_BETWEEN_LINES = 30


def progress_bar(
    iterable: Iterable[Any] | None = None,
    *,
    title: str,
    total: int,
    unit: str,
    initial: int = 0,
    visible: bool = True,
) -> "Bar":
    """A tqdm bar on stderr in a terminal, Lines in a log. A bar with visible=False shows nothing.

    Iterate over the bar, or call its `update` with the number of units that are done, out of `total`, or use `moving`.
    initial: how many units were done before; the estimate of the time left does not count them as fast.
    A notebook gets a bar and never lines, because it stores what its cells print.
    """
    visible = visible and sys.stderr is not None
    if visible and not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return Lines(() if iterable is None else iterable, title, total, unit, initial)
    return tqdm(
        iterable,
        desc=title,
        total=total,
        unit=unit,
        initial=initial,
        leave=False,
        disable=None if visible else True,  # None lets tqdm decide: it shows a bar in a terminal only
        miniters=0,  # a bar that moves by small fractions is drawn too
        smoothing=0,  # the time left is that of the mean speed: an attack's first steps are its slowest
        bar_format="{l_bar}{bar}| {n:,.0f}/{total:,} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


@contextlib.contextmanager
def moving(bar: "Bar", units: float) -> Iterator[None]:
    """Inside, the progress that an attack reports moves the bar through its next `units`. At the end all are done.

    The bar's own progress is reported in turn, so that an evaluation moves the bar of a diagnosis.
    """
    start, report = bar.n, listener.get()

    def move(fraction: float) -> None:
        place = max(bar.n, start + units * fraction)
        bar.update(place - bar.n)
        bar.n = place  # a hidden tqdm does not count
        report(place / bar.total)

    token = listener.set(move)
    try:
        yield
    finally:
        listener.reset(token)
    move(1)


class Lines:
    """The part of tqdm's interface that this project uses, for a log: a loop of under half a minute prints nothing."""

    def __init__(self, iterable: Iterable[Any], title: str, total: int, unit: str, initial: float = 0) -> None:
        self.iterable, self.title, self.total, self.unit = iterable, title, total, unit
        self.initial = self.n = initial
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

    def update(self, count: float) -> None:
        """Count units that are done, and print a line if the last one is half a minute old."""
        self.n += count
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            words = [f"{self.title}: {self.n:,.0f} of {self.total:,} {self.unit}s in {duration(now - self.start)}"]
            if self.n > self.initial:
                left = (now - self.start) * (self.total - self.n) / (self.n - self.initial)
                words.append(f"about {duration(left)} left")
            words += [f"{name} {value}" for name, value in self.values.items()]
            print(", ".join(words), file=sys.stderr, flush=True)

    def set_postfix(self, **values: str) -> None:
        """Values to print at the end of the next line, by name."""
        self.values = values


Bar: TypeAlias = tqdm | Lines


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 1 h 40 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
