"""Fast Gradient Sign Method: one step of size epsilon along the sign of the input gradient."""

import torch
from torch import Tensor

from attacks.core import (
    Model,
    attacking,
    check_epsilon,
    check_images_and_labels,
    faster_equivalent,
    input_gradient,
    step,
    warn_of_zero_gradient,
    zero_gradient,
)


def fgsm(model: Model, images: Tensor, labels: Tensor, *, epsilon: float, targeted: bool = False) -> Tensor:
    """Fast Gradient Sign Method (Goodfellow et al., 2015, arXiv:1412.6572, section 4).

    x' = clamp(x + epsilon * sign(grad_x cross_entropy(model(x), y)), 0, 1). With targeted=True the step goes the other
    way, towards the classes in `labels`.

    model: any callable from images in [0, 1] to logits (N, K). An nn.Module is attacked in evaluation mode. Its mode,
        its parameters' requires_grad and their .grad are afterwards as they were before.
    images: float (N, C, H, W) in [0, 1], in any memory format. labels: int64 (N,) in 0..K-1.
    epsilon: L-infinity radius in pixel units, such as 8/255. 0 returns the images bit for bit. 1 is the
        largest, because every image lies within 1 of every other.

    Returns images of the same shape, dtype, device and memory format, each within epsilon of its original (to one
    rounding unit of the dtype) and inside [0, 1].
    Raises TypeError if images are not a floating point tensor or labels are not an int64 tensor. Raises ValueError if a
    shape does not fit, images leave [0, 1], a label is not a class of the model, or epsilon is not from 0 to 1.
    Raises AttackError, a kind of ValueError, if the gradient is missing or not finite. Warns (RuntimeWarning) if an
    image's gradient is zero in every pixel; that image is returned unchanged.
    """
    check_epsilon(epsilon)
    direction = _direction(model, images, labels)
    return step(images.detach(), -direction if targeted else direction, epsilon)


def fgsm_direction(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """The sign of the input gradient of cross-entropy: -1, 0 or 1, with the shape and dtype of images (N, C, H, W).

    The sign does not depend on epsilon, so one gradient pass serves every epsilon: fgsm(..., epsilon=e) equals
    step(images, fgsm_direction(...), e). Arguments, errors and warnings are those of `fgsm`.
    """
    return _direction(model, images, labels)


def _direction(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    check_images_and_labels(images, labels)
    if len(images) == 0:
        return torch.zeros_like(images)
    model = faster_equivalent(model)
    with attacking(model, images.device):
        _, _, gradient = input_gradient(model, images, labels.clone())
    if zero_gradient(gradient).any():
        warn_of_zero_gradient(stacklevel=4)  # points at the caller of either public function
    # Not in place: autograd may return one number expanded over the image, as for the gradient of a sum.
    return gradient.sign()
