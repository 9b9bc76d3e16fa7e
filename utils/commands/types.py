"""Types for argparse: each reads the text of a flag, or raises ArgumentTypeError with the reason in one line."""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from errno import ELOOP, ENAMETOOLONG, ENOTDIR
from math import isfinite
from pathlib import Path
from typing import Annotated, Any
from unicodedata import category

import msgspec
from msgspec import Meta

from utils.formats import Positive, Seed, Width
from utils.quoting import shown


def radius(text: str) -> float:
    """A radius of at least 0, as a number or a fraction such as 8/255."""
    numerator, slash, denominator = text.partition("/")
    try:
        value, divisor = float(numerator), float(denominator if slash else 1)
        value = value / divisor if isfinite(divisor) else divisor
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not isfinite(value):
        raise ArgumentTypeError(f"{shown(text)} is not a number or a fraction such as 8/255")
    if value < 0:
        raise ArgumentTypeError(f"{text} is negative, but a radius is at least 0")
    return value


def as_written(text: str) -> str:
    """A radius as its text: which radii are allowed depends on --norm, which may come later."""
    return text


def epsilon(text: str) -> float:
    """An L-infinity radius from 0 to 1, as `radius` reads it."""
    value = radius(text)
    if value > 1:
        hint = f": did you mean {text.strip()}/255?" if "/" not in text and value <= 255 else ""
        raise ArgumentTypeError(f"{shown(text)} is above 1, but pixels are in [0, 1]{hint}")
    return value


def number(annotation: Any) -> Callable[[str], float]:
    """The type for an annotation with bounds, such as Annotated[int, Meta(ge=0, le=31)]."""
    kind: Any = msgspec.inspect.type_info(annotation)
    kind = getattr(kind, "type", kind)  # a description wraps the type once more
    whole = isinstance(kind, msgspec.inspect.IntType)
    words = {"ge": "at least", "gt": "above", "lt": "below", "le": "at most"}
    limits = [(word, getattr(kind, key)) for key, word in words.items() if getattr(kind, key) is not None]
    bounds = [f"{word} {int(limit) if limit == int(limit) else limit:,}" for word, limit in limits]
    expected = f"a {'whole ' * whole}number that is {' and '.join(bounds)}"

    def parse(text: str) -> float:
        try:
            return msgspec.convert((int if whole else float)(text), annotation)
        except (ValueError, msgspec.ValidationError):
            raise ArgumentTypeError(f"{shown(text)} is not {expected}") from None

    return parse


positive_int = number(Positive)
positive_float = number(Annotated[float, Meta(gt=0, le=1e9)])
smoothing = number(Annotated[float, Meta(ge=0, lt=1)])
seed = number(Seed)
width = number(Width)


def file_path(text: str) -> Path:
    """A path whose name can be written to files, reports and a terminal, and that the file system can look up."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{shown(text)} is not in UTF-8") from None
    if not text:
        raise ArgumentTypeError("a path is empty")
    if any(category(character) in ("Cc", "Zl", "Zp") for character in text):
        raise ArgumentTypeError(f"{shown(text)} holds a line break or another control character")
    try:
        os.stat(text)
    except OSError as error:
        if error.errno in (ENAMETOOLONG, ELOOP, ENOTDIR):
            raise ArgumentTypeError(f"{shown(text)} cannot be written or read: {error.strerror}") from None
    return Path(text)
