"""TODO: utils.statistics."""

import math

import torch


def wilson_interval(correct, examples, z=1.959964):
    """Wilson score interval of a proportion (Wilson, 1927), by default at 95 %: (low, high) in [0, 1].

    It covers the sampling of the test images alone, not how a figure moves from one training to the next.
    """
    p = correct / examples
    centre = p + z**2 / (2 * examples)
    margin = z * math.sqrt(p * (1 - p) / examples + z**2 / (4 * examples**2))
    scale = 1 + z**2 / examples
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def difference_interval(first, second, examples):
    """95 % interval of first - second, two accuracies on so many images each (Newcombe, 1998, method 10).

    It takes them for independent. On the same images they are not, their errors agree, and the interval is too wide.
    """
    (low, high), (other_low, other_high) = (wilson_interval(p * examples, examples) for p in (first, second))
    below = math.hypot(first - low, other_high - second)
    above = math.hypot(high - first, second - other_low)
    return first - second - below, first - second + above


def agreement(first, second, *, resamples=2000):
    """Cohen's kappa of two networks being right, with its 95 % bootstrap interval: (kappa, low, high).

    first, second: bool (N,), which of the same images each classifies correctly. Kappa is 1 if they are right on the
    same images, and 0 if they agree as often as chance would have it; nan if both are right, or both wrong, on all.
    """

    def kappa(first, second):
        first, second = first.double(), second.double()
        by_chance = first.mean(-1) * second.mean(-1) + (1 - first.mean(-1)) * (1 - second.mean(-1))
        return ((first == second).double().mean(-1) - by_chance) / (1 - by_chance)

    first, second = first.cpu(), second.cpu()
    drawn = torch.randint(len(first), (resamples, len(first)), generator=torch.Generator().manual_seed(0))
    low, high = kappa(first[drawn], second[drawn]).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return tuple(round(value.item(), 12) + 0.0 for value in (kappa(first, second), low, high))  # and no -0.00
