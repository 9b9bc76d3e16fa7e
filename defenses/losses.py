"""Defences as losses, defense(model, images, labels) -> scalar: cross-entropy on examples crafted in every step anew.

The examples are crafted on the network in training, through its own gradient, with its parameters frozen and its
batch-norm statistics left alone. By default its batch norm is in training mode meanwhile, as in the step that follows;
`crafting="evaluation"` normalises by the statistics learnt so far, and did no better on validation (models/README.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from attacks import step
from defenses.crafting import ascend, crafting, crafting_gradient


@dataclass(frozen=True)
class FGSM:
    """Adversarial training with one FGSM step from the image (Goodfellow et al., 2015, arXiv:1412.6572, section 6).

    Kept because it overfits catastrophically: it learns to withstand the single step and nothing else.
    """

    epsilon: float
    crafting: str = "training"
    name: ClassVar = "fgsm"

    def __call__(self, model, images, labels):
        gradient = crafting_gradient(model, images, labels, self.crafting)
        return cross_entropy(model, step(images, gradient.sign(), self.epsilon), labels)


@dataclass(frozen=True)
class NFGSM:
    """N-FGSM (de Jorge et al., 2022, arXiv:2202.01181, algorithm 1): noise of up to 2 epsilon, a step of epsilon.

    The noise is part of the training image: nothing is clipped, neither to the ball nor to [0, 1].
    """

    epsilon: float
    noise: float = 2.0  # in units of epsilon
    crafting: str = "training"
    name: ClassVar = "n-fgsm"

    def __call__(self, model, images, labels):
        noisy = images + torch.empty_like(images).uniform_(-1, 1) * (self.noise * self.epsilon)
        gradient = crafting_gradient(model, noisy, labels, self.crafting)
        return cross_entropy(model, noisy + self.epsilon * gradient.sign(), labels)


@dataclass(frozen=True)
class PGD:
    """Adversarial training on PGD's examples, from a random start (Madry et al., 2018, arXiv:1706.06083)."""

    epsilon: float
    steps: int = 7
    crafting: str = "training"
    name: ClassVar = "pgd"

    def __call__(self, model, images, labels):
        def gradient(iterates):
            return crafting_gradient(model, iterates, labels, self.crafting)

        adversarial = ascend(images, self.epsilon, self.steps, gradient)
        return cross_entropy(model, adversarial, labels)


@dataclass(frozen=True)
class TRADES:
    """TRADES (Zhang et al., 2019, arXiv:1901.08573, eq. 5): clean cross-entropy plus beta times a divergence.

    The divergence is that of Kullback and Leibler from the network's answer for the image to its answer for the
    example, which is crafted to make it large.
    """

    epsilon: float
    steps: int = 7
    beta: float = 6.0
    crafting: str = "training"
    name: ClassVar = "trades"

    def __call__(self, model, images, labels):
        with crafting(model, self.crafting), torch.no_grad():
            clean = model(images).float().softmax(1)

        def divergence(logits, clean, reduction):
            return F.kl_div(logits.log_softmax(1), clean, reduction=reduction)

        def gradient(iterates):
            return crafting_gradient(model, iterates, clean, self.crafting, divergence)

        adversarial = ascend(images, self.epsilon, self.steps, gradient)
        # One after the other: normalised in one batch, each half would give the other away.
        natural, attacked = model(images).float(), model(adversarial).float()
        robust = divergence(attacked, natural.softmax(1), "batchmean")
        return F.cross_entropy(natural, labels) + self.beta * robust


DEFENSES = {defense.name: defense for defense in (FGSM, NFGSM, PGD, TRADES)}


def cross_entropy(model, images, labels, label_smoothing=0.0):
    """The loss without a defence, and on what most defences have crafted."""
    logits = model(images).float()  # under autocast they come in bfloat16, which has three digits
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
