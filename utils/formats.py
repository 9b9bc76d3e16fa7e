"""What strangers may have written, JSON above all: parsed strictly, checked for kind and range, quoted in short."""

import errno
import json
import os
import reprlib
import stat

from utils import LARGEST_WIDTH

LARGEST = 2**20  # bytes of JSON, some 3,000 epochs of a log; hostile, they take a fifth of a second to be parsed
LONGEST_OF_OURS = 2**26  # bytes, of what a training left for itself, after however many epochs
DEEPEST = 20  # levels of nesting; ours have five, and beyond some hundreds Python fails to print or compare them
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxdict = _SHORT.maxlist = 10
_SHORT.maxlevel = 3


def parse_json(text):
    """The value of a JSON text. Raises ValueError, also for what json.loads lets pass.

    That is a key that comes twice, of which two readers might take different ones; NaN and Infinity, which no JSON
    knows; and more than DEEPEST levels of nesting.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        containers = [node.values() if isinstance(node, dict) else node for node in level if _is_container(node)]
        level = [child for container in containers for child in container]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def open_file(path):
    """A file, open to be read as bytes. Raises OSError, also for what is none: a pipe may never come to its end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return open(path, "rb")


def read_bytes(path, longest=LARGEST):
    """What a file holds. Raises OSError, and ValueError for more than `longest` bytes, unless that is None."""
    with open_file(path) as file:
        data = file.read(None if longest is None else longest + 1)
    if longest is not None and len(data) > longest:
        raise ValueError("it is too long")
    return data


def read_json(path):
    """The value in a JSON file. Raises OSError and ValueError, as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path).decode())


def read_json_lines(path, longest=LARGEST):
    """What a file's lines hold, before the first that is no JSON, as the last may be when the writer was killed.

    Raises OSError and ValueError as `read_bytes` does.
    """
    rows = []
    for line in read_bytes(path, longest).decode(errors="replace").splitlines():
        try:
            rows.append(parse_json(line))
        except ValueError:
            break
    return rows


def _is_container(value):
    return isinstance(value, (dict, list))


def _without_duplicates(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(text):
    raise ValueError(f"{text} is no JSON")


def is_number(value, low, high):
    """Whether it is an int or float, and no bool, from low to high; NaN never is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_numbers(values, low, high):
    """Raise ValueError unless each is a number from low to high."""
    for value in values:
        if not is_number(value, low, high):
            raise ValueError(f"{shown(value)} is no number from {low:g} to {high:g}")


def check_strings(values):
    """Raise ValueError unless each is a string."""
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is no string")


def check_training(value):
    """Raise ValueError unless it may be the arguments of a training: an object, or None where they are not known.

    Its defence, if it has one, is an object with a name and perhaps a radius, or the name alone of somebody's own.
    """
    if value is None:
        return
    defense = checked_object(value).get("defense")
    if "width" in value:
        check_numbers([value["width"]], 1, LARGEST_WIDTH)
    if defense is not None and not isinstance(defense, str):
        check_strings([checked_object(defense).get("name")])
        if "epsilon" in defense:
            check_numbers([defense["epsilon"]], 0, 1e6)


def checked_object(value):
    """The value; raises ValueError unless it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is no object")
    return value


def checked_list(value):
    """The value; raises ValueError unless it is a list."""
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} is no list")
    return value


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
