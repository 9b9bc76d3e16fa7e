"""Which checkpoints the commands mean, and whether these fit the data."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from utils.constants import ARCHITECTURES, ROOT, UserError, checkpoint_stem
from utils.files import resolved
from utils.quoting import shown

if TYPE_CHECKING:
    from torch import nn

    from utils.data import Split


def default_output(network: str, dataset: str, epsilon: float | None = None, defense: str = "none") -> Path:
    """Where train-*.py writes: a baseline, or, with `epsilon`, a network trained with a defence."""
    stem = checkpoint_stem(network if dataset == "cifar10" else f"{network}-{dataset}", epsilon, defense)
    return Path("runs") / f"{stem}.safetensors"


def default_baseline(network: str, dataset: str) -> Path:
    """The baseline to test or to craft on: for CIFAR-10 the shipped one, for digits the one that the user trains."""
    return Path("models", f"{network}.safetensors") if dataset == "cifar10" else default_output(network, dataset)


def default_baselines(network: str) -> str:
    """What `--help` says about the default baseline."""
    return f"default {default_baseline(network, 'cifar10')}; digits: {default_baseline(network, 'digits')}"


def newest_training(network: str) -> Path | None:
    """The newest checkpoint of this network where train-*.py writes by default; None if there is none."""
    from utils.checkpoints import CheckpointError, read_metadata

    named = (path for path in Path("runs").glob("*.safetensors") if path.name.isprintable())  # by a terminal
    found = filter(Path.is_file, named)
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(CheckpointError):  # the state of an interrupted run is not a checkpoint
            if read_metadata(path).network == network:
                return path
    return None


def is_shipped(path: Path) -> bool:
    """Whether a path is in models/ or results/, where this repository ships files.

    The folders there that .gitignore names hold what the reader's own commands make, so they are not shipped.
    """
    ignored = ROOT / ".gitignore"
    lines = ignored.read_text(encoding="utf-8").splitlines() if ignored.is_file() else []
    made = [ROOT / line.strip("/") for line in lines if line.startswith("/") and line.endswith("/")]
    found = resolved(path)
    inside = any(found.is_relative_to(ROOT / name) for name in ("models", "results"))
    return inside and not any(found.is_relative_to(folder) for folder in made)


def overwrite_advice(path: Path, effect: str) -> str:
    """The part of a message that advises --overwrite, with a comma; empty if it would replace a shipped file."""
    return "" if is_shipped(path) else f"--overwrite {effect}, "


def find_baseline(split: Split, network_name: str, tested: Path) -> Path | None:
    """A baseline's checkpoint to transfer from, other than the tested one; None if there is none.

    A baseline of the same architecture is preferred.
    """
    from utils.checkpoints import file_digest

    for name in sorted(ARCHITECTURES, key=lambda name: name != network_name):
        path = default_baseline(name, split.dataset)
        if path.exists() and file_digest(path) != file_digest(tested):
            return path
    return None


def check_is_made(path: Path, network: str) -> None:
    """Raise UserError, which says how to make it, if `path` is the default baseline for digits and is missing."""
    if path == default_baseline(network, "digits") and not path.exists():
        raise UserError(f"{path} is missing: python train-{network}.py --dataset digits makes it")


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
