"""TODO: utils.tables."""

from utils.constants import TITLES


def pixels(epsilon):
    """An epsilon as papers write it: 8/255 where it is a whole number of grey levels, else a decimal."""
    levels = 255 * epsilon
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-9 and levels > 0 else f"{epsilon:.4g}"


def tested_images(report):
    return f"{report['examples']:,} {TITLES.get(report['dataset'], report['dataset'])} {report['split']} images"


def percent(accuracy):
    return f"{100 * accuracy:.2f}"


def with_interval(result):
    low, high = result["confidence_interval"]
    return f"**{percent(result['accuracy'])}** ({percent(low)}–{percent(high)})"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
