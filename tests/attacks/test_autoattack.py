"""AutoAttack gives the same images as its authors' package alone, and leaves everything else as it was."""

import random
import sys
import warnings

import numpy as np
import pytest
import torch

from attacks import AttackError, autoattack, pgd
from tests.helpers.attacked import TinyLSTM, model_and_images
from utils.checkpoints import load_checkpoint

pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
QUICK = ("apgd-ce", "apgd-t", "fab-t")  # Square asks the network thousands of times


@pytest.fixture(scope="module")
def attacked(digits, trained):
    network, split = load_checkpoint(trained("cnn")), digits["test"].first(30)
    return network, split.images / 255, split.labels


def test_equals_the_package_itself(attacked):
    network, images, labels = attacked
    ensemble = pyautoattack.AutoAttack(network, eps=0.03, seed=5)
    ensemble.attacks_to_run = list(QUICK)
    tracing = sys.gettrace()
    expected, _ = ensemble.run_standard_evaluation(images, labels, batch_size=30)
    sys.settrace(tracing)  # the package switches off the tracing of debuggers and coverage
    adversarial = autoattack(network, images, labels, epsilon=0.03, attacks=QUICK, seed=5)
    assert torch.equal(adversarial, expected)


@pytest.mark.slow
def test_in_l2_it_equals_the_package_itself(attacked):
    network, images, labels = attacked
    ensemble = pyautoattack.AutoAttack(network, eps=0.5, seed=5, norm="L2")
    ensemble.attacks_to_run = ["apgd-ce", "square"]
    ensemble.square.n_queries = 50
    tracing = sys.gettrace()
    expected, _ = ensemble.run_standard_evaluation(images, labels, batch_size=30)
    sys.settrace(tracing)
    options = {"norm": "l2", "attacks": ("apgd-ce", "square"), "queries": 50, "seed": 5}
    adversarial = autoattack(network, images, labels, epsilon=0.5, **options)
    assert torch.equal(adversarial, expected)
    assert (adversarial - images).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6
    assert (adversarial - images).abs().max() > 0.05


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("channels", "size", "classes"),
    [(1, 8, 3), pytest.param(3, 64, 5, marks=pytest.mark.slow), (3, 8, 2), (3, 8, 1000)],
)
def test_any_images_and_classes_work_or_are_refused_in_one_line(channels, size, classes, norm):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * size**2, classes))
    images = torch.rand(3, channels, size, size)
    labels = model(images).argmax(1)
    epsilon, few = (0.02 if norm == "linf" else 0.3), ("apgd-ce", "fab-t", "square")
    for answer in (model, lambda x: {"logits": model(x)}):
        options = {"epsilon": epsilon, "norm": norm, "queries": 20}
        if classes < 4:
            with pytest.raises(AttackError, match=rf"apgd-t needs a network with 4 classes, not {classes}: leave it"):
                autoattack(answer, images, labels, **options)
            options["attacks"] = few
        adversarial = autoattack(answer, images, labels, **options)
        offset = (adversarial - images).flatten(1)
        assert offset.norm(float("inf") if norm == "linf" else 2, dim=1).max() <= epsilon + 1e-6


def test_is_at_least_as_strong_as_pgd_and_stays_in_the_ball(attacked):
    network, images, labels = attacked
    images = images.to(memory_format=torch.channels_last)
    adversarial = autoattack(network, images, labels, epsilon=0.05, attacks=QUICK)
    assert adversarial.is_contiguous(memory_format=torch.channels_last)
    assert (adversarial - images).abs().max() <= 0.05 + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    by_pgd = pgd(network, images, labels, epsilon=0.05)
    left = [(network(x).argmax(1) == labels).sum().item() for x in (adversarial, by_pgd, images)]
    assert left[0] <= left[1] < left[2]


def test_square_is_part_of_it(attacked):
    network, images, labels = attacked
    images, labels = images[:4], labels[:4]
    adversarial = autoattack(network, images, labels, epsilon=0.3, attacks=("square",))
    left = [(network(x).argmax(1) == labels).sum() for x in (adversarial, images)]
    assert left[0] < left[1]


def recorded(monkeypatch):
    """The ensembles that are run; each is left as autoattack has set it, and finds nothing."""
    ensembles = []

    def run(self, images, labels, **_):
        ensembles.append(self)
        return images, labels

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    return ensembles


def test_options_reach_the_attacks_of_the_package(monkeypatch):
    ensembles = recorded(monkeypatch)
    model, images, labels = model_and_images("linear", size=32)
    autoattack(model, images, labels, epsilon=0.1, queries=123, seed=7)
    autoattack(lambda x: model(x)[:, :4], images, labels % 4, epsilon=0.1, attacks=("square", "fab-t"))
    first, second = ensembles
    assert (first.square.n_queries, second.square.n_queries) == (123, 5000)
    for targeted in ("apgd_targeted", "fab"):
        assert [getattr(ensemble, targeted).n_target_classes for ensemble in ensembles] == [9, 3]
    assert first.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert second.attacks_to_run == ["square", "fab-t"]
    assert (first.epsilon, first.seed) == (0.1, 7)


def test_square_asks_as_often_as_queries_allow(attacked):
    """Here the attack is too weak to succeed before that."""
    network, images, _ = attacked
    images, labels = images[:2], network(images[:2]).argmax(1)

    def calls(queries):
        asked = []
        autoattack(
            lambda x: (asked.append(len(x)), network(x))[1],
            images,
            labels,
            epsilon=1e-4,
            attacks=("square",),
            queries=queries,
        )
        return len(asked)

    assert calls(40) - calls(20) == 20


def test_leaves_model_random_numbers_and_tracing_as_they_were(attacked):
    network, images, labels = attacked
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), sys.gettrace()
    autoattack(network, images[:2], labels[:2], epsilon=0.03, attacks=QUICK[:1])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), sys.gettrace()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert network.training
    network.eval()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_few_classes_and_one_image():
    model, images, _ = model_and_images("linear", size=32, count=1)
    adversarial = autoattack(lambda x: model(x)[:, :4], images, torch.tensor([2]), epsilon=0.1, attacks=QUICK)
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6


def test_warnings_of_the_package_are_shown(attacked):
    network, images, labels = attacked
    with pytest.warns(RuntimeWarning, match="probability distribution"):
        autoattack(lambda x: network(x).softmax(1), images[:2], labels[:2], epsilon=0.01, attacks=QUICK[:1])
    with pytest.warns(RuntimeWarning, match="randomized defense"):
        autoattack(
            lambda x: network(x + 0.1 * torch.rand_like(x)), images[:2], labels[:2], epsilon=0.01, attacks=QUICK[:1]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoattack(network, images[:2], labels[:2], epsilon=0.01, attacks=QUICK[:1])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match="pip install pyautoattack"):
        autoattack(TinyLSTM(), torch.rand(1, 3, 8, 8), torch.tensor([0]), epsilon=0.1)


@pytest.mark.parametrize("epsilon", [0, 0.1])
def test_nothing_to_do(epsilon, attacked):
    network, images, labels = attacked
    count = 0 if epsilon else 3
    adversarial = autoattack(network, images[:count], labels[:count], epsilon=epsilon)
    assert torch.equal(adversarial, images[:count])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attacks": ("fgsm",)}, ValueError, "apgd-ce"),
        ({"attacks": ()}, ValueError, "apgd-ce"),
        ({"epsilon": -1}, ValueError, "epsilon"),
        ({"images": torch.rand(2, 3, 8, 8).double()}, TypeError, "float32"),
        ({"images": 2 * torch.ones(2, 3, 8, 8)}, ValueError, r"\[0, 1\]"),
        ({"labels": torch.tensor([0, 10])}, ValueError, r"0\.\.9"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"images": torch.rand(2, 3, 8, 8), "labels": torch.tensor([0, 1]), "epsilon": 0.1, **change}
    with pytest.raises(error, match=message):
        autoattack(TinyLSTM(), **arguments)


def test_missing_gradients_are_reported(attacked):
    """As by the other attacks: NaN is an error, zeros are a warning."""

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(context, images, factor):
            context.factor = factor
            return images.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * context.factor, None

    network, images, labels = attacked
    images, labels = images[:4], network(images[:4]).argmax(1)
    with pytest.raises(AttackError, match="NaN or infinity"):
        autoattack(lambda x: network(Spoilt.apply(x, float("nan"))), images, labels, epsilon=0.03, attacks=QUICK[:1])
    with pytest.warns(RuntimeWarning, match="zero in every pixel of some images"):
        autoattack(lambda x: network(Spoilt.apply(x, 0)), images, labels, epsilon=0.03, attacks=QUICK[:1])
