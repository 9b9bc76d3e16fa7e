"""The smallest radius of each image is that of a real example, and for a linear classifier it is the true one."""

import math

import pytest
import torch

from attacks import minimal_epsilon, pgd
from tests.helpers.attacked import model_and_images


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_distance_to_the_boundary_of_a_linear_classifier(norm):
    torch.manual_seed(0)
    slope = torch.randn(12).double()
    images = 0.3 + 0.4 * torch.rand(20, 3, 2, 2).double()
    model = lambda x: torch.stack([torch.zeros(len(x)).to(x), (x - 0.5).flatten(1) @ slope], 1)  # noqa: E731
    labels = model(images).argmax(1)
    labels[0] = 1 - labels[0]
    found = minimal_epsilon(model, images, labels, norm=norm, step_size=0.5 if norm == "l2" else None)
    expected = model(images)[:, 1].abs() / (slope.abs().sum() if norm == "linf" else slope.norm())
    assert found[0] == 0
    assert (found[1:] >= expected[1:] - 1e-7).all()  # an upper bound
    torch.testing.assert_close(found[1:], expected[1:], rtol=0.03, atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_succeeds_at_the_radius_and_seldom_far_below(norm):
    model, images, labels = model_and_images("cnn", count=20)
    labels = model.eval()(images).argmax(1)
    found = minimal_epsilon(model, images, labels, norm=norm)
    assert found.isfinite().all()
    at, below = (pgd(model, images, labels, epsilon=factor * found, norm=norm, loss="margin") for factor in (1.02, 0.7))
    assert (model(at).argmax(1) != labels).float().mean() > 0.8
    assert (model(below).argmax(1) != labels).float().mean() < 0.2
    assert model.training is False


def test_an_image_that_no_attack_changes_has_infinity():
    def model(x):
        logits = 1 + 0 * x.sum((1, 2, 3))
        return torch.stack([logits, logits - 1, (x[:, 0, 0, 0] > 0.9) * 2.0 + 0 * logits], 1)

    images, labels = torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 0])
    with pytest.warns(RuntimeWarning, match="zero in every pixel"):
        found = minimal_epsilon(model, images, labels, steps=1, random_start=False)
    assert found.tolist() == [math.inf, math.inf]
    with pytest.raises(ValueError, match="rounds must be at least 9"):
        minimal_epsilon(model, images, labels, rounds=8)


def test_it_does_not_miss_a_small_radius_because_the_largest_fails():
    """Class 1 is a narrow stripe, which long steps jump over."""

    def model(x):
        z = x.flatten(1)[:, 0]
        return torch.stack([0.02 + 0 * z, 0.05 - (z - 0.6).abs()], 1)

    images, labels = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    options = {"random_start": False, "step_size": None, "steps": 2}
    assert model(pgd(model, images, labels, epsilon=1.0, **options)).argmax() == 0
    assert 0.07 - 1e-6 <= minimal_epsilon(model, images, labels, **options).item() <= 0.13


def test_refuses_what_pgd_refuses():
    model, images, labels = model_and_images("linear")
    with pytest.raises(TypeError, match="divide grey levels of 0 to 255 by 255"):
        minimal_epsilon(model, (255 * images).byte(), labels)


def test_refuses_targets():
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match="takes no targets"):
        minimal_epsilon(model, images, labels, targeted=True)
