"""Optimisers by the name that a recipe gives, and the moving average of the weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

from utils.recipes import Recipe


def build_optimizer(network: nn.Module, recipe: Recipe) -> Optimizer:
    """The recipe's optimiser of all the network's parameters; the training loop sets its learning rate in each step."""
    if recipe.optimizer == "sgd":
        return SGD(network.parameters(), recipe.lr, 0.9, nesterov=True, weight_decay=recipe.weight_decay)
    return Adam(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)


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
