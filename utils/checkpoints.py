"""Checkpoints: one safetensors file each, so that nothing in a file of unknown origin is ever executed.

The state dict is stored as tensors, and what it takes to rebuild and judge the network as JSON in the header:

    {"network": "cnn", "arguments": {"width": 32, "num_classes": 10}, "dataset": "cifar10", "class_names": [...],
     "training": {...}, "epochs": 20, "precision": "float32", "validation_accuracy": 0.88, "versions": {...}}

`safetensors.torch.load_file` reads the tensors without this project.
"""

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from networks import NETWORKS
from utils.constants import LARGEST_WIDTH, UserError
from utils.files import open_file, write_atomically
from utils.formats import check_training, is_number, parse_json
from utils.quoting import one_line, shown

LARGEST_FILE = 2**28  # bytes; the widest network has 75 million


LARGEST_HEADER = 2**18  # bytes, which are parsed more than once; ours have some 5,000


# All that are written here, and how a header names them.
DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


# One key, because safetensors writes several in random order: the same training should give the same file.
METADATA_KEY = "checkpoint"


class CheckpointError(UserError):
    """The file is missing, truncated, damaged, or no checkpoint of this project; the message names it."""


def load_checkpoint(path, device="cpu"):
    """The network saved in `path`, in evaluation mode on `device`, ready to classify images in [0, 1].

    Raises CheckpointError if the file is missing, damaged or not one that `save_checkpoint` wrote, or the network of it
    makes of an image no finite logits.
    """
    metadata, declared = read_declared(path)
    metadata = _checked(path, metadata)
    network_class, arguments = NETWORKS[metadata["network"]], metadata["arguments"]
    with torch.device("meta"):  # shapes alone, so that nothing is allocated before the file has proved to fit
        network = network_class(**arguments)
    expected = network.state_dict()
    for name in expected.keys() | declared.keys():
        if name not in declared or name not in expected:
            raise CheckpointError(f"{path}: tensor {shown(name)} is {'missing' if name in expected else 'unknown'}")
        if declared[name] != (tuple(expected[name].shape), DTYPES[expected[name].dtype]):
            raise CheckpointError(f"{path}: tensor {shown(name)} does not fit a {metadata['network']} with {arguments}")
    _, tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {shown(name)} holds NaN or infinity")
    network.load_state_dict(tensors, assign=True)
    network = network.to(memory_format=torch.channels_last).eval()
    with torch.no_grad():  # a negative variance, weights that overflow
        if not network(torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).isfinite().all():
            raise CheckpointError(f"{path}: the network's logits are NaN or infinite")
    return network.to(device)


def read_metadata(path):
    """The JSON object of the header, as described at the top of this module. Raises CheckpointError."""
    return _checked(path, read_header(path))


def save_checkpoint(path, network, metadata):
    """Write network and metadata (the keys above but network, arguments and versions) to `path`, atomically."""
    names = {network_class: name for name, network_class in NETWORKS.items()}
    if type(network) not in names:
        raise TypeError(f"only {', '.join(NETWORKS)} can be saved, not a {type(network).__name__}")
    metadata = {"network": names[type(network)], "arguments": network.arguments, **metadata, "versions": versions()}
    write_tensors(path, network.state_dict(), metadata)


def file_digest(path):
    """SHA-256 of a checkpoint, in hexadecimal. Raises CheckpointError if it cannot be read, or can be none."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise CheckpointError(f"{path} is too large for a checkpoint")
            while block := file.read(2**20):  # not all at once, for who knows how large it is
                digest.update(block)
        return digest.hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def versions(*others):
    """Library versions to store with a result; torch's own string also names its CUDA build.

    others: packages that had a part in it besides; None stands for one that is not installed.
    """
    found: dict[str, str | None] = {"torch": torch.__version__}
    found |= {name: version(name) for name in ("torchvision", "numpy", "safetensors")}
    for name in others:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_tensors(path, tensors, metadata):
    """Write a dict of tensors and a JSON-serialisable dict to a safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(metadata)}))


def read_tensors(path, longest=LARGEST_HEADER):
    """The (metadata, tensors) that `write_tensors` wrote. Raises CheckpointError.

    Of a file that may be anyone's, `read_declared` tells first how large they are. longest: header, in bytes.
    """
    _, declared = read_declared(path, longest)
    for name, (_, dtype) in declared.items():
        if dtype not in DTYPES.values():  # some are such that not every torch knows them
            raise CheckpointError(f"{path}: tensor {shown(name)} is of a dtype that no checkpoint has")
    # Cloned, because what get_tensor returns is a view of the file, which could then not be replaced on Windows.
    tensors = lambda file: {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: E731, SIM118
    return _open(path, "pt", tensors, longest)


def read_declared(path, longest=LARGEST_HEADER):
    """The metadata and, by name, the (shape, dtype as in DTYPES' values) of each tensor. Raises CheckpointError.

    No tensor is read: a small file may declare terabytes, if most of it is a hole.
    """

    def declared(file):
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}

    return _open(path, "np", declared, longest)


def read_header(path):
    """The metadata that `write_tensors` wrote, without the tensors. Raises CheckpointError."""
    return _open(path, "np", lambda file: None)[0]


def _open(path, framework, read, longest=LARGEST_HEADER):
    """The metadata and read(file), whatever is wrong with the file a CheckpointError."""
    try:
        with open_file(path) as file:
            if int.from_bytes(file.read(8), "little") > longest:
                raise CheckpointError(f"{path} is damaged or not a safetensors checkpoint (its header is too long)")
        with safe_open(path, framework=framework) as file:
            metadata = parse_json((file.metadata() or {}).get(METADATA_KEY, "null"))
            if not isinstance(metadata, dict):
                raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this project")
            return metadata, read(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # the last from torch, as of a mapping
        raise CheckpointError(f"{path} is damaged or not a safetensors checkpoint ({one_line(error)})") from error


def _checked(path, metadata):
    """The metadata, once it is certain that a network can be built from it and its data set and classes named."""
    network, arguments = metadata.get("network"), metadata.get("arguments")
    if not isinstance(network, str) or network not in NETWORKS:
        raise CheckpointError(f"{path}: unknown network {shown(network)}")
    if not isinstance(arguments, dict) or set(arguments) != {"width", "num_classes"}:
        raise CheckpointError(f"{path}: arguments must be width and num_classes, not {shown(arguments)}")
    if not all(type(value) is int and 1 <= value <= LARGEST_WIDTH for value in arguments.values()):
        raise CheckpointError(f"{path}: width and num_classes must be in 1..{LARGEST_WIDTH}, not {shown(arguments)}")
    names = metadata.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names must be a list of strings")
    if len(names) != arguments["num_classes"] or not isinstance(metadata.get("dataset"), str):
        raise CheckpointError(f"{path}: dataset must be a string and class_names one name for each class")
    try:
        check_training(metadata.get("training"))
    except ValueError as error:
        raise CheckpointError(f"{path}: training is not what it should be ({one_line(error)})") from None
    for key, kind in (("epochs", int), ("precision", str), ("versions", dict)):
        if not isinstance(metadata.get(key), kind | None):
            raise CheckpointError(f"{path}: {key} must not be {shown(metadata[key])}")
    validated = metadata.get("validation_accuracy")
    if validated is not None and not is_number(validated, 0, 1):
        raise CheckpointError(f"{path}: validation_accuracy must be in 0..1, not {shown(validated)}")
    return metadata
