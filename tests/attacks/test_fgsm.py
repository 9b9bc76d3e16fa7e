"""FGSM against its formula; what it promises besides is in test_attacks.py."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import fgsm, fgsm_direction, step
from tests.helpers.attacked import model_and_images

EPSILONS = [0, 1e-4, 1 / 255, Fraction(8, 255), 0.1, 0.9, 1]


# ---- the formula ----


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), epsilon=st.floats(0, 0.5), targeted=st.booleans())
def test_equals_the_closed_form_for_a_linear_softmax_classifier(seed, epsilon, targeted):
    """There, grad_x of the cross-entropy is W^T (softmax(Wx + b) - onehot(y)): computed by numpy in float64."""
    model, images, labels = model_and_images("linear", seed=seed)
    model, images = model.double(), images.double()
    weight, bias = (parameter.detach().numpy() for parameter in model[1].parameters())
    flat = images.flatten(1).numpy()
    logits = flat @ weight.T + bias
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (probabilities - np.eye(10)[labels]) @ weight
    expected = np.clip(flat + (-epsilon if targeted else epsilon) * np.sign(gradient), 0, 1)

    adversarial = fgsm(model, images, labels, epsilon=epsilon, targeted=targeted)

    np.testing.assert_allclose(adversarial.flatten(1).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["cnn", "lstm"])
@pytest.mark.parametrize("seed", range(3))
def test_direction_equals_the_sign_of_central_differences(kind, seed):
    model, images, labels = model_and_images(kind, size=5, count=2, seed=seed)
    model, images = model.double(), images.double()
    direction = fgsm_direction(model, images, labels)
    model.eval()
    h = 1e-5
    for i in range(len(images)):
        steps = h * torch.eye(images[i].numel(), dtype=torch.float64).view(-1, *images[i].shape)
        label = labels[i].expand(len(steps))
        with torch.no_grad():
            up = F.cross_entropy(model(images[i] + steps), label, reduction="none")
            down = F.cross_entropy(model(images[i] - steps), label, reduction="none")
        slope = ((up - down) / (2 * h)).view_as(images[i])
        clear = slope.abs() > 1e-9  # below, the difference is rounding error
        assert clear.float().mean() > 0.8
        assert torch.equal(direction[i][clear], slope[clear].sign())


def test_raises_the_loss_and_targeted_lowers_it():
    model, images, labels = model_and_images("cnn")
    model.eval()

    def loss(x):
        return F.cross_entropy(model(x), labels).item()

    assert loss(fgsm(model, images, labels, epsilon=0.01)) > loss(images)
    assert loss(fgsm(model, images, labels, epsilon=0.01, targeted=True)) < loss(images)


def test_an_image_is_perturbed_alike_whatever_else_is_in_the_batch():
    model, images, labels = model_and_images("cnn", count=6)
    model, images = model.double(), images.double()  # in float32 a slope may be zero to rounding
    together = fgsm_direction(model, images, labels)
    alone = torch.cat([fgsm_direction(model, images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_one_direction_serves_every_epsilon(epsilon):
    model, images, labels = model_and_images("cnn")
    direction = fgsm_direction(model, images, labels)
    adversarial = fgsm(model, images, labels, epsilon=epsilon)
    assert torch.equal(adversarial, (images + float(epsilon) * direction).clamp(0, 1))
    assert torch.equal(adversarial, step(images, direction, epsilon))


def test_network_gets_a_large_batch_in_parts_if_its_class_says_so(monkeypatch):
    """Of other models nobody knows whether they treat each image for itself."""
    model, images, labels = model_and_images("lstm", count=50)
    model.eval()
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = fgsm_direction(model, images, labels)
    monkeypatch.setattr(type(model), "images_at_once", 20, raising=False)
    parts = fgsm_direction(model, images, labels)
    assert sizes == [50, 17, 17, 16]
    assert (parts != whole).float().mean() < 1e-3  # where the gradient is zero but for rounding
