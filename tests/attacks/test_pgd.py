"""PGD against a plain rewriting of its definition, and its options; its other promises are in test_attacks.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import fgsm, pgd
from attacks.core import margin
from tests.helpers.attacked import model_and_images


def slow_pgd(model, image, label, noises, epsilon, steps, step_size, loss, targeted):
    """One image, every iterate of every restart in full, and then the choice among them."""
    model.eval()
    iterates = [image]
    for noise in noises:
        x = image if noise is None else (image + noise).clamp(0, 1)
        iterates.append(x)
        for _ in range(steps):
            x = x.detach().requires_grad_()
            value = (-1 if targeted else 1) * loss(model(x[None]), label[None])
            (gradient,) = torch.autograd.grad(value, x)
            x = torch.max(torch.min(x + step_size * gradient.sign(), image + epsilon), image - epsilon).clamp(0, 1)
            iterates.append(x.detach())
    with torch.no_grad():
        logits = model(torch.stack(iterates))
        labels = label.expand(len(iterates))
        values = (-1 if targeted else 1) * torch.stack([loss(row[None], label[None]) for row in logits])
    success = (logits.argmax(1) == labels) == targeted
    return iterates[success.int().argmax() if success.any() else values.argmax()]


def plain_margin(logits, labels):
    (row,), (label,) = logits, labels
    return max(row[k] for k in range(len(row)) if k != label) - row[label]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("restarts", [0, 1, 2])  # 0: from the image itself
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_equals_its_definition(kind, restarts, targeted, loss):
    """Of each image the first iterate that succeeds, else the best: some succeed here and some do not."""
    model, images, labels = model_and_images(kind, count=12)
    model, images = model.double(), images.double()
    labels[::2] = model.eval()(images).argmax(1)[::2]
    epsilon, steps, step_size = (0.01 if kind == "cnn" else 0.15), 4, 0.01
    generator = torch.Generator().manual_seed(3)
    noises = [2 * epsilon * torch.rand(images.shape, generator=generator).double() - epsilon for _ in range(restarts)]
    adversarial = pgd(
        model,
        images,
        labels,
        epsilon=epsilon,
        steps=steps,
        step_size=step_size,
        restarts=max(restarts, 1),
        random_start=restarts > 0,
        loss=loss,
        targeted=targeted,
        seed=3,
    )
    rule = F.cross_entropy if loss == "cross_entropy" else plain_margin
    for i, image in enumerate(images):
        own = [noise[i] for noise in noises] or [None]
        expected = slow_pgd(model, image, labels[i], own, epsilon, steps, step_size, rule, targeted)
        torch.testing.assert_close(adversarial[i], expected, rtol=0, atol=1e-6)
    success = (model(adversarial).argmax(1) == labels) == targeted
    assert 0 < success.sum() < 12


def test_margin_is_the_best_other_logit_less_the_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 5), torch.randint(5, (20,))
    expected = torch.stack([plain_margin(logits[i : i + 1], labels[i : i + 1]) for i in range(20)])
    assert torch.equal(margin(logits, labels), expected)
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(1) != labels)


def test_one_whole_step_from_the_image_is_fgsm():
    model, images, labels = model_and_images("cnn", count=20)
    labels = model.eval()(images).argmax(1)
    model.train()
    adversarial = pgd(model, images, labels, epsilon=0.05, steps=1, step_size=0.05, random_start=False)
    raised = fgsm(model, images, labels, epsilon=0.05)
    assert torch.equal(adversarial, raised)  # which raises every image's loss at so small a radius


def test_reaches_the_exact_maximum_for_two_classes():
    """There the slope of a linear classifier has one sign everywhere: the worst case is a corner, which is known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    images, labels = 0.3 + 0.4 * torch.rand(50, 3, 2, 2).double(), torch.randint(2, (50,))
    slope = (model[1].weight[1] - model[1].weight[0]).detach() * (1 - 2 * labels[:, None])
    corner = images + 0.1 * slope.sign().view_as(images)
    with torch.no_grad():
        worst = margin(model(corner), labels)
        for loss in ("cross_entropy", "margin"):
            adversarial = pgd(model, images, labels, epsilon=0.1, loss=loss)
            found = margin(model(adversarial), labels)
            assert torch.equal(found > 0, worst > 0)
            torch.testing.assert_close(found[worst <= 0], worst[worst <= 0])
            assert 0 < (worst > 0).sum() < 50


def test_images_that_are_broken_leave_the_batch():
    model, images, labels = model_and_images("cnn", count=20)
    labels[:12] = model.eval()(images).argmax(1)[:12]
    seen = []

    def counting(x):
        seen.append(len(x))
        return model(x)

    adversarial = pgd(counting, images, labels, epsilon=0.03, steps=5, restarts=2)
    wrong_from_the_start = (model(images).argmax(1) != labels).sum()
    assert seen[:2] == [20, 20 - wrong_from_the_start]
    assert seen == sorted(seen, reverse=True)
    assert (model(adversarial).argmax(1) == labels).sum() <= seen[-1] < seen[1]


def test_more_restarts_never_break_less():
    model, images, labels = model_and_images("cnn", count=30)
    labels = model.eval()(images).argmax(1)
    options = {"epsilon": 0.012, "steps": 3}
    broken = [
        model(pgd(model, images, labels, restarts=restarts, **options)).argmax(1) != labels for restarts in (1, 2, 5)
    ]
    assert (broken[0] <= broken[1]).all()
    assert (broken[1] <= broken[2]).all()
    assert 0 < broken[0].sum() < 30


def test_seed_decides_the_noise_whatever_the_batch_loses():
    model, images, labels = model_and_images("cnn", count=8)
    labels = model.eval()(images).argmax(1)
    first, same, other = (pgd(model, images, labels, epsilon=0.005, steps=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    labels[3] = (labels[3] + 1) % 10  # misclassified as it is, so it leaves at once
    assert torch.equal(pgd(model, images, labels, epsilon=0.005, steps=2, seed=1)[4:], first[4:])


@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
def test_margin_climbs_where_cross_entropy_is_flat():
    """Logits so large that the softmax is 1 to rounding: the gradient of the cross-entropy is exactly 0."""
    model, images, labels = model_and_images("cnn", count=20)
    labels = model.eval()(images).argmax(1)
    saturated = lambda x: 1e4 * model(x)  # noqa: E731
    flat = pgd(saturated, images, labels, epsilon=0.1, random_start=False)
    climbed = pgd(saturated, images, labels, epsilon=0.1, random_start=False, loss="margin")
    accuracies = [(model(x).argmax(1) == labels).float().mean().item() for x in (flat, climbed)]
    assert accuracies[1] == 0
    assert accuracies[0] > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": -0.1}, "step_size"),
        ({"step_size": float("nan")}, "step_size"),
        ({"restarts": 2, "random_start": False}, "random_start"),
        ({"loss": "hinge"}, "cross_entropy, margin"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match=message):
        pgd(model, images, labels, epsilon=0.1, **options)
