"""Does a model give an image the same logits every time? Attacks and evaluations are misled where it does not."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from attacks.core import Model, attacking, logits_of, warn
from attacks.modules import modules_of

SMALL = 16  # images that the model is examined with
PASSES = 4  # over them again: a model that throws a coin in each pass is found in 15 of 16 examinations

RANDOM = (
    "the model gives the same images other logits from pass to pass: it is random, or keeps a state; eot=K makes an "
    "attack follow its mean gradient over K passes"
)
BATCH_DEPENDENT = (
    "the model's logits for an image depend on the other images of its batch, as batch norm's do in training mode: an "
    "accuracy holds for these batches alone"
)
CHANGED = "the model changes its own buffers, such as batch norm's statistics, while it is attacked"
PROBABILITIES = (
    "the model returns probabilities, not logits: where they round to 0 or 1, the gradient vanishes and attacks fail"
)
LOG_PROBABILITIES = (
    "the model returns log-probabilities, not logits: attacks work, but raw logits would be more precise"
)

_known: ContextVar[tuple[Model, tuple[str, ...]] | None] = ContextVar("known", default=None)


def examined(model: Model, images: Tensor) -> tuple[str, ...]:
    """What may mislead an attack on the model: some of the texts above, each also a RuntimeWarning; usually ().

    The first SMALL of the images, (N, C, H, W) in [0, 1], go through the model in one pass, and half of them once more,
    reordered and in other company. Where an image's logits are not the same up to rounding, two passes more tell why.
    Inside `remembering` the model is not asked again, and nothing is warned of.
    """
    known = _known.get()
    if known is not None and known[0] is model:
        return known[1]
    found = _examine(model, images[:SMALL].detach()) if len(images) else ()
    for text in found:
        warn(text)
    return found


@contextlib.contextmanager
def remembering(model: Model, found: tuple[str, ...]) -> Iterator[None]:
    """A context in which `examined` returns what it has found out earlier about this model."""
    token = _known.set((model, found))
    try:
        yield
    finally:
        _known.reset(token)


def _examine(model: Model, images: Tensor) -> tuple[str, ...]:
    found = []
    half, company = images[: (len(images) + 1) // 2], 1 - images[: (len(images) + 2) // 4]
    with attacking(model, images.device), torch.no_grad():
        logits = logits_of(model, images)
        before = [buffer.clone() for buffer in _buffers(model)]  # a lazy layer has them after the first pass
        again = [logits_of(model, images) for _ in range(PASSES)]
        in_company = logits_of(model, torch.cat([half, company]).flip(0)).flip(0)[: len(half)]
        if any(_differ(logits, other, 1e-4, 2) for other in again):
            found.append(RANDOM)
        elif _differ(logits[: len(half)], in_company, 1e-2, 8):  # a batch of another size may be rounded elsewhere
            found.append(BATCH_DEPENDENT)
        if not all(map(_same, before, _buffers(model))):
            found.append(CHANGED)
    return *found, *_unlike_logits(logits)


def _differ(logits: Tensor, others: Tensor, relative: float, units: float) -> bool:
    """Whether two answers, (N, K), to the same images differ by more than rounding explains.

    relative: of the spread of an image's logits over the classes. units: of the rounding unit of the largest logit.
    """
    unit = torch.finfo(logits.dtype).eps * logits.nan_to_num(0, 0, 0).abs().max().item()
    first, second = (answer.double().nan_to_num(0, 0, 0) for answer in (logits, others))
    spread = (first - first.mean(1, keepdim=True)).square().mean().sqrt().item()
    return (first - second).square().mean().sqrt().item() > relative * spread + units * unit


def _buffers(model: Model) -> list[Tensor]:
    return [buffer for module in modules_of(model) for buffer in module.buffers(recurse=False)]


def _same(before: Tensor, after: Tensor) -> bool:
    return torch.equal(before.nan_to_num(), after.nan_to_num())


def _unlike_logits(logits: Tensor) -> tuple[str, ...]:
    """Whether the rows of logits (N, K) are probabilities or their logarithms, which real logits are not by chance."""
    tolerance = max(2e-6, 4 * torch.finfo(logits.dtype).eps)
    logits = logits.double()
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < tolerance).all():
        return (PROBABILITIES,)
    if (logits <= 0).all() and (logits.logsumexp(1).abs() < tolerance).all():
        return (LOG_PROBABILITIES,)
    return ()
