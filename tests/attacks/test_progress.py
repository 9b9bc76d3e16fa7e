"""Attacks report how far they are, and nothing changes by that."""

import contextlib
from itertools import pairwise

import pytest
import torch

from attacks import autoattack, pgd
from attacks.progress import listener
from tests.helpers.attacked import model_and_images


@contextlib.contextmanager
def listening():
    """The list of the fractions that are reported meanwhile."""
    fractions = []
    token = listener.set(fractions.append)
    yield fractions
    listener.reset(token)


def assert_sound(fractions):
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] <= fractions[-1] <= 1


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("epsilon", [0, 0.02, 1])  # at 0 no image stops early, at 1 all images do
def test_pgd_reports_each_step_of_each_restart(epsilon, early_stop):
    model, images, labels = model_and_images("cnn")
    attack = {"epsilon": epsilon, "steps": 5, "restarts": 3, "early_stop": early_stop}
    labels = model.eval()(images).argmax(1)
    expected = pgd(model, images, labels, **attack)
    with listening() as fractions:
        assert torch.equal(pgd(model, images, labels, **attack), expected)
    assert_sound(fractions)
    assert sorted(set(fractions)) == pytest.approx([step / 15 for step in range(16)][: len(set(fractions))])
    assert (fractions[-1] == 1) == (not early_stop or epsilon < 1)


def test_autoattack_reports_each_pass():
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    model, images, _ = model_and_images("cnn", size=32, count=2)
    labels = model.eval()(images).argmax(1)
    attack = {"epsilon": 1e-6, "attacks": ("apgd-ce", "square"), "queries": 200}
    expected = autoattack(model, images, labels, **attack)
    with listening() as fractions:
        assert torch.equal(autoattack(model, images, labels, **attack), expected)
    assert_sound(fractions)
    assert max(after - before for before, after in pairwise(fractions)) < 0.01
    assert fractions[-1] == 1
