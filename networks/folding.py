"""Normalisation and batch norm folded into convolutions: the same function of the images, in less time."""

import weakref

import torch
import torch.nn.functional as F
from torch import nn

from networks.cnn import Normalize

_KEPT = weakref.WeakKeyDictionary()  # convolutions: (the numbers they were folded from, what came of them)


def folded(network):
    """A module that computes what `network` (CNN or CNNLSTM) does in evaluation mode, to rounding, with its weights as
    they are now: for attacks, whose gradient passes take a sixth less time.

    It is the network itself where that might be another function: where parts were replaced or have hooks, batch norm
    is in training mode, or the precision is so low that another order of rounding tells.
    """
    if not _foldable(network):
        return network
    normalize, features = network.normalize, network.features
    numbers = torch.cat([tensor.detach().flatten() for tensor in _numbers(normalize, features)])
    before, convolutions = _KEPT.get(features, (None, None))
    if before is None or before.device != numbers.device or not torch.equal(before, numbers):
        convolutions = _Convolutions(normalize, features)
        _KEPT[features] = numbers, convolutions
    return _Folded(convolutions, network.head)


class _Folded(nn.Module):
    def __init__(self, convolutions, head):
        super().__init__()
        self.convolutions, self.head = convolutions, head

    def forward(self, images):
        return self.head(self.convolutions(images))


class _Convolutions:
    """Of scale * relu(convolution) + shift, `scale` goes into the next convolution's weights, and what that makes of
    `shift`, a map because the border is padded with zeros, into the place of its bias.
    """

    @torch.no_grad()
    def __init__(self, normalize, features):
        self.originals, self.weights, self.shifts, self._biases = [block[0] for block in features], [], [], {}
        scale, shift = 1 / normalize.std, -normalize.mean / normalize.std
        for convolution, _, norm in features:
            weight = convolution.weight * scale.view(1, -1, 1, 1)
            self.weights.append(weight.contiguous(memory_format=torch.channels_last))
            self.shifts.append(shift.view(1, -1, 1, 1))
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
        self.scale, self.shift = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    def __call__(self, images):
        biases = self._biases.get(images.shape[2:]) or self._biases_for(images.shape[2:])
        for convolution, weight, bias in zip(self.originals, self.weights, biases, strict=True):
            images = F.conv2d(images, weight, None, convolution.stride, convolution.padding).add_(bias).relu_()
        return torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()
    def _biases_for(self, size):
        """A map for each convolution, (1, channels, height, width), of images of that height and width."""
        biases, height_and_width = [], size
        for convolution, shift in zip(self.originals, self.shifts, strict=True):
            bias = convolution(shift.expand(-1, -1, *height_and_width))
            biases.append(bias.contiguous(memory_format=torch.channels_last))
            height_and_width = bias.shape[2:]
        self._biases = {size: biases}  # of one size, for so many does nobody use
        return biases


def _numbers(normalize, features):
    """All that the folded weights depend on."""
    yield from (normalize.mean, normalize.std)
    for convolution, _, norm in features:
        yield from (convolution.weight, convolution.bias)
        yield from (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def _foldable(network):
    """Whether network.normalize and network.features are as they were made, and in evaluation mode."""
    if type(network.normalize) is not Normalize or type(network.features) is not nn.Sequential:
        return False
    if "forward" in vars(network):
        return False
    for block in network.features:
        if type(block) is not nn.Sequential or [type(part) for part in block] != [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]:
            return False
        convolution, _, norm = block
        if norm.training or convolution.weight.dtype not in (torch.float32, torch.float64):
            return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, kind) for module in network.modules() for kind in hooks)
