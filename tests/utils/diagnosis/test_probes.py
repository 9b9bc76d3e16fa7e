"""The small experiments see what they are made for, and nothing in an honest network."""

from dataclasses import replace

import pytest
import torch

from attacks import AttackError
from tests.helpers.attacked import model_and_images
from tests.helpers.defences import (
    AntiAdversary,
    BatchCentred,
    Cached,
    Caller,
    Counting,
    Crowded,
    HashedNoise,
    JPEGFile,
    Noisy,
    OneHot,
    Quantised,
    Rounded,
    Scaled,
    Shattered,
    SimilarQueries,
    UnsureDetector,
    Watching,
    WrongGradient,
)
from utils.diagnosis.judging import Subject
from utils.diagnosis.probes import gradient_quality, jumps, planted_examples, stability

EPSILON = 8 / 255


@pytest.fixture(scope="module")
def network_and_images():
    model, images, _ = model_and_images("cnn", size=32, count=32)
    model.eval()
    return model, images, model(images).argmax(1)


def subject_of(model, digits):
    return Subject(model, digits["test"].first(4), batch_size=4)


@pytest.mark.parametrize(
    ("defence", "sign"),
    [(Noisy, "repeated"), (Watching, "repeated"), (BatchCentred, "batch"), (Cached, "memory"), (Counting, "memory")],
)
def test_answers_that_change_are_seen(defence, sign, network_and_images, digits):
    network, images, _ = network_and_images
    found = stability(subject_of(defence(network), digits), images, EPSILON)
    assert getattr(found, sign)
    assert found.random == (defence is Noisy)


@pytest.mark.parametrize(
    ("defence", "text"),
    [
        (Caller, "an attack gets other logits than a caller who asks for the same images"),
        (SimilarQueries, "images have other logits after 100 similar queries"),
    ],
)
def test_what_recognises_an_attack_is_seen(defence, text, network_and_images, digits):
    network, images, _ = network_and_images
    found = stability(subject_of(defence(network), digits), images[:8], EPSILON)
    assert text in (found.repeated, found.memory)


def test_answers_that_differ_only_in_batches_as_large_as_the_attacked_ones_are_seen(network_and_images, digits):
    network, images, _ = network_and_images
    defended = Crowded(network)
    defended.most = len(images)
    assert stability(subject_of(defended, digits), images, EPSILON).batch == ""  # attacked in batches of four
    subject = Subject(defended, digits["test"].first(40), batch_size=40)
    assert stability(subject, images, EPSILON).batch == "an image has other logits in another batch"


@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
@pytest.mark.parametrize("defence", [lambda network: network, Scaled, Quantised, AntiAdversary])
def test_answers_that_stay_are_not_accused(defence, network_and_images, digits):
    network, images, _ = network_and_images
    found = stability(subject_of(defence(network), digits), images, EPSILON)
    assert (found.repeated, found.batch, found.memory, found.random) == ("", "", "", False)


@pytest.mark.parametrize("defence", [WrongGradient, Shattered, HashedNoise, Quantised, Rounded])
def test_a_gradient_that_misleads_is_seen(defence, network_and_images):
    network, images, labels = network_and_images
    honest = gradient_quality(network, images, labels, EPSILON)
    assert (honest.zero, honest.wrong, honest.idle, honest.doubtful) == (0, 0, 0, False)
    found = gradient_quality(defence(network), images, labels, EPSILON)
    assert max(found.wrong, found.idle) > 16
    assert found.doubtful


def test_where_there_is_no_gradient_there_is_no_quality(network_and_images):
    network, images, labels = network_and_images
    with pytest.raises(AttackError):
        gradient_quality(JPEGFile(network), images, labels, EPSILON)


@pytest.mark.parametrize("defence", [Rounded, OneHot, UnsureDetector, HashedNoise])
def test_logits_that_jump_at_a_boundary_are_seen(defence, network_and_images):
    network, images, _ = network_and_images
    number, boundaries = jumps(network, images)
    assert (number, boundaries) == (0, len(images))
    number, boundaries = jumps(defence(network), images)
    assert number > boundaries / 2


def test_a_network_with_one_answer_has_no_boundary(network_and_images):
    _, images, _ = network_and_images
    assert jumps(lambda images: images.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0]), images) == (0, 0)


@pytest.mark.filterwarnings("ignore:the gradient of the model's loss is zero")
def test_plants_are_found_unless_the_gradient_hides_them(network_and_images, digits):
    network, images, _ = network_and_images
    found, planted = planted_examples(subject_of(network, digits), images, epsilon=EPSILON, steps=30)
    assert found == planted >= 16
    found, planted = planted_examples(subject_of(Quantised(network), digits), images, epsilon=EPSILON, steps=10)
    assert found < planted / 2
    found, planted = planted_examples(subject_of(JPEGFile(network), digits), images, epsilon=EPSILON, steps=10)
    assert found == 0


def test_a_split_is_judged_by_copies_that_nobody_asked(network_and_images, digits):
    network, _, _ = network_and_images
    split = digits["test"].first(8)
    images, labels = split.take(torch.arange(8))
    labels = network(images).argmax(1)
    subject = Subject(Counting(network), replace(split, labels=labels), batch_size=8)
    assert all(bool(subject.right(images, labels).all()) for _ in range(40))
