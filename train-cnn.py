"""Train the CNN: `python train-cnn.py --help` explains every flag."""

from utils.commands.train import train_script

if __name__ == "__main__":
    train_script("cnn")
