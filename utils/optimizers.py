"""Optimisers by the name that a recipe gives, and the moving average of the weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

from utils.recipes import Recipe


def build_optimizer(network: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimiser of all the network's parameters; the training loop sets its learning rate in each step."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return SGD(parameters, recipe.lr, 0.9, nesterov=True, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adam":
        return Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    return Muon(parameters, recipe)


class Muon(Optimizer):
    """Muon for the filters of convolutions, SGD with Nesterov momentum 0.9 for the rest.

    Jordan et al., 2024 (KellerJordan/cifar10-airbench). The filters of a convolution are one matrix (out, in * k * k).
    Its step is the orthogonal matrix nearest to the Nesterov momentum, times the rate: every direction of the matrix
    learns at the same speed, however small its gradient. Before each step the matrix is scaled to a Frobenius norm of
    sqrt(out), so that the rate is relative to the weights. A batch norm after the convolution makes up for the scale.

    torch.optim.Muon takes matrices only and does not scale the weights.
    """

    def __init__(self, parameters: Iterable[Tensor], recipe: Recipe) -> None:
        """parameters: those of four dimensions are filters. recipe: its lr and momentum are for them."""
        parameters = list(parameters)
        filters = [parameter for parameter in parameters if parameter.ndim == 4]
        others = [parameter for parameter in parameters if parameter.ndim != 4]
        sgd = {"relative_lr": recipe.other_lr / recipe.lr, "momentum": 0.9, "weight_decay": recipe.weight_decay}
        muon = {"relative_lr": 1.0, "momentum": recipe.momentum, "weight_decay": 0.0}
        groups = [{"params": others, "orthogonal": False, **sgd}, {"params": filters, "orthogonal": True, **muon}]
        super().__init__(groups, {"lr": recipe.lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step with each parameter that has a gradient. closure: not supported."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.mul_(group["momentum"]).add_(gradient)
                direction = gradient.add_(buffer, alpha=group["momentum"])
                if group["orthogonal"]:
                    direction = orthogonalized(direction.flatten(1)).view_as(weight)
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.sub_(direction, alpha=group["lr"])


def orthogonalized(matrix: Tensor, steps: int = 3) -> Tensor:
    """About U V^T of a matrix's singular value decomposition U S V^T: a float matrix of the same shape.

    Each Newton-Schulz step multiplies the matrix by a polynomial of its Gram matrix, which brings its singular values
    nearer to 1. All these Gram matrices commute, so the steps are taken on them alone, and the matrix, which is longer,
    is multiplied once at the end. The coefficients are those of Jordan et al.: they raise small values fastest.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T, steps).T
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = matrix / (matrix.norm() + 1e-7)
    gram = matrix @ matrix.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = identity
    for _ in range(steps):
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """A copy of the network whose `update_parameters(network)` moves it towards the network after each step.

    decay: the part of the average that stays in each step, in [0, 1). The average is exponential, but it starts as the
    plain mean of the steps so far, so that the random initial weights leave it as fast as they can. It includes batch
    norm's statistics.
    """
    average = AveragedModel(network, use_buffers=True)
    average.multi_avg_fn = _update(decay, average.n_averaged)
    return average


def _update(decay: float, steps: Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor], object], None]:
    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], _: object) -> None:
        weight = max(1 - decay, 1 / (steps.item() + 1))
        for average, value in zip(averages, values, strict=True):
            # A count of batches is an integer, and has no average.
            average.copy_(average.lerp(value, weight) if value.is_floating_point() else value)

    return update
