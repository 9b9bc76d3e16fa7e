"""Small models to attack, and images for them."""

import torch
from torch import nn


class TinyLSTM(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True, **options)
        self.linear = nn.Linear(5, 10)

    def forward(self, images):
        return self.linear(self.lstm(images.sum(2).transpose(1, 2))[0][:, -1])  # reads column by column


def tiny_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10)
    )


def linear_classifier():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def model_and_images(kind, size=8, count=4, seed=0):
    torch.manual_seed(seed)
    images, labels = torch.rand(count, 3, size, size), torch.randint(10, (count,))
    model = {"cnn": tiny_cnn, "lstm": TinyLSTM, "linear": linear_classifier}[kind]()
    model(torch.rand(2, 3, size, size))  # gives lazy layers their shape, and batch norm statistics of its own
    return model, images, labels
