"""How fast a network trains, roughly, which tells how long a study still takes."""

import time

import torch
from torch import nn

from defenses.losses import cross_entropy
from networks import NETWORKS
from utils.allocator import keep_freed_memory


def training_speed(architecture: str, width: int, device: str, precision: str) -> float:
    """Images per second of a few training steps of a fresh network, after some steps to warm up."""
    keep_freed_memory()
    network = NETWORKS[architecture](width).to(device).to(memory_format=torch.channels_last)
    images, labels = torch.rand(128, 3, 32, 32, device=device), torch.zeros(128, dtype=torch.int64, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    for step in range(13):
        if step == 5:
            _wait(network)
            start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = cross_entropy(network, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait(network)
    return 8 * len(labels) / (time.perf_counter() - start)


def _wait(network: nn.Module) -> None:
    """Until a GPU has computed the network's parameters."""
    next(network.parameters()).sum().item()
