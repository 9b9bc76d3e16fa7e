"""Attacks: functions `attack(model, images, labels, *, epsilon, ...) -> images` that know only PyTorch."""

from attacks.fgsm import fgsm, fgsm_direction, step

__all__ = ["fgsm", "fgsm_direction", "step"]
