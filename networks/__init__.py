"""Networks: `nn.Module`s from images in [0, 1] to logits. Each normalises its own input."""

from torch import nn

from networks.cnn import CNN, SmallCNN
from networks.cnn_lstm import CNNLSTM

# By the names that scripts, checkpoints and reports use.
NETWORKS: dict[str, type[nn.Module]] = {"cnn": CNN, "cnn-lstm": CNNLSTM, "small-cnn": SmallCNN}

__all__ = ["CNN", "CNNLSTM", "NETWORKS", "SmallCNN"]
