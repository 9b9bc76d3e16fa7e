"""Attacks for a final judgement of a robust network: the multi-targeted one, and a cascade that ends with it."""

import math
from typing import Any

import torch
from torch import Tensor

from attacks.core import Model, attacking, check_precision, checked_batch, faster_equivalent, margin
from attacks.norms import check_epsilon, noise_source
from attacks.progress import in_turn, report_progress
from attacks.search import Search
from attacks.state import examined

MOST_TARGETS = 9  # of an image, as in AutoAttack


def multi_targeted(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    steps: int = 50,
    restarts: int = 1,
    early_stop: bool = True,
    precision: str = "float32",
    seed: int = 0,
    cascade: bool = False,
) -> Tensor:
    """Multi-targeted PGD on the difference of two logits (Gowal et al., 2019, arXiv:1910.09338, section 3).

    For each target t, PGD increases z_t - z_label, the target's logit minus the label's. Cross-entropy and the margin
    follow the class that is nearest at the moment; on a robust network they often stay there, although another class
    is within reach. Each image's targets are the other classes, of more than nine the nine most likely ones; the one
    that the model finds most likely comes first. An image stops at the first iterate that the model misclassifies,
    whatever its class then is. Only images that have withstood a target go on to the next one.

    model, images, labels, epsilon, norm: as for `fgsm`.
    steps, restarts: at least 1. Each target has `restarts` random starts, and each start `steps` steps. The steps
        shrink from epsilon / 2 to nothing as half a cosine, so that the first ones cross the ball and the last ones
        refine.
    early_stop, precision: as for `pgd`. Without early_stop, every image is moved towards all its targets.
    seed: of the noise. The noise is drawn on the CPU and so is the same on every device.
    cascade: whether cheaper attacks come first, as `strong` documents.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]: a misclassified image where a target succeeded, else the iterate with the largest margin.
    A random model, or one whose logits depend on the batch, is attacked to the end and judged as `pgd` documents.
    Raises what `fgsm` raises, and ValueError if steps or restarts is invalid. Warns as `pgd` does.
    """
    check_epsilon(epsilon, norm)
    check_precision(precision)
    images = checked_batch(images, labels)
    if not (steps >= 1 and restarts >= 1):
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if len(images) == 0:
        return images.detach().clone()
    noise = noise_source(images, epsilon, seed, norm)
    cosine = [epsilon * (1 + math.cos(math.pi * number / steps)) / 4 for number in range(steps)]
    unusual = examined(model, images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        options: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "early_stop": early_stop, "precision": precision}
        search = Search(model, images, labels, margin, unusual, **options)
        targets = _targets(search.look_at(search.images), labels).T
        cheap = [(margin, labels, False, [epsilon]), (margin, labels, True, [epsilon / 4] * 10)]
        dear = [(_difference, torch.stack([labels, t], 1), True, cosine) for t in targets for _ in range(restarts)]
        climbs = cheap + dear if cascade else dear
        for loss, aims, noisy, sizes in in_turn(climbs, [len(sizes) for *_, sizes in climbs]):
            search.towards, search.aims = loss, aims
            for index in search.climb(next(noise) if noisy else None, sizes):
                report_progress(index / len(sizes))
    search.warn_if_flat()
    return search.best


def strong(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    steps: int = 50,
    early_stop: bool = True,
    precision: str = "float32",
    seed: int = 0,
) -> Tensor:
    """A cascade of attacks that grow dearer and stronger.

    First a single step of size epsilon on the margin, as FGSM takes it. Then PGD on the margin with ten steps. Last
    `multi_targeted`. An image stops at the first iterate that the model misclassifies, and only images that withstand
    an attack go on to the next, as in AutoAttack (Croce and Hein, 2020, arXiv:2003.01690).

    Arguments, result, errors and warnings are those of `multi_targeted`.
    """
    options: dict[str, Any] = {"norm": norm, "steps": steps, "early_stop": early_stop, "precision": precision}
    return multi_targeted(model, images, labels, epsilon=epsilon, seed=seed, cascade=True, **options)


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    """The classes that each image is moved towards, the most likely first: int64 (N, number of targets)."""
    others = logits.scatter(1, labels[:, None], -math.inf)
    return others.topk(min(MOST_TARGETS, logits.shape[1] - 1), dim=1).indices


def _difference(logits: Tensor, aims: Tensor) -> Tensor:
    """The logit of each image's target minus that of its label: (N,). aims: int64 (N, 2), label and target."""
    label, target = logits.gather(1, aims).T
    return target - label
