"""Can a robust accuracy be trusted? Checks for masked gradients and leaked labels, run on any network.

The signs of masked gradients are those of Athalye et al. (2018, arXiv:1802.00420, section 3.1) and Carlini et al.
(2019, arXiv:1902.06705, section 5): a network that hides its gradient looks robust to attacks that follow it, and gives
itself away by them. Label leaking is Kurakin et al.'s (2017, arXiv:1611.01236, section 4): a network that finds FGSM
examples easier than images reads the label out of the perturbation.
"""

from dataclasses import dataclass
from itertools import pairwise

from utils import EVALUATION_BATCH
from utils.evaluation import Result, evaluate, evaluate_fgsm

STEPS, MANY_STEPS, RESTARTS = 20, 100, 3
NO_SOURCE = "not run: it takes another network's examples"
TOLERANCE = 0.02  # what more steps and restarts may add, and a gradient-free attack, before they say something


@dataclass(frozen=True)
class Check:
    """What is expected, whether it is so, and the figures that say it. passed: None if it could not be run."""

    name: str
    passed: bool | None
    figures: str


@dataclass(frozen=True)
class Diagnosis:
    checks: list  # for masked gradients
    leak: Check
    strongest: Result  # the accuracy left by all white-box attacks together, at the radius asked for

    @property
    def trustworthy(self):
        return not any(check.passed is False for check in [*self.checks, self.leak])

    @property
    def verdict(self):
        """On the evaluation, in a line."""
        if failed := [check.name for check in self.checks if check.passed is False]:
            return f"not trustworthy, the gradient may be masked: it is not so that {'; that '.join(failed)}"
        if self.leak.passed is False:
            return "label leaking: what transferred examples say is not to be trusted, only attacks on its own gradient"
        return "trustworthy"


def diagnose(
    network,
    split,
    *,
    epsilon=8 / 255,
    source=None,
    queries=5000,
    seed=0,
    batch_size=EVALUATION_BATCH,
    progress=False,
):
    """Run every check at L-infinity radius `epsilon` on a Split; returns a Diagnosis.

    source: another network, for what transfers from it; without it, two checks cannot be run. The gradient-free attack
    is Square, of the package pyautoattack, with so many `queries` an image.
    """
    common = {"batch_size": batch_size, "progress": progress}

    def attacked(attack="pgd", radius=epsilon, source=None, **options):
        return evaluate(network, split, attack, radius, options={"seed": seed, **options}, source=source, **common)

    clean, fgsm = evaluate_fgsm(network, split, [epsilon], **common)
    pgd = attacked(steps=STEPS)
    growing = [attacked(radius=factor * epsilon, steps=STEPS) for factor in (0.25, 0.5)]
    growing += [pgd, attacked(radius=2 * epsilon, steps=STEPS)]
    unbounded = attacked(radius=1.0, steps=MANY_STEPS)
    longer = attacked(steps=MANY_STEPS, restarts=RESTARTS)
    margin = attacked(steps=MANY_STEPS, restarts=RESTARTS, loss="margin")
    square = attacked("autoattack", attacks=["square"], queries=queries)
    transfer = source and attacked(steps=STEPS, source=source)

    many = f"PGD-{MANY_STEPS} with {RESTARTS} restarts"
    checks = [
        Check(
            "iterative beats single-step",
            pgd.correct <= fgsm.correct,
            f"PGD-{STEPS} {pgd.accuracy:.1%}, FGSM {fgsm.accuracy:.1%}",
        ),
        Check(
            "an unbounded attack reaches 0 %",
            unbounded.correct == 0,
            f"PGD-{MANY_STEPS} at epsilon 1 {unbounded.accuracy:.1%}",
        ),
        Check(
            "accuracy falls as epsilon grows",
            all(weak.confidence_interval[1] >= strong.accuracy for weak, strong in pairwise(growing)),
            f"PGD-{STEPS} " + ", ".join(f"{r.accuracy:.1%} at {255 * r.epsilon:.3g}/255" for r in growing),
        ),
        Check(
            "white-box is at least as strong as transfer",
            transfer and pgd.correct <= transfer.correct,
            f"PGD-{STEPS} on its own gradient {pgd.accuracy:.1%}, on the source's {transfer.accuracy:.1%}"
            if transfer
            else NO_SOURCE,
        ),
        Check(
            "more steps and restarts change little",
            longer.accuracy >= min(pgd.accuracy - TOLERANCE, pgd.confidence_interval[0]),
            f"PGD-{STEPS} {pgd.accuracy:.1%}, {many} {longer.accuracy:.1%}",
        ),
        Check(
            "a gradient-free attack is not stronger",
            square.accuracy >= min(longer.accuracy, margin.accuracy) - TOLERANCE,
            f"Square {square.accuracy:.1%}, {many} {longer.accuracy:.1%}, on the margin {margin.accuracy:.1%}",
        ),
    ]
    together = pgd.mask & longer.mask & margin.mask & square.mask
    return Diagnosis(
        checks,
        _leak(network, split, clean, source, common),
        Result(epsilon, together.sum().item(), len(split), 0.0, f"{many} on either loss, and Square"),
    )


def _leak(network, split, clean, source, common):
    name = "transferred FGSM examples are not easier than images"
    if source is None:
        return Check(name, None, NO_SOURCE)
    _, *transferred = evaluate_fgsm(network, split, [0.02, 0.1, 0.2, 0.3], source=source, **common)
    easiest = max(transferred, key=lambda result: result.accuracy)
    figures = f"clean {clean.accuracy:.1%}, FGSM at {easiest.epsilon:g} through the source {easiest.accuracy:.1%}"
    return Check(name, easiest.confidence_interval[0] <= clean.accuracy, figures)
