"""CIFAR-10 and digits as tensors: a split is one uint8 tensor on the device, batched and augmented by indexing."""

import contextlib
import hashlib
import io
import os
import sys
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import islice
from pathlib import Path

import torch

from utils.constants import DATASETS, SPLITS, UserError
from utils.distributed import share

CIFAR10_VALIDATION = 5000  # the last training images: networks and hyperparameters are chosen on them


class DataError(UserError):
    """The data set cannot be had: what is missing or damaged, and what to do, in one line."""


@dataclass(frozen=True, eq=False)
class Split:
    """images: uint8 (N, 3, 32, 32); labels: int64 (N,) on the same device; class_names: one for each label."""

    dataset: str
    name: str
    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple
    defense = None  # what a training on this data alone defends against

    def __len__(self):
        return len(self.labels)

    @property
    def device(self):
        return self.labels.device

    def to(self, device):
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def first(self, examples):
        """The first `examples` images (all of them if there are fewer)."""
        return self.part(slice(examples))

    def part(self, positions):
        """The images at those positions, a slice."""
        return replace(self, images=self.images[positions], labels=self.labels[positions])

    def take(self, index):
        """The images at positions `index` (a tensor), float32 in [0, 1], channels_last; and their labels."""
        return to_unit_range(self.images[index]), self.labels[index]

    def digest(self):
        return tensor_digest(self.images, self.labels)

    def channel_statistics(self):
        """Mean and standard deviation of each channel in [0, 1], exactly, from a histogram of its 256 values."""
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in range(3):
            histogram = torch.bincount(self.images[:, channel].flatten(), minlength=256).cpu().double()
            probability = histogram / histogram.sum()
            mean.append((probability @ values).item())
            std.append((probability @ (values - mean[-1]) ** 2).sqrt().item())
        return mean, std


def tensor_digest(*tensors):
    """SHA-256 of the tensors' values, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def load_split(dataset, split, data_dir=None):
    """The train, validation or test split of "cifar10" or "digits", on the CPU.

    cifar10: 45,000, 5,000 (the last of the training images) and 10,000 images; looked for in data_dir (default:
    $DATA_DIR, else data), downloaded there by torchvision on first use, checksums verified.
    digits: 1,197, 300 and 300 images; part of scikit-learn, so there is nothing to download.
    Raises DataError if the files are missing and cannot be downloaded, or are damaged.
    """
    if dataset not in DATASETS or split not in SPLITS:
        raise ValueError(f"dataset must be one of {DATASETS} and split one of {SPLITS}, not {dataset!r} and {split!r}")
    if dataset == "digits":
        return _digits(split)
    return _cifar10(split, Path(data_dir or os.environ.get("DATA_DIR") or "data"))


def _cifar10(split, data_dir):
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = data_dir / CIFAR10.base_folder
    archive = data_dir / CIFAR10.filename
    published = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    present = [(folder / name, md5) for name, md5 in published if (folder / name).exists()]
    for path, md5 in present:
        if not check_integrity(path, md5):
            raise DataError(
                f"{path} is damaged: its MD5 checksum is not that of CIFAR-10's published file; "
                f"put an intact copy there, or delete {folder} to download all of it again"
            )
    if present and len(present) < len(published):
        missing = next(folder / name for name, _ in published if not (folder / name).exists())
        raise DataError(f"{missing} is missing: put it there, or delete {folder} to download all of it again")
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        # Elsewhere, torchvision's download shows no bar.
        with contextlib.nullcontext() if terminal else contextlib.redirect_stderr(io.StringIO()):
            dataset = CIFAR10(data_dir, train=split != "test", download=not present)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"CIFAR-10 was looked for in {folder.resolve()} and {archive.resolve()} and could not be downloaded "
            f"({' '.join(str(error).split())}); pass --data-dir with the folder that holds {CIFAR10.base_folder}, "
            "or --dataset digits, which needs no download"
        ) from error
    # torchvision keeps (N, 32, 32, 3) as a view of the files' planes; this undoes the view, without a copy.
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(dataset.targets)
    part = {"train": slice(-CIFAR10_VALIDATION), "validation": slice(-CIFAR10_VALIDATION, None), "test": slice(None)}
    # Cloned, so that a small split does not keep all fifty thousand images in memory.
    images, labels = images[part[split]], labels[part[split]]
    return Split("cifar10", split, images.clone() if split == "validation" else images, labels, tuple(dataset.classes))


def _digits(split):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rest, test = train_test_split(range(len(digits.target)), test_size=300, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rest, test_size=300, stratify=digits.target[rest], random_state=0)
    chosen = {"train": train, "validation": validation, "test": test}[split]
    scans = torch.from_numpy(digits.images[chosen])[:, None]  # 8 x 8, values 0..16
    images = torch.nn.functional.interpolate(scans, scale_factor=4, mode="bilinear") * (255 / 16)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target[chosen]).long()
    return Split("digits", split, images, labels, tuple(str(name) for name in digits.target_names))


def to_unit_range(images):
    """uint8 images as float32 in [0, 1], channels_last, which convolutions on CPUs and GPUs prefer."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def batches(split, batch_size, first=0, stride=1):
    """Yield (images, labels) in order, the last batch possibly smaller; images float32 in [0, 1], channels_last.

    Of all batches, counted from 0, the one with the number `first` and from there every stride-th.
    """
    pairs = zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
    for images, labels in islice(pairs, first, None, stride):
        yield to_unit_range(images), labels


def training_batches(split, batch_size, generator, *, flip, shift, contrast=1.0):
    """Yield (images, labels) once through the split: shuffled, each image flipped, shifted and dulled at random.

    split: a Split, or anything else with a length and a method `take`. Its images are changed as they are taken, so a
    perturbation moves and fades with the image that it was made for.
    flip: whether to flip horizontally with probability 1/2. shift: up to so many pixels along each axis, the border
    reflected. contrast: the lowest of the factors by which an image's contrast is scaled, the highest being 1.
    generator: a torch.Generator on the CPU, so that the order is the same on every device; the whole epoch's random
    numbers are drawn at once and sent to the device once. Of many processes, each draws them all, and takes its share
    of every batch.
    """
    count = len(split)
    order = torch.randperm(count, generator=generator)
    flipped = torch.rand(count, generator=generator) < (0.5 if flip else 0)
    shifts = torch.randint(-shift, shift + 1, (count, 2), generator=generator)
    # Drawn only where it is wanted, so that trainings without it see the random numbers that they always saw.
    factors = torch.empty(count).uniform_(contrast, 1, generator=generator) if contrast < 1 else torch.ones(count)
    parts = (tensor.to(split.device).split(batch_size) for tensor in (order, flipped, shifts, factors))
    for part in zip(*parts, strict=True):
        chosen, batch_flipped, batch_shifts, batch_factors = map(share, part)
        images, labels = split.take(chosen)
        images = flip_and_shift(images, batch_flipped, batch_shifts)
        yield (scale_contrast(images, batch_factors) if contrast < 1 else images), labels


def flip_and_shift(images, flipped, shifts):
    """Mirror the images (N, C, H, W) whose flipped (N,) is true, then move each by shifts (N, 2) = (down, right).

    The border is reflected without repeating the edge, as torch's "reflect" padding does. Any dtype; the result is
    laid out channels_last.
    """
    count, _, height, width = images.shape
    rows = _reflect(torch.arange(height, device=images.device) - shifts[:, :1], height)
    columns = _reflect(torch.arange(width, device=images.device) - shifts[:, 1:], width)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def scale_contrast(images, factors):
    """Bring each image's pixels (N, C, H, W) closer to their mean by factors (N,) in [0, 1]; 1 changes nothing."""
    factors = factors[:, None, None, None]
    return images * factors + images.mean((1, 2, 3), keepdim=True) * (1 - factors)


def _reflect(index, size):
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)
