"""Normalisation and batch norm folded into convolutions: the same function of the images, in less time."""

import weakref

import torch
import torch.nn.functional as F
from torch import nn

# network.features: (settings and tensors they were folded from, what came of them)
_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Normalize(nn.Module):
    """(x - mean) / std for each channel, inside the network: outside, images and epsilon are always in pixel units.

    Raises ValueError for images of other channels: grey ones would be broadcast to three, and pass for colours.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images):
        self.check(images)
        return (images - self.mean) / self.std

    def check(self, images):
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(f"images must be (N, {len(self.mean)}, H, W), not {tuple(images.shape)}")


@torch.no_grad()
@torch.inference_mode(False)
def folded(network):
    """A module that computes what `network` (CNN or CNNLSTM) does in evaluation mode, to rounding, with its weights as
    they are now: for attacks, whose gradient passes take a sixth less time.

    It is the network itself where that might be another function: where parts were replaced by other kinds, patched, or
    given hooks, or the precision is so low that another order of rounding tells.
    """
    if not _foldable(network):
        return network
    settings, tensors = _origin(network)
    kept = _KEPT.get(network.features)
    if kept is None or kept[0] != settings or not all(map(torch.equal, kept[1], tensors)):
        kept = settings, [tensor.clone() for tensor in tensors], _Convolutions(network)
        _KEPT[network.features] = kept
    return _Folded(network.head, kept[2], dict(network.named_children()))


class _Folded(nn.Module):
    # On a CPU. Of more, a layer takes so much memory that malloc returns it to the kernel and asks anew, page by page.
    images_at_once = 64

    def __init__(self, head, convolutions, parts):
        super().__init__()
        self.head, self.convolutions = head, convolutions
        self._modules = {name: part for name, part in parts.items() if name not in ("normalize", "features")}

    def forward(self, images):
        return self.head(self.convolutions(images))


class _Convolutions:
    """Of scale * relu(convolution) + shift, `scale` goes into the next convolution's weights, and what that makes of
    `shift`, a map because the border is padded with zeros, into the place of its bias.
    """

    def __init__(self, network):
        features, self.weights, self.shifts, self._biases = network.features, [], [], {}
        self.normalize, self.originals = network.normalize, [block[0] for block in features]
        scale = (1 / network.normalize.std)[None]
        shift = -network.normalize.mean * scale
        for convolution, _, norm in features:
            weight = convolution.weight * scale
            self.weights.append(weight.contiguous(memory_format=torch.channels_last))
            self.shifts.append(shift.expand(1, weight.shape[1], 1, 1))
            scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(1, -1, 1, 1)
            shift = norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale
        self.scale, self.shift = scale, shift

    def __call__(self, images):
        self.normalize.check(images)
        images = images.to(torch.promote_types(images.dtype, self.weights[0].dtype))  # as normalisation does
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
        self._biases = {size: biases}  # of one size, for more is more than anybody uses
        return biases


def _origin(network):
    """All that the folded weights depend on: settings, and tensors."""
    settings, tensors = [], [network.normalize.mean, network.normalize.std]
    for convolution, _, norm in network.features:
        weight = convolution.weight
        settings.append((convolution.stride, convolution.padding, norm.eps, weight.dtype, weight.device))
        tensors += [weight, convolution.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return settings, tensors


def _foldable(network):
    """Whether network.normalize and network.features are such that `_Convolutions` can stand in for them."""
    if type(network.normalize) is not Normalize or type(network.features) is not nn.Sequential:
        return False
    for block in network.features:
        if type(block) is not nn.Sequential or [type(part) for part in block] != [nn.Conv2d, nn.ReLU, nn.BatchNorm2d]:
            return False
        convolution, _, norm = block
        plain = (convolution.padding_mode, convolution.dilation, convolution.groups) == ("zeros", (1, 1), 1)
        whole = all(tensor is not None for tensor in (convolution.bias, norm.bias, norm.running_mean))
        if not (plain and whole) or convolution.weight.dtype not in (torch.float32, torch.float64):
            return False
    modules = list(network.modules())
    return not any("forward" in vars(module) or any(getattr(module, kind) for kind in _HOOKS) for module in modules)
