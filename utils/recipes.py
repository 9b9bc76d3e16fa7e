"""Training recipes: the numbers that a training depends on, apart from the network, the data and the seed.

Each field states its type, its bounds and its meaning once. The flags of train-*.py, the training log and the header of
a checkpoint are all made from these fields.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

MOST_EPOCHS = 100_000  # so many that the training's log, formats.LONGEST_LOG, can be read


class Recipe(Struct, frozen=True, kw_only=True):
    """The numbers of a training. A field with a default was added later; older trainings used its default."""

    # "sgd" has Nesterov momentum 0.9. "muon" trains the convolutions' filters with Muon (utils.optimizers), and all
    # other parameters as "sgd" does.
    optimizer: Literal["sgd", "adam", "muon"]
    lr: Annotated[float, Meta(gt=0, le=1e9, description="highest learning rate")]
    # One-cycle schedule: the rate rises from 0 during this part of the training, then falls to 0. None: it is constant.
    warmup: Annotated[float, Meta(gt=0, lt=1)] | None
    epochs: Annotated[int, Meta(ge=1, le=MOST_EPOCHS, description="passes over the training images")]
    batch_size: Annotated[int, Meta(ge=1, le=10**9, description="images in each step")]
    weight_decay: Annotated[float, Meta(ge=0, le=1e9, description="L2 penalty")]
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)]
    shift: Annotated[int, Meta(ge=0, le=31, description="augmentation: shift by up to this many pixels")]
    contrast: Annotated[float, Meta(gt=0, le=1, description="augmentation: random contrast from this to 1")] = 1.0
    average: Annotated[float, Meta(ge=0, lt=1, description="average of the weights: the part kept in each step")] = 0.0
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.6  # of the filters, with "muon"
    other_lr: Annotated[float, Meta(gt=0, le=1e9)] = 0.1  # with "muon": the highest rate of what is not a filter
    # The first convolution's filters are principal components of the training images' patches, and are not trained.
    whitened: bool = False
    activation: Literal["relu", "silu"] = "relu"

    def lr_at(self, done: float) -> float:
        """The learning rate when the part `done` of the training, in [0, 1), lies behind."""
        if self.warmup is None:
            return self.lr
        return self.lr * min(done / self.warmup, (1 - done) / (1 - self.warmup))

    def with_defense(self) -> "Recipe":
        """The same recipe without label smoothing, because a defence brings its own loss."""
        return replace(self, label_smoothing=0.0)


# The highest rate was chosen on the validation images; models/README.md lists what was tried. The rest is customary.
ONE_CYCLE = Recipe(
    optimizer="sgd",
    lr=0.2,
    warmup=0.25,
    epochs=20,
    batch_size=128,
    weight_decay=5e-4,
    label_smoothing=0.1,
    shift=2,
)

RECIPES = {
    "one-cycle": ONE_CYCLE,
    # For the shipped baselines. It takes four times as long, and needs more augmentation against overfitting.
    "long": replace(ONE_CYCLE, epochs=80, shift=4),
    # For fgsm-augment at small radii; its epochs have twice as many images. There is no shift, because the examples to
    # withstand are not shifted either. It uses Adam and an average of the weights, because SGD's last weights do better
    # on clean images but far worse at testing radii well above the training radius (models/README.md).
    "retrain": Recipe(
        optimizer="adam",
        lr=0.002,
        warmup=0.25,
        epochs=10,
        batch_size=128,
        weight_decay=0,
        label_smoothing=0,
        shift=0,
        average=0.9995,
    ),
    # For fgsm-augment with the CNN at radius 0.005, where SGD did better on the validation images.
    "retrain-sgd": replace(ONE_CYCLE, epochs=6, shift=0),
    # For fgsm-augment at large radii such as 0.2, where longer trainings help up to a point: after 16 or 20 epochs, the
    # network tells clean images from examples at 0.2 and fails at the radii between them.
    "retrain-large": replace(ONE_CYCLE, epochs=12, shift=0),
    # For a first impression: it exceeds the study's accuracy in four epochs. Few epochs need less augmentation and more
    # weight decay.
    "short": replace(ONE_CYCLE, lr=0.05, epochs=4, batch_size=64, weight_decay=2e-3, shift=1),
    # Two epochs to about the study's accuracy. Muon gives most of it, then the whitened filters. Two epochs hardly
    # overfit, so the images are not shifted.
    "fast": replace(ONE_CYCLE, optimizer="muon", lr=0.07, momentum=0.8, epochs=2, shift=0, whitened=True),
    # For adversarial training, such as --defense n-pgd --loss sampled --smoothing 0.4. Muon and the smooth activation
    # gain most. Muon keeps the filters' norms, so weight decay shrinks only the other parameters. With little of it,
    # fewer epochs do. At width 96, it takes about two hours on two cores (models/README.md).
    "robust": replace(
        ONE_CYCLE,
        optimizer="muon",
        lr=0.05,
        epochs=32,
        weight_decay=5e-5,
        label_smoothing=0,
        shift=4,
        average=0.999,
        activation="silu",
    ),
    # The study's own recipe, so that its figures can be reproduced.
    "paper": Recipe(
        optimizer="adam",
        lr=0.001,
        warmup=None,
        epochs=10,
        batch_size=64,
        weight_decay=0,
        label_smoothing=0,
        shift=0,
    ),
}


def nearest_recipe(asked: Recipe) -> tuple[str, dict[str, Any]]:
    """The recipe in RECIPES that differs least from `asked`, by name, and the numbers that differ.

    asked: of a training with a defence. Each recipe is compared as a defence changes it (`Recipe.with_defense`).
    """

    def differences(recipe: Recipe) -> dict[str, Any]:
        pairs = {field: (getattr(asked, field), getattr(recipe, field)) for field in Recipe.__struct_fields__}
        return {field: ours for field, (ours, theirs) in pairs.items() if ours != theirs}

    found = ((name, differences(recipe.with_defense())) for name, recipe in RECIPES.items())
    return min(found, key=lambda pair: len(pair[1]))
