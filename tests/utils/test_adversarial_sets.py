"""Adversarial sets: equal to fgsm, kept on disk, never used when stale or damaged; and the data set made of them."""

import json
import shutil
from dataclasses import replace

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import utils.adversarial_sets
from attacks import fgsm, step
from utils.adversarial_sets import AugmentedSplit, adversarial_set
from utils.checkpoints import CheckpointError, load_checkpoint, read_tensors, save_checkpoint, write_tensors
from utils.constants import UserError
from utils.data import batches, flip_and_shift, training_batches
from utils.evaluation import ATTACK_VERSIONS
from utils.formats import SetManifest
from utils.recipes import RECIPES
from utils.training import train


@pytest.fixture
def source(trained, tmp_path):
    return shutil.copy(trained("cnn"), tmp_path / "source.safetensors")


@pytest.fixture
def computed(monkeypatch):
    """The number of batches whose direction has been computed, as a list that grows."""
    calls, direction = [], utils.adversarial_sets.fgsm_direction
    monkeypatch.setattr(
        utils.adversarial_sets, "fgsm_direction", lambda *arguments: calls.append(1) or direction(*arguments)
    )
    return calls


@pytest.mark.parametrize("name", ["cnn", "cnn-lstm"])
@pytest.mark.parametrize("batch_size", [7, 250])
@pytest.mark.parametrize("epsilon", [0.005, 8 / 255, 0.2, 1])
def test_any_epsilon_equals_fgsm_on_the_same_batches(name, batch_size, epsilon, digits, trained, tmp_path):
    split = digits["test"].first(20)
    for _ in range(2):  # as computed, then as read from the disk
        direction = adversarial_set(trained(name), split, folder=tmp_path, batch_size=batch_size).direction
        assert direction.dtype == torch.int8
        done = 0
        for images, labels in batches(split, batch_size):
            expected = fgsm(load_checkpoint(trained(name)), images, labels, epsilon=epsilon)
            part = direction[done : done + len(labels)]
            assert torch.equal(step(images, part.to(images.dtype), epsilon), expected)
            done += len(labels)


def test_it_is_computed_once_and_takes_two_bits_a_value(digits, source, tmp_path, computed):
    first = adversarial_set(source, digits["test"], folder=tmp_path / "deep" / "sets")
    batches_of_one_pass = len(computed)
    again = adversarial_set(source, digits["test"], folder=tmp_path / "deep" / "sets")
    assert len(computed) == batches_of_one_pass == 2  # 300 images in batches of 250
    assert torch.equal(first.direction, again.direction)
    assert first.direction.unique().tolist() in ([-1, 1], [-1, 0, 1])
    assert first.manifest == again.manifest
    (file,) = (tmp_path / "deep" / "sets").iterdir()
    assert file.stat().st_size < 300 * 3072 / 4 + 2000


def test_zero_gradients_stay_zero(digits, source, tmp_path, monkeypatch):
    signs = torch.randint(-1, 2, digits["test"].images[:5].shape)
    monkeypatch.setattr(utils.adversarial_sets, "fgsm_direction", lambda *_: signs.float())
    split = digits["test"].first(5)
    for _ in range(2):
        assert torch.equal(adversarial_set(source, split, folder=tmp_path).direction, signs.to(torch.int8))


def test_manifest_says_what_it_was_made_from(digits, source, tmp_path):
    manifest = adversarial_set(source, digits["test"], folder=tmp_path, batch_size=100).manifest
    assert {key: getattr(manifest, key) for key in ("attack", "dataset", "split", "batch_size")} == {
        "attack": "fgsm",
        "dataset": "digits",
        "split": "test",
        "batch_size": 100,
    }
    assert manifest.split_sha256 == digits["test"].digest() != digits["test"].first(299).digest()
    assert manifest.versions["torch"] == torch.__version__
    assert len(manifest.source_sha256) == 64


def other_source(source, split, path, monkeypatch):
    network = load_checkpoint(source)
    with torch.no_grad():
        network.classifier.weight.neg_()
    metadata = {"dataset": "digits", "class_names": list(split.class_names)}
    save_checkpoint(source, network, metadata)
    return {}


def other_images(source, split, path, monkeypatch):
    return {"split": replace(split, images=255 - split.images)}


def other_batch_size(source, split, path, monkeypatch):
    return {"batch_size": 100}


def other_versions(source, split, path, monkeypatch):
    monkeypatch.setattr(utils.adversarial_sets, "versions", lambda: {"torch": "0.1"})
    return {}


def other_version_of_the_attack(source, split, path, monkeypatch):
    monkeypatch.setitem(ATTACK_VERSIONS, "fgsm", ATTACK_VERSIONS["fgsm"] + 1)
    return {}


def flipped_bit(source, split, path, monkeypatch):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    return {}


def cut_off(source, split, path, monkeypatch):
    path.write_bytes(path.read_bytes()[:-1])
    return {}


def emptied(source, split, path, monkeypatch):
    path.write_bytes(b"")
    return {}


def other_tensors(source, split, path, monkeypatch):
    manifest, planes = read_tensors(path, SetManifest)
    write_tensors(path, {"positive": planes["positive"]}, manifest)
    return {}


def other_shape(source, split, path, monkeypatch):
    manifest, planes = read_tensors(path, SetManifest)
    write_tensors(path, {name: plane[:-1] for name, plane in planes.items()}, manifest)
    return {}


def no_time(source, split, path, monkeypatch):
    with safe_open(path, framework="np") as file:
        manifest = json.loads(file.metadata()["checkpoint"])
    save_file(load_file(path), path, {"checkpoint": json.dumps({**manifest, "seconds": None})})
    return {}


def test_source_that_is_replaced_while_it_is_read_makes_no_set(digits, source, trained, tmp_path, monkeypatch):
    def replaced(path, device):
        network = load_checkpoint(path, device)
        shutil.copy(trained("cnn-lstm"), source)
        return network

    monkeypatch.setattr(utils.adversarial_sets, "load_checkpoint", replaced)
    with pytest.raises(UserError, match=r"source\.safetensors was replaced"):
        adversarial_set(source, digits["test"], folder=tmp_path / "sets")
    assert not list((tmp_path / "sets").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_time, "seconds: Expected `float`"),
        (other_source, "another source"),
        (other_images, "another split"),
        (other_batch_size, "another batch size"),
        (other_versions, "another versions"),
        (other_version_of_the_attack, "another attack version"),
        (flipped_bit, "damaged"),
        (cut_off, "damaged"),
        (emptied, "damaged"),
        (other_tensors, "damaged"),
        (other_shape, "damaged"),
    ],
)
def test_stale_or_damaged_set_is_named_and_built_again(
    change, reason, digits, source, tmp_path, monkeypatch, capsys, computed
):
    folder, split = tmp_path / "sets", digits["test"]
    adversarial_set(source, split, folder=folder)
    (path,) = folder.iterdir()
    changed = {"split": split, **change(source, split, path, monkeypatch)}
    computed.clear()
    rebuilt = adversarial_set(source, folder=folder, **changed)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(path) in message
    assert reason in message
    assert "building it again" in message
    assert computed
    fresh = adversarial_set(source, folder=tmp_path / "fresh", **changed)
    assert torch.equal(rebuilt.direction, fresh.direction)
    computed.clear()
    adversarial_set(source, folder=folder, **changed)
    assert (computed, capsys.readouterr().err) == ([], "")


def test_interrupted_building_leaves_nothing(digits, source, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.adversarial_sets, "fgsm_direction", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adversarial_set(source, digits["test"], folder=tmp_path / "sets")
    assert not (tmp_path / "sets").exists()


def test_sources_whose_names_differ_after_a_dot_have_a_file_each(digits, trained, tmp_path):
    for name in ("net-0.2", "net-0.3", "net-0.2.safetensors"):
        shutil.copy(trained("cnn"), tmp_path / name)
        adversarial_set(tmp_path / name, digits["test"].first(5), folder=tmp_path / "sets")
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == [
        "digits-test-fgsm-net-0.2.safetensors",
        "digits-test-fgsm-net-0.3.safetensors",
    ]


@pytest.mark.parametrize("kind", ["network", "folder"])
def test_what_is_no_set_is_not_replaced(kind, digits, source, tmp_path, computed):
    path = tmp_path / "sets" / "digits-test-fgsm-source.safetensors"
    path.parent.mkdir()
    shutil.copy(source, path) if kind == "network" else path.mkdir()
    with pytest.raises(CheckpointError, match="is not an adversarial set, and one would replace it: move it"):
        adversarial_set(source, digits["test"], folder=path.parent)
    assert not computed
    assert path.is_dir() if kind == "folder" else path.read_bytes() == source.read_bytes()


def test_source_of_other_data_is_refused(digits, source, tmp_path):
    with pytest.raises(CheckpointError, match=r"source\.safetensors was trained on 'digits', not on cifar10"):
        adversarial_set(source, replace(digits["test"], dataset="cifar10"), folder=tmp_path / "sets")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        adversarial_set(tmp_path / "none", digits["test"], folder=tmp_path / "sets")


def augmented(split, source, folder, epsilon=0.2):
    signs = adversarial_set(source, split, folder=folder)
    return AugmentedSplit(split, signs.direction, epsilon, signs.manifest.source_sha256)


def test_augmented_split_is_the_clean_images_then_their_counterparts(digits, source, tmp_path):
    split = digits["test"].first(40)
    both = augmented(split, source, tmp_path / "sets")
    images, labels = both.take(torch.arange(len(both)))
    assert len(both) == 80
    assert torch.equal(images[:40], split.images / 255)
    assert torch.equal(images[40:], fgsm(load_checkpoint(source), split.images / 255, split.labels, epsilon=0.2))
    assert torch.equal(labels, split.labels.repeat(2))
    assert both.channel_statistics() == split.channel_statistics()
    with pytest.raises(ValueError, match="did you mean 8/255"):
        replace(both, epsilon=8)


def test_images_are_perturbed_first_and_then_flipped_and_shifted(digits, source, tmp_path):
    """The perturbation moves with its image: each batch is the augmented fgsm of the plain image, and of no other."""
    split = digits["test"].first(40)
    both = augmented(split, source, tmp_path / "sets")
    plain = torch.cat(
        [split.images / 255, fgsm(load_checkpoint(source), split.images / 255, split.labels, epsilon=0.2)]
    )
    # The same random numbers as those that training_batches draws.
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(80, generator=generator)
    flipped = torch.rand(80, generator=generator) < 0.5
    shifts = torch.randint(-2, 3, (80, 2), generator=generator)
    expected = flip_and_shift(plain[order], flipped, shifts)

    generator = torch.Generator().manual_seed(3)
    found = torch.cat([images for images, _ in training_batches(both, 16, generator, flip=True, shift=2)])
    assert torch.equal(found, expected)
    # It could not be told from adding the signs to a flipped image if no image were flipped or shifted.
    signs = torch.cat([torch.zeros_like(both.direction), both.direction])[order].float()
    assert not torch.equal(
        step(flip_and_shift((split.images / 255).repeat(2, 1, 1, 1)[order], flipped, shifts), signs, 0.2), found
    )


def test_training_on_it_is_recorded_and_resumed_bit_for_bit(digits, source, tmp_path, monkeypatch):
    both = augmented(digits["train"].first(200), source, tmp_path / "sets")
    recipe = msgspec.structs.replace(RECIPES["one-cycle"], epochs=2)
    arguments = {"recipe": recipe, "width": 4, "quiet": True}
    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    train("cnn", both, digits["validation"], output=whole, **arguments)
    first = json.loads(whole.with_suffix(".jsonl").read_text().splitlines()[0])
    assert first["examples"] == 400
    assert first["defense"] == {
        "name": "fgsm-augment",
        "epsilon": 0.2,
        "source_sha256": utils.adversarial_sets.file_digest(source),
    }

    save = utils.runs.PartialRun.save

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.runs.PartialRun, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("cnn", both, digits["validation"], output=halves, **arguments)
    monkeypatch.undo()
    train("cnn", both, digits["validation"], output=halves, resume=True, **arguments)
    assert halves.read_bytes() == whole.read_bytes()
