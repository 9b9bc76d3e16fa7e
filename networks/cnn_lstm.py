"""The study's hybrid: the CNN's convolutions, read as a sequence by an LSTM."""

from torch import nn

from networks.cnn import CIFAR10_MEAN, CIFAR10_STD, convolutions
from networks.folding import Normalize, folded


class CNNLSTM(nn.Module):
    """The CNN's six convolutions, then the 4 x 4 map as 16 positions through a three-layer LSTM.

    Position by position, row after row, the LSTM reads a vector of 4 width channels: the map is transposed, where the
    study reshaped it and so mixed channels with positions. The last time step goes to a linear layer.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    293,994 parameters at width 32 with 10 classes, as in the study.
    """

    def __init__(self, width=32, num_classes=10, mean=CIFAR10_MEAN, std=CIFAR10_STD):
        super().__init__()
        self.arguments = {"width": width, "num_classes": num_classes}
        self.normalize = Normalize(mean, std)
        self.features = convolutions(width)
        self.lstm = nn.LSTM(4 * width, 2 * width, num_layers=3, batch_first=True)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, images):
        return self.head(self.features(self.normalize(images)))

    def sequence(self, images):
        """What the LSTM reads of images (N, 3, 32, 32): (N, 16, 4 width), the positions of the map row after row."""
        return positions(self.features(self.normalize(images)))

    def head(self, features):
        hidden, _ = self.lstm(positions(features))
        return self.classifier(hidden[:, -1])

    def folded_for_attacks(self):
        """As `CNN.folded_for_attacks`."""
        return folded(self) if type(self) is CNNLSTM else self


def positions(features):
    return features.flatten(2).transpose(1, 2)
