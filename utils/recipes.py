"""Training recipes: the numbers a training depends on, apart from network, data and seed.

Each field states its type, its bounds and its meaning once. The flags of train-*.py, the training log and the
checkpoint's header are all made from these fields.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace


class Recipe(Struct, frozen=True, kw_only=True):
    """The numbers of a training. Fields with a default came later: older trainings used that default."""

    optimizer: Literal["sgd", "adam"]  # "sgd" has Nesterov momentum 0.9
    lr: Annotated[float, Meta(gt=0, le=1e9, description="highest learning rate")]
    # One-cycle: the part of the training in which the rate rises from 0. None keeps the rate constant.
    warmup: Annotated[float, Meta(gt=0, lt=1)] | None
    epochs: Annotated[int, Meta(ge=1, le=10**9, description="passes over the training images")]
    batch_size: Annotated[int, Meta(ge=1, le=10**9, description="images in a step")]
    weight_decay: Annotated[float, Meta(ge=0, le=1e9, description="L2 penalty")]
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)]
    shift: Annotated[int, Meta(ge=0, le=31, description="augmentation: move images by up to this many pixels")]
    contrast: Annotated[
        float, Meta(gt=0, le=1, description="augmentation: scale the contrast by a random factor from this to 1")
    ] = 1.0
    average: Annotated[
        float, Meta(ge=0, lt=1, description="moving average of the weights: the part that stays in each step")
    ] = 0.0

    def lr_at(self, progress: float) -> float:
        """The learning rate when `progress`, in [0, 1), of the training is done: up from 0, then down to 0."""
        if self.warmup is None:
            return self.lr
        return self.lr * min(progress / self.warmup, (1 - progress) / (1 - self.warmup))

    def with_defense(self) -> "Recipe":
        """The same recipe without label smoothing, because a defence brings its own loss."""
        return replace(self, label_smoothing=0.0)


# The peak rate was chosen on the validation images (models/README.md has what was tried); the rest is customary.
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
    # The shipped baselines': four times as long, and so many epochs want more augmentation against overfitting.
    "long": replace(ONE_CYCLE, epochs=80, shift=4),
    # For fgsm-augment at small radii, whose epochs have twice as many images. No shift, because the examples to
    # withstand are not shifted either. Adam, and an average of the weights: SGD's last weights do better on clean
    # images, and far worse at testing radii well above the training one (models/README.md).
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
    # For fgsm-augment with the CNN at 0.005, where the validation images preferred SGD.
    "retrain-sgd": replace(ONE_CYCLE, epochs=6, shift=0),
    # For fgsm-augment at a radius as large as 0.2, where longer trainings pay, but not any length: from 16 or 20
    # epochs on, the network tells clean images and examples of 0.2 apart, and is lost at the radii between.
    "retrain-large": replace(ONE_CYCLE, epochs=12, shift=0),
    # For a first impression: past the study's accuracy in four epochs. So few need less augmentation and more decay.
    "short": replace(ONE_CYCLE, lr=0.05, epochs=4, batch_size=64, weight_decay=2e-3, shift=1),
    # The study's own, so that its figures can be reproduced.
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
