"""Names, numbers and the error class that the command line needs before torch is imported.

`--help` and mistakes are answered at once, because this file imports nothing of the project.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the project

DATASETS = ("cifar10", "digits")
ARCHITECTURES = ("cnn", "cnn-lstm")  # the study's two, by their names in networks.NETWORKS
SPLITS = ("train", "validation", "test")
LOSSES = ("cross_entropy", "margin")  # that adversarial examples raise, by their names in attacks.core.LOSSES
DEFENSE_LOSSES = (*LOSSES, "sampled")  # the same in a defence, by their names in defenses.losses.DEFENSE_LOSSES

EVALUATION_BATCH = 250  # images in a batch; on two cores, larger batches are not faster
LARGEST_WIDTH = 256  # 19 million parameters; a checkpoint that asks for more is treated as hostile
LARGEST_CLASSES = 10_000  # a checkpoint's header names each class

RADIUS = 8 / 255  # the L-infinity radius that the robust networks are trained for
L2_RADIUS = 0.5  # the one that RobustBench tests L2 robustness on CIFAR-10 at
EPSILONS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1)  # the study's testing radii; 0 is the clean images
PGD_20 = {"steps": 20, "seed": 0}

# How tables and figures write the names of networks, optimisers, data sets, attacks and so on.
TITLES = {
    "cnn": "CNN",
    "cnn-lstm": "CNN-LSTM",
    "small-cnn": "small CNN",
    "sgd": "SGD",
    "muon": "Muon",
    "relu": "ReLU",
    "silu": "SiLU",
    "cifar10": "CIFAR-10",
    "fgsm": "FGSM",
    "n-fgsm": "N-FGSM",
    "n-pgd": "N-PGD",
    "pgd": "PGD",
    "trades": "TRADES",
    "strong": "strong attack",
    "autoattack": "AutoAttack",
}


class UserError(Exception):
    """A mistake that the user can mend: the message is one line that says what is wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message alone."""
        return [f"{type(self).__name__}: {self}"]


def checkpoint_stem(stem: str, epsilon: float | None, defense: str = "fgsm-augment") -> str:
    """The file name, without its ending, of a network trained with a defence. stem: its baseline's name.

    epsilon None means the baseline itself.
    """
    return stem if epsilon is None else f"{stem}-{defense}-{epsilon:g}"
