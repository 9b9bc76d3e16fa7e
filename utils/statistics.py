"""How certain an accuracy is, how certain a difference of two is, and how far two networks agree."""

import math

import torch
from torch import Tensor


def wilson_interval(correct: float, examples: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of the proportion correct / examples (Wilson, 1927): (low, high) in [0, 1].

    z: the quantile of the normal distribution; the default gives the 95 % interval. The interval covers the sampling of
    the test images. It does not cover how much the accuracy changes from one training to the next.
    """
    p = correct / examples
    centre = p + z**2 / (2 * examples)
    margin = z * math.sqrt(p * (1 - p) / examples + z**2 / (4 * examples**2))
    scale = 1 + z**2 / examples
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def difference_interval(first: float, second: float, examples: int) -> tuple[float, float]:
    """95 % interval of first - second, in [-1, 1] (Newcombe, 1998, method 10).

    first, second: two accuracies in [0, 1], each on `examples` images. The method assumes that the two are independent.
    On the same images they are not, since networks often err on the same images; then the interval is too wide.
    """
    (low, high), (other_low, other_high) = (wilson_interval(p * examples, examples) for p in (first, second))
    below = math.hypot(first - low, other_high - second)
    above = math.hypot(high - first, second - other_low)
    return first - second - below, first - second + above


def cohens_kappa(first: Tensor, second: Tensor, *, resamples: int = 2000) -> tuple[float, float, float]:
    """Cohen's kappa (1960) of two networks being right, with its 95 % bootstrap interval: (kappa, low, high).

    first, second: bool (N,), which of the same images each network classifies correctly. Kappa is 1 if they are right
    on the same images, 0 if they agree as often as by chance, and NaN if both are right on all images, or wrong on all.
    """

    def kappa(first: Tensor, second: Tensor) -> Tensor:
        first, second = first.double(), second.double()
        by_chance = first.mean(-1) * second.mean(-1) + (1 - first.mean(-1)) * (1 - second.mean(-1))
        return ((first == second).double().mean(-1) - by_chance) / (1 - by_chance)

    first, second = first.cpu(), second.cpu()
    drawn = torch.randint(len(first), (resamples, len(first)), generator=torch.Generator().manual_seed(0))
    limits = kappa(first[drawn], second[drawn]).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    # Adding 0 turns -0.0 into 0.0.
    value, low, high = (round(figure.item(), 12) + 0.0 for figure in (kappa(first, second), *limits))
    return value, low, high
