"""Folding: normalisation and batch norm move into the convolutions, which then compute the same in less time.

An attack asks a network for thousands of gradients while the weights stay the same, so this pays. `fold` makes such a
network from a CNN or CNNLSTM.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PerChannel = Sequence[float]  # one number for each channel of an image

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
_IN_PLACE: dict[type, Callable[[Tensor], Tensor]] = {nn.ReLU: F.relu_, nn.SiLU: partial(F.silu, inplace=True)}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Normalize(nn.Module):
    """(x - mean) / std for each channel. Networks normalise inside, so that images and epsilon stay in pixel units.

    mean, std: one number for each channel, in pixel units. images: float (N, C, H, W); returns the same shape.
    Raises ValueError unless they have as many numbers, those of std above 0, and those of mean below 2; and if images
    have another number of channels. (Otherwise PyTorch would repeat a grey channel.)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: PerChannel, std: PerChannel) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std need a number for each channel, and std numbers above 0, not {mean}, {std}")
        if not max(mean) < 2:
            raise ValueError(f"mean and std are in pixel units, and pixels in [0, 1]: divide both by 255, not {mean}")
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        return (images - self.mean) / self.std

    def check(self, images: Tensor) -> None:
        """Raise ValueError unless images are (N, C, H, W) with as many channels as `mean`."""
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(f"images must be (N, {len(self.mean)}, H, W), not {tuple(images.shape)}")


@torch.inference_mode(False)  # which would turn gradients on again, were it the inner one
@torch.no_grad()
def fold(network: nn.Module) -> nn.Module:
    """A module that computes what `network` computes in evaluation mode, up to rounding, a sixth faster in attacks.

    network: a CNN or CNNLSTM, with `normalize`, `features` and `head`. The result has the network's present weights:
    call `fold` again after each change. If nothing has changed, the call returns the same convolutions as before.
    Returns the network itself if folding might change the function: if parts were replaced by other kinds, were
    patched or have hooks, or if the precision is so low that another order of rounding would show.
    """
    if not _can_fold(network):
        return network
    settings, tensors = _ingredients(network)
    features = network.get_submodule("features")
    known = _known.get(features)
    if known is None or known[0] != settings or not all(map(torch.equal, known[1], tensors)):
        known = settings, [tensor.clone() for tensor in tensors], _FoldedConvolutions(network)
        _known[features] = known
    return _FoldedNetwork(network, known[2])


class _FoldedNetwork(nn.Module):
    def __init__(self, network: Any, convolutions: "_FoldedConvolutions") -> None:
        super().__init__()
        self.head, self.convolutions = network.head, convolutions
        # On a CPU. With more images, a layer's output does not fit into the cache. It is also so large that malloc
        # gives it back to the kernel after each use, and asks for it again, page by page.
        self.images_at_once = max(1, 4096 // len(convolutions.weights[0]))
        # So that `modules()` finds what the head runs, such as an LSTM.
        self._modules = {name: part for name, part in network.named_children() if name not in ("normalize", "features")}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.convolutions(images))


class _FoldedConvolutions:
    """Computes network.features(network.normalize(images)) without a layer for normalisation or batch norm.

    Normalisation and batch norm multiply each channel by a scale and add a shift. The scale goes into the weights of
    the next convolution. The shift becomes part of that convolution's bias, which is then a map, not a number, because
    the zeros that pad the border are not shifted. Only the last batch norm has no convolution after it and remains.
    """

    def __init__(self, network: Any) -> None:
        self.normalize: Normalize = network.normalize
        self.originals: list[nn.Conv2d] = [block[0] for block in network.features]
        self.activations = [_IN_PLACE[type(block[1])] for block in network.features]
        self.weights: list[Tensor] = []
        self.shifts: list[Tensor] = []
        self._size: tuple[int, ...] = ()
        self._biases: list[Tensor] = []
        scale = (1 / network.normalize.std)[None]
        shift = -network.normalize.mean * scale
        for convolution, _, norm in network.features:
            weight = convolution.weight * scale
            self.weights.append(weight.contiguous(memory_format=torch.channels_last))
            self.shifts.append(shift.expand(1, weight.shape[1], 1, 1))
            scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(1, -1, 1, 1)
            shift = norm.bias.view(1, -1, 1, 1) - norm.running_mean.view(1, -1, 1, 1) * scale
        self.scale, self.shift = scale, shift

    def __call__(self, images: Tensor) -> Tensor:
        self.normalize.check(images)
        images = images.to(torch.promote_types(images.dtype, self.weights[0].dtype))  # as normalisation does
        if self._size != images.shape[2:]:  # kept for one size, because nobody attacks images of several sizes
            self._size, self._biases = images.shape[2:], self._bias_maps(images.shape[2:])
        layers = zip(self.originals, self.weights, self._biases, self.activations, strict=True)
        for convolution, weight, bias, activation in layers:
            images = F.conv2d(images, weight, None, convolution.stride, convolution.padding)
            images = activation(images.add_(bias.to(images.dtype)))  # types that differ are slow to add
        return torch.addcmul(self.shift, images, self.scale)

    @torch.no_grad()
    def _bias_maps(self, size: Sequence[int]) -> list[Tensor]:
        """Each convolution's bias, (1, channels, height, width), for images of this height and width."""
        biases = []
        # Not in bfloat16, although the first pass may be: passes in float32 use the same maps.
        with torch.autocast(self.scale.device.type, enabled=False):
            for convolution, shift in zip(self.originals, self.shifts, strict=True):
                bias = convolution(shift.expand(-1, -1, *size))
                biases.append(bias.contiguous(memory_format=torch.channels_last))
                size = bias.shape[2:]
        return biases


# From network.features to the settings and tensors it had when it was folded, and the result.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[list, list[Tensor], _FoldedConvolutions]]
_known = weakref.WeakKeyDictionary()


def _ingredients(network: Any) -> tuple[list, list[Tensor]]:
    """Everything that the folded weights depend on: settings and tensors."""
    settings, tensors = [], [network.normalize.mean, network.normalize.std]
    for convolution, activation, norm in network.features:
        weight = convolution.weight
        settings.append(
            (type(activation), convolution.stride, convolution.padding, norm.eps, weight.dtype, weight.device)
        )
        tensors += [weight, convolution.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return settings, tensors


def _can_fold(network: Any) -> bool:
    """Whether `_FoldedConvolutions` computes the same as network.normalize and network.features."""
    if type(network.normalize) is not Normalize or type(network.features) is not nn.Sequential:
        return False
    for block in network.features:
        kinds = [type(part) for part in block.children()]
        if type(block) is not nn.Sequential or len(kinds) != 3:
            return False
        if kinds[::2] != [nn.Conv2d, nn.BatchNorm2d] or kinds[1] not in _IN_PLACE:
            return False
        convolution, _, norm = block
        plain = (convolution.padding_mode, convolution.dilation, convolution.groups) == ("zeros", (1, 1), 1)
        complete = all(tensor is not None for tensor in (convolution.bias, norm.bias, norm.running_mean))
        if not (plain and complete) or convolution.weight.dtype not in (torch.float32, torch.float64):
            return False
    modules = list(network.modules())
    return not any("forward" in vars(module) or any(getattr(module, kind) for kind in _HOOKS) for module in modules)
