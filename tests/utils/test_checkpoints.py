"""Checkpoints survive the round trip; whatever else bears their name is refused, and nothing in it runs."""

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from networks import CNN, NETWORKS
from utils.checkpoints import CheckpointError, load_checkpoint, read_metadata, save_checkpoint
from utils.files import write_atomically

METADATA = {
    "dataset": "digits",
    "class_names": list("0123456789"),
    "training": {"seed": 0},
    "epochs": 3,
    "validation_accuracy": 0.5,
}


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
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert metadata.items() >= METADATA.items()
    assert (metadata["network"], metadata["arguments"]) == (name, {"width": 4, "num_classes": 10})
    assert metadata["versions"]["torch"] == torch.__version__


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
        (lambda tensors, metadata: (tensors, None), "not a checkpoint of this project"),
        (lambda tensors, metadata: (tensors, [1]), "not a checkpoint of this project"),
        (_metadata(network="resnet"), "unknown network"),
        (_metadata(network=["cnn"]), "unknown network"),
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
    tensors, metadata = change(load_file(path), read_metadata(path))
    save_file(tensors, path, None if metadata is None else {"checkpoint": json.dumps(metadata)})
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
