"""Accuracy, with and without an attack, and how certain it is."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from attacks import autoattack, fgsm, fgsm_direction, pgd, step
from attacks.core import evaluation_mode
from utils import EVALUATION_BATCH
from utils.checkpoints import read_json_lines, versions, write_atomically
from utils.data import batches, tensor_digest

# The names that the command line and reports use.
ATTACKS = {"fgsm": fgsm, "pgd": pgd, "autoattack": autoattack}


@dataclass(frozen=True)
class Result:
    """Correctly classified images out of `examples` under one attack (epsilon 0: clean), and the seconds it took."""

    epsilon: float
    correct: int
    examples: int
    seconds: float
    attack: str = "fgsm"
    options: dict = field(default_factory=dict)  # the attack's other arguments
    mask: torch.Tensor | None = field(default=None, compare=False, repr=False)  # bool (N,): which images are correct

    @property
    def accuracy(self):
        return self.correct / self.examples

    @property
    def confidence_interval(self):
        return wilson_interval(self.correct, self.examples)


def report_row(result, setting):
    """What a JSON report says of an attack."""
    return {
        "name": result.attack,
        "setting": setting,
        "epsilon": result.epsilon,
        **result.options,
        "examples": result.examples,
        "accuracy": result.accuracy,
        "confidence_interval": result.confidence_interval,
        "seconds": round(result.seconds, 3),
    }


def wilson_interval(correct, examples, z=1.959964):
    """Wilson score interval of a proportion (Wilson, 1927), by default at 95 %: (low, high) in [0, 1].

    It covers the sampling of the test images alone, not how a figure moves from one training to the next.
    """
    p = correct / examples
    centre = p + z**2 / (2 * examples)
    margin = z * math.sqrt(p * (1 - p) / examples + z**2 / (4 * examples**2))
    scale = 1 + z**2 / examples
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def correct(network, images, labels):
    """Which images the network, as it is, classifies correctly: bool (N,)."""
    with torch.no_grad():
        return network(images).argmax(1) == labels


def accuracy(network, split):
    """The fraction of a split's images that the network, in evaluation mode, classifies correctly."""
    return evaluate_fgsm(network, split, [])[0].accuracy


def evaluate_fgsm(
    network, split, epsilons, *, source=None, direction=None, batch_size=EVALUATION_BATCH, progress=False
):
    """Accuracy on the clean images and under FGSM at each epsilon, in one pass over the split.

    source: the network whose gradient crafts the examples; None means `network` itself, a white-box attack.
    direction: crafted already, the int8 tensor of an AdversarialSet over this split; then there is no gradient to take.
    Returns a Result for the clean images and then one for each epsilon. An attack's seconds are those of crafting the
    direction, which all epsilons share, and of its own forward pass: what it would take alone.
    """
    counts = [0] * (1 + len(epsilons))
    seconds = [0.0] * (1 + len(epsilons))
    bar = tqdm(total=len(split), unit="image", desc="evaluating", leave=False, disable=None if progress else True)
    with bar, evaluation_mode(network):
        crafted = iter(() if direction is None else direction.split(batch_size))
        for images, labels in batches(split, batch_size):
            start = time.perf_counter()
            counts[0] += correct(network, images, labels).sum().item()
            seconds[0] += time.perf_counter() - start
            if epsilons:
                start = time.perf_counter()
                if direction is None:
                    signs = fgsm_direction(network if source is None else source, images, labels)
                else:
                    signs = next(crafted).to(images)
                crafting = time.perf_counter() - start
            for i, epsilon in enumerate(epsilons, start=1):
                start = time.perf_counter()
                counts[i] += correct(network, step(images, signs, epsilon), labels).sum().item()
                seconds[i] += crafting + time.perf_counter() - start
            bar.update(len(labels))
    return [Result(*row) for row in zip([0.0, *epsilons], counts, [len(split)] * len(counts), seconds, strict=True)]


def evaluate(
    network,
    split,
    attack,
    epsilon,
    *,
    options=None,
    source=None,
    batch_size=EVALUATION_BATCH,
    progress=False,
    notes=None,
):
    """Accuracy under one attack, a Result, batch by batch in the order of the split.

    attack: a key of ATTACKS; options: its other arguments. source: as for `evaluate_fgsm`.
    notes: a file in which every finished batch is noted, so that an interrupted evaluation of the same network, data
        and attack goes on where it was; it is deleted at the end. Its seconds are then those of all sittings.
    """
    options = options or {}
    about = notes and {
        "network": tensor_digest(*network.state_dict().values()),
        "source": source and tensor_digest(*source.state_dict().values()),
        "split": split.digest(),
        "attack": {"name": attack, "epsilon": epsilon, **options},
        "batch_size": batch_size,
        "versions": versions(),
    }
    notes = Notes(notes, about)
    title = f"{attack} at {epsilon:.4g}"
    bar = tqdm(total=len(split), unit="image", desc=title, leave=False, disable=None if progress else True)
    with bar, evaluation_mode(network):
        for index, (images, labels) in enumerate(batches(split, batch_size)):
            if index == len(notes.rows):
                start = time.perf_counter()
                crafter = network if source is None else source
                adversarial = ATTACKS[attack](crafter, images, labels, epsilon=epsilon, **options)
                hits = correct(network, adversarial, labels).int().tolist()
                notes.add(["".join(map(str, hits)), round(time.perf_counter() - start, 3)])
            bar.update(len(labels))
            hits = "".join(row[0] for row in notes.rows[: index + 1])
            bar.set_postfix(accuracy=f"{hits.count('1') / len(hits):.1%}")
    notes.finish()
    mask = torch.tensor([hit == "1" for hit in hits])
    return Result(epsilon, hits.count("1"), len(split), sum(row[1] for row in notes.rows), attack, options, mask)


class Notes:
    """["0110...", seconds] of each finished batch, 1 for a correct image, in a file of JSON lines if there is one."""

    def __init__(self, path, about):
        """about: what is evaluated and how, JSON-serialisable; notes about something else are thrown away."""
        self.path, self.rows = path and Path(path), []
        if self.path:
            lines = read_json_lines(self.path) if self.path.exists() else []
            self.rows = lines[1:] if lines[:1] == [about] else []
            lines = [about, *self.rows]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, row):
        self.rows.append(row)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self):
        if self.path:
            self.path.unlink()


def multiply_adds(network):
    """Multiply-adds of one 3 x 32 x 32 image's forward pass, in its convolutions, LSTMs and linear layers."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight.numel() * output.shape[-2] * output.shape[-1]  # each position uses each weight once
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
        elif isinstance(module, nn.LSTM):
            positions = inputs[0].shape[1]
            total += positions * sum(w.numel() for name, w in module.named_parameters() if name.startswith("weight"))

    hooks = [module.register_forward_hook(count) for module in network.modules()]
    with torch.no_grad(), evaluation_mode(network):
        network(torch.zeros(1, 3, 32, 32, device=next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total
