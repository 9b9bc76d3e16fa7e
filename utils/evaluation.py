"""Accuracy, with and without an attack, and how certain it is."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from attacks import fgsm_direction, step
from attacks.core import evaluation_mode
from utils import EVALUATION_BATCH
from utils.data import batches


@dataclass(frozen=True)
class Result:
    """Correctly classified images out of `examples` under one attack (epsilon 0: clean), and the seconds it took."""

    epsilon: float
    correct: int
    examples: int
    seconds: float

    @property
    def accuracy(self):
        return self.correct / self.examples

    @property
    def confidence_interval(self):
        return wilson_interval(self.correct, self.examples)


def wilson_interval(correct, examples, z=1.959964):
    """Wilson score interval of a proportion (Wilson, 1927), by default at 95 %: (low, high) in [0, 1].

    It covers the sampling of the test images alone, not how a figure moves from one training to the next.
    """
    p = correct / examples
    centre = p + z**2 / (2 * examples)
    margin = z * math.sqrt(p * (1 - p) / examples + z**2 / (4 * examples**2))
    scale = 1 + z**2 / examples
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def count_correct(network, images, labels):
    """How many images the network, as it is, classifies correctly."""
    with torch.no_grad():
        return (network(images).argmax(1) == labels).sum().item()


def accuracy(network, split):
    """The fraction of a split's images that the network, in evaluation mode, classifies correctly."""
    return evaluate_fgsm(network, split, [])[0].accuracy


def evaluate_fgsm(
    network, split, epsilons, *, source=None, direction=None, batch_size=EVALUATION_BATCH, progress=False
):
    """Accuracy on the clean images and under FGSM at each epsilon, in one pass over the split.

    source: the network whose gradient crafts the examples; None means `network` itself, a white-box attack.
    direction: crafted already, the int8 tensor of an AdversarialSet over this split; then there is no gradient to take.
    Returns a Result for the clean images and then one for each epsilon. An attack's seconds are those of crafting the
    direction, which all epsilons share, and of its own forward pass: what it would take alone.
    """
    correct = [0] * (1 + len(epsilons))
    seconds = [0.0] * (1 + len(epsilons))
    bar = tqdm(total=len(split), unit="image", desc="evaluating", leave=False, disable=None if progress else True)
    with bar, evaluation_mode(network):
        crafted = iter(() if direction is None else direction.split(batch_size))
        for images, labels in batches(split, batch_size):
            start = time.perf_counter()
            correct[0] += count_correct(network, images, labels)
            seconds[0] += time.perf_counter() - start
            if epsilons:
                start = time.perf_counter()
                if direction is None:
                    signs = fgsm_direction(network if source is None else source, images, labels)
                else:
                    signs = next(crafted).to(images)
                crafting = time.perf_counter() - start
            for i, epsilon in enumerate(epsilons, start=1):
                start = time.perf_counter()
                correct[i] += count_correct(network, step(images, signs, epsilon), labels)
                seconds[i] += crafting + time.perf_counter() - start
            bar.update(len(labels))
    return [Result(*row) for row in zip([0.0, *epsilons], correct, [len(split)] * len(correct), seconds, strict=True)]


def multiply_adds(network):
    """Multiply-adds of one 3 x 32 x 32 image's forward pass, in its convolutions, LSTMs and linear layers."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight.numel() * output.shape[-2] * output.shape[-1]  # each position uses each weight once
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, nn.LSTM):
            positions = inputs[0].shape[1]
            total += positions * sum(w.numel() for name, w in module.named_parameters() if name.startswith("weight"))

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    with torch.no_grad(), evaluation_mode(network):
        network(torch.zeros(1, 3, 32, 32, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total
