"""Test the CNN, clean and under attack: `python test-cnn.py --help` explains every flag."""

from utils.commands.test import test_script

if __name__ == "__main__":
    test_script("cnn")
