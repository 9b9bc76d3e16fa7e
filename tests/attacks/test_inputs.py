"""One check of images, and one of what a model returns, for every attack and every evaluation."""

import dataclasses
import functools
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks import AttackError, autoattack, fgsm, fgsm_direction, pgd
from attacks.core import checked_images
from tests.helpers.attacked import model_and_images
from utils.data import Split
from utils.evaluation import correctly_classified, evaluate, evaluate_fgsm, predictions

# Everything that takes a batch: (model, images, labels) -> a result.
CALLS = {
    "fgsm": functools.partial(fgsm, epsilon=0.1),
    "fgsm_direction": fgsm_direction,
    "pgd": functools.partial(pgd, epsilon=0.1, steps=2),
    "autoattack": functools.partial(autoattack, epsilon=0.1, attacks=["apgd-ce"]),
    "predictions": lambda model, images, labels: predictions(model, images),
    "correctly_classified": correctly_classified,
}


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request):
    return request.param


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x: (255 * x).to(torch.uint8), TypeError, r"floating point tensor, not torch\.uint8; divide .* by 255"),
        (lambda x: (255 * x).round(), ValueError, r"\[0, 1\], but these reach from 0 to 255: divide by 255"),
        (lambda x: (x - 0.5) / 0.25, ValueError, r"\[0, 1\], but these reach from -2 to 2: the model normalises"),
        (lambda x: x - 1e-4, ValueError, r"reach from -0\.0001 to 0\.9999"),
        (lambda x: x + 1e-5, ValueError, r"reach from [0-9.e-]+ to 1\.00001"),
        (lambda x: x.index_fill(0, torch.tensor([2, 3]), float("nan")), ValueError, "image 2 holds NaN or infinity"),
        (lambda x: x.index_fill(0, torch.tensor([1]), float("inf")), ValueError, "image 1 holds NaN or infinity"),
        (lambda x: x.index_fill(0, torch.tensor([3]), float("-inf")), ValueError, "image 3 holds NaN or infinity"),
        (lambda x: x[0], ValueError, r"\(N, C, H, W\), not \(3, 8, 8\)"),
        (lambda x: x.tolist(), TypeError, "floating point tensor, not <class 'list'>"),
    ],
)
def test_images_that_are_not_what_they_claim_are_refused(spoil, error, message, call):
    model, images, labels = model_and_images("linear")
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    with pytest.raises(error, match=message):
        call(model, spoil(images), labels)


@pytest.mark.parametrize(
    ("dtype", "beyond"),
    [
        (torch.float32, 9e-7),
        (torch.float32, 3e-8),
        (torch.float64, 9e-7),
        (torch.float16, 9.7e-4),
        (torch.bfloat16, 7.8e-3),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_rounding_leaves_outside_is_clamped_and_nothing_else_changes(dtype, beyond, memory_format):
    images = torch.rand(2, 3, 4, 4).to(dtype, memory_format=memory_format)
    images[0, 0, 0, :3] = torch.tensor([-0.0, 0.0, 1.0])
    assert checked_images(images) is images
    outside = images.clone()
    outside[1, 0, 0, :2] = torch.tensor([-beyond, 1 + beyond], dtype=torch.float64).to(dtype)
    before = outside.clone()
    clamped = checked_images(outside)
    assert torch.equal(outside, before)
    expected = outside.clone()
    expected[1, 0, 0, :2] = torch.tensor([0.0, 1.0])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()]
    assert torch.equal(clamped.contiguous().view(bits), expected.contiguous().view(bits))
    assert clamped.is_contiguous(memory_format=memory_format)
    with pytest.raises(ValueError, match="reach from"):
        checked_images(outside - 0.02)


def test_resized_images_are_attacked(call):
    model, images, labels = model_and_images("linear")
    images[0, 0, 0, :2] = torch.tensor([-3e-8, 1 + 1.2e-7])
    expected = call(model, images.clamp(0, 1), labels)
    assert torch.equal(call(model, images, labels), expected)


def split_of(images, labels):
    return Split("digits", "test", images, labels, tuple("0123456789"))


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(4, 3, 8, 8).int(), torch.arange(4), TypeError, r"uint8 from 0 to 255, .* not torch\.int32"),
        (torch.randn(4, 3, 8, 8), torch.arange(4), ValueError, r"in \[0, 1\], but these reach from -\d"),
        (255 * torch.rand(4, 3, 8, 8), torch.arange(4), ValueError, "divide by 255"),
        (torch.full((4, 3, 8, 8), torch.nan), torch.arange(4), ValueError, "image 0 holds NaN"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.arange(4.0), TypeError, r"labels as int64, not torch\.float32"),
        (torch.zeros(4, 3, 8, 8).byte(), torch.arange(3), ValueError, r"\(4, 3, 8, 8\) and \(3,\)"),
        (torch.zeros(3, 8, 8).byte(), torch.arange(3), ValueError, r"\(N, C, H, W\)"),
    ],
)
def test_a_split_of_something_else_is_refused(images, labels, error, message):
    with pytest.raises(error, match=message):
        split_of(images, labels)


def test_a_split_clamps_what_rounding_has_left():
    images = torch.tensor([-3e-8, 1 + 1.2e-7]).view(1, 1, 1, 2)
    assert split_of(images, torch.zeros(1, dtype=torch.int64)).images.flatten().tolist() == [0, 1]


# ---- what a model returns ----

Named = namedtuple("Named", ["loss", "logits"])


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


WRAPPED = {
    "dict with logits": lambda logits: {"loss": torch.zeros(()), "logits": logits, "hidden": logits[:1]},
    "dict with one tensor": lambda logits: {"out": logits, "name": "x"},
    "ordered dict": lambda logits: OrderedDict(logits=logits),
    "tuple": lambda logits: (logits, logits[:1]),
    "list": lambda logits: [logits],
    "named tuple": lambda logits: Named(torch.zeros(()), logits),
    "object": lambda logits: Output(logits, logits[:1]),
    "namespace": lambda logits: SimpleNamespace(logits=logits),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_logits_are_taken_out_of_what_holds_them(wrap, call, digits):
    model, images, labels = model_and_images("linear", size=32)
    expected = call(model, images, labels)
    assert torch.equal(call(lambda x: wrap(model(x)), images, labels), expected)
    split = split_of((255 * images).byte(), labels)
    left = [evaluate_fgsm(each, split, [0.1])[1].correct for each in (model, lambda x: wrap(model(x)))]
    assert left[0] == left[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits[:, 0], r"not one number an image, \(4,\).*torch\.stack"),
        (lambda logits: logits[:, :1], r"not one number an image, \(4, 1\).*torch\.stack"),
        (lambda logits: logits[:, :1].sigmoid(), "not one number an image"),
        (lambda logits: logits.argmax(1), r"logits \(N, classes\), not torch\.int64"),
        (lambda logits: None, "not <class 'NoneType'>"),
        (lambda logits: (), "not <class 'tuple'>"),
        (lambda logits: {"a": logits, "b": logits}, "not <class 'dict'>"),
        (lambda logits: logits[None], r"with N=4, not \(1, 4, 10\)"),
        (lambda logits: logits[:2], r"with N=4, not \(2, 10\)"),
        (lambda logits: logits * float("nan"), "NaN"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(spoil, message, call):
    model, images, labels = model_and_images("linear")
    with pytest.raises(AttackError, match=message):
        call(lambda x: spoil(model(x)), images, labels)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_outputs_detached_from_the_images_are_an_attack_error(attack):
    """Although the logits still need a gradient, for the sake of a parameter that no module holds."""
    _, images, labels = model_and_images("linear")
    weight = nn.Parameter(torch.randn(3 * 8 * 8, 10))
    labels = (images.flatten(1) @ weight).argmax(1)
    with pytest.raises(AttackError, match="does not depend on the images"):
        attack(lambda x: x.detach().flatten(1) @ weight, images, labels, epsilon=0.1)


def test_a_network_that_works_in_place_does_not_change_the_images(call):
    model, images, labels = model_and_images("linear")
    before = images.clone()
    call(lambda x: model(x.sub_(0.5)), images, labels)
    assert torch.equal(images, before)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_evaluate_refuses_one_sigmoid(attack, digits):
    model, _, _ = model_and_images("linear", size=32)
    with pytest.raises(AttackError, match="not one number an image"):
        evaluate(lambda x: model(x)[:, :1].sigmoid(), digits["test"].first(4), attack, 1.0)
