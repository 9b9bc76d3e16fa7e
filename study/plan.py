"""TODO: study.plan."""

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from utils.constants import ARCHITECTURES, checkpoint_stem
from utils.recipes import RECIPES

SPREAD_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Line:
    """A baseline and the networks retrained on its FGSM examples."""

    part: str  # "study", "reproduction" or "spread"
    network: str
    recipes: dict  # training epsilon (None: the baseline) -> Recipe
    seed: int
    folder: Path
    stem: str  # of the baseline's file; the retrained networks' begin with it

    def path(self, epsilon=None):
        return self.folder / (checkpoint_stem(self.stem, epsilon) + ".safetensors")


def lines(dataset, models, scratch, epochs=None):
    """The study's lines. models: folder of the ten networks of its tables; scratch: of those that are not shipped.

    epochs: replaces every recipe's, for a quick look.
    """
    used = dict(RECIPES)
    if dataset == "digits":  # so few images need fewer epochs, and so few steps a shorter average
        for name, count in (("long", 20), ("retrain", 6), ("retrain-large", 8), ("paper", 5)):
            used[name] = replace(used[name], epochs=count)
        used["retrain"] = replace(used["retrain"], average=0.9)
    if epochs:
        used = {name: replace(recipe, epochs=epochs) for name, recipe in used.items()}

    def recipes(baseline, retrained):
        return {None: used[baseline], **{e: used[name].with_defense() for e, name in retrained.items()}}

    retrained = {0.005: "retrain", 0.01: "retrain", 0.015: "retrain", 0.2: "retrain-large"}
    study = {
        "cnn": recipes("long", {**retrained, 0.005: "retrain-sgd"}),
        "cnn-lstm": recipes("long", retrained),
    }
    paper, short = (recipes(name, {0.2: name}) for name in ("paper", "short"))
    return [
        *(Line("study", name, study[name], 0, models, name) for name in ARCHITECTURES),
        *(Line("reproduction", name, paper, 0, scratch, f"{name}-paper") for name in ARCHITECTURES),
        *(Line("spread", "cnn", short, seed, scratch, f"cnn-short-seed-{seed}") for seed in SPREAD_SEEDS),
    ]
