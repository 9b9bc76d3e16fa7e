"""Defences as losses, defense(model, images, labels) -> scalar: cross-entropy on examples crafted in every step anew.

The examples are crafted on the network in training, through its own gradient, with its parameters frozen and its
batch-norm statistics left alone. By default its batch norm is in training mode meanwhile, as in the step that follows;
`crafting="evaluation"` normalises by the statistics learnt so far, and did no better on validation (models/README.md).
"""

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from attacks import default_step_size, step
from utils.evaluation import evaluate


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


class RobustValidation:
    """Accuracy under attack on validation images after each epoch: of some to be watched, of others to choose by.

    Watched are 500 images, under PGD-10 on the cross-entropy and under a single step; the epoch is chosen on 2,000
    others under PGD-10 on the margin, which flatters a small network less. Of smaller splits, a fifth and the rest.
    """

    def __init__(self, validation, epsilon):
        watched = min(500, len(validation) // 5)
        self.watched = validation.part(slice(watched))
        self.choosing = validation.part(slice(watched, watched + 2000))
        self.epsilon = epsilon

    def __call__(self, network):
        return {
            "single_step_accuracy": evaluate(network, self.watched, "fgsm", self.epsilon).accuracy,
            "robust_accuracy": self._under_pgd(network, self.watched, "cross_entropy"),
            "choosing_accuracy": self._under_pgd(network, self.choosing, "margin"),
        }

    def _under_pgd(self, network, split, loss):
        return evaluate(network, split, "pgd", self.epsilon, options={"steps": 10, "loss": loss}).accuracy

    @staticmethod
    def best(epochs):
        """The entry of the log with the highest accuracy on the images to choose by; of equal ones the first."""
        return max(epochs, key=lambda entry: entry["choosing_accuracy"])

    @staticmethod
    def collapse(epochs):
        """A warning, if catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994) began in the last epoch.

        So it is called when a network withstands one step about as well as none, and several smaller ones do not get
        half of that. A network that has learnt nothing, one class in ten right by chance, has nothing to lose.
        """

        def collapsed(entry):
            single, several = entry.get("single_step_accuracy", 0), entry["robust_accuracy"]
            return single > max(0.2, entry["validation_accuracy"] / 2) and several < single / 2

        if collapsed(epochs[-1]) and not any(map(collapsed, epochs[-2:-1])):
            return (
                "warning: catastrophic overfitting in epoch {epoch}: {single_step_accuracy:.1%} withstand a single "
                "step, and {robust_accuracy:.1%} the ten smaller ones of PGD"
            ).format(**epochs[-1])
        return None


DEFENSES = {defense.name: defense for defense in (FGSM, NFGSM, PGD, TRADES)}


def cross_entropy(model, images, labels, label_smoothing=0.0):
    """The loss without a defence, and on what most defences have crafted."""
    logits = model(images).float()  # under autocast they come in bfloat16, which has three digits
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def ascend(images, epsilon, steps, gradient):
    """PGD's iterate after `steps` steps from a random start: attacks.pgd without its choices."""
    low, high = (images - epsilon).clamp_(0, 1), (images + epsilon).clamp_(0, 1)
    iterates = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp_(0, 1)
    for _ in range(steps):
        iterates = step(iterates, gradient(iterates).sign(), default_step_size(epsilon, steps), low, high)
    return iterates


def crafting_gradient(model, images, targets, mode, loss=F.cross_entropy):
    """The gradient of loss(logits, targets, reduction="sum") for the images."""
    inputs = images.detach().requires_grad_()
    with crafting(model, mode):
        value = loss(model(inputs).float(), targets, reduction="sum")
    return torch.autograd.grad(value, inputs)[0]


@contextlib.contextmanager
def crafting(model, mode):
    """Parameters frozen, because the input's gradient is wanted alone, and batch-norm statistics left alone.

    mode: "training" normalises by the batch, "evaluation" by the statistics so far.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = [(norm.training, norm.track_running_stats) for norm in norms]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for norm in norms:
            if mode == "training":
                norm.track_running_stats = False  # so that the batch leaves no trace in the averages
            else:
                norm.eval()
        yield
    finally:
        for norm, (training, tracked) in zip(norms, found, strict=True):
            norm.training, norm.track_running_stats = training, tracked
        for parameter in parameters:
            parameter.requires_grad_(True)
