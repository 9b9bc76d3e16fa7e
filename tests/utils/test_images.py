"""A user's own images: folders, .npz files, tensors, data sets and loaders; and hostile ones, which are refused."""

import io
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from networks import CNN
from utils.constants import UserError
from utils.data import batches, load_split
from utils.evaluation import evaluate
from utils.images import as_split, read_images, read_upload


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 PNGs of 20 x 16 pixels in three classes."""
    random = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "pictures" / ["ant", "bee", "cat"][index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def images_and_labels(count=6, channels=3, size=8, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % classes


# ---- folders ----


def test_a_folder_is_read_as_torchvision_reads_it(pictures):
    split, expected = read_images(pictures), ImageFolder(str(pictures), transform=ToTensor())
    assert split.class_names == tuple(expected.classes)
    assert (split.images.dtype, split.images.shape) == (torch.uint8, (12, 3, 16, 20))
    (images, labels) = next(batches(split, 12))
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == expected.targets


def test_examples_of_a_folder_come_from_all_classes(pictures):
    split = read_images(pictures, examples=6)
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(read_images(pictures, examples=100)) == 12


def test_classes_give_the_order_of_the_network(pictures):
    split = read_images(pictures, classes=["dog", "cat", "bee", "ant"])
    assert split.labels.tolist() == [3] * 4 + [2] * 4 + [1] * 4
    assert split.class_names == ("dog", "cat", "bee", "ant")
    with pytest.raises(UserError, match="'bee', which is not one of the classes"):
        read_images(pictures, classes=["ant", "cat"])


def test_pictures_become_grey_or_square_if_asked(pictures):
    assert read_images(pictures, channels=1).images.shape == (12, 1, 16, 20)
    assert read_images(pictures, resize=10).images.shape == (12, 3, 10, 10)
    Image.new("L", (50, 70)).save(pictures / "ant" / "grey.png")
    Image.new("RGBA", (70, 50)).save(pictures / "bee" / "transparent.webp")
    with pytest.raises(UserError, match=r"grey\.png is \(3, 70, 50\).* \(3, 16, 20\).*: resize the images"):
        read_images(pictures)
    assert read_images(pictures, resize=10).images.shape == (14, 3, 10, 10)


def test_a_deep_folder_and_other_files_are_read_as_by_torchvision(pictures):
    (pictures / "ant" / "more" / "and more").mkdir(parents=True)
    (pictures / "ant" / "00.png").rename(pictures / "ant" / "more" / "and more" / "00.png")
    (pictures / "ant" / "Thumbs.db").write_bytes(b"?")
    (pictures / ".cache").mkdir()
    assert len(read_images(pictures)) == 12


def png(width, height, data):
    """A PNG of grey pixels with any header and any data."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(100_000, 100_000, zlib.compress(b"\0" * 1000)), "exceeds limit"),
        (png(10_000, 10_000, zlib.compress(b"\0" * 1000)), "exceeds limit"),
        (png(5000, 5000, zlib.compress(b"\0" * 5001 * 5000)), "more than 16,777,216 pixels"),
        (png(16, 16, b"garbage"), "cannot be read as a picture"),
        (png(16, 16, zlib.compress(b"\0" * 20)), "truncated"),
        (b"", "cannot identify"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n(it ran) print\n", "cannot identify"),
        (pickle.dumps(os.getcwd), "cannot identify"),
        (sixteen_bits(), "mode I;16"),
    ],
    ids=["bomb", "smaller-bomb", "too-large", "garbage", "truncated", "empty", "postscript", "pickle", "16-bits"],
)
def test_a_hostile_picture_is_one_line(content, message, tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.png").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_images(tmp_path)
    assert str(tmp_path / "ant" / "1.png") in str(error.value)
    assert "\n" not in str(error.value)
    if "more than" not in message:  # an upload is resized
        with pytest.raises(UserError, match=f"the picture cannot be read as a picture: .*{message}|{message}") as error:
            read_upload(content, 32)
        assert "\n" not in str(error.value)


def test_an_image_that_would_become_too_large_is_refused_before_it_is_resized(tmp_path):
    for height, size in ((60_000, 32), (2, 99_999)):
        folder = tmp_path / str(size)
        (folder / "ant").mkdir(parents=True)
        Image.new("RGB", (1, height)).save(folder / "ant" / "1.png")
        np.savez(folder / "a.npz", images=np.zeros((1, 3, 1, height), np.uint8), labels=[0])
        for path in (folder, folder / "a.npz"):
            with pytest.raises(UserError, match=f"scaled to {size}, has more than 16,777,216: crop it, or choose a s"):
                read_images(path, resize=size)


def test_an_upload_is_square_and_upright():
    photograph, file = Image.new("RGB", (60, 40), "black"), io.BytesIO()
    photograph.paste("white", (0, 0, 60, 5))  # above, in the camera's orientation
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    photograph.save(file, "JPEG", exif=exif)
    images = read_upload(file.getvalue(), 32)
    assert images.shape == (1, 3, 32, 32)
    assert (images >= 0).all()
    assert (images <= 1).all()
    assert images[..., -3:].mean() > 0.5 > images[..., :3, :20].mean()  # now it is white on the right
    with pytest.raises(UserError, match=r"the picture has 9\.0 MiB: choose one of at most 8 MiB"):
        read_upload(bytes(9 * 2**20), 32)


def test_a_folder_with_a_loop_and_other_traps_is_one_line(pictures):
    (pictures / "ant" / "again").symlink_to(pictures, target_is_directory=True)
    with pytest.raises(UserError, match="leads back to a folder above it"):
        read_images(pictures)
    (pictures / "ant" / "again").unlink()
    (pictures / "ant" / "self.png").symlink_to(pictures / "ant" / "self.png")
    with pytest.raises(UserError, match=r"self\.png cannot be read"):
        read_images(pictures)
    (pictures / "ant" / "self.png").unlink()
    os.mkfifo(pictures / "ant" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png cannot be read as a picture: it is not a file"):
        read_images(pictures)
    (pictures / "ant" / "pipe.png").unlink()
    (pictures / "ant" / "/".join("d" * 60)).mkdir(parents=True)
    with pytest.raises(UserError, match="nested too deeply"):
        read_images(pictures)


def test_a_folder_without_folders_of_classes_says_how_it_must_be(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="holds no pictures: they must be in a folder for each class"):
        read_images(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_images(tmp_path / "nowhere")


# ---- .npz files ----


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "grey"])
def test_an_npz_file_in_any_layout(layout, tmp_path):
    images, labels = images_and_labels(channels=1 if layout == "grey" else 3)
    array = {"NCHW": images, "NHWC": images.permute(0, 2, 3, 1), "grey": images[:, 0]}[layout].numpy()
    np.savez_compressed(tmp_path / "a.npz", images=array, labels=labels.numpy().astype(np.uint8))
    split = read_images(tmp_path / "a.npz", examples=5, classes=["a", "b", "c", "d"])
    assert torch.equal(split.images, images[:5])
    assert torch.equal(split.labels, labels[:5])
    assert split.class_names == ("a", "b", "c", "d")
    assert read_images(tmp_path / "a.npz", resize=5).images.shape == (6, images.shape[1], 5, 5)


def test_an_npz_file_with_fewer_names_than_classes_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 3, 8, 8)), labels=np.arange(3))
    with pytest.raises(UserError, match="a label is 2, but only 2 classes have a name"):
        read_images(tmp_path / "a.npz", classes=["a", "b"], examples=1)


def test_an_npz_file_that_leaves_its_layout_open_asks(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 3, 8, 3), np.uint8), labels=np.zeros(6, int))
    with pytest.raises(UserError, match="do not show which dimension has the channels"):
        read_images(tmp_path / "a.npz")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.array([Hostile()], dtype=object), "labels": np.zeros(1, int)}, "Object arrays"),
        ({"images": np.zeros((1, 3, 8, 8), np.uint8), "labels": np.array([Hostile()], dtype=object)}, "Object arrays"),
        ({"x_train": np.zeros(3)}, "no array 'images', only 'x_train'"),
        ({"images": np.zeros((2, 3, 8, 8), np.int64), "labels": np.zeros(2, int)}, "must be uint8"),
        ({"images": np.full((2, 3, 8, 8), 255.0), "labels": np.zeros(2, int)}, r"lie in 255\.\.255, not in \[0, 1\]"),
        ({"images": np.full((2, 3, 8, 8), np.nan), "labels": np.zeros(2, int)}, "image 0, counted from 0, holds NaN"),
        ({"images": np.zeros((2, 3, 8, 8)), "labels": np.zeros((2, 10))}, "labels must be whole numbers"),
        ({"images": np.zeros((2, 3, 8, 8)), "labels": np.zeros(3, int)}, r"images must be \(N, C, H, W\)"),
        ({"images": np.zeros((0, 3, 8, 8)), "labels": np.zeros(0, int)}, "with an image at least"),
        ({"images": np.zeros((2, 3, 8, 8)), "labels": np.array(1)}, "a single number"),
        ({"images": np.array(0.5), "labels": np.zeros(1, int)}, "a single number"),
        ({"images": np.zeros((2, 3, 8, 8)), "labels": np.array([0, -1])}, "a label is -1"),
        ({"images": np.zeros((2, 3, 8, 8)), "labels": np.array([0, 2**60])}, "at most 9,999"),
        ({"images": np.zeros((1, 3, 10_000, 10_000), np.uint8), "labels": np.zeros(1, int)}, r"would take 0\.3 GiB"),
    ],
)
def test_a_hostile_npz_file_is_one_line_and_runs_nothing(arrays, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("a.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        read_images("a.npz", examples=1)
    assert "a.npz" in str(error.value)
    assert "\n" not in str(error.value)
    assert os.listdir() == ["a.npz"]


def test_an_npz_file_that_is_not_a_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    for name, message in (("pipe", "it is not a file"), ("loop", "cannot be read as an .npz file")):
        with pytest.raises(UserError, match=message) as error:
            read_images(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)


def test_a_zip_bomb_that_lies_about_its_size_is_one_line(tmp_path):
    """Its directory says that an array has 1,000 bytes, but 400 MB follow."""
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 3, 8, 8), np.uint8), labels=np.zeros(1, int))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1, 1, 20000, 20000)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(4 * 10**8))
        archive.writestr("labels.npy", b"")
    data = (tmp_path / "a.npz").read_bytes()
    size = struct.pack("<I", len(header.getvalue()) + 4 * 10**8)
    assert data.count(size) == 2  # in the entry and in the directory
    (tmp_path / "a.npz").write_bytes(data.replace(size, struct.pack("<I", 1000)))
    with pytest.raises(UserError, match=r"a\.npz cannot be read as an \.npz file"):
        read_images(tmp_path / "a.npz")


def test_a_damaged_npz_file_is_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 8, 8)), labels=np.zeros(2, int))
    data = (tmp_path / "a.npz").read_bytes()
    for damaged in (b"", data[:300], data[:100] + b"?" + data[101:], pickle.dumps(Hostile())):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.npz cannot be read as an \.npz file"):
            read_images(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:  # a header that declares terabytes
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**42,)})
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    with pytest.raises(UserError, match=r"a\.npz cannot be read"):
        read_images(tmp_path / "a.npz")


# ---- tensors, data sets and loaders ----


def test_a_pair_of_tensors_or_arrays_keeps_its_values():
    images, labels = images_and_labels()
    for pair in ((images, labels), [images.numpy(), labels.numpy()], (images.double() / 255, labels.short())):
        split = as_split(pair)
        assert torch.equal(split.images, torch.as_tensor(pair[0]))
        assert torch.equal(split.labels, labels)
        assert split.class_names == ("0", "1", "2", "3")
    ((found, _),) = batches(as_split((images.double() / 255, labels)), 10)
    assert found.dtype == torch.float64


class Shuffled(Dataset):
    """A data set of pictures that brightens each by a random amount."""

    classes = ("ant", "bee", "cat", "dog")

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return torch.rand(3, 8, 8), index % 4


def test_what_shuffles_or_augments_is_read_once():
    dataset = Shuffled()
    loader = DataLoader(dataset, batch_size=4, shuffle=True)
    for data in (dataset, loader):
        first = as_split(data)
        assert as_split(data).images is first.images
        assert first.class_names == Shuffled.classes
        assert len(first) == 6
    assert not torch.equal(as_split(DataLoader(dataset)).images, first.images)


def test_a_loader_and_a_data_set_of_pictures_give_the_images_of_the_folder(pictures):
    expected = read_images(pictures)
    as_pictures = as_split(ImageFolder(str(pictures)))
    assert torch.equal(as_pictures.images, expected.images)
    loaded = as_split(DataLoader(ImageFolder(str(pictures), transform=ToTensor()), batch_size=5))
    assert torch.equal(loaded.images * 255, expected.images.float())
    assert loaded.class_names == as_pictures.class_names == expected.class_names
    assert len(as_split(list(DataLoader(TensorDataset(expected.images, expected.labels), 4)))) == 12


class Items(Dataset):
    """The pairs of an image and its label in a list."""

    def __init__(self, *pairs, classes=()):
        self.pairs, self.classes = pairs, classes

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "not a int"),
        ((255 * torch.rand(2, 3, 8, 8), torch.zeros(2).long()), "divide them by 255"),
        (TensorDataset(torch.rand(2, 3, 8, 8), torch.eye(4)[:2].long()), r"labels \(N,\).*not .* and \(4,\)"),
        (Items(("a.png", 0)), "image 0 must be a tensor, an array, or a picture of mode L or RGB, not 'a.png'"),
        (Items((Image.new("P", (8, 8)), 0)), "a picture of mode L or RGB"),
        (Items((torch.rand(3, 8, 8), "cat")), "tensors or arrays of numbers"),
        (Items((torch.rand(3, 8, 8), None)), "tensors or arrays of numbers"),
        (Items((torch.rand(3, 8, 8), 0), classes=["x" * 201]), "name of a class has 1 to 200 characters"),
        (Items((torch.rand(3, 8, 8), 0), classes=[""]), "name of a class has 1 to 200 characters"),
        (torch.rand(2, 3, 8, 8), "must yield batches"),
        ((torch.rand(2, 3, 8, 8), torch.zeros(2).long(), 3), "the tuple must yield batches"),
        ((torch.rand(2, 8, 8), torch.zeros(2).long()), r"must be \(N, C, H, W\)"),
        ((torch.randn(2, 3, 8, 8), torch.zeros(2).long()), r"leave out their normalisation.*Normalize"),
        (("a", "b"), "tensors or arrays of numbers"),
        (DataLoader(TensorDataset(torch.rand(2, 3, 8, 8))), "must yield batches"),
        (DataLoader([{"image": 1}]), "not a dict"),
        (DataLoader([]), "holds no images"),
        ([(torch.rand(1, 3, size, 8), torch.tensor([0])) for size in (8, 8, 9)], r"image 2 is \(3, 9, 8\)"),
    ],
)
def test_other_data_is_refused_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as error:
        as_split(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "classes", [None, 2, {"cat": 1, "ant": 0}, lambda: 2, [("tench", "Tinca tinca"), ("goldfish",)]]
)
def test_a_data_set_whose_classes_are_not_names_has_numbers(classes):
    split = as_split(Items((torch.rand(3, 8, 8), 0), (torch.rand(3, 8, 8), torch.tensor([1])), classes=classes))
    assert split.class_names == ("0", "1")
    assert split.labels.tolist() == [0, 1]


def test_networks_of_others_get_contiguous_images():
    """They may call `view`, which fails on channels_last images."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            return self.convolution(images).view(len(images), -1)

    split = as_split(images_and_labels(), CNN(width=4))
    assert evaluate(Viewing(), split, "fgsm", 0.1).examples == 6
    ((images, _),) = batches(as_split(split, nn.Flatten()), 10)
    assert images.is_contiguous()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["pair", "data set", "loader", "npz"])
def test_one_image_that_is_not_finite_is_named(kind, bad, tmp_path):
    images, labels = torch.rand(9, 3, 4, 4), torch.zeros(9, dtype=torch.int64)
    images[7, 1, 2, 3] = bad
    pairs = TensorDataset(images, labels)
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=labels.numpy())
    loader = DataLoader(pairs, batch_size=4)
    data = {"pair": (images, labels), "data set": pairs, "loader": loader, "npz": tmp_path / "a.npz"}[kind]
    with pytest.raises(UserError, match="image 7, counted from 0, holds NaN or infinity"):
        as_split(data)


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match="the test split of digits holds no images"):
        as_split(load_split("digits", "test").first(0))


def test_images_that_rounding_has_left_just_outside_are_clamped():
    images = torch.rand(3, 3, 8, 8)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1 + 1.2e-7, -3e-8
    split = as_split((images, torch.arange(3)))
    found = split.take(torch.arange(3))[0]
    assert (found.min() >= 0, found.max() <= 1) == (True, True)
    torch.testing.assert_close(found, images, rtol=0, atol=2e-7)
