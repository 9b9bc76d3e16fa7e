"""How far a loop is: a bar in a terminal, a line now and then in a log."""

import sys
import time

from tqdm.auto import tqdm

EVERY = 30  # seconds between two lines of a log


def progress(iterable=None, *, title, total, unit, shown=True):
    """A tqdm bar on stderr or, where that is no terminal, Lines; something that shows nothing unless `shown`.

    Iterated over, or told by `update` of `total` units. Notebooks keep what their cells show, and get no lines.
    """
    shown = shown and sys.stderr is not None
    if shown and not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        return Lines(iterable, title, total, unit)
    return tqdm(iterable, desc=title, total=total, unit=unit, leave=False, disable=None if shown else True)


class Lines:
    """What of tqdm is used here, for a log: a line every half minute, and so none of a short loop."""

    disable = False

    def __init__(self, iterable, title, total, unit):
        self.iterable, self.title, self.total, self.unit = iterable, title, total, unit
        self.done = 0
        self.values: dict[str, str] = {}
        self.start = self.said = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update(1)

    def update(self, count):
        self.done += count
        now = time.monotonic()
        if now - self.said >= EVERY:
            self.said = now
            values = "".join(f", {name} {value}" for name, value in self.values.items())
            print(
                f"{self.title}: {self.done:,} of {self.total:,} {self.unit}s, {now - self.start:.0f} s{values}",
                file=sys.stderr,
                flush=True,
            )

    def set_postfix(self, **values):
        self.values = values
