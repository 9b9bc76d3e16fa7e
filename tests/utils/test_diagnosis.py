"""Diagnostics: three kinds of network get the verdict they deserve, and masked gradients are caught."""

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from defenses.losses import NFGSM
from utils import diagnosis
from utils.adversarial_sets import AugmentedSplit
from utils.checkpoints import load_checkpoint
from utils.diagnosis import Check, diagnose
from utils.evaluation import Result, fgsm_direction
from utils.recipes import RECIPES
from utils.training import train

EPSILON = 0.1  # on digits, whose strokes are black on white, 8/255 is little


def diagnosed(network, digits, source, examples=100):
    return diagnose(network, digits["test"].first(examples), epsilon=EPSILON, source=source, queries=200)


@pytest.fixture(scope="module")
def baseline(trained):
    return load_checkpoint(trained("cnn"))


@pytest.fixture(scope="module")
def other(trained):
    return load_checkpoint(trained("cnn-lstm"))


def failed(diagnosis):
    return {check.name for check in (*diagnosis.checks, diagnosis.leak) if check.passed is False}


def test_baseline_is_trustworthy_and_about_zero(baseline, other, digits):
    diagnosis = diagnosed(baseline, digits, other)
    assert failed(diagnosis) == set()
    assert diagnosis.verdict == "trustworthy"
    assert diagnosis.strongest.accuracy <= 0.02


def test_papers_defence_leaks_the_label_and_is_about_zero(baseline, digits, tmp_path):
    training = digits["train"]
    images, labels = training.take(torch.arange(len(training)))
    direction = fgsm_direction(baseline, images, labels).to(torch.int8)
    retrained = train(
        "cnn",
        AugmentedSplit(training, direction, 0.2, "0" * 64),
        digits["validation"],
        replace(RECIPES["paper"], epochs=10),
        output=tmp_path / "a.safetensors",
        width=8,
        quiet=True,
    )
    diagnosis = diagnosed(retrained, digits, baseline, examples=300)
    assert diagnosis.verdict.startswith("label leaking")
    assert not diagnosis.trustworthy
    assert diagnosis.strongest.accuracy <= 0.05


def test_adversarial_training_is_trustworthy_and_holds(baseline, digits, tmp_path):
    robust = train(
        "cnn",
        digits["train"],
        digits["validation"],
        replace(RECIPES["paper"], epochs=10),
        output=tmp_path / "a.safetensors",
        width=8,
        defense=NFGSM(EPSILON),
        quiet=True,
    )
    diagnosis = diagnosed(robust, digits, baseline)
    assert failed(diagnosis) == set()
    assert diagnosis.strongest.accuracy > 0.25


class Masked(nn.Module):
    """A network that hides its gradient."""

    def __init__(self, network):
        super().__init__()
        self.network = network


class Saturated(Masked):
    """The same decisions, with logits so far apart that the cross-entropy's gradient is zero to rounding."""

    factor = 1000

    def forward(self, images):
        return self.factor * self.network(images)


class SlightlySaturated(Saturated):
    factor = 50


class Shattered(Masked):
    """The same network behind a ripple of a pixel's height: its gradient points anywhere, its decisions stay."""

    def forward(self, images):
        return self.network(images + 0.004 * (2000 * images).sin())


class Noisy(Masked):
    """The same network behind noise, another in every pass."""

    def forward(self, images):
        return self.network(images + 0.2 * torch.randn_like(images))


@pytest.mark.parametrize(
    ("masked", "signs"),
    [
        (Saturated, {"the gradient is seldom zero", "an unbounded attack reaches 0 %"}),
        (SlightlySaturated, {"the gradient is seldom zero"}),
        (Shattered, {"a gradient-free attack is not stronger"}),
        (Noisy, {"the same image gets the same answer"}),
    ],
)
@pytest.mark.filterwarnings("ignore:AutoAttack. it seems to be a randomized defense")
@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
def test_masked_gradients_are_caught(masked, signs, baseline, other, digits):
    torch.manual_seed(0)
    diagnosis = diagnosed(masked(baseline), digits, other)
    assert diagnosis.verdict.startswith("not trustworthy")
    assert signs <= failed(diagnosis)


def made_up(monkeypatch, **accuracies):
    """What `diagnose` says if attacks leave these accuracies of 100 images; the others leave 30."""
    figures = {
        "clean": 90, "fgsm": 35, "transferred fgsm": 80, "transferred pgd": 70, "radius 0.25": 60, "radius 0.5": 45,
        "pgd": 30, "radius 2": 5, "unbounded": 0, "longer": 29, "margin": 25, "square": 40,
    } | accuracies  # fmt: skip

    def evaluate(network, split, attack, epsilon, *, options=None, source=None, **rest):
        factor = epsilon / EPSILON
        if attack == "autoattack":
            name = "square"
        elif epsilon == 0:
            name = "clean"
        elif source:
            name = f"transferred {attack}"
        elif epsilon == 1:
            name = "unbounded"
        elif attack == "fgsm":
            name = "fgsm"
        elif options["steps"] > diagnosis.STEPS:
            name = "margin" if "loss" in options else "longer"
        else:
            name = "pgd" if factor == 1 else f"radius {factor:g}"
        mask = torch.arange(100) < figures[name]
        return Result(epsilon, figures[name], 100, 0.0, attack, options or {}, mask)

    leak = Check("leak", True, "")
    monkeypatch.setattr(diagnosis, "evaluate", evaluate)
    monkeypatch.setattr(diagnosis, "_leak", lambda *arguments: leak)
    monkeypatch.setattr(diagnosis, "_zero_gradients", lambda *arguments: figures.get("flat", 0.0))
    return diagnose(None, range(100), epsilon=EPSILON, source="another")


@pytest.mark.parametrize(
    ("sign", "figures"),
    [
        ("the gradient is seldom zero", {"flat": 0.03}),
        ("iterative beats single-step", {"fgsm": 29}),
        ("an unbounded attack reaches 0 %", {"unbounded": 1}),
        ("accuracy falls as epsilon grows", {"radius 0.25": 20}),
        ("accuracy falls as epsilon grows", {"radius 0.5": 20}),
        ("accuracy falls as epsilon grows", {"radius 0.25": 30, "radius 0.5": 30, "pgd": 30, "radius 2": 30}),
        ("white-box is at least as strong as transfer", {"transferred fgsm": 29}),
        ("white-box is at least as strong as transfer", {"transferred pgd": 29}),
        ("more steps and restarts change little", {"longer": 20, "margin": 18, "square": 20}),
        ("more steps and restarts change little", {"longer": 41}),
        ("a gradient-free attack is not stronger", {"square": 22}),
    ],
)
def test_each_sign_is_seen_alone(sign, figures, monkeypatch):
    assert failed(made_up(monkeypatch, **figures)) == {sign}


def test_nothing_is_seen_in_healthy_figures_and_all_attacks_together_are_the_strongest(monkeypatch):
    assert failed(made_up(monkeypatch)) == set()
    for weakest in ("fgsm", "transferred fgsm", "transferred pgd", "radius 0.5", "longer", "margin", "square"):
        assert made_up(monkeypatch, **{weakest: 3}).strongest.accuracy == 0.03
    for outside in ("radius 2", "unbounded"):
        assert made_up(monkeypatch, **{outside: 3}).strongest.accuracy == 0.25
