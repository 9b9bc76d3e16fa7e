"""The study's convolutional network, and the smaller one that the introduction uses."""

from torch import Tensor, nn

from networks.folding import ACTIVATIONS, Normalize, PerChannel, fold

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def convolutions(width: int, activation: str) -> nn.Sequential:
    """The six convolutions that the CNN and the CNN-LSTM share: float (N, 3, 32, 32) to (N, 4 width, 4, 4)."""

    def convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1),
            ACTIVATIONS[activation](),
            nn.BatchNorm2d(channels_out),
        )

    return nn.Sequential(
        convolution(3, width),
        convolution(width, width, stride=2),
        convolution(width, 2 * width),
        convolution(2 * width, 2 * width, stride=2),
        convolution(2 * width, 2 * width),
        convolution(2 * width, 4 * width, stride=2),
    )


class Network(nn.Module):
    """What the networks share: their arguments, and the normalisation of their input. `build` adds the layers.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    mean, std: of each channel of the training images, in pixel units. activation: a key of ACTIVATIONS; the study's
    is "relu". A smooth one such as "silu" helps adversarial training (Xie et al., 2020, arXiv:2006.14536).
    """

    def __init__(
        self,
        width: int = 32,
        num_classes: int = 10,
        mean: PerChannel = CIFAR10_MEAN,
        std: PerChannel = CIFAR10_STD,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        # A checkpoint stores these to build the network.
        self.arguments = {"width": width, "num_classes": num_classes, "activation": activation}
        self.normalize = Normalize(mean, std)
        self.build(width, num_classes, activation)

    def build(self, width: int, num_classes: int, activation: str) -> None:
        """Add the layers. Each network has its own."""
        raise NotImplementedError


class CNN(Network):
    """Six 3x3 convolutions, each with ReLU and batch norm, then a linear layer. Stride 2 takes the place of pooling.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    197,610 parameters at width 32 with 10 classes. (The study counts 308,256, because its last layer has 64 outputs.)
    """

    def build(self, width: int, num_classes: int, activation: str) -> None:
        self.features = convolutions(width, activation)
        self.classifier = nn.Linear(4 * width * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(self.normalize(images)))

    def head(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) of the convolutions' output (N, 4 width, 4, 4)."""
        return self.classifier(features.flatten(1))

    def folded_for_attacks(self) -> nn.Module:
        """See networks/folding.py. A subclass may compute more in its forward pass, so it is returned unchanged."""
        return fold(self) if type(self) is CNN else self


class SmallCNN(Network):
    """Three 3x3 convolutions with ReLU and stride 2, then a linear layer. It is older and shallower: no batch norm.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    113,738 parameters at width 32 with 10 classes.
    """

    def build(self, width: int, num_classes: int, activation: str) -> None:
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            ACTIVATIONS[activation](),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            ACTIVATIONS[activation](),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            ACTIVATIONS[activation](),
        )
        self.classifier = nn.Linear(4 * width * 4 * 4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(self.normalize(images)).flatten(1))
