"""Splits, batches and augmentation, which is compared with a slow reference."""

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from tests.helpers.hostile import Hostile
from utils.data import (
    DataError,
    Split,
    batches,
    flip_and_shift,
    load_split,
    scale_contrast,
    training_batches,
    unpickled,
)

# ---- splits ----


def test_digits_splits_are_stratified_disjoint_and_complete(digits):
    assert [len(digits[name]) for name in ("train", "validation", "test")] == [1197, 300, 300]
    for split in digits.values():
        counts = torch.bincount(split.labels)
        assert counts.max() - counts.min() <= len(split) * 0.01
        assert (split.images.dtype, split.images.shape[1:]) == (torch.uint8, (3, 32, 32))
        assert split.labels.dtype == torch.int64
        assert split.class_names == tuple("0123456789")
    images = torch.cat([split.images for split in digits.values()])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images) == len(load_digits().target)


def test_digits_are_the_scans_enlarged_four_times(digits):
    scans = torch.from_numpy(load_digits().images)[:, None]
    enlarged = (F.interpolate(scans, scale_factor=4, mode="bilinear") * 255 / 16).round().to(torch.uint8)
    known = {image.numpy().tobytes(): label for image, label in zip(enlarged, load_digits().target, strict=True)}
    for image, label in zip(digits["test"].images, digits["test"].labels, strict=True):
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])
        assert known[image[:1].numpy().tobytes()] == label


def test_digits_are_split_alike_every_time(digits):
    digest = {name: hashlib.sha256(split.images.numpy().tobytes()).hexdigest()[:16] for name, split in digits.items()}
    assert digest == {"train": "fa04c968904d6ea4", "validation": "1924d796ebe246e1", "test": "715eacabcae3a913"}


def test_channel_statistics_are_exact(digits):
    mean, std = digits["test"].channel_statistics()
    pixels = digits["test"].images.double().div(255).transpose(0, 1).flatten(1)
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(1, unbiased=False), rtol=1e-12)


@pytest.mark.parametrize(("dataset", "split"), [("mnist", "train"), ("digits", "dev")])
def test_unknown_data_sets_and_splits_are_refused(dataset, split):
    with pytest.raises(ValueError, match="must be one of"):
        load_split(dataset, split)


def test_missing_cifar10_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_network)
    with pytest.raises(DataError) as error:
        load_split("cifar10", "train", tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(tmp_path / "cifar-10-batches-py"), "no network", "--data-dir", "--dataset digits"):
        assert part in message


def test_half_a_download_is_fetched_again_and_not_opened(tmp_path, monkeypatch):
    """An interrupted download leaves part of an archive."""
    asked = []

    def no_network(request, *_, **__):
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b and then it was cut off")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("tarfile.open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(DataError, match="could not be downloaded"):
        load_split("cifar10", "train", tmp_path)
    assert asked[0].endswith("cifar-10-python.tar.gz")


@pytest.mark.slow
def test_download_starts_again_after_half_of_one(cifar10_dir, tmp_path, monkeypatch):
    """The archive here holds the same files as the published one, but is not compressed."""
    from torchvision.datasets import CIFAR10

    archive = tmp_path / "whole.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=0) as file:
        file.add(cifar10_dir / CIFAR10.base_folder, CIFAR10.base_folder)

    class Response(io.FileIO):
        length, url = archive.stat().st_size, None

    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / CIFAR10.filename).write_bytes(archive.read_bytes()[:1_000_000])
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(archive))
    digests = [load_split("cifar10", "validation", folder).digest() for folder in (data_dir, cifar10_dir)]
    assert digests[0] == digests[1]


def test_data_dir_comes_from_the_environment(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"not CIFAR-10")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="data_batch_2 is damaged"):
        load_split("cifar10", "train")


@pytest.mark.parametrize("name", ["data_batch_5", "batches.meta"])
def test_missing_cifar10_file_is_named(cifar10_dir, tmp_path, name):
    link_all_but(name, cifar10_dir, tmp_path)
    with pytest.raises(DataError, match=rf"{name} is missing"):
        load_split("cifar10", "test", tmp_path)


def link_all_but(name, data_dir, copy):
    (copy / "cifar-10-batches-py").mkdir()
    for file in (data_dir / "cifar-10-batches-py").iterdir():
        if file.name != name:
            (copy / "cifar-10-batches-py" / file.name).symlink_to(file.resolve())


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:100] + b"?" + data[101:]])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar10_file_is_named(cifar10_dir, tmp_path, name, damage):
    link_all_but(name, cifar10_dir, tmp_path)
    intact = (cifar10_dir / "cifar-10-batches-py" / name).read_bytes()
    (tmp_path / "cifar-10-batches-py" / name).write_bytes(damage(intact))
    with pytest.raises(DataError, match=name) as error:
        load_split("cifar10", "train", tmp_path)
    assert "\n" not in str(error.value)


def test_cifar10_splits(cifar10_dir):
    from torchvision.datasets import CIFAR10

    published = {train: CIFAR10(cifar10_dir, train=train) for train in (True, False)}
    expected = {
        "train": (published[True].data[:45_000], published[True].targets[:45_000]),
        "validation": (published[True].data[45_000:], published[True].targets[45_000:]),
        "test": (published[False].data, published[False].targets),
    }
    for name, (images, labels) in expected.items():
        split = load_split("cifar10", name, cifar10_dir)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), images)
        assert split.labels.tolist() == labels
        assert split.class_names[0] == "airplane"


def test_a_file_that_is_replaced_after_its_checksum_is_not_executed(cifar10_dir, tmp_path, monkeypatch):
    """The bytes whose checksum fits are those that are parsed."""
    link_all_but("test_batch", cifar10_dir, tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    intact, md5 = (cifar10_dir / "cifar-10-batches-py" / "test_batch").read_bytes(), hashlib.md5
    path.write_bytes(intact)

    def replacing(data):
        if data == intact:
            path.write_bytes(pickle.dumps(Hostile(), 2))
        return md5(data)

    monkeypatch.setattr(hashlib, "md5", replacing)
    assert load_split("cifar10", "test", tmp_path).digest() == load_split("cifar10", "test", cifar10_dir).digest()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("hostile", [Hostile(), {"data": os.system}, {"data": np.load}, {"data": np.ones(1).sum}])
def test_an_unpickler_of_arrays_finds_nothing_else(hostile, protocol):
    with pytest.raises(ValueError, match="could execute code"):
        unpickled(pickle.dumps(hostile, protocol))


@pytest.mark.parametrize("protocol", [3, 4])
def test_an_unpickler_of_arrays_reads_them(protocol):
    assert unpickled(pickle.dumps({"data": np.arange(3)}, protocol))["data"].tolist() == [0, 1, 2]


def test_a_pipe_in_place_of_a_batch_is_refused_at_once(cifar10_dir, tmp_path):
    link_all_but("data_batch_3", cifar10_dir, tmp_path)
    os.mkfifo(tmp_path / "cifar-10-batches-py" / "data_batch_3")
    with pytest.raises(DataError, match="data_batch_3"):
        load_split("cifar10", "train", tmp_path)
    os.mkfifo(tmp_path / "cifar-10-python.tar.gz")
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    with pytest.raises(DataError, match="it is not a file"):
        load_split("cifar10", "train", tmp_path)


# ---- batches and augmentation ----


def random_split(count=50, size=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split("cifar10", "train", images, torch.arange(count), tuple(map(str, range(count))))


def test_batches_are_in_order_complete_and_in_pixel_units():
    split = random_split()
    images, labels = map(torch.cat, zip(*batches(split, 16), strict=True))
    assert torch.equal(labels, split.labels)
    assert torch.equal(images, split.images / 255)
    assert images.dtype == torch.float32


def test_every_image_comes_once_an_epoch_and_the_order_changes():
    split, generator = random_split(), torch.Generator().manual_seed(0)
    epochs = [
        torch.cat([labels for _, labels in training_batches(split, 16, generator, flip=True, shift=2)])
        for _ in range(2)
    ]
    assert all(torch.equal(order.sort().values, split.labels) for order in epochs)
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0], split.labels)


def test_same_seed_same_batches():
    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([images for images, _ in training_batches(random_split(), 16, generator, flip=True, shift=2)])

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))


def test_batches_without_augmentation_are_the_images():
    split, generator = random_split(), torch.Generator().manual_seed(0)
    for images, labels in training_batches(split, 16, generator, flip=False, shift=0):
        assert torch.equal(images, split.images[labels] / 255)


def slow_flip_and_shift(image, flipped, down, right, margin=5):
    """Augment one image with the flip and the reflection padding of torch."""
    image = image.flip(-1) if flipped else image
    padded = F.pad(image.double()[None], (margin,) * 4, mode="reflect")[0]
    _, height, width = image.shape
    return padded[:, margin - down : margin - down + height, margin - right : margin - right + width].to(image.dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int8])
@pytest.mark.parametrize("size", [8, 32])
def test_flip_and_shift_equals_the_slow_reference(dtype, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (200, 3, size, size), generator=generator).to(dtype)
    flipped = torch.rand(200, generator=generator) < 0.5
    shifts = torch.randint(-5, 6, (200, 2), generator=generator)
    augmented = flip_and_shift(images, flipped, shifts)
    assert augmented.dtype == dtype
    for i in range(200):
        assert torch.equal(augmented[i], slow_flip_and_shift(images[i], flipped[i], *shifts[i].tolist()))


@pytest.mark.parametrize("flip", [True, False])
def test_training_batches_use_every_shift_and_flip_only_where_asked(flip):
    split = Split("cifar10", "train", random_split(1).images.expand(2000, -1, -1, -1), torch.zeros(2000).long(), ("a",))
    image, seen = split.images[0], {}
    for flipped in (False, True):
        for down in range(-2, 3):
            for right in range(-2, 3):
                variant = slow_flip_and_shift(image, flipped, down, right)
                seen[variant.numpy().tobytes()] = [flipped, 0]
    for images, _ in training_batches(split, 500, torch.Generator().manual_seed(0), flip=flip, shift=2):
        for variant in (images * 255).round().to(torch.uint8):
            seen[variant.contiguous().numpy().tobytes()][1] += 1  # a KeyError if it is not one of the fifty
    assert all((count > 0) == (flip or not flipped) for flipped, count in seen.values())
    assert sum(count for flipped, count in seen.values() if flipped) == pytest.approx(1000 if flip else 0, abs=100)


def test_contrast_is_scaled_by_factors_from_the_lowest_to_one_about_each_images_mean():
    split, generator = random_split(1000), torch.Generator().manual_seed(0)
    ((plain, _),) = training_batches(split, 1000, torch.Generator().manual_seed(0), flip=True, shift=2)
    ((scaled, _),) = training_batches(split, 1000, generator, flip=True, shift=2, contrast=0.3)
    torch.testing.assert_close(scaled.mean((1, 2, 3)), plain.mean((1, 2, 3)))
    factors = scaled.std((1, 2, 3)) / plain.std((1, 2, 3))
    assert 0.3 - 1e-4 < factors.min() < 0.31
    assert 0.99 < factors.max() < 1 + 1e-4
    assert factors.mean() == pytest.approx(0.65, abs=0.02)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert torch.equal(scale_contrast(plain, torch.ones(1000)), plain)
    torch.testing.assert_close(scale_contrast(plain, factors), scaled)
