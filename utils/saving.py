"""Adversarial examples as 8-bit PNGs that still deceive the network: saved, shown on a contact sheet, loaded again.

FOLDER/adversarial/00000.png     the examples, in the order of the data
FOLDER/originals/00000.png       the images that they were made from
FOLDER/images.jsonl              what is known of all (formats.SavedHeader), then a line for each image (SavedImage)
FOLDER/contact-sheet.png         some pairs in one picture
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attacks.core import Model, checked_images, evaluating, logits_of
from attacks.norms import check_epsilon
from utils.constants import EVALUATION_BATCH, LARGEST_CLASSES, UserError
from utils.data import Split
from utils.files import read_bytes, write_atomically
from utils.formats import LONGEST_LOG, LONGEST_NAME, SavedHeader, SavedImage, decode_lines, encode_lines
from utils.images import Data, as_split, read_pictures, with_numbers
from utils.models import count_classes
from utils.quoting import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

LINES = "images.jsonl"
TILE = 112  # pixels, the longer side of an image on the contact sheet


@dataclass(frozen=True, eq=False)
class SavedImages:
    """Saved adversarial examples. images: what each line says of an image; both Splits have them in the same order."""

    adversarial: Split
    originals: Split
    header: SavedHeader
    images: list[SavedImage]


def save_images(
    folder: str | Path,
    network: Model,
    data: Data,
    adversarial: Tensor | Sequence[Tensor],
    *,
    attack: str,
    epsilon: float,
    norm: str = "linf",
    iterations: int | None = None,
    batch_size: int = EVALUATION_BATCH,
) -> SavedImages:
    """Save adversarial examples and their originals as 8-bit PNGs, and say how many still deceive the network.

    Pixels are rounded to 256 levels and stay within epsilon of the originals (see `round_within`). The network then
    classifies what was saved, in batches of `batch_size`.
    data: the originals, as for `as_split`, N of them with 1 or 3 channels.
    adversarial: float (N, C, H, W) in [0, 1], or a sequence of batches of them, in the order of the data.
    attack, epsilon, norm, iterations: how the examples were made; the attack's name, the radius in pixel units and its
        norm, and how many steps an image was allowed.
    Raises UserError if the folder is not empty, or if images, names or numbers do not fit; ValueError for a radius or a
    norm that does not exist.
    """
    check_epsilon(epsilon, norm)
    folder, split = Path(folder), as_split(data, network)
    check_empty(folder)
    # That of the images which the network takes.
    dtype = split.images.dtype if split.images.is_floating_point() else torch.float32
    classes = min(count_classes(network, split), LARGEST_CLASSES)
    split = replace(split, class_names=with_numbers(split.class_names, classes))
    if split.images.shape[1] not in (1, 3):
        raise UserError(f"pictures have 1 or 3 channels, so images with {split.images.shape[1]} cannot be saved")
    parts = list(adversarial.split(batch_size) if isinstance(adversarial, Tensor) else adversarial)
    if sum(map(len, parts)) != len(split) or any(part.shape[1:] != split.images.shape[1:] for part in parts):
        raise UserError(f"adversarial images must have the shape of the originals, {tuple(split.images.shape)}")
    parts = [checked_images(part).to(split.device, dtype) for part in parts]
    sizes = [len(part) for part in parts]
    pairs = list(zip(parts, split.images.split(sizes), strict=True))
    rounded = torch.cat([round_within(part, _levels(originals) / 255, epsilon, norm) for part, originals in pairs])
    originals = torch.cat([_levels(originals).round().to(torch.uint8) for _, originals in pairs])
    saved, clean = replace(split, images=rounded), replace(split, images=originals)
    before, after = (_predictions(network, each, dtype, batch_size) for each in (clean, saved))
    wrong = _predictions(network, replace(split, images=torch.cat(parts)), dtype, batch_size) != split.labels
    header = SavedHeader(
        attack=attack,
        epsilon=float(epsilon),
        norm=norm,  # type: ignore[arg-type]
        batch_size=batch_size,
        channels=split.images.shape[1],  # type: ignore[arg-type]  # the schema checks it
        class_names=[name[:LONGEST_NAME] for name in split.class_names],  # a folder's name may be longer
        clean_accuracy=(before == split.labels).double().mean().item(),
        accuracy=(after == split.labels).double().mean().item(),
        misclassified=int(wrong.sum()),
        survived=int((wrong & (after != split.labels)).sum()),
    )
    pieces = zip(*(each.images.split(batch_size) for each in (saved, split)), strict=True)
    distances = [(_levels(new) - _levels(old)).flatten(1) / 255 for new, old in pieces]
    linf = torch.cat([each.abs().amax(1) for each in distances]).tolist()
    l2 = torch.cat([each.norm(dim=1) for each in distances]).tolist()
    columns = zip(split.labels.tolist(), before.tolist(), after.tolist(), linf, l2, strict=True)
    images = [
        SavedImage(file=_file(i), label=label, before=first, after=then, linf=most, l2=far, iterations=iterations)
        for i, (label, first, then, most, far) in enumerate(columns)
    ]
    found = SavedImages(saved, clean, header, images)
    _write(folder, found)
    return found


def load_images(folder: str | Path) -> SavedImages:
    """What `save_images` wrote into a folder. Raises UserError if a file is missing, damaged or of another kind."""
    folder = Path(folder)
    path = folder / LINES
    try:
        header, *images = decode_lines(read_bytes(path, LONGEST_LOG), SavedHeader, SavedImage)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} does not describe saved images ({one_line(error)})") from error
    splits = []
    for part in ("adversarial", "originals"):
        files = [(folder / part / _file(index), image.label) for index, image in enumerate(images)]
        splits.append(read_pictures(files, folder, header.class_names, channels=header.channels))
    adversarial, originals = splits
    return SavedImages(adversarial, originals, header, images)


def check_empty(folder: Path) -> None:
    """Raise UserError if a folder cannot be written, or is not empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: choose another folder for the images, or delete it")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None


def round_within(images: Tensor, originals: Tensor, epsilon: float, norm: str = "linf") -> Tensor:
    """Images rounded to 8 bits, uint8 (N, C, H, W), each pixel to the nearest level within epsilon of its original.

    images, originals: float (N, C, H, W) in [0, 1]; epsilon: radius in pixel units. Where no level lies within epsilon
    of an original that is not itself a level, the pixel gets the level nearest to the original.
    With norm "l2", an image that the nearest levels bring farther than epsilon from its original is rounded towards the
    original instead. If that is not made of levels, half a level more is possible in each pixel.
    """
    exact = originals.double() * 255
    if norm == "l2":
        exact, offset = exact.round(), images.to(exact) * 255 - exact
        nearest = (exact + offset.round() - originals.double() * 255).flatten(1).norm(dim=1)
        farther = (nearest > 255 * epsilon).view(-1, 1, 1, 1)
        return (exact + torch.where(farther, offset.trunc(), offset.round())).clamp(0, 255).to(torch.uint8)
    slack = 1e-4  # of a level: an original that is a level is known up to the rounding of its dtype
    low, high = (exact - 255 * epsilon - slack).ceil(), (exact + 255 * epsilon + slack).floor()
    rounded = (images.to(exact) * 255).round().clamp(low, high)
    return torch.where(low <= high, rounded, exact.round()).clamp(0, 255).to(torch.uint8)


def contact_sheet(saved: SavedImages, columns: int = 4, rows: int = 6) -> "Image":
    """Pairs of an original and its adversarial example, with the network's answers, as one picture.

    The first pairs in which the attack changed a right answer are shown, and then the others.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from torchvision.transforms.functional import to_pil_image

    changed = [i for i, image in enumerate(saved.images) if image.before == image.label != image.after]
    others = [i for i in range(len(saved.images)) if i not in set(changed)]
    chosen = [*changed, *others][: columns * rows]
    width, height = 2 * TILE + 12, TILE + 22
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    names = saved.header.class_names
    for place, i in enumerate(chosen):
        left, top = place % columns * width, place // columns * height
        for offset, split in ((0, saved.originals), (TILE + 2, saved.adversarial)):
            picture = to_pil_image(split.images[i].cpu()).convert("RGB")
            sheet.paste(ImageOps.contain(picture, (TILE, TILE), Image.Resampling.NEAREST), (left + offset, top))
        answers = (names[k] if k < len(names) else str(k) for k in (saved.images[i].before, saved.images[i].after))
        # Pillow's own font has few letters outside ASCII.
        text = ", then ".join(answer.encode("ascii", "replace").decode()[:16] for answer in answers)
        draw.text((left, top + TILE + 3), text, fill="black", font=font)
    return sheet


def _write(folder: Path, saved: SavedImages) -> None:
    """Write the pictures, and images.jsonl last: a folder without it is not complete."""
    from torchvision.transforms.functional import to_pil_image

    try:
        lines = encode_lines([saved.header, *saved.images])
    except ValueError as error:
        raise UserError(f"these examples cannot be saved: {one_line(error)}") from error
    for part, split in (("adversarial", saved.adversarial), ("originals", saved.originals)):
        (folder / part).mkdir()
        for index, image in enumerate(split.images.cpu()):
            to_pil_image(image).save(folder / part / _file(index))
    contact_sheet(saved).save(folder / "contact-sheet.png")
    write_atomically(folder / LINES, lines)


def _predictions(network: Model, split: Split, dtype: torch.dtype, batch_size: int) -> Tensor:
    """The network's classes, int64 (N,), for images that have been made floating point, of this dtype, in [0, 1]."""
    levels = 1 if split.images.is_floating_point() else 255
    with torch.no_grad(), evaluating(network, split.device):
        pieces = (piece.to(dtype, memory_format=split.memory_format) for piece in split.images.split(batch_size))
        return torch.cat([logits_of(network, piece / levels).argmax(1) for piece in pieces])


def _levels(images: Tensor) -> Tensor:
    """Pixels as float64 in 0..255, so that levels are exact."""
    return images.double() * 255 if images.is_floating_point() else images.double()


def _file(index: int) -> str:
    return f"{index:05}.png"
