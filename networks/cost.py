"""The cost of a network: how many multiply-adds it takes to classify one image."""

import copy

import torch
from torch import Tensor, nn


def multiply_adds(network: nn.Module) -> int:
    """Multiply-adds of the forward pass of one 3 x 32 x 32 image, in convolutions, LSTMs and linear layers.

    They are counted on a copy that has shapes but no numbers (torch's device "meta"), so nothing is computed.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight.numel() * output.shape[-2] * output.shape[-1]  # each position uses each weight once
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, nn.LSTM):
            positions = inputs[0].shape[1]
            total += positions * sum(w.numel() for name, w in module.named_parameters() if name.startswith("weight"))

    shapes = copy.deepcopy(network).to("meta").eval()
    for module in shapes.modules():
        module.register_forward_hook(count)
    shapes(torch.zeros(1, 3, 32, 32, device="meta"))
    return total
