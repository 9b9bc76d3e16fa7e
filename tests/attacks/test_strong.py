"""The multi-targeted attack equals its definition, and only images that withstand a target go on to the next."""

import math

import pytest
import torch

from attacks import multi_targeted, pgd, strong
from attacks.core import margin
from attacks.state import remembering
from tests.helpers.attacked import model_and_images


def slow_multi_targeted(model, image, label, noises, epsilon, steps):
    """For one image: the first iterate that is misclassified, or the one of largest margin. noises: for each target."""
    logits = model.eval()(image[None])
    best, best_margin = image, margin(logits, label[None]).item()
    targets = [target for target in logits[0].argsort(descending=True) if target != label]
    for target, noise in zip(targets, noises, strict=True):
        if best_margin > 0:
            continue
        x = (image + noise).clamp(0, 1)
        for number in range(steps + 1):
            x = x.detach().requires_grad_()
            logits = model(x[None])
            value = margin(logits, label[None]).item()
            if value > best_margin:
                best, best_margin = x.detach(), value
            if value > 0 or number == steps:
                break
            (gradient,) = torch.autograd.grad(logits[0, target] - logits[0, label], x)
            size = epsilon / 2 * (1 + math.cos(math.pi * number / steps)) / 2
            x = torch.max(torch.min(x + size * gradient.sign(), image + epsilon), image - epsilon).clamp(0, 1)
    return best


@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_equals_its_definition(kind):
    model, images, labels = model_and_images(kind, count=12)
    model, images = model.double(), images.double()
    labels = model.eval()(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # an image that is misclassified before the attack
    epsilon = 0.01 if kind == "cnn" else 0.1
    adversarial = multi_targeted(model, images, labels, epsilon=epsilon, steps=4, seed=3)
    generator = torch.Generator().manual_seed(3)
    noises = [2 * epsilon * torch.rand(images.shape, generator=generator).double() - epsilon for _ in range(9)]
    for i, image in enumerate(images):
        own = [noise[i] for noise in noises]
        expected = slow_multi_targeted(model, image, labels[i], own, epsilon, 4)
        torch.testing.assert_close(adversarial[i], expected, rtol=0, atol=1e-6)
    assert 1 < (model(adversarial).argmax(1) != labels).sum() < 12
    assert torch.equal(adversarial[0], images[0])


def test_only_images_that_withstand_a_target_go_on_to_the_next():
    seen = []

    def model(images):
        seen.append(len(images))
        pixels = images.flatten(1)
        # Class 0 until a pixel is above 0.5. The first image falls to its nearest class 1, the second to class 2.
        return torch.stack([0.5 + 0 * pixels[:, 0], pixels[:, 0], pixels[:, 1]], 1)

    images = torch.tensor([[0.45, 0.1], [0.1, 0.45], [0.1, 0.1]]).view(3, 2, 1, 1)
    labels = torch.zeros(3, dtype=torch.int64)
    with remembering(model, ()):
        adversarial = multi_targeted(model, images, labels, epsilon=0.1, steps=10, seed=0)
    asked = list(seen)
    assert model(adversarial).argmax(1).tolist() == [1, 2, 0]
    assert asked[:2] == [3, 3]  # the images themselves, then each goes for its most likely class
    assert asked[-10:] == [1] * 10  # only the third image goes for its second target
    assert asked == sorted(asked, reverse=True)


def test_each_attack_of_the_cascade_gets_what_withstood_the_one_before():
    model, images, labels = model_and_images("cnn", count=60)
    labels = model.eval()(images).argmax(1)
    seen = []

    def counted(batch):
        seen.append(len(batch))
        return model(batch)

    options = {"epsilon": 0.008, "seed": 1}
    with remembering(counted, ()):
        adversarial = strong(counted, images, labels, steps=20, **options)
    assert seen == sorted(seen, reverse=True)
    left = (model(adversarial).argmax(1) == labels).sum()
    # The images twice and one step; ten steps from noise; then nine targets, with 21 iterates each.
    assert seen[:3] == [60, 60, 60]
    assert len(seen) == 3 + 11 + 9 * 21
    assert seen[-1] == left
    by_margin = pgd(model, images, labels, loss="margin", steps=10, **options)
    assert 0 < left <= (model(by_margin).argmax(1) == labels).sum() <= seen[3] < 60


@pytest.mark.parametrize("attack", [multi_targeted, strong])
def test_without_early_stop_all_images_go_through_to_the_largest_margin(attack):
    model, images, labels = model_and_images("cnn", count=20)
    labels = model.eval()(images).argmax(1)
    margins = [
        margin(model(attack(model, images, labels, epsilon=0.02, steps=5, early_stop=stop)), labels)
        for stop in (True, False)
    ]
    assert (margins[0] > 0).any()
    assert (margins[1] >= margins[0] - 1e-6).all()
    assert margins[1].mean() > margins[0].mean()


def test_of_many_classes_the_nine_most_likely_are_targets():
    asked = set()

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            asked.update((gradient > 0).nonzero()[:, 1].tolist())
            return gradient

    def model(images):
        return Recorded.apply(images.flatten(1) * torch.linspace(1, 2, 12))

    images = torch.full((1, 12, 1, 1), 0.5)
    multi_targeted(model, images, torch.tensor([11]), epsilon=0.001, steps=1)
    assert asked == set(range(2, 11))


def test_it_finds_what_the_margin_does_not():
    """The margin follows the class that is nearest at first, which never comes near enough. Another one does."""

    def model(images):
        x = images.flatten(1)
        near = 0.4 - (x[:, 0] - 0.55).abs()
        far = 6 * x[:, 1] - 3.1
        return torch.stack([0.45 + 0 * near, near, far], 1)

    images, labels = torch.full((1, 2, 1, 1), 0.5), torch.tensor([0])
    options = {"epsilon": 0.1, "steps": 50}
    assert model(pgd(model, images, labels, loss="margin", random_start=False, **options)).argmax() == 0
    assert model(multi_targeted(model, images, labels, **options)).argmax() == 2


@pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}])
def test_refuses_invalid_options(options):
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match="steps and restarts must be at least 1"):
        multi_targeted(model, images, labels, epsilon=0.1, **options)


def test_in_l2_it_stays_in_the_ball_and_breaks_what_pgd_breaks():
    model, images, labels = model_and_images("cnn", count=30)
    labels = model.eval()(images).argmax(1)
    adversarial = multi_targeted(model, images, labels, epsilon=0.05, norm="l2")
    assert ((adversarial - images).flatten(1).norm(dim=1) <= 0.05 + 1e-6).all()
    by_pgd = pgd(model, images, labels, epsilon=0.05, norm="l2")
    left, left_by_pgd = ((model(x).argmax(1) == labels).sum() for x in (adversarial, by_pgd))
    assert left <= left_by_pgd < 30


def test_more_restarts_break_no_fewer_images():
    model, images, labels = model_and_images("cnn", count=50)
    labels = model.eval()(images).argmax(1)
    left = [
        int(
            (model(multi_targeted(model, images, labels, epsilon=0.004, steps=5, restarts=r)).argmax(1) == labels).sum()
        )
        for r in (1, 3)
    ]
    assert 0 < left[1] <= left[0] < 50
