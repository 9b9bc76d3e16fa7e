"""Validation under attack after each epoch: it chooses the epoch to keep, and warns of catastrophic overfitting."""

from collections.abc import Sequence

from torch import nn

from attacks.norms import check_epsilon
from utils.data import Split
from utils.evaluation import evaluate
from utils.formats import Epoch, Precision


class RobustValidation:
    """Accuracy under attack on two groups of validation images, measured after each epoch.

    The first group is watched: a fifth of the split, at most 500 images, under PGD-10 on the cross-entropy and under a
    single step. The second group chooses the epoch: the next 2,000 images, or the rest of the split, under PGD-10 on
    the margin. Its figure is usually nearer to AutoAttack's than the cross-entropy's is; docs/robustness.md shows an
    exception. A split of one image serves as both groups.
    """

    def __init__(self, validation: Split, epsilon: float, precision: Precision = "float32") -> None:
        """validation: at least one image. epsilon: the L-inf radius of the attacks, in pixel units.

        precision: of PGD's gradients. What PGD finds counts only if it also holds in float32.
        Raises ValueError if epsilon is not from 0 to 1.
        """
        check_epsilon(epsilon)
        watched = max(1, min(500, len(validation) // 5))
        self.watched = validation.between(0, watched)
        self.choosing = validation.between(watched, watched + 2000) if len(validation) > 1 else validation
        self.epsilon, self.precision = epsilon, precision

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """The accuracies of the network in evaluation mode, in [0, 1], under the names that the log uses."""
        return {
            "single_step_accuracy": evaluate(network, self.watched, "fgsm", self.epsilon).accuracy,
            "robust_accuracy": self._under_pgd(network, self.watched, "cross_entropy"),
            "choosing_accuracy": self._under_pgd(network, self.choosing, "margin"),
        }

    def _under_pgd(self, network: nn.Module, split: Split, loss: str) -> float:
        options = {"steps": 10, "loss": loss, "precision": self.precision}
        return evaluate(network, split, "pgd", self.epsilon, options=options).accuracy


def best_epoch(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch with the highest accuracy on the images that choose; the first of several equal ones."""
    return max(epochs, key=lambda entry: entry.choosing_accuracy or 0)


def collapse_warning(epochs: Sequence[Epoch]) -> str | None:
    """A warning if catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994) began in the last epoch, else None.

    Overfitting is called catastrophic here if the accuracy after a single attack step is more than half of the clean
    accuracy, but the accuracy after several smaller steps is less than half of that after a single one. A network at
    chance has learnt nothing that it could lose, so up to 20 % accuracy after a single step are ignored.
    """

    def collapsed(entry: Epoch) -> bool:
        # Older logs lack the accuracy after a single step, and networks without a defence both.
        single, several = entry.single_step_accuracy or 0, entry.robust_accuracy or 0
        return single > max(0.2, entry.validation_accuracy / 2) and several < single / 2

    last = epochs[-1]
    if not collapsed(last) or any(map(collapsed, epochs[-2:-1])):
        return None
    return (
        f"warning: catastrophic overfitting in epoch {last.epoch}: {last.single_step_accuracy:.1%} withstand a single "
        f"step, and {last.robust_accuracy:.1%} the ten smaller ones of PGD"
    )
