"""Train the CNN-LSTM: `python train-cnn-lstm.py --help` explains every flag."""

import utils.commands.interrupts  # noqa: F401, because it comes first
from utils.commands.train import train_script

if __name__ == "__main__":
    train_script("cnn-lstm")
