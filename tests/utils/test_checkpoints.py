"""Checkpoints: what is saved loads again, other files are refused in one line, and nothing in a file runs."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import time

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks import CNN, NETWORKS
from tests.helpers.project import ROOT
from utils.checkpoints import (
    DTYPES,
    LARGEST_FILE,
    CheckpointError,
    check_saveable,
    file_digest,
    load_checkpoint,
    read_header,
    read_metadata,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from utils.constants import LARGEST_CLASSES, LARGEST_WIDTH
from utils.files import write_atomically
from utils.formats import CheckpointHeader, Epoch, NetworkArguments, RunState, TrainingArguments
from utils.recipes import RECIPES

TRAINING = TrainingArguments(
    **msgspec.structs.asdict(RECIPES["short"]), network="cnn", width=4, dataset="digits", examples=10, seed=0
)
METADATA = {
    "dataset": "digits",
    "class_names": list("0123456789"),
    "training": TRAINING,
    "epochs": 3,
    "validation_accuracy": 0.5,
}


def header_of(path):
    """The header as a dict, to be changed and written by `rewrite`."""
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["checkpoint"])


def rewrite(path, tensors, header):
    """Write a checkpoint as somebody else could, whatever its header."""
    save_file(tensors, path, None if header is None else {"checkpoint": json.dumps(header)})


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = CNN(width=4)
    save_checkpoint(tmp_path / "cnn.safetensors", network, METADATA)
    return tmp_path / "cnn.safetensors", network


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    torch.manual_seed(0)
    network = NETWORKS[name](width=4).to(memory_format=torch.channels_last)
    network(torch.rand(8, 3, 32, 32))  # moves the batch norm statistics
    save_checkpoint(tmp_path / "a.safetensors", network, METADATA)
    random_state = torch.get_rng_state()
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert type(loaded) is type(network)
    assert not loaded.training
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(loaded(images), network.eval()(images))
    header = read_metadata(tmp_path / "a.safetensors")
    assert {field: getattr(header, field) for field in METADATA} == METADATA
    assert (header.network, header.arguments) == (name, NetworkArguments(width=4, num_classes=10))
    assert header.versions["torch"] == torch.__version__


def test_safetensors_reads_it_without_this_project(saved):
    path, network = saved
    tensors = load_file(path)
    assert tensors.keys() == network.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in network.state_dict().items())


def test_same_network_same_file(saved, tmp_path):
    path, network = saved
    save_checkpoint(tmp_path / "again.safetensors", network, METADATA)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE_FOLDER"],)


def test_hostile_pickle_under_the_right_name_does_not_run(tmp_path, monkeypatch):
    folder, path = tmp_path / "it-ran", tmp_path / "cnn.safetensors"
    monkeypatch.setenv("HOSTILE_FOLDER", str(folder))
    for content in (pickle.dumps(Hostile()), None):
        if content is None:
            torch.save({"state_dict": Hostile()}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cnn\.safetensors"):
            load_checkpoint(path)
        assert not folder.exists()
    pickle.loads(pickle.dumps(Hostile()))  # the pickle is a live one
    assert folder.exists()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 1000, -1000, -1])
def test_truncated_file_is_named(saved, size):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:size])
    for read in (load_checkpoint, read_metadata):
        with pytest.raises(CheckpointError, match=r"cnn\.safetensors"):
            read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="damaged or not"):
        load_checkpoint(tmp_path)


def _tensors(**changes):
    return lambda tensors, metadata: (tensors | changes, metadata)


def _metadata(**changes):
    return lambda tensors, metadata: (tensors, metadata | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_metadata(training=[1]), "training"),
        (_metadata(training={"seed": 0}), "training"),
        (_metadata(epochs="3"), "epochs"),
        (_metadata(precision=32), "precision"),
        (_metadata(versions="1"), "versions"),
        (_metadata(validation_accuracy="0.5"), "validation_accuracy"),
        (_metadata(validation_accuracy=1.5), "validation_accuracy"),
        (_metadata(validation_accuracy=True), "validation_accuracy"),
        (_metadata(format=2), "newer than 1"),
        (_metadata(more=1), "unknown field `more`"),
        (lambda tensors, metadata: (tensors, None), "not a checkpoint of this project"),
        (lambda tensors, metadata: (tensors, [1]), "its header is not valid"),
        (_metadata(network="resnet"), "unknown network"),
        (_metadata(network=["cnn"]), "network: Expected `str`"),
        (_metadata(network="cnn-lstm"), "tensor"),
        (_metadata(arguments=None), "arguments"),
        (_metadata(arguments={"width": 4, "num_classes": 10, "mean": 0}), "arguments"),
        (_metadata(arguments={"width": 10**9, "num_classes": 10}), "width"),
        (_metadata(arguments={"width": True, "num_classes": 10}), "width"),
        (_metadata(arguments={"width": 4.0, "num_classes": 10}), "width"),
        (_metadata(arguments={"width": 0, "num_classes": 10}), "width"),
        (_metadata(dataset=None), "dataset"),
        (_metadata(class_names=None), "class_names"),
        (_metadata(class_names=["a", "b"]), "class_names"),
        (_metadata(class_names=[0] * 10), "class_names"),
        (_metadata(arguments={"width": 5, "num_classes": 10}), "does not fit"),
        (lambda tensors, metadata: ({**tensors, "more": torch.zeros(1)}, metadata), "'more' is unknown"),
        (lambda tensors, metadata: ({"normalize.mean": tensors["normalize.mean"]}, metadata), "is missing"),
        (_tensors(**{"classifier.bias": torch.zeros(11)}), "does not fit"),
        (_tensors(**{"classifier.bias": torch.zeros(10).double()}), "does not fit"),
        (_tensors(**{"classifier.bias": torch.full((10,), float("nan"))}), "NaN"),
        (_tensors(**{"classifier.bias": torch.full((10,), float("inf"))}), "NaN or infinity"),
    ],
)
def test_foreign_and_spoilt_files_are_refused(saved, change, message):
    path, _ = saved
    rewrite(path, *change(load_file(path), header_of(path)))
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000, "\ud7ff"])
def test_metadata_that_is_no_json_object_is_refused(saved, text):
    path, _ = saved
    save_file(load_file(path), path, {"checkpoint": text})
    with pytest.raises(CheckpointError, match=r"cnn\.safetensors"):
        load_checkpoint(path)


def test_metadata_is_readable_in_the_header(saved):
    with safe_open(saved[0], framework="pt") as file:
        assert json.loads(file.metadata()["checkpoint"])["dataset"] == "digits"


def test_only_the_projects_networks_can_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"cnn-lstm.*not a Linear"):
        save_checkpoint(tmp_path / "a.safetensors", torch.nn.Linear(1, 1), METADATA)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- what is saved can be loaded ----


def classes(names):
    return {"dataset": "digits", "class_names": names}


@pytest.mark.parametrize(
    ("count", "name"),
    [(1, "{}"), (257, "class {}"), (LARGEST_CLASSES, "class {}"), (10, "名前" * 100), (10, '"' * 200)],
)
def test_many_classes_and_odd_names_are_saved_and_loaded(count, name, tmp_path):
    names = tuple(name.format(i) for i in range(count))
    network = CNN(4, count)
    check_saveable(network, classes(names))
    save_checkpoint(tmp_path / "a", network, classes(names))
    assert load_checkpoint(tmp_path / "a").arguments["num_classes"] == count
    assert read_metadata(tmp_path / "a").class_names == list(names)


def with_weight(value):
    network = CNN(4)
    torch.nn.init.constant_(network.classifier.weight, value)
    return network


@pytest.mark.parametrize(
    ("network", "about", "message"),
    [
        (lambda: CNN(4, 3), classes([0, 1, 2]), r"class_names\[0\]: Expected `str`, got `int`"),
        (lambda: CNN(4, 3), classes(["a", "b"]), "class_names has 2 names for 3 classes"),
        (lambda: CNN(4, 1), classes(["n" * 201]), "class_names"),
        (lambda: CNN(4, LARGEST_CLASSES), classes(["é" * 150] * LARGEST_CLASSES), "longer than 1,048,576 bytes"),
        (lambda: CNN(4, LARGEST_CLASSES + 1), classes(["a"] * (LARGEST_CLASSES + 1)), "num_classes: Expected"),
        (lambda: CNN(LARGEST_WIDTH, LARGEST_CLASSES), classes(["a"] * LARGEST_CLASSES), "more than 256 MiB"),
        (lambda: CNN(LARGEST_WIDTH + 1), METADATA, "width: Expected"),
        (lambda: CNN(4), {**METADATA, "dataset": "d" * 201}, "dataset: Expected"),
        (lambda: CNN(4), {**METADATA, "validation_accuracy": float("nan")}, "validation_accuracy: Expected"),
        (lambda: CNN(4), {**METADATA, "training": {"seed": 0}}, "training: Object missing required field"),
        (lambda: CNN(4).double(), METADATA, r"'normalize\.mean' is float64, not one of float32"),
        (lambda: CNN(4).bfloat16(), METADATA, "is bfloat16"),
        (lambda: with_weight(float("nan")), METADATA, r"'classifier\.weight' holds NaN or infinity"),
        (lambda: with_weight(3e38), METADATA, "logits are NaN or infinite"),
    ],
)
def test_what_would_not_load_is_refused_before_it_is_written(network, about, message, tmp_path):
    (tmp_path / "a").write_bytes(b"earlier")
    network = network()
    for save in (check_saveable, lambda *arguments: save_checkpoint(tmp_path / "a", *arguments)):
        with pytest.raises(CheckpointError, match=f"cannot be saved.*{message}") as error:
            save(network, about)
        assert str(error.value).isprintable()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"earlier")]


def test_default_dtype_changes_neither_what_is_saved_nor_what_loads(saved):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(CheckpointError, match="float64"):
            check_saveable(CNN(4), METADATA)
        loaded = load_checkpoint(saved[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(loaded.classifier.weight, saved[1].classifier.weight)


EPOCH = Epoch(
    epoch=123_456,
    loss=-0.123456789012345678,
    validation_accuracy=1 / 3,
    precision="bfloat16",
    seconds=12345.67,
    images_per_second=10**9,
    robust_accuracy=1 / 3,
    choosing_accuracy=1 / 3,
    single_step_accuracy=1 / 3,
)


@pytest.mark.parametrize("epochs", [1, 1600, 5000])
def test_state_of_a_long_training_can_be_read(epochs, tmp_path):
    state = RunState(arguments=TRAINING, processes=2, epochs=[EPOCH] * epochs)
    tensors = {"a": torch.arange(3.0)}
    write_tensors(tmp_path / "a", tensors, state)
    assert read_header(tmp_path / "a", RunState) == state
    found, read = read_tensors(tmp_path / "a", RunState)
    assert found == state
    assert torch.equal(read["a"], tensors["a"])


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.sampled_from(list(DTYPES)), max_size=4))
@settings(max_examples=30, deadline=None)
def test_tensors_are_read_as_they_were_written(tmp_path_factory, dtypes):
    tensors = {name: torch.arange(7).to(dtype) for name, dtype in dtypes.items() if name != "__metadata__"}
    path, header = tmp_path_factory.mktemp("tensors") / "a", RunState(arguments=TRAINING, epochs=[])
    write_tensors(path, tensors, header)
    found, read = read_tensors(path, RunState)
    assert found == header
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_would_not_be_read_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="'a' is complex64"):
        write_tensors(tmp_path / "a", {"a": torch.zeros(1, dtype=torch.complex64)}, read_metadata(SHIPPED))
    names = {f"{'n' * 1000}{i}": torch.zeros(0) for i in range(2500)}
    with pytest.raises(ValueError, match="its header would be too long"):
        write_tensors(tmp_path / "a", names, read_metadata(SHIPPED))
    assert list(tmp_path.iterdir()) == []


SHIPPED = ROOT / "models" / "cnn.safetensors"


# ---- files of strangers ----


def test_hole_of_terabytes_is_not_read(saved):
    """A header of a few bytes that fits the file's length, nearly all of which is nowhere on the disk."""
    path, _ = saved
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    length = len(data) - 8 - size
    header["hole"] = {"dtype": "U8", "shape": [2**36 - length], "data_offsets": [length, 2**36]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    os.truncate(path, 8 + len(text) + 2**36)
    with pytest.raises(CheckpointError, match="'hole' is unknown"):
        load_checkpoint(path)


LARGEST = """
import resource, sys, time
from utils.checkpoints import CheckpointError, load_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_checkpoint(sys.argv[1])
for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        print(error, peak() - before, time.process_time() - start, sep=";")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="memory is measured as Unix does")
@pytest.mark.parametrize("network", NETWORKS)
def test_largest_networks_take_neither_long_nor_much_memory(network, saved, tmp_path):
    """The header is valid and the weights are a hole: all that a file of a few bytes can ask for."""
    paths = []
    for width, count in ((LARGEST_WIDTH, 10), (LARGEST_WIDTH, 3000), (64, LARGEST_CLASSES)):
        with torch.device("meta"):
            tensors = NETWORKS[network](width, count).state_dict()
        arguments = {"width": width, "num_classes": count}
        metadata = {"network": network, "arguments": arguments, "dataset": "digits", "class_names": ["a"] * count}
        header, end = {"__metadata__": {"checkpoint": json.dumps(metadata)}}, 0
        for name, tensor in tensors.items():
            dtype, begin, end = DTYPES[tensor.dtype], end, end + tensor.nbytes
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        paths.append(tmp_path / f"{width}-{count}.safetensors")
        paths[-1].write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(paths[-1], 8 + len(text) + end)
        assert end < LARGEST_FILE
    command = [sys.executable, "-c", LARGEST, saved[0], *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == len(paths)
    for error, kibibytes, seconds in (line.split(";") for line in lines):
        assert "logits are NaN or infinite" in error  # because the standard deviations are 0
        assert int(kibibytes) < 2**20
        assert float(seconds) < 5  # 1.5 on an idle machine


@pytest.mark.parametrize(
    ("tensor", "value"), [("running_var", -1.0), ("std", 0.0), ("weight", 3e38), ("weight", float("nan"))]
)
def test_numbers_that_make_no_network_are_refused(tensor, value, saved):
    state = load_file(saved[0])
    name = next(name for name in state if name.endswith(tensor))
    rewrite(saved[0], {**state, name: torch.full_like(state[name], value)}, header_of(saved[0]))
    with pytest.raises(CheckpointError, match="NaN or infinit"):
        load_checkpoint(saved[0])


@pytest.mark.parametrize("junk", [[{}] * 300_000, [[]] * 300_000, {str(i): 0 for i in range(95_000)}])
def test_a_header_as_long_as_may_be_takes_a_few_seconds(saved, junk):
    text = json.dumps({**header_of(saved[0]), "versions": junk}, separators=(",", ":"))
    assert CheckpointHeader.longest * 0.8 < len(text) <= CheckpointHeader.longest
    save_file(load_file(saved[0]), saved[0], {"checkpoint": text})
    start = time.process_time()
    with pytest.raises(CheckpointError, match="versions"):
        load_checkpoint(saved[0])
    assert time.process_time() - start < 5  # 1.3 on an idle machine; the count of coverage takes as long again


def test_a_longer_header_is_not_parsed(saved):
    path, _ = saved
    save_file(load_file(path), path, {"checkpoint": json.dumps(header_of(path)) + " " * CheckpointHeader.longest})
    with pytest.raises(CheckpointError, match="longer than 1,048,576 bytes"):
        read_metadata(path)
    path.write_bytes(struct.pack("<Q", 2 * CheckpointHeader.longest + 1) + b" " * 100)
    with pytest.raises(CheckpointError, match="its header is too long"):
        read_metadata(path)


def test_unknown_dtype_is_refused_before_torch_meets_it(saved):
    path, _ = saved
    rewrite(path, {**load_file(path), "classifier.bias": torch.zeros(10, dtype=torch.complex64)}, header_of(path))
    with pytest.raises(CheckpointError, match=r"'classifier\.bias' is of a dtype that no checkpoint has"):
        read_tensors(path, CheckpointHeader)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(path)


def test_digest_of_a_hole_is_not_taken(saved):
    os.truncate(saved[0], 2**36)
    with pytest.raises(CheckpointError, match="too large"):
        file_digest(saved[0])


def test_digest_of_a_file_larger_than_a_block(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert file_digest(tmp_path / "a") == hashlib.sha256(data).hexdigest()
