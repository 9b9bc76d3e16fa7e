"""Fast Gradient Sign Method: one step of epsilon along the sign of the input gradient."""

import torch

from attacks.core import (
    attacking,
    check_epsilon,
    check_images_and_labels,
    folded,
    input_gradient,
    no_gradient,
    step,
    warn_of_no_gradient,
)


def fgsm(model, images, labels, *, epsilon, targeted=False):
    """Fast Gradient Sign Method (Goodfellow et al., 2015, arXiv:1412.6572, section 4).

    x' = clamp(x + epsilon * sign(grad_x cross_entropy(model(x), y)), 0, 1); with targeted=True the step is taken
    the other way, towards the classes in `labels`.

    model: any callable from images in [0, 1] to logits (N, K). If it is an nn.Module, the gradient is taken in
        evaluation mode; its mode, its parameters' requires_grad and their .grad are left as they were found.
    images: floating point (N, C, H, W) in [0, 1], in any memory format. labels: int64 (N,) in 0..K-1.
    epsilon: L-infinity radius in pixel units, such as 8/255; 0 returns the images bit for bit. Any radius above 1
        is as good as 1, which reaches every image.

    Returns images of the same shape, dtype, device and memory format, each within epsilon of its original (to one
    rounding unit of the dtype) and inside [0, 1].
    Raises TypeError if images are no floating point tensor or labels no int64 tensor; ValueError if a shape does not
    fit, images leave [0, 1], a label is no class of the model, or epsilon is negative or not finite; AttackError, which
    is one, if the gradient is missing or not finite. Warns (RuntimeWarning) if it is zero in every pixel of an image,
    which is then returned as it came.
    """
    check_epsilon(epsilon)
    direction = _direction(model, images, labels)
    return step(images.detach(), -direction if targeted else direction, epsilon)


def fgsm_direction(model, images, labels):
    """The sign of the input gradient of the cross-entropy: -1, 0 or 1, with the shape and dtype of images.

    It does not depend on epsilon, so one pass over a split serves every epsilon: fgsm(..., epsilon=e) equals
    step(images, fgsm_direction(...), e). Arguments and errors are those of `fgsm`.
    """
    return _direction(model, images, labels)


def _direction(model, images, labels):
    check_images_and_labels(images, labels)
    if len(images) == 0:
        return torch.zeros_like(images)
    model = folded(model)
    with attacking(model, images.device):
        _, _, gradient = input_gradient(model, images, labels.clone())
    if no_gradient(gradient).any():
        warn_of_no_gradient(stacklevel=4)  # of either of the above
    # Not in place: the gradient of a sum, say, is one number expanded over the image.
    return gradient.sign()
