"""Checkpoints: one safetensors file each, so that reading a file from a stranger never executes anything in it.

The state dict is stored as tensors. The header says, as JSON, how to rebuild the network and how it was trained
(formats.CheckpointHeader):

    {"format": 1, "network": "cnn", "arguments": {"width": 32, "num_classes": 10}, "dataset": "cifar10",
     "class_names": [...], "training": {...}, "epochs": 20, "precision": "bfloat16", "validation_accuracy": 0.88,
     "versions": {...}}

`safetensors.torch.load_file` reads the tensors without this project.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attacks.core import evaluation_mode
from networks import NETWORKS
from utils.constants import UserError
from utils.files import open_file, write_atomically
from utils.formats import CheckpointHeader, Document, NetworkArguments, decode, encode
from utils.quoting import one_line, shown

LONGEST_WEIGHTS = 2**40  # bytes of a file of weights that is not a checkpoint of this project
LARGEST_FILE = 2**28  # bytes of a checkpoint; the widest network with ten classes has 75 million
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}  # those that we write, and their names in a file
METADATA_KEY = "checkpoint"  # one key, because safetensors writes several keys in random order

Header = TypeVar("Header", bound=Document)
Declared = dict[str, tuple[tuple[int, ...], str]]  # of each tensor, the shape and the name of the dtype
Found = TypeVar("Found")


class CheckpointError(UserError):
    """The file is missing, truncated, damaged or not what it should be; the message names it."""


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The network saved in `path`, in evaluation mode on `device`, ready to classify images in [0, 1].

    Raises CheckpointError if the file is missing, damaged or not one that `save_checkpoint` wrote, or if the network's
    logits are not finite.
    """
    header = read_metadata(path)
    with torch.device("meta"):  # shapes only: nothing is allocated before the file has proved to fit
        network = NETWORKS[header.network](**msgspec.structs.asdict(header.arguments))

    def check(header: CheckpointHeader, declared: Declared) -> None:
        expected = _declared(network)
        for name in expected.keys() | declared.keys():
            if name not in declared or name not in expected:
                raise ValueError(f"tensor {shown(name)} is {'missing' if name in expected else 'unknown'}")
            if declared[name] != expected[name]:
                raise ValueError(f"tensor {shown(name)} does not fit a {header.network} with {header.arguments}")

    _, tensors = read_tensors(path, CheckpointHeader, check)
    network.load_state_dict(tensors, assign=True)
    network = network.to(memory_format=torch.channels_last).eval()
    try:
        _check_numbers(network)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return network.to(device)


def read_metadata(path: str | Path) -> CheckpointHeader:
    """The header of a checkpoint. Raises CheckpointError."""
    header = read_header(path, CheckpointHeader)
    if header.network not in NETWORKS:
        raise CheckpointError(f"{path}: unknown network {shown(header.network)}")
    return header


def save_checkpoint(path: str | Path, network: nn.Module, about: Mapping[str, Any]) -> None:
    """Write a network and what is known about it to `path`, atomically.

    about: fields of a CheckpointHeader; `dataset` and `class_names` are required, and network, arguments and versions
        are filled in here.
    Raises TypeError if the network is not one of NETWORKS, CheckpointError if `load_checkpoint` would refuse the file.
    """
    write_atomically(path, _serialized_network(network, about))


def check_saveable(network: nn.Module, about: Mapping[str, Any]) -> None:
    """Raise what `save_checkpoint` would raise. A training calls it first, so that no time is lost."""
    _serialized_network(network, about)


def file_digest(path: str | Path, longest: int = LARGEST_FILE) -> str:
    """SHA-256 of a checkpoint, in hexadecimal. Raises CheckpointError if the file is unreadable or too large.

    longest: in bytes.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > longest:
                raise CheckpointError(f"{path} is too large for a checkpoint")
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def check_unchanged(path: str | Path, sha256: str) -> None:
    """Raise CheckpointError if the file is not the one whose SHA-256 was taken before its network was tested."""
    if file_digest(path, longest=LONGEST_WEIGHTS) != sha256:
        raise CheckpointError(
            f"{path} was replaced during the test, so the figures are not of the file that is there now: they are not "
            "stored; run the command again"
        )


def versions(*others: str) -> dict[str, str | None]:
    """Versions of the libraries, to store with a result; torch's own string also names its CUDA build.

    others: further packages that had a part in it; None stands for one that is not installed.
    """
    found: dict[str, str | None] = {"torch": torch.__version__}
    found |= {name: version(name) for name in ("torchvision", "numpy", "safetensors")}
    for name in others:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], header: Document, like: str | Path | None = None
) -> None:
    """Write tensors and a header to a safetensors file, atomically. Raises ValueError if `read_tensors` would not.

    like: as for `write_atomically`.
    """
    write_atomically(path, _serialized(tensors, header), like)


def read_tensors(
    path: str | Path, schema: type[Header], check: Callable[[Header, Declared], None] = lambda header, declared: None
) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors that `write_tensors` wrote. Raises CheckpointError.

    check(header, declared): called before any tensor is read, because a small file may declare terabytes, most of them
        a hole. declared: the shape and the dtype, as DTYPES names it, of each tensor. It raises ValueError to refuse.
    """

    def declared_in(file: Any) -> Declared:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

    before = _identity(path)
    header, declared = read_header(path, schema), _opened(path, schema, "np", declared_in)
    try:
        check(header, declared)
        for name, (_, dtype) in declared.items():
            if dtype not in DTYPES.values():  # not every version of torch knows all dtypes
                raise ValueError(f"tensor {shown(name)} is of a dtype that no checkpoint has")
        # Cloned: what get_tensor returns is a view of the file, which Windows could then not replace.
        tensors = _opened(path, schema, "pt", lambda file: {name: file.get_tensor(name).clone() for name in declared})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if _identity(path) != before:
        raise CheckpointError(f"{path} was replaced while it was read: run the command again")
    return header, tensors


def _identity(path: str | Path) -> tuple[int, ...] | None:
    """Numbers that change when the file at a path is replaced; None if the file is missing."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def read_header(path: str | Path, schema: type[Header]) -> Header:
    """The header of a file that `write_tensors` wrote, without the tensors. Raises CheckpointError."""
    text = _opened(path, schema, "np", lambda file: (file.metadata() or {}).get(METADATA_KEY))
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this project")
    try:
        return decode(text, schema)
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid ({one_line(error)})") from error


def is_safetensors(path: str | Path, schema: type[Document]) -> bool:
    """Whether a file is an intact safetensors file, whatever it holds. schema: says how long its header may be."""
    try:
        return _opened(path, schema, "np", lambda file: True)
    except CheckpointError:
        return False


def _opened(path: str | Path, schema: type[Header], framework: str, read: Callable[[Any], Found]) -> Found:
    """read(file) of an open safetensors file; whatever is wrong with the file becomes a CheckpointError."""
    try:
        with open_file(path) as file:
            if int.from_bytes(file.read(8), "little") > _longest_header(schema):
                raise CheckpointError(f"{path} is damaged or not a safetensors checkpoint (its header is too long)")
        with safe_open(path, framework=framework) as file:
            return read(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: torch failed to map the file
        raise CheckpointError(f"{path} is damaged or not a safetensors checkpoint ({one_line(error)})") from error


def _longest_header(schema: type[Document]) -> int:
    """In bytes: our JSON is a string in safetensors' own JSON, where a quote takes two bytes; the tensors follow it."""
    return 2 * schema.longest


def _serialized(tensors: Mapping[str, Tensor], header: Document) -> bytes:
    """The bytes of a safetensors file. Raises ValueError if `read_tensors` would refuse them."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ValueError(f"tensor {shown(name)} is {str(tensor.dtype).removeprefix('torch.')}, not one of {known}")
    data = save(stored, {METADATA_KEY: encode(header).decode()})
    if int.from_bytes(data[:8], "little") > _longest_header(type(header)):
        raise ValueError("its header would be too long")
    return data


def _serialized_network(network: nn.Module, about: Mapping[str, Any]) -> bytes:
    names = {network_class: name for name, network_class in NETWORKS.items()}
    if type(network) not in names:
        raise TypeError(f"only {', '.join(NETWORKS)} can be saved, not a {type(network).__name__}")
    try:
        header = CheckpointHeader(
            network=names[type(network)],
            arguments=NetworkArguments(**network.arguments),  # type: ignore[arg-type]
            versions=versions(),
            **about,
        )
        _declared(network)
        _check_numbers(network)
        return _serialized(network.state_dict(), header)
    except ValueError as error:
        raise CheckpointError(f"this network cannot be saved so that it loads again: {error}") from error


def _declared(network: nn.Module) -> Declared:
    """How a checkpoint declares the network's tensors. Raises ValueError if the file would be too large."""
    state = network.state_dict()
    if sum(tensor.nbytes for tensor in state.values()) > LARGEST_FILE - 2**23:
        raise ValueError(f"its weights take more than {LARGEST_FILE / 2**20:.0f} MiB")
    # The floats of a checkpoint are float32, whatever torch.set_default_dtype says where it is loaded.
    dtypes = {name: torch.float32 if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    return {name: (tuple(tensor.shape), DTYPES[dtypes[name]]) for name, tensor in state.items()}


def _check_numbers(network: nn.Module) -> None:
    """Raise ValueError if a weight or the logits of an image are not finite: a negative variance, say, or overflow."""
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {shown(name)} holds NaN or infinity")
    like = next(network.parameters())
    image = torch.linspace(0, 1, 3 * 32 * 32, dtype=like.dtype, device=like.device).reshape(1, 3, 32, 32)
    with torch.no_grad(), evaluation_mode(network):
        if not network(image).isfinite().all():
            raise ValueError("the network's logits are NaN or infinite")
