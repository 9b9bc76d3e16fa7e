"""Attacks: functions `attack(model, images, labels, *, epsilon, ...) -> images`. They need only PyTorch.

`autoattack` also needs its authors' package, pyautoattack.
"""

from attacks.autoattack import autoattack
from attacks.core import AttackError, Model
from attacks.fgsm import fgsm, fgsm_direction
from attacks.minimal import minimal_epsilon
from attacks.norms import step
from attacks.pgd import default_step_size, pgd
from attacks.search import pgd_iterates
from attacks.strong import multi_targeted, strong

__all__ = [
    "AttackError",
    "Model",
    "autoattack",
    "default_step_size",
    "fgsm",
    "fgsm_direction",
    "minimal_epsilon",
    "multi_targeted",
    "pgd",
    "pgd_iterates",
    "step",
    "strong",
]
