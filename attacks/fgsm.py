"""Fast Gradient Sign Method: one step of size epsilon along the sign of the input gradient."""

import torch
from torch import Tensor

from attacks.core import (
    Model,
    attacking,
    check_eot,
    check_epsilon,
    checked_batch,
    faster_equivalent,
    input_gradient,
    step,
    warn_of_zero_gradient,
    zero_gradient,
)


def fgsm(
    model: Model, images: Tensor, labels: Tensor, *, epsilon: float, targeted: bool = False, eot: int = 1
) -> Tensor:
    """Fast Gradient Sign Method (Goodfellow et al., 2015, arXiv:1412.6572, section 4).

    x' = clamp(x + epsilon * sign(grad_x cross_entropy(model(x), y)), 0, 1). With targeted=True the step goes the other
    way, towards the classes in `labels`.

    model: any callable from images in [0, 1] to logits (N, K), or to a dict, tuple or object that holds logits
        (attacks.core.logits_of). It is attacked in evaluation mode, with the modules that it hides in a closure or a
        list, say (attacks.modules.modules_of). Its mode, its parameters' requires_grad and their .grad are afterwards
        as they were before.
    images: float (N, C, H, W) in [0, 1], in any memory format. Values that rounding has left just outside are clamped.
    labels: int64 (N,) in 0..K-1.
    epsilon: L-infinity radius in pixel units, such as 8/255. 0 returns the images bit for bit. 1 is the
        largest, because every image lies within 1 of every other.
    eot: average the gradient over this many passes: expectation over transformation, for a model that is random
        (Athalye et al., 2018, arXiv:1802.00420, section 4.2.2).

    Returns images of the same shape, dtype, device and memory format, each within epsilon of its original (to one
    rounding unit of the dtype) and inside [0, 1].
    Raises TypeError if images are not a floating point tensor or labels are not an int64 tensor. Raises ValueError if a
    shape does not fit, images leave [0, 1] or hold NaN, a label is not a class of the model, epsilon is not from 0 to 1
    or eot is below 1. Raises AttackError, a kind of ValueError, if the gradient is missing or not finite, or if the
    model returns something other than logits. Warns (RuntimeWarning) if an image's gradient is zero in every pixel;
    that image is returned unchanged.
    """
    check_epsilon(epsilon)
    images = checked_batch(images, labels)
    direction = _direction(model, images, labels, eot)
    return step(images.detach(), -direction if targeted else direction, epsilon)


def fgsm_direction(model: Model, images: Tensor, labels: Tensor, *, eot: int = 1) -> Tensor:
    """The sign of the input gradient of cross-entropy: -1, 0 or 1, with the shape and dtype of images (N, C, H, W).

    The sign does not depend on epsilon, so one gradient pass serves every epsilon: fgsm(..., epsilon=e) equals
    step(images, fgsm_direction(...), e). Arguments, errors and warnings are those of `fgsm`.
    """
    return _direction(model, checked_batch(images, labels), labels, eot)


def _direction(model: Model, images: Tensor, labels: Tensor, eot: int) -> Tensor:
    check_eot(eot)
    if len(images) == 0:
        return torch.zeros_like(images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        _, _, gradient = input_gradient(model, images, labels.clone(), eot=eot)
    if zero_gradient(gradient).any():
        warn_of_zero_gradient()
    # Not in place: autograd may return one number expanded over the image, as for the gradient of a sum.
    return gradient.sign()
