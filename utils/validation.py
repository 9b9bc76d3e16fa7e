"""TODO: utils.validation."""

from utils.evaluation import evaluate


class RobustValidation:
    """Accuracy under attack on validation images after each epoch: of some to be watched, of others to choose by.

    Watched are 500 images, under PGD-10 on the cross-entropy and under a single step; the epoch is chosen on 2,000
    others under PGD-10 on the margin, which flatters a small network less. Of smaller splits, a fifth and the rest.
    """

    def __init__(self, validation, epsilon):
        watched = min(500, len(validation) // 5)
        self.watched = validation.part(slice(watched))
        self.choosing = validation.part(slice(watched, watched + 2000))
        self.epsilon = epsilon

    def __call__(self, network):
        return {
            "single_step_accuracy": evaluate(network, self.watched, "fgsm", self.epsilon).accuracy,
            "robust_accuracy": self._under_pgd(network, self.watched, "cross_entropy"),
            "choosing_accuracy": self._under_pgd(network, self.choosing, "margin"),
        }

    def _under_pgd(self, network, split, loss):
        return evaluate(network, split, "pgd", self.epsilon, options={"steps": 10, "loss": loss}).accuracy

    @staticmethod
    def best(epochs):
        """The entry of the log with the highest accuracy on the images to choose by; of equal ones the first."""
        return max(epochs, key=lambda entry: entry["choosing_accuracy"])

    @staticmethod
    def collapse(epochs):
        """A warning, if catastrophic overfitting (Wong et al., 2020, arXiv:2001.03994) began in the last epoch.

        So it is called when a network withstands one step about as well as none, and several smaller ones do not get
        half of that. A network that has learnt nothing, one class in ten right by chance, has nothing to lose.
        """

        def collapsed(entry):
            single, several = entry.get("single_step_accuracy", 0), entry["robust_accuracy"]
            return single > max(0.2, entry["validation_accuracy"] / 2) and several < single / 2

        if collapsed(epochs[-1]) and not any(map(collapsed, epochs[-2:-1])):
            return (
                "warning: catastrophic overfitting in epoch {epoch}: {single_step_accuracy:.1%} withstand a single "
                "step, and {robust_accuracy:.1%} the ten smaller ones of PGD"
            ).format(**epochs[-1])
        return None
