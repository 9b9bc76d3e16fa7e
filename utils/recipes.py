"""Training recipes: the numbers a training depends on, apart from network, data and seed."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    optimizer: str  # "sgd" (Nesterov momentum 0.9) or "adam"
    lr: float  # the highest learning rate
    warmup: float | None  # one-cycle: part of the training in which the rate rises from 0; None keeps it constant
    epochs: int
    batch_size: int
    weight_decay: float
    label_smoothing: float
    shift: int  # augmentation: up to so many pixels each way
    contrast: float = 1.0  # augmentation: the lowest factor of an image's contrast (tried, but in no recipe)
    average: float = 0.0  # keep a moving average of the weights: how much of it stays in each step; 0 keeps the last

    def lr_at(self, progress):
        """The learning rate when `progress`, in [0, 1), of the training is done: up from 0, then down to 0."""
        if self.warmup is None:
            return self.lr
        return self.lr * min(progress / self.warmup, (1 - progress) / (1 - self.warmup))

    def with_defense(self):
        """The same without label smoothing: a defence brings its own loss, the study's plain cross-entropy."""
        return replace(self, label_smoothing=0)


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
