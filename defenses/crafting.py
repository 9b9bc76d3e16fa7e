"""What the defences share: the gradient of the network in training, and examples that follow it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from attacks import default_step_size, pgd_iterates
from attacks.core import holding
from attacks.modules import modules_of


def last_iterate(images: Tensor, gradient: Callable[[Tensor], Tensor], *, epsilon: float, steps: int) -> Tensor:
    """PGD's last iterate, (N, C, H, W), within epsilon of images and in [0, 1] (Madry et al., 2018, arXiv:1706.06083).

    The first iterate is the images plus uniform noise in [-epsilon, epsilon], drawn from torch's own generator, and the
    step size is attacks.default_step_size. images: float (N, C, H, W) in [0, 1]; gradient: of the loss to raise, as for
    attacks.pgd_iterates; epsilon: in pixel units; steps: at least 1.
    """
    start = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp_(0, 1)
    sizes = [default_step_size(epsilon, steps)] * steps
    for iterate in pgd_iterates(images, start, gradient, epsilon=epsilon, sizes=sizes):
        last = iterate
    return last


def from_noise(images: Tensor, gradient: Callable[[Tensor], Tensor], *, noise: float, sizes: Sequence[float]) -> Tensor:
    """Examples (N, C, H, W): the images plus uniform noise, after steps along the gradient's sign. Nothing is clipped.

    images, gradient: as for `last_iterate`. noise: the largest of a pixel; sizes: those of the steps. Both are in pixel
    units. The noise is drawn from torch's own generator.
    """
    example = images + torch.empty_like(images).uniform_(-1, 1) * noise
    for size in sizes:
        example = example + size * gradient(example).sign()
    return example


def crafting_gradient(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], mode: str) -> Tensor:
    """The gradient of loss(logits) with respect to images, (N, C, H, W).

    loss: from logits, float32 (N, K), to a sum over the images, so that an image's gradient does not depend on the size
    of its batch. mode: as for `crafting_state`.
    """
    inputs = images.detach().requires_grad_()
    with crafting_state(model, mode):
        value = loss(model(inputs).float())
    return torch.autograd.grad(value, inputs)[0]


@contextlib.contextmanager
def crafting_state(model: nn.Module, mode: str) -> Iterator[None]:
    """The state in which a network in training crafts examples. Afterwards the network is as it was before.

    Parameters are frozen, because only the gradient with respect to the images is needed. Batch-norm statistics do not
    change. mode: "training" normalises by the batch, "evaluation" by the statistics so far. Every other layer, such as
    dropout, stays in the mode it is in.
    Raises ValueError for another mode.
    """
    if mode not in ("training", "evaluation"):
        raise ValueError(f"crafting must be training or evaluation, not {mode!r}")
    modules = modules_of(model)
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    # In training mode, the averages must not include this batch.
    held = "track_running_stats" if mode == "training" else "training"
    with holding(parameters, "requires_grad"), holding(norms, held):
        yield
