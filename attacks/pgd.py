"""Projected Gradient Descent: many small steps of FGSM, each followed by a return into the ball around the image."""

import math
from typing import Any

from torch import Tensor

from attacks.core import (
    LOSSES,
    Model,
    attacking,
    check_eot,
    check_loss,
    check_precision,
    checked_batch,
    faster_equivalent,
)
from attacks.norms import Radius, check_epsilon, noise_source
from attacks.progress import report_progress
from attacks.search import Search
from attacks.state import examined

DEFAULT_STEPS = 20


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Radius,
    norm: str = "linf",
    steps: int = DEFAULT_STEPS,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    momentum: float = 0,
    loss: str = "cross_entropy",
    targeted: bool = False,
    early_stop: bool = True,
    eot: int = 1,
    precision: str = "float32",
    seed: int = 0,
) -> Tensor:
    """Projected Gradient Descent (Madry et al., 2018, arXiv:1706.06083, section 2.1).

    The steps are those of `pgd_iterates`, from x_0 = x or from x_0 = x + uniform noise in the ball. The image itself
    counts as the first iterate.

    model, images, labels, epsilon, norm: as for `fgsm`. epsilon may also be a tensor (N,), a radius for each image.
    steps, restarts: at least 1. Each restart takes `steps` steps from new noise.
    step_size: in pixel units, at least 0; None means `default_step_size`.
    random_start: whether to start from noise. Without noise, restarts must be 1.
    momentum: from 0 (off) to 2, the decay of the gradients of earlier steps: MI-FGSM (Dong et al., 2018,
        arXiv:1710.06081), whose examples transfer better. Its authors take steps=10, momentum=1, step_size=epsilon/10,
        random_start=False, and all steps (early_stop=False).
    loss: "cross_entropy", or "margin", the largest logit of the other classes minus the label's (Carlini and Wagner,
        2017, arXiv:1608.04644). The margin keeps its gradient where a network is so sure that cross-entropy loses it.
    targeted: `labels` are the classes to reach. An iterate succeeds if the model assigns it that class, and a lower
        loss is better.
    early_stop: an image stops at the first iterate that succeeds, so later steps cost less, and that iterate is
        returned. Without early_stop, every image runs to the end, and its iterate of highest loss (targeted: lowest)
        is returned. Switch it off if the examples are for another network (utils.evaluation.evaluate does so): from
        our CNN to our CNN-LSTM at 8/255, examples that only just fool the first leave 81 %, and the others about 15 %.
    eot: as for `fgsm`, of every gradient.
    precision: "bfloat16" takes the gradients from passes in bfloat16, which some CPUs and most GPUs compute faster, for
        a model whose parameters are float32. Whether an iterate succeeds is always decided in float32.
    seed: of the noise. The noise is drawn on the CPU and so is the same on every device.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]. With early_stop, an image's result is its first iterate that succeeds; if none does, it is
    the iterate of highest loss (targeted: lowest). Where two losses are equal, the earlier iterate counts. (A network
    that offers a faster equivalent, see attacks.core.faster_equivalent, is judged by its equivalent. Where two logits
    are equal up to rounding, either may count as the larger.)
    A model that proves random (attacks.state) is attacked without early_stop, because one lucky pass would end the
    attack. Its iterates are compared by their mean loss over fresh passes, attacks.search.JUDGES or eot if that is
    more, which had no part in finding them. A model whose logits depend on the batch is attacked batch by batch: the
    result is the iterate of the whole batch whose mean loss is highest.
    Raises what `fgsm` raises, and ValueError if an option is invalid. Warns (RuntimeWarning)
    as attacks.state.examined does, and if an image withstands the attack and its gradient was zero in every pixel at
    every step.
    """
    images = checked_batch(images, labels)
    check_epsilon(epsilon, norm)
    _check_options(steps, step_size, restarts, random_start, momentum, loss)
    check_precision(precision)
    check_eot(eot)
    if len(images) == 0:
        return images.detach().clone()
    size = default_step_size(epsilon, steps) if step_size is None else step_size
    noise = noise_source(images, epsilon, seed, norm)
    unusual = examined(model, images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        options: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "momentum": momentum}
        options |= {"targeted": targeted, "early_stop": early_stop, "eot": eot, "precision": precision}
        search = Search(model, images, labels, LOSSES[loss], unusual, **options)
        if random_start:
            search.look_at(search.images)
        for restart in range(restarts):
            for index in search.climb(next(noise) if random_start else None, [size] * steps):
                report_progress((restart + index / steps) / restarts)
    search.warn_if_flat()
    return search.best


def default_step_size(epsilon: Radius, steps: int) -> Radius:
    """2.5 * epsilon / steps, the choice of Madry et al. (2018, section 5): large enough to cross the ball.

    epsilon: at least 0, in pixel units, or a tensor of such radii. steps: at least 1.
    """
    return 2.5 * (epsilon if isinstance(epsilon, Tensor) else float(epsilon)) / steps


def _check_options(
    steps: int, step_size: float | None, restarts: int, random_start: bool, momentum: float, loss: str
) -> None:
    if not (steps >= 1 and restarts >= 1):
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if step_size is not None and not (math.isfinite(step_size) and step_size >= 0):
        raise ValueError(f"step_size must be finite and at least 0, not {step_size}")
    if restarts > 1 and not random_start:
        raise ValueError("without random_start every restart would be the same")
    if not 0 <= momentum <= 2:
        raise ValueError(f"momentum must be from 0 to 2, not {momentum}")
    check_loss(loss)
