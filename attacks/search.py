"""The loop of Projected Gradient Descent, and the search for each image's best iterate that its attacks share."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from attacks.core import Loss, Model, forward, in_bfloat16, input_gradient, warn_of_zero_gradient, zero_gradient
from attacks.norms import BALLS, Radius, check_epsilon, unit
from attacks.state import BATCH_DEPENDENT, RANDOM

JUDGES = 4  # passes over each iterate of a random model that had no part in finding it


def pgd_iterates(
    images: Tensor,
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    *,
    epsilon: Radius,
    sizes: Sequence[Radius],
    norm: str = "linf",
    momentum: float = 0,
) -> Iterator[Tensor]:
    """The iterates x_0, x_1, ... of Projected Gradient Descent, one after the other, and one more than `sizes`.

    x_0 = start, x_{k+1} = clip(x_k + sizes[k] * sign(g_k)), where g_k = gradient(x_k), and clip brings each pixel back
    to within epsilon of its value in `images` and into [0, 1] (Madry et al., 2018, arXiv:1706.06083, section 2.1).
    With norm "l2", g_k / |g_k| replaces the sign, and the offset from `images` is shortened to epsilon, then clamped.
    With momentum mu, g_k = mu * g_{k-1} + gradient(x_k) / ||gradient(x_k)||_1 (Dong et al., 2018, arXiv:1710.06081,
    equation 6).

    images, start, and each iterate: float (N, C, H, W) in [0, 1]. gradient: from such a tensor to the gradient of the
    loss, of the same shape. It is called once for each iterate but the last, when the next iterate is asked for.
    epsilon, norm: as for attacks.norms.check_epsilon, which raises ValueError. sizes: each at least 0. All are in pixel
    units, and may be tensors (N,) with a number for each image.
    """
    check_epsilon(epsilon, norm)
    ball = BALLS[norm](images, epsilon)
    iterate, followed = start, None
    yield iterate
    for size in sizes:
        found = gradient(iterate)
        if momentum:
            found = unit(found.to(torch.promote_types(found.dtype, torch.float32)), 1)
            found = followed = found if followed is None else momentum * followed + found
        iterate = ball.moved(iterate, found, size)
        yield iterate


class Search:
    """Keeps the best iterate of each image so far, and which images still withstand the attack.

    `best`: (N, C, H, W), the first iterate of each image that succeeds or, if none does, its iterate of highest value.
    `towards`: the loss whose gradient is followed. `aims`: what it gets beside the logits, a row for each image; the
    labels (N,), until an attack changes both.
    Without `early_stop`, `best` holds each image's iterate of highest value, whether or not one succeeds.
    With precision "bfloat16", gradients and the values of most iterates come from passes in bfloat16. An iterate that
    seems to succeed is judged again in float32, and so is the last one of each climb.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        value: Loss,  # iterates of an image are compared by it; `towards` is the same at first
        unusual: tuple[str, ...],  # about the model: what attacks.state.examined returns
        *,
        epsilon: Radius,
        norm: str = "linf",
        momentum: float = 0,
        targeted: bool = False,
        early_stop: bool = True,
        eot: int = 1,
        precision: str = "float32",
    ) -> None:
        self.model, self.images = model, images.detach().clone()
        self.labels = self.aims = labels.clone()
        self.value = self.towards = (lambda logits, labels: -value(logits, labels)) if targeted else value
        self.targeted, self.eot = targeted, eot
        self.iterates = partial(pgd_iterates, self.images, epsilon=epsilon, norm=norm, momentum=momentum)
        self.judges = max(eot, JUDGES) if RANDOM in unusual else 1
        self.whole_batch = BATCH_DEPENDENT in unusual
        reduced = precision == "bfloat16" and not self.whole_batch
        self.guide = in_bfloat16(model) if reduced else model  # whose gradient is followed
        self.early_stop = early_stop and self.judges == 1 and not self.whole_batch
        self.best = self.images.clone()
        dtype = torch.promote_types(images.dtype, torch.float32)
        self.best_values = torch.full(labels.shape, -math.inf, dtype=dtype, device=images.device)
        self.withstands = torch.ones_like(labels, dtype=torch.bool)  # no iterate has succeeded
        self.flat = torch.ones_like(self.withstands)  # every gradient has been zero in every pixel
        # The indices of the images that have not stopped; a slice while all run, because that copies nothing.
        self.running: Tensor | slice = slice(None)

    def climb(self, noise: Tensor | None, sizes: Sequence[Radius]) -> Iterator[int]:
        """Look at the iterates from images + noise on. Yields the number of each, before it looks at it.

        noise: (N, C, H, W); None: the images are the first iterate. sizes: of the steps, in pixel units.
        """
        if self._all_stopped():
            return
        start = self.images if noise is None else (self.images + noise).clamp_(0, 1)
        for index, iterate in enumerate(self.iterates(start, self._gradient, sizes=sizes)):
            yield index
            if self._all_stopped():
                return
            if index == len(sizes):  # the last iterate, whose gradient `pgd_iterates` does not ask for
                self.look_at(iterate)

    def look_at(self, iterate: Tensor) -> Tensor:
        """Keep this iterate of each running image on which it is the best so far. Returns their logits."""
        logits, values = self._judged(iterate[self.running], self.labels[self.running])
        self._keep(iterate, logits, values)
        return logits

    def warn_if_flat(self) -> None:
        """Warn if an image withstands the attack and its gradient was zero in every pixel at every step."""
        if (self.withstands & self.flat).any():
            warn_of_zero_gradient()

    def _gradient(self, iterate: Tensor) -> Tensor:
        """Do as `look_at`. Return the gradient to follow, (N, C, H, W), with zeros for images that have stopped."""
        running = self.running
        images, labels = iterate[running], self.labels[running]
        logits, values, found = input_gradient(self.guide, images, self.aims[running], self.towards, self.eot)
        if self.judges > 1:
            logits, values = self._judged(images, labels)
        elif self.towards is not self.value:
            values = self.value(logits, labels)
        if self.judges == 1 and self.guide is not self.model:
            seem = self._succeed(logits, labels).nonzero().flatten()
            if len(seem):
                judged, judged_values = self._judged(images[seem], labels[seem])
                logits[seem], values[seem] = judged.to(logits), judged_values.to(values)
        self._keep(iterate, logits, values)
        self.flat[running] &= zero_gradient(found)
        if isinstance(running, slice):
            return found
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

    def _succeed(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which images the attack has won, bool (N,)."""
        return (logits.argmax(1) == labels) == self.targeted

    def _all_stopped(self) -> bool:
        return isinstance(self.running, Tensor) and len(self.running) == 0

    def _keep(self, iterate: Tensor, logits: Tensor, values: Tensor) -> None:
        running = self.running
        success = self._succeed(logits, self.labels[running])
        if self.whole_batch:
            values = values.mean().expand_as(values)
        better = values > self.best_values[running]
        if self.early_stop:
            better |= success
        improved = better.nonzero().flatten()
        if len(improved):
            kept = improved if isinstance(running, slice) else running[improved]
            self.best[kept], self.best_values[kept] = iterate[kept], values[improved].detach().to(self.best_values)
        if success.any():
            self.withstands[running] &= ~success
            if self.early_stop:
                self.running = self.withstands.nonzero().flatten()
