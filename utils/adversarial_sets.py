"""Adversarial sets: a split's FGSM direction through one checkpoint, kept on disk, gives the examples at any radius.

The direction is the sign of the input gradient, which does not depend on epsilon (attacks.fgsm_direction). It is taken
on the images as they are. Augmentation therefore comes second: perturb first, then flip and shift the result.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks import fgsm_direction, step
from attacks.norms import check_epsilon
from utils.checkpoints import (
    DTYPES,
    CheckpointError,
    Declared,
    check_unchanged,
    file_digest,
    load_checkpoint,
    read_metadata,
    read_tensors,
    versions,
    write_tensors,
)
from utils.constants import EVALUATION_BATCH
from utils.data import Split, batches, tensor_digest
from utils.evaluation import ATTACK_VERSIONS
from utils.files import beside, locked
from utils.formats import SetManifest
from utils.progress import progress_bar
from utils.quoting import shown

FOLDER = Path("data/adversarial")


@dataclass(frozen=True, eq=False)
class AdversarialSet:
    """direction: int8 (N, C, H, W), each -1, 0 or 1, on the CPU. manifest: what it was made from and in how long."""

    direction: Tensor
    manifest: SetManifest


def adversarial_set(
    source: str | Path,
    split: Split,
    *,
    folder: str | Path = FOLDER,
    batch_size: int = EVALUATION_BATCH,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> AdversarialSet:
    """The FGSM direction of the network saved in `source` over a Split: read from `folder`, or computed and kept there.

    With it, step(images, direction, e) equals fgsm(network, images, labels, epsilon=e) on the same batches; exactly so
    on the same device with the same number of threads. The file is used only if it is intact and was made from what is
    asked for now: the same source, images, batch size, version of FGSM and versions of the libraries. Otherwise one
    line on stderr says why, and the set is built again.
    Raises CheckpointError if the source cannot be loaded, or was trained on another data set or other classes, or if
    there is a folder or a network where the set would be, and UserError if another run is building the same set.
    """
    # The split's name, unlike the source's, is ours.
    path = beside(Path(folder) / f"{split.dataset}-{split.name}-fgsm-{Path(source).name}", ".safetensors")
    wanted: dict[str, Any] = {
        "attack": "fgsm",
        "attack_version": ATTACK_VERSIONS["fgsm"],
        "source_sha256": file_digest(source),
        "dataset": split.dataset,
        "split": split.name,
        "split_sha256": split.digest(),
        "batch_size": batch_size,
        "versions": versions(),
    }
    if path.exists():
        try:
            return read_set(path, wanted, split.images.shape)
        except CheckpointError as error:
            if not path.is_file() or _is_checkpoint(path):
                raise CheckpointError(f"{path} is not an adversarial set, and one would replace it: move it") from error
            print(f"{error}: building it again", file=sys.stderr)

    header = read_metadata(source)
    if header.dataset != split.dataset:
        raise CheckpointError(f"{source} was trained on {shown(header.dataset)}, not on {split.dataset}")
    if header.class_names != list(split.class_names):
        raise CheckpointError(f"{source} was trained on other classes than those of {split.dataset}")
    with locked(path):
        network = load_checkpoint(source, device)
        check_unchanged(source, wanted["source_sha256"])
        return _build(path, wanted, network, split, progress)


def _is_checkpoint(path: Path) -> bool:
    try:
        read_metadata(path)
    except CheckpointError:
        return False
    return True


def _build(
    path: Path, wanted: dict[str, Any], network: torch.nn.Module, split: Split, progress: bool
) -> AdversarialSet:
    """Compute the AdversarialSet and write it to `path`."""
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
    manifest = SetManifest(
        **wanted,
        sha256=tensor_digest(planes["positive"], planes["negative"]),
        seconds=max(0.0, round(time.perf_counter() - start, 2)),  # a clock may be set back
    )
    write_tensors(path, planes, manifest)
    return AdversarialSet(direction, manifest)


def read_set(path: Path, wanted: dict[str, Any], shape: torch.Size) -> AdversarialSet:
    """The AdversarialSet in a file.

    wanted: the fields of its manifest, all but sha256 and seconds. shape: of the direction, (N, C, H, W).
    Raises CheckpointError, with the reason, if the file is damaged or was made from something else.
    """

    def check(manifest: SetManifest, declared: Declared) -> None:
        for key, value in wanted.items():
            if getattr(manifest, key) != value:
                raise ValueError(f"made from another {key.removesuffix('_sha256').replace('_', ' ')}")
        plane = (-(-shape.numel() // 8),), DTYPES[torch.uint8]
        if declared != {"positive": plane, "negative": plane}:
            raise ValueError("damaged (other tensors)")

    manifest, planes = read_tensors(path, SetManifest, check)
    if manifest.sha256 != tensor_digest(planes["positive"], planes["negative"]):
        raise CheckpointError(f"{path}: damaged (the contents do not fit the checksum)")
    positive, negative = (_unpacked(planes[name], shape) for name in ("positive", "negative"))
    return AdversarialSet(positive.sub_(negative), manifest)


def _packed(mask: Tensor) -> Tensor:
    """A boolean tensor as bits. One plane of bits for +1 and one for -1 take a quarter of the space of int8."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(plane: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(plane.numpy(), count=shape.numel())).view(torch.int8).reshape(shape)


@dataclass(frozen=True, eq=False)
class AugmentedSplit:
    """A clean split followed by its FGSM counterpart at `epsilon`. The study's defence is to train on both.

    clean: Split of N images. direction: int8, the shape of its images, from an AdversarialSet. epsilon: L-inf radius in
    pixel units. source_sha256: of the checkpoint that the direction comes from. Images are perturbed when they are
    taken, so one direction serves every epsilon. Raises ValueError if epsilon is not from 0 to 1.
    """

    clean: Split
    direction: Tensor
    epsilon: float
    source_sha256: str

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)

    @property
    def dataset(self) -> str:
        return self.clean.dataset

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.clean.class_names

    @property
    def device(self) -> torch.device:
        return self.clean.device

    @property
    def defense(self) -> dict[str, str | float]:
        return {"name": "fgsm-augment", "epsilon": self.epsilon, "source_sha256": self.source_sha256}

    def __len__(self) -> int:
        return 2 * len(self.clean)

    def to(self, device: torch.device | str) -> "AugmentedSplit":
        return replace(self, clean=self.clean.to(device), direction=self.direction.to(device))

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the clean images: the defence does not change the normalisation."""
        return self.clean.channel_statistics()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at positions `index`: below N the clean images, from N on the adversarial ones."""
        attacked, index = index >= len(self.clean), index % len(self.clean)
        images, labels = self.clean.take(index)
        adversarial = step(images, self.direction[index].to(images.dtype), self.epsilon)
        return torch.where(attacked[:, None, None, None], adversarial, images), labels
