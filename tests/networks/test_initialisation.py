"""Whitened filters: what they do to the images they were made from."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.initialisation import whiten


@pytest.mark.parametrize("width", [8, 54, 70])
def test_filters_are_the_leading_directions_with_both_signs(width):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, width, 3, padding=1)
    drawn = convolution.weight.detach().clone()
    images = F.avg_pool2d(torch.randn(50, 3, 18, 18), 3, 1)  # neighbouring pixels are alike, as in photographs
    whiten(convolution, images)
    half = min(width // 2, 27)
    filters = convolution.weight.flatten(1)
    torch.testing.assert_close(filters[:half] @ filters[:half].T, torch.eye(half), rtol=0, atol=1e-5)
    assert torch.equal(filters[:half], -filters[half : 2 * half])
    assert torch.equal(convolution.weight[2 * half :], drawn[2 * half :])
    assert convolution.bias.eq(0).all()
    outputs = F.conv2d(images, convolution.weight[:half]).transpose(0, 1).flatten(1)
    spread = outputs.pow(2).mean(1)
    assert (spread[:-1] >= spread[1:]).all()  # by falling variance
    correlation = outputs @ outputs.T / outputs.shape[1]
    assert (correlation - torch.diag(spread)).abs().max() < 1e-3 * spread.max()
    assert not any(parameter.requires_grad for parameter in convolution.parameters())
