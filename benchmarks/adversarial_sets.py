"""Adversarial sets against an FGSM transform, image by image in a Dataset, for one epsilon and for ten.

The transform is called by the loop's own process, as DataLoader's default has it (and must be where the network is on
a GPU, which forked workers cannot use), and by as many workers as there are cores.
"""

import os
import tempfile
from functools import partial

import torch

from attacks import step
from benchmarks import plain
from benchmarks.timing import interleaved, say, table
from utils.adversarial_sets import adversarial_set
from utils.constants import EVALUATION_BATCH
from utils.data import batches

EPSILONS = [k / 255 for k in range(1, 11)]


def measure(setting):
    split = setting.splits["train"].first(setting.pick(1000, 20))
    network = setting.network(torch.contiguous_format).cpu()  # the transform's workers have no GPU
    report = []
    for epsilons in (EPSILONS[:1], EPSILONS):
        contenders = {
            "ours": partial(our_sets, setting, split, epsilons),
            **{
                f"a transform, {workers} workers": partial(plain_sets, network, split, epsilons, workers)
                for workers in (0, os.cpu_count())
            },
        }
        rows = table(interleaved(contenders, setting), len(split) * len(epsilons))
        say(f"{len(split):,} images under FGSM at {len(epsilons)} epsilon", rows)
        report.append({"epsilons": len(epsilons), "images": len(split), "rows": rows})
    return report


def our_sets(setting, split, epsilons):
    """Computed, written to disk, and all examples made once."""
    with tempfile.TemporaryDirectory() as folder:
        crafted = adversarial_set(setting.checkpoint, split, folder=folder, device=setting.device)
    for epsilon in epsilons:
        directions = crafted.direction.split(EVALUATION_BATCH)
        for (images, _), direction in zip(batches(split, EVALUATION_BATCH), directions, strict=True):
            step(images, direction.to(images), epsilon)


def plain_sets(network, split, epsilons, workers):
    for epsilon in epsilons:
        for _ in plain.loader(plain.AttackedImages(split, network, epsilon), EVALUATION_BATCH, workers):
            pass
