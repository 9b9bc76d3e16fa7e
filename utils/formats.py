"""What strangers may have written, JSON above all: parsed strictly, checked for kind and range, quoted in short."""

import json

from utils.constants import LARGEST_WIDTH
from utils.files import LARGEST, read_bytes
from utils.quoting import shown

LONGEST_OF_OURS = 2**26  # bytes, of what a training left for itself, after however many epochs


DEEPEST = 20  # levels of nesting; ours have five, and beyond some hundreds Python fails to print or compare them


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
