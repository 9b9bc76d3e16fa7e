"""The loop of Projected Gradient Descent, and the search for each image's best iterate that its attacks share."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attacks.core import (
    Loss,
    Model,
    check_epsilon,
    forward,
    input_gradient,
    step,
    warn_of_zero_gradient,
    zero_gradient,
)
from attacks.state import BATCH_DEPENDENT, RANDOM

JUDGES = 4  # passes over each iterate of a random model that had no part in finding it


def pgd_iterates(
    images: Tensor, start: Tensor, gradient: Callable[[Tensor], Tensor], *, epsilon: float, sizes: Sequence[float]
) -> Iterator[Tensor]:
    """The iterates x_0, x_1, ... of Projected Gradient Descent, one after the other, and one more than `sizes`.

    x_0 = start, x_{k+1} = clip(x_k + sizes[k] * sign(gradient(x_k))), where clip brings each pixel back to within
    epsilon of its value in `images` and into [0, 1] (Madry et al., 2018, arXiv:1706.06083, section 2.1).

    images, start, and each iterate: float (N, C, H, W) in [0, 1]. gradient: from such a tensor to the gradient of the
    loss, of the same shape. It is called once for each iterate but the last, when the next iterate is asked for.
    epsilon: from 0 to 1, sizes: each at least 0, all in pixel units. Raises ValueError for another epsilon.
    """
    check_epsilon(epsilon)
    radius = float(epsilon)
    low, high = (images - radius).clamp_(0, 1), (images + radius).clamp_(0, 1)
    iterate = start
    yield iterate
    for size in sizes:
        iterate = step(iterate, gradient(iterate).sign(), size, low, high)
        yield iterate


def noise_source(images: Tensor, epsilon: float, seed: int) -> Iterator[Tensor]:
    """Uniform noise in [-epsilon, epsilon], (N, C, H, W), again and again.

    The noise is drawn on the CPU, so it is the same on every device. It is drawn for the whole batch, because an
    image's noise must not depend on which images have stopped.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        noise = torch.rand(images.shape, generator=generator).mul_(2 * float(epsilon)).sub_(float(epsilon))
        yield noise.to(images)


class Search:
    """Keeps the best iterate of each image so far, and which images still withstand the attack.

    `best`: (N, C, H, W), the first iterate of each image that succeeds or, if none does, its iterate of highest value.
    `towards`: the loss whose gradient is followed. `among`: bool (N,), the images that are moved.
    Without `early_stop`, `best` holds each image's iterate of highest value, whether or not one succeeds.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        value: Loss,  # iterates of an image are compared by it; `towards` is the same, until an attack changes it
        unusual: tuple[str, ...],  # about the model: what attacks.state.examined returns
        epsilon: float,
        targeted: bool = False,
        early_stop: bool = True,
        eot: int = 1,
    ) -> None:
        self.model, self.images, self.labels = model, images.detach().clone(), labels.clone()
        self.value = self.towards = (lambda logits, labels: -value(logits, labels)) if targeted else value
        self.epsilon, self.targeted, self.eot = epsilon, targeted, eot
        self.judges = max(eot, JUDGES) if RANDOM in unusual else 1
        self.whole_batch = BATCH_DEPENDENT in unusual
        self.early_stop = early_stop and self.judges == 1 and not self.whole_batch
        self.best = self.images.clone()
        dtype = torch.promote_types(images.dtype, torch.float32)
        self.best_values = torch.full(labels.shape, -math.inf, dtype=dtype, device=images.device)
        self.among = torch.ones_like(labels, dtype=torch.bool)
        self.withstands = torch.ones_like(self.among)  # no iterate has succeeded
        self.flat = torch.ones_like(self.among)  # every gradient has been zero in every pixel

    def climb(self, noise: Tensor | None, sizes: Sequence[float]) -> Iterator[int]:
        """Look at the iterates from images + noise on. Yields the number of each, before it looks at it.

        noise: (N, C, H, W); None: the images are the first iterate. sizes: of the steps, in pixel units.
        """
        start = self.images if noise is None else (self.images + noise).clamp_(0, 1)
        iterates = pgd_iterates(self.images, start, self._gradient, epsilon=self.epsilon, sizes=sizes)
        for index, iterate in enumerate(iterates):
            yield index
            if len(self._running()) == 0:
                return
            if index == len(sizes):  # the last iterate, whose gradient `pgd_iterates` does not ask for
                self.look_at(iterate)

    def look_at(self, iterate: Tensor) -> Tensor:
        """Keep this iterate of each moving image on which it is the best so far. Returns their logits."""
        running = self._running()
        logits, values = self._judged(iterate[running], self.labels[running])
        self._keep(iterate, running, logits, values)
        return logits

    def warn_if_flat(self) -> None:
        """Warn if an image withstands the attack and its gradient was zero in every pixel at every step."""
        if (self.withstands & self.flat).any():
            warn_of_zero_gradient()

    def _gradient(self, iterate: Tensor) -> Tensor:
        """Do as `look_at`. Return the gradient to follow, (N, C, H, W), with zeros for images that have stopped."""
        running = self._running()
        images, labels = iterate[running], self.labels[running]
        logits, values, found = input_gradient(self.model, images, labels, self.towards, self.eot)
        if self.judges > 1:
            logits, values = self._judged(images, labels)
        elif self.towards is not self.value:
            values = self.value(logits, labels)
        self._keep(iterate, running, logits, values)
        self.flat[running] &= zero_gradient(found)
        gradient = torch.zeros_like(iterate)
        gradient[running] = found
        return gradient

    def _judged(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values, the means of passes whose gradients are not used."""
        if self.judges == 1:
            return forward(self.model, images, labels, self.value)
        passes = [forward(self.model, images, labels, self.value) for _ in range(self.judges)]
        logits, values = (torch.stack(parts).mean(0) for parts in zip(*passes, strict=True))
        return logits, values

    def _running(self) -> Tensor:
        """The indices of the images that are moved and have not stopped."""
        return (self.among & self.withstands if self.early_stop else self.among).nonzero().flatten()

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
