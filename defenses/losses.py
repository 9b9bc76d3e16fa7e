"""Defences as losses: each crafts adversarial examples in every training step and returns the loss on them.

A defence is called like any loss, defense(model, images, labels) -> scalar: model is the network in training, images
are float (N, C, H, W) in [0, 1], labels are int64 (N,). The scalar is float32, and its gradient reaches the parameters.

All defences here craft on the network in training, through its own gradient. Meanwhile its parameters are frozen and
its batch-norm statistics do not change. `epsilon` is the L-infinity radius in pixel units, such as 8/255; a value that
is not from 0 to 1 raises ValueError at once. `crafting` says how batch norm normalises meanwhile: "training" by the
batch, as in the step that follows, or "evaluation" by the statistics so far, which did no better on validation
(models/README.md). `loss` names the loss that the examples raise, a key of DEFENSE_LOSSES: "cross_entropy", as in the
papers, or another (docs/robustness.md compares them); any other name raises ValueError at once. The network learns
from the examples by cross-entropy in every case. `smoothing`, from 0 to below 1, is the part of each label that all
classes share equally in this cross-entropy. With it, a long training seems to overfit less. Another value raises
ValueError at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import step
from attacks.core import LOSSES, Loss, check_loss
from attacks.norms import check_epsilon
from defenses.crafting import crafting_gradient, crafting_state, from_noise, last_iterate

# From a network in training, images (N, C, H, W) in [0, 1] and int64 labels (N,) to a scalar.
Defense = Callable[[nn.Module, Tensor, Tensor], Tensor]


def sampled_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of another class minus the label's logit, (N,), unbounded; 0 if K is 1.

    The class is drawn for each image in each call, in proportion to the network's probabilities of the other classes.
    So the examples lead to every class that is near, while those on the margin lead to the nearest one only. This loss
    is ours. logits: float (N, K); labels: int64 (N,) in 0..K-1. The generator is torch's own, of the logits' device.
    """
    label = labels[:, None]
    # The class with the shortest exponential waiting time is a draw from the softmax. multinomial fails on nan.
    waiting = torch.empty_like(logits).exponential_().log()
    drawn = (logits.detach() - waiting).scatter(1, label, -math.inf).argmax(1, keepdim=True)
    return (logits.gather(1, drawn) - logits.gather(1, label))[:, 0]


DEFENSE_LOSSES: dict[str, Loss] = {**LOSSES, "sampled": sampled_margin}


@dataclass(frozen=True)
class _WithRadius:
    epsilon: float

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)


@dataclass(frozen=True)
class _Climbing(_WithRadius):
    """A defence whose examples raise a loss of the logits and the labels."""

    loss: str = field(default="cross_entropy", kw_only=True)
    crafting: str = field(default="training", kw_only=True)
    smoothing: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss, DEFENSE_LOSSES)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be from 0 to below 1, not {self.smoothing}")

    def gradient(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the summed loss with respect to images, (N, C, H, W), which leads to examples."""
        loss = DEFENSE_LOSSES[self.loss]
        return crafting_gradient(model, images, lambda logits: loss(logits, labels).sum(), self.crafting)


@dataclass(frozen=True)
class FGSM(_Climbing):
    """Cross-entropy on one FGSM step from each image (Goodfellow et al., 2015, arXiv:1412.6572, section 6).

    It is here to be studied: it overfits catastrophically, which means that the network learns to withstand the single
    step and nothing else. (Goodfellow et al. average this loss with that of the clean images.)
    """

    name: ClassVar[str] = "fgsm"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        ascent = self.gradient(model, images, labels).sign()
        return cross_entropy(model, step(images, ascent, self.epsilon), labels, self.smoothing)


@dataclass(frozen=True)
class NFGSM(_Climbing):
    """N-FGSM: cross-entropy on a step of epsilon from a noisy image (de Jorge et al., 2022, arXiv:2202.01181).

    As in the paper's algorithm 1, the noise is part of the training image and nothing is clipped: an example may lie
    farther than epsilon from its image, and outside [0, 1]. The authors' code clamps the examples to [0, 1].
    noise: the largest noise of a pixel, in units of epsilon.
    """

    noise: float = 2.0
    name: ClassVar[str] = "n-fgsm"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        gradient = partial(self.gradient, model, labels=labels)
        example = from_noise(images, gradient, noise=self.noise * self.epsilon, sizes=[self.epsilon])
        return cross_entropy(model, example, labels, self.smoothing)


@dataclass(frozen=True)
class NPGD(_Climbing):
    """N-PGD: N-FGSM with more than one step and with less noise. It is ours. Validation images chose its numbers.

    As in N-FGSM, the noise is part of the training image and nothing is clipped. With the defaults, a pixel of an
    example lies up to 2.2 epsilon from that of its image.
    steps: at least 1. noise: the largest noise of a pixel; step_size: of each step. Both are in units of epsilon.
    """

    steps: int = 2
    noise: float = 1.0
    step_size: float = 0.6
    name: ClassVar[str] = "n-pgd"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        gradient = partial(self.gradient, model, labels=labels)
        sizes = [self.step_size * self.epsilon] * self.steps
        example = from_noise(images, gradient, noise=self.noise * self.epsilon, sizes=sizes)
        return cross_entropy(model, example, labels, self.smoothing)


@dataclass(frozen=True)
class PGD(_Climbing):
    """Cross-entropy on PGD's last iterate, from a random start (Madry et al., 2018, arXiv:1706.06083, section 2.1).

    steps: at least 1.
    """

    steps: int = 7
    name: ClassVar[str] = "pgd"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        gradient = partial(self.gradient, model, labels=labels)
        adversarial = last_iterate(images, gradient, epsilon=self.epsilon, steps=self.steps)
        return cross_entropy(model, adversarial, labels, self.smoothing)


@dataclass(frozen=True)
class TRADES(_WithRadius):
    """Clean cross-entropy plus beta times a divergence (TRADES, Zhang et al., 2019, arXiv:1901.08573, eq. 5).

    The divergence is the Kullback-Leibler divergence from the network's answer for an image to its answer for the
    adversarial example. PGD crafts the example to make this divergence large. steps: at least 1.
    """

    steps: int = 7
    beta: float = 6.0
    crafting: str = "training"
    name: ClassVar[str] = "trades"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with crafting_state(model, self.crafting), torch.no_grad():
            clean = model(images).float().softmax(1)

        def divergence(logits: Tensor) -> Tensor:
            return F.kl_div(logits.log_softmax(1), clean, reduction="sum")

        def gradient(iterate: Tensor) -> Tensor:
            return crafting_gradient(model, iterate, divergence, self.crafting)

        adversarial = last_iterate(images, gradient, epsilon=self.epsilon, steps=self.steps)
        # In two passes: in one batch, batch norm would mix the statistics of the images with those of the examples.
        natural, attacked = model(images).float(), model(adversarial).float()
        robust = F.kl_div(attacked.log_softmax(1), natural.softmax(1), reduction="batchmean")
        return F.cross_entropy(natural, labels) + self.beta * robust


# By the names of `--defense`. Each is made with its epsilon: DEFENSES["pgd"](8 / 255).
DEFENSES: dict[str, Callable[..., Defense]] = {defense.name: defense for defense in (FGSM, NFGSM, NPGD, PGD, TRADES)}


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss of a training without a defence, and of most defences on their examples: a scalar, the batch's mean.

    model, images, labels: as for a defence. label_smoothing: in [0, 1), as for torch's cross_entropy.
    """
    logits = model(images).float()  # under autocast, logits come in bfloat16, which has only three digits
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
