"""Muon: the step it promises for filters, and plain SGD for everything else."""

import copy

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torch.optim import SGD

from networks import CNN
from utils.optimizers import Muon, build_optimizer, orthogonalized
from utils.recipes import RECIPES

RECIPE = replace(RECIPES["robust"], lr=0.05, momentum=0.6, other_lr=0.1, weight_decay=5e-4)


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (5, 5)])
def test_orthogonalized_keeps_directions_and_evens_their_lengths(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalized(matrix, steps=5)
    lengths = u.T @ made @ v.T
    assert made.shape == matrix.shape
    torch.testing.assert_close(lengths, torch.diag(lengths.diagonal()), atol=1e-9, rtol=0)
    assert (lengths.diagonal() > 0.6).all()
    assert (lengths.diagonal() < 1.3).all()


def test_orthogonalized_is_the_plain_iteration():
    matrix = torch.randn(6, 20, dtype=torch.float64)
    expected = matrix / matrix.norm()
    for _ in range(3):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalized(matrix), expected, rtol=1e-5, atol=1e-7)


def test_no_gradient_is_no_step():
    assert orthogonalized(torch.zeros(3, 5)).eq(0).all()
    network = CNN(width=4)
    before = copy.deepcopy(network.state_dict())
    Muon(network.parameters(), RECIPE).step()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_filters_that_are_zero_stay_finite():
    filters = torch.nn.Parameter(torch.zeros(4, 3, 3, 3))
    filters.grad = torch.ones_like(filters)
    Muon([filters], RECIPES["fast"]).step()
    assert filters.isfinite().all()


def test_filters_take_orthogonal_steps_and_all_else_those_of_sgd():
    """Two steps, so that the momentum counts; the second at half the rate."""
    network, images = CNN(width=4), torch.rand(8, 3, 32, 32)
    reference = copy.deepcopy(network)
    muon = build_optimizer(network, RECIPE)
    others = [parameter for parameter in reference.parameters() if parameter.ndim != 4]
    sgd = SGD(others, RECIPE.other_lr, 0.9, nesterov=True, weight_decay=RECIPE.weight_decay)
    buffers = {}
    for part in (1.0, 0.5):
        for group in muon.param_groups:
            group["lr"] = part * RECIPE.lr * group["relative_lr"]
        sgd.param_groups[0]["lr"] = part * RECIPE.other_lr
        for each, optimizer in ((network, muon), (reference, sgd)):
            each.zero_grad()
            nn.functional.cross_entropy(each(images), torch.arange(8)).backward()
            optimizer.step()
        for name, weight in reference.named_parameters():
            if weight.ndim == 4:
                buffers[name] = RECIPE.momentum * buffers.get(name, 0) + weight.grad
                direction = orthogonalized((weight.grad + RECIPE.momentum * buffers[name]).flatten(1))
                scaled = weight.data * (len(weight) ** 0.5 / weight.data.norm())
                weight.data = scaled - part * RECIPE.lr * direction.view_as(weight)
        for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_not_trained_has_no_part_in_it():
    network = CNN(width=4)
    network.features[0][0].requires_grad_(False)
    trained = [p for group in build_optimizer(network, RECIPE).param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in network.parameters() if p.requires_grad}
