"""Defences: each loss equals its definition, and crafting leaves the network alone."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import DEFENSES, FGSM, NFGSM, NPGD, PGD, TRADES, cross_entropy
from defenses.losses import DEFENSE_LOSSES
from tests.helpers.attacked import model_and_images

EPSILON = 0.03
CRAFTING = ("training", "evaluation")


def network_and_images(count=16):
    """A network in training without dropout, whose batch-norm statistics are far from those of the images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 8 * 8, 10)
    )
    nn.init.uniform_(model[1].running_mean, -0.5, 0.5)
    nn.init.uniform_(model[1].running_var, 0.2, 2)
    return model, torch.rand(count, 3, 8, 8), torch.randint(10, (count,))


# ---- the definitions, written out: crafter is the network as it crafts, trained the network as it learns ----


def gradient(crafter, images, loss):
    images = images.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(crafter(images)), images)[0]


def climbed(crafter, images, steps, loss):
    """PGD's last iterate, from the noise that the defence draws."""
    x = (images + EPSILON * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    for _ in range(steps):
        x = x + 2.5 * EPSILON / steps * gradient(crafter, x, loss).sign()
        x = torch.max(torch.min(x, images + EPSILON), images - EPSILON).clamp(0, 1)
    return x


def summed_margin(logits, labels):
    rivals = logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    return (rivals - logits.gather(1, labels[:, None])[:, 0]).sum()


def summed_sampled(logits, labels):
    others = logits.softmax(1).scatter(1, labels[:, None], 0)
    drawn = (others / torch.empty_like(logits).exponential_()).argmax(1)
    return (logits.gather(1, drawn[:, None]) - logits.gather(1, labels[:, None])).sum()


RAISED = {"cross_entropy": F.cross_entropy, "margin": summed_margin, "sampled": summed_sampled}


def plain_fgsm(crafter, trained, images, labels, raised="cross_entropy", smoothing=0.0):
    ascent = gradient(crafter, images, lambda logits: RAISED[raised](logits, labels)).sign()
    return F.cross_entropy(trained((images + EPSILON * ascent).clamp(0, 1)), labels, label_smoothing=smoothing)


def plain_n_fgsm(crafter, trained, images, labels, raised="cross_entropy", smoothing=0.0):
    noisy = images + 2 * EPSILON * (2 * torch.rand_like(images) - 1)
    ascent = gradient(crafter, noisy, lambda logits: RAISED[raised](logits, labels)).sign()
    return F.cross_entropy(trained(noisy + EPSILON * ascent), labels, label_smoothing=smoothing)


def plain_n_pgd(crafter, trained, images, labels, raised="cross_entropy", smoothing=0.0):
    x = images + EPSILON * (2 * torch.rand_like(images) - 1)
    for _ in range(3):
        x = x + 0.6 * EPSILON * gradient(crafter, x, lambda logits: RAISED[raised](logits, labels)).sign()
    return F.cross_entropy(trained(x), labels, label_smoothing=smoothing)


def plain_pgd(crafter, trained, images, labels, raised="cross_entropy", smoothing=0.0):
    adversarial = climbed(crafter, images, 3, lambda logits: RAISED[raised](logits, labels))
    return F.cross_entropy(trained(adversarial), labels, label_smoothing=smoothing)


def plain_trades(crafter, trained, images, labels):
    clean = crafter(images).softmax(1).detach()
    adversarial = climbed(crafter, images, 3, lambda logits: (clean * (clean.log() - logits.log_softmax(1))).sum())
    natural, attacked = trained(images), trained(adversarial)
    divergence = (natural.softmax(1) * (natural.log_softmax(1) - attacked.log_softmax(1))).sum(1).mean()
    return F.cross_entropy(natural, labels) + 4 * divergence


DEFINITIONS = {
    "fgsm": (FGSM, plain_fgsm),
    "n-fgsm": (NFGSM, plain_n_fgsm),
    "n-pgd": (functools.partial(NPGD, steps=3), plain_n_pgd),
    "pgd": (functools.partial(PGD, steps=3), plain_pgd),
    "trades": (functools.partial(TRADES, steps=3, beta=4), plain_trades),
}
CLIMBING = [name for name in DEFENSES if name != "trades"]
OPTIONS = {name: ({"loss": name}, {"raised": name}) for name in ("margin", "sampled")}
OPTIONS["smoothing"] = ({"smoothing": 0.2}, {"smoothing": 0.2})
DEFINITIONS |= {
    f"{name}, {option}": tuple(functools.partial(one, **how) for one, how in zip(DEFINITIONS[name], hows, strict=True))
    for name in CLIMBING
    for option, hows in OPTIONS.items()
}


@pytest.mark.parametrize("crafting", CRAFTING)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_loss_its_gradient_and_the_statistics_equal_the_definition(name, crafting):
    model, images, labels = network_and_images()
    images[::2] = images[::2].round()  # on the ends of the range, so that clipping shows
    trained, crafter = copy.deepcopy(model), copy.deepcopy(model)
    if crafting == "training":
        crafter[1].track_running_stats = False
    else:
        crafter.eval()
    defense, definition = DEFINITIONS[name]
    torch.manual_seed(1)
    expected = definition(crafter, trained, images, labels)
    torch.manual_seed(1)
    loss = defense(EPSILON, crafting=crafting)(model, images, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for parameter, wanted in zip(model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad)
    for tensor, wanted in zip(model.buffers(), trained.buffers(), strict=True):
        torch.testing.assert_close(tensor, wanted)


@pytest.mark.parametrize("crafting", CRAFTING)
@pytest.mark.parametrize("name", DEFENSES)
def test_crafting_freezes_parameters_and_statistics_in_the_mode_asked_for(name, crafting):
    """The loss itself then runs with everything learning: once, and for TRADES once more."""
    model, images, labels = network_and_images()
    passes = []
    model[1].register_forward_pre_hook(
        lambda norm, _: passes.append((norm.training, norm.track_running_stats, norm.weight.requires_grad))
    )
    DEFENSES[name](EPSILON, crafting=crafting)(model, images, labels)
    learning = 2 if name == "trades" else 1
    assert passes[-learning:] == [(True, True, True)] * learning
    crafted = {"fgsm": 1, "n-fgsm": 1, "n-pgd": 2, "pgd": 7, "trades": 1 + 7}[name]
    assert passes[:-learning] == [(True, False, False) if crafting == "training" else (False, True, False)] * crafted


@pytest.mark.parametrize("crafting", CRAFTING)
@pytest.mark.parametrize("name", DEFENSES)
def test_model_is_left_as_it_was_even_after_an_error(name, crafting):
    model, images, labels = model_and_images("cnn", count=4)
    model.train()
    frozen = nn.BatchNorm2d(3).eval()  # each layer in a state of its own
    frozen.weight.requires_grad_(False)
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    model = nn.Sequential(frozen, untracked, model)

    def state():
        return (
            [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
        )

    before = state()
    DEFENSES[name](EPSILON, crafting=crafting)(model, images, labels).backward()
    assert state() == before
    assert images.grad is None

    def fail(module, inputs):
        raise RuntimeError("no answer")

    model[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no answer"):
        DEFENSES[name](EPSILON, crafting=crafting)(model, images, labels)
    assert state() == before


@pytest.mark.parametrize("name", DEFENSES)
def test_unknown_crafting_is_refused(name):
    model, images, labels = network_and_images(count=2)
    with pytest.raises(ValueError, match="training or evaluation, not 'magic'"):
        DEFENSES[name](EPSILON, crafting="magic")(model, images, labels)


@pytest.mark.parametrize("smoothing", [-0.1, 1, float("nan")])
@pytest.mark.parametrize("name", CLIMBING)
def test_smoothing_out_of_range_is_refused_at_once(name, smoothing):
    with pytest.raises(ValueError, match="smoothing must be from 0 to below 1"):
        DEFENSES[name](EPSILON, smoothing=smoothing)


def test_sampled_draws_another_class_in_proportion_to_its_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    differences = DEFENSE_LOSSES["sampled"](logits, torch.zeros(20_000, dtype=torch.int64))
    drawn = torch.stack([(differences == value).float().mean() for value in (-1, -2, -3)])
    torch.testing.assert_close(drawn, logits[0, 1:].softmax(0), atol=0.02, rtol=0)


def test_sampled_leads_from_the_label_to_the_class_that_is_drawn():
    logits = torch.randn(8, 5, requires_grad=True)
    labels = torch.arange(8) % 5
    DEFENSE_LOSSES["sampled"](logits, labels).sum().backward()
    assert (logits.grad.gather(1, labels[:, None]) == -1).all()
    assert torch.equal(logits.grad.sort(1).values, torch.tensor([-1.0, 0, 0, 0, 1]).expand(8, 5))


@pytest.mark.parametrize(
    ("logits", "expected"), [(torch.zeros(3, 1), 0.0), (torch.full((3, 4), float("nan")), float("nan"))]
)
def test_sampled_takes_one_class_and_logits_of_nan(logits, expected):
    """Training itself names a loss that is not finite."""
    logits.requires_grad_()
    loss = DEFENSE_LOSSES["sampled"](logits, torch.zeros(3, dtype=torch.int64))
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.full((3,), expected), equal_nan=True)
    assert logits.shape[1] > 1 or not logits.grad.any()


@pytest.mark.parametrize("name", CLIMBING)
def test_an_unknown_loss_is_refused_at_once(name):
    with pytest.raises(ValueError, match="one of cross_entropy, margin, sampled, not 'magic'"):
        DEFENSES[name](EPSILON, loss="magic")


@pytest.mark.parametrize("name", DEFENSES)
def test_a_radius_that_is_surely_a_mistake_is_refused_at_once(name):
    with pytest.raises(ValueError, match=r"from 0 to 1, not 8: did you mean 8/255\?"):
        DEFENSES[name](8)
    assert DEFENSES[name](1).epsilon == 1


def test_cross_entropy_is_computed_in_float32_and_smoothed_if_asked():
    logits, labels = torch.randn(6, 4, dtype=torch.bfloat16), torch.randint(4, (6,))
    for smoothing in (0.0, 0.1):
        loss = cross_entropy(lambda _: logits, torch.rand(6, 3, 8, 8), labels, smoothing)
        assert torch.equal(loss, F.cross_entropy(logits.float(), labels, label_smoothing=smoothing))


def test_defaults_are_those_of_the_papers():
    assert (PGD(8 / 255).steps, TRADES(8 / 255).steps, TRADES(8 / 255).beta) == (7, 7, 6)
    assert NFGSM(8 / 255).noise == 2


def test_n_pgd_with_one_step_and_the_noise_of_n_fgsm_is_n_fgsm():
    model, images, labels = network_and_images()
    losses = []
    for defense in (NFGSM(EPSILON), NPGD(EPSILON, steps=1, noise=2, step_size=1)):
        torch.manual_seed(1)
        losses.append(defense(copy.deepcopy(model), images, labels))
    assert torch.equal(*losses)
