"""Optimisers by the name that a recipe gives, and the moving average of the weights."""

from collections.abc import Iterable
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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            # All parameters at once: on a GPU, a few kernels in place of some hundred, whose starts take the time.
            gradients = [*torch._foreach_add([w.grad for w in weights], weights, alpha=group["weight_decay"])]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            torch._foreach_add_(gradients, buffers, alpha=group["momentum"])
            if group["orthogonal"]:
                gradients = [
                    orthogonalized(direction.flatten(1)).view_as(weight)
                    for direction, weight in zip(gradients, weights, strict=True)
                ]
                for weight in weights:
                    weight.mul_(len(weight) ** 0.5 / (weight.norm() + 1e-7))
            torch._foreach_sub_(weights, gradients, alpha=group["lr"])


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
    return _MovingAverage(network, decay)


class _MovingAverage(AveragedModel):
    """AveragedModel copies its count of steps to the GPU in each step, and the CPU waits for that copy. This does not.

    Its state has the same names and values.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network, use_buffers=True)
        self.decay = decay
        for module in self.module.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # into one block, which copying has split: cuDNN would warn in each pass

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)  # this count is on the CPU
        self.n_averaged += 1
        values = [*model.parameters(), *model.buffers()]
        pairs = list(zip([*self.module.parameters(), *self.module.buffers()], values, strict=True))
        # A count of batches is an integer, and has no average.
        averaged = [pair for pair in pairs if steps and pair[0].is_floating_point()]
        for average, value in pairs:
            if not (steps and average.is_floating_point()):
                average.copy_(value)
        if averaged:
            averages, others = map(list, zip(*averaged, strict=True))
            torch._foreach_lerp_(averages, others, max(1 - self.decay, 1 / (steps + 1)))
