"""The plan: every network of the study, how it is trained and where its checkpoint goes.

The study has three parts. "study" is its ten networks: for each architecture a baseline, and four networks retrained on
the baseline's FGSM examples. "reproduction" does the same with the recipe of the original study, at one radius.
"spread" repeats one short training with three seeds.

Two robust networks stand beside the study's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from defenses.losses import NPGD, Defense
from study.formats import Part
from utils.constants import ARCHITECTURES, RADIUS, checkpoint_stem
from utils.recipes import RECIPES, Recipe

SPREAD_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Planned:
    """One network of the study."""

    part: Part
    architecture: str  # a key of networks.NETWORKS
    epsilon: float | None  # radius of the FGSM examples that it is retrained on; None: a baseline
    recipe: Recipe
    seed: int
    path: Path  # of its checkpoint
    baseline: Path  # the checkpoint on which its FGSM examples are crafted; a baseline's own path

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.path.stem

    @property
    def is_kept(self) -> bool:
        """Whether its checkpoint belongs to the results; other checkpoints may be deleted after their test."""
        return self.part == "study"


@dataclass(frozen=True)
class Robust:
    """How a robust network is trained on CIFAR-10."""

    width: int
    recipe: Recipe
    defense: Defense


# models/README.md lists what was tried.
ROBUST = {
    "cnn": Robust(96, RECIPES["robust"], NPGD(RADIUS, loss="sampled", smoothing=0.4)),
    "cnn-lstm": Robust(
        80,
        replace(RECIPES["robust"], lr=0.025, epochs=40, weight_decay=5e-4, shift=2),
        NPGD(RADIUS, smoothing=0.2),
    ),
}

Line = tuple[Planned, ...]  # a baseline and the networks retrained on its FGSM examples, in order


def lines(dataset: str, models: Path, scratch: Path, epochs: int | None = None) -> list[Line]:
    """Every network of the study, in the order in which it is trained.

    models: the folder for the ten networks of the part "study"; scratch: the folder for the others.
    epochs: of every training, for a quick look; None: each recipe's own.
    """
    recipes = _recipes(dataset, epochs)
    small = {0.005: "retrain", 0.01: "retrain", 0.015: "retrain"}
    retrain = {
        "cnn": {**small, 0.005: "retrain-sgd", 0.2: "retrain-large"},
        "cnn-lstm": {**small, 0.2: "retrain-large"},
    }

    def line(
        part: Part, architecture: str, stem: str, seed: int, baseline: str, retrained: Mapping[float, str]
    ) -> Line:
        """stem: of the baseline's file. baseline: its recipe's name. retrained: radius -> recipe's name."""
        folder = models if part == "study" else scratch
        named: dict[float | None, Recipe] = {None: recipes[baseline]}
        named |= {epsilon: recipes[name].with_defense() for epsilon, name in retrained.items()}
        paths = {e: folder / f"{checkpoint_stem(stem, e)}.safetensors" for e in named}
        return tuple(Planned(part, architecture, e, named[e], seed, paths[e], paths[None]) for e in named)

    return [
        *(line("study", name, name, 0, "long", retrain[name]) for name in ARCHITECTURES),
        *(line("reproduction", name, f"{name}-paper", 0, "paper", {0.2: "paper"}) for name in ARCHITECTURES),
        *(line("spread", "cnn", f"cnn-short-seed-{seed}", seed, "short", {0.2: "short"}) for seed in SPREAD_SEEDS),
    ]


def _recipes(dataset: str, epochs: int | None) -> dict[str, Recipe]:
    """The recipes by name, shorter for the digits, or all of so many epochs."""
    recipes = dict(RECIPES)
    if dataset == "digits":  # so few images need fewer epochs, and so few steps a shorter average
        for name, count in (("long", 20), ("retrain", 6), ("retrain-large", 8), ("paper", 5)):
            recipes[name] = replace(recipes[name], epochs=count)
        recipes["retrain"] = replace(recipes["retrain"], average=0.9)
    return {name: replace(recipe, epochs=epochs or recipe.epochs) for name, recipe in recipes.items()}
