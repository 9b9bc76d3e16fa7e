"""Initial weights that know the training images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def whiten(convolution: nn.Conv2d, images: Tensor) -> None:
    """Set filters to principal components of the images' patches, and keep the whole layer as it is in the training.

    Half of the filters are the leading components, of norm 1; the other half are the same with the opposite sign,
    because a rectifier passes one sign only. More filters than twice the number of components stay as they were drawn.
    The idea is Jordan's (2024, airbench, arXiv:2404.00498, section 3.1).

    convolution: reads the images. images: float (N, C, H, W), as the convolution receives them.
    """
    patches = F.unfold(images, convolution.kernel_size).transpose(1, 2).flatten(0, 1).double()
    _, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # columns, by rising variance
    leading = components.flip(1).T[: len(convolution.weight) // 2]
    filters = torch.cat([leading, -leading]).to(convolution.weight)
    convolution.weight[: len(filters)] = filters.view(-1, *convolution.weight.shape[1:])
    convolution.bias.zero_()  # type: ignore[union-attr]
    convolution.requires_grad_(False)
