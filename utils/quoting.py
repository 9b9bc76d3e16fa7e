"""TODO: utils.quoting."""

import reprlib

_SHORT = reprlib.Repr()


_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


_SHORT.maxdict = _SHORT.maxlist = 10


_SHORT.maxlevel = 3


def shown(value):
    """repr(value) for an error message, cut short where it is long or deep."""
    return _SHORT.repr(value)[:200]


def reason(error):
    """What an error of whatever kind says, and its kind, without which a KeyError is but a word."""
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(error):
    """What an error says, for the line that ours is to be: printable, and cut off where it is long."""
    text = " ".join(str(error).split())
    return "".join(character if character.isprintable() else "?" for character in text[:300])
