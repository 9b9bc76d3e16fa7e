"""Defences: losses `defense(model, images, labels) -> scalar` that train a network to withstand attacks."""

from defenses.losses import DEFENSES, FGSM, NFGSM, NPGD, PGD, TRADES, Defense, cross_entropy

__all__ = ["DEFENSES", "FGSM", "NFGSM", "NPGD", "PGD", "TRADES", "Defense", "cross_entropy"]
