"""Folded networks: the same function, of the weights as they are now, or the network itself."""

import copy
import gc
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attacks import fgsm_direction
from networks import CNN, CNNLSTM
from networks.folding import ACTIVATIONS


def network_of(kind, **options):
    """With weights and statistics that are not those of a new network; in evaluation mode."""
    torch.manual_seed(0)
    network = kind(**({"width": 4} | options))
    for block in network.features:
        norm = block[2]
        nn.init.normal_(norm.weight)  # some are negative
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return network.eval()


def assert_same(network, images):
    folded = network.folded_for_attacks()
    assert folded is not network
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [CNN, CNNLSTM])
def test_same_function(kind, activation):
    network, images = network_of(kind, activation=activation), torch.rand(3, 3, 32, 32)
    assert_same(network, images)
    assert_same(network, images.contiguous(memory_format=torch.channels_last))
    assert_same(network.double(), images.double())


def test_same_function_of_larger_images():
    network = network_of(CNNLSTM)
    for size in ((32, 32), (48, 32), (32, 32)):
        assert_same(network, torch.rand(2, 3, *size))


def test_passes_in_bfloat16_leave_those_in_float32_as_they_were():
    network, images = network_of(CNN), torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        network.folded_for_attacks()(images)
    torch.testing.assert_close(network.folded_for_attacks()(images), network(images), rtol=0, atol=1e-5)


def test_no_operation_mixes_types_in_bfloat16():
    """Adding a bias in float32 would take as long as a convolution."""

    class Additions(TorchDispatchMode):
        types: ClassVar[list[set[torch.dtype]]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.add_.Tensor:
                self.types.append({tensor.dtype for tensor in args})
            return function(*args, **(kwargs or {}))

    folded = network_of(CNN).folded_for_attacks()
    with torch.autocast("cpu", torch.bfloat16), Additions():
        folded(torch.rand(2, 3, 32, 32))
    assert Additions.types == [{torch.bfloat16}] * 6


def test_a_wider_network_gets_fewer_images_at_once():
    at_once = [network_of(CNN, width=width).folded_for_attacks().images_at_once for width in (8, 32, 96)]
    assert at_once == [512, 128, 42]  # so that a layer's output is as large at every width


def test_what_is_folded_records_no_gradients():
    folded = network_of(CNN).folded_for_attacks()
    assert not folded.convolutions(torch.rand(2, 3, 32, 32)).requires_grad


def test_of_the_weights_as_they_are_now():
    """Even if they changed where autograd does not count it."""
    network, images = network_of(CNN), torch.rand(2, 3, 32, 32)
    for tensor in (
        network.normalize.mean,
        network.features[0][0].weight,
        network.features[5][0].bias,
        network.features[5][2].running_var,
        network.features[2][2].bias,
        network.classifier.weight,
    ):
        assert_same(network, images)
        tensor.data.mul_(1.5)
        assert_same(network, images)
    network.load_state_dict(network_of(CNN).state_dict())
    assert_same(network, images)
    network.features[1][0] = nn.Conv2d(4, 4, 3, 2, padding=1)
    assert_same(network, images)
    network.features[1][2].eps = 0.5
    assert_same(network, images)


@pytest.mark.parametrize("kind", [CNN, CNNLSTM])
def test_signs_are_those_of_the_network(kind):
    network, images, labels = network_of(kind), torch.rand(40, 3, 32, 32), torch.arange(40) % 10
    difference = fgsm_direction(network, images, labels) != fgsm_direction(lambda x: network(x), images, labels)
    assert difference.float().mean() < 1e-3  # where the gradient is zero but for rounding


class Smoothed(CNN):
    def forward(self, images):
        return super().forward(images.round())


def hooked(network):
    network.features[3].register_forward_hook(lambda module, inputs, output: output + 1)


def other_activation(network):
    network.features[3][1] = nn.GELU()


def other_forward(network):
    network.features[0][0].forward = lambda images: images[:, :1].expand(-1, 4, -1, -1)


def other_input(network):
    network.normalize = nn.Identity()


def other_padding(network):
    network.features[1][0].padding_mode = "circular"


def depthwise(network):
    network.features[1][0] = nn.Conv2d(4, 4, 3, 2, padding=1, groups=4)


def no_bias(network):
    network.features[1][0] = nn.Conv2d(4, 4, 3, 2, padding=1, bias=False)


def no_statistics(network):
    network.features[1][2] = nn.BatchNorm2d(4, track_running_stats=False).eval()


def fourth_layer(network):
    network.features[1].append(nn.Dropout(0.5))


CHANGES = [
    fourth_layer,
    hooked,
    other_activation,
    other_input,
    other_forward,
    other_padding,
    depthwise,
    no_bias,
    no_statistics,
]


@pytest.mark.parametrize("change", [*CHANGES, CNN.bfloat16])
def test_network_itself_where_folding_might_change_it(change):
    network = network_of(CNN)
    change(network)
    assert network.folded_for_attacks() is network


def test_subclass_is_itself():
    network = network_of(Smoothed)
    assert network.folded_for_attacks() is network


class Wrapper(nn.Module):
    """As torch.compile's: what it has not, its network has."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.network, name)

    def forward(self, images):
        return self.network(1 - images)


def test_wrapper_is_attacked_and_not_what_it_wraps():
    network, images, labels = network_of(CNN), torch.rand(5, 3, 32, 32), torch.arange(5)
    wrapper = Wrapper(network)
    assert wrapper.folded_for_attacks() is not wrapper  # so it could be mistaken for a network of ours
    assert torch.equal(
        fgsm_direction(wrapper, images, labels), fgsm_direction(lambda x: network(1 - x), images, labels)
    )


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float16)])
def test_other_precision_of_images(dtypes):
    """Normalisation promotes them, as in the network."""
    network, images = network_of(CNN).to(dtypes[0]), torch.rand(3, 3, 32, 32).to(dtypes[1])
    assert_same(network, images)
    labels = torch.arange(3)
    assert fgsm_direction(network, images, labels).dtype == dtypes[1]


def test_what_is_kept_goes_with_the_network_and_not_into_copies():
    network = network_of(CNN)
    network.folded_for_attacks()
    twin, gone = copy.deepcopy(network), weakref.ref(network.features)
    assert list(twin.state_dict()) == list(network.state_dict())
    del network
    gc.collect()
    assert gone() is None
    assert_same(twin, torch.rand(1, 3, 32, 32))
