"""TODO: utils.optimizers."""

import torch


def moving_average(decay, count):
    """For AveragedModel: an exponential moving average that starts as the plain mean of the steps so far.

    So the random initial weights leave it as fast as they can, however long it remembers later.
    """

    @torch.no_grad()
    def update(averages, values, _):
        weight = max(1 - decay, 1 / (count.item() + 1))
        for average, value in zip(averages, values, strict=True):
            average.copy_(average.lerp(value, weight) if value.is_floating_point() else value)  # a count is no average

    return update
