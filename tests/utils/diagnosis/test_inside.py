"""Copies share no state, and the network behind a defence is found and attacked past the defence."""

import functools

import pytest
import torch
from torch import Tensor, nn

from attacks.modules import modules_of
from tests.helpers.attacked import model_and_images
from tests.helpers.defences import (
    Caller,
    JPEGFile,
    Quantised,
    RememberedByTheClass,
    Scaled,
    answer_from_memory,
    cached_in_a_closure,
)
from utils.diagnosis import surrogates
from utils.diagnosis.inside import (
    Mean,
    Renewed,
    StraightThrough,
    fresh,
    networks_inside,
    place_after_preprocessing,
    shared_state,
)


class Counter:
    """A model that answers with the number of times it has been asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, images):
        self.asked += 1
        return torch.full((len(images), 2), float(self.asked))


def in_a_closure():
    counter = Counter()
    return lambda images: counter(images)


@pytest.mark.parametrize(
    "build",
    [Counter, in_a_closure, lambda: Counter().__call__, lambda: functools.partial(in_a_closure())],
    ids=["object", "closure", "bound method", "partial"],
)
def test_a_fresh_copy_shares_no_state(build):
    model, images = build(), torch.zeros(1, 3, 8, 8)
    copies = [fresh(model) for _ in range(2)]
    assert model(images)[0, 0] == 1
    assert model(images)[0, 0] == 2
    assert [copy(images)[0, 0].item() for copy in copies] == [1, 1]
    renewed = Renewed(copies[0])
    assert [renewed(images)[0, 0].item() for _ in range(2)] == [2, 2]


ASKED: list[Tensor] = []


def remembers_in_a_global(images):
    ASKED.append(images)
    return torch.zeros(len(images), 2)


@pytest.mark.parametrize("changes", [True, False])
def test_state_that_copies_share_is_seen(changes):
    images = torch.zeros(1, 3, 8, 8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    for model in (remembers_in_a_global, RememberedByTheClass(network)) if changes else (Scaled(network), Counter()):
        before = shared_state(model)
        assert shared_state(model) == before
        model(images)
        assert (shared_state(model) != before) == changes


def test_what_two_parts_of_a_closure_share_stays_shared():
    model, images, _ = model_and_images("cnn", count=2)
    cached = fresh(cached_in_a_closure(model.eval()))
    first = cached(images)
    assert torch.equal(cached(images + 0.01), first)
    known, answers = [], []
    assert torch.equal(answer_from_memory(model, images, known, answers), first)


@pytest.fixture
def network_and_images():
    model, images, _ = model_and_images("cnn", size=32, count=12)
    return model.eval(), images, model(images).argmax(1)


def test_the_network_inside_is_found_even_in_a_closure(network_and_images):
    network, images, labels = network_and_images
    assert list(networks_inside(Scaled(network), images, labels)) == [network]
    assert list(networks_inside(lambda images: network(images).round(), images, labels)) == [network]


def test_a_network_that_only_wraps_itself_has_nothing_inside(network_and_images):
    network, images, labels = network_and_images
    assert list(networks_inside(network, images, labels)) == []
    assert list(networks_inside(nn.Sequential(network), images, labels)) == []


def test_the_network_inside_a_model_that_recognises_attacks_is_found(network_and_images):
    network, images, labels = network_and_images
    defended = Caller(network)
    assert list(networks_inside(defended, images, labels)) == []  # it answers as the network while nobody attacks
    assert list(networks_inside(defended, images, labels, recognises_attacks=True)) == [network]


def test_the_gradient_goes_past_the_preprocessing(network_and_images):
    network, images, _ = network_and_images
    for defence in (Quantised(network), JPEGFile(network)):
        place = place_after_preprocessing(defence, images)
        skipping = StraightThrough(defence, place)
        inputs = images.clone().requires_grad_()
        logits = skipping(inputs)
        torch.testing.assert_close(logits, defence(images), rtol=1e-4, atol=1e-5)
        (found,) = torch.autograd.grad(logits[:, 0].sum(), inputs)
        changed = defence.before(images).requires_grad_()
        (expected,) = torch.autograd.grad(network(changed)[:, 0].sum(), changed)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


def test_normalisation_is_not_preprocessing(network_and_images):
    network, images, _ = network_and_images

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network((images - 0.4) / torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1))

    assert place_after_preprocessing(Normalized(), images) is None
    assert place_after_preprocessing(Normalized(), images, any_change=True) is not None


def test_the_mean_of_models_is_the_mean_of_their_logits(network_and_images):
    network, images, _ = network_and_images
    torch.testing.assert_close(Mean([network, Scaled(network)])(images), network(images) * 1001 / 2)


@pytest.mark.parametrize(
    "wrap", [lambda network: network, nn.Sequential, lambda network: lambda images: network(images)]
)
def test_a_compiled_network_is_copied_as_the_network_inside(wrap):
    """What torch.compile makes cannot be copied: the copy would not know its own code."""
    network, images, _ = model_and_images("linear")
    compiled = torch.compile(nn.Sequential(network), backend="eager")
    original = fresh(wrap(compiled))  # asked by nobody, as in a diagnosis
    for copied in (fresh(original), fresh(original)):
        assert torch.equal(copied(images), network(images))
    assert not {*map(id, modules_of(copied))} & {*map(id, modules_of(compiled))}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 8), (torch.float32, 1)])
def test_a_surrogate_learns_from_images_of_any_kind(dtype, size, monkeypatch):
    monkeypatch.setattr(surrogates, "LESSONS", 2 * surrogates.BATCH)
    monkeypatch.setattr(surrogates, "LEAST_ASKED", 8)
    images = torch.rand(4, 3, size, size).to(dtype)
    surrogate = surrogates.train_surrogate(lambda images: images.flatten(1).float()[:, :2], images, batch_size=4)
    assert surrogate(images).shape == (4, 2)
