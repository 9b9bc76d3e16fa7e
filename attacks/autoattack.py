"""AutoAttack: the standard ensemble, by its authors' package."""

import contextlib
import logging
import sys
import warnings

import torch

from attacks.core import (
    attacking,
    check_epsilon,
    check_images_and_labels,
    cross_entropy,
    forward,
    input_gradient,
    margin,
    no_gradient,
    warn_of_no_gradient,
)

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def autoattack(model, images, labels, *, epsilon, attacks=STANDARD, queries=5000, seed=0):
    """AutoAttack on the L-infinity ball (Croce and Hein, 2020, arXiv:2003.01690), by the authors' `pyautoattack`.

    Four attacks without parameters, one after the other, each on the images that are left: APGD on cross-entropy,
    targeted APGD on the difference of logits ratio, targeted FAB, and Square, which asks for no gradient.

    model, images, labels, epsilon: as for `fgsm`, in float32; the network needs at least 4 classes, and with fewer than
    10 the targeted attacks try those that there are. attacks: some of the four, for a part of the ensemble.
    queries: that Square may ask of the network for an image, 5,000 in the standard ensemble.
    seed: of all random numbers; torch's own generators are left as they were.

    Returns images of the same shape, dtype, device and memory format, within epsilon of the originals (to one rounding
    unit) and inside [0, 1]: misclassified ones where an attack succeeded, else the originals. What the package says of
    a network that it may not be the right attack for (a random or dynamic defence, probabilities for logits) comes as a
    RuntimeWarning, and so does that it withstands them where the gradients of cross-entropy and margin are zero. Raises
    what `fgsm` raises, ValueError for unknown attacks, and ImportError without the package.
    """
    check_epsilon(epsilon)
    check_images_and_labels(images, labels)
    if images.dtype != torch.float32:
        raise TypeError(f"AutoAttack is for float32 images, not {images.dtype}")
    if not attacks or set(attacks) - set(STANDARD):
        raise ValueError(f"attacks must be some of {', '.join(STANDARD)}, not {attacks!r}")
    if len(images) == 0 or epsilon == 0:
        return images.detach().clone()
    try:
        from pyautoattack import AutoAttack, checks
    except ImportError as error:
        raise ImportError("AutoAttack needs the package pyautoattack: pip install pyautoattack") from error

    with attacking(model, images.device), _random_numbers_of_its_own(images.device), _warnings_shown():
        originals, labels = images.detach().clone(memory_format=torch.contiguous_format), labels.clone()
        if set(attacks) == {"square"}:
            (logits, _), flat = forward(model, originals, labels, cross_entropy), torch.zeros_like(labels).bool()
        else:  # the package would go where a gradient of NaN leads, and does not always say that one is zero
            logits, _, gradient = input_gradient(model, originals, labels)
            flat = no_gradient(gradient) & (logits.argmax(1) == labels)
            if flat.any():  # not all of its attacks follow the gradient of cross-entropy
                flat &= no_gradient(input_gradient(model, originals, labels, margin)[2])
        ensemble = AutoAttack(model, eps=min(float(epsilon), 1.0), seed=seed, device=images.device)
        ensemble.attacks_to_run = list(attacks)
        ensemble.square.n_queries = queries
        ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = min(9, logits.shape[1] - 1)
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))  # counted for the model before this one, if any
        tracing = sys.gettrace()
        try:
            adversarial, _ = ensemble.run_standard_evaluation(originals, labels, batch_size=len(originals))
        finally:
            sys.settrace(tracing)  # which the package's search for dynamic defences switches off
    if (flat & (adversarial == originals).flatten(1).all(1)).any():
        warn_of_no_gradient()
    return torch.empty_like(images).copy_(adversarial)


@contextlib.contextmanager
def _random_numbers_of_its_own(device):
    """The package seeds torch's generators: afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _warnings_shown():
    """What the package logs as a warning becomes a RuntimeWarning."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.warn(  # type: ignore[method-assign]  # of this one alone
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
