"""Models whose logits do not stay the same are told, honest ones never; fresh passes judge attacks on them."""

import os
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attacks import fgsm, pgd
from attacks.core import attacking, evaluation_mode, holding, input_gradient
from attacks.state import BATCH_DEPENDENT, CHANGED, LOG_PROBABILITIES, PROBABILITIES, RANDOM, examined, remembering
from networks import CNN, CNNLSTM, SmallCNN
from tests.helpers.attacked import TinyLSTM, model_and_images


class Changing(nn.Module):
    """A small network in evaluation mode, and something that it does to its images, its logits or itself."""

    def __init__(self):
        super().__init__()
        self.net = model_and_images("cnn")[0].double().eval().float()
        self.calls = 0

    def forward(self, images):
        return self.net(images)


class Noisy(Changing):
    sigma = 0.03

    def forward(self, images):
        return self.net(images + self.sigma * torch.randn_like(images))


class SlightlyNoisy(Noisy):
    sigma = 0.001


class NoisyLogits(Changing):
    def forward(self, images):
        logits = self.net(images)
        return logits + 0.01 * logits.std() * torch.randn_like(logits)


class DropsOut(Changing):
    def forward(self, images):
        return self.net(F.dropout(images, 0.1, training=True))


class RandomForOneImage(Changing):
    def forward(self, images):
        logits = self.net(images).clone()
        logits[0] += torch.randn(10)
        return logits


class CountsItsCalls(Changing):
    """Every second answer is another one."""

    def forward(self, images):
        self.calls += 1
        return self.net(images) * (1 if self.calls % 2 else -1)


class Ages(Changing):
    def forward(self, images):
        self.calls += 1
        return self.net(images) + 0.1 * self.calls * torch.eye(10)[0]


class NoiseFromASeed(Changing):
    """The same noise in every pass, so that an image's noise depends on its place in the batch."""

    def forward(self, images):
        generator = torch.Generator().manual_seed(0)
        return self.net(images + 0.1 * torch.randn(images.shape, generator=generator))


class NormalisesByTheBatch(Changing):
    def forward(self, images):
        return self.net(F.batch_norm(images, None, None, training=True))


class SubtractsTheMean(Changing):
    def forward(self, images):
        logits = self.net(images)
        return logits - logits.mean(0)


class LooksAtTheFirst(Changing):
    def forward(self, images):
        return self.net(images + 0.2 * images[:1])


class KeepsStatistics(Changing):
    """Batch norm that learns its statistics whatever mode it is in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, images):
        F.batch_norm(images, self.mean, self.variance, training=True)
        return self.net(images)


DISHONEST = {
    Noisy: RANDOM,
    SlightlyNoisy: RANDOM,
    NoisyLogits: RANDOM,
    DropsOut: RANDOM,
    RandomForOneImage: RANDOM,
    CountsItsCalls: RANDOM,
    Ages: RANDOM,
    NoiseFromASeed: BATCH_DEPENDENT,
    NormalisesByTheBatch: BATCH_DEPENDENT,
    SubtractsTheMean: BATCH_DEPENDENT,
    LooksAtTheFirst: BATCH_DEPENDENT,
    KeepsStatistics: CHANGED,
}


@pytest.mark.parametrize("kind", DISHONEST)
@pytest.mark.parametrize("count", [4, 300])
def test_a_model_that_changes_is_told_of_once(kind, count):
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning) as told:
        found = examined(kind(), torch.rand(count, 3, 8, 8))
    assert found == (DISHONEST[kind],)
    assert [str(warning.message) for warning in told] == list(found)
    assert told[0].filename == __file__


def test_batch_norm_in_training_mode_that_nothing_finds_is_told(monkeypatch):
    net, images, labels = model_and_images("cnn", count=8)
    net[3].p = 0
    monkeypatch.setenv("NAME", "hidden")
    monkeypatch.setitem(globals(), "hidden", net)
    with pytest.warns(RuntimeWarning, match="depend on the other images"):
        pgd(lambda x: globals()[os.environ["NAME"]](x), images, labels, epsilon=0.1, steps=1)


HONEST = {
    "CNN": lambda: CNN(width=8),
    "CNNLSTM": lambda: CNNLSTM(width=8),
    "SmallCNN": lambda: SmallCNN(width=8),
    "LSTM": TinyLSTM,
    "batch norm": lambda: model_and_images("cnn", size=32)[0],
    "large logits": lambda: _times(1e4),
    "logits far from zero": lambda: _plus(1e4),
    "logits close together": lambda: _times(1e-4),
    "rippled": lambda: nn.Sequential(_Ripple(), CNN(width=8)),
    "quantised": lambda: nn.Sequential(_Quantised(), CNN(width=8), _Quantised()),
    "constant": lambda: _times(0),
}


def _times(factor):
    net = CNN(width=8)
    return lambda images: net(images) * factor


def _plus(offset):
    net = CNN(width=8)
    return lambda images: net(images) + offset


class _Ripple(nn.Module):
    def forward(self, images):
        return images + 0.004 * (2000 * images).sin()


class _Quantised(nn.Module):
    def forward(self, images):
        return (8 * images).round() / 8


@pytest.mark.parametrize("name", HONEST)
@pytest.mark.parametrize("how", ["float32", "float64", "bfloat16", "float16", "autocast", "channels_last", "cuda"])
@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_an_honest_network_is_never_accused(name, how, count):
    torch.manual_seed(count)
    network, images = HONEST[name](), torch.rand(count, 3, 32, 32)
    inner = network
    if how == "cuda":
        if not (torch.cuda.is_available() and isinstance(network, nn.Module)):
            pytest.skip("no CUDA device on this machine, or a function")
        images, inner = images.cuda(), network.cuda()
    elif how == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    elif how == "autocast":
        if name == "LSTM":
            pytest.skip("not every CPU has an LSTM in bfloat16")

        def inner(images):
            with torch.autocast("cpu", torch.bfloat16):
                return network(images).float()
    else:
        if not isinstance(network, nn.Module):
            pytest.skip("a function has no dtype")
        images, inner = images.to(getattr(torch, how)), network.to(getattr(torch, how))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert examined(inner, images) == ()


def test_probabilities_are_told_and_logits_are_not():
    net, images, labels = model_and_images("cnn", count=3)
    with pytest.warns(RuntimeWarning, match="probabilities, not logits"):
        assert examined(lambda x: net(x).softmax(1), images) == (PROBABILITIES,)
    with pytest.warns(RuntimeWarning, match="log-probabilities, not logits"):
        assert examined(lambda x: net(x).log_softmax(1), images) == (LOG_PROBABILITIES,)
    with pytest.warns(RuntimeWarning, match="probabilities, not logits"):
        pgd(lambda x: net(x).softmax(1), images, labels, epsilon=0.01, steps=1)
    for logits in (net(images).relu(), -net(images).relu(), net(images) - net(images).mean(1, keepdim=True) + 0.1):
        assert examined(lambda x, logits=logits: logits[:1].expand(len(x), -1), images) == ()


def test_what_is_remembered_is_not_found_out_again():
    net, images, labels = model_and_images("cnn")
    calls = []

    def counted(x):
        calls.append(len(x))
        return net(x)

    with remembering(counted, ()):
        pgd(counted, images, labels, epsilon=0.01, steps=2, random_start=False)
        assert len(calls) == 3
    calls.clear()
    pgd(counted, images, labels, epsilon=0.01, steps=2, random_start=False)
    assert calls[:6] == [4, 4, 4, 4, 4, 3]
    assert len(calls) == 9


# ---- expectation over transformation, and fresh passes ----


class OneInThree(nn.Module):
    """Two classes; the gradient of every third pass shows the right way, and that of the others a wrong one."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        value = images.flatten(1).sum(1)
        value = value if self.calls % 3 == 0 else value - 1.2 * (value - value.detach())
        return torch.stack([-value, value], 1)


def test_eot_is_the_mean_over_passes():
    _, images, labels = model_and_images("linear")
    labels = labels % 2
    model = OneInThree()
    single = [input_gradient(model, images, labels) for _ in range(3)]
    mean = [torch.stack(parts).mean(0) for parts in zip(*single, strict=True)]
    for found, expected in zip(input_gradient(model, images, labels, eot=3), mean, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_eot_of_an_honest_network_changes_nothing(attack):
    net, images, labels = model_and_images("cnn")
    net, images = net.double(), images.double()
    one, three = (attack(net, images, labels, epsilon=0.05, eot=eot) for eot in (1, 3))
    torch.testing.assert_close(one, three)


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize("eot", [0, -1, float("nan")])
def test_bad_eot_is_refused(attack, eot):
    net, images, labels = model_and_images("linear")
    with pytest.raises(ValueError, match="eot must be at least 1"):
        attack(net, images, labels, epsilon=0.1, eot=eot)


def accuracy_over_passes(model, images, labels, passes=200):
    with torch.no_grad():
        return torch.stack([model(images).argmax(1) == labels for _ in range(passes)]).float().mean().item()


@pytest.mark.filterwarnings("ignore:the model gives the same images other logits")
def test_a_lucky_pass_does_not_end_the_attack_on_a_random_model():
    """Its logits are drowned in noise, so that nearly every image is misclassified by some pass of the attack."""
    torch.manual_seed(0)
    net, images, _ = model_and_images("cnn", count=50)
    labels = net.eval()(images).argmax(1)
    spread = net(images).std()

    def random(x):
        logits = net(x)
        return logits + spread * torch.randn_like(logits)

    with remembering(random, ()):  # as if nobody knew
        lucky = pgd(random, images, labels, epsilon=0.02, steps=10)
    judged = pgd(random, images, labels, epsilon=0.02, steps=10)
    assert accuracy_over_passes(random, judged, labels) < accuracy_over_passes(random, lucky, labels) - 0.1


@pytest.mark.filterwarnings("ignore:the model gives the same images other logits")
def test_eot_is_stronger_on_a_random_model():
    torch.manual_seed(0)
    net, images, _ = model_and_images("cnn", count=50)
    labels = net.eval()(images).argmax(1)

    def random(x):
        return net(x + 0.5 * torch.randn_like(x))

    left = [accuracy_over_passes(random, pgd(random, images, labels, epsilon=0.02, eot=eot), labels) for eot in (1, 20)]
    assert left[1] < left[0]


@pytest.mark.filterwarnings("ignore:the model's logits for an image depend")
def test_a_batch_is_attacked_as_a_whole_where_it_decides():
    """In the end the batch is judged together, so a result with images from several iterates would mean nothing."""
    torch.manual_seed(0)
    net, images, _ = model_and_images("cnn", count=30)
    net.eval()

    def by_the_batch(x):
        return net(F.batch_norm(x, None, None, training=True))

    labels = by_the_batch(images).argmax(1)
    seen = []

    def recording(x):
        logits = by_the_batch(x)
        seen.append(F.cross_entropy(logits, labels).item() if len(x) == 30 else 0)
        return logits

    adversarial = pgd(recording, images, labels, epsilon=0.05, steps=5)
    assert F.cross_entropy(by_the_batch(adversarial), labels).item() == pytest.approx(max(seen), rel=1e-5)


# ---- several threads ----


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_threads_that_attack_one_model_leave_it_as_it_was(first_ends_first):
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    inside = {name: threading.Event() for name in "ab"}
    ended = {name: threading.Event() for name in "ab"}
    seen = []

    def attack(name):
        with attacking(model, torch.device("cpu")):
            inside[name].set()
            for event in inside.values():
                event.wait(10)
            if (name == "a") != first_ends_first:
                ended["b" if name == "a" else "a"].wait(10)
            seen.append((model.training, model.weight.requires_grad))
        ended[name].set()

    threads = [threading.Thread(target=attack, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [(False, False)] * 2
    assert (model.training, model.weight.requires_grad, model.bias.requires_grad) == (True, True, False)


def test_threads_that_attack_two_models_through_each_other_do_not_wait_for_ever():
    models, both = [nn.Linear(4, 3), nn.Linear(4, 3)], threading.Barrier(2)

    def attack(first, second):
        with attacking(first, torch.device("cpu")):
            both.wait(10)
            with attacking(second, torch.device("cpu")):
                both.wait(10)

    threads = [threading.Thread(target=attack, args=order, daemon=True) for order in (models, models[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert all(model.training and model.weight.requires_grad for model in models)


def test_a_mode_that_is_set_inside_is_that_of_the_context_around():
    model = nn.Linear(4, 3)
    with attacking(model, torch.device("cpu")):
        model.training = True
        with evaluation_mode(model):
            assert not model.training
        assert model.training
    assert model.training


def test_the_last_of_two_contexts_turns_cudnn_on_again():
    first, second = (holding([torch.backends.cudnn], "enabled") for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cudnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.enabled


def test_a_model_that_throws_one_coin_for_the_batch_is_random():
    """Two passes agree half of the time, so the examination makes more of them."""
    model, images, _ = model_and_images("cnn", count=8)

    def mirrored(images):
        return model(images.flip(-1) if torch.rand(()) < 0.5 else images)

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [examined(mirrored, images) for _ in range(200)]
    assert sum(RANDOM in each for each in found) >= 180
