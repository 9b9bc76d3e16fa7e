"""A surrogate: a small network that learns a model's answers, so that examples for it can be transferred to the model.

Papernot et al., 2017, arXiv:1602.02697: an attacker who can only ask questions trains a network on the answers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.core import Model, logits_of
from attacks.progress import in_turn
from networks import SmallCNN
from utils.data import flip_and_shift, to_unit_range

CHANNELS, BATCH, RATE = 16, 128, 0.003
LEAST_ASKED = 2000  # at least so many images are asked: if there are fewer, mirrored and moved copies of them too
LESSONS = 15_000  # how often an image is learnt from, in all


def train_surrogate(model: Model, images: Tensor, *, batch_size: int, seed: int = 0) -> nn.Module:
    """A SmallCNN that gives the model's answers, trained in some seconds.

    model: in the state in which it is asked. images: (M, C, H, W) as a Split holds them, at least one. They must not be
    among those that are attacked. Random numbers come from torch's own generator, which is seeded with `seed`.
    """
    torch.manual_seed(seed)
    copies = -(-LEAST_ASKED // len(images))
    asked = torch.cat([images, *(_changed(images) for _ in range(copies - 1))])
    with torch.no_grad():
        logits = torch.cat([logits_of(model, to_unit_range(batch)) for batch in asked.split(batch_size)])
    answers = logits.argmax(1)
    network = _AnySize(SmallCNN(CHANNELS, logits.shape[1])).to(images.device)
    steps = LESSONS // BATCH
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    with torch.enable_grad():
        order = torch.cat([torch.randperm(len(asked)) for _ in range(1 + steps * BATCH // len(asked))])
        for chosen in in_turn(order.to(images.device).split(BATCH)[:steps], [1] * steps):
            loss = F.cross_entropy(network(to_unit_range(_changed(asked[chosen]))), answers[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


class _AnySize(nn.Module):
    """A network for colour images of 32 x 32, which receives what images of any size and channels show of that."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if images.shape[1] != 3:
            images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        if images.shape[2:] != (32, 32):
            images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True).clamp(0, 1)
        return self.network(images)


def _changed(images: Tensor) -> Tensor:
    """Images (N, C, H, W), mirrored at random and moved by up to two pixels."""
    flipped = torch.rand(len(images)) < 0.5
    shifts = torch.randint(-2, 3, (len(images), 2))
    return flip_and_shift(images, flipped.to(images.device), shifts.to(images.device))
