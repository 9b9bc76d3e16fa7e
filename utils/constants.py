"""Data, training, evaluation, checkpoints, plotting and the command line: what the scripts and notebooks share."""

# Here, because the command line offers them without importing torch: `--help` should answer at once.
DATASETS = ("cifar10", "digits")


ARCHITECTURES = ("cnn", "cnn-lstm")  # the study's, as networks.NETWORKS calls them


SPLITS = ("train", "validation", "test")


EVALUATION_BATCH = 250  # images at once: on two cores, larger batches are not faster


LARGEST_WIDTH = 256  # some 19 million parameters; a checkpoint that asks for more is hostile


LARGEST_CLASSES = 10_000  # a checkpoint names each one in its header


class UserError(Exception):
    """Something the user can mend: its message is one line that says what is wrong and what to do."""


def checkpoint_stem(stem, epsilon, defense="fgsm-augment"):
    """The name of a network trained with a defence, after its baseline's; that itself if epsilon is None."""
    return stem if epsilon is None else f"{stem}-{defense}-{epsilon:g}"


RADIUS = 8 / 255  # that the robust networks are trained for


PGD_20 = {"steps": 20, "seed": 0}


EPSILONS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1)


TITLES = {"cnn": "CNN", "cnn-lstm": "CNN-LSTM", "small-cnn": "small CNN", "cifar10": "CIFAR-10"} | {
    "fgsm": "FGSM",
    "n-fgsm": "N-FGSM",
    "pgd": "PGD",
    "trades": "TRADES",
    "autoattack": "AutoAttack",
}
