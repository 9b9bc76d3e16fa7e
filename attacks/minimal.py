"""The smallest radius at which each image falls, as far as PGD can tell."""

import math
from typing import Any

import torch
from torch import Tensor

from attacks.core import Model, attacking, checked_batch, logits_of
from attacks.norms import bounded, length
from attacks.pgd import pgd
from attacks.progress import in_turn
from attacks.search import JUDGES
from attacks.state import RANDOM, examined, remembering

ROUNDS = 16
DOUBLINGS = 8  # from the first radius to the largest


def minimal_epsilon(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    loss: str = "margin",
    rounds: int = ROUNDS,
    **options: Any,
) -> Tensor:
    """For each image, the distance of the nearest adversarial example that PGD finds: float64 (N,), in pixel units.

    This is an upper bound of the true smallest radius: each distance is that of an example, and a nearer one may exist.
    A model that proves random has failed if it errs in most of several fresh passes.
    An image that is misclassified from the start has 0, and an image for which no example was found has infinity.
    Each image is attacked at `rounds` radii. The first one is 1/256 of the largest distance of two images, and it is
    doubled until the image falls. Then the radius is the middle between the largest one that failed and the nearest
    example, by bisection. (PGD may fail at a radius and succeed at a smaller one, so it does not start at the largest.)

    model, images, labels, norm: as for `fgsm`. loss: as for `pgd`; the margin finds nearer examples than cross-entropy.
    rounds: at least 9, or the doubling would not reach the largest radius.
    options: of `pgd`, such as steps or restarts, but not epsilon or targeted.
    Raises what `pgd` raises, and ValueError if rounds is below 9 or if targeted is given.
    """
    if rounds <= DOUBLINGS:
        raise ValueError(f"rounds must be at least {DOUBLINGS + 1}, not {rounds}")
    if options.get("targeted"):
        raise ValueError("minimal_epsilon searches for any other class: it takes no targets")
    images = checked_batch(images, labels)
    largest = 1.0 if norm == "linf" else float(bounded(math.inf, images.shape))
    unusual = examined(model, images)
    judges = JUDGES if RANDOM in unusual else 1
    failed = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    nearest = torch.full_like(failed, math.inf)
    for _ in in_turn(range(rounds), [1] * rounds):
        grown = (2 * failed).clamp(largest / 2**DOUBLINGS, largest)
        radii = torch.where(nearest.isinf(), grown, (failed + nearest) / 2)
        tried = ((failed < nearest) & (failed < largest)).nonzero().flatten()
        if len(tried) == 0:
            break
        some, of_some = images[tried], labels[tried]
        with remembering(model, unusual):
            adversarial = pgd(model, some, of_some, epsilon=radii[tried], norm=norm, loss=loss, **options)
        offset = adversarial.double() - some.double()
        distance = (offset.abs().amax((1, 2, 3)) if norm == "linf" else length(offset).flatten()).to(nearest)
        with attacking(model, images.device), torch.no_grad():
            passes = [logits_of(model, adversarial).argmax(1) != of_some for _ in range(judges)]
        fallen = torch.stack(passes).float().mean(0) > 0.5
        nearest[tried] = torch.where(fallen, torch.minimum(distance, nearest[tried]), nearest[tried])
        failed[tried] = torch.where(fallen, failed[tried], radii[tried])
    return nearest
