"""test-model.py and docs/your-model.md: your network on your images, from the shell and from Python."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.project import ROOT
from utils.checkpoints import file_digest, load_checkpoint, read_metadata
from utils.commands.train import own_splits
from utils.constants import UserError
from utils.formats import TestReport, read_document
from utils.saving import load_images

PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 32 PNGs of 64 x 64 in four classes, the page's nets.py, and random weights for it."""
    folder, random = tmp_path_factory.mktemp("yours"), np.random.default_rng(0)
    for index in range(32):
        path = folder / "pictures" / ["ant", "bee", "cat", "dog"][index % 4] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    (code,) = [code for language, code in BLOCKS if code.startswith("# nets.py")]
    (folder / "nets.py").write_text(code)
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    torch.save(names["build"]().state_dict(), folder / "net.pth")
    return folder


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_on_a_screen_explains_every_flag_and_needs_no_torch(columns, script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('--help imports torch')")
    environment = {"COLUMNS": str(columns), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    shown = script("test-model.py", "--help", **environment)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("\n") <= 60
    flags = shown.stdout.split("examples:\n")[0]
    assert max(map(len, flags.splitlines())) < columns
    wanted = (
        "data classes resize channels split examples batch-size data-dir model weights mean std device attack epsilon "
    )
    wanted += "steps step-size restarts norm momentum target minimal-epsilon loss source seed diagnose json per-image "
    wanted += "figures save"
    for flag in wanted.split():
        assert f"  --{flag} " in flags


def assert_one_line(result, *parts):
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.slow
def test_the_page_runs_as_it_stands(folder, script, cifar10_dir, monkeypatch, capsys):
    """In order, each block after the one before it: commands and Python."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DATA_DIR", str(cifar10_dir))
    for language, code in BLOCKS:
        if "to_frame" in code and not find_spec("pandas"):
            continue
        if language == "python":
            exec(code, {})
            continue
        for line in code.splitlines():
            python, name, *arguments = shlex.split(line)
            result = script(name, *arguments, "--data-dir", cifar10_dir, cwd=folder)
            assert (python, result.returncode) == ("python", 0), result.stderr
            assert result.stderr == ""
    output = capsys.readouterr().out
    assert any(verdict in output for verdict in ("trustworthy", "cannot say"))
    report = read_document(folder / "out.json", TestReport, "a test report")
    assert (report.network, report.classes, report.examples) == ("resnet18", 4, 32)
    assert [row.name for row in report.attacks] == ["fgsm", "pgd"]
    right = np.array(list(report.clean_hits or "")) == "1"
    for row in report.attacks:
        left = np.array(list(row.hits or "")) == "1"
        assert row.accuracy == left.mean()
        assert row.success_rate == pytest.approx((right & ~left).sum() / right.sum())
        saved = load_images(folder / "adversarial" / f"{row.name}-0.03137")
        assert saved.header.misclassified == (~left).sum()
        assert saved.header.class_names == ["ant", "bee", "cat", "dog"]
        assert saved.header.survived > 0


def test_lazy_names_import_torch_only_when_they_are_used():
    code = "import sys, utils; assert 'torch' not in sys.modules; from utils import {}; assert 'torch' in sys.modules"
    import utils

    for name in ("evaluate",):
        subprocess.run([sys.executable, "-c", code.format(name)], cwd=ROOT, check=True, timeout=120)
    for name in utils.__all__:
        assert callable(getattr(utils, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        utils.nothing  # noqa: B018


@pytest.mark.slow
def test_a_folder_called_digits_does_not_hold_the_digits(folder, script, tmp_path):
    shutil.copytree(folder / "pictures", tmp_path / "digits")
    arguments = ["--data", tmp_path / "digits", "--width", 4, "--epochs", 1, "--quiet"]
    assert script("train-cnn.py", *arguments, cwd=tmp_path).returncode == 0
    assert read_metadata(tmp_path / "runs" / "cnn-digits-images.safetensors").dataset == "digits-images"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--data", "--model"]),
        (["--model", "resnet1", "--data", "pictures"], ["'resnet1' is not a network of torchvision"]),
        (["--model", "nets.py:build", "--data", "pictures"], ["cannot classify float32 images of shape (3, 64, 64)"]),
        (["--model", "resnet18", "--data", "nowhere"], ["nowhere", "No such file"]),
        (["--model", "resnet18", "--data", "nets.py"], ["nets.py cannot be read as an .npz file"]),
        (["--model", "resnet18", "--data", "pictures", "--mean", "0.5"], ["--mean and --std belong together"]),
        (["--model", "resnet18", "--data", "pictures", "--std", "0", "--mean", "0"], ["--std", "above 0"]),
        (["--model", "resnet18", "--data", "digits", "--resize", "64"], ["not for digits"]),
        (["--model", "resnet18", "--data", "pictures", "--channels", "2"], ["--channels"]),
        (["--model", "resnet18", "--data", "three.npz", "--channels", "1"], ["--channels is for a folder"]),
        (["--model", "resnet18", "--data", "pictures", "--split", "train"], ["--split belongs to --data cifar10"]),
        (["--model", "resnet18", "--data", "pictures", "--save", "pictures"], ["pictures is not empty"]),
        (
            ["--model", "resnet18", "--data", "pictures", "--save", "new", "--epsilon", "0.03137", "8/255"],
            ["--save needs attacks and radii that differ"],
        ),
        (
            ["--model", "resnet18", "--data", "pictures", "--save", "new", "--json", "new/a.json"],
            ["--save new needs a folder of its own, but new/a.json is in it"],
        ),
        (
            ["--model", "resnet18", "--data", "pictures", "--weights", "net.pth"],
            ["does not fit", "conv1.weight", "missing"],
        ),
        (["--model", "resnet18", "--data", "pictures", "--classes", "ant", "bee"], ["'cat'", "not one of the classes"]),
        (["--model", "resnet18", "--data", "pictures", "--classes", "ant", "ant"], ["each once"]),
        (["--model", "nets.py:build", "--data", "digits", "--classes", "a"], ["not for digits"]),
        (["--model", "odd.py:Dictionary", "--data", "pictures"], ["must return logits (N, classes)"]),
        (["--model", "odd.py:three", "--data", "pictures"], ["a label is 3, but the network's classes are 0 to 2"]),
        (
            ["--model", "odd.py:three", "--data", "three.npz", "--attack", "autoattack"],
            ["needs a network with 4 classes"],
        ),
        (["--model", "odd.py:three", "--data", "three.npz", "--source", "net.pth"], ["net.pth"]),
        (
            ["--model", "odd.py:three", "--data", "three.npz", "--target", "3"],
            ["'3' is not a class of three.npz"],
        ),
        (["--model", "resnet18", "--data", "pictures", "--target", "cow"], ["'cow' is not a class of pictures"]),
        (
            ["--model", "resnet18", "--data", "pictures", "--attack", "autoattack", "--target", "cat"],
            ["--target belongs to --attack fgsm and pgd"],
        ),
        (["--model", "resnet18", "--data", "pictures", "--norm", "l2", "--diagnose"], ["L-infinity", "--norm l2"]),
        (["--model", "resnet18", "--data", "pictures", "--norm", "l2", "--epsilon", "-1"], ["--epsilon", "negative"]),
        (["--model", "resnet18", "--data", "pictures", "--momentum", "1"], ["--momentum belongs to --attack pgd"]),
        (["--model", "a", "--data", "b", "--attack", "pgd", "--momentum", "3"], ["--momentum", "at most 2"]),
        (["--model", "a", "--data", "b", "--minimal-epsilon", "--target", "1"], ["goes without --source and --target"]),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments, parts, folder, script):
    (folder / "odd.py").write_text(
        "from torch import nn\n"
        "class Dictionary(nn.Module):\n"
        "    def forward(self, images):\n"
        "        return {'scores': images, 'features': images}\n"
        "def three():\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))\n"
    )
    np.savez(folder / "three.npz", images=np.zeros((6, 3, 8, 8), np.uint8), labels=np.arange(6) % 3)
    before = sorted(folder.rglob("*"))
    assert_one_line(script("test-model.py", *arguments, cwd=folder), "test-model.py: error: ", *parts)
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]


QUICK = {("grey", "l2"), ("three", "target"), ("double", "l2"), ("dictionary", "linf")}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=() if (name, how) in QUICK else pytest.mark.slow)
        for name in ("grey", "three", "thousand", "double", "compiled", "dictionary")
        for how in ("linf", "l2", "target")
    ],
)
def test_unusual_networks_work(name, how, folder, script, tmp_path):
    channels, classes = {"grey": (1, 5), "three": (3, 3), "thousand": (3, 1000)}.get(name, (3, 5))
    layers = f"nn.Flatten(), nn.Linear({channels} * 64, {classes})"
    code = {"double": f"nn.Sequential({layers}).double()", "compiled": f"torch.compile(nn.Sequential({layers}))"}
    code["dictionary"] = f"Dictionary({layers})"
    text = f"import torch\nfrom torch import nn\nbuild = lambda: {code.get(name, f'nn.Sequential({layers})')}\n"
    text += (
        "class Dictionary(nn.Sequential):\n    def forward(self, x):\n        return {'logits': super().forward(x)}\n"
    )
    (tmp_path / "net.py").write_text(text)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (12, channels, 8, 8), dtype=np.uint8), np.arange(12) % min(classes, 12)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    arguments = ["--model", "net.py:build", "--data", "a.npz", "--attack", "fgsm", "pgd", "--epsilon", 0.1]
    arguments += {"l2": ["--norm", "l2", "--momentum", 1], "target": ["--target", "least-likely"], "linf": []}[how]
    result = script("test-model.py", *arguments, "--json", "o.json", "--save", "saved", "--figures", "f", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "o.json").read_text())
    assert (report["classes"], len(report["attacks"])) == (classes, 2)
    assert len(load_images(tmp_path / "saved" / "pgd-0.1").images) == 12
    for row in report["attacks"]:
        assert row.get("norm", "linf") == ("l2" if how == "l2" else "linf")
        assert row.get("target") == ("least-likely" if how == "target" else None)
    assert report["attacks"][1]["momentum"] == (1 if how == "l2" else 0)
    drawn = {path.name for path in (tmp_path / "f").iterdir()}
    assert drawn == {"accuracy.png"} | (set() if how == "l2" else {"examples.png"})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_smallest_radii_are_printed_reported_and_drawn(norm, folder, script, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nbuild = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5))"
    )
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "a.npz", images=random.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8), labels=np.arange(12) % 5
    )
    arguments = ["--model", "net.py:build", "--data", "a.npz", "--minimal-epsilon", "--norm", norm, "--steps", 10]
    result = script("test-model.py", *arguments, "--json", "o.json", "--figures", "f", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = read_document(tmp_path / "o.json", TestReport, "a test report")
    minimal = found.minimal_epsilon
    assert (minimal.norm, minimal.steps, minimal.examples, len(minimal.epsilons)) == (norm, 10, 12, 12)
    assert minimal.epsilons.count(0) == 12 - round(12 * found.clean_accuracy)
    assert minimal.median == pytest.approx(sorted(minimal.epsilons)[5], rel=1e-5)
    assert f"half of the images fall: at most {minimal.median:.4g}" in result.stdout
    assert (tmp_path / "f" / "robustness-curve.png").exists()


@pytest.mark.slow
def test_diagnosis_of_a_users_network(folder, script, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nbuild = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    arguments = ["--model", "net.py:build", "--data", "digits", "--examples", 20, "--diagnose", "--json", "o.json"]
    result = script("test-model.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "is the evaluation trustworthy?" in result.stdout
    assert read_document(tmp_path / "o.json", TestReport, "a test report").diagnosis


def test_training_on_own_images_and_fine_tuning(folder, script, tmp_path):
    """Pictures of 64 x 64 are scaled; the checkpoint knows their classes; the next training starts from it."""
    arguments = ["--data", folder / "pictures", "--width", 4, "--epochs", 1]
    first = script("train-cnn.py", *arguments, "--defense", "fgsm", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "images are scaled and cropped to 32 x 32 pixels" in first.stdout
    path = tmp_path / "runs" / "cnn-pictures-fgsm-0.0313725.safetensors"
    header = read_metadata(path)
    assert (header.dataset, header.class_names) == ("pictures", ["ant", "bee", "cat", "dog"])
    assert header.training.examples == 29
    named = [*arguments, "--classes", "dog", "cat", "bee", "ant", "fly", "--init", path, "--lr", "1e-9"]
    second = script("train-cnn.py", *named, "--output", "fine.safetensors", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    tuned = read_metadata(tmp_path / "fine.safetensors")
    assert tuned.class_names == ["dog", "cat", "bee", "ant", "fly"]
    assert tuned.training.init_sha256 == file_digest(path)
    before, after = (load_checkpoint(each).state_dict() for each in (path, tmp_path / "fine.safetensors"))
    first_layer = next(name for name, tensor in before.items() if tensor.ndim == 4)
    assert torch.allclose(before[first_layer], after[first_layer], atol=1e-4)
    assert after["classifier.weight"].shape[0] == 5
    again = script("train-cnn.py", *named, "--output", "fine.safetensors", "--resume", cwd=tmp_path)
    assert "nothing to resume" in again.stdout
    tests = ["--model", "fine.safetensors", "--data", folder / "pictures", "--resize", 32, "--json", "o.json"]
    tested = script("test-model.py", *tests, cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    assert "4 folders" not in tested.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--classes", "ant"], ["--classes belongs to --data"]),
        (["--data", "nowhere"], ["nowhere", "No such file"]),
        (["--data", "few.npz"], ["few.npz has 9 images, but a training needs 10"]),
        (["--data", "pictures", "--init", "net.pth"], ["net.pth"]),
        (["--data", "pictures", "--init", ROOT / "models" / "cnn-lstm.safetensors"], ["holds a cnn-lstm of width 32"]),
        (
            ["--data", "pictures", "--init", ROOT / "models" / "cnn.safetensors", "--width", 8],
            ["holds a cnn of width 32"],
        ),
    ],
)
def test_training_on_what_does_not_fit_is_one_line(arguments, parts, folder, script):
    np.savez(folder / "few.npz", images=np.zeros((9, 3, 32, 32), np.uint8), labels=np.arange(9) % 3)
    assert_one_line(script("train-cnn.py", *arguments, "--quiet", cwd=folder), "train-cnn.py: error: ", *parts)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (np.zeros((20, 3, 32, 32)), np.arange(20) % 2, None, "in a channel, all pixels .* are the same"),
        (np.random.rand(20, 3, 32, 32), np.zeros(20, int), None, "has one class, but a network learns to tell two"),
        (np.random.rand(20, 3, 32, 32), np.arange(20) % 3, ["a", "b"], "a label is 2, but only 2 classes have a name"),
        (np.random.rand(20, 3, 32, 32), np.arange(20) % 2, ["a", "a"], "each once"),
    ],
)
def test_images_that_nothing_can_be_learnt_from_are_refused(images, labels, classes, message, tmp_path):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(UserError, match=message):
        own_splits(Namespace(data=tmp_path / "a.npz", classes=classes, quiet=True, dataset="a"))


def test_training_takes_the_classes_from_a_file_too(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.random.rand(20, 3, 32, 32), labels=np.arange(20) % 2)
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    classes = [str(tmp_path / "names.txt")]
    training, _ = own_splits(Namespace(data=tmp_path / "a.npz", classes=classes, quiet=True, dataset="a"))
    assert training.class_names == ("ant", "bee")


@pytest.mark.parametrize("grey", [True, False])
def test_training_on_arrays_of_any_kind(grey, script, tmp_path):
    random = np.random.default_rng(0)
    images = random.random((20, 32, 32)) if grey else random.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(20) % 3)
    trained = script("train-cnn.py", "--data", "a.npz", "--width", 4, "--epochs", 1, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "scaled" not in trained.stdout
    assert read_metadata(tmp_path / "runs" / "cnn-a.safetensors").class_names == ["0", "1", "2"]
