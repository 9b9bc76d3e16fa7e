"""What the gradient attacks share: input checks, losses, gradients, and the state of a model under attack."""

import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.modules import modules_of

# A classifier: images (N, C, H, W) in [0, 1] to logits (N, K). An nn.Module is one, and so is a plain function.
# `logits_of` says what else it may return.
Model = Callable[[Tensor], Any]

# A loss of each image: logits (N, K) and labels (N,) to losses (N,).
Loss = Callable[[Tensor, Tensor], Tensor]


PRECISIONS = ("float32", "bfloat16")  # of the passes whose gradients an attack follows


class AttackError(ValueError):
    """The model's gradient is missing or not finite, or its logits are NaN, so a gradient attack cannot follow it."""


def checked_images(images: Tensor) -> Tensor:
    """The images, (N, C, H, W), clamped to [0, 1] where rounding has left it; the same tensor if none has.

    Rounding reaches 1e-6 beyond the range, and in half precision one unit of the dtype. Raises TypeError unless images
    are a floating point tensor; ValueError for another shape, for NaN or infinity, or if images lie outside [0, 1].
    """
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        hint = "; divide grey levels of 0 to 255 by 255" if getattr(images, "dtype", None) == torch.uint8 else ""
        raise TypeError(f"images must be a floating point tensor, not {getattr(images, 'dtype', type(images))}{hint}")
    if images.ndim != 4:
        raise ValueError(f"images must be (N, C, H, W), not {tuple(images.shape)}")
    if images.numel() == 0:
        return images
    low, high = (extreme.item() for extreme in images.aminmax())
    if low >= 0 and high <= 1:
        return images
    if not math.isfinite(low) or not math.isfinite(high):
        index = int(images.flatten(1).isfinite().all(1).int().argmin())
        raise ValueError(f"images must lie in [0, 1], but image {index} holds NaN or infinity")
    tolerance = max(1e-6, torch.finfo(images.dtype).eps)
    if low < -tolerance or high > 1 + tolerance:
        grey_levels = low >= 0 and 2 < high <= 255
        hint = "divide by 255" if grey_levels else "the model normalises them itself; after resampling, clamp(0, 1)"
        raise ValueError(f"images must lie in [0, 1], but these reach from {low:.7g} to {high:.7g}: {hint}")
    return images.clone().masked_fill_(images < 0, 0).masked_fill_(images > 1, 1)


def checked_batch(images: Tensor, labels: Tensor) -> Tensor:
    """The images as `checked_images` returns them. Raises also if labels are not int64 (N,), as `fgsm` documents."""
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64):
        raise TypeError(f"labels must be an int64 tensor, not {getattr(labels, 'dtype', type(labels))}")
    images = checked_images(images)
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need labels (N,) with N={len(images)}, not {tuple(labels.shape)}")
    return images


def check_eot(eot: int) -> None:
    """Raise ValueError unless eot, a number of passes, is at least 1."""
    if not eot >= 1:
        raise ValueError(f"eot must be at least 1, not {eot}")


def per_image_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image, (N,). logits: (N, K); labels: int64 (N,) in 0..K-1."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest logit of the other classes minus the label's logit, (N,). Above 0, the image is misclassified.

    Carlini and Wagner, 2017, arXiv:1608.04644, section V.A, f_6. Where a network is very sure, the gradient of
    cross-entropy vanishes, but the gradient of this loss does not. logits: (N, K); labels: int64 (N,) in 0..K-1.
    """
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_label, -math.inf).amax(1) - logits[is_label]


LOSSES: dict[str, Loss] = {"cross_entropy": per_image_cross_entropy, "margin": margin}


def check_loss(loss: str, losses: Iterable[str] = LOSSES) -> None:
    """Raise ValueError unless loss is a key of losses."""
    if loss not in losses:
        raise ValueError(f"loss must be one of {', '.join(losses)}, not {loss!r}")


def input_gradient(
    model: Model, images: Tensor, labels: Tensor, loss: Loss = per_image_cross_entropy, eot: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, K), losses (N,), and the gradient of each image's loss with respect to that image.

    Call it inside `attacking`. images: float (N, C, H, W); labels: int64 (N,). The gradient has the images' shape and
    dtype. eot: of how many passes all three are the mean (Athalye et al., 2018, arXiv:1802.00420, section 4.2.2).
    On a CPU, a model that has an attribute `images_at_once` receives at most so many images at once.
    Raises ValueError if logits and labels do not fit each other, AttackError if the gradient is missing or not finite.
    """
    if eot > 1:
        passes = [input_gradient(model, images, labels, loss) for _ in range(eot)]
        logits, losses, gradient = (torch.stack(parts).mean(0) for parts in zip(*passes, strict=True))
        return logits, losses, _finite(gradient)
    at_once = getattr(model, "images_at_once", None) if images.device.type == "cpu" else None
    if at_once and len(images) > at_once:
        chunks = -(-len(images) // at_once)
        pairs = zip(images.chunk(chunks), labels.chunk(chunks), strict=True)
        answers = [input_gradient(model, *pair, loss) for pair in pairs]
        logits, losses, gradient = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return logits, losses, gradient
    # On a CPU, torch 2.15 misreads the strides of a gradient between an LSTM and batch norm if they get a single image,
    # but not in this format.
    alone = len(images) == 1 and images.ndim == 4
    memory_format = torch.channels_last if alone else torch.preserve_format
    inputs = images.detach().clone(memory_format=memory_format).requires_grad_()
    logits, losses = forward(model, inputs, labels, loss)
    found = None
    if logits.requires_grad:  # perhaps for the sake of parameters alone; then the images are unused
        # Summed, not averaged: an image's gradient must not shrink when its batch grows.
        (found,) = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    if found is None:
        raise AttackError("the model's output does not depend on the images, or hides how: there is no gradient")
    return logits.detach(), losses.detach(), _finite(found)


def _finite(gradient: Tensor) -> Tensor:
    """The gradient. Raises AttackError if it holds NaN or infinity."""
    if gradient.numel() and not math.isfinite(gradient.abs().amax()):
        raise AttackError("the gradient of the model's loss holds NaN or infinity, so an attack cannot follow it")
    return gradient


def forward(model: Model, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and losses (N,) of images (N, C, H, W) and labels (N,).

    Raises ValueError unless the labels are in 0..K-1, and AttackError as `logits_of` does.
    """
    logits = logits_of(model, images)
    check_labels(labels, logits)
    return logits, loss(logits, labels)


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise ValueError unless the labels, int64 (N,), are in 0..K-1. logits: float (N, K)."""
    if labels.numel() and not 0 <= labels.amin() <= labels.amax() < logits.shape[1]:
        raise ValueError(f"labels must be classes of the model, in 0..{logits.shape[1] - 1}")


def check_precision(precision: str) -> None:
    """Raise ValueError unless gradients can be computed in this precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {' or '.join(PRECISIONS)}, not {precision!r}")


def in_bfloat16(model: Model) -> Model:
    """The same model, whose passes compute in bfloat16 where autocast says so; its logits are at least float32.

    It raises AttackError if the device lacks an operation of the model in bfloat16, as some CPUs lack an LSTM.
    """

    def reduced(images: Tensor) -> Tensor:
        try:
            with torch.autocast(images.device.type, torch.bfloat16):
                logits = logits_of(model, images)
                return logits.to(torch.promote_types(logits.dtype, torch.float32))
        except RuntimeError as error:
            if "could not create a primitive" in str(error) or "BFloat16" in str(error):
                raise AttackError("this device cannot compute the model in bfloat16: choose float32") from error
            raise

    reduced.images_at_once = getattr(model, "images_at_once", None)  # type: ignore[attr-defined]
    return reduced


def logits_of(model: Model, images: Tensor) -> Tensor:
    """The model's logits, float (N, K), for images (N, C, H, W).

    The model may return them as a tensor, as the entry "logits" or the only tensor of a dict, as the first item of a
    tuple or list, or as the attribute `logits` of an object. Raises AttackError if they are not there, if they have
    another shape or fewer than 2 classes, or if one is NaN.
    """
    output = model(images.clone())  # a copy, because the model's first operation may change its input
    logits = _unwrapped(output)
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        raise AttackError(f"the model must return logits (N, classes), not {getattr(logits, 'dtype', type(output))}")
    if logits.shape in ((len(images),), (len(images), 1)):
        raise AttackError(
            f"the model must return logits (N, classes), not one number an image, {tuple(logits.shape)}; a number z "
            "that is meant for a sigmoid makes two logits: torch.stack([torch.zeros_like(z), z], 1)"
        )
    if logits.ndim != 2 or len(logits) != len(images):
        raise AttackError(f"the model must return (N, classes) with N={len(images)}, not {tuple(logits.shape)}")
    if logits.isnan().any():
        raise AttackError("the model's logits hold NaN: they classify nothing")
    return logits


def _unwrapped(output: Any) -> Any:
    """What a model's output holds as logits; an output that holds none is returned as it is."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        return output.get("logits", tensors[0] if len(tensors) == 1 else output)
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, (tuple, list)) and output else output


def zero_gradient(gradient: Tensor) -> Tensor:
    """Which images have a gradient that is zero in every pixel: bool (N,)."""
    return ~gradient.flatten(1).any(1)


ZERO_GRADIENT = (
    "the gradient of the model's loss is zero in every pixel of some images, or of all, so the attack "
    "cannot follow it; surviving the attack there does not show robustness"
)

# What is called with each such warning; by default, nothing happens.
zero_gradient_listener: ContextVar[Callable[[], None]] = ContextVar("zero_gradient_listener", default=lambda: None)


def warn_of_zero_gradient() -> None:
    """Warn that the gradient of some images was zero in every pixel, and tell the listener.

    This is a warning, not an error: where a network is very sure, rounding makes the gradient zero, and a few such
    images should not end an evaluation. The message does not give their number, so that Python shows it once and not
    for every batch.
    """
    zero_gradient_listener.get()()
    warn(ZERO_GRADIENT)


def warn(message: str) -> None:
    """Give a RuntimeWarning that points at the code which called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "attacks":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def faster_equivalent(model: Model) -> Model:
    """A model that computes the same function in evaluation mode, but faster; or the model itself.

    A class offers a faster form by a method `folded_for_attacks()`. The method is looked up in the class: a wrapper
    that passes on the attributes of the model inside it may compute something else.
    """
    return model.folded_for_attacks() if hasattr(type(model), "folded_for_attacks") else model  # type: ignore[attr-defined]


@contextlib.contextmanager
def attacking(model: Model, device: torch.device) -> Iterator[None]:
    """The state in which a model on `device` is attacked. Afterwards the model is as it was before.

    The state is that of `evaluating`. In addition, parameters are frozen, because only the gradient with respect to
    the images is needed, and gradients are on, even inside no_grad and inference_mode. On a GPU, cuDNN can do the
    backward pass of a recurrent layer in training mode only. A recurrent layer without dropout computes the same in
    both modes, so it is put into training mode. A model with another recurrent layer runs without cuDNN, which is much
    slower. So does a plain function without a module that `modules_of` finds, because it may hide such a layer.
    Several threads may attack one model at the same time: see `holding`.
    """
    modules = modules_of(model)
    parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]
    trained = [layer for layer in recurrent if device.type == "cuda" and not layer.dropout]
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model, device, [module for module in modules if module not in trained]))
        stack.enter_context(holding(trained, "training", True))
        stack.enter_context(holding(parameters, "requires_grad"))
        if not modules or any(layer.dropout for layer in recurrent):
            stack.enter_context(holding([torch.backends.cudnn], "enabled"))
        # Autograd refuses tensors that are made inside inference mode.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextlib.contextmanager
def evaluating(model: Model, device: torch.device, modules: list[nn.Module] | None = None) -> Iterator[None]:
    """Evaluation mode in float32: without autocast, and on a GPU without TF32, which keeps only ten bits.

    On a GPU, cuDNN does not search for the fastest kernel meanwhile (torch.backends.cudnn.benchmark). It would search
    for each size of a batch, and attacks make many sizes, because they drop images that are fooled.
    modules: as for `evaluation_mode`.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model, modules))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(holding([torch.backends.cudnn], "benchmark"))
            stack.enter_context(holding([torch.backends.cudnn], "allow_tf32"))
            if hasattr(torch.backends.cudnn, "fp32_precision"):  # newer versions of torch have it beside allow_tf32
                stack.enter_context(holding([torch.backends.cudnn], "fp32_precision", "none"))
        yield


@contextlib.contextmanager
def evaluation_mode(model: Model, modules: list[nn.Module] | None = None) -> Iterator[None]:
    """Put every module of a model into evaluation mode, and afterwards back into the mode it was in.

    modules: what `modules_of` has found; None: it is asked. Threads may share a model: see `holding`.
    """
    with holding(modules_of(model) if modules is None else modules, "training"):
        yield


# By id and attribute: the object, how many contexts hold it, and the value that the last one to end restores.
_held: dict[tuple[int, str], list[Any]] = {}
_lock = threading.RLock()  # guards _held; a thread gives it back before a model runs, so threads do not block


@contextlib.contextmanager
def holding(objects: Sequence[Any], attribute: str, value: Any = False) -> Iterator[None]:
    """Set an attribute of some objects to a value, always the same one, and afterwards back to what it was.

    Threads share the objects: the first context that holds an object notes what it finds, and the last one restores
    it. So threads can attack one model at the same time; a thread that trains it meanwhile finds it frozen. Contexts
    can be nested.
    """
    changed = []  # what somebody has set although another context held it, and what was set
    with _lock:
        for each in objects:
            found = getattr(each, attribute)
            entry = _held.setdefault((id(each), attribute), [each, 0, found])
            if found != value:
                changed += [(each, found)] if entry[1] else []
                setattr(each, attribute, value)
            entry[1] += 1
    try:
        yield
    finally:
        with _lock:
            for each, found in changed:
                setattr(each, attribute, found)
            for each in objects:
                entry = _held[id(each), attribute]
                entry[1] -= 1
                if not entry[1]:
                    del _held[id(each), attribute]
                    if getattr(each, attribute) != entry[2]:
                        setattr(each, attribute, entry[2])
