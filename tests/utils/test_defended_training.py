"""Trainings with a defence: the kept epoch, the warning of overfitting, and resuming."""

import json
from dataclasses import dataclass

import pytest
import torch
from msgspec.structs import replace

from defenses import DEFENSES, FGSM, NFGSM, cross_entropy
from utils.checkpoints import load_checkpoint, read_metadata
from utils.evaluation import evaluate
from utils.recipes import RECIPES
from utils.runs import USUAL_OPTIONS
from utils.training import train
from utils.validation import RobustValidation

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
    assert first["defense"] == {"name": "n-fgsm", "epsilon": 0.05, "noise": 2.0, **USUAL_OPTIONS}
    best = max(epochs, key=lambda epoch: epoch["choosing_accuracy"])
    metadata = read_metadata(output)
    assert metadata.epochs == best["epoch"]
    assert metadata.robust_accuracy == best["robust_accuracy"]
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
    """A defence that after some steps teaches wrong labels."""

    epsilon: float
    steps: int
    name = "forgetful"

    def __call__(self, model, images, labels):
        done = model.features[0][2].num_batches_tracked
        return cross_entropy(model, images, labels if done < self.steps else (labels + 1) % 10)


@pytest.mark.slow
def test_epoch_before_a_divergence_is_kept_without_a_warning_of_overfitting(digits, tmp_path, capsys):
    output = tmp_path / "a.safetensors"
    recipe = replace(RECIPE, epochs=8, batch_size=30, average=0.0)
    network = run(digits, output, Forgetful(0.001, steps=60), recipe)
    _, *epochs = log(output)
    assert read_metadata(output).epochs <= 6
    assert epochs[-1]["robust_accuracy"] < 0.3 < epochs[5]["robust_accuracy"]
    assert "overfitting" not in capsys.readouterr().err
    assert evaluate(network, digits["test"], "fgsm", 0.0).accuracy > 0.5


@pytest.mark.slow
def test_catastrophic_overfitting_of_fgsm_is_named(digits, tmp_path, capsys):
    """At so large a radius, a network learns one step of FGSM by heart."""
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


@pytest.mark.parametrize("name", ["n-fgsm", pytest.param("trades", marks=pytest.mark.slow)])  # both draw noise
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
