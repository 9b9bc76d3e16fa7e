"""An attack that finds other examples than before has another version, so that stored results are not used for it."""

import hashlib

import pytest
import torch
from torch import nn

from attacks import autoattack, fgsm, pgd, strong
from utils.evaluation import ATTACK_VERSIONS, ATTACKS

# Of the examples below. A change of an attack that changes its digest needs a new version, and a new line here.
DIGESTS = {
    ("fgsm", 1): "fbc1fa89f17eba57",
    ("pgd", 1): "d28990c885409393",
    ("strong", 1): "9e2c0d1e8dd00c02",
    ("autoattack", 1): "de2f89b85ee77214",
    ("pgd in l2", 1): "18085be745b357ca",
    ("pgd with momentum", 1): "4cf312a910cc2437",
    ("fgsm in l2", 1): "1bcbaf3c31d5cef6",
}
MORE_OPTIONS = {
    "pgd in l2": ({"norm": "l2"}, {"norm": "l2", "steps": 4, "restarts": 2, "loss": "margin", "early_stop": False}),
    "pgd with momentum": ({"momentum": 1}, {"momentum": 0.5, "norm": "l2", "steps": 5, "targeted": True}),
}
PGD_OPTIONS = (
    {},
    {"steps": 3, "restarts": 3, "seed": 7},
    {"steps": 5, "loss": "margin", "step_size": 1 / 64},
    {"steps": 4, "random_start": False, "targeted": True},
    {"steps": 6, "early_stop": False},
    {"steps": 4, "eot": 2, "loss": "margin", "early_stop": False},
)


class Exact(nn.Module):
    """A small network in float64, of numbers with few binary digits: every machine computes the same to 1e-9."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(-8, 9, shape, generator=generator).double() / 8 for shape in ((48, 16), (16, 5))]
        self.first, self.second = map(nn.Parameter, drawn)

    def forward(self, images):
        hidden = images.flatten(1) @ self.first
        return (hidden + hidden.square() / 16) @ self.second


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 17, (16, 3, 4, 4), generator=generator).double() / 16
    labels = Exact()(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 5  # some images are misclassified from the start
    return images, labels


def examples(name, images, labels):
    """Examples of an attack with its defaults and with its options, float (M, 3, 4, 4)."""
    model = Exact()
    if name == "fgsm":
        found = [fgsm(model, images, labels, epsilon=e, targeted=t) for e in (1 / 64, 1 / 8) for t in (False, True)]
    elif name == "fgsm in l2":
        found = [fgsm(model, images, labels, epsilon=e, norm="l2", targeted=t) for e in (0.1, 1) for t in (False, True)]
    elif name in MORE_OPTIONS:
        found = [pgd(model, images, labels, epsilon=e, **o) for e in (1 / 16, 1 / 2) for o in MORE_OPTIONS[name]]
    elif name == "strong":
        found = [strong(model, images, labels, epsilon=e, steps=4, seed=s) for e in (1 / 64, 1 / 8) for s in (0, 3)]
    elif name == "pgd":
        found = [pgd(model, images, labels, epsilon=e, **options) for e in (1 / 64, 1 / 8) for options in PGD_OPTIONS]
    else:  # its steps are many and in float32, so only what it breaks is compared
        model, images = model.float(), images.float()
        found = [autoattack(model, images, labels, epsilon=e, queries=100) for e in (1 / 128, 1 / 64, 1 / 32)]
        found = [(model(x).argmax(1) == labels)[:, None, None, None].double() for x in found]
    return torch.cat(found)


LONG = pytest.param("autoattack", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*sorted(ATTACKS.keys() - {"autoattack"}), LONG, *MORE_OPTIONS, "fgsm in l2"])
def test_an_attack_that_finds_other_examples_has_another_version(name, batch):
    if name == "autoattack":
        pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    rounded = (examples(name, *batch) * 2**20).round().to(torch.int32)
    digest = hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]
    assert DIGESTS.get((name, ATTACK_VERSIONS[name.split()[0]])) == digest, (
        f"{name} finds other examples than before: raise its version in utils.evaluation.ATTACK_VERSIONS, and record "
        f"{digest} for it here"
    )


def test_each_attack_has_a_version():
    assert ATTACK_VERSIONS.keys() == ATTACKS.keys()
