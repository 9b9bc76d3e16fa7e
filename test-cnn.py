"""Test the CNN, clean and under attack: `python test-cnn.py --help` explains every flag."""

import utils.commands.interrupts  # noqa: F401, because it comes first
from utils.commands.test import test_script

if __name__ == "__main__":
    test_script("cnn")
