"""Test your own network on your own images: `python test-model.py --help` explains every flag."""

import utils.commands.interrupts  # noqa: F401, because it comes first
from utils.commands.model import model_script

if __name__ == "__main__":
    model_script()
