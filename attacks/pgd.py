"""Projected Gradient Descent: FGSM's step, smaller and many times, each time back into the ball around the image."""

import math
from itertools import chain, repeat

import torch

from attacks.core import (
    LOSSES,
    attacking,
    check_epsilon,
    check_images_and_labels,
    folded,
    forward,
    input_gradient,
    no_gradient,
    step,
    warn_of_no_gradient,
)


def pgd(
    model,
    images,
    labels,
    *,
    epsilon,
    steps=20,
    step_size=None,
    restarts=1,
    random_start=True,
    loss="cross_entropy",
    targeted=False,
    seed=0,
):
    """Projected Gradient Descent on the L-infinity ball (Madry et al., 2018, arXiv:1706.06083, section 2.1).

    x_0 = x, or x + uniform noise in [-epsilon, epsilon]; x_{k+1} = x_k + step_size * sign(grad loss(model(x_k), y)),
    brought back each time to within epsilon of x and into [0, 1]. The image itself counts as the first iterate. An
    image that an iterate gets misclassified leaves the batch, so that what is left costs less with every step.

    model, images, labels, epsilon: as for `fgsm`. steps, restarts: at least 1. step_size: in pixel units; by default
        `default_step_size`.
    random_start: the noise; without it, there is nothing to restart.
    loss: "cross_entropy", or "margin", the largest wrong logit less the label's (Carlini and Wagner, 2017), which
        does not flatten where the network is sure.
    targeted: labels are the classes to be reached, and an iterate has succeeded once it is classified so.
    seed: of the noise, which is drawn on the CPU and so is the same on every device.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]: of each the first iterate that succeeds, else the one of highest loss (targeted: lowest).
    (On a network that is folded, attacks.core.folded, where two logits agree to rounding either may count as higher.)
    Raises what `fgsm` raises, and ValueError for steps, step_size, restarts or loss that are none. Warns
    (RuntimeWarning) if an image withstands it whose gradient was zero in every pixel at every step.
    """
    check_epsilon(epsilon)
    check_images_and_labels(images, labels)
    if not (steps >= 1 and restarts >= 1):
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    step_size = default_step_size(epsilon, steps) if step_size is None else step_size
    if not (math.isfinite(step_size) and step_size >= 0):
        raise ValueError(f"step_size must be finite and at least 0, not {step_size}")
    if restarts > 1 and not random_start:
        raise ValueError("without random_start every restart would be the same")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")
    if len(images) == 0:
        return images.detach().clone()

    def objective(logits, labels):
        return -LOSSES[loss](logits, labels) if targeted else LOSSES[loss](logits, labels)

    radius = min(float(epsilon), 1.0)
    generator = torch.Generator().manual_seed(seed)
    # With a random start, the image itself is an iterate too: no noise and no steps, for its loss alone.
    starts = chain([(False, 0)] * random_start, repeat((random_start, steps), restarts))
    model = folded(model)
    with attacking(model, images.device):
        images, labels = images.detach().clone(), labels.clone()
        low, high = (images - radius).clamp_(0, 1), (images + radius).clamp_(0, 1)
        result = images.clone()
        best = torch.full(labels.shape, -math.inf, device=images.device)  # the objective of `result`
        left = torch.arange(len(images), device=images.device)  # the images on which no iterate has succeeded yet
        flat = torch.ones_like(left, dtype=torch.bool)  # the images whose gradient has been zero so far
        first = True
        for noisy, moves in starts:
            iterates = images[left]
            if noisy:
                # Drawn for the whole batch, so that an image's noise does not depend on which others are left.
                noise = torch.rand(images.shape, generator=generator).mul_(2 * radius).sub_(radius)
                iterates = (iterates + noise.to(images)[left]).clamp_(0, 1)
            for move in range(moves + 1):
                if move < moves:
                    logits, losses, gradient = input_gradient(model, iterates, labels[left], objective, first=first)
                    flat[left] &= no_gradient(gradient)
                else:  # nowhere to go from here: no gradient
                    logits, losses = forward(model, iterates, labels[left], objective, first=first)
                first = False
                success = (logits.argmax(1) == labels[left]) == targeted
                better = success | (losses > best[left])
                result[left[better]], best[left[better]] = iterates[better], losses[better].to(best)
                left = left[~success]
                if len(left) == 0:
                    return result
                if move < moves:
                    direction = gradient[~success].sign()
                    iterates = step(iterates[~success], direction, step_size, low[left], high[left])
    if flat[left].any():
        warn_of_no_gradient()
    return result


def default_step_size(epsilon, steps):
    """2.5 * epsilon / steps, Madry et al.'s choice, with which an iterate can cross the ball."""
    return 2.5 * min(float(epsilon), 1.0) / steps
