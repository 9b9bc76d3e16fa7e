"""What every gradient attack shares: checks of its input, and the gradient of the loss for the images."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


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


def input_gradient(model, images, labels):
    """Gradient of the cross-entropy, summed over the batch, for the images: a new tensor of their shape and dtype.

    Taken in evaluation mode with frozen parameters; the model is left as it was found. Works under no_grad and
    inference_mode. Raises ValueError if logits and labels do not fit each other or the gradient is not finite.
    """
    # Copies made outside inference mode, because autograd refuses tensors made inside it.
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model), _ready_for_gradients(model):
        inputs = images.detach().clone().requires_grad_()
        logits = model(inputs.clone())  # a copy, for the model's first operation may be in place
        if not logits.requires_grad:
            raise ValueError("the model's output does not depend on the images, or hides how: there is no gradient")
        if logits.ndim != 2 or len(logits) != len(images):
            raise ValueError(f"the model must return (N, classes) with N={len(images)}, not {tuple(logits.shape)}")
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"labels must be classes of the model, in 0..{logits.shape[1] - 1}")
        # Summed, so that an image's gradient does not shrink with the size of the batch it happens to be in.
        loss = F.cross_entropy(logits, labels.clone(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, inputs)
    if not gradient.isfinite().all():
        raise ValueError("the gradient of the model's loss holds NaN or infinity: no attack can follow it")
    return gradient


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


@contextlib.contextmanager
def _ready_for_gradients(model):
    """Freeze the parameters, for the gradient of the input is wanted alone, and thaw them afterwards.

    cuDNN refuses the backward pass of a recurrent layer in evaluation mode: a model that has one does without it, and
    so does a plain function, into which we cannot look.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    trainable = [p for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
    recurrent = not modules or any(isinstance(module, nn.RNNBase) for module in modules)
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
