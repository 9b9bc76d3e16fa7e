"""TODO: defenses.crafting."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from attacks import default_step_size, step


def ascend(images, epsilon, steps, gradient):
    """PGD's iterate after `steps` steps from a random start: attacks.pgd without its choices."""
    low, high = (images - epsilon).clamp_(0, 1), (images + epsilon).clamp_(0, 1)
    iterates = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp_(0, 1)
    for _ in range(steps):
        iterates = step(iterates, gradient(iterates).sign(), default_step_size(epsilon, steps), low, high)
    return iterates


def crafting_gradient(model, images, targets, mode, loss=F.cross_entropy):
    """The gradient of loss(logits, targets, reduction="sum") for the images."""
    inputs = images.detach().requires_grad_()
    with crafting(model, mode):
        value = loss(model(inputs).float(), targets, reduction="sum")
    return torch.autograd.grad(value, inputs)[0]


@contextlib.contextmanager
def crafting(model, mode):
    """Parameters frozen, because the input's gradient is wanted alone, and batch-norm statistics left alone.

    mode: "training" normalises by the batch, "evaluation" by the statistics so far.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    found = [(norm.training, norm.track_running_stats) for norm in norms]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for norm in norms:
            if mode == "training":
                norm.track_running_stats = False  # so that the batch leaves no trace in the averages
            else:
                norm.eval()
        yield
    finally:
        for norm, (training, tracked) in zip(norms, found, strict=True):
            norm.training, norm.track_running_stats = training, tracked
        for parameter in parameters:
            parameter.requires_grad_(True)
