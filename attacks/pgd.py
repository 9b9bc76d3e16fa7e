"""Projected Gradient Descent: many small steps of FGSM, each followed by a return into the ball around the image."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.core import (
    LOSSES,
    Model,
    attacking,
    check_eot,
    check_epsilon,
    checked_batch,
    faster_equivalent,
    forward,
    input_gradient,
    step,
    warn_of_zero_gradient,
    zero_gradient,
)
from attacks.progress import report_progress
from attacks.state import BATCH_DEPENDENT, RANDOM, examined

JUDGES = 4  # passes over each iterate of a random model that had no part in finding it


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "cross_entropy",
    targeted: bool = False,
    early_stop: bool = True,
    eot: int = 1,
    seed: int = 0,
) -> Tensor:
    """Projected Gradient Descent on the L-infinity ball (Madry et al., 2018, arXiv:1706.06083, section 2.1).

    The steps are those of `pgd_iterates`, from x_0 = x or from x_0 = x + uniform noise in [-epsilon, epsilon]. The
    image itself counts as the first iterate.

    model, images, labels, epsilon: as for `fgsm`.
    steps, restarts: at least 1. Each restart takes `steps` steps from new noise.
    step_size: in pixel units, at least 0; None means `default_step_size`.
    random_start: whether to start from noise. Without noise, restarts must be 1.
    loss: "cross_entropy", or "margin", the largest logit of the other classes minus the label's (Carlini and Wagner,
        2017, arXiv:1608.04644). The margin keeps its gradient where a network is so sure that cross-entropy loses it.
    targeted: `labels` are the classes to reach. An iterate succeeds if the model assigns it that class, and a lower
        loss is better.
    early_stop: an image stops at the first iterate that succeeds, so later steps cost less, and that iterate is
        returned. Without early_stop, every image runs to the end, and its iterate of highest loss (targeted: lowest)
        is returned. Switch it off if the examples are for another network (utils.evaluation.evaluate does so): from
        our CNN to our CNN-LSTM at 8/255, examples that only just fool the first leave 81 %, and the others about 15 %.
    eot: as for `fgsm`, of every gradient.
    seed: of the noise. The noise is drawn on the CPU and so is the same on every device.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]. With early_stop, an image's result is its first iterate that succeeds; if none does, it is
    the iterate of highest loss (targeted: lowest). Where two losses are equal, the earlier iterate counts. (A network
    that offers a faster equivalent, see attacks.core.faster_equivalent, is judged by its equivalent. Where two logits
    are equal up to rounding, either may count as the larger.)
    A model that proves random (attacks.state) is attacked without early_stop, because one lucky pass would end the
    attack. Its iterates are compared by their mean loss over JUDGES passes, or eot if that is more, which had no part
    in finding them. A model whose logits depend on the batch is attacked batch by batch: the result is the iterate of
    the whole batch whose mean loss is highest.
    Raises what `fgsm` raises, and ValueError if steps, step_size, restarts or loss is invalid. Warns (RuntimeWarning)
    as attacks.state.examined does, and if an image withstands the attack and its gradient was zero in every pixel at
    every step.
    """
    images = checked_batch(images, labels)
    _check_options(epsilon, steps, step_size, restarts, random_start, loss)
    check_eot(eot)
    if len(images) == 0:
        return images.detach().clone()
    radius = float(epsilon)
    size = default_step_size(epsilon, steps) if step_size is None else step_size
    generator = torch.Generator().manual_seed(seed)
    unusual = examined(model, images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        images = images.detach().clone()
        search = _Search(model, images, labels.clone(), loss, targeted, early_stop, eot, unusual)
        if random_start:
            search.look_at(images)
        for restart in range(restarts):
            start = images
            if random_start:
                # Drawn for the whole batch: an image's noise must not depend on which images have stopped.
                noise = torch.rand(images.shape, generator=generator).mul_(2 * radius).sub_(radius)
                start = (images + noise.to(images)).clamp_(0, 1)
            iterates = pgd_iterates(images, start, search.gradient, epsilon=epsilon, steps=steps, size=size)
            for index, iterate in enumerate(iterates):
                report_progress((restart + index / steps) / restarts)
                if search.finished():
                    return search.best
                if index == steps:  # the last iterate, whose gradient `pgd_iterates` does not ask for
                    search.look_at(iterate)
    if (search.withstands & search.flat).any():
        warn_of_zero_gradient()
    return search.best


def pgd_iterates(
    images: Tensor, start: Tensor, gradient: Callable[[Tensor], Tensor], *, epsilon: float, steps: int, size: float
) -> Iterator[Tensor]:
    """The iterates x_0, ..., x_steps of Projected Gradient Descent, one after the other.

    x_0 = start, x_{k+1} = clip(x_k + size * sign(gradient(x_k))), where clip brings each pixel back to within epsilon
    of its value in `images` and into [0, 1] (Madry et al., 2018, arXiv:1706.06083, section 2.1).

    images, start, and each iterate: float (N, C, H, W) in [0, 1]. gradient: from such a tensor to the gradient of the
    loss, of the same shape. It is called once for each iterate but the last, when the next iterate is asked for.
    epsilon: from 0 to 1, size: at least 0, both in pixel units. Raises ValueError for another epsilon.
    """
    check_epsilon(epsilon)
    radius = float(epsilon)
    low, high = (images - radius).clamp_(0, 1), (images + radius).clamp_(0, 1)
    iterate = start
    yield iterate
    for _ in range(steps):
        iterate = step(iterate, gradient(iterate).sign(), size, low, high)
        yield iterate


def default_step_size(epsilon: float, steps: int) -> float:
    """2.5 * epsilon / steps, the choice of Madry et al. (2018, section 5): large enough to cross the ball.

    epsilon: at least 0, in pixel units. steps: at least 1.
    """
    return 2.5 * float(epsilon) / steps


@dataclass(eq=False)
class _Search:
    """Keeps the best iterate of each image so far, and which images still withstand the attack."""

    model: Model
    images: Tensor
    labels: Tensor
    loss: str
    targeted: bool
    early_stop: bool
    eot: int
    unusual: tuple[str, ...]  # about the model: what attacks.state.examined returns

    def __post_init__(self) -> None:
        self.judges = max(self.eot, JUDGES) if RANDOM in self.unusual else 1
        self.whole_batch = BATCH_DEPENDENT in self.unusual
        self.early_stop &= self.judges == 1 and not self.whole_batch
        self.best = self.images.clone()
        dtype = torch.promote_types(self.images.dtype, torch.float32)
        self.best_values = torch.full(self.labels.shape, -math.inf, dtype=dtype, device=self.images.device)
        self.withstands = torch.ones_like(self.labels, dtype=torch.bool)  # no iterate has succeeded
        self.flat = torch.ones_like(self.withstands)  # every gradient has been zero in every pixel

    def finished(self) -> bool:
        return self.early_stop and not self.withstands.any()

    def look_at(self, iterate: Tensor) -> None:
        """Keep this iterate of each running image on which it is the best so far."""
        running = self._running()
        self._keep(iterate, running, *self._judged(iterate[running], self.labels[running]))

    def gradient(self, iterate: Tensor) -> Tensor:
        """Do as `look_at`. Return the objective's gradient, (N, C, H, W), with zeros for images that have stopped."""
        running = self._running()
        images, labels = iterate[running], self.labels[running]
        logits, values, found = input_gradient(self.model, images, labels, self._objective, self.eot)
        if self.judges > 1:
            logits, values = self._judged(images, labels)
        self._keep(iterate, running, logits, values)
        self.flat[running] &= zero_gradient(found)
        gradient = torch.zeros_like(iterate)
        gradient[running] = found
        return gradient

    def _judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and objectives, the means of passes whose gradients are not used."""
        if self.judges == 1:
            return forward(self.model, images, labels, self._objective)
        passes = [forward(self.model, images, labels, self._objective) for _ in range(self.judges)]
        logits, values = (torch.stack(parts).mean(0) for parts in zip(*passes, strict=True))
        return logits, values

    def _objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = LOSSES[self.loss](logits, labels)
        return -losses if self.targeted else losses

    def _running(self) -> Tensor:
        """The indices of the images that have not stopped."""
        return (self.withstands if self.early_stop else torch.ones_like(self.withstands)).nonzero().flatten()

    def _keep(self, iterate: Tensor, running: Tensor, logits: Tensor, values: Tensor) -> None:
        success = (logits.argmax(1) == self.labels[running]) == self.targeted
        if self.whole_batch:
            values = values.mean().expand_as(values)
        better = values > self.best_values[running]
        if self.early_stop:
            better |= success
        kept = running[better]
        self.best[kept], self.best_values[kept] = iterate[kept], values[better].detach().to(self.best_values)
        self.withstands[running] &= ~success


def _check_options(
    epsilon: float, steps: int, step_size: float | None, restarts: int, random_start: bool, loss: str
) -> None:
    check_epsilon(epsilon)
    if not (steps >= 1 and restarts >= 1):
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if step_size is not None and not (math.isfinite(step_size) and step_size >= 0):
        raise ValueError(f"step_size must be finite and at least 0, not {step_size}")
    if restarts > 1 and not random_start:
        raise ValueError("without random_start every restart would be the same")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
