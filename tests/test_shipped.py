"""What the repository ships and says: checkpoints, model card, README and results agree with each other."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from attacks import fgsm
from utils.checkpoints import load_checkpoint, read_metadata
from utils.data import load_split
from utils.evaluation import accuracy

SHIPPED = ("cnn", "cnn-lstm")


def result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_model_card_has_the_digest(name):
    digest = hashlib.sha256((ROOT / "models" / f"{name}.safetensors").read_bytes()).hexdigest()
    assert f"`{digest}`" in (ROOT / "models" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_log_belongs_to_the_checkpoint(name):
    metadata = read_metadata(ROOT / "models" / f"{name}.safetensors")
    first, *epochs = map(json.loads, (ROOT / "models" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    assert first.items() >= metadata["training"].items()
    assert len(epochs) == metadata["epochs"] == metadata["training"]["epochs"]
    assert epochs[-1]["validation_accuracy"] == metadata["validation_accuracy"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoint_scores_what_results_say(name, cifar10_dir):
    network = load_checkpoint(ROOT / "models" / f"{name}.safetensors")
    test, validation = (load_split("cifar10", split, cifar10_dir) for split in ("test", "validation"))
    # Rounding differs between machines: a few images in ten thousand may fall on the other side.
    assert accuracy(network, test) == pytest.approx(result(name)["clean_accuracy"], abs=0.001)
    validation_accuracy = read_metadata(ROOT / "models" / f"{name}.safetensors")["validation_accuracy"]
    assert accuracy(network, validation) == pytest.approx(validation_accuracy, abs=0.001)


@pytest.mark.parametrize(("name", "floor"), [("cnn", 0.84), ("cnn-lstm", 0.82)])
def test_baselines_are_better_than_the_study_and_fall_to_fgsm(name, floor):
    report = result(name)
    assert (report["dataset"], report["split"], report["examples"]) == ("cifar10", "test", 10_000)
    assert report["clean_accuracy"] >= floor
    assert {attack["setting"] for attack in report["attacks"]} == {"white_box"}
    assert max(attack["accuracy"] for attack in report["attacks"]) < report["clean_accuracy"] - 0.3


@pytest.mark.parametrize(("name", "study"), [("cnn-paper", 0.80374), ("cnn-lstm-paper", 0.79001)])
def test_papers_recipe_reproduces_the_study(name, study):
    assert result(name)["clean_accuracy"] == pytest.approx(study, abs=0.02)


def crafted_as_in_the_study(network, images, labels, epsilon):
    """FGSM with batch norm in training mode on batches of one."""
    adversarial = []
    network.train()
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        image = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(image), label), image)
        adversarial.append((image + epsilon * gradient.sign()).clamp(0, 1).detach())
    return torch.cat(adversarial)


def test_fgsm_is_at_least_as_strong_as_the_studys_crafting(cifar10_dir):
    path = ROOT / "models" / "cnn.safetensors"
    test = load_split("cifar10", "test", cifar10_dir).first(1000)
    images, labels = test.images / 255, test.labels
    network = load_checkpoint(path)
    ours = fgsm(network, images, labels, epsilon=0.1)
    theirs = crafted_as_in_the_study(load_checkpoint(path), images, labels, 0.1)  # which moves its statistics
    with torch.no_grad():
        accuracies = [(network(x).argmax(1) == labels).float().mean().item() for x in (ours, theirs)]
    print(
        "accuracy on the first 1,000 test images under FGSM at 0.1: crafted in evaluation mode {:.1%}, "
        "in training mode on batches of one {:.1%}".format(*accuracies)
    )
    assert accuracies[0] <= accuracies[1]


# Run by a process of its own, because a child's peak includes that of the process it was forked from.
PEAK_MEMORY = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL, timeout=600, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not report a child's peak memory")
def test_training_on_cifar10_learns_within_two_gibibytes(cifar10_dir, tmp_path):
    output = tmp_path / "a.safetensors"
    training = ["train-cnn.py", "--epochs", "1", "--data-dir", cifar10_dir, "--output", output]
    measured = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *training], cwd=ROOT, capture_output=True, check=True)
    assert int(measured.stdout) < 2 * 2**30
    assert read_metadata(output)["validation_accuracy"] > 0.5


# ---- README ----

README = (ROOT / "README.md").read_text(encoding="utf-8")
EPSILONS = ("0.02", "0.04", "0.06", "0.08", "0.1")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ("CNN, ours", "cnn"),
        ("CNN, the study's recipe", "cnn-paper"),
        ("CNN-LSTM, ours", "cnn-lstm"),
        ("CNN-LSTM, the study's recipe", "cnn-lstm-paper"),
    ],
)
def test_readme_table_quotes_the_results(row, name):
    report = result(name)
    accuracies = {f"{attack['epsilon']:g}": attack["accuracy"] for attack in report["attacks"]}
    expected = [report["clean_accuracy"], *(accuracies[epsilon] for epsilon in EPSILONS)]
    (line,) = re.findall(rf"^\| \**{re.escape(row)}\** \|(.*)\|$", README, re.MULTILINE)
    assert [cell.strip(" *") for cell in line.split("|")] == [f"{100 * value:.2f}" for value in expected]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "models" / "README.md"], ids=lambda page: page.parent.name)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_readmes_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
