"""Diagnostics: three kinds of network get the verdict they deserve, and masked gradients are caught."""

from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
import torch
from torch import nn

from attacks import fgsm_direction
from defenses.losses import NFGSM
from utils import diagnosis as diagnosis_module
from utils.adversarial_sets import AugmentedSplit
from utils.checkpoints import load_checkpoint
from utils.diagnosis import Evidence, diagnose, flat_fraction, judge
from utils.evaluation import Result
from utils.formats import DiagnosisReport, decode, encode
from utils.progress import Lines
from utils.recipes import RECIPES
from utils.training import train

EPSILON = 0.1  # on digits, whose strokes are black on white, 8/255 is little


def diagnosed(network, digits, source, examples=100):
    return diagnose(network, digits["test"].first(examples), epsilon=EPSILON, source=source, queries=200)


@pytest.fixture(scope="module")
def baseline(trained):
    return load_checkpoint(trained("cnn"))


@pytest.fixture(scope="module")
def other(trained):
    return load_checkpoint(trained("cnn-lstm"))


def test_baseline_is_trustworthy_and_about_zero(baseline, other, digits):
    diagnosis = diagnosed(baseline, digits, other)
    assert diagnosis.failed == []
    assert diagnosis.verdict == "trustworthy"
    assert diagnosis.strongest.accuracy <= 0.02


@pytest.mark.parametrize("with_source", [True, False])
def test_one_bar_shows_how_far_the_diagnosis_is(with_source, baseline, other, digits, monkeypatch):
    """It moves within each attack, never back, and ends at 100 %."""
    bars, places = [], []

    class Recorded(Lines):
        def update(self, count):
            super().update(count)
            places.append(self.n)

    def bar(iterable=None, *, title, total, unit, visible, initial=0):
        bars.append(Recorded((), title, total, unit, initial) if visible else Lines((), title, total, unit, initial))
        return bars[-1]

    monkeypatch.setattr(diagnosis_module, "progress_bar", bar)
    for name, number in {"STEPS": 4, "MANY_STEPS": 8, "RESTARTS": 2}.items():
        monkeypatch.setattr(diagnosis_module, name, number)
    source = other if with_source else None
    diagnose(baseline, digits["test"].first(4), epsilon=0.001, source=source, queries=20, progress=True)
    assert [bar.title for bar in bars] == ["diagnosis"]
    assert places == sorted(places)
    assert places[-1] == bars[0].total
    moves = [after - before for before, after in pairwise(places)]
    assert max(moves) < 8  # of the 20 passes of Square; the unbounded attack ends after two or more of its 8


def test_papers_defence_leaks_the_label_and_is_about_zero(baseline, digits, tmp_path):
    training = digits["train"]
    images, labels = training.take(torch.arange(len(training)))
    direction = fgsm_direction(baseline, images, labels).to(torch.int8)
    retrained = train(
        "cnn",
        AugmentedSplit(training, direction, 0.2, "0" * 64),
        digits["validation"],
        msgspec.structs.replace(RECIPES["paper"], epochs=10),
        output=tmp_path / "a.safetensors",
        width=8,
        quiet=True,
    )
    diagnosis = diagnosed(retrained, digits, baseline, examples=300)
    assert diagnosis.verdict.startswith("label leaking")
    assert not diagnosis.trustworthy
    assert diagnosis.strongest.accuracy <= 0.05


def test_adversarial_training_is_trustworthy_and_holds(baseline, digits, tmp_path):
    robust = train(
        "cnn",
        digits["train"],
        digits["validation"],
        msgspec.structs.replace(RECIPES["paper"], epochs=10),
        output=tmp_path / "a.safetensors",
        width=8,
        defense=NFGSM(EPSILON),
        quiet=True,
    )
    diagnosis = diagnosed(robust, digits, baseline)
    assert diagnosis.failed == []
    assert diagnosis.strongest.accuracy > 0.25


class Masked(nn.Module):
    """A network that hides its gradient."""

    def __init__(self, network):
        super().__init__()
        self.network = network


class Saturated(Masked):
    """The same decisions, with logits so far apart that the cross-entropy's gradient is zero to rounding."""

    factor = 1000

    def forward(self, images):
        return self.factor * self.network(images)


class SlightlySaturated(Saturated):
    factor = 50


class Shattered(Masked):
    """The same network behind a ripple of a pixel's height: its gradient points anywhere, its decisions stay."""

    def forward(self, images):
        return self.network(images + 0.004 * (2000 * images).sin())


class Noisy(Masked):
    """The same network behind noise, another in every pass."""

    def forward(self, images):
        return self.network(images + 0.2 * torch.randn_like(images))


@pytest.mark.parametrize(
    ("masked", "signs"),
    [
        (Saturated, {"the gradient is seldom zero", "an unbounded attack reaches 0 %"}),
        (SlightlySaturated, {"the gradient is seldom zero"}),
        (Shattered, {"a gradient-free attack is not stronger"}),
        (Noisy, {"the same image gets the same answer"}),
    ],
)
@pytest.mark.filterwarnings("ignore:AutoAttack. it seems to be a randomized defense")
@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
@pytest.mark.filterwarnings("ignore:the model gives the same images other logits")
def test_masked_gradients_are_caught(masked, signs, baseline, other, digits):
    torch.manual_seed(0)
    diagnosis = diagnosed(masked(baseline), digits, other)
    assert diagnosis.verdict.startswith("not trustworthy")
    assert signs <= set(diagnosis.failed)


def evidence(**figures):
    """Evidence of a healthy network, but for `figures`: how many of 100 images each attack leaves."""
    figures = {
        "clean": 90, "clean_again": 90, "fgsm": 35, "transferred_fgsm": 80, "transferred_pgd": 70, "quarter": 60,
        "half": 45, "pgd": 30, "larger": 5, "unbounded": 0, "longer": 29, "margin": 25, "square": 40, "leaking": 85,
    } | figures  # fmt: skip
    flat = figures.pop("flat", 0.0)

    def result(name, epsilon=EPSILON):
        return Result(epsilon, figures[name], 100, 0.0, mask=torch.arange(100) < figures[name])

    single = ("clean", "clean_again", "fgsm", "pgd", "larger", "unbounded", "longer", "margin", "square")
    return Evidence(
        **{name: result(name) for name in single},
        smaller=[result("quarter", EPSILON / 4), result("half", EPSILON / 2)],
        transferred=[result("transferred_fgsm"), result("transferred_pgd")],
        flat=flat,
        leaking=[Result(0.02, 80, 100, 0.0), Result(0.1, figures["leaking"], 100, 0.0), Result(0.2, 70, 100, 0.0)],
    )


@pytest.mark.parametrize(
    ("sign", "figures"),
    [
        ("the same image gets the same answer", {"clean_again": 89}),
        ("the gradient is seldom zero", {"flat": 0.021}),
        ("iterative beats single-step", {"fgsm": 29}),
        ("an unbounded attack reaches 0 %", {"unbounded": 1}),
        ("accuracy falls as epsilon grows", {"quarter": 20}),
        ("accuracy falls as epsilon grows", {"half": 20}),
        ("accuracy falls as epsilon grows", {"larger": 41}),
        ("accuracy falls as epsilon grows", {"quarter": 30, "half": 30, "pgd": 30, "larger": 30}),
        ("white-box is at least as strong as transfer", {"transferred_fgsm": 29}),
        ("white-box is at least as strong as transfer", {"transferred_pgd": 29}),
        ("more steps and restarts change little", {"longer": 20, "margin": 18, "square": 20}),
        ("more steps and restarts change little", {"longer": 41}),
        ("a gradient-free attack is not stronger", {"square": 22}),
        ("a gradient-free attack is not stronger", {"square": 26, "margin": 40}),
        ("transferred FGSM examples are not easier than images", {"clean": 70, "clean_again": 70, "leaking": 80}),
    ],
)
def test_each_sign_is_seen_alone(sign, figures):
    diagnosis = judge(evidence(**figures))
    assert diagnosis.failed == [sign]
    assert not diagnosis.trustworthy
    assert diagnosis.verdict.startswith("label leaking" if "transferred FGSM" in sign else "not trustworthy")
    assert sign in diagnosis.verdict or diagnosis.verdict.startswith("label leaking")


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"flat": 0.02},
        {"fgsm": 30},
        {"quarter": 40},  # fewer than the 45 at half of the radius, but the interval of 40 of 100 contains 45 %
        {"quarter": 0, "half": 0, "pgd": 0, "fgsm": 0, "larger": 0, "longer": 0, "margin": 0, "square": 0},
        {"transferred_pgd": 30},
        {"longer": 22, "margin": 22},
        {"longer": 39},
        {"square": 23},
        {"clean": 80, "clean_again": 80},
    ],
)
def test_what_chance_explains_is_not_a_sign(figures):
    diagnosis = judge(evidence(**figures))
    assert diagnosis.failed == []
    assert diagnosis.verdict == "trustworthy"


def test_without_a_source_two_checks_are_not_run():
    diagnosis = judge(replace(evidence(), transferred=[], leaking=[]))
    assert [check.name for check in diagnosis.checks if check.passed is None] == [
        "white-box is at least as strong as transfer",
        "transferred FGSM examples are not easier than images",
    ]
    assert diagnosis.trustworthy


def test_all_attacks_within_the_radius_are_joined():
    for attack in ("clean", "fgsm", "transferred_fgsm", "transferred_pgd", "half", "longer", "margin", "square"):
        assert judge(evidence(**{attack: 3})).strongest.accuracy == 0.03
    for outside in ("larger", "unbounded"):
        assert judge(evidence(**{outside: 3})).strongest.accuracy == 0.25
    # An image counts only if it withstands every attack: here each attack breaks images that the other one does not.
    found = evidence()
    even, late = torch.arange(100) % 2 == 0, torch.arange(100) >= 90
    found = replace(found, pgd=replace(found.pgd, mask=even), fgsm=replace(found.fgsm, mask=late))
    found = replace(found, **{name: replace(found.pgd, mask=late) for name in ("clean", "longer", "margin", "square")})
    everywhere = replace(found.pgd, mask=torch.ones(100).bool())
    found = replace(found, smaller=[everywhere] * 2, transferred=[everywhere])
    assert judge(found).strongest.correct == 5


def test_report_says_what_the_diagnosis_says():
    diagnosis = judge(evidence(square=22))
    report = diagnosis.report("a.safetensors")
    assert decode(encode(report), DiagnosisReport) == report
    assert (report.epsilon, report.source) == (EPSILON, "a.safetensors")
    assert (report.verdict, report.trustworthy) == (diagnosis.verdict, False)
    assert (report.robust_accuracy, report.confidence_interval) == (0.22, diagnosis.strongest.confidence_interval)
    assert report.checks == diagnosis.checks


def test_attacks_are_those_that_the_evidence_promises(digits, monkeypatch):
    asked = []

    def network(images):
        return images.flatten(1)[:, :10]

    def other(images):
        return -network(images)

    def evaluated(network, split, attack, epsilon, *, options=None, source=None, notes=None, **rest):
        asked.append((attack, round(epsilon / EPSILON, 6), options, source, notes))
        return Result(epsilon, 1, 2, 0.0, mask=torch.tensor([True, False]))

    monkeypatch.setattr(diagnosis_module, "evaluate", evaluated)
    diagnose(
        network, digits["test"].first(2), epsilon=EPSILON, source=other, seed=3, queries=9, notes="notes", batch_size=1
    )
    pgd, long = {"seed": 3, "steps": 20}, {"seed": 3, "steps": 100, "restarts": 3}
    assert asked == [
        ("fgsm", 0, None, None, None),
        ("fgsm", 0, None, None, None),
        ("fgsm", 1, {}, None, "notes"),
        ("pgd", 1, pgd, None, "notes"),
        ("pgd", 0.25, pgd, None, "notes"),
        ("pgd", 0.5, pgd, None, "notes"),
        ("pgd", 2, pgd, None, "notes"),
        ("pgd", 10, {"seed": 3, "steps": 100}, None, "notes"),
        ("pgd", 1, long, None, "notes"),
        ("pgd", 1, {**long, "loss": "margin"}, None, "notes"),
        ("autoattack", 1, {"seed": 3, "attacks": ["square"], "queries": 9}, None, "notes"),
        ("fgsm", 1, {}, other, "notes"),
        ("pgd", 1, pgd, other, "notes"),
    ]
    asked.clear()
    diagnose(network, digits["test"].first(2), epsilon=0.75, batch_size=1)
    assert max(epsilon for _, epsilon, *_ in asked) == round(1 / EPSILON, 6)  # not 1.5, which is not a radius


@pytest.mark.parametrize(("used", "fraction"), [(1535, 1), (1537, 0)])
def test_flat_is_a_correct_image_with_no_gradient_in_most_pixels(used, fraction, digits):
    """The network reads `used` of an image's 3,072 pixels."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(used, 10, generator=generator) / 100
    images = torch.randint(256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)

    def network(images):
        return images.flatten(1)[:, :used] @ weights

    labels = network(images / 255).argmax(1)
    split = replace(digits["test"], images=images, labels=labels)
    assert flat_fraction(network, split, batch_size=3) == fraction
    wrong = (labels + (torch.arange(8) >= 6)) % 10  # the last two
    assert flat_fraction(network, replace(split, labels=wrong), batch_size=3) == fraction
    assert flat_fraction(network, replace(split, labels=(labels + 1) % 10)) == 0
