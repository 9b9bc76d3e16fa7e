"""AutoAttack: the standard ensemble of four attacks, run by its authors' package."""

import contextlib
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attacks.core import (
    AttackError,
    Model,
    attacking,
    checked_batch,
    forward,
    input_gradient,
    logits_of,
    margin,
    per_image_cross_entropy,
    warn_of_zero_gradient,
    zero_gradient,
)
from attacks.norms import bounded, check_epsilon
from attacks.progress import report_progress

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FEWEST_CLASSES = 4  # that apgd-t needs: its loss compares the three largest logits with the target's
NORMS = {"linf": "Linf", "l2": "L2"}  # our names and the package's
QUERIES = 5000  # of Square, for each image


def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    norm: str = "linf",
    attacks: Sequence[str] = STANDARD,
    queries: int = QUERIES,
    seed: int = 0,
) -> Tensor:
    """AutoAttack (Croce and Hein, 2020, arXiv:2003.01690), by the authors' `pyautoattack`.

    Four attacks without parameters run one after the other, each on the images that the network still classifies
    correctly: APGD on cross-entropy, targeted APGD on the difference of logits ratio, targeted FAB, and Square, which
    needs no gradient.

    model, images, labels, epsilon, norm: as for `fgsm`, but in float32. The targeted attacks try 9 classes, or all the
        other classes if there are fewer.
    attacks: some of STANDARD, for a part of the ensemble. "apgd-t" needs a network with at least 4 classes; the others
        work with 2.
    queries: how often Square may ask the network about an image; 5,000 in the standard ensemble.
    seed: of all random numbers. torch's own generators are afterwards as they were before.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]: a misclassified image where an attack succeeded, otherwise the original. Such images only
    just fool the model, and seldom another one; for another network, take `pgd` without early_stop.
    Raises what `fgsm` raises, ValueError for unknown attacks, AttackError if the network has too few classes for an
    attack, and ImportError without the package. Warns
    (RuntimeWarning) where the package warns that it may be the wrong attack for a network (a random or dynamic defence,
    or probabilities in place of logits), and if an image withstands the attack and its gradient is zero in every pixel.
    """
    check_epsilon(epsilon, norm)
    images = checked_batch(images, labels)
    if images.dtype != torch.float32:
        raise TypeError(f"AutoAttack needs float32 images, not {images.dtype}")
    if not attacks or set(attacks) - set(STANDARD):
        raise ValueError(f"attacks must be some of {', '.join(STANDARD)}, not {attacks!r}")
    if len(images) == 0 or epsilon == 0:
        return images.detach().clone()
    try:
        from pyautoattack import AutoAttack, checks
    except ImportError as error:
        raise ImportError("AutoAttack needs the package pyautoattack: pip install pyautoattack") from error

    with attacking(model, images.device), _random_state_kept(images.device), _log_as_warnings():
        originals, labels = images.detach().clone(memory_format=torch.contiguous_format), labels.clone()
        classes, flat = _classes_and_flat(model, originals, labels, gradients=set(attacks) != {"square"})
        if classes < FEWEST_CLASSES and "apgd-t" in attacks:
            raise AttackError(
                f"AutoAttack's apgd-t needs a network with {FEWEST_CLASSES} classes, not {classes}: leave it out, with "
                f"attacks={[attack for attack in STANDARD if attack != 'apgd-t']}"
            )
        targets = min(9, classes - 1)
        passes = {"apgd-ce": 100, "apgd-t": 100 * targets, "fab-t": 200 * targets, "square": queries}
        reporting = _reporting(model, sum(passes[attack] for attack in attacks))
        radius = float(epsilon if norm == "linf" else bounded(float(epsilon), images.shape))
        ensemble = AutoAttack(reporting, norm=NORMS[norm], eps=radius, seed=seed, device=images.device)
        ensemble.attacks_to_run = list(attacks)
        ensemble.square.n_queries = queries
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = targets
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # the package still counts calls of earlier models
        tracing = sys.gettrace()
        try:
            adversarial, _ = ensemble.run_standard_evaluation(originals, labels, batch_size=len(originals))
        finally:
            sys.settrace(tracing)  # the package switches tracing off when it looks for dynamic defences
    if (flat & (adversarial == originals).flatten(1).all(1)).any():
        warn_of_zero_gradient()
    return torch.empty_like(images).copy_(adversarial)


def _classes_and_flat(model: Model, images: Tensor, labels: Tensor, gradients: bool) -> tuple[int, Tensor]:
    """The number of classes, and which images (N,) are classified correctly but have gradients of zero in every pixel.

    The package itself would follow a gradient of NaN, and does not always report a gradient of zero: here, the first
    raises AttackError. gradients: False if no attack needs them; then they are not computed and nothing is flat.
    """
    if not gradients:
        logits, _ = forward(model, images, labels, per_image_cross_entropy)
        return logits.shape[1], torch.zeros_like(labels, dtype=torch.bool)
    logits, _, gradient = input_gradient(model, images, labels)
    flat = zero_gradient(gradient) & (logits.argmax(1) == labels)
    if flat.any():  # some attacks of the ensemble follow another gradient, so cross-entropy alone does not decide
        flat &= zero_gradient(input_gradient(model, images, labels, margin)[2])
    return logits.shape[1], flat


def _reporting(model: Model, passes: int) -> Model:
    """The model, which reports after each forward pass how many of about `passes` are done."""
    done = itertools.count(1)

    def reporting(images: Tensor) -> Tensor:
        logits = logits_of(model, images)
        report_progress(min(1.0, next(done) / passes))
        return logits

    return reporting


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards, torch's generators, which the package seeds, are as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _log_as_warnings() -> Iterator[None]:
    """Each warning that the package writes to its log becomes a RuntimeWarning."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.warn(  # type: ignore[method-assign]  # for this handler only
        f"AutoAttack: {record.getMessage()}", RuntimeWarning, stacklevel=2
    )
    logger = logging.getLogger("auto-attack")
    propagate, level, logger.propagate = logger.propagate, logger.level, False
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)
