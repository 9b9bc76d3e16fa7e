"""Can a robust accuracy be trusted? `diagnose` attacks a network in several ways, and checks compare what they leave.

A network whose gradient misleads attacks looks robust to them, although other attacks break it: its gradient is masked.
Each check looks for one sign of it. The signs are from Athalye et al. (2018, arXiv:1802.00420, section 3.1) and Carlini
et al. (2019, arXiv:1902.06705, section 5). The last check looks for label leaking (Kurakin et al., 2017,
arXiv:1611.01236, section 4): a network that classifies FGSM examples better than clean images reads the label out of
the perturbation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations

import torch

from attacks.core import Model, attacking, input_gradient
from attacks.progress import report_progress
from utils import distributed
from utils.constants import EVALUATION_BATCH, RADIUS
from utils.data import Split, batches
from utils.evaluation import Result, evaluate, evaluate_fgsm
from utils.formats import Check, DiagnosisReport
from utils.images import Data, as_split
from utils.models import explaining
from utils.notes import Notes
from utils.progress import moving, progress_bar

STEPS, MANY_STEPS, RESTARTS = 20, 100, 3
LEAK_RADII = (0.02, 0.1, 0.2, 0.3)  # where transferred FGSM examples may be easier than clean images, in pixel units
TOLERANCE = 0.02  # a check passes if more steps, more restarts or a gradient-free attack change accuracies by less
NO_SOURCE = "not run: it needs another network to craft examples on"
NO_LEAK = "transferred FGSM examples are not easier than images"
MANY = f"PGD-{MANY_STEPS} with {RESTARTS} restarts"

Outcome = tuple[bool | None, str]  # of a check: passed, figures


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the checks compare. All results but those for `leaking` have a mask, over the same images."""

    clean: Result
    clean_again: Result
    fgsm: Result
    pgd: Result  # with STEPS steps
    smaller: list[Result]  # the same PGD, at a quarter and at half of the radius
    larger: Result  # the same PGD, at twice the radius
    unbounded: Result  # PGD with MANY_STEPS at radius 1, where every image is within reach
    longer: Result  # PGD with MANY_STEPS and RESTARTS
    margin: Result  # the same on the margin loss
    square: Result  # gradient-free
    transferred: list[Result]  # FGSM and PGD crafted on the source; empty without a source
    flat: float  # of `flat_fraction`
    leaking: list[Result]  # FGSM crafted on the source, at LEAK_RADII; empty without a source


@dataclass(frozen=True)
class Diagnosis:
    """What the checks say, and the accuracy that all attacks within the radius leave together."""

    checks: list[Check]  # the last one is for label leaking, the others for masked gradients
    strongest: Result

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.passed is False]

    @property
    def trustworthy(self) -> bool:
        return not self.failed

    @property
    def verdict(self) -> str:
        """Whether the evaluation can be trusted, in one line."""
        if masked := [name for name in self.failed if name != NO_LEAK]:
            return f"not trustworthy, the gradient may be masked. These checks failed: {'; '.join(masked)}"
        if self.failed:
            return "label leaking: trust attacks on the network's own gradient, not transferred examples"
        return "trustworthy"

    def report(self, source: str | None) -> DiagnosisReport:
        """What a report says of it. source: path of the checkpoint on which transferred examples were crafted."""
        return DiagnosisReport(
            epsilon=self.strongest.epsilon,
            source=source,
            verdict=self.verdict,
            trustworthy=self.trustworthy,
            robust_accuracy=self.strongest.accuracy,
            confidence_interval=self.strongest.confidence_interval,
            checks=self.checks,
        )


def diagnose(
    network: Model,
    split: Data,
    *,
    epsilon: float = RADIUS,
    source: Model | None = None,
    queries: int = 5000,
    seed: int = 0,
    batch_size: int = EVALUATION_BATCH,
    notes: Notes | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Attack a network on a split in all the ways that Evidence lists, and judge the results.

    split: a Split or whatever else utils.images.as_split accepts, such as a DataLoader.
    epsilon: L-inf radius in pixel units, from 0 to 1.
    source: another network, on which transferred examples are crafted. Without it, two checks cannot be run.
    queries: how many each image allows to the gradient-free attack, Square of the package pyautoattack.
    seed: of the attacks' random numbers. notes, progress: as for `evaluate`.
    """

    def attacked(
        attack: str = "pgd", radius: float = epsilon, source: Model | None = None, **options: object
    ) -> Result:
        options = options if attack == "fgsm" else {"seed": seed, **options}
        with part(attack, **options):  # type: ignore[arg-type]
            return evaluate(network, split, attack, radius, options=options, source=source, notes=notes, **common)

    def clean() -> Result:  # without notes, which would answer the second time what they heard the first time
        with part("clean images"):
            return evaluate(network, split, "fgsm", 0.0, **common)

    def part(name: str, steps: int = 1, restarts: int = 1, queries: int = 0, **_: object) -> AbstractContextManager:
        bar.set_postfix(now=name)
        return moving(bar, queries or steps * restarts)

    split = as_split(split, *filter(None, (network, source)))
    common: dict = {"batch_size": batch_size}
    long: dict = {"steps": MANY_STEPS, "restarts": RESTARTS}
    # How often an image goes through the network, roughly: four times for clean images, their gradient and FGSM.
    passes = 4 + 4 * STEPS + MANY_STEPS + 2 * MANY_STEPS * RESTARTS + queries + (2 + STEPS if source else 0)
    visible = progress and distributed.rank() == 0
    with progress_bar(title="diagnosis", total=passes, unit="step", visible=visible) as bar:
        with part("gradients"):
            flat = flat_fraction(network, split, batch_size)
        leaking = []
        if source:
            with part("fgsm"):
                _, *leaking = evaluate_fgsm(network, split, LEAK_RADII, source=source, **common)
        found = Evidence(
            clean=clean(),
            clean_again=clean(),
            fgsm=attacked("fgsm"),
            pgd=attacked(steps=STEPS),
            smaller=[attacked(radius=factor * epsilon, steps=STEPS) for factor in (0.25, 0.5)],
            larger=attacked(radius=min(2 * epsilon, 1.0), steps=STEPS),
            unbounded=attacked(radius=1.0, steps=MANY_STEPS),
            longer=attacked(**long),
            margin=attacked(**long, loss="margin"),
            square=attacked("autoattack", attacks=["square"], queries=queries),
            transferred=[attacked("fgsm", source=source), attacked(steps=STEPS, source=source)] if source else [],
            flat=flat,
            leaking=leaking,
        )
    return judge(found)


def judge(found: Evidence) -> Diagnosis:
    """Run every check, and join all attacks within the radius: an image counts if it withstands all of them."""
    within = [found.clean, found.fgsm, *found.smaller, found.pgd, found.longer, found.margin, found.square]
    together = torch.stack([result.mask for result in (*within, *found.transferred)]).all(0)
    strongest = Result(found.pgd.epsilon, int(together.sum()), len(together), 0.0, "all attacks above together")
    outcomes = {name: check(found) for name, check in CHECKS.items()}
    checks = [Check(name=name, passed=passed, figures=figures) for name, (passed, figures) in outcomes.items()]
    return Diagnosis(checks, strongest)


def flat_fraction(network: Model, split: Split, batch_size: int = EVALUATION_BATCH) -> float:
    """The fraction of the correctly classified images whose gradient is exactly 0 in most pixels.

    The gradient of cross-entropy is 0 where the logits lie so far apart that the label's probability rounds to 1.
    """
    flat = right = 0
    with attacking(network, split.device), explaining(split, network):
        for batch, (images, labels) in enumerate(batches(split, batch_size)):
            report_progress(batch * batch_size / len(split))
            logits, _, gradient = input_gradient(network, images, labels)
            correct = logits.argmax(1) == labels
            flat += int((correct & ((gradient == 0).flatten(1).float().mean(1) > 0.5)).sum())
            right += int(correct.sum())
    return flat / max(right, 1)


# ---- the checks: whether what CHECKS expects is so (None: it could not be checked), and the figures that show it ----


def same_answer(found: Evidence) -> Outcome:
    """With another answer in each pass, an attack follows the gradient of a draw that does not judge it."""
    changed = int((found.clean.mask != found.clean_again.mask).sum())
    return changed == 0, f"{changed} of {found.clean.examples} change"


def gradient_seldom_zero(found: Evidence) -> Outcome:
    """Where the gradient is 0, an attack that follows it stands still."""
    return found.flat <= TOLERANCE, f"in most pixels for {found.flat:.1%} of the correctly classified images"


def iterative_beats_single_step(found: Evidence) -> Outcome:
    """Several small steps find more than a single step, unless the gradient changes within a step."""
    figures = f"PGD-{STEPS} {found.pgd.accuracy:.1%}, FGSM {found.fgsm.accuracy:.1%}"
    return found.pgd.correct <= found.fgsm.correct, figures


def unbounded_reaches_zero(found: Evidence) -> Outcome:
    """At radius 1 an attack may replace the image by another, so an image that survives was not attacked well."""
    return found.unbounded.correct == 0, f"PGD-{MANY_STEPS} at epsilon 1 {found.unbounded.accuracy:.1%}"


def accuracy_falls(found: Evidence) -> Outcome:
    """A larger ball contains the smaller one. Accuracies may rise by chance, but not beyond the interval."""
    growing = [*found.smaller, found.pgd, found.larger]
    first, last = growing[0], growing[-1]
    never_rises = all(weak.confidence_interval[1] >= strong.accuracy for weak, strong in combinations(growing, 2))
    figures = ", ".join(f"{result.accuracy:.1%} at {255 * result.epsilon:.3g}/255" for result in growing)
    return never_rises and (last.correct < first.correct or first.correct == 0), f"PGD-{STEPS} {figures}"


def white_box_beats_transfer(found: Evidence) -> Outcome:
    """An attack that knows the network is at least as strong as one that does not, if its gradient is right."""
    if not found.transferred:
        return None, NO_SOURCE
    own = f"PGD-{STEPS} on its own gradient {found.pgd.accuracy:.1%}"
    left = " and ".join(f"{result.accuracy:.1%}" for result in found.transferred)
    passed = found.pgd.correct <= min(result.correct for result in found.transferred)
    return passed, f"{own}, FGSM and PGD-{STEPS} on the source's {left}"


def more_steps_change_little(found: Evidence) -> Outcome:
    """If more steps still find more, PGD-20 has not converged, and its figure flatters the network."""
    (low, high), expected, longer = found.pgd.confidence_interval, found.pgd.accuracy, found.longer.accuracy
    passed = min(expected - TOLERANCE, low) <= longer <= max(expected + TOLERANCE, high)
    return passed, f"PGD-{STEPS} {expected:.1%}, {MANY} {longer:.1%}"


def gradient_free_not_stronger(found: Evidence) -> Outcome:
    """An attack without gradients knows less, so it finds more only if the gradient misleads the others."""
    square, longer, margin = (result.accuracy for result in (found.square, found.longer, found.margin))
    figures = f"Square {square:.1%}, {MANY} {longer:.1%}, on the margin {margin:.1%}"
    return square >= min(longer, margin) - TOLERANCE, figures


def no_label_leaking(found: Evidence) -> Outcome:
    """FGSM's examples can only be easier than clean images if the perturbation tells the label."""
    if not found.leaking:
        return None, NO_SOURCE
    clean, easiest = found.clean.accuracy, max(found.leaking, key=lambda result: result.accuracy)
    figures = f"clean {clean:.1%}, FGSM at {easiest.epsilon:g} through the source {easiest.accuracy:.1%}"
    return easiest.confidence_interval[0] <= clean, figures


# What is expected of a network whose figures can be trusted. Without a source, two of them cannot be checked.
CHECKS: dict[str, Callable[[Evidence], Outcome]] = {
    "the same image gets the same answer": same_answer,
    "the gradient is seldom zero": gradient_seldom_zero,
    "iterative beats single-step": iterative_beats_single_step,
    "an unbounded attack reaches 0 %": unbounded_reaches_zero,
    "accuracy falls as epsilon grows": accuracy_falls,
    "white-box is at least as strong as transfer": white_box_beats_transfer,
    "more steps and restarts change little": more_steps_change_little,
    "a gradient-free attack is not stronger": gradient_free_not_stronger,
    NO_LEAK: no_label_leaking,
}
