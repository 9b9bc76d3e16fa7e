"""Where the project is, and how tests start its commands."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICK = ("--dataset", "digits", "--epochs", 2, "--width", 4)  # two epochs, so that a training can be killed halfway


def command(name: str, *arguments: object) -> list[str]:
    """The command line of a script ("train-cnn.py") or of the study ("study", "study robustness")."""
    start = [str(ROOT / name)] if name.endswith(".py") else ["-m", *name.split()]
    return [sys.executable, *start, *map(str, arguments)]


def untraced() -> dict[str, str]:
    """The environment without what makes coverage follow a new process: that would slow it, and write files."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def prog(name: str) -> str:
    """What a command calls itself in its messages."""
    return name if name.endswith(".py") else f"python -m {name}"
