"""The diagnosis: each check sees its sign, chance accuses nobody, and a check that was not run has not passed."""

import copy
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
import torch
from torch import nn

from attacks import fgsm_direction
from defenses.losses import NFGSM
from tests.helpers.defences import BROKEN, Guarded, OnlyTheCopy, RememberedByTheClass
from utils.adversarial_sets import AugmentedSplit
from utils.checkpoints import load_checkpoint
from utils.diagnosis import CHECKS, NO_LEAK, diagnose, judge, probes, surrogates, trial
from utils.diagnosis.judging import Attacked
from utils.diagnosis.probes import Gradient, Stability
from utils.diagnosis.trial import Evidence
from utils.formats import DiagnosisReport, decode, encode
from utils.notes import Notes
from utils.progress import Lines
from utils.recipes import RECIPES
from utils.training import train

EPSILON = 0.1  # on digits, whose strokes are black on white, 8/255 is little
IMAGES = 200


def diagnosed(network, digits, source=None, examples=30, **options):
    options = {"epsilon": EPSILON, "source": source, "queries": 50} | options
    return diagnose(network, digits["test"].first(examples), **options)


@pytest.fixture(scope="module")
def baseline(trained):
    return load_checkpoint(trained("cnn"))


@pytest.fixture(scope="module")
def other(trained):
    return load_checkpoint(trained("cnn-lstm"))


@pytest.fixture(autouse=True)
def quick_surrogates(monkeypatch):
    """Surrogates that learn little, because a test has no time for more."""
    monkeypatch.setattr(surrogates, "LESSONS", 1000)
    monkeypatch.setattr(surrogates, "LEAST_ASKED", 200)


@pytest.fixture
def short(monkeypatch):
    """The attacks of a diagnosis with few steps, where only the order of things is tested."""
    for name, number in {"STEPS": 4, "MANY_STEPS": 8, "INSIDE_STEPS": 5, "SAMPLE": 8}.items():
        monkeypatch.setattr(trial, name, number)


# ---- whole diagnoses, on digits ----


@pytest.mark.parametrize("with_source", [True, False])
def test_baseline_is_trustworthy_and_about_zero(with_source, baseline, other, digits):
    diagnosis = diagnosed(baseline, digits, other if with_source else None)
    assert diagnosis.verdict == "trustworthy"
    assert diagnosis.trustworthy
    assert diagnosis.strongest.accuracy <= 0.02


@pytest.mark.slow
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
    diagnosis = diagnosed(robust, digits, baseline, examples=40)
    assert diagnosis.verdict == "trustworthy"
    assert diagnosis.strongest.accuracy > 0.25


@pytest.mark.slow
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
    parts = [digits["test"], digits["validation"]]
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    diagnosis = diagnosed(retrained, digits, baseline, whole=replace(training, images=images, labels=labels))
    assert diagnosis.failed == [NO_LEAK]
    assert diagnosis.strongest.accuracy <= 0.05


QUICK = (
    "JPEG-like, outside PyTorch",
    "anti-adversary, 2 steps",
)


@pytest.mark.parametrize(
    "broken",
    [pytest.param(b, marks=() if b.name in QUICK else pytest.mark.slow, id=b.name) for b in BROKEN],
)
def test_broken_defences_are_not_trusted_and_are_broken(broken, trained, digits):
    """The rest of the zoo is for `make zoo`."""
    diagnosis = diagnosed(broken.build(load_checkpoint(trained("cnn"))), digits)
    assert diagnosis.verdict.startswith(f"not trustworthy: at most {100 * diagnosis.strongest.accuracy:.1f} % (found ")
    assert diagnosis.strongest.accuracy <= 0.1


def test_an_attack_with_small_steps_finds_what_noise_hides(baseline, other, digits, short, monkeypatch):
    monkeypatch.setattr(trial, "STEPS", 10)
    known = digits["test"].first(20).take(torch.arange(20))[0]
    diagnosis = diagnosed(Guarded(copy.deepcopy(baseline), known), digits, other, examples=20, epsilon=0.3, queries=20)
    assert diagnosis.evidence.walk.broken == trial.SAMPLE
    assert diagnosis.found_by == "small steps"
    assert "accuracy falls as epsilon grows" in diagnosis.failed


def test_copies_that_do_not_answer_as_the_model_are_not_believed(baseline, other, digits, short):
    known = digits["test"].first(8).take(torch.arange(8))[0]
    for defended, reason in (
        (OnlyTheCopy(copy.deepcopy(baseline), known), "its copies have other logits than it has itself"),
        (RememberedByTheClass(copy.deepcopy(baseline)), "its copies share a state that queries change"),
    ):
        diagnosis = diagnosed(defended, digits, other, examples=8, queries=20)
        assert diagnosis.evidence.uncopied == reason
        assert not diagnosis.trustworthy


def test_a_diagnosis_changes_neither_the_network_nor_torchs_random_numbers(baseline, other, digits, short):
    before = {name: tensor.clone() for name, tensor in baseline.state_dict().items()}
    state = torch.get_rng_state()
    baseline.train()
    diagnosed(baseline, digits, other, examples=8)
    assert all(module.training for module in baseline.modules())
    assert all(parameter.requires_grad for parameter in baseline.parameters())
    baseline.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in baseline.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("epsilon", [0, -0.1, 1.1, float("nan")])
def test_refuses_a_radius_that_is_none(epsilon, baseline, digits):
    with pytest.raises(ValueError, match="epsilon must be above 0 and at most 1"):
        diagnosed(baseline, digits, epsilon=epsilon)


@pytest.mark.parametrize("with_source", [True, False])
def test_one_bar_shows_how_far_the_diagnosis_is(with_source, baseline, other, digits, monkeypatch, short):
    """It moves within each attack, never back, and ends at 100 %."""
    bars, places = [], []

    class Recorded(Lines):
        def update(self, count):
            super().update(count)
            places.append(self.n)

    def bar(iterable=None, *, title, total, unit, visible, initial=0):
        bars.append(Recorded((), title, total, unit, initial) if visible else Lines((), title, total, unit, initial))
        return bars[-1]

    monkeypatch.setattr(trial, "progress_bar", bar)
    source = other if with_source else None
    diagnosed(baseline, digits, source, examples=4, epsilon=0.001, queries=20, progress=True)
    assert [bar.title for bar in bars] == ["diagnosis"]
    assert places == sorted(places)
    assert places[-1] == bars[0].total
    assert max(after - before for before, after in pairwise(places)) <= trial.FIRST_LOOK  # it never stands still long


@pytest.mark.parametrize("with_whole", [True, False])
def test_a_surrogate_never_learns_from_an_image_that_it_attacks(with_whole, baseline, digits, monkeypatch, short):
    """Without other images, each of two surrogates learns from one half and attacks the other."""
    lessons, attacked = [], []
    judged = digits["test"].first(8)

    def learnt(model, images, *, batch_size, seed):
        lessons.append({image.numpy().tobytes() for image in images})
        return lambda images: images.flatten(1)[:, :10]

    def through(source, images, labels, *, epsilon, **options):
        if not isinstance(source, torch.nn.Module):
            attacked.append({image.mul(255).round().byte().numpy().tobytes() for image in images})
        return images

    monkeypatch.setattr(trial, "train_surrogate", learnt)
    monkeypatch.setattr(trial, "fgsm", through)
    monkeypatch.setattr(trial, "LEAK_RADII", ())
    diagnose(baseline, judged, epsilon=0.001, queries=5, whole=digits["test"] if with_whole else None)
    attacked = attacked[: len(lessons)]
    assert len(lessons) == len(attacked) == (1 if with_whole else 2)
    for taught, tried in zip(lessons, attacked, strict=True):
        assert taught
        assert not taught & tried
    assert {image.numpy().tobytes() for image in judged.images} >= set().union(*attacked)


# ---- the checks, on made-up evidence ----


def attacked(name, left, tried=IMAGES, first=0):
    """An attack that was tried on `tried` images from number `first` on, of which the first `left` withstood."""
    places = torch.arange(IMAGES)
    chosen = (places >= first) & (places < first + tried)
    return Attacked(name, chosen, chosen & (places < first + left))


def evidence(**changes):
    """Evidence of a healthy network, but for what is changed."""
    healthy = {
        "epsilon": 8 / 255,
        "clean": torch.arange(IMAGES) < 180,
        "gradient": Gradient(images=100, zero=0, wrong=0, idle=0),
        "jumps": (0, 100),
        "radii": [(4 / 255, 60, 100), (8 / 255, 40, 100), (16 / 255, 10, 100)],
        "unbounded": (0, 100),
        "fgsm": attacked("FGSM", 110, 180),
        "standard": attacked("PGD-20", 100, 180),
        "longer": attacked("PGD-100", 98, 100),
        "margins": [attacked("margin", 92, 98), attacked("multi-targeted PGD", 90, 92)],
        "transferred": [attacked("FGSM through a source", 90, 90)],
        "square": attacked("Square", 90, 90),
        "walk": attacked("small steps", 90, 90),
        "planted": (100, 100),
        "leaking": [(0.02, 5, 10), (0.1, 10, 60)],
    }
    return Evidence(**(healthy | changes))


def test_healthy_evidence_is_trusted():
    diagnosis = judge(evidence())
    assert diagnosis.failed == []
    assert (diagnosis.trustworthy, diagnosis.verdict) == (True, "trustworthy")
    assert diagnosis.strongest.correct == 90


SIGNS = {
    "the same image gets the same answer": [{"stability": Stability(repeated="it changes")}],
    "an answer does not depend on the batch": [{"stability": Stability(batch="it changes")}],
    "earlier queries do not matter": [{"stability": Stability(memory="it changes")}],
    "the gradient is seldom zero": [{"gradient": Gradient(100, 12, 0, 0)}],
    "the gradient predicts small steps": [
        {"gradient": Gradient(100, 0, 20, 0)},
        {"gradient": Gradient(100, 0, 0, 20)},
    ],
    "logits are continuous where the answer changes": [{"jumps": (20, 100)}],
    "iterative beats single-step": [{"fgsm": attacked("FGSM", 85, 180)}],
    "an unbounded attack reaches 0 %": [{"unbounded": (6, 100)}],
    "accuracy falls as epsilon grows": [
        {"radii": [(1 / 255, 30, 100), (2 / 255, 60, 100)]},
        {"walk": attacked("small steps", 80, 90)},
    ],
    "planted examples are found": [{"planted": (75, 100)}],
    "more steps and restarts change little": [{"longer": attacked("PGD-100", 70, 100)}],
    "no attack is far ahead of PGD": [{"margins": [attacked("margin", 40, 98)]}],
    "nothing is hidden inside": [{"inside": [attacked("PGD on the network inside", 80, 90)]}],
    "white-box is at least as strong as transfer": [
        {"transferred": [attacked("FGSM", 90, 90), attacked("PGD", 80, 90)]},
        {"margins": [attacked("margin", 3, 98)], "transferred": [attacked("PGD", 0, 3)]},
    ],
    "a gradient-free attack is not stronger": [{"square": attacked("Square", 80, 90)}],
    NO_LEAK: [{"leaking": [(0.02, 5, 10), (0.1, 60, 20)]}],
}


@pytest.mark.parametrize(("sign", "changes"), [(sign, change) for sign, all_of in SIGNS.items() for change in all_of])
def test_each_sign_is_seen(sign, changes):
    diagnosis = judge(evidence(**changes))
    assert sign in diagnosis.failed
    assert set(diagnosis.failed) <= {sign, "no attack is far ahead of PGD"}
    assert not diagnosis.trustworthy
    left = diagnosis.strongest
    assert diagnosis.verdict.startswith(f"not trustworthy: at most {100 * left.accuracy:.1f} % (found by ")
    assert sign in diagnosis.verdict


def test_every_check_has_its_sign():
    assert list(SIGNS) == list(CHECKS)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": Gradient(100, 5, 5, 5)},
        {"fgsm": attacked("FGSM", 95, 180)},
        {"fgsm": attacked("FGSM", 100, 180)},
        {"jumps": (5, 100)},
        {"unbounded": (1, 100)},
        {"radii": [(0.1, 40, 100), (0.2, 45, 100)]},
        {"radii": [(0.1, 0, 100), (0.2, 0, 100)]},
        {"radii": [(0.001, 99, 100), (0.002, 99, 100)]},
        {"planted": (92, 100)},
        {"longer": attacked("PGD-100", 85, 100)},
        {"standard": attacked("PGD-20", 3, 180), "longer": attacked("PGD-100", 0, 3)},
        {"margins": [attacked("margin", 75, 98)]},
        {"standard": attacked("PGD-20", 8, 180), "longer": attacked("PGD-100", 0, 8)},
        {"inside": [attacked("PGD on the network inside", 88, 90)]},
        {"transferred": [attacked("PGD", 88, 90)]},
        {"square": attacked("Square", 88, 90)},
        {"walk": attacked("small steps", 88, 90)},
        {"leaking": [(0.02, 30, 20), (0.1, 6, 0)]},
    ],
)
def test_what_chance_explains_is_not_a_sign(changes):
    diagnosis = judge(evidence(**changes))
    assert diagnosis.failed == []
    assert diagnosis.verdict == "trustworthy"


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("earlier queries do not matter", {"uncopied": "it cannot be copied"}),
        ("the gradient is seldom zero", {"gradient": None}),
        ("the gradient predicts small steps", {"gradient": None}),
        ("logits are continuous where the answer changes", {"jumps": None}),
        ("iterative beats single-step", {"fgsm": None}),
        ("an unbounded attack reaches 0 %", {"unbounded": None}),
        ("accuracy falls as epsilon grows", {"radii": []}),
        ("accuracy falls as epsilon grows", {"walk": None}),
        ("planted examples are found", {"planted": None}),
        ("planted examples are found", {"planted": (5, 5)}),
        ("more steps and restarts change little", {"longer": None}),
        ("white-box is at least as strong as transfer", {"transferred": []}),
        ("a gradient-free attack is not stronger", {"square": None}),
        (NO_LEAK, {"leaking": []}),
    ],
)
def test_a_check_that_was_not_run_never_counts_as_passed(check, changes):
    diagnosis = judge(evidence(**changes))
    assert diagnosis.failed == []
    assert not diagnosis.trustworthy
    assert diagnosis.verdict.startswith("cannot say: ")
    assert check in diagnosis.verdict
    assert diagnosis.report(None).robust_accuracy is None
    # A sign counts for more than what is missing.
    assert judge(evidence(**{**changes, "stability": Stability(batch="it changes")})).verdict.startswith("not trust")


def test_a_network_that_is_always_wrong_is_not_judged(digits):
    test = digits["test"]
    others = {"test": replace(test, labels=torch.full_like(test.labels, 5))}
    diagnosis = diagnosed(lambda images: images.flatten(1)[:, :10] * 0, others, examples=3)
    assert diagnosis.verdict.startswith("cannot say: the same image gets the same answer (not run: no image is")


def test_all_attacks_within_the_radius_are_joined():
    """An image counts only if it withstands every attack; here each attack breaks images of its own."""
    for key in ("fgsm", "standard", "longer", "square"):
        assert judge(evidence(**{key: attacked(key, 3)})).strongest.correct == 3
    for key in ("margins", "inside", "transferred"):
        assert judge(evidence(**{key: [attacked(key, 3), attacked(key, 200)]})).strongest.correct == 3
    first, second = attacked("first", 0, 20, first=0), attacked("second", 0, 20, first=50)
    found = judge(evidence(inside=[first], transferred=[second]))
    assert found.strongest.correct == 50
    assert found.found_by == "second"
    assert judge(evidence(clean=torch.arange(IMAGES) < 7)).strongest.correct == 7


def test_found_by_is_the_last_attack_that_breaks_more_than_a_hundredth():
    assert judge(evidence(square=attacked("Square", 88, 90))).found_by == "margin"
    assert judge(evidence(square=attacked("Square", 87, 90))).found_by == "Square"


def test_report_says_what_the_diagnosis_says():
    for changes, trusted in (({}, True), ({"square": attacked("Square", 60, 90)}, False)):
        diagnosis = judge(evidence(**changes))
        report = diagnosis.report("a.safetensors")
        assert decode(encode(report), DiagnosisReport) == report
        assert (report.epsilon, report.source) == (8 / 255, "a.safetensors")
        assert (report.verdict, report.trustworthy) == (diagnosis.verdict, trusted)
        assert report.at_most == diagnosis.strongest.accuracy
        assert report.robust_accuracy == (diagnosis.strongest.accuracy if trusted else None)
        assert report.found_by == diagnosis.found_by
        assert report.checks == diagnosis.checks


# ---- other models and images ----


NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def through_a_global(images):
    return NETWORK(images)


class ThroughAnAttribute(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.function = lambda images: network(images)

    def forward(self, images):
        return self.function(images)


@pytest.mark.parametrize("model", [through_a_global, ThroughAnAttribute(NETWORK)], ids=["global", "attribute"])
def test_a_network_behind_a_function_is_copied_and_stays_trainable(model, other, digits, short):
    diagnosis = diagnosed(model, digits, other, examples=8, queries=20)
    assert not diagnosis.evidence.uncopied
    assert all(parameter.requires_grad for parameter in NETWORK.parameters())


def test_a_detector_is_found_among_images_in_the_order_of_their_classes(trained, digits, short):
    """The first hundred images have one class, so there is not a boundary between them."""
    split = digits["test"].first(300)
    split = replace(split, **dict(zip(("images", "labels"), split.take(split.labels.argsort()), strict=True)))
    detector = next(broken for broken in BROKEN if broken.name == "detector of unsure answers")
    diagnosis = diagnose(detector.build(load_checkpoint(trained("cnn"))), split, epsilon=0.05, queries=20)
    assert "logits are continuous where the answer changes" in diagnosis.failed


def test_without_a_boundary_the_check_of_jumps_has_not_run():
    clean = torch.ones(4, dtype=torch.bool)
    assert (
        CHECKS["logits are continuous where the answer changes"](Evidence(epsilon=0.1, clean=clean, jumps=(0, 0)))[0]
        is None
    )


def test_a_network_that_skips_pixels_has_a_gradient(digits):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    images, labels = digits["test"].take(torch.arange(20))
    found = probes.gradient_quality(lambda x: inner(x[:, :, ::2, ::2]), images, labels, 0.1)
    assert found.zero == 0


@pytest.mark.parametrize("with_source", [True, False])
def test_models_and_images_in_float64(with_source, baseline, other, digits, short):
    split = digits["test"].first(12)
    split = replace(split, images=split.take(torch.arange(12))[0].double())
    network, source = copy.deepcopy(baseline).double(), copy.deepcopy(other).double()
    diagnosis = diagnose(network, split, epsilon=0.01, source=source if with_source else None, queries=20)
    assert diagnosis.evidence.square.error == ""


def test_a_model_that_computes_in_another_dtype(baseline, other, digits, short):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = copy.deepcopy(baseline).bfloat16()

        def forward(self, images):
            return self.network(images.bfloat16()).float()

    assert diagnosed(Cast(), digits, other, examples=8, queries=20).evidence.standard


def test_a_source_without_a_gradient_is_not_a_passed_check(baseline, other, digits, short):
    options = {"examples": 8, "epsilon": 0.001, "queries": 20}
    diagnosis = diagnosed(baseline, digits, lambda images: other(images).detach(), **options)
    passed = {check.name: check.passed for check in diagnosis.checks}
    assert passed["white-box is at least as strong as transfer"] is None
    assert diagnosis.verdict.startswith("cannot say")


@pytest.mark.slow
def test_notes_of_a_diagnosis_with_another_source_are_not_used(baseline, other, digits, tmp_path, short):
    keys = []
    for source in (other, baseline, other):
        notes = Notes(tmp_path / "out.json.attacks.partial.jsonl")
        diagnosed(baseline, digits, source, examples=4, epsilon=0.001, queries=20, notes=notes)
        keys.append(set(notes.rows))
    assert keys[0] < keys[1] == keys[2]
