"""CIFAR-10 and digits as tensors: a split is one uint8 tensor on the device, batched and augmented by indexing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import pickle
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from attacks.core import checked_images
from utils.constants import DATASETS, SPLITS, UserError
from utils.distributed import share
from utils.files import make_folder, read_bytes, resolved, write_atomically
from utils.quoting import one_line, shown

if TYPE_CHECKING:
    from utils.adversarial_sets import AugmentedSplit

LONGEST_BATCH = 2**25  # bytes of one of CIFAR-10's files, which have 31 million
LONGEST_ARCHIVE = 2**28  # bytes
CIFAR10_VALIDATION = 5000  # the last training images, on which networks and hyperparameters are chosen

Device = str | torch.device
Batches = Iterator[tuple[Tensor, Tensor]]


class DataError(UserError):
    """The data set is missing or damaged; the message says in one line what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images of a data set. images: uint8 (N, C, H, W), or floating point in [0, 1]; labels: int64 (N,), same device.

    CIFAR-10 and digits are uint8 (N, 3, 32, 32). utils.images.as_split makes a Split of a user's own images.
    class_names: the name of class i is class_names[i]. name: "train", "validation" or "test".
    memory_format: of the images that a network gets. Our networks are faster on channels_last images; other people's
        may call `view`, which needs torch.contiguous_format.
    """

    dataset: str
    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    memory_format: torch.memory_format = torch.channels_last
    defense = None  # these images alone defend against nothing; see AugmentedSplit

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError unless images and labels are as above; rounding beyond [0, 1] is clamped."""
        if not (self.images.dtype == torch.uint8 or self.images.is_floating_point()):
            kinds = "uint8 from 0 to 255, or as floating point in [0, 1]"
            raise TypeError(f"a Split holds images as {kinds}, not {self.images.dtype}")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"a Split holds labels as int64, not {self.labels.dtype}")
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            shapes = f"{tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            raise ValueError(f"a Split holds images (N, C, H, W) and labels (N,), not {shapes}")
        if self.images.is_floating_point():
            object.__setattr__(self, "images", checked_images(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: Device) -> Split:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def first(self, examples: int) -> Split:
        """The first `examples` images, or all if there are fewer."""
        return self.between(0, examples)

    def between(self, start: int, stop: int) -> Split:
        """The images from position `start` to before `stop`."""
        return replace(self, images=self.images[start:stop], labels=self.labels[start:stop])

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The images at the positions in `index`, in [0, 1] as `to_unit_range` makes them; and their labels."""
        return to_unit_range(self.images[index], self.memory_format), self.labels[index]

    def digest(self) -> str:
        """SHA-256 of the images and labels, in hexadecimal."""
        return tensor_digest(self.images, self.labels)

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """The mean and standard deviation of each channel in [0, 1]; exact for uint8 images, from a histogram."""
        if self.images.is_floating_point():
            spread, centre = torch.std_mean(self.images.double(), (0, 2, 3), correction=0)
            return centre.tolist(), spread.tolist()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in range(self.images.shape[1]):
            histogram = torch.bincount(self.images[:, channel].flatten(), minlength=256).cpu().double()
            probability = histogram / histogram.sum()
            mean.append((probability @ values).item())
            std.append((probability @ (values - mean[-1]) ** 2).sqrt().item())
        return mean, std


def tensor_digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' values, one tensor after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def load_split(dataset: str, split: str, data_dir: str | Path | None = None) -> Split:
    """The "train", "validation" or "test" split of "cifar10" or "digits", on the CPU.

    cifar10: 45,000, 5,000 (the last of the published training images) and 10,000 images. data_dir (default: $DATA_DIR,
        else data) holds the files; torchvision downloads them there on first use. Their checksums are verified.
    digits: 1,197, 300 and 300 images. They come with scikit-learn, so nothing is downloaded.
    Raises DataError if files are damaged, or are missing and cannot be downloaded, and ValueError for another name.
    """
    if dataset not in DATASETS or split not in SPLITS:
        raise ValueError(f"dataset must be one of {DATASETS} and split one of {SPLITS}, not {dataset!r} and {split!r}")
    if dataset == "digits":
        return _digits(split)
    return _cifar10(split, Path(data_dir or os.environ.get("DATA_DIR") or "data"))


def _cifar10(split: str, data_dir: Path) -> Split:
    from torchvision.datasets import CIFAR10

    wanted = [name for name, _ in (CIFAR10.test_list if split == "test" else CIFAR10.train_list)]
    found = _published_files(data_dir, [*wanted, CIFAR10.meta["filename"]])
    parts = [found[name] for name in wanted]
    # A file holds the three planes of each image, one after the other.
    images = torch.from_numpy(np.concatenate([part["data"] for part in parts])).reshape(-1, 3, 32, 32)
    labels = torch.tensor([label for part in parts for label in part["labels"]])
    first = len(labels) - CIFAR10_VALIDATION
    chosen = {"train": slice(first), "validation": slice(first, None), "test": slice(None)}[split]
    images = (
        images[chosen].clone() if split == "validation" else images[chosen]
    )  # a view would keep all images in memory
    names = tuple(found[CIFAR10.meta["filename"]][CIFAR10.meta["key"]])
    return Split("cifar10", split, images, labels[chosen], names)


def _published_files(data_dir: Path, wanted: list[str]) -> dict[str, Any]:
    """What CIFAR-10's files of these names hold. All its files must be there and intact; if all are missing, they are
    downloaded.

    Each file is read once: the bytes whose checksum is compared are those that are parsed.
    """
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    published = dict([*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    present = [name for name in published if (folder / name).exists()]
    if not present:
        _download(data_dir, folder, list(published))
    found = {}
    for name in present or published:
        try:
            data = read_bytes(folder / name, LONGEST_BATCH)
            if hashlib.md5(data).hexdigest() != published[name]:
                raise ValueError("its MD5 checksum is not that of CIFAR-10's published file")
            if name in wanted:
                found[name] = unpickled(data)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder / name} is damaged: {getattr(error, 'strerror', None) or error}; "
                f"put an intact copy there, or delete {folder} to download all of it again"
            ) from error
    if missing := [name for name in published if name not in (present or published)]:
        raise DataError(
            f"{folder / missing[0]} is missing: put it there, or delete {folder} to download all of it again"
        )
    return found


_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # where NumPy 2 has it; the files have the old name
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that allows the three names which CIFAR-10's files hold, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of that name. Raises UnpicklingError unless it is one of _ALLOWED."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {shown(f'{module}.{name}')}, which could execute code")
        return _ALLOWED[module, name]


def unpickled(data: bytes) -> Any:
    """The dict in one of CIFAR-10's files. Raises ValueError, and executes nothing, if it is damaged or hostile."""
    try:
        found = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # pickle and NumPy raise errors of many kinds for damaged data
        raise ValueError(one_line(error) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict")
    return found


def _download(data_dir: Path, folder: Path, names: list[str]) -> None:
    """Fetch CIFAR-10's archive, unless an intact one is there, and take the files of these names out of it."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    archive = data_dir / CIFAR10.filename
    try:
        if archive.exists() and not archive.is_file():
            raise OSError(errno.EINVAL, "it is not a file", str(archive))
        terminal = sys.stderr is not None and sys.stderr.isatty()
        # torchvision's progress bar is for a terminal only.
        with contextlib.nullcontext() if terminal else contextlib.redirect_stderr(io.StringIO()):
            download_url(CIFAR10.url, data_dir, CIFAR10.filename, CIFAR10.tgz_md5)
        data = read_bytes(archive, LONGEST_ARCHIVE)
        if hashlib.md5(data).hexdigest() != CIFAR10.tgz_md5:
            raise ValueError("the archive was replaced while it was read")
        make_folder(folder)
        with tarfile.open(fileobj=io.BytesIO(data)) as members:
            for name in names:
                member = members.extractfile(f"{CIFAR10.base_folder}/{name}")
                write_atomically(folder / name, member.read() if member else b"")
    except (OSError, RuntimeError, HTTPException, ValueError, KeyError, tarfile.TarError) as error:
        raise DataError(
            f"CIFAR-10 was looked for in {resolved(folder)} and {resolved(archive)} and could not be downloaded "
            f"({' '.join(str(error).split())}); pass --data-dir with the folder that holds {CIFAR10.base_folder}, "
            "or --dataset digits, which needs no download"
        ) from error


def _digits(split: str) -> Split:
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


def to_unit_range(images: Tensor, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """uint8 images (N, C, H, W) as float32 in [0, 1]; a copy of floating point images, which are there already.

    memory_format: of the result. channels_last makes convolutions faster.
    """
    if images.is_floating_point():
        return images.clone(memory_format=memory_format)
    return images.to(torch.float32, memory_format=memory_format).div_(255)


def batches(split: Split, batch_size: int, first: int = 0, stride: int = 1) -> Batches:
    """Yield (images, labels) in order; images in [0, 1], in the split's memory format. The last batch may be smaller.

    first, stride: yield only the batches number first, first + stride, first + 2 * stride, ..., counted from 0.
    """
    pairs = zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
    for images, labels in islice(pairs, first, None, stride):
        yield to_unit_range(images, split.memory_format), labels


def training_batches(
    split: Split | AugmentedSplit, batch_size: int, generator: Generator, *, flip: bool, shift: int, contrast: float = 1
) -> Batches:
    """Yield (images, labels) of the whole split once, shuffled, with each image changed at random.

    An image is changed after `split.take` has returned it. A perturbation that `take` adds therefore moves and fades
    with the image that it was made for.
    flip: mirror an image with probability 1/2. shift: move it by up to this many pixels along each axis, and fill the
        border by reflection. contrast: scale its contrast by a random factor from this to 1.
    generator: on the CPU, so that the order is the same on every device. An epoch's random numbers are drawn at once
        and copied to the device once. When several processes train together, each draws all of these numbers and takes
        its share of every batch.
    """
    count = len(split)
    order = torch.randperm(count, generator=generator)
    flipped = torch.rand(count, generator=generator) < (0.5 if flip else 0)
    shifts = torch.randint(-shift, shift + 1, (count, 2), generator=generator)
    # Drawn only if asked for: trainings without it must keep the random numbers that they had before it existed.
    factors = torch.empty(count).uniform_(contrast, 1, generator=generator) if contrast < 1 else torch.ones(count)
    columns = (tensor.to(split.device).split(batch_size) for tensor in (order, flipped, shifts, factors))
    for batch in zip(*columns, strict=True):
        chosen, batch_flipped, batch_shifts, batch_factors = map(share, batch)
        images, labels = split.take(chosen)
        images = flip_and_shift(images, batch_flipped, batch_shifts)
        yield (scale_contrast(images, batch_factors) if contrast < 1 else images), labels


def flip_and_shift(images: Tensor, flipped: Tensor, shifts: Tensor) -> Tensor:
    """Mirror the images (N, C, H, W) whose flipped (N,) is true, then move each by shifts (N, 2) = (down, right).

    The border is filled by reflection without repeating the edge, as torch's "reflect" padding does. Any dtype. The
    result is in the channels_last layout.
    """
    count, _, height, width = images.shape
    rows = _reflect(torch.arange(height, device=images.device) - shifts[:, :1], height)
    columns = _reflect(torch.arange(width, device=images.device) - shifts[:, 1:], width)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)
    index = torch.arange(count, device=images.device)[:, None, None]
    return images[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def scale_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Scale each image (N, C, H, W) about the mean of its pixels by factors (N,) in [0, 1]; 1 changes nothing."""
    factors = factors[:, None, None, None]
    return images * factors + images.mean((1, 2, 3), keepdim=True) * (1 - factors)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Positions outside [0, size) reflected into it, as in a mirror at the first and last position."""
    period = max(1, 2 * (size - 1))
    index = index.remainder(period)
    return torch.where(index < size, index, period - index)
