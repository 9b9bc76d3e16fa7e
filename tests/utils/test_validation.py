"""Validation under attack: which images it uses, which epoch it chooses, and when it warns."""

from types import SimpleNamespace

import pytest
from msgspec.structs import replace
from torch import nn

from defenses.losses import FGSM
from utils import validation as robust_validation
from utils.checkpoints import read_metadata
from utils.formats import Epoch
from utils.recipes import RECIPES
from utils.training import train
from utils.validation import RobustValidation, best_epoch, collapse_warning


def epochs(*accuracies):
    """Epochs of these (clean, single-step, PGD) accuracies."""
    return [
        Epoch(
            epoch=number,
            loss=1.0,
            seconds=1.0,
            images_per_second=1,
            validation_accuracy=clean,
            single_step_accuracy=single,
            robust_accuracy=several,
        )
        for number, (clean, single, several) in enumerate(accuracies, start=1)
    ]


def test_collapse_is_to_withstand_one_step_and_not_several():
    healthy, collapsed = (0.6, 0.4, 0.38), (0.7, 0.65, 0.02)
    undefended, diverged, at_chance = (0.9, 0.15, 0.0), (0.1, 0.1, 0.1), (0.1, 0.17, 0.0)
    for rows in ([healthy], [undefended], [diverged], [at_chance], [healthy, diverged], [undefended, undefended]):
        assert collapse_warning(epochs(*rows)) is None
    assert "epoch 1: 65.0% withstand a single step, and 2.0%" in collapse_warning(epochs(collapsed))
    assert "epoch 2" in collapse_warning(epochs(healthy, collapsed))
    assert collapse_warning(epochs(healthy, collapsed, collapsed)) is None  # it warns once
    assert "epoch 4" in collapse_warning(epochs(healthy, collapsed, healthy, collapsed))
    assert collapse_warning(epochs((0.6, None, None))) is None  # a training without a defence


def test_best_epoch_is_the_first_of_the_most_accurate_to_choose_by():
    (entry,) = epochs((0.5, 0.4, 0.3))
    chosen = [replace(entry, epoch=i, choosing_accuracy=accuracy) for i, accuracy in enumerate((0.3, 0.4, 0.4, 0.1))]
    assert best_epoch(chosen).epoch == 1


def test_groups_of_images_do_not_overlap(digits):
    groups = RobustValidation(digits["validation"], 0.1)
    assert (len(groups.watched), len(groups.choosing)) == (60, 240)
    assert groups.watched.digest() == digits["validation"].first(60).digest()
    assert groups.choosing.digest() == digits["validation"].between(60, 300).digest()
    with pytest.raises(ValueError, match="did you mean 8/255"):  # before the training, not after its first epoch
        RobustValidation(digits["validation"], 8)


def test_gradients_of_the_attacks_follow_the_trainings_precision(digits, monkeypatch):
    asked = []

    def evaluated(network, split, attack, epsilon, options=None):
        asked.append((attack, options and options["precision"]))
        return SimpleNamespace(accuracy=0.5)

    monkeypatch.setattr(robust_validation, "evaluate", evaluated)
    RobustValidation(digits["validation"], 0.1, "bfloat16")(nn.Identity())
    RobustValidation(digits["validation"], 0.1)(nn.Identity())
    assert asked == [("fgsm", None), *[("pgd", "bfloat16")] * 2, ("fgsm", None), *[("pgd", "float32")] * 2]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_validation_split_of_a_few_images_serves_a_defended_training(count, digits, tmp_path):
    validation = digits["validation"].first(count)
    groups = RobustValidation(validation, 0.1)
    assert len(groups.watched) == 1
    assert len(groups.choosing) == max(1, count - 1)
    options = {"output": tmp_path / "a.safetensors", "width": 2, "quiet": True, "defense": FGSM(0.1)}
    recipe = replace(RECIPES["one-cycle"], epochs=1, batch_size=20)
    train("cnn", digits["train"].first(40), validation, recipe, **options)
    possible = [hits / len(groups.choosing) for hits in range(count + 1)]
    assert read_metadata(tmp_path / "a.safetensors").choosing_accuracy in possible
