"""Adversarial sets against an FGSM transform that attacks image by image in a Dataset, for one epsilon and for ten.

The transform is called by the loop's own process, which is DataLoader's default (and the only way if the network is on
a GPU, which forked workers cannot use), and by as many workers as there are cores.
"""

import os
import tempfile
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from attacks import step
from benchmarks import plain
from benchmarks.formats import SetSpeed
from benchmarks.timing import Setting, compared, interleaved, say
from utils.adversarial_sets import adversarial_set
from utils.constants import EVALUATION_BATCH
from utils.data import Split, batches

EPSILONS = [k / 255 for k in range(1, 11)]


def measure(setting: Setting) -> list[SetSpeed]:
    """The section "adversarial-sets" of the report."""
    split = setting.splits["train"].first(setting.pick(1000, 20))
    network = setting.network("cnn", torch.contiguous_format).cpu()  # the transform's workers have no GPU
    report = []
    for epsilons in (EPSILONS[:1], EPSILONS):
        contenders = {
            "ours": partial(our_sets, setting, split, epsilons),
            **{
                f"a transform, {workers} workers": partial(plain_sets, network, split, epsilons, workers)
                for workers in (0, os.cpu_count() or 1)
            },
        }
        rows = compared(interleaved(contenders, setting), len(split) * len(epsilons))
        say(f"{len(split):,} images under FGSM at {len(epsilons)} epsilon", rows)
        report.append(SetSpeed(epsilons=len(epsilons), images=len(split), rows=rows))
    return report


def our_sets(setting: Setting, split: Split, epsilons: Sequence[float]) -> None:
    """Compute an adversarial set, write it to the disk, and make all examples once."""
    with tempfile.TemporaryDirectory() as folder:
        crafted = adversarial_set(setting.checkpoints["cnn"], split, folder=folder, device=setting.device)
    for epsilon in epsilons:
        directions = crafted.direction.split(EVALUATION_BATCH)
        for (images, _), direction in zip(batches(split, EVALUATION_BATCH), directions, strict=True):
            step(images, direction.to(images), epsilon)


def plain_sets(network: nn.Module, split: Split, epsilons: Sequence[float], workers: int) -> None:
    """Make all examples once with the transform."""
    for epsilon in epsilons:
        for _ in plain.loader(plain.AttackedImages(split, network, epsilon), EVALUATION_BATCH, workers):
            pass
