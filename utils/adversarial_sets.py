"""Adversarial sets: a split's FGSM direction through one checkpoint, kept on disk, gives the examples at any epsilon.

The direction is the sign of the input gradient, which does not depend on epsilon (attacks.fgsm_direction). It is
taken on the images as they are, so whoever augments has to perturb first and then flip and shift the result.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from attacks import fgsm_direction, step
from utils.checkpoints import (
    DTYPES,
    CheckpointError,
    file_digest,
    load_checkpoint,
    read_declared,
    read_metadata,
    read_tensors,
    versions,
    write_tensors,
)
from utils.constants import EVALUATION_BATCH
from utils.data import Split, batches, tensor_digest
from utils.files import locked
from utils.formats import is_number
from utils.progress import progress_bar
from utils.quoting import shown

FOLDER = Path("data/adversarial")


@dataclass(frozen=True, eq=False)
class AdversarialSet:
    """direction: int8 (N, C, H, W), -1, 0 or 1, on the CPU; manifest: what it was made from, by, and in how long."""

    direction: torch.Tensor
    manifest: dict


def adversarial_set(source, split, *, folder=FOLDER, batch_size=EVALUATION_BATCH, device="cpu", progress=False):
    """The FGSM direction of the network saved in `source` over a Split: read from `folder`, or computed and kept there.

    With it, step(images, direction, e) equals fgsm(network, images, labels, epsilon=e) on the same batches, exactly
    on the same device with as many threads. The file is used only if it is intact and its manifest (the source's
    SHA-256, data set and split with the SHA-256 of its images, attack, batch size, library versions) is what is
    wanted; otherwise one line on stderr says why, and it is built again.
    Raises CheckpointError if the source cannot be loaded or tells other classes apart.
    """
    path = Path(folder) / f"{split.dataset}-{split.name}-fgsm-{Path(source).stem}.safetensors"
    wanted = {
        "attack": "fgsm",
        "source_sha256": file_digest(source),
        "dataset": split.dataset,
        "split": split.name,
        "split_sha256": split.digest(),
        "batch_size": batch_size,
        "versions": versions(),
    }
    if path.exists():
        try:
            return _read(path, wanted, split.images.shape)
        except CheckpointError as error:
            print(f"{error}: it is built again", file=sys.stderr)

    metadata = read_metadata(source)
    if metadata["dataset"] != split.dataset:
        raise CheckpointError(f"{source} was trained on {shown(metadata['dataset'])}, not on {split.dataset}")
    if metadata["class_names"] != list(split.class_names):
        raise CheckpointError(f"{source} tells other classes apart than {split.dataset} has")
    with locked(path):
        return _build(path, wanted, load_checkpoint(source, device), split, progress)


def _build(path, wanted, network, split, progress):
    """Compute the AdversarialSet, and write it to `path`."""
    start = time.perf_counter()
    device = next(network.parameters()).device
    direction = torch.empty(split.images.shape, dtype=torch.int8)
    done = 0
    name = f"FGSM on {split.name}, {path.stem.split('-fgsm-', 1)[1]}"
    with progress_bar(title=name, total=len(split), unit="image", visible=progress) as bar:
        for images, labels in batches(split.to(device), wanted["batch_size"]):
            direction[done : done + len(labels)] = fgsm_direction(network, images, labels)
            done += len(labels)
            bar.update(len(labels))
    planes = {"positive": _packed(direction == 1), "negative": _packed(direction == -1)}
    manifest = {
        **wanted,
        "sha256": tensor_digest(planes["positive"], planes["negative"]),
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_tensors(path, planes, manifest)
    return AdversarialSet(direction, manifest)


def _read(path, wanted, shape):
    """The AdversarialSet in the file; raises CheckpointError, with the reason, unless it is intact and the wanted."""
    manifest, declared = read_declared(path)
    for key, value in wanted.items():
        if manifest.get(key) != value:
            raise CheckpointError(f"{path} is of another {key.removesuffix('_sha256').replace('_', ' ')}")
    plane = (-(-shape.numel() // 8),), DTYPES[torch.uint8]
    if declared != {"positive": plane, "negative": plane}:
        raise CheckpointError(f"{path} is damaged (other tensors)")
    if not is_number(manifest.get("seconds"), 0, 1e9):
        raise CheckpointError(f"{path} is damaged (no time in its manifest)")
    _, planes = read_tensors(path)
    if manifest.get("sha256") != tensor_digest(planes["positive"], planes["negative"]):
        raise CheckpointError(f"{path} is damaged (its contents do not fit its checksum)")
    positive, negative = (_unpacked(planes[name], shape) for name in ("positive", "negative"))
    return AdversarialSet(positive.sub_(negative), manifest)


def _packed(mask):
    """A boolean tensor as bits: with one plane for +1 and one for -1, a quarter of what int8 takes."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(plane, shape):
    return torch.from_numpy(np.unpackbits(plane.numpy(), count=shape.numel())).view(torch.int8).reshape(shape)


@dataclass(frozen=True, eq=False)
class AugmentedSplit:
    """A clean split followed by its FGSM counterpart at `epsilon`: the paper's defence is to train on this.

    clean: Split of N images; direction: int8, of the shape of its images, from an AdversarialSet; source_sha256: of
    the checkpoint that it comes from. Images are perturbed when they are taken, so one direction serves every epsilon.
    """

    clean: Split
    direction: torch.Tensor
    epsilon: float
    source_sha256: str

    @property
    def dataset(self):
        return self.clean.dataset

    @property
    def class_names(self):
        return self.clean.class_names

    @property
    def device(self):
        return self.clean.device

    @property
    def defense(self):
        return {"name": "fgsm-augment", "epsilon": self.epsilon, "source_sha256": self.source_sha256}

    def __len__(self):
        return 2 * len(self.clean)

    def to(self, device):
        return replace(self, clean=self.clean.to(device), direction=self.direction.to(device))

    def channel_statistics(self):
        """Those of the clean images: the network's normalisation is no part of the defence."""
        return self.clean.channel_statistics()

    def take(self, index):
        """Images and labels at positions `index`: below N the clean ones, from N on the adversarial ones."""
        attacked, index = index >= len(self.clean), index % len(self.clean)
        images, labels = self.clean.take(index)
        adversarial = step(images, self.direction[index].to(images.dtype), self.epsilon)
        return torch.where(attacked[:, None, None, None], adversarial, images), labels
