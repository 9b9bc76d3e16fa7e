"""Can a robust accuracy be trusted? Checks for masked gradients, run on any network.

The signs are those of Athalye et al. (2018, arXiv:1802.00420, section 3.1) and Carlini et al. (2019, arXiv:1902.06705,
section 5): a network that hides its gradient looks robust to attacks that follow it, and gives itself away by them.
"""

from dataclasses import dataclass
from itertools import pairwise

from utils import EVALUATION_BATCH
from utils.evaluation import Result, evaluate, evaluate_fgsm

STEPS, MANY_STEPS, RESTARTS = 20, 100, 3
TOLERANCE = 0.02  # what more steps and restarts may add, and a gradient-free attack, before they say something


@dataclass(frozen=True)
class Check:
    """What is expected, whether it is so, and the figures that say it. passed: None if it could not be run."""

    name: str
    passed: bool | None
    figures: str


@dataclass(frozen=True)
class Diagnosis:
    checks: list
    strongest: Result  # the accuracy left by all white-box attacks together, at the radius asked for
    label_leaking: bool

    @property
    def trustworthy(self):
        return all(check.passed is not False for check in self.checks)


def diagnose(network, split, *, epsilon=8 / 255, source=None, seed=0, batch_size=EVALUATION_BATCH, progress=False):
    """Run every check at L-infinity radius `epsilon` on a Split; returns a Diagnosis.

    source: another network, for what transfers from it; without it, two checks cannot be run. The gradient-free attack
    is Square, of the package pyautoattack.
    """
    common = {"batch_size": batch_size, "progress": progress}

    def attacked(attack="pgd", radius=epsilon, **options):
        return evaluate(network, split, attack, radius, options={"seed": seed, **options}, **common)

    clean, fgsm = evaluate_fgsm(network, split, [epsilon], **common)
    pgd = attacked(steps=STEPS)
    longer = attacked(steps=MANY_STEPS, restarts=RESTARTS)
    margin = attacked(steps=MANY_STEPS, restarts=RESTARTS, loss="margin")
    square = attacked("autoattack", attacks=["square"])
    unbounded = attacked(radius=1.0, steps=MANY_STEPS)
    growing = {factor: attacked(radius=factor * epsilon, steps=STEPS) for factor in (0.25, 0.5, 2)}
    growing = [growing[0.25], growing[0.5], pgd, growing[2]]

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
            ", ".join(f"{result.accuracy:.1%} at {255 * result.epsilon:.3g}/255" for result in growing),
        ),
        Check(
            "more steps and restarts change little",
            longer.accuracy >= min(pgd.accuracy - TOLERANCE, pgd.confidence_interval[0]),
            f"PGD-{STEPS} {pgd.accuracy:.1%}, PGD-{MANY_STEPS} with {RESTARTS} restarts {longer.accuracy:.1%}",
        ),
        Check(
            "a gradient-free attack is not stronger",
            square.accuracy >= longer.accuracy - TOLERANCE,
            f"Square {square.accuracy:.1%}, PGD-{MANY_STEPS} with {RESTARTS} restarts {longer.accuracy:.1%}",
        ),
    ]
    leaking = False
    if source is not None:
        transfer = evaluate(
            network, split, "pgd", epsilon, options={"seed": seed, "steps": STEPS}, source=source, **common
        )
        checks.append(
            Check(
                "white-box is at least as strong as transfer",
                pgd.correct <= transfer.correct,
                f"PGD-{STEPS} on its own gradient {pgd.accuracy:.1%}, on the source's {transfer.accuracy:.1%}",
            )
        )
        _, *transferred = evaluate_fgsm(network, split, [0.02, 0.1, 0.2, 0.3], source=source, **common)
        highest = max(transferred, key=lambda result: result.accuracy)
        leaking = highest.confidence_interval[0] > clean.accuracy
        checks.append(
            Check(
                "no label leaks: transferred FGSM examples are not easier than images",
                not leaking,
                f"clean {clean.accuracy:.1%}, FGSM at {highest.epsilon:g} {highest.accuracy:.1%}",
            )
        )
    together = pgd.mask & longer.mask & margin.mask & square.mask
    strongest = Result(epsilon, together.sum().item(), len(split), 0.0, "strongest")
    return Diagnosis(checks, strongest, leaking)
