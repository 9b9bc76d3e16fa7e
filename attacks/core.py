"""What every gradient attack shares: checks of its input, the state it attacks a model in, losses and gradients."""

import contextlib
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class AttackError(ValueError):
    """The model is none that can be attacked by its gradient: that is missing or not finite, or its logits are NaN."""


def check_epsilon(epsilon):
    """Raise ValueError unless epsilon is finite and at least 0."""
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and at least 0, not {epsilon}")


def check_images_and_labels(images, labels):
    """Raise TypeError or ValueError, as `fgsm` documents, unless images and labels are fit to be attacked."""
    if not (isinstance(images, torch.Tensor) and images.is_floating_point()):
        raise TypeError(f"images must be a floating point tensor, not {getattr(images, 'dtype', type(images))}")
    if not (isinstance(labels, torch.Tensor) and labels.dtype == torch.int64):
        raise TypeError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', type(labels))}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images must be (N, C, H, W) and labels (N,), not {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):  # also catches NaN
        raise ValueError("images must lie in [0, 1]; the model does its normalisation itself")


def cross_entropy(logits, labels):
    """Of each image, (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits, labels):
    """The largest logit of another class less that of the label, (N,): above 0, the image is misclassified.

    Carlini and Wagner, 2017, arXiv:1608.04644, f_6. Unlike cross-entropy, it does not flatten where a network is sure.
    """
    label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(label, -math.inf).amax(1) - logits[label]


LOSSES = {"cross_entropy": cross_entropy, "margin": margin}


def input_gradient(model, images, labels, loss=cross_entropy, *, first=True):
    """Logits (N, K), losses (N,) and the gradient of each image's loss for that image, of its shape and dtype.

    To be called inside `attacking`. A model whose class says so gets no more images at once. first: as for `forward`.
    Raises ValueError if logits and labels do not fit each other, AttackError if the gradient is missing or not finite.
    """
    at_once = getattr(type(model), "images_at_once", None) if images.device.type == "cpu" else None
    if at_once and len(images) > at_once:
        parts = -(-len(images) // at_once)
        pairs = zip(images.chunk(parts), labels.chunk(parts), strict=True)
        found = [input_gradient(model, *pair, loss, first=first) for pair in pairs]
        return tuple(map(torch.cat, zip(*found, strict=True)))
    inputs = images.detach().clone().requires_grad_()
    logits, losses = forward(model, inputs, labels, loss, first=first)
    if not logits.requires_grad:
        raise AttackError("the model's output does not depend on the images, or hides how: there is no gradient")
    # Summed, so that an image's gradient does not shrink with the size of the batch it happens to be in.
    (gradient,) = torch.autograd.grad(losses.sum(), inputs)
    if not gradient.isfinite().all():
        raise AttackError("the gradient of the model's loss holds NaN or infinity: no attack can follow it")
    return logits.detach(), losses.detach(), gradient


def no_gradient(gradient):
    """Which images (N,) have a gradient that is zero in every pixel."""
    return ~gradient.flatten(1).any(1)


def warn_of_no_gradient(stacklevel=3):
    """Say that an attack met images with nothing but zeros in their gradients; by default, to its caller.

    A warning and no error: to rounding, the gradient is zero also where a network is merely very sure, and a few such
    images should not end an evaluation. Without their number, so that Python shows it once and not for every batch.
    """
    warnings.warn(
        "the gradient of the model's loss is zero in every pixel of some images, or of all: no attack can follow it, "
        "and that the model withstands this one there says nothing",
        RuntimeWarning,
        stacklevel=stacklevel,
    )


def forward(model, images, labels, loss, *, first=True):
    """Logits (N, K) and losses (N,). Raises ValueError unless logits fit the labels, AttackError if they are NaN.

    first: the labels have not been compared with the model's classes yet, which nobody knows before its first answer.
    """
    logits = model(images.clone())  # a copy, for the model's first operation may be in place
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"the model must return (N, classes) with N={len(labels)}, not {tuple(logits.shape)}")
    if first and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise ValueError(f"labels must be classes of the model, in 0..{logits.shape[1] - 1}")
    if logits.isnan().any():
        raise AttackError("the model's logits hold NaN: they classify nothing")
    return logits, loss(logits, labels)


def step(images, direction, size, low=0, high=1):
    """images + size * direction, clamped to low..high (numbers or tensors): a new tensor; at size 0 a plain copy."""
    if size == 0:
        return images.clone()
    # Beyond 1 every pixel is at its end of the range, and the dtype of the images might not hold the size.
    return images.add(direction, alpha=min(float(size), 1.0)).clamp_(low, high)


@contextlib.contextmanager
def attacking(model, device):
    """The state in which a model (any callable) on `device` is attacked; it is left as it was found.

    As in `evaluating`, with parameters frozen (the gradient of the input is wanted alone), and gradients on even under
    no_grad and inference_mode. cuDNN refuses the backward pass of a recurrent layer in evaluation mode: a model that
    has one does without it, and so does a plain function, into which we cannot look.
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
        # Because autograd refuses tensors made inside inference mode.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def folded(model):
    """What to attack in place of the model: the same function in less time, once in evaluation mode, which a class with
    a method folded_for_attacks() vouches for; else the model. A wrapper's class does not: it may do more.
    """
    return model.folded_for_attacks() if hasattr(type(model), "folded_for_attacks") else model


@contextlib.contextmanager
def evaluating(model, device):
    """Evaluation mode, in float32 whatever autocast says, and on a GPU without TF32, which keeps ten bits of it."""
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
def evaluation_mode(model):
    """Put every module of a model (any callable) into evaluation mode, then back into the mode it was in."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
