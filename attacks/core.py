"""What the gradient attacks share: input checks, losses, gradients, the step, and the state of a model under attack."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A classifier: images (N, C, H, W) in [0, 1] to logits (N, K). An nn.Module is one, and so is a plain function.
Model = Callable[[Tensor], Tensor]

# A loss of each image: logits (N, K) and labels (N,) to losses (N,).
Loss = Callable[[Tensor, Tensor], Tensor]


class AttackError(ValueError):
    """The model's gradient is missing or not finite, or its logits are NaN, so a gradient attack cannot follow it."""


def check_epsilon(epsilon: float) -> None:
    """Raise ValueError unless epsilon, an L-infinity radius for pixels in [0, 1], is from 0 to 1."""
    if not 0 <= epsilon <= 1:  # NaN fails this test too
        hint = f": did you mean {float(epsilon):g}/255?" if 1 < epsilon <= 255 else ""
        raise ValueError(f"epsilon must be from 0 to 1, not {epsilon}{hint}")


def check_images_and_labels(images: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError, as `fgsm` documents, unless images and labels can be attacked."""
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        raise TypeError(f"images must be a floating point tensor, not {getattr(images, 'dtype', type(images))}")
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64):
        raise TypeError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', type(labels))}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images must be (N, C, H, W) and labels (N,), not {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # NaN fails this test too
        raise ValueError("images must lie in [0, 1]; the model normalises them itself")


def per_image_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image, (N,). logits: (N, K); labels: int64 (N,) in 0..K-1."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest logit of the other classes minus the label's logit, (N,). Above 0, the image is misclassified.

    Carlini and Wagner, 2017, arXiv:1608.04644, section V.A, f_6. Where a network is very sure, the gradient of
    cross-entropy vanishes, but the gradient of this loss does not. logits: (N, K); labels: int64 (N,) in 0..K-1.
    """
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_label, -math.inf).amax(1) - logits[is_label]


LOSSES: dict[str, Loss] = {"cross_entropy": per_image_cross_entropy, "margin": margin}


def input_gradient(
    model: Model, images: Tensor, labels: Tensor, loss: Loss = per_image_cross_entropy
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, K), losses (N,), and the gradient of each image's loss with respect to that image.

    Call it inside `attacking`. images: float (N, C, H, W); labels: int64 (N,). The gradient has the images' shape and
    dtype. On a CPU, a model whose class has an attribute `images_at_once` receives at most so many images at once.
    Raises ValueError if logits and labels do not fit each other, AttackError if the gradient is missing or not finite.
    """
    at_once = getattr(type(model), "images_at_once", None) if images.device.type == "cpu" else None
    if at_once and len(images) > at_once:
        chunks = -(-len(images) // at_once)
        pairs = zip(images.chunk(chunks), labels.chunk(chunks), strict=True)
        found = [input_gradient(model, *pair, loss) for pair in pairs]
        logits, losses, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logits, losses, gradient
    inputs = images.detach().clone().requires_grad_()
    logits, losses = forward(model, inputs, labels, loss)
    if not logits.requires_grad:
        raise AttackError("the model's output does not depend on the images, or hides how: there is no gradient")
    # Summed, not averaged: an image's gradient must not shrink when its batch grows.
    (gradient,) = torch.autograd.grad(losses.sum(), inputs)
    if not gradient.isfinite().all():
        raise AttackError("the gradient of the model's loss holds NaN or infinity, so an attack cannot follow it")
    return logits.detach(), losses.detach(), gradient


def forward(model: Model, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and losses (N,) of images (N, C, H, W) and labels (N,).

    Raises ValueError unless the logits fit the labels and the labels are in 0..K-1, AttackError if logits are NaN.
    """
    logits = model(images.clone())  # a copy, because the model's first operation may change its input
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"the model must return (N, classes) with N={len(labels)}, not {tuple(logits.shape)}")
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise ValueError(f"labels must be classes of the model, in 0..{logits.shape[1] - 1}")
    if logits.isnan().any():
        raise AttackError("the model's logits hold NaN: they classify nothing")
    return logits, loss(logits, labels)


def zero_gradient(gradient: Tensor) -> Tensor:
    """Which images have a gradient that is zero in every pixel: bool (N,)."""
    return ~gradient.flatten(1).any(1)


def warn_of_zero_gradient(stacklevel: int = 3) -> None:
    """Warn that the gradient of some images was zero in every pixel.

    This is a warning, not an error: where a network is very sure, rounding makes the gradient zero, and a few such
    images should not end an evaluation. The message does not give their number, so that Python shows it once and not
    for every batch. stacklevel: as for warnings.warn; by default, the warning points at the attack's caller.
    """
    warnings.warn(
        "the gradient of the model's loss is zero in every pixel of some images, or of all, so the attack "
        "cannot follow it; surviving the attack there does not show robustness",
        RuntimeWarning,
        stacklevel=stacklevel,
    )


def step(images: Tensor, direction: Tensor, size: float, low: float | Tensor = 0, high: float | Tensor = 1) -> Tensor:
    """images + size * direction, clamped to low..high: a new tensor of the images' shape and dtype.

    direction: -1, 0 or 1 in each pixel. size: at least 0, in pixel units; 0 returns a plain copy. low, high: numbers,
    or tensors of the images' shape.
    """
    if size == 0:
        return images.clone()
    # A step of 1 crosses the whole range. A larger size might not fit the dtype of the images.
    return images.add(direction, alpha=min(float(size), 1.0)).clamp_(low, high)  # type: ignore[arg-type]


def faster_equivalent(model: Model) -> Model:
    """A model that computes the same function in evaluation mode, but faster; or the model itself.

    A class offers a faster form by a method `folded_for_attacks()`. The method is looked up in the class: a wrapper
    that passes on the attributes of the model inside it may compute something else.
    """
    return model.folded_for_attacks() if hasattr(type(model), "folded_for_attacks") else model  # type: ignore[attr-defined]


@contextlib.contextmanager
def attacking(model: Model, device: torch.device) -> Iterator[None]:
    """The state in which a model on `device` is attacked. Afterwards the model is as it was before.

    The state is that of `evaluating`. In addition, parameters are frozen, because only the gradient with respect to
    the images is needed, and gradients are on, even inside no_grad and inference_mode. A model with a recurrent layer
    runs without cuDNN, which cannot do the backward pass of such a layer in evaluation mode. So does a plain function,
    which may hide such a layer.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    trainable = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    recurrent = not modules or any(isinstance(module, nn.RNNBase) for module in modules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model, device))
        for parameter in trainable:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Autograd refuses tensors that are made inside inference mode.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def evaluating(model: Model, device: torch.device) -> Iterator[None]:
    """Evaluation mode in float32: without autocast, and on a GPU without TF32, which keeps only ten bits."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
            stack.enter_context(cudnn.flags(**flags, allow_tf32=False))
        yield


@contextlib.contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Put every module of a model into evaluation mode; afterwards, put each back into the mode it was in."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
