"""Accuracy, with and without an attack, and how certain it is.

Of many processes (utils.distributed), each attacks every so many-th batch, and all learn of all results: those of one
process with the same batches, for an attack's random numbers begin anew in each batch.
"""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from attacks import autoattack, default_step_size, fgsm, fgsm_direction, pgd, step
from attacks.core import evaluating, evaluation_mode
from utils import distributed
from utils.checkpoints import versions
from utils.constants import EVALUATION_BATCH
from utils.data import batches, tensor_digest
from utils.progress import progress_bar
from utils.statistics import wilson_interval

# The names that the command line and reports use.
ATTACKS: dict[str, Callable] = {"fgsm": fgsm, "pgd": pgd, "autoattack": autoattack}


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
    """What a JSON report says of an attack, with all of its parameters."""
    signature = inspect.signature(ATTACKS[result.attack]).parameters.values()
    parameters = {p.name: p.default for p in signature if p.default is not p.empty} | result.options
    if parameters.get("step_size", 0) is None:
        parameters["step_size"] = default_step_size(result.epsilon, parameters["steps"])
    return {
        "name": result.attack,
        "setting": setting,
        "epsilon": result.epsilon,
        **parameters,
        "examples": result.examples,
        "accuracy": result.accuracy,
        "confidence_interval": result.confidence_interval,
        "seconds": round(result.seconds, 3),
    }


def predictions(network, images, batch_size=EVALUATION_BATCH):
    """The class that the network, in evaluation mode, gives to each image, (N,); images as a tensor in [0, 1]."""
    with torch.no_grad(), evaluating(network, images.device):
        return torch.cat([network(batch).argmax(1) for batch in images.split(batch_size)])


def transfer_matrix(networks, split, epsilon, *, batch_size=EVALUATION_BATCH, progress=False):
    """FGSM crafted on each of `networks` and shown to each: a list of Results for each network that crafts."""
    matrix = []
    for source in progress_bar(networks, title="transfer", total=len(networks), unit="network", visible=progress):
        direction = torch.cat([fgsm_direction(source, *batch).to(torch.int8) for batch in batches(split, batch_size)])
        options = {"direction": direction, "batch_size": batch_size}
        matrix.append([evaluate_fgsm(shown, split, [epsilon], **options)[1] for shown in networks])
    return matrix


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
    rank, ranks = distributed.rank(), distributed.world_size()
    with _bar(split, "evaluating", progress) as bar, evaluating(network, split.device):
        crafted = iter(() if direction is None else direction.split(batch_size)[rank::ranks])
        for images, labels in batches(split, batch_size, rank, ranks):
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
    counts, seconds = (
        [sum(of_one) for of_one in zip(*of_all, strict=True)]
        for of_all in zip(*distributed.gather((counts, seconds)), strict=True)
    )
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

    attack: a key of ATTACKS; options: its other arguments, a seed among them being that of each batch. source: as for
        `evaluate_fgsm`.
    notes: Notes, in which every finished batch is noted, so that an interrupted evaluation of the same network, data
        and attack goes on where it was. Its seconds are then those of all sittings. Of many processes, all pass what
        the first has made, utils.distributed.from_main(lambda: Notes(path)), and it alone reads them and adds to them.
    An attack's seconds are those of all processes together.
    """
    options = options or {}
    sizes = [len(labels) for labels in split.labels.split(batch_size)]

    def noted():
        key = notes.key(
            {
                "networks": [_described(network), source and _described(source)],
                "split": split.digest(),
                "attack": {"name": attack, "epsilon": float(epsilon), **options},
                "batch_size": batch_size,
                "versions": versions("pyautoattack"),
            }
        )
        return key, notes.kept(key, sizes)

    def attacked(images, labels):
        start = time.perf_counter()
        crafter = network if source is None else source
        adversarial = ATTACKS[attack](crafter, images, labels, epsilon=epsilon, **options)
        hits = correct(network, adversarial, labels).int().tolist()
        return "".join(map(str, hits)), round(time.perf_counter() - start, 3)

    key, rows = distributed.from_main(noted) if notes else (None, [])
    rank, ranks = distributed.rank(), distributed.world_size()
    with _bar(split, f"{attack} at {epsilon:.4g}", progress) as bar, evaluating(network, split.device):
        bar.update(sum(sizes[: len(rows)]))
        mine = batches(split, batch_size, len(rows) + rank, ranks)
        # A round is a batch for each process, in the last perhaps not for all, and then its notes.
        while len(rows) < len(sizes):
            batch = next(mine, None)
            new = [row for row in distributed.gather(batch and attacked(*batch)) if row]
            if notes:
                distributed.from_main(partial(notes.add, key, new))
            rows += new
            bar.update(sum(len(hits) for hits, _ in new))
            hits = "".join(hits for hits, _ in rows)
            bar.set_postfix(accuracy=f"{hits.count('1') / len(hits):.1%}")
    mask = torch.tensor([hit == "1" for hits, _ in rows for hit in hits])
    seconds = sum(seconds for _, seconds in rows)
    return Result(epsilon, int(mask.sum()), len(split), seconds, attack, options, mask)


def _described(network):
    """What tells a network from others, JSON-serialisable."""
    state = network.state_dict()
    return [type(network).__name__, list(state), tensor_digest(*state.values())]


def _bar(split, title, progress):
    """What shows the progress over the images, where it is wanted: on rank 0."""
    visible = progress and distributed.rank() == 0
    return progress_bar(title=title, total=len(split), unit="image", visible=visible)


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
