"""How every table is written: Markdown, percentages, 95 % intervals, radii and numbers of images."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import quote

from utils.constants import TITLES
from utils.quoting import printable

# What Markdown, HTML or MathJax reads as more than a character. An underscore inside a word is only a character.
_SPECIAL = re.compile(r"[\\`*\[\]<>&|$~]|(?<!\w)_|_(?!\w)")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


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


class Markup(str):
    """Text that this project wrote as Markdown. Any other text may come from a file, and is shown as it is."""


def plain(text: str) -> Markup:
    """A text as Markdown that shows it as it is, on one line: it holds neither HTML, markup nor a formula."""
    if isinstance(text, Markup):
        return text
    return Markup(_SPECIAL.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), printable(text)))


def bold(text: str) -> Markup:
    """A text in bold."""
    return Markup(f"**{plain(text)}**")


def code(text: str) -> Markup:
    """A text as code. Nothing in it is markup, except for the backtick that would end it."""
    return Markup(f"`{printable(text).replace('`', chr(39))}`".replace("|", "\\|"))


def link(text: str, target: str) -> Markup:
    """A link to a file beside the document. target: its path, which is not a URL."""
    return Markup(f"[{plain(text)}]({quote(printable(target), safe='/')})")


def joined(separator: str, parts: Iterable[str]) -> Markup:
    """The parts as Markdown, with a separator of ours between them."""
    return Markup(separator.join(map(plain, parts)))


def epsilon_text(epsilon: float) -> str:
    """A radius as papers write it: 0.2 if that is short and exact, else 8/255 or 8.8/255 if that is exact.

    Any other radius has four digits.
    """
    levels = round(255 * epsilon, 1)
    in_levels = abs(255 * epsilon - levels) < 1e-9 and epsilon != float(f"{epsilon:.3g}")
    return f"{levels:g}/255" if in_levels else f"{epsilon:.4g}"


def images_text(examples: int, dataset: str, split: str) -> str:
    """Which images were tested: 10,000 CIFAR-10 test images."""
    return f"{examples:,} {TITLES.get(dataset, dataset)} {split} images"


def percent(accuracy: float) -> str:
    """An accuracy in [0, 1] as a percentage with two decimals, without the sign."""
    return f"{100 * accuracy:.2f}"


def with_interval(measured: Measured) -> Markup:
    """An accuracy in bold and its interval in brackets, in percent."""
    low, high = measured.confidence_interval
    return Markup(f"{bold(percent(measured.accuracy))} ({percent(low)}–{percent(high)})")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A cell may hold any text: it stays one cell on one line, and only Markup is Markdown."""
    lines = [header, [Markup("---")] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)


def under_headings(opening: str, titled: Mapping[str, str]) -> str:
    """A Markdown document: the opening, and then each text under its title as a heading.

    A title may hold any text, as a cell of `markdown` may. The opening and the texts are Markdown.
    """
    return "\n\n".join([opening, *(f"## {plain(title)}\n\n{text}" for title, text in titled.items())]) + "\n"
