"""The study's convolutional network, and the smaller one that the introduction uses."""

from torch import nn

from networks.folding import Normalize, folded

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def convolution(channels_in, channels_out, stride=1):
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1), nn.ReLU(), nn.BatchNorm2d(channels_out)
    )


def convolutions(width):
    """The six convolutions that both of the study's networks share: (N, 3, 32, 32) to (N, 4 width, 4, 4)."""
    return nn.Sequential(
        convolution(3, width),
        convolution(width, width, stride=2),
        convolution(width, 2 * width),
        convolution(2 * width, 2 * width, stride=2),
        convolution(2 * width, 2 * width),
        convolution(2 * width, 4 * width, stride=2),
    )


class CNN(nn.Module):
    """Six 3x3 convolutions, each with ReLU and batch norm, and a linear layer; stride 2 in place of pooling.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    197,610 parameters at width 32 with 10 classes (the study's 308,256 are those of a last layer with 64 outputs).
    """

    def __init__(self, width=32, num_classes=10, mean=CIFAR10_MEAN, std=CIFAR10_STD):
        super().__init__()
        self.arguments = {"width": width, "num_classes": num_classes}
        self.normalize = Normalize(mean, std)
        self.features = convolutions(width)
        self.classifier = nn.Linear(4 * width * 4 * 4, num_classes)

    def forward(self, images):
        return self.head(self.features(self.normalize(images)))

    def head(self, features):
        return self.classifier(features.flatten(1))

    def folded_for_attacks(self):
        """See networks/folding.py. Of a subclass, whose forward may do more, the network itself."""
        return folded(self) if type(self) is CNN else self


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with ReLU and stride 2, no batch norm, and a linear layer: older and shallower.

    images: float (N, 3, 32, 32) in [0, 1]. Returns logits (N, num_classes).
    113,738 parameters at width 32 with 10 classes.
    """

    def __init__(self, width=32, num_classes=10, mean=CIFAR10_MEAN, std=CIFAR10_STD):
        super().__init__()
        self.arguments = {"width": width, "num_classes": num_classes}
        self.normalize = Normalize(mean, std)
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(4 * width * 4 * 4, num_classes)

    def forward(self, images):
        return self.classifier(self.features(self.normalize(images)).flatten(1))
