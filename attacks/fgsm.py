"""Fast Gradient Sign Method: one step of size epsilon along the sign of the input gradient, or along the gradient."""

import torch
from torch import Tensor

from attacks.core import (
    Model,
    attacking,
    check_eot,
    checked_batch,
    faster_equivalent,
    input_gradient,
    warn_of_zero_gradient,
    zero_gradient,
)
from attacks.norms import BALLS, check_epsilon


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    targeted: bool = False,
    eot: int = 1,
) -> Tensor:
    """Fast Gradient Sign Method (Goodfellow et al., 2015, arXiv:1412.6572, section 4).

    x' = clamp(x + epsilon * sign(grad_x cross_entropy(model(x), y)), 0, 1). With norm "l2", the gradient at length 1
    replaces its sign (Miyato et al., 2017, arXiv:1605.07725, equation 5). With targeted=True the step goes the other
    way, towards the classes in `labels`.

    model: any callable from images in [0, 1] to logits (N, K), or to a dict, tuple or object that holds logits
        (attacks.core.logits_of). It is attacked in evaluation mode, with the modules that it hides in a closure or a
        list, say (attacks.modules.modules_of). Its mode, its parameters' requires_grad and their .grad are afterwards
        as they were before.
    images: float (N, C, H, W) in [0, 1], in any memory format. Values that rounding has left just outside are clamped.
    labels: int64 (N,) in 0..K-1.
    epsilon: radius in pixel units, such as 8/255. 0 returns the images bit for bit. 1 is the largest for L-infinity,
        because every image lies within 1 of every other.
    norm: of the ball, "linf" or "l2". An L2 radius is finite, such as 0.5 for 32 x 32 pixels.
    eot: average the gradient over this many passes: expectation over transformation, for a model that is random
        (Athalye et al., 2018, arXiv:1802.00420, section 4.2.2).

    Returns images of the same shape, dtype, device and memory format, each within epsilon of its original (each pixel
    to one rounding unit of the dtype) and inside [0, 1].
    Raises TypeError if images are not a floating point tensor or labels are not an int64 tensor. Raises ValueError if a
    shape does not fit, images leave [0, 1] or hold NaN, a label is not a class of the model, epsilon is not a radius
    of the norm or eot is below 1. Raises AttackError, a kind of ValueError, if the gradient is missing or not finite,
    or if the model returns something other than logits. Warns (RuntimeWarning) if an image's gradient is zero in every
    pixel; that image is returned unchanged.
    """
    check_epsilon(epsilon, norm)
    images = checked_batch(images, labels)
    gradient = _gradient(model, images, labels, eot)
    return BALLS[norm](images.detach(), epsilon).moved(images.detach(), -gradient if targeted else gradient, epsilon)


def fgsm_direction(model: Model, images: Tensor, labels: Tensor, *, eot: int = 1) -> Tensor:
    """The sign of the input gradient of cross-entropy: -1, 0 or 1, with the shape and dtype of images (N, C, H, W).

    The sign does not depend on epsilon, so one gradient pass serves every epsilon: fgsm(..., epsilon=e) equals
    step(images, fgsm_direction(...), e). Arguments, errors and warnings are those of `fgsm`.
    """
    # Not in place: autograd may return one number expanded over the image, as for the gradient of a sum.
    return _gradient(model, checked_batch(images, labels), labels, eot).sign()


def _gradient(model: Model, images: Tensor, labels: Tensor, eot: int) -> Tensor:
    check_eot(eot)
    if len(images) == 0:
        return torch.zeros_like(images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        _, _, gradient = input_gradient(model, images, labels.clone(), eot=eot)
    if zero_gradient(gradient).any():
        warn_of_zero_gradient()
    return gradient
