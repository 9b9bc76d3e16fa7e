"""Diagnostics: three kinds of network get the verdict they deserve, and masked gradients are caught."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from utils.adversarial import AugmentedSplit
from utils.checkpoints import load_checkpoint
from utils.defenses import NFGSM
from utils.diagnostics import diagnose
from utils.evaluation import fgsm_direction
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


class Saturated(nn.Module):
    """The same decisions, with logits so far apart that the cross-entropy's gradient is zero to rounding."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return 1000 * self.network(images)


class Shattered(nn.Module):
    """The same network behind a ripple of a pixel's height: its gradient points anywhere, its decisions stay."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images + 0.004 * (2000 * images).sin())


@pytest.mark.parametrize("masked", [Saturated, Shattered])
def test_masked_gradients_are_caught(masked, baseline, other, digits):
    diagnosis = diagnosed(masked(baseline), digits, other)
    assert diagnosis.verdict.startswith("not trustworthy")
