"""Text from other people in our messages: short, printable, on one line."""

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxdict = _SHORT.maxlist = 10
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """repr(value), cut short if it is long or deep."""
    return _SHORT.repr(value)[:200]


def one_line(error: object) -> str:
    """The text of an error on one line: printable, and cut short if it is long."""
    return printable(" ".join(str(error).split())[:300], "?")


def printable(text: str, instead: str = " ") -> str:
    """The text without line breaks and other characters that cannot be printed, or that command a terminal."""
    return "".join(character if character.isprintable() else instead for character in text)
