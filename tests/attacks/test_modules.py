"""Modules that model.modules() does not list are found, attacked in evaluation mode and left as they were."""

import functools
import weakref
from collections import OrderedDict, UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks import fgsm, pgd
from attacks.core import evaluation_mode
from attacks.modules import modules_of
from tests.helpers.attacked import TinyLSTM, model_and_images
from utils.evaluation import predictions


class Holder(nn.Module):
    """Calls the first module in what it holds, which it does not register."""

    def __init__(self, held, call):
        super().__init__()
        self.held, self.call = held, call

    def forward(self, images):
        return self.call(self.held)(images)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, images):
        return self.net(images)


class Plain:
    def __init__(self, net):
        self.net = net

    def __call__(self, images):
        return self.net(images)

    def classify(self, images):
        return self.net(images)


def with_closure_in_forward(net):
    class Local(nn.Module):
        def forward(self, images):
            return net(images)

    return Local()


def with_closure_in_call(net):
    class Local:
        def __call__(self, images):
            return net(images)

    return Local()


def hooked(net):
    identity = nn.Sequential()
    identity.register_forward_hook(lambda module, inputs, output: net(output))
    return identity


def patched(net):
    identity = nn.Sequential()
    identity.forward = lambda images: net(images)
    return identity


def through_a_global(net):
    space = {"net": net}
    exec("def classify(images):\n    return net(images)\nmodel = lambda images: classify(images)", space)
    return space["model"]


def wrapped(net):
    @functools.wraps(nn.Identity.forward)
    def classify(images):
        return net(images)

    return classify


def through_a_weak_reference(net):
    reference = weakref.ref(net)
    return lambda images: reference()(images)


FORMS = {
    "lambda": lambda net: lambda images: net(images),
    "default argument": lambda net: lambda images, net=net: net(images),
    "keyword-only default": lambda net: lambda images, *, net=net: net(images),
    "function in a function": lambda net: lambda images: (lambda x: net(x))(images),
    "bound method": lambda net: net.forward,
    "bound method of an object": lambda net: Plain(net).classify,
    "partial": lambda net: functools.partial(lambda net, images: net(images), net),
    "partial with a keyword": lambda net: functools.partial(lambda images, net: net(images), net=net),
    "object": Plain,
    "object with slots": Slotted,
    "namespace": lambda net: (lambda space: lambda images: space.a.net(images))(SimpleNamespace(a=Plain(net))),
    "list": lambda net: Holder([net], lambda held: held[0]),
    "tuple": lambda net: Holder((net,), lambda held: held[0]),
    "set": lambda net: Holder({net}, lambda held: next(iter(held))),
    "deque": lambda net: Holder(deque([net]), lambda held: held[0]),
    "dict": lambda net: Holder({"net": net}, lambda held: held["net"]),
    "UserDict": lambda net: Holder(UserDict(net=net), lambda held: held["net"]),
    "three containers": lambda net: Holder({"a": [OrderedDict(b=net)]}, lambda held: held["a"][0]["b"]),
    "lambda of a list of dicts": lambda net: (lambda held: lambda images: held[0]["a"](images))([{"a": net}]),
    "lambda of a module that hides": lambda net: (lambda holder: lambda images: holder(images))(
        Holder([Holder({"net": net}, lambda held: held["net"])], lambda held: held[0])
    ),
    "closure of a forward method": with_closure_in_forward,
    "closure of a call": with_closure_in_call,
    "hook": hooked,
    "patched forward": patched,
    "global": through_a_global,
    "wrapped": wrapped,
    "weak reference": through_a_weak_reference,
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request):
    return request.param


@pytest.mark.parametrize("attack", [fgsm, functools.partial(pgd, steps=2)], ids=["fgsm", "pgd"])
def test_hidden_modules_are_attacked_in_evaluation_mode_and_left_as_they_were(form, attack):
    net, images, labels = model_and_images("cnn")
    expected = attack(net, images, labels, epsilon=0.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    seen = []
    net[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.training, any(p.requires_grad for p in module.parameters())))
    )
    assert torch.equal(attack(form(net), images, labels, epsilon=0.1), expected)
    assert {training for training, _ in seen} == {False}
    assert (False, False) in seen  # with parameters frozen, where a gradient is taken
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_hidden_modules_are_found_with_their_parts_once(form):
    net, _, _ = model_and_images("cnn")
    found = modules_of(form(net))
    assert set(net.modules()) <= set(found)
    assert len(found) == len(set(found))


def test_predictions_are_those_of_the_network_in_evaluation_mode(form):
    net, images, _ = model_and_images("cnn", count=20)
    expected = net.eval()(images).argmax(1)
    assert torch.equal(predictions(form(net.train()), images, batch_size=7), expected)


def test_a_hidden_recurrent_layer_with_dropout_switches_cudnn_off_and_another_network_does_not(form):
    for net, enabled in ((TinyLSTM(num_layers=2, dropout=0.5), False), (TinyLSTM(), True)):
        seen = []
        next(net.children()).register_forward_hook(lambda *_, seen=seen: seen.append(torch.backends.cudnn.enabled))
        fgsm(form(net), torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), epsilon=0.1)
        assert set(seen) == {enabled}


def test_the_search_ends():
    """With cycles, long lists, cells without a value, and things that are not modules."""
    net = nn.Linear(2, 2)
    around = [net]
    around.append(around)
    for held in (around, [*range(10**6)], {"text": "x", "tensor": torch.ones(2), "type": int}, nn, print):
        holder = Holder(held, None)
        holder.itself = [holder]
        assert set(modules_of(holder)) == ({holder, net} if held is around else {holder})

    def later():
        return unset

    assert modules_of(later) == []
    unset = None
    assert modules_of(torch.relu) == modules_of(torch.nn.functional.relu) == []


def test_a_module_too_deep_to_be_seen_is_not_looked_for():
    net = nn.Linear(2, 2)
    with evaluation_mode(lambda images, deep=[[[[net]]]]: images):
        assert net.training
