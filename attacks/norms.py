"""The balls that attacks stay in, around each image and inside [0, 1]: their radii, steps and random starts.

Radii and distances are in pixel units. "linf" is the largest change of a pixel. "l2" is the root of the sum of the
squared changes of all pixels and channels of an image.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Radius = float | Tensor  # of all images, or (N,) with one for each image


def check_epsilon(epsilon: Radius, norm: str = "linf") -> None:
    """Raise ValueError unless epsilon is a radius for pixels in [0, 1], and norm is "linf" or "l2".

    An L-infinity radius is from 0 to 1. An L2 radius is finite and at least 0.
    """
    if norm not in BALLS:
        raise ValueError(f"norm must be one of {', '.join(BALLS)}, not {norm!r}")
    smallest, largest = epsilon.aminmax() if isinstance(epsilon, Tensor) else (epsilon, epsilon)
    if norm == "l2":
        if not (smallest >= 0 and math.isfinite(largest)):
            raise ValueError(f"epsilon, an L2 radius, must be finite and at least 0, not {epsilon}")
    elif not (smallest >= 0 and largest <= 1):  # NaN fails this test too
        hint = f": did you mean {float(largest):g}/255?" if 1 < largest <= 255 else ""
        raise ValueError(f"epsilon must be from 0 to 1, not {epsilon}{hint}")


def step(images: Tensor, direction: Tensor, size: Radius, low: float | Tensor = 0, high: float | Tensor = 1) -> Tensor:
    """images + size * direction, clamped to low..high: a new tensor of the images' shape and dtype.

    direction: -1, 0 or 1 in each pixel. size: at least 0, in pixel units; 0 returns a plain copy; or a tensor
    (N, 1, 1, 1). low, high: numbers, or tensors of the images' shape.
    """
    # A step of 1 crosses the whole range. A larger size might not fit the dtype of the images.
    if isinstance(size, Tensor):
        return images.addcmul(direction, size.clamp(max=1)).clamp_(low, high)  # type: ignore[arg-type]
    if size == 0:
        return images.clone()
    return images.add(direction, alpha=min(float(size), 1.0)).clamp_(low, high)  # type: ignore[arg-type]


class LinfBall:
    """The images in [0, 1] whose pixels are each within epsilon of those of `images`, float (N, C, H, W)."""

    def __init__(self, images: Tensor, epsilon: Radius) -> None:
        radius = per_image(epsilon, images)
        self.low, self.high = (images - radius).clamp_(0, 1), (images + radius).clamp_(0, 1)

    def moved(self, iterate: Tensor, gradient: Tensor, size: Radius) -> Tensor:
        """The iterate after a step of this size along the sign of the gradient, brought back into the ball."""
        return step(iterate, gradient.sign().to(iterate), per_image(size, iterate), self.low, self.high)

    @staticmethod
    def noise(shape: torch.Size, radius: Radius, generator: torch.Generator) -> Tensor:
        """Uniform noise in the ball around zero, float32 (N, C, H, W) on the CPU."""
        return torch.rand(shape, generator=generator).mul_(2 * radius).sub_(radius)


class L2Ball:
    """The images in [0, 1] whose Euclidean distance from those of `images`, float (N, C, H, W), is at most epsilon."""

    def __init__(self, images: Tensor, epsilon: Radius) -> None:
        # Sums of squares need more digits and a wider range than half precision has.
        self.images = images.to(torch.promote_types(images.dtype, torch.float32))
        self.radius = bounded(per_image(epsilon, self.images), images.shape)

    def moved(self, iterate: Tensor, gradient: Tensor, size: Radius) -> Tensor:
        """The iterate after a step of this length along the gradient, brought back into the ball."""
        if not isinstance(size, Tensor) and size == 0:
            return iterate.clone()
        size = bounded(per_image(size, self.images), iterate.shape)
        offset = iterate - self.images + size * unit(gradient.to(self.images))
        # Within [0, 1] each pixel is brought nearer to the image, so the second clamp does not leave the ball.
        offset *= (self.radius / length(offset).clamp_min(torch.finfo(offset.dtype).tiny)).clamp(max=1)
        return (self.images + offset).clamp_(0, 1).to(iterate.dtype)

    @staticmethod
    def noise(shape: torch.Size, radius: Radius, generator: torch.Generator) -> Tensor:
        """Uniform noise in the ball around zero, float32 (N, C, H, W) on the CPU.

        A direction is uniform if each of its D numbers is normal. The part of the ball within r is r^D.
        """
        direction = unit(torch.randn(shape, generator=generator))
        part = torch.rand(shape[:1], generator=generator).pow(1 / math.prod(shape[1:])).view(-1, 1, 1, 1)
        return direction * part * bounded(radius, shape)


BALLS: dict[str, type[LinfBall] | type[L2Ball]] = {"linf": LinfBall, "l2": L2Ball}


def noise_source(images: Tensor, epsilon: Radius, seed: int, norm: str = "linf") -> Iterator[Tensor]:
    """Uniform noise in the ball of radius epsilon around zero, (N, C, H, W), again and again.

    The noise is drawn on the CPU, so it is the same on every device. It is drawn for the whole batch, because an
    image's noise must not depend on which images have stopped.
    """
    generator = torch.Generator().manual_seed(seed)
    radius = per_image(epsilon, torch.empty(0))
    while True:
        yield BALLS[norm].noise(images.shape, radius, generator).to(images)


def per_image(size: Radius, images: Tensor) -> Radius:
    """A number as float; a tensor (N,) as (N, 1, 1, 1) with the dtype and device of the images."""
    return size.to(images).view(-1, 1, 1, 1) if isinstance(size, Tensor) else float(size)


def bounded(size: Radius, shape: torch.Size) -> Radius:
    """The L2 size, or the largest distance of two images in [0, 1] of this shape (N, C, H, W), if that is less."""
    largest = math.sqrt(math.prod(shape[1:]))
    return size.clamp(max=largest) if isinstance(size, Tensor) else min(size, largest)


def length(differences: Tensor, power: int = 2) -> Tensor:
    """The L2 or L1 length of each difference of two images, (N, C, H, W), as (N, 1, 1, 1). power: 2 or 1."""
    return differences.flatten(1).norm(power, dim=1).view(-1, 1, 1, 1)


def unit(gradient: Tensor, power: int = 2) -> Tensor:
    """The gradient of each image, (N, C, H, W), at L2 or L1 length 1. A gradient of zeros stays zero."""
    tiny = torch.finfo(gradient.dtype).tiny
    # Divided by its largest number first: the squares of a small gradient round to zero.
    gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    return gradient / length(gradient, power).clamp_min(tiny)
