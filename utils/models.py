"""Anyone's network: found by its import path or its name in torchvision, with weights from a file.

    network = load_model("nets.py:build", weights="net.pth", mean=(0.5,), std=(0.25,))  # grey images

The code of a network is its user's own, and it is executed. A file of weights may come from anyone, and it is not.
"""

import contextlib
import importlib
import importlib.util
import os
import pickle
import sys
import traceback
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attacks.core import AttackError, Model, evaluating, logits_of
from networks.folding import Normalize
from utils.checkpoints import load_checkpoint
from utils.constants import ROOT, UserError
from utils.data import Split, batches
from utils.files import open_file, resolved
from utils.quoting import one_line, shown

OUR_PACKAGES = ("attacks", "networks", "defenses", "utils", "study", "benchmarks")
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts save weights
PREFIXES = ("module.", "_orig_mod.")  # of names that DataParallel and torch.compile have made longer


def load_model(
    model: str,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """A network in evaluation mode on the CPU.

    model: "package.module:name" or "file.py:name", where `name` is an nn.Module, or a class or function that returns
        one when it is called without arguments; or a name from torchvision.models, such as "resnet18". Its weights are
        random unless `weights` names a file, since nothing is downloaded. A path that ends in .safetensors is that of a
        checkpoint of this project.
    weights: a .safetensors file, or one that torch.save wrote; the latter is read with weights_only=True.
    mean, std: what the network expects subtracted from each channel, and what it expects it then divided by; None: it
        expects images as they are, in [0, 1].
    num_classes: of a network from torchvision; None: its usual number.
    Raises UserError, in one line, if the network is not there or its code fails, or if the weights do not fit.
    """
    if model.endswith(".safetensors"):
        network = load_checkpoint(model)
    else:
        network = _imported(model) if ":" in model else _from_torchvision(model, num_classes)
    if weights is not None:
        load_weights(network, weights)
    if (mean is None) != (std is None):
        raise UserError("mean and std belong together: one was given without the other")
    if mean is not None and std is not None:
        try:
            network = nn.Sequential(Normalize(mean, std), network)
        except ValueError as error:
            raise UserError(str(error)) from error
    return network.eval()


# ---- code ----


def _from_torchvision(name: str, num_classes: int | None) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):  # the others are not classifiers
        raise UserError(
            f"{shown(name)} is not a network of torchvision.models, nor an import path such as package.module:name "
            "or file.py:name"
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    return models.get_model(name, weights=None, **options)


def _imported(path: str) -> nn.Module:
    """The network at an import path, "module:name" or "file.py:name"."""
    place, _, name = path.rpartition(":")
    file = resolved(place) if place.endswith(".py") else None
    if file and not file.is_file():
        raise UserError(f"{place}: no such file")
    folder = file.parent if file else Path.cwd()
    try:
        with _importing_from(folder):
            module = _run(file) if file else importlib.import_module(place)
            found: Any = module
            for part in name.split("."):
                found = getattr(found, part)
            network = found if isinstance(found, nn.Module) else found()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = last.filename == __file__ or last.filename.startswith("<")  # or Python's own
        where = "" if ours else f" ({Path(last.filename).name}, line {last.lineno})"
        raise UserError(
            f"{path} cannot be loaded: {type(error).__name__}: {one_line(error)}{where}{_hint(error, folder)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{path} must be an nn.Module or return one, not a {type(network).__name__}")
    return network


def _run(file: Path) -> Any:
    """The module in a file."""
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None  # the name of a .py file always has one
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Where pickle and dataclasses look for it; a module of ours, or of a library, must not be replaced.
    sys.modules.setdefault(file.stem, module)
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Meanwhile, modules in `folder` can be imported, also a package that has the name of one of ours."""
    theirs = [name for name in OUR_PACKAGES if (folder / name).is_dir() or (folder / f"{name}.py").is_file()]
    theirs = [] if folder == ROOT else theirs
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in theirs}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] in theirs]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _hint(error: BaseException, folder: Path) -> str:
    """What to do about an error in the user's code, if that is known."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in OUR_PACKAGES:
        return f"; this project has a package of the same name, so yours must be in {folder}"
    if isinstance(error, ModuleNotFoundError):
        return f"; modules are looked for in {folder}"
    if isinstance(error, TypeError) and "argument" in str(error):
        return "; name a function that needs no arguments"
    return ""


# ---- weights ----


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load the weights in a .safetensors file, or in one that torch.save wrote, into a network.

    The file holds a state dict, or a dictionary with one under "state_dict", "model_state_dict", "model" or "net".
    Names may have the prefix that DataParallel or torch.compile gives them.
    Raises UserError, in one line, if the file is damaged or holds more than weights, or if tensors are missing, unknown
    or of another shape. Nothing in the file is executed.
    """
    expected = network.state_dict()
    bytes_expected = sum(tensor.nbytes for tensor in expected.values() if isinstance(tensor, Tensor))
    found = _state_dict(_read(Path(path), 8 * bytes_expected + 2**26), Path(path))
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found) and not any(name.startswith(prefix) for name in expected):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    common = [name for name in expected if name in found and not is_lazy(expected[name])]
    differing = [name for name in common if found[name].shape != expected[name].shape]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name].shape)} in the file, {tuple(expected[name].shape)} in the network"
            for name in differing
        ],
    }
    if any(problems.values()):
        texts = [
            f"{_few(names)} {'is' if len(names) == 1 else 'are'} {what}" for what, names in problems.items() if names
        ]
        raise UserError(f"{path} does not fit the network: {'; '.join(texts)}")
    try:
        network.load_state_dict(found)
    except RuntimeError as error:  # a tensor without numbers, a sparse or a quantised one
        raise UserError(f"{path} does not fit the network: {one_line(error)}") from error


def _read(path: Path, longest: int) -> Any:
    """What a file of weights holds. longest: in bytes; a longer file is refused before it is read."""
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > longest:
                raise ValueError("it is too large for this network")
            if path.suffix == ".safetensors":
                from safetensors.torch import load

                return load(file.read())
            if zipfile.is_zipfile(file):  # torch unpacks its entries, and a few bytes may become gigabytes
                with zipfile.ZipFile(file) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > longest:
                        raise ValueError("it is too large for this network")
                file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds other Python objects than weights, or is damaged, and is not read, since it could execute "
            "code: write it with torch.save(network.state_dict(), ...)"
        ) from error
    except Exception as error:  # torch raises errors of many kinds for damaged files
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        raise UserError(f"{path} cannot be read as a file of weights: {reason}") from error


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    for key in CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path} does not hold a state dict, but a {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"a {type(tensor).__name__}, not a tensor" if isinstance(name, str) else "not a name"
            raise UserError(f"{path} does not hold a state dict: {shown(name)} is {what}")
    return dict(found)


def _few(names: Iterable[str]) -> str:
    """The first names of a list, quoted from a file that may come from anyone."""
    first, *others = [one_line(name) for name in names]
    return ", ".join([first, *others[:2], *([f"{len(others) - 2} more"] if len(others) > 2 else [])])


# ---- can it classify these images? ----


def count_classes(network: Model, split: Split) -> int:
    """How many classes a network tells apart: it classifies the first images of the split.

    Raises UserError, in one line, if it cannot, if it does not return logits (N, classes), or if a label is not one of
    its classes.
    """
    images, _ = next(batches(split, 2))
    dtype = str(images.dtype).removeprefix("torch.")
    try:
        with torch.no_grad(), evaluating(network, split.device):
            logits = logits_of(network, images)
    except AttackError as error:
        raise UserError(str(error)) from error
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        weights = {weight.dtype for weight in network.parameters()} if isinstance(network, nn.Module) else set()
        others = [str(other).removeprefix("torch.") for other in weights - {images.dtype}]
        hint = f"; its weights are {', '.join(sorted(others))}: convert one of both" if others else ""
        raise UserError(
            f"the network cannot classify {dtype} images of shape {tuple(images.shape[1:])}: {one_line(error)}{hint}"
        ) from error
    if split.labels.max() >= logits.shape[1]:
        raise UserError(
            f"a label is {int(split.labels.max())}, but the network's classes are 0 to {logits.shape[1] - 1}"
        )
    return logits.shape[1]


@contextlib.contextmanager
def explaining(split: Split, *networks: Model) -> Iterator[None]:
    """A context in which an error is explained in one line, if a network cannot classify the images at all.

    The networks are asked only after an error, so that a correct evaluation costs nothing more.
    """
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if not isinstance(error, AttackError):
            for network in networks:
                count_classes(network, split)
        raise
