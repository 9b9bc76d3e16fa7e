"""Attacks: functions `attack(model, images, labels, *, epsilon, ...) -> images` that know only PyTorch."""

from attacks.autoattack import autoattack
from attacks.core import AttackError, step
from attacks.fgsm import fgsm, fgsm_direction
from attacks.pgd import default_step_size, pgd

__all__ = ["AttackError", "autoattack", "default_step_size", "fgsm", "fgsm_direction", "pgd", "step"]
