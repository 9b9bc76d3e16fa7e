"""A user's own images as a Split: a folder of pictures, an .npz file, a pair of tensors, a Dataset or a DataLoader.

    as_split((images, labels))       # tensors: images uint8, or floating point in [0, 1], (N, C, H, W)
    as_split(loader)                 # read once; the images are kept
    read_images("pictures/")         # pictures/CLASS/*.png, as torchvision's ImageFolder reads it
    read_images("images.npz")        # arrays called images and labels

The files may come from anyone: nothing in them is executed, and whatever is wrong with one is a UserError of one line.
"""

import io
import math
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from attacks.core import Model, checked_images
from networks import NETWORKS
from utils.constants import LARGEST_CLASSES, UserError
from utils.data import Split
from utils.files import open_file, resolved
from utils.formats import LONGEST_NAME
from utils.quoting import one_line, printable, shown

# What `as_split` accepts: a pair is (images, labels), and a path is that of a folder or an .npz file.
Data: TypeAlias = "Split | tuple[Any, Any] | Dataset | DataLoader | str | Path"

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")  # Pillow's names; it runs another program for some other formats
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's names of pixels of 8 bits or fewer
DTYPES = (torch.uint8, torch.float16, torch.float32, torch.float64)
DEEPEST_FOLDER = 50  # levels of folders in the folder of a class
LARGEST_PICTURE = 2**24  # pixels, after resizing
LARGEST_UPLOAD = 2**23  # bytes of an uploaded picture; Jupyter's connection to a page ends at 10 MiB
LARGEST_ARRAY = 2**28  # bytes of a compressed array; a larger one may be a hundred times as long as it is in the file

_KEPT: "WeakKeyDictionary[Any, Split]" = WeakKeyDictionary()


def as_split(data: Data, *networks: Model) -> Split:
    """The images and labels in `data` as a Split, ready for these networks. A Split is returned as it is.

    data: a pair (images, labels) of tensors or arrays, a torch Dataset of (image, label), a DataLoader or another
        iterable of batches (images, labels), or the path of a folder or an .npz file (see `read_images`). Images are
        uint8, or floating point in [0, 1], (N, C, H, W); labels are whole numbers from 0, (N,).
    A Dataset or a loader is read once, in its own order. Its images are kept in a temporary file for as long as it
    exists, so that a later call sees the same images even if it shuffles or augments, or if they exceed the memory.
    networks: data other than a Split goes to the device of the first one. If one is not of this project, images get
        torch.contiguous_format.
    Raises UserError, in one line, if images or labels are of another kind.
    """
    if isinstance(data, Split):
        split = data
        if not len(split):
            raise UserError(f"the {split.name} split of {one_line(split.dataset)} holds no images")
    else:
        split = _read_or_kept(data)
        modules = (network for network in networks if isinstance(network, torch.nn.Module))
        weight = next((weight for module in modules for weight in module.parameters()), None)
        split = split if weight is None else split.to(weight.device)
    ours = all(type(network) in NETWORKS.values() for network in networks)
    return split if ours else replace(split, memory_format=torch.contiguous_format)


def read_images(
    path: str | Path,
    *,
    examples: int | None = None,
    resize: int | None = None,
    channels: int = 3,
    classes: Sequence[str] | None = None,
) -> Split:
    """The images in a folder or in an .npz file, on the CPU.

    A folder holds a folder for each class, and pictures (PNG, JPEG, BMP, PPM, WebP) at any depth in it. Class i is the
    i-th folder in the order of their names, as in torchvision's ImageFolder, or classes[i].
    An .npz file holds `images`, (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, or grey (N, H, W), uint8 or floating
    point in [0, 1]; and `labels`, whole numbers (N,).
    examples: read only so many images: of a folder, evenly spaced ones, so that all classes are there; else the first.
    resize: make each image `resize` pixels wide and high: its shorter side is scaled, and the longer one is cropped.
    channels: 3, or 1 for grey images; only for a folder.
    Raises UserError if a file is missing, damaged, too large or of another kind, or if the images differ in size.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, examples, resize, channels, classes)
    split = _split(*_arrays(path), str(path), classes or ())
    if classes and len(split.class_names) > len(classes):
        raise UserError(f"{path}: a label is {len(split.class_names) - 1}, but only {len(classes)} classes have a name")
    split = split if examples is None else split.first(examples)
    return split if resize is None else replace(split, images=_resized(split.images, resize))


# ---- folders ----


def _folder(
    folder: Path, examples: int | None, resize: int | None, channels: int, classes: Sequence[str] | None
) -> Split:
    try:
        found = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
        names = tuple(found if classes is None else classes)
        if unknown := [name for name in found if name not in names]:
            raise UserError(f"{folder} has a folder {shown(unknown[0])}, which is not one of the classes")
        files = [(file, names.index(name)) for name in found for file in _pictures(folder / name)]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or one_line(error)}") from error
    if not files:
        raise UserError(f"{folder} holds no pictures: they must be in a folder for each class, {folder}/CLASS/*.png")
    count = min(examples or len(files), len(files))
    chosen = [files[index * len(files) // count] for index in range(count)]
    return read_pictures(chosen, folder, names, channels=channels, resize=resize)


def read_pictures(
    files: Sequence[tuple[Path, int]],
    folder: Path,
    names: Sequence[str],
    *,
    channels: int = 3,
    resize: int | None = None,
) -> Split:
    """Pictures as a Split, in the order of `files`, each with its label. The other arguments are as for `read_images`.

    folder: what the Split is called after; names: of the classes. Raises UserError as `read_images` does.
    """
    pieces = ((_picture(file, channels, resize)[None], torch.tensor([label])) for file, label in files)
    return _split(*_kept(pieces, str(folder), [str(file) for file, _ in files]), str(folder), names)


def _pictures(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The pictures in a folder and in the folders below it, in the order of their names."""
    real = resolved(folder)
    if real in above or len(above) == DEEPEST_FOLDER:
        reason = "leads back to a folder above it, so it has no end" if real in above else "is nested too deeply"
        raise UserError(f"{folder} {reason}")
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _pictures(entry, (*above, real))
        elif entry.suffix.lower() in ENDINGS:
            yield entry


def _picture(path: Path, channels: int, resize: int | None) -> Tensor:
    """The pixels of a picture: uint8 (C, H, W)."""
    return _pixels(lambda: open_file(path), str(path), channels, resize)


def read_upload(data: bytes, size: int) -> Tensor:
    """A picture that somebody uploaded, scaled and cropped to a square: float (1, 3, size, size) in [0, 1].

    data: the bytes of a file of any of the FORMATS. A photograph is turned as its camera says. Raises UserError, in one
    line, if the data are longer than LARGEST_UPLOAD, damaged or something else, or if the picture is too large.
    """
    if len(data) > LARGEST_UPLOAD:
        mebibytes = math.ceil(len(data) / 2**20 * 10) / 10
        raise UserError(f"the picture has {mebibytes} MiB: choose one of at most {LARGEST_UPLOAD >> 20} MiB")
    pixels = _pixels(lambda: io.BytesIO(data), "the picture", 3, size, upright=True)
    return pixels[None].float() / 255


def _pixels(
    opened: Callable[[], BinaryIO], name: str, channels: int, resize: int | None, *, upright: bool = False
) -> Tensor:
    """The pixels of the picture that `opened` opens: uint8 (C, H, W). name: of the picture, for messages."""
    from PIL import Image, ImageOps
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with opened() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture: Any = Image.open(file, formats=FORMATS)
            if picture.mode not in MODES:
                raise ValueError(f"its pixels are of mode {picture.mode}; save it with 8 bits a channel")
            picture = (ImageOps.exif_transpose(picture) if upright else picture).convert(
                "L" if channels == 1 else "RGB"
            )
            if resize is not None:
                picture = _resized(picture, resize)
            if picture.width * picture.height > LARGEST_PICTURE:
                raise ValueError(f"it has more than {LARGEST_PICTURE:,} pixels; resize it")
            return pil_to_tensor(picture)
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise UserError(f"{name} cannot be read as a picture: {reason}") from error


def _resized(images: Any, size: int) -> Any:
    """A picture, or a tensor (N, C, H, W), scaled to `size` pixels along its shorter side and cropped to a square."""
    from torchvision.transforms import functional as F

    _, height, width = F.get_dimensions(images)
    if max(height, width) * size**2 > LARGEST_PICTURE * min(height, width):  # the longer side is scaled, then cropped
        raise UserError(
            f"a picture of {width} x {height} pixels, scaled to {size}, has more than {LARGEST_PICTURE:,}: crop it, or "
            "choose a smaller size"
        )
    resized = F.center_crop(F.resize(images, [size], antialias=True), [size, size])
    return resized.clamp_(0, 1) if isinstance(images, Tensor) and images.is_floating_point() else resized


# ---- .npz files ----


def _arrays(path: Path) -> tuple[Tensor, Tensor]:
    """The arrays `images`, as (N, C, H, W), and `labels` of an .npz file."""
    found = {}
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            for name in ("images", "labels"):
                if f"{name}.npy" not in archive.namelist():
                    others = ", ".join(Path(other).stem for other in archive.namelist())
                    raise ValueError(f"it has no array {name!r}, only {shown(others)}")
                entry = archive.getinfo(f"{name}.npy")
                if entry.file_size > max(LARGEST_ARRAY, 100 * entry.compress_size):
                    raise ValueError(f"{name} would take {entry.file_size / 2**30:.1f} GiB")
                with archive.open(entry) as stream:
                    found[name] = np.lib.format.read_array(stream, allow_pickle=False)
        images, labels = map(torch.from_numpy, found.values())
        if not (images.ndim and labels.ndim):
            raise ValueError("it holds a single number, not an array of images or labels")
    except Exception as error:  # numpy and zipfile raise errors of many kinds for damaged files
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as an .npz file of images and labels: {reason}") from error
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first == last:
            raise UserError(
                f"{path}: images of shape {tuple(images.shape)} do not show which dimension has the channels: "
                "store them as (N, C, H, W) or (N, H, W, C) with 1 or 3 channels"
            )
        images = images if first else images.permute(0, 3, 1, 2).contiguous()
    return images, labels


# ---- tensors, data sets and loaders ----


def _read_or_kept(data: Any) -> Split:
    """What was kept of a Dataset or a loader that was read before; else the data, read now."""
    if isinstance(data, (str, Path)):
        return read_images(data)
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list)):
        images, labels = data
        return _split(*_checked(images, labels, "the pair"), "the pair", ())
    if not isinstance(data, (Dataset, Iterable)):
        raise UserError(
            f"images must be a Split, a pair of tensors, a Dataset, a DataLoader or a path, not a {_kind(data)}"
        )
    try:
        kept = _KEPT.get(data)
    except TypeError:  # it cannot be hashed or referred to weakly, so it is read each time
        return _read(data)
    if kept is None:
        kept = _KEPT[data] = _read(data)
    return kept


def _read(data: Any) -> Split:
    where = f"the {_kind(data)}"
    pieces = _pieces_of_items(data, where) if isinstance(data, Dataset) else _pieces_of_batches(data, where)
    names = getattr(getattr(data, "dataset", data), "classes", ())
    known = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return _split(*_kept(pieces, where), where, names if known else ())


def _pieces_of_batches(loader: Iterable[Any], where: str) -> Iterator[tuple[Tensor, Tensor]]:
    count = 0
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise UserError(f"{where} must yield batches (images, labels), not a {_kind(batch)}")
        images, labels = batch
        images, labels = _checked(images, labels, where, count)
        count += len(labels)
        yield images, labels


def _pieces_of_items(dataset: Any, where: str) -> Iterator[tuple[Tensor, Tensor]]:
    from torchvision.transforms.functional import pil_to_tensor

    items = dataset if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(len(dataset)))
    for number, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise UserError(f"{where} must hold pairs (image, label), not a {_kind(item)}")
        image, label = item
        if isinstance(image, (Tensor, np.ndarray)):
            pixels = torch.as_tensor(image)
        elif getattr(image, "mode", None) in ("L", "RGB"):  # the pixels of some other modes are numbers of colours
            pixels = pil_to_tensor(image)
        else:
            raise UserError(
                f"{where}: image {number} must be a tensor, an array, or a picture of mode L or RGB, not {shown(image)}"
            )
        labels = label.reshape(-1) if isinstance(label, (Tensor, np.ndarray)) else [label]
        yield _checked(pixels[None], labels, where, number)


def _checked(images: Any, labels: Any, where: str, first: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors on one device. Raises UserError unless `as_split` allows them.

    first: the number of the first image, for messages.
    """
    try:
        images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{where}: images and labels must be tensors or arrays of numbers ({one_line(error)})"
        ) from error
    if images.dtype not in DTYPES:
        raise UserError(f"{where}: images must be uint8, or floating point in [0, 1], not {_dtype(images)}")
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise UserError(f"{where}: labels must be whole numbers (N,), not {_dtype(labels)} {tuple(labels.shape)}")
    if images.ndim != 4 or len(images) != len(labels) or not images.numel():
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise UserError(f"{where}: images must be (N, C, H, W) and labels (N,), with an image at least, not {shapes}")
    low, high = images.min().item(), images.max().item()
    if not (isfinite(low) and isfinite(high)):
        wrong = first + int(images.flatten(1).isfinite().all(1).int().argmin())
        raise UserError(f"{where}: image {wrong}, counted from 0, holds NaN or infinity")
    if images.is_floating_point() and not (low >= 0 and high <= 1):
        try:
            images = checked_images(images)  # clamps what rounding has left just outside
        except ValueError:
            hint = "leave out their normalisation, and put it into the network, "
            hint += "nn.Sequential(Normalize(mean, std), network)"
            hint = "divide them by 255" if low >= 0 and 2 < high <= 255 else hint
            raise UserError(f"{where}: images lie in {low:.3g}..{high:.3g}, not in [0, 1]: {hint}") from None
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= LARGEST_CLASSES:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise UserError(
            f"{where}: a label is {wrong}, but classes are counted from 0 to at most {LARGEST_CLASSES - 1:,}"
        )
    return images.detach(), labels.to(images.device)


def _kept(pieces: Iterable[tuple[Tensor, Tensor]], where: str, files: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """All pieces joined. Images are in a temporary file, mapped into memory: they may be larger than the memory.

    files: the names of the images, for messages.
    """
    first: Tensor | None = None
    labels: list[Tensor] = []
    with tempfile.TemporaryFile() as file:
        for images, of_images in pieces:
            images = images.cpu().contiguous()
            first = images if first is None else first
            if images.dtype != first.dtype or images.shape[1:] != first.shape[1:]:
                number = sum(len(each) for each in labels)
                name = files[number] if files else f"image {number}"
                sizes = f"{tuple(images.shape[1:])} {_dtype(images)}, not {tuple(first.shape[1:])} {_dtype(first)}"
                raise UserError(f"{where}: {name} is {sizes} like the first image: resize the images")
            file.write(images.numpy().data)
            labels.append(of_images.cpu())
        if first is None:
            raise UserError(f"{where} holds no images")
        file.flush()
        shape = (sum(len(each) for each in labels), *first.shape[1:])
        mapped = np.memmap(file, dtype=first.numpy().dtype, mode="r+", shape=shape)
    return torch.from_numpy(mapped), torch.cat(labels)


def _split(images: Tensor, labels: Tensor, where: str, names: Sequence[str]) -> Split:
    """Images and labels, checked, as a Split. where: what they come from; names: of the classes, as far as known."""
    images, labels = _checked(images, labels, where)
    if unfit := [name for name in names if not 1 <= len(name) <= LONGEST_NAME]:
        raise UserError(f"{where}: the name of a class has 1 to {LONGEST_NAME} characters, unlike {shown(unfit[0])}")
    names = with_numbers(names, int(labels.max()) + 1)
    dataset = printable(resolved(where).name[:200]) if Path(where).exists() else where
    return Split(dataset, "test", images, labels, names, torch.contiguous_format)


def with_numbers(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """Names of at least so many classes: a class without a name is called by its number."""
    return (*names, *(str(number) for number in range(len(names), classes)))


def _kind(value: object) -> str:
    return type(value).__name__


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
