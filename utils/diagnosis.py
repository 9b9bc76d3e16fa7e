"""Can a robust accuracy be trusted? Checks for masked gradients and leaked labels, run on any network.

The signs of masked gradients are those of Athalye et al. (2018, arXiv:1802.00420, section 3.1) and Carlini et al.
(2019, arXiv:1902.06705, section 5): a network that hides its gradient looks robust to attacks that follow it, and gives
itself away by them. Label leaking is Kurakin et al.'s (2017, arXiv:1611.01236, section 4): a network that finds FGSM
examples easier than images reads the label out of the perturbation.
"""

from dataclasses import dataclass
from itertools import combinations

import torch

from attacks.core import attacking, input_gradient
from utils.constants import EVALUATION_BATCH
from utils.data import batches
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
    strongest: Result  # the accuracy left by all attacks together, white-box, transferred and gradient-free

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
    notes=None,
    progress=False,
):
    """Run every check at L-infinity radius `epsilon` on a Split; returns a Diagnosis.

    source: another network, for what transfers from it; without it, two checks cannot be run. The gradient-free attack
    is Square, of the package pyautoattack, with so many `queries` an image. notes: as for `evaluate`.
    """
    common = {"batch_size": batch_size, "progress": progress}

    def attacked(attack="pgd", radius=epsilon, source=None, **options):
        options = options if attack == "fgsm" else {"seed": seed, **options}
        return evaluate(network, split, attack, radius, options=options, source=source, notes=notes, **common)

    clean, again = (evaluate(network, split, "fgsm", 0.0, **common) for _ in range(2))
    fgsm = attacked("fgsm")
    pgd = attacked(steps=STEPS)
    weaker = [attacked(radius=factor * epsilon, steps=STEPS) for factor in (0.25, 0.5)]
    growing = [*weaker, pgd, attacked(radius=2 * epsilon, steps=STEPS)]
    unbounded = attacked(radius=1.0, steps=MANY_STEPS)
    longer = attacked(steps=MANY_STEPS, restarts=RESTARTS)
    margin = attacked(steps=MANY_STEPS, restarts=RESTARTS, loss="margin")
    square = attacked("autoattack", attacks=["square"], queries=queries)
    transferred = [attacked("fgsm", source=source), attacked(steps=STEPS, source=source)] if source else []
    flat = _zero_gradients(network, split, batch_size)

    many = f"PGD-{MANY_STEPS} with {RESTARTS} restarts"
    low, high = pgd.confidence_interval
    checks = [
        Check(
            "the same image gets the same answer",
            torch.equal(clean.mask, again.mask),
            f"{(clean.mask != again.mask).sum()} of {len(split)} change",
        ),
        Check(
            "the gradient is seldom zero",
            flat <= TOLERANCE,
            f"in most pixels for {flat:.1%} of the correctly classified images",
        ),
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
            all(weak.confidence_interval[1] >= strong.accuracy for weak, strong in combinations(growing, 2))
            and (growing[-1].correct < growing[0].correct or growing[0].correct == 0),
            f"PGD-{STEPS} " + ", ".join(f"{r.accuracy:.1%} at {255 * r.epsilon:.3g}/255" for r in growing),
        ),
        Check(
            "white-box is at least as strong as transfer",
            pgd.correct <= min(result.correct for result in transferred) if source else None,
            f"PGD-{STEPS} on its own gradient {pgd.accuracy:.1%}, FGSM and PGD-{STEPS} on the source's "
            + " and ".join(f"{result.accuracy:.1%}" for result in transferred)
            if source
            else NO_SOURCE,
        ),
        Check(
            "more steps and restarts change little",
            min(pgd.accuracy - TOLERANCE, low) <= longer.accuracy <= max(pgd.accuracy + TOLERANCE, high),
            f"PGD-{STEPS} {pgd.accuracy:.1%}, {many} {longer.accuracy:.1%}",
        ),
        Check(
            "a gradient-free attack is not stronger",
            square.accuracy >= min(longer.accuracy, margin.accuracy) - TOLERANCE,
            f"Square {square.accuracy:.1%}, {many} {longer.accuracy:.1%}, on the margin {margin.accuracy:.1%}",
        ),
    ]
    together = clean.mask
    for result in (fgsm, *weaker, pgd, longer, margin, square, *transferred):
        together = together & result.mask
    return Diagnosis(
        checks,
        _leak(network, split, clean, source, common),
        Result(epsilon, together.sum().item(), len(split), 0.0, "all attacks above together"),
    )


def _zero_gradients(network, split, batch_size):
    """Of the correctly classified images, the part whose gradient is exactly 0 in most pixels.

    As cross-entropy's is where logits lie so far apart that the probability of the label rounds to 1.
    """
    flat = right = 0
    with attacking(network, split.device):
        for images, labels in batches(split, batch_size):
            logits, _, gradient = input_gradient(network, images, labels)
            correct = logits.argmax(1) == labels
            flat += (correct & ((gradient == 0).flatten(1).float().mean(1) > 0.5)).sum().item()
            right += correct.sum().item()
    return flat / max(right, 1)


def _leak(network, split, clean, source, common):
    name = "transferred FGSM examples are not easier than images"
    if source is None:
        return Check(name, None, NO_SOURCE)
    _, *transferred = evaluate_fgsm(network, split, [0.02, 0.1, 0.2, 0.3], source=source, **common)
    easiest = max(transferred, key=lambda result: result.accuracy)
    figures = f"clean {clean.accuracy:.1%}, FGSM at {easiest.epsilon:g} through the source {easiest.accuracy:.1%}"
    return Check(name, easiest.confidence_interval[0] <= clean.accuracy, figures)
