"""How every table is written: Markdown, percentages, 95 % intervals, radii and numbers of images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from utils.constants import TITLES


class Measured(Protocol):
    """An accuracy and its 95 % interval, all in [0, 1]: a Result of an evaluation, or a row of a report."""

    @property
    def accuracy(self) -> float: ...

    @property
    def confidence_interval(self) -> tuple[float, float]: ...


class MeasuredAt(Measured, Protocol):
    """The same under an attack of one L-infinity radius."""

    @property
    def epsilon(self) -> float: ...


class Point(NamedTuple):
    """An accuracy, its interval and the radius that it was measured at."""

    epsilon: float
    accuracy: float
    confidence_interval: tuple[float, float]


def epsilon_text(epsilon: float) -> str:
    """A radius as papers write it: 0.2 if that is short and exact, 8/255 if it is a whole number of grey levels.

    Any other radius has four digits.
    """
    levels = 255 * epsilon
    whole = abs(levels - round(levels)) < 1e-9 and epsilon != float(f"{epsilon:.3g}")
    return f"{round(levels)}/255" if whole else f"{epsilon:.4g}"


def images_text(examples: int, dataset: str, split: str) -> str:
    """Which images were tested: 10,000 CIFAR-10 test images."""
    return f"{examples:,} {TITLES.get(dataset, dataset)} {split} images"


def percent(accuracy: float) -> str:
    """An accuracy in [0, 1] as a percentage with two decimals, without the sign."""
    return f"{100 * accuracy:.2f}"


def with_interval(measured: Measured) -> str:
    """An accuracy in bold and its interval in brackets, in percent."""
    low, high = measured.confidence_interval
    return f"**{percent(measured.accuracy)}** ({percent(low)}–{percent(high)})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A cell may hold any text: it stays one cell on one line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def under_headings(opening: str, titled: Mapping[str, str]) -> str:
    """A Markdown document: the opening, and then each text under its title as a heading."""
    return "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in titled.items())]) + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def printable(text: str) -> str:
    """The text without line breaks and other characters that cannot be printed; a file may come from anyone."""
    return "".join(character if character.isprintable() else " " for character in text)
