"""Anyone's network: import paths, names of torchvision, weights, and what is said of those that do not fit."""

import os
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attacks import AttackError, fgsm, pgd
from networks.folding import Normalize
from utils.constants import UserError
from utils.diagnosis import diagnose
from utils.evaluation import accuracy, evaluate, evaluate_fgsm, transfer_matrix
from utils.images import as_split
from utils.models import count_classes, explaining, load_model, load_weights

NETS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))

def with_width(width):
    return nn.Linear(width, 5)

def broken():
    return torch.no_such_thing

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))

def leaves():
    raise SystemExit(0)

ready = Net()
number = int
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with nets.py and a package that holds it too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "models.py").write_text(NETS)
    yield tmp_path
    for name in [name for name in sys.modules if name in ("nets", "net") or name.startswith("mypackage")]:
        del sys.modules[name]


def data(dtype=torch.float32, channels=3, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, channels, 8, 8, generator=generator, dtype=dtype)
    return images, torch.arange(6) % classes


# ---- code ----


@pytest.mark.parametrize(
    ("path", "classes"),
    [("nets.py:build", 5), ("nets.py:Net", 7), ("nets.py:ready", 7), ("mypackage.models:build", 5), ("nets:Net", 7)],
)
def test_an_import_path_names_a_function_a_class_or_a_module(path, classes, folder):
    network = load_model(path)
    assert not network.training
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, classes)
    assert str(folder) not in sys.path


def test_a_name_of_torchvision():
    assert load_model("squeezenet1_1", num_classes=3)(torch.rand(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("resnet1", "'resnet1' is not a network of torchvision.models, nor an import path"),
        ("nowhere.py:build", "nowhere.py: no such file"),
        ("nowhere:build", "No module named 'nowhere'.*modules are looked for in"),
        ("nets.py:nothing", "has no attribute 'nothing'"),
        ("nets.py:with_width", "name a function that needs no arguments"),
        ("nets.py:broken", r"no_such_thing.*line \d+"),
        ("nets.py:number", "must be an nn.Module or return one, not a int"),
        ("nets.py:nothing", r"has no attribute 'nothing'\Z"),  # our own file and line say nothing about it
        ("nets.py:leaves", r"SystemExit: 0 \(nets\.py, line \d+\)"),
        ("syntax.py:build", "SyntaxError"),
        ("quits.py:build", r"SystemExit: 0 \(quits.py, line 2\)"),
    ],
)
def test_code_that_does_not_work_is_one_line(path, message, folder):
    (folder / "syntax.py").write_text("def build(:\n")
    (folder / "quits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["net.py:build", "net:build", "mypackage.net:build"])
def test_a_package_called_utils_of_the_users_own_works(path, folder):
    """And afterwards `utils` is ours again."""
    ours = sys.modules["utils"]
    (folder / "utils").mkdir()
    (folder / "utils" / "__init__.py").touch()
    (folder / "utils" / "layers.py").write_text("from torch import nn\nlayers = [nn.Flatten(), nn.LazyLinear(3)]\n")
    code = "from torch import nn\nfrom utils.layers import layers\ndef build():\n    return nn.Sequential(*layers)\n"
    for name in ("net.py", "mypackage/net.py"):
        (folder / name).write_text(code)
    assert load_model(path)(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert sys.modules["utils"] is ours
    assert "utils.layers" not in sys.modules


def test_a_package_called_utils_elsewhere_is_one_clear_line(folder):
    for line, message in (
        ("from utils.layers import layers", r"No module named 'utils\.layers'"),
        ("from utils import layers", "cannot import name 'layers' from 'utils'"),
    ):
        (folder / "net.py").write_text(f"{line}\n")
        with pytest.raises(UserError, match=f"{message}.*a package of the same name, so yours must"):
            load_model("net.py:build")


# ---- weights ----


def network_and_state(inputs=3 * 8 * 8):
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5))
    return network, {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_weights_as_training_scripts_save_them(wrap, tmp_path):
    network, state = network_and_state()
    torch.save(wrap(state), tmp_path / "a.pth")
    load_weights(network, tmp_path / "a.pth")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_weights_from_safetensors(tmp_path):
    network, state = network_and_state()
    save_file(state, tmp_path / "a.safetensors")
    load_weights(network, tmp_path / "a.safetensors")
    assert torch.equal(network[1].weight, state["1.weight"])


def test_weights_that_do_not_fit_are_named(tmp_path):
    network, state = network_and_state()
    state["2.weight"] = state.pop("1.bias")
    state["1.weight"] = state["1.weight"][:3]
    torch.save(state, tmp_path / "a.pth")
    before = network[1].weight.clone()
    with pytest.raises(UserError) as error:
        load_weights(network, tmp_path / "a.pth")
    assert str(error.value) == (
        f"{tmp_path / 'a.pth'} does not fit the network: 1.bias is missing; 2.weight is unexpected; "
        "1.weight (3, 192) in the file, (5, 192) in the network is of another shape"
    )
    assert torch.equal(network[1].weight, before)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Hostile(), "could execute code"),
        ({"state_dict": {"1.weight": Hostile()}}, "could execute code"),
        (nn.Linear(2, 2), "could execute code"),
        ([1, 2], "does not hold a state dict, but a list"),
        ({}, "does not hold a state dict"),
        ({"1.weight": 3}, "'1.weight' is a int, not a tensor"),
        ({b"1.weight": torch.zeros(1)}, "b'1.weight' is not a name"),
        ({"1.weight": torch.zeros(2**25)}, "too large for this network"),
    ],
)
def test_hostile_weights_run_nothing_and_are_one_line(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "a.pth")
    network, _ = network_and_state()
    with pytest.raises(UserError, match=message) as error:
        load_weights(network, "a.pth")
    assert "\n" not in str(error.value)
    assert os.listdir() == ["a.pth"]


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_weights_that_cannot_be_copied_are_one_line(kind, tmp_path):
    network, state = network_and_state()
    state = {name: tensor.to("meta") if kind == "meta" else tensor.to_sparse() for name, tensor in state.items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth does not fit the network: .*1\.weight") as error:
        load_weights(network, tmp_path / "a.pth")
    assert "\n" not in str(error.value)


def test_weights_for_layers_that_take_their_shape_from_the_file(tmp_path):
    _, state = network_and_state()
    torch.save(state, tmp_path / "a.pth")
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(5))
    load_weights(network, tmp_path / "a.pth")
    assert torch.equal(network[1].weight, state["1.weight"])


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_weights_that_are_not_a_file_are_one_line(name, tmp_path):
    network, _ = network_and_state()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="it is not a file"):
        load_weights(network, tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="it is not a file"):
        load_weights(network, tmp_path / name)
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        load_weights(network, tmp_path / name)


def test_a_zip_bomb_of_weights_is_one_line(tmp_path):
    """torch.load would unpack it: a file of 200 kB that becomes 200 MB."""
    network, state = network_and_state()
    torch.save({**state, "1.weight": torch.zeros(5 * 10**7)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "a.pth", "w") as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pth").stat().st_size < 10**6
    with pytest.raises(UserError, match="too large for this network"):
        load_weights(network, tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_or_missing_weights_are_one_line(name, tmp_path):
    network, state = network_and_state()
    with pytest.raises(UserError, match="No such file"):
        load_weights(network, tmp_path / name)
    save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for damaged in (b"", whole[:100], b"garbage" + whole):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name) as error:
            load_weights(network, tmp_path / name)
        assert "\n" not in str(error.value)


# ---- normalisation ----


def test_normalisation_inside_keeps_epsilon_in_pixel_units():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    network = nn.Sequential(Normalize(mean, std), inner)
    images, labels = data()
    by_hand = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(network(images), inner(by_hand))
    assert (fgsm(network, images, labels, epsilon=0.1) - images).abs().max() <= 0.1 + 1e-6


def test_mean_and_std_belong_together():
    with pytest.raises(UserError, match="belong together"):
        load_model("squeezenet1_1", mean=(0.5,))
    for mean, std in (((0.5,), (0,)), ((0.5,), (float("nan"),)), ((0.5, 0.5), (1,))):
        with pytest.raises(UserError, match="a number for each channel"):
            load_model("squeezenet1_1", mean=mean, std=std)
        with pytest.raises(ValueError, match="a number for each channel"):
            Normalize(mean, std)
    with pytest.raises(UserError, match="pixels in \\[0, 1\\]: divide both by 255"):
        load_model("squeezenet1_1", mean=(123, 116, 103), std=(58, 57, 57))


# ---- networks and images that do not fit ----


class Dictionary(nn.Module):
    def forward(self, images):
        return {"scores": images.flatten(1), "features": images}


UNFIT = [
    (Dictionary(), data(), r"must return logits \(N, classes\), not <class 'dict'>"),
    (nn.Identity(), data(), r"must return \(N, classes\) with N=\d+, not \(\d+, 3, 8, 8\)"),
    (nn.Conv2d(1, 4, 3), data(), r"cannot classify float32 images of shape \(3, 8, 8\)"),
    (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double(), data(), "its weights are float64: convert one of both"),
    (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), data(torch.float64), "float64 images.*its weights are float32"),
    (nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), data(), "a label is 4, but the network's classes are 0 to 2"),
]


@pytest.mark.parametrize(("network", "data", "message"), UNFIT)
def test_a_network_that_does_not_fit_is_one_line_in_every_function(network, data, message):
    for call in (
        lambda: evaluate(network, data, "fgsm", 0.1),
        lambda: evaluate(network, data, "pgd", 0.1),
        lambda: evaluate_fgsm(network, data, [0.1]),
        lambda: accuracy(network, data),
        lambda: diagnose(network, data),
        lambda: transfer_matrix([network], data, 0.1),
    ):
        with pytest.raises((UserError, AttackError), match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_network_that_ends_the_process_is_one_line():
    """A command would end with status 0, as if all had gone well."""
    with pytest.raises(UserError, match="cannot classify float32 images"):
        count_classes(lambda _images: sys.exit(0), as_split(data()))


@pytest.mark.parametrize(("channels", "classes"), [(1, 3), (3, 5), (3, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grey_images_and_any_number_of_classes_work(channels, classes, dtype):
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes)).to(dtype)
    images, labels = data(dtype, channels, min(classes, 6))
    expected = (network(pgd(network, images, labels, epsilon=0.1)).argmax(1) == labels).tolist()
    assert evaluate(network, (images, labels), "pgd", 0.1).mask.tolist() == expected
    assert 0 <= accuracy(network, (images, labels)) <= 1


def test_an_error_that_has_another_reason_is_not_explained():
    from utils.images import as_split

    network, split = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), as_split(data())
    with pytest.raises(KeyError, match="other"), explaining(split, network):
        raise KeyError("other")
    assert count_classes(network, split) == 5
