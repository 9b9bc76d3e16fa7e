"""The study's hybrid: an LSTM reads the output of the CNN's convolutions as a sequence."""

import torch
from torch import Tensor, nn

from networks.cnn import Network, convolutions
from networks.folding import fold


class CNNLSTM(Network):
    """The CNN's six convolutions, then a three-layer LSTM that reads their 4 x 4 map as a sequence of 16 positions.

    The LSTM reads the positions row after row, a vector of 4 width channels for each. For this, the map is transposed.
    (The study reshaped it, which mixed channels with positions.) The output of the last position goes to a linear
    layer.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    293,994 parameters at width 32 with 10 classes, as in the study.
    """

    def build(self, width: int, num_classes: int, activation: str) -> None:
        self.features = convolutions(width, activation)
        self.lstm = nn.LSTM(4 * width, 2 * width, num_layers=3, batch_first=True)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(self.normalize(images)))

    def sequence(self, images: Tensor) -> Tensor:
        """What the LSTM reads of images (N, 3, 32, 32): (N, 16, 4 width), the map's positions row after row."""
        return _positions(self.features(self.normalize(images)))

    def head(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) of the convolutions' output (N, 4 width, 4, 4)."""
        hidden, _ = self.lstm(_positions(features))
        return self.classifier(hidden[:, -1])

    def folded_for_attacks(self) -> nn.Module:
        """As `CNN.folded_for_attacks`."""
        return fold(self) if type(self) is CNNLSTM else self


def _positions(features: Tensor) -> Tensor:
    """A map (N, channels, height, width) as a sequence (N, height * width, channels).

    Stacked, not transposed: on a CPU, an LSTM's gradient for a single image has strides that the gradient of batch norm
    misreads (torch 2.15), and the image's gradient would be noise.
    """
    return torch.stack(features.flatten(2).unbind(2), 1)
