"""The multi-targeted attack: PGD towards each other class in turn, for a final judgement of a robust network."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from attacks.core import (
    Loss,
    Model,
    attacking,
    check_epsilon,
    checked_batch,
    faster_equivalent,
    forward,
    input_gradient,
    margin,
    step,
    warn_of_zero_gradient,
    zero_gradient,
)
from attacks.progress import report_progress

MOST_TARGETS = 9  # as in AutoAttack: of more classes, an image is moved towards the nine most likely ones


def multi_targeted(
    model: Model, images: Tensor, labels: Tensor, *, epsilon: float, steps: int = 50, restarts: int = 1, seed: int = 0
) -> Tensor:
    """Multi-targeted PGD on the difference of two logits (Gowal et al., 2019, arXiv:1910.09338, section 3).

    For each other class t, PGD increases z_t - z_label, the target's logit minus the label's. Cross-entropy and the
    margin follow the class that is nearest at the moment; on a robust network they often stay there, although another
    class is within reach. An image stops at the first iterate that the model misclassifies, whatever its class then is.
    Only images that have withstood a target go on to the next one.

    model, images, labels, epsilon: as for `fgsm`. With more than ten classes, each image has the nine targets that the
        model finds most likely.
    steps, restarts: at least 1. Each target has `restarts` random starts, and each start `steps` steps. The steps
        shrink from epsilon / 2 to nothing as half a cosine, so that the first ones cross the ball and the last ones
        refine.
    seed: of the noise. The noise is drawn on the CPU and so is the same on every device.

    One lucky pass may fool a model that answers at random. Judge the result by fresh passes, as `evaluate` does.
    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]: a misclassified image where a target succeeded, else the iterate with the largest margin.
    Raises what `fgsm` raises, and ValueError if steps or restarts is invalid. Warns (RuntimeWarning) if an image
    withstands the attack and its gradient was zero in every pixel at every step.
    """
    check_epsilon(epsilon)
    images = checked_batch(images, labels)
    if not (steps >= 1 and restarts >= 1):
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if len(images) == 0:
        return images.detach().clone()
    model, epsilon = faster_equivalent(model), float(epsilon)
    generator = Generator().manual_seed(seed)
    with attacking(model, images.device):
        search = _Search(model, images.detach().clone(), labels.clone(), epsilon, steps)
        wanted = search.targets()
        rounds = [(target, of) for target, of in enumerate(wanted.T) if of.any()]
        for number, (target, of) in enumerate(rounds):
            for restart in range(restarts):
                # Drawn for the whole batch: an image's noise must not depend on which images have stopped.
                noise = torch.rand(images.shape, generator=generator).mul_(2 * epsilon).sub_(epsilon)
                for part in search.climb(target, of, noise.to(images)):
                    report_progress((number + (restart + part) / restarts) / len(rounds))
    if (search.withstands & search.flat).any():
        warn_of_zero_gradient()
    return search.best


class _Search:
    """The best iterate of each image so far, and which images still withstand the attack."""

    def __init__(self, model: Model, images: Tensor, labels: Tensor, epsilon: float, steps: int) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.epsilon, self.steps = epsilon, steps
        self.low, self.high = (images - epsilon).clamp_(0, 1), (images + epsilon).clamp_(0, 1)
        self.best = images.clone()
        dtype = torch.promote_types(images.dtype, torch.float32)
        self.margins = torch.full(labels.shape, -math.inf, dtype=dtype, device=images.device)
        self.withstands = torch.ones_like(labels, dtype=torch.bool)
        self.flat = torch.ones_like(self.withstands)  # every gradient has been zero in every pixel

    def targets(self) -> Tensor:
        """Which classes are targets of each image: bool (N, K). The images themselves are the first iterates."""
        logits, _ = forward(self.model, self.images, self.labels, margin)
        self._keep(self.images, torch.arange(len(self.labels), device=self.labels.device), logits)
        others = logits.scatter(1, self.labels[:, None], -math.inf)
        likely = others.topk(min(MOST_TARGETS, logits.shape[1] - 1), dim=1).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, likely, True)

    def climb(self, target: int, of: Tensor, noise: Tensor) -> Iterator[float]:
        """Move the images `of` (bool, (N,)) that withstand towards a class, from the noise (N, C, H, W).

        Yields before each step which part of the steps is done, in [0, 1).
        """
        running = (of & self.withstands).nonzero().flatten()
        iterate = self.images[running].add_(noise[running]).clamp_(0, 1)
        for number, size in enumerate(self._sizes()):
            if len(running) == 0:
                return
            yield number / self.steps
            labels = self.labels[running]
            logits, _, gradient = input_gradient(self.model, iterate, labels, _towards(target))
            self.flat[running] &= zero_gradient(gradient)
            on = ~self._keep(iterate, running, logits)
            running, iterate, gradient = running[on], iterate[on], gradient[on]
            iterate = step(iterate, gradient.sign(), size, self.low[running], self.high[running])
        if len(running):
            logits, _ = forward(self.model, iterate, self.labels[running], margin)
            self._keep(iterate, running, logits)

    def _sizes(self) -> Iterator[float]:
        for number in range(self.steps):
            yield self.epsilon * (1 + math.cos(math.pi * number / self.steps)) / 4

    def _keep(self, iterate: Tensor, running: Tensor, logits: Tensor) -> Tensor:
        """Keep the iterates that are better than all before. Returns which are misclassified, bool (len(running),)."""
        success = logits.argmax(1) != self.labels[running]
        margins = margin(logits, self.labels[running]).to(self.margins)
        better = success | (margins > self.margins[running])
        self.best[running[better]], self.margins[running[better]] = iterate[better], margins[better]
        self.withstands[running] &= ~success
        return success


def _towards(target: int) -> Loss:
    """The loss z_target - z_label of each image."""

    def difference(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[:, target] - logits.gather(1, labels[:, None])[:, 0]

    return difference
