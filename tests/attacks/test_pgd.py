"""PGD equals its definition, written out plainly, with every option. test_attacks.py checks its other promises."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import AttackError, fgsm, pgd, pgd_iterates, strong
from attacks.core import margin
from attacks.norms import noise_source
from attacks.state import remembering
from tests.helpers.attacked import model_and_images


def clipped(x, image, epsilon, norm):
    """x brought back into the ball, and then into [0, 1]."""
    if norm == "linf":
        return torch.max(torch.min(x, image + epsilon), image - epsilon).clamp(0, 1)
    distance = (x - image).square().sum().sqrt()
    return (x if distance <= epsilon else image + (x - image) * epsilon / distance).clamp(0, 1)


def slow_pgd(
    model, image, label, noises, epsilon, steps, step_size, loss, targeted, early_stop, norm="linf", momentum=0
):
    """For one image: all iterates of all restarts, and then the choice among them."""
    model.eval()
    iterates = [image]
    for noise in noises:
        x = image if noise is None else (image + noise).clamp(0, 1)
        iterates.append(x)
        followed = 0
        for _ in range(steps):
            x = x.detach().requires_grad_()
            value = (-1 if targeted else 1) * loss(model(x[None]), label[None])
            (gradient,) = torch.autograd.grad(value, x)
            if momentum:
                gradient = followed = momentum * followed + gradient / gradient.abs().sum()
            direction = gradient.sign() if norm == "linf" else gradient / gradient.square().sum().sqrt()
            x = clipped(x + step_size * direction, image, epsilon, norm)
            iterates.append(x.detach())
    with torch.no_grad():
        logits = model(torch.stack(iterates))
        labels = label.expand(len(iterates))
        values = (-1 if targeted else 1) * torch.stack([loss(row[None], label[None]) for row in logits])
    success = (logits.argmax(1) == labels) == targeted
    return iterates[success.int().argmax() if early_stop and success.any() else values.argmax()]


def plain_margin(logits, labels):
    (row,), (label,) = logits, labels
    return max(row[k] for k in range(len(row)) if k != label) - row[label]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("restarts", [0, 1, 2])  # 0: from the image itself
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("kind", ["cnn", "lstm"])
def test_equals_its_definition(kind, early_stop, restarts, targeted, loss):
    """With early_stop, the first iterate that succeeds, otherwise the best. The attack succeeds on some images here."""
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
        early_stop=early_stop,
        seed=3,
    )
    rule = F.cross_entropy if loss == "cross_entropy" else plain_margin
    for i, image in enumerate(images):
        own = [noise[i] for noise in noises] or [None]
        expected = slow_pgd(model, image, labels[i], own, epsilon, steps, step_size, rule, targeted, early_stop)
        torch.testing.assert_close(adversarial[i], expected, rtol=0, atol=1e-6)
    success = (model(adversarial).argmax(1) == labels) == targeted
    assert 0 < success.sum() < 12


@pytest.mark.parametrize("momentum", [0, 0.5, 1])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("early_stop", [True, False])
def test_norms_and_momentum_equal_their_definitions(norm, momentum, restarts, early_stop):
    """The steps are so large that they leave the ball."""
    model, images, labels = model_and_images("cnn", count=12)
    model, images = model.eval().double(), images.double()
    labels = model(images).argmax(1)
    epsilon, steps, step_size = (0.004, 4, 0.003) if norm == "linf" else (0.04, 4, 0.03)
    noises, generator = [], torch.Generator().manual_seed(3)
    for _ in range(restarts):
        if norm == "linf":
            noises.append(epsilon * (2 * torch.rand(images.shape, generator=generator).double() - 1))
        else:
            direction = torch.randn(images.shape, generator=generator).double()
            radius = epsilon * torch.rand(12, generator=generator).double() ** (1 / 192)
            noises.append(direction * (radius / direction.square().sum((1, 2, 3)).sqrt())[:, None, None, None])
    options = {"norm": norm, "momentum": momentum, "early_stop": early_stop, "seed": 3, "step_size": step_size}
    options |= {"restarts": max(restarts, 1), "random_start": restarts > 0, "steps": steps}
    adversarial = pgd(model, images, labels, epsilon=epsilon, **options)
    for i, image in enumerate(images):
        own = [noise[i] for noise in noises] or [None]
        shared = (epsilon, steps, step_size, F.cross_entropy, False, early_stop, norm, momentum)
        expected = slow_pgd(model, image, labels[i], own, *shared)
        torch.testing.assert_close(adversarial[i], expected, rtol=0, atol=1e-6)
    assert 0 < (model(adversarial).argmax(1) != labels).sum() < 12


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_image_may_have_a_radius_of_its_own(norm):
    model, images, labels = model_and_images("cnn", count=4)
    radii = torch.tensor([0.0, 0.01, 0.1, 0.9])
    together = pgd(model, images, labels, epsilon=radii, norm=norm, early_stop=False, steps=3)
    for i, radius in enumerate(radii.tolist()):
        alone = pgd(model, images, labels, epsilon=radius, norm=norm, early_stop=False, steps=3)[i]
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="epsilon"):
        pgd(model, images, labels, epsilon=-radii, norm=norm)


def test_random_starts_fill_the_l2_ball_evenly():
    """In two dimensions, a quarter of a disc lies within half of its radius, and a quarter in each quadrant."""
    noise = next(noise_source(torch.zeros(4000, 1, 1, 2), 1.2, 0, "l2")).flatten(1)
    distance = noise.norm(dim=1)
    assert distance.max() <= 1.2 + 1e-6
    assert (distance < 0.6).float().mean() == pytest.approx(0.25, abs=0.03)
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        assert (noise.sign() == torch.tensor(signs)).all(1).float().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("factor", [1, 1e-30])
def test_l2_reaches_the_exact_maximum_for_two_classes(factor):
    """For a linear classifier, the worst case is a step along its slope, however small the gradient is."""
    torch.manual_seed(0)
    slope = torch.randn(12).double()
    images, labels = 0.4 + 0.2 * torch.rand(20, 3, 2, 2).double(), torch.zeros(20, dtype=torch.int64)

    def model(x):
        z = factor * ((x - 0.5).flatten(1) @ slope.to(x)) - factor
        return torch.stack([torch.zeros_like(z), z], 1)

    for x in (images, images.float()):
        with torch.no_grad():
            expected = model(x)[:, 1] + factor * 0.1 * slope.norm().to(x)
        options = {"epsilon": 0.1, "norm": "l2", "loss": "margin", "early_stop": False, "step_size": 10}
        for adversarial in (pgd(model, x, labels, **options), fgsm(model, x, labels, epsilon=0.1, norm="l2")):
            torch.testing.assert_close(model(adversarial)[:, 1], expected, rtol=1e-3, atol=1e-4 * factor)


@pytest.mark.parametrize("targeted", [False, True])
def test_one_step_of_length_epsilon_is_fgsm_in_l2(targeted):
    model, images, labels = model_and_images("cnn", count=20)
    options = {"epsilon": 0.3, "norm": "l2", "targeted": targeted}
    adversarial = fgsm(model, images, labels, **options)
    for i, image in enumerate(images):
        x = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model.eval()(x), labels[i : i + 1]), x)
        expected = image + (-0.3 if targeted else 0.3) * gradient[0] / gradient.norm()
        torch.testing.assert_close(adversarial[i], expected.clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targeted", [False, True])
def test_without_early_stop_the_result_is_the_best_of_all_iterates_and_the_default_stops(targeted):
    model, images, labels = model_and_images("cnn", count=20)
    labels[::2] = model.eval()(images).argmax(1)[::2]
    sign = -1 if targeted else 1
    seen = []

    def recording(x):
        logits = model(x)
        seen.append(sign * F.cross_entropy(logits, labels, reduction="none").detach())
        return logits

    options = {"epsilon": 0.03, "steps": 4, "restarts": 2, "targeted": targeted}
    with remembering(recording, ()):  # which saves the passes that look for randomness
        adversarial = pgd(recording, images, labels, early_stop=False, **options)
    assert [len(losses) for losses in seen] == [20] * (1 + 2 * 5)  # the image itself, then x_0 to x_4 twice
    reached = sign * F.cross_entropy(model(adversarial), labels, reduction="none")
    torch.testing.assert_close(reached, torch.stack(seen).amax(0))
    assert (adversarial - images).abs().max() <= 0.03 + 1e-6
    stopping = pgd(model, images, labels, **options)
    assert torch.equal(stopping, pgd(model, images, labels, early_stop=True, **options))
    assert (sign * F.cross_entropy(model(stopping), labels, reduction="none") <= reached + 1e-6).all()
    success = [(model(x).argmax(1) == labels) == targeted for x in (stopping, adversarial)]
    assert success[0].sum() >= success[1].sum() > 0


def test_image_that_the_network_misclassifies_moves_only_without_early_stop():
    """Such an image would otherwise be sent to another network as it is."""
    model, images, labels = model_and_images("cnn", count=8)
    labels = (model.eval()(images).argmax(1) + 1) % 10
    assert torch.equal(pgd(model, images, labels, epsilon=0.03), images)
    moved = pgd(model, images, labels, epsilon=0.03, early_stop=False)
    assert ((moved - images).abs().flatten(1).amax(1) > 0.02).all()
    before, after = (F.cross_entropy(model(x), labels, reduction="none") for x in (images, moved))
    assert (after > before).all()


def test_image_that_succeeds_without_a_gradient_is_not_warned_of():
    """It does not withstand the attack, so the missing gradient hides nothing."""
    logits = torch.eye(10)[[3, 3]]
    flat = lambda x: logits[: len(x)] + 0 * x.sum((1, 2, 3))[:, None]  # noqa: E731
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(pgd(flat, images, torch.tensor([1, 2]), epsilon=0.1, early_stop=False), images)
    with pytest.warns(RuntimeWarning, match="zero in every pixel"):
        pgd(flat, images, torch.tensor([1, 3]), epsilon=0.1, early_stop=False)


def test_iterates_start_where_asked_and_stay_in_the_ball():
    images, start = torch.full((1, 1, 1, 3), 0.5), torch.tensor([[[[0.5, 0.6, 0.4]]]])
    gradients = iter([torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.0, 1.0, 5.0])])
    iterates = list(pgd_iterates(images, start, lambda _: next(gradients), epsilon=0.25, sizes=[0.2, 0.2]))
    expected = torch.tensor([[0.5, 0.6, 0.4], [0.7, 0.75, 0.25], [0.7, 0.75, 0.45]])
    torch.testing.assert_close(torch.cat(iterates).flatten(1), expected)


def test_margin_is_the_best_other_logit_minus_the_labels():
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
    assert torch.equal(adversarial, raised)  # at so small a radius, the step raises every image's loss


def test_reaches_the_exact_maximum_for_two_classes():
    """For two classes, a linear classifier has a constant slope, so the worst case is a known corner of the ball."""
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


def test_misclassified_images_leave_the_batch():
    model, images, labels = model_and_images("cnn", count=20)
    labels[:12] = model.eval()(images).argmax(1)[:12]
    seen = []

    def counting(x):
        seen.append(len(x))
        return model(x)

    with remembering(counting, ()):
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
    labels[3] = (labels[3] + 1) % 10  # already misclassified, so it stops at once
    assert torch.equal(pgd(model, images, labels, epsilon=0.005, steps=2, seed=1)[4:], first[4:])


@pytest.mark.parametrize("lacking", [True, False])
def test_a_device_without_bfloat16_is_one_line_and_other_errors_stay(lacking):
    def model(x):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive descriptor for the LSTM" if lacking else "something else")
        return x.flatten(1)[:, :3]

    images = torch.rand(2, 3, 4, 4)
    labels = model(images).argmax(1)
    expected = (AttackError, "cannot compute the model in bfloat16: choose float32") if lacking else (RuntimeError, "e")
    with pytest.raises(expected[0], match=expected[1]) as raised:
        pgd(model, images, labels, epsilon=0.1, precision="bfloat16")
    assert isinstance(raised.value, AttackError) == lacking


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_in_bfloat16_of_a_model_of_another_type(dtype):
    torch.manual_seed(0)
    model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).to(dtype), torch.rand(6, 3, 8, 8)
    images = images.to(dtype)
    labels = model(images).argmax(1)
    adversarial = pgd(model, images, labels, epsilon=0.3, steps=5, precision="bfloat16")
    assert adversarial.dtype == dtype
    assert not (model(adversarial).argmax(1) == labels).any()


@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
@pytest.mark.parametrize("attack", [partial(pgd, steps=10, loss="margin"), partial(strong, steps=5)])
def test_gradients_in_bfloat16_and_success_in_float32(attack):
    """In bfloat16, this model seems to be wrong about every image, with the same gradient of the margin."""
    model, images, _ = model_and_images("cnn", count=100)
    labels = model.eval()(images).argmax(1)
    label = int(labels.mode().values)
    images, labels = images[labels == label], labels[labels == label]
    precisions = []

    def liar(batch):
        logits = model(batch)
        precisions.append(logits.dtype)
        return logits - 100 * (torch.arange(10) == label) * torch.is_autocast_enabled("cpu")

    def left(model, **options):
        adversarial = attack(model, images, labels, epsilon=0.004, **options)
        assert (adversarial - images).abs().max() <= 0.004 + 1e-6
        return (model(adversarial).argmax(1) == labels).sum().item()

    plain = left(model)
    with remembering(liar, ()):
        assert left(liar, precision="bfloat16") == pytest.approx(plain, abs=1)
    assert set(precisions) == {torch.float32, torch.bfloat16}
    assert 0 < plain < len(images)
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16, not 'float16'"):
        left(model, precision="float16")


def test_margin_climbs_where_cross_entropy_is_flat():
    """The logits are so large that the softmax rounds to 1 and the gradient of cross-entropy is exactly 0."""
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
        ({"momentum": -0.1}, "momentum must be from 0 to 2"),
        ({"momentum": 2.1}, "momentum must be from 0 to 2"),
        ({"momentum": float("nan")}, "momentum must be from 0 to 2"),
        ({"norm": "l1"}, "norm must be one of linf, l2, not 'l1'"),
    ],
)
def test_bad_options_are_refused(options, message):
    model, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match=message):
        pgd(model, images, labels, epsilon=0.1, **options)
