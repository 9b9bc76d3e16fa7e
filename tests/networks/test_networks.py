"""The networks are what their docstrings say."""

import re

import pytest
import torch
from torch import nn

from attacks import fgsm
from networks import CNN, CNNLSTM, NETWORKS
from networks.cost import multiply_adds


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("network", NETWORKS.values())
def test_docstring_gives_the_parameter_count(network):
    count = re.search(r"([\d,]+) parameters at width 32 with 10 classes", network.__doc__).group(1)
    assert parameters(network()) == int(count.replace(",", ""))


def test_parameter_counts_are_those_of_the_study():
    study = CNN()
    study.classifier = nn.Linear(2048, 64)  # the study's oversight: 64 outputs for 10 classes
    assert parameters(study) == 308_256
    assert parameters(CNNLSTM()) == 293_994


@pytest.mark.parametrize("network", NETWORKS.values())
@pytest.mark.parametrize(("width", "num_classes"), [(4, 3), (8, 10), (33, 100)])
def test_images_to_logits(network, width, num_classes):
    model = network(width=width, num_classes=num_classes).eval()
    assert model(torch.rand(5, 3, 32, 32)).shape == (5, num_classes)
    assert model.arguments == {"width": width, "num_classes": num_classes, "activation": "relu"}


@pytest.mark.parametrize("network", NETWORKS.values())
def test_normalisation_is_inside_and_saved_with_the_weights(network):
    torch.manual_seed(0)
    model = network(width=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()
    images = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(images[:, c] - (0.1, 0.2, 0.3)[c]) / (0.4, 0.5, 0.6)[c] for c in range(3)], 1)
    torch.testing.assert_close(model.normalize(images), by_hand)
    copy = network(width=4).eval()
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(images), model(images))


def test_lstm_reads_sixteen_positions_row_after_row():
    """A change of one position of the map changes that time step of the LSTM's input and no other."""
    model = CNNLSTM(width=4).eval()
    sequences = []
    model.lstm.register_forward_pre_hook(lambda _, inputs: sequences.append(inputs[0]))
    feature_map = torch.rand(1, 16, 4, 4)
    model.features = nn.Identity()
    model.normalize = nn.Identity()
    model(feature_map)
    assert sequences[0].shape == (1, 16, 16)
    for row in range(4):
        for column in range(4):
            assert torch.equal(sequences[0][0, 4 * row + column], feature_map[0, :, row, column])


@pytest.mark.parametrize("network", NETWORKS.values())
def test_memory_format_does_not_change_the_logits(network):
    torch.manual_seed(0)
    model, images = network(width=8).eval(), torch.rand(3, 3, 32, 32)
    expected = model(images)
    model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("network", NETWORKS.values())
def test_gradient_of_a_single_image_is_that_in_a_batch(network, memory_format):
    torch.manual_seed(0)
    model = network().eval().to(memory_format=memory_format)
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=memory_format)
    together, alone = (
        torch.autograd.grad(model(given).square().sum(), given)[0][0]
        for given in (images.clone().requires_grad_(), images[:1].clone().requires_grad_())
    )
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3 * together.abs().max().item())


def test_multiply_adds_by_hand():
    convolutions = sum(
        9 * channels_in * channels_out * side**2
        for channels_in, channels_out, side in [
            (3, 32, 32),
            (32, 32, 16),
            (32, 64, 16),
            (64, 64, 8),
            (64, 64, 8),
            (64, 128, 4),
        ]
    )
    assert multiply_adds(CNN()) == convolutions + 2048 * 10
    lstm = 16 * 4 * 64 * ((128 + 64) + 2 * (64 + 64))
    assert multiply_adds(CNNLSTM()) == convolutions + lstm + 64 * 10


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_images_of_other_channels_are_refused(name, shape):
    """Also through an attack, whose images need not be a network's."""
    network = NETWORKS[name](width=4)
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\), not"):
        network(torch.rand(shape))
    if len(shape) == 4:
        with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\), not"):
            fgsm(network, torch.rand(shape), torch.zeros(shape[0], dtype=torch.int64), epsilon=0.1)
