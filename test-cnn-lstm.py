"""Test the CNN-LSTM, clean and under attack: `python test-cnn-lstm.py --help` explains every flag."""

from utils.commands.test import test_script

if __name__ == "__main__":
    test_script("cnn-lstm")
