"""The multi-targeted attack: PGD towards each other class in turn, for a final judgement of a robust network."""

import math

import torch
from torch import Tensor

from attacks.core import Loss, Model, attacking, checked_batch, faster_equivalent, margin
from attacks.norms import check_epsilon, noise_source
from attacks.progress import report_progress
from attacks.search import Search
from attacks.state import examined

MOST_TARGETS = 9  # as in AutoAttack: of more classes, an image is moved towards the nine most likely ones


def multi_targeted(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    steps: int = 50,
    restarts: int = 1,
    seed: int = 0,
) -> Tensor:
    """Multi-targeted PGD on the difference of two logits (Gowal et al., 2019, arXiv:1910.09338, section 3).

    For each other class t, PGD increases z_t - z_label, the target's logit minus the label's. Cross-entropy and the
    margin follow the class that is nearest at the moment; on a robust network they often stay there, although another
    class is within reach. An image stops at the first iterate that the model misclassifies, whatever its class then is.
    Only images that have withstood a target go on to the next one.

    model, images, labels, epsilon, norm: as for `fgsm`. With more than ten classes, each image has the nine targets
        that the model finds most likely.
    steps, restarts: at least 1. Each target has `restarts` random starts, and each start `steps` steps. The steps
        shrink from epsilon / 2 to nothing as half a cosine, so that the first ones cross the ball and the last ones
        refine.
    seed: of the noise. The noise is drawn on the CPU and so is the same on every device.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]: a misclassified image where a target succeeded, else the iterate with the largest margin.
    A random model, or one whose logits depend on the batch, is attacked to the end and judged as `pgd` documents.
    Raises what `fgsm` raises, and ValueError if steps or restarts is invalid. Warns as `pgd` does.
    """
    check_epsilon(epsilon, norm)
    images = checked_batch(images, labels)
    if not (steps >= 1 and restarts >= 1):
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if len(images) == 0:
        return images.detach().clone()
    noise = noise_source(images, epsilon, seed, norm)
    sizes = [epsilon * (1 + math.cos(math.pi * number / steps)) / 4 for number in range(steps)]
    unusual = examined(model, images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        search = Search(model, images, labels, margin, unusual, epsilon=epsilon, norm=norm)
        wanted = _targets(search.look_at(search.images), labels)
        rounds = [(target, of) for target, of in enumerate(wanted.T) if of.any()]
        for number, (target, of) in enumerate(rounds):
            search.towards, search.among = _difference(target), of
            for restart in range(restarts):
                for index in search.climb(next(noise), sizes):
                    report_progress((number + (restart + index / steps) / restarts) / len(rounds))
    search.warn_if_flat()
    return search.best


def _targets(logits: Tensor, labels: Tensor) -> Tensor:
    """Which classes are targets of each image, bool (N, K): the most likely ones, except the label."""
    others = logits.scatter(1, labels[:, None], -math.inf)
    likely = others.topk(min(MOST_TARGETS, logits.shape[1] - 1), dim=1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, likely, True)


def _difference(target: int) -> Loss:
    """The loss z_target - z_label of each image."""

    def difference(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[:, target] - logits.gather(1, labels[:, None])[:, 0]

    return difference
