"""Can a robust accuracy be trusted? `diagnose` attacks a network in many ways, and checks look for attacks that fail.

A defence may make attacks fail although adversarial examples are as common as before: it hides its gradient, answers at
random, or remembers earlier queries. The diagnosis has three verdicts:

- *trustworthy*: every check passed.
- *not trustworthy: at most X % (found by Y)*: a check failed, so the attacks may have failed too. X is not a robust
  accuracy. It only says what has been broken so far.
- *cannot say*: no check failed, but one could not be run. A check that was not run never counts as passed.

The checks are from Athalye et al. (2018, arXiv:1802.00420), Carlini et al. (2019, arXiv:1902.06705), Pintor et al.
(2022, arXiv:2106.09947), Zimmermann et al. (2022, arXiv:2206.13991) and Kurakin et al. (2017, arXiv:1611.01236). A
check fails only where chance does not explain what it saw (three standard deviations, or two and a half for label
leaking), so that an honest network is not accused. Attacks ask a working copy of the model, and fresh copies judge the
examples (utils.diagnosis.judging).
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from attacks.core import Model, evaluating
from utils import distributed
from utils.constants import EVALUATION_BATCH, RADIUS
from utils.diagnosis.judging import Attacked, Subject
from utils.diagnosis.probes import REPEATED
from utils.diagnosis.trial import MANY, STEPS, Evidence, Trial
from utils.evaluation import Result
from utils.formats import Check, DiagnosisReport
from utils.images import Data, as_split
from utils.models import explaining
from utils.notes import Notes
from utils.statistics import wilson_interval
from utils.tables import epsilon_text

SQUARE_QUERIES = 1000  # of Square, for each image
SURE = 3.0  # standard deviations
SURE_OF_LEAKING = 2.5  # lower: an honest network errs more on FGSM's examples, so it stays far from this limit
UNSTABLE = "not run, because the model's answers change"
NO_SOURCE = "not run: the source is missing, or every image is broken already"
NO_GRADIENT = "not run: the gradient is missing"
NO_LEAK = "transferred FGSM examples are not easier than images"

Outcome = tuple[bool | None, str]  # of a check: passed (None: it could not be run), figures


@dataclass(frozen=True)
class Diagnosis:
    """What the checks say, and what all attacks within the radius leave together."""

    checks: list[Check]
    strongest: Result  # its accuracy is a robust accuracy only if the diagnosis is trustworthy
    found_by: str  # the last attack that lowered this accuracy by more than a hundredth
    evidence: Evidence

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.passed is False]

    @property
    def trustworthy(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """Whether the evaluation can be trusted, in one line."""
        if self.failed:
            figure = f"at most {100 * self.strongest.accuracy:.1f} % (found by {self.found_by})"
            return f"not trustworthy: {figure}. These checks failed: {'; '.join(self.failed)}"
        if missing := [f"{check.name} ({check.figures})" for check in self.checks if check.passed is None]:
            return f"cannot say: {'; '.join(missing)}"
        return "trustworthy"

    def report(self, source: str | None) -> DiagnosisReport:
        """What a report says of it. source: path of the checkpoint on which transferred examples were crafted."""
        return DiagnosisReport(
            epsilon=self.strongest.epsilon,
            source=source,
            verdict=self.verdict,
            trustworthy=self.trustworthy,
            robust_accuracy=self.strongest.accuracy if self.trustworthy else None,
            at_most=self.strongest.accuracy,
            found_by=self.found_by,
            confidence_interval=self.strongest.confidence_interval,
            checks=self.checks,
        )


def diagnose(
    network: Model,
    split: Data,
    *,
    epsilon: float = RADIUS,
    source: Model | Sequence[Model] | None = None,
    whole: "Data | None" = None,
    queries: int = SQUARE_QUERIES,
    seed: int = 0,
    batch_size: int = EVALUATION_BATCH,
    notes: Notes | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Attack a network on a split in all the ways that Evidence lists, and judge the results.

    network: any callable from images in [0, 1] to logits. It is copied and not changed. At the end it is asked once, to
        see whether it answers as its copies do.
    split: a Split or whatever else utils.images.as_split accepts, such as a DataLoader.
    epsilon: L-inf radius in pixel units, above 0 and at most 1.
    source: another network, or several, on which transferred examples are crafted. Without it, a surrogate learns the
        network's answers (utils.diagnosis.surrogates).
    whole: the split of which `split` is a part, or other images of the same kind. The surrogate learns from those of
        its images that are not judged, and label leaking is decided on all of it. Without it, two surrogates learn from
        a half of `split` each and attack the other half, and label leaking is decided on `split`.
    queries: how many each image allows to the gradient-free attack, Square of the package pyautoattack.
    seed: of all random numbers. Afterwards, torch's generators are as they were before.
    notes, progress: as for `evaluate`.
    Raises ValueError if epsilon is invalid or the network does not return logits, ImportError without pyautoattack.
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be above 0 and at most 1, not {epsilon}")
    given: Any = [] if source is None else source
    sources: list[Model] = [*given] if isinstance(given, list | tuple) else [given]
    split = as_split(split, network, *sources)
    if whole is not None:
        whole = as_split(whole, network, *sources)
    devices = [split.device] if split.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        for context in (
            explaining(split, network, *sources),
            torch.random.fork_rng(devices=devices),
            evaluating(network, split.device),
            _without_warnings(),
        ):
            stack.enter_context(context)
        torch.manual_seed(seed)
        subject = Subject(network, split, batch_size=batch_size, notes=notes)
        trial = Trial(subject, epsilon, sources, whole, queries, seed)
        return judge(trial.evidence(visible=progress and distributed.rank() == 0))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Attacks warn of zero gradients and random networks. Here, checks report them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def judge(found: Evidence) -> Diagnosis:
    """Run every check, and join all attacks within the radius: an image counts if it withstands all of them."""
    outcomes = {name: check(found) for name, check in CHECKS.items()}
    checks = [Check(name=name, passed=passed, figures=figures) for name, (passed, figures) in outcomes.items()]
    left = found.left
    strongest = Result(found.epsilon, int(left.sum()), len(left), 0.0, "all attacks together", mask=left)
    return Diagnosis(checks, strongest, _found_by(found), found)


def _found_by(found: Evidence) -> str:
    """The last attack that broke more than a hundredth of the images which all attacks before it left."""
    name, left = "clean images", found.clean
    for attack in found.attacks:
        remaining = left & (attack.left | ~attack.tried)
        if int(left.sum() - remaining.sum()) > len(left) / 100:
            name = attack.name
        left = remaining
    return name


# ---- what chance does not explain ----


def more_than(share: float, count: int, of: int) -> bool:
    """Whether count of `of` images is more than a share of them, beyond chance."""
    return of > 0 and wilson_interval(count, of, SURE)[0] > share


def less_than(share: float, count: int, of: int) -> bool:
    """Whether count of `of` images is less than a share of them, beyond chance."""
    return of > 0 and wilson_interval(count, of, SURE)[1] < share


def unequal(more: int, less: int, sure: float = SURE) -> bool:
    """Whether `more` is larger than `less` beyond chance: pairs that differ, counted by their direction (McNemar)."""
    return more - less > sure * math.sqrt(more + less)


def surprising(attacks: Sequence[Attacked]) -> bool:
    """Whether attacks break more than a few of the images that stronger ones have left."""
    return any(attack.broken >= 3 and more_than(0.01, attack.broken, attack.images) for attack in attacks)


def counts(attacks: Sequence[Attacked]) -> str:
    """How many images each attack breaks of those that it was tried on."""
    return ", ".join(f"{attack.name}: {attack.broken} of {attack.images}" for attack in attacks)


# ---- the checks: whether what CHECKS expects is so (None: it could not be checked), and the figures that show it ----


def same_answer(found: Evidence) -> Outcome:
    """Athalye et al., section 3: if the answer changes, the attack follows one pass and another judges."""
    if not found.clean.any():
        return None, "not run: no image is classified correctly"
    return not found.stability.repeated, found.stability.repeated or "the logits are equal"


def own_answer(found: Evidence) -> Outcome:
    """An attack moves many images at once. What it finds for one must not depend on the others."""
    if found.stability.random:
        return None, UNSTABLE
    return not found.stability.batch, found.stability.batch or "the logits are equal"


def no_memory(found: Evidence) -> Outcome:
    """Fresh copies give the answers of a model that attacks have asked; nearby images have logits of their own."""
    if found.stability.memory:
        return False, found.stability.memory
    return None if found.uncopied else True, found.uncopied or f"the logits are equal after {REPEATED} queries and more"


def gradient_seldom_zero(found: Evidence) -> Outcome:
    """Athalye et al., section 3: where the gradient is 0, an attack that follows it stands still."""
    if found.gradient is None:
        return None, NO_GRADIENT
    zero, images = found.gradient.zero, found.gradient.images
    return not more_than(0.02, zero, images), f"in most pixels for {zero} of {images} images"


def gradient_leads(found: Evidence) -> Outcome:
    """Pintor et al., section 3: a loss that small steps do not raise, as the gradient predicts, misleads an attack."""
    if found.gradient is None:
        return None, NO_GRADIENT
    wrong, idle, images = found.gradient.wrong, found.gradient.idle, found.gradient.images
    figures = (
        f"for {wrong} of {images} images, a tiny step does not do what the gradient predicts; for {idle}, a small step "
        "does not raise the loss"
    )
    return not more_than(0.05, max(wrong, idle), images), figures


def answers_do_not_jump(found: Evidence) -> Outcome:
    """At a boundary between two answers, a continuous network's logits are equal. A detector's or rounded ones jump."""
    if found.jumps is None:
        return None, UNSTABLE
    number, boundaries = found.jumps
    if not boundaries:
        return None, "not run: all the images have one answer"
    return not more_than(0.05, number, boundaries), f"the logits jump at {number} of {boundaries} decision boundaries"


def iterative_beats_single_step(found: Evidence) -> Outcome:
    """Athalye et al., section 3.1: several small steps find more than a single one, unless the gradient changes."""
    if not (found.fgsm and found.standard) or found.fgsm.error or found.standard.error:
        return None, NO_GRADIENT
    tried = found.fgsm.tried & found.standard.tried
    single, several = (int((tried & attack.left).sum()) for attack in (found.fgsm, found.standard))
    only_several = int((tried & found.fgsm.left & ~found.standard.left).sum())
    only_single = int((tried & ~found.fgsm.left & found.standard.left).sum())
    figures = f"PGD-{STEPS} leaves {several}, FGSM {single} of {int(tried.sum())}"
    return not unequal(only_single, only_several), figures


def unbounded_reaches_zero(found: Evidence) -> Outcome:
    """Athalye et al., section 3.1: at radius 1, an image that survives was not attacked well."""
    if found.unbounded is None:
        return None, UNSTABLE
    left, images = found.unbounded
    return not more_than(0.01, left, images), f"PGD at epsilon 1 leaves {left} of {images}"


def accuracy_falls(found: Evidence) -> Outcome:
    """Carlini et al., section 5: a larger ball contains the smaller one, so attacks on it find what is near."""
    if not found.radii or found.walk is None:
        return None, UNSTABLE
    rises = any(
        wilson_interval(weak, images, SURE)[1] < strong / images
        for (_, weak, images), (_, strong, _) in combinations(found.radii, 2)
    )
    figures = ", ".join(f"{left} of {images} at {epsilon_text(radius)}" for radius, left, images in found.radii)
    if found.walk.broken:
        figures += f"; small steps break {found.walk.broken} of {found.walk.images}"
    return not (rises or surprising([found.walk])), figures


def more_steps_change_little(found: Evidence) -> Outcome:
    """Carlini et al., section 5: if more steps still find more, PGD-20 has not converged."""
    if found.longer is None or found.longer.error:
        return None, UNSTABLE if found.longer is None else NO_GRADIENT
    broken, images = found.longer.broken, found.longer.images
    failed = broken > 0.05 * len(found.clean) and more_than(0.15, broken, images)
    return not failed, f"{MANY} breaks {broken} of the {images} that PGD-{STEPS} leaves"


def none_is_far_ahead(found: Evidence) -> Outcome:
    """Carlini et al., section 5: if all attacks together break far more than PGD on cross-entropy, then PGD fails."""
    if found.standard is None or found.standard.error:
        return None, NO_GRADIENT
    plain = found.clean & found.standard.left
    plain = plain & (found.longer.left | ~found.longer.tried) if found.longer else plain
    images, left = int(plain.sum()), int((plain & found.left).sum())
    failed = images - left > 0.05 * len(plain) and more_than(1 / 3, images - left, images)
    return not failed, f"all attacks break {images - left} of the {images} that PGD on cross-entropy leaves"


def nothing_is_hidden_inside(found: Evidence) -> Outcome:
    """Athalye et al., section 4: if gradients are right, an attack past the defence finds no more than one on it."""
    if any(attack.error for attack in found.inside):
        return None, NO_GRADIENT
    return not surprising(found.inside), counts(found.inside) or "no network inside, and no preprocessing"


def white_box_beats_transfer(found: Evidence) -> Outcome:
    """Athalye et al., section 3.1: of the images that white-box attacks leave, transferred examples break few."""
    if not found.transferred:
        return None, UNSTABLE if found.square is None else NO_SOURCE
    if any(attack.error for attack in found.transferred):
        return None, "not run: the source's gradient is missing"
    return not surprising(found.transferred), counts(found.transferred)


def gradient_free_not_stronger(found: Evidence) -> Outcome:
    """Athalye et al., section 3.1: an attack without gradients breaks few of the images that the others leave."""
    if found.square is None:
        return None, UNSTABLE
    if found.square.error:
        return None, f"not run: {found.square.error}"
    return not surprising([found.square]), counts([found.square])


def plants_are_found(found: Evidence) -> Outcome:
    """Zimmermann et al., section 4: an attack that misses an example which is known to exist must not judge."""
    if found.planted is None:
        return None, UNSTABLE
    number, planted = found.planted
    if planted < 10:
        return None, f"not run: an example could be planted in {planted} images only"
    return not less_than(0.9, number, planted), f"PGD on the margin finds {number} of {planted}"


def no_label_leaking(found: Evidence) -> Outcome:
    """Kurakin et al., section 4: FGSM's examples can only be easier than clean images if they tell the label."""
    if not found.leaking:
        return None, UNSTABLE if found.square is None else NO_SOURCE
    radius, easier, harder = max(found.leaking, key=lambda row: row[1] - row[2])
    figures = f"at {radius:g} through the source, {easier} images become right and {harder} wrong"
    return not unequal(easier, harder, SURE_OF_LEAKING), figures


# What is expected of a network whose figures can be trusted.
CHECKS: dict[str, Callable[[Evidence], Outcome]] = {
    "the same image gets the same answer": same_answer,
    "an answer does not depend on the batch": own_answer,
    "earlier queries do not matter": no_memory,
    "the gradient is seldom zero": gradient_seldom_zero,
    "the gradient predicts small steps": gradient_leads,
    "logits are continuous where the answer changes": answers_do_not_jump,
    "iterative beats single-step": iterative_beats_single_step,
    "an unbounded attack reaches 0 %": unbounded_reaches_zero,
    "accuracy falls as epsilon grows": accuracy_falls,
    "planted examples are found": plants_are_found,
    "more steps and restarts change little": more_steps_change_little,
    "no attack is far ahead of PGD": none_is_far_ahead,
    "nothing is hidden inside": nothing_is_hidden_inside,
    "white-box is at least as strong as transfer": white_box_beats_transfer,
    "a gradient-free attack is not stronger": gradient_free_not_stronger,
    NO_LEAK: no_label_leaking,
}
