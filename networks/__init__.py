"""Networks: plain `nn.Module`s from images in [0, 1] to logits; each normalises its own input."""

from torch import nn

from networks.cnn import CNN, SmallCNN
from networks.cnn_lstm import CNNLSTM

# The names that scripts, checkpoints and reports use.
NETWORKS: dict[str, type[nn.Module]] = {"cnn": CNN, "cnn-lstm": CNNLSTM, "small-cnn": SmallCNN}

__all__ = ["CNN", "CNNLSTM", "NETWORKS", "SmallCNN"]
