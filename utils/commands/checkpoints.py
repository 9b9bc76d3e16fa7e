"""Which checkpoints the commands mean, and whether these fit the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils.constants import ARCHITECTURES, UserError, checkpoint_stem
from utils.quoting import shown

if TYPE_CHECKING:
    from torch import nn

    from utils.data import Split


def default_checkpoint(network: str, dataset: str, epsilon: float | None = None, defense: str = "fgsm-augment") -> Path:
    """The path of a baseline's checkpoint, or, with `epsilon`, of a network trained with a defence."""
    stem = checkpoint_stem(network if dataset == "cifar10" else f"{network}-{dataset}", epsilon, defense)
    return Path("models") / f"{stem}.safetensors"


def default_checkpoints(network: str) -> str:
    """What `--help` says about the default checkpoint."""
    return f"default {default_checkpoint(network, 'cifar10')}, for digits {default_checkpoint(network, 'digits')}"


def find_baseline(split: Split, network_name: str, tested: Path) -> Path | None:
    """A baseline's checkpoint to transfer from, other than the tested one; None if there is none.

    A baseline of the same architecture is preferred.
    """
    from utils.checkpoints import file_digest

    for name in sorted(ARCHITECTURES, key=lambda name: name != network_name):
        path = default_checkpoint(name, split.dataset)
        if path.exists() and file_digest(path) != file_digest(tested):
            return path
    return None


def load_network(path: Path, split: Split, name: str | None = None) -> nn.Module:
    """The network in a checkpoint, on the CPU.

    Raises UserError if it was trained on another data set than the split's, or is not a network of that name.
    """
    from utils.checkpoints import load_checkpoint, read_metadata

    metadata = read_metadata(path)
    if name and metadata.network != name:
        raise UserError(f"{path} holds a {metadata.network}, not a {name}")
    if metadata.dataset != split.dataset:
        raise UserError(f"{path} was trained on {shown(metadata.dataset)}, not on {split.dataset}")
    if metadata.class_names != list(split.class_names):
        raise UserError(f"{path} has other classes than {split.dataset}")
    return load_checkpoint(path)
