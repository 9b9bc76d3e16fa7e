"""Defences: what they craft, what they leave alone, and which epoch of a defended training is kept."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace

from defenses.losses import DEFENSES, FGSM, NFGSM, PGD, TRADES
from tests.helpers.attacked import model_and_images
from utils.checkpoints import load_checkpoint, read_metadata
from utils.evaluation import evaluate
from utils.recipes import RECIPES
from utils.training import cross_entropy, train
from utils.validation import RobustValidation

EPSILON = 0.03


def normalised_by_the_batch(model):
    """A copy that normalises by the batch and drops nothing, whose statistics and parameters nobody looks at."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.track_running_stats = False
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    return model.train()


def gradient(model, images, labels, loss=F.cross_entropy):
    images = images.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(model(images), labels), images)[0]


@pytest.fixture
def attacked():
    model, images, labels = model_and_images("cnn", count=16)
    return normalised_by_the_batch(model), images, labels


def test_fgsm_is_cross_entropy_on_one_step(attacked):
    model, images, labels = attacked
    adversarial = (images + EPSILON * gradient(model, images, labels).sign()).clamp(0, 1)
    expected = F.cross_entropy(model(adversarial), labels)
    torch.testing.assert_close(FGSM(EPSILON)(model, images, labels), expected)


def test_n_fgsm_steps_from_noise_of_two_epsilon_and_clips_nothing(attacked):
    model, images, labels = attacked
    images = images.round()  # to the ends of the range, so that clipping would show
    torch.manual_seed(0)
    noisy = images + 2 * EPSILON * (2 * torch.rand_like(images) - 1)
    expected = F.cross_entropy(model(noisy + EPSILON * gradient(model, noisy, labels).sign()), labels)
    torch.manual_seed(0)
    torch.testing.assert_close(NFGSM(EPSILON)(model, images, labels), expected)


def test_crafting_in_evaluation_mode_normalises_by_the_statistics_so_far():
    model, images, labels = model_and_images("cnn", count=16)
    model = model.eval()
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.train()  # as in a training step, with no dropout
    adversarial = images + EPSILON * gradient(copy.deepcopy(model).eval(), images, labels).sign()
    expected = F.cross_entropy(normalised_by_the_batch(model)(adversarial.clamp(0, 1)), labels)
    torch.testing.assert_close(FGSM(EPSILON, crafting="evaluation")(model, images, labels), expected)


def climbed(model, images, labels, steps, loss):
    """PGD from random noise drawn as the defence draws it."""
    x = (images + EPSILON * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    for _ in range(steps):
        x = x + 2.5 * EPSILON / steps * gradient(model, x, labels, loss).sign()
        x = torch.max(torch.min(x, images + EPSILON), images - EPSILON).clamp(0, 1)
    return x


def test_pgd_is_cross_entropy_on_its_iterate(attacked):
    model, images, labels = attacked
    torch.manual_seed(0)
    expected = F.cross_entropy(model(climbed(model, images, labels, 3, F.cross_entropy)), labels)
    torch.manual_seed(0)
    torch.testing.assert_close(PGD(EPSILON, steps=3)(model, images, labels), expected)


def test_trades_weighs_the_divergence_between_image_and_example():
    model, images, labels = model_and_images("lstm", count=16)  # no batch norm: both halves are their own
    clean = model(images).softmax(1).detach()

    def divergence(logits, _):
        return (clean * (clean.log() - logits.log_softmax(1))).sum()

    torch.manual_seed(0)
    adversarial = climbed(model, images, labels, 3, divergence)
    natural, answer = model(images), model(adversarial)
    robust = (natural.softmax(1) * (natural.log_softmax(1) - answer.log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(natural, labels) + 4 * robust
    torch.manual_seed(0)
    loss = TRADES(EPSILON, steps=3, beta=4)(model, images, labels)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("crafting", ["training", "evaluation"])
@pytest.mark.parametrize("name", DEFENSES)
def test_statistics_see_the_training_batch_alone(name, crafting):
    """Crafting leaves no trace: as many batches are counted as the loss itself looks at, and gradients are its own."""
    model, images, labels = model_and_images("cnn", count=16)
    model.train()
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    before = norm.num_batches_tracked.item()
    DEFENSES[name](EPSILON, crafting=crafting)(model, images, labels).backward()
    assert norm.num_batches_tracked.item() == before + (2 if name == "trades" else 1)  # images and examples
    assert norm.track_running_stats
    assert norm.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.training
    assert images.grad is None


@pytest.mark.parametrize("crafting", ["training", "evaluation"])
@pytest.mark.parametrize("name", DEFENSES)
def test_model_is_left_as_it_was_found_by_an_error_too(name, crafting):
    model, images, labels = model_and_images("cnn", count=4)
    model.train()
    frozen = torch.nn.BatchNorm2d(3).eval()  # a mode and a way of its own
    untracked = torch.nn.BatchNorm2d(3, track_running_stats=False)
    model = torch.nn.Sequential(frozen, untracked, model)

    def state():
        return (
            [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
        )

    before = state()
    DEFENSES[name](EPSILON, crafting=crafting)(model, images, labels)
    assert state() == before

    def fail(module, inputs):
        raise RuntimeError("no answer")

    model[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no answer"):
        DEFENSES[name](EPSILON, crafting=crafting)(model, images, labels)
    assert state() == before


RECIPE = replace(RECIPES["one-cycle"], epochs=4, lr=0.05, average=0.8, label_smoothing=0)


def run(digits, output, defense, recipe=RECIPE, **options):
    training = digits["train"].first(300)
    return train(
        "cnn", training, digits["validation"], recipe, output=output, width=4, quiet=True, defense=defense, **options
    )


def log(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def test_best_epoch_is_kept_and_scores_what_the_log_says(digits, tmp_path):
    output = tmp_path / "a.safetensors"
    network = run(digits, output, NFGSM(0.05))
    first, *epochs = log(output)
    assert first["defense"] == {"name": "n-fgsm", "epsilon": 0.05, "noise": 2.0, "crafting": "training"}
    best = max(epochs, key=lambda epoch: epoch["choosing_accuracy"])
    metadata = read_metadata(output)
    assert metadata["epochs"] == best["epoch"]
    assert metadata["robust_accuracy"] == best["robust_accuracy"]
    watched, others = digits["validation"].first(60), digits["validation"].between(60, 300)
    for kept in (network, load_checkpoint(output)):
        for split, loss, name in (
            (watched, "cross_entropy", "robust_accuracy"),
            (others, "margin", "choosing_accuracy"),
        ):
            options = {"steps": 10, "loss": loss}
            assert evaluate(kept, split, "pgd", 0.05, options=options).accuracy == best[name]


@dataclass(frozen=True)
class Forgetful:
    """A defence after which, from some step on, the network is worthless."""

    epsilon: float
    steps: int
    name = "forgetful"

    def __call__(self, model, images, labels):
        done = model.features[0][2].num_batches_tracked
        return cross_entropy(model, images, labels if done < self.steps else (labels + 1) % 10)


def test_epoch_before_a_divergence_is_kept_and_nothing_said_of_overfitting(digits, tmp_path, capsys):
    output = tmp_path / "a.safetensors"
    recipe = replace(RECIPE, epochs=8, batch_size=30, average=0.0)
    network = run(digits, output, Forgetful(0.001, steps=60), recipe)
    _, *epochs = log(output)
    assert read_metadata(output)["epochs"] <= 6
    assert epochs[-1]["robust_accuracy"] < 0.3 < epochs[5]["robust_accuracy"]
    assert "overfitting" not in capsys.readouterr().err
    assert evaluate(network, digits["test"], "fgsm", 0.0).accuracy > 0.5


def test_catastrophic_overfitting_of_fgsm_is_named(digits, tmp_path, capsys):
    """A real one: at a radius as large as this, one step of FGSM is learnt by heart."""
    recipe = replace(RECIPES["one-cycle"].with_defense(), epochs=12, shift=0)
    network = train(
        "cnn",
        digits["train"],
        digits["validation"],
        recipe,
        output=tmp_path / "a.safetensors",
        width=8,
        quiet=True,
        defense=FGSM(0.5),
    )
    assert "catastrophic overfitting in epoch" in capsys.readouterr().err
    assert network.training is False


@pytest.mark.parametrize("name", DEFENSES)
def test_defended_run_is_resumed_bit_for_bit(name, digits, tmp_path, monkeypatch):
    defense = DEFENSES[name](0.05)
    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    run(digits, whole, defense)
    validate, epochs = RobustValidation.__call__, []

    def interrupted(self, network):
        epochs.append(validate(self, network))
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return epochs[-1]

    monkeypatch.setattr(RobustValidation, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(digits, halves, defense)
    monkeypatch.undo()
    assert not halves.exists()
    torch.rand(3)
    run(digits, halves, defense, resume=True)
    assert halves.read_bytes() == whole.read_bytes()
