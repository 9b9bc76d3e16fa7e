"""Accuracy on clean images and under attack.

When several processes evaluate together (utils.distributed), each makes the same call, attacks its share of the batches
and learns the results of all. An attack's random numbers start anew in each batch, so the results are those of a single
process with the same batches.
"""

import contextlib
import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from attacks import autoattack, default_step_size, fgsm, fgsm_direction, pgd, step, strong
from attacks.autoattack import QUERIES, STANDARD
from attacks.core import (
    ZERO_GRADIENT,
    Model,
    check_labels,
    checked_batch,
    checked_images,
    evaluating,
    logits_of,
    zero_gradient_listener,
)
from attacks.modules import modules_of
from attacks.norms import check_epsilon
from attacks.progress import in_turn
from attacks.state import BATCH_DEPENDENT, CHANGED, PROBABILITIES, RANDOM, SMALL, examined, remembering
from utils import distributed
from utils.checkpoints import versions
from utils.constants import EVALUATION_BATCH, UserError
from utils.data import Split, batches, tensor_digest
from utils.formats import AttackRow, UpperBound
from utils.images import Data, as_split
from utils.models import count_classes, explaining
from utils.notes import Notes, Row
from utils.progress import Bar, moving, progress_bar
from utils.quoting import shown
from utils.statistics import wilson_interval
from utils.tables import epsilon_text

# The names that the command line and reports use.
ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": pgd, "strong": strong, "autoattack": autoattack}

# Raise an attack's version when it finds other examples for the same network, images and options: stored results of
# another version are not used any more. tests/utils/test_attack_versions.py notices such a change.
ATTACK_VERSIONS = {"fgsm": 1, "pgd": 1, "strong": 1, "autoattack": 1}


@dataclass(frozen=True)
class Result:
    """How many images of a split a network classifies correctly under one attack."""

    epsilon: float  # radius in pixel units; 0 for clean images
    correct: int
    examples: int  # that are counted
    seconds: float
    attack: str = "fgsm"
    options: dict[str, Any] = field(default_factory=dict)  # the attack's other arguments
    # Which images are correct, bool (examples,); empty if only their number is known.
    mask: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), compare=False, repr=False)
    unusual: tuple[str, ...] = ()  # what makes the figure doubtful: see attacks.state
    transferred: bool = False  # whether another network crafted the examples
    target: str | None = None  # of the attack: the number of a class, "least-likely" or "random"; None: any wrong class
    outcomes: str = field(default="", compare=False, repr=False)  # formats.Hits, if the attack has a target

    @property
    def accuracy(self) -> float:
        return self.correct / self.examples

    @property
    def confidence_interval(self) -> tuple[float, float]:
        return wilson_interval(self.correct, self.examples)


def success_rate(result: Result, clean: Result) -> float | None:
    """The part of the images on which the attack reaches its aim.

    Without a target: of the images that are classified correctly without the attack, the part that it makes wrong.
    With a target: of the images whose label is not the target, the part that is classified as the target.
    clean: the result on the same images without an attack. None if a mask is missing or no image is right.
    """
    if result.target is not None:
        return result.outcomes.count("t") / result.examples
    right = clean.mask
    if not len(right) or len(result.mask) != len(right) or not right.any():
        return None
    return 1 - result.mask[right].double().mean().item()


def hits(result: Result) -> str:
    """The outcome of each image as reports have it (formats.Hits)."""
    return result.outcomes or "".join("01"[correct] for correct in result.mask.tolist())


def upper_bound(result: Result) -> list[UpperBound]:
    """The known reasons why a result may be far above what the strongest attack would leave, as formats explains."""
    options, unusual = result.options, result.unusual
    whole = set(options.get("attacks", STANDARD)) == set(STANDARD) and options.get("queries", QUERIES) >= QUERIES
    reasons: dict[UpperBound, bool] = {
        "one step": result.attack == "fgsm",
        "zero gradient": ZERO_GRADIENT in unusual,
        "random": RANDOM in unusual,
        "batch dependent": BATCH_DEPENDENT in unusual,
        "changes": CHANGED in unusual,
        "probabilities": PROBABILITIES in unusual,
        "transferred": result.transferred,
        "early stop": result.transferred and result.attack != "fgsm" and options.get("early_stop", True),
        "one target": result.target is not None,
        "part of AutoAttack": result.attack == "autoattack" and not whole,
    }
    return [reason for reason, holds in reasons.items() if holds and result.epsilon]


def report_row(
    result: Result,
    setting: str,
    source: str | None = None,
    *,
    clean: Result | None = None,
    per_image: bool = False,
) -> AttackRow:
    """A result as reports have it, with all options of the attack, defaults included.

    setting: "white_box" or "transfer". source: path of the checkpoint on which transferred examples were crafted.
    clean: the result without an attack, from which the success rate follows. per_image: whether to give the mask.
    """
    signature = inspect.signature(ATTACKS[result.attack]).parameters.values()
    options = {p.name: p.default for p in signature if p.default is not p.empty} | result.options
    if options.get("step_size", 0) is None:
        options["step_size"] = default_step_size(result.epsilon, options["steps"])
    if "attacks" in options:
        options["attacks"] = list(options["attacks"])
    return AttackRow(
        name=result.attack,
        setting=setting,  # type: ignore[arg-type]  # the schema checks it when the report is written
        epsilon=result.epsilon,
        examples=result.examples,
        accuracy=result.accuracy,
        confidence_interval=result.confidence_interval,
        seconds=round(result.seconds, 3),
        source=source,
        version=ATTACK_VERSIONS[result.attack],
        warning="; ".join(result.unusual) or None,
        target=result.target,
        upper_bound=upper_bound(result),
        success_rate=None if clean is None else success_rate(result, clean),
        hits=hits(result) if per_image else None,
        **options,
    )


def predictions(network: Model, images: Tensor, batch_size: int = EVALUATION_BATCH) -> Tensor:
    """The class that the network, in evaluation mode, gives to each image: int64 (N,).

    images: float (N, C, H, W) in [0, 1]. Raises what attacks.core.checked_images and logits_of raise.
    """
    images = checked_images(images)
    with torch.no_grad(), evaluating(network, images.device):
        return torch.cat([logits_of(network, batch).argmax(1) for batch in images.split(batch_size)])


def correctly_classified(network: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Which images the network, in the mode it is in, classifies correctly: bool (N,).

    images: float (N, C, H, W) in [0, 1]; labels: int64 (N,). Raises what checked_batch and logits_of raise, and
    ValueError for a label that is not a class.
    """
    images = checked_batch(images, labels)
    with torch.no_grad():
        logits = logits_of(network, images)
    check_labels(labels, logits)
    return logits.argmax(1) == labels


def accuracy(network: Model, split: Data) -> float:
    """The fraction of a split's images that the network, in evaluation mode, classifies correctly.

    split: here and below, a Split or whatever else utils.images.as_split accepts, such as a DataLoader.
    """
    return evaluate_fgsm(network, split, [])[0].accuracy


def transfer_matrix(
    networks: Sequence[Model],
    split: Data,
    epsilon: float,
    *,
    batch_size: int = EVALUATION_BATCH,
    progress: bool = False,
) -> list[list[Result]]:
    """FGSM from each network to each network: row i has the results of all networks on examples crafted on number i."""
    split, rows = as_split(split, *networks), []
    count = len(networks)
    bar = progress_bar(title="transfer", total=count * (1 + count), unit="step", visible=progress)
    with bar, explaining(split, *networks):
        for source in networks:
            with moving(bar, 1):
                crafted_on = in_turn(batches(split, batch_size), [1] * -(-len(split) // batch_size))
                signs = torch.cat([fgsm_direction(source, *batch).to(torch.int8) for batch in crafted_on])
            row = []
            for tested in networks:
                with moving(bar, 1):
                    row += evaluate_fgsm(tested, split, [epsilon], direction=signs, batch_size=batch_size)[1:]
            rows.append(row)
    return rows


def evaluate_fgsm(
    network: Model,
    split: Data,
    epsilons: Sequence[float],
    *,
    source: Model | None = None,
    direction: Tensor | None = None,
    eot: int = 1,
    batch_size: int = EVALUATION_BATCH,
    progress: bool = False,
) -> list[Result]:
    """Accuracy on clean images and under FGSM at each epsilon, in one pass over the split.

    epsilons: L-infinity radii in pixel units. (`evaluate` also knows the L2 norm, and targets.)
    source: the network whose gradient crafts the examples. None: `network` itself, a white-box attack.
    direction: int8 (N, C, H, W), the sign of the gradient for each image of the split, as an AdversarialSet has it.
        With it, no gradient is computed.
    eot: as for `fgsm`.
    progress: whether to show a progress bar.
    Returns a Result for the clean images and one for each epsilon, with masks. The seconds of an attack are those for
    the direction, which all epsilons share, and those for its own forward passes: what it would take alone. Those
    of all processes are added. Raises ValueError for an epsilon that is not from 0 to 1. Warns (RuntimeWarning) as
    attacks.state.examined does, and the Results say so too.
    """
    split = as_split(split, *_those_of(network, source))
    radii = [0.0, *epsilons]
    for epsilon in radii:
        check_epsilon(epsilon)
    seconds = torch.zeros(len(radii), dtype=torch.float64)
    masks = torch.zeros(len(radii), len(split), dtype=torch.bool)  # which images are correct
    rank, ranks, seen = distributed.rank(), distributed.world_size(), 0
    signs: Tensor = torch.zeros(())  # the clean images need none
    unusual = _examined(network, split, source)
    bar = progress_bar(title="evaluating", total=len(split), unit="image", visible=progress and rank == 0)
    contexts = (evaluating(network, split.device), explaining(split, *_those_of(network, source)))
    with bar, contexts[0], contexts[1], _noticing_zero_gradients() as zeros:
        crafted = iter(() if direction is None else direction.split(batch_size)[rank::ranks])
        for number, (images, labels) in enumerate(batches(split, batch_size, rank, ranks)):
            first = (rank + number * ranks) * batch_size
            with moving(bar, min(ranks * len(labels), len(split) - bar.n)):
                start = time.perf_counter()
                if direction is not None:
                    signs = next(crafted).to(images)
                elif epsilons:
                    signs = fgsm_direction(network if source is None else source, images, labels, eot=eot)
                crafting = time.perf_counter() - start
                for i, epsilon in enumerate(radii):
                    start = time.perf_counter()
                    correct = correctly_classified(network, step(images, signs, epsilon), labels)
                    masks[i, first : first + len(labels)] = correct.cpu()
                    # A clock may be set back.
                    seconds[i] += max(0.0, time.perf_counter() - start + (crafting if i else 0))
            seen += len(labels)
            bar.set_postfix(**{f"at {epsilon_text(radii[i])}": f"{masks[i].sum() / seen:.1%}" for i in (0, -1)})
    gathered = distributed.gather((seconds, masks, torch.tensor(bool(zeros))))
    seconds, masks, zero = (torch.stack(parts) for parts in zip(*gathered, strict=True))
    about: dict[str, Any] = {"options": {"eot": eot} if eot > 1 else {}, "transferred": source not in (None, network)}
    doubts = (*unusual, ZERO_GRADIENT) if zero.any() else unusual
    return [
        Result(radius, int(mask.sum()), len(split), each, mask=mask, unusual=doubts if radius else unusual, **about)
        for radius, each, mask in zip(radii, seconds.sum(0).tolist(), masks.any(0), strict=True)
    ]


def _those_of(network: Model, source: Model | None) -> list[Model]:
    """The networks that an evaluation uses."""
    return [network] if source is None else [network, source]


def evaluate(
    network: Model,
    split: Data,
    attack: str,
    epsilon: float,
    *,
    target: int | str | None = None,
    options: dict[str, Any] | None = None,
    source: Model | None = None,
    batch_size: int = EVALUATION_BATCH,
    progress: bool = False,
    notes: Notes | None = None,
    on_batch: Callable[[Tensor], None] | None = None,
) -> Result:
    """Accuracy under one attack, batch by batch in the order of the split: a Result with its mask.

    attack: a key of ATTACKS. epsilon: radius in pixel units, of the norm in `options` (default L-infinity).
    target: the number of a class, "least-likely" or "random" (see `targets_of`): the attack wants each image to be
        classified as its target. An image whose label is the target is not attacked and not counted. None: any wrong
        class will do. AutoAttack has no targets.
    options: the other arguments of the attack. A seed among them is that of each batch. With a source, attacks run
        without early_stop unless they say otherwise: an example that only just fools the source seldom fools another
        network.
    source, progress: as for `evaluate_fgsm`.
    notes: where finished batches are noted. If the evaluation is interrupted, the same call with the same notes
        continues after the last finished batch. When several processes evaluate together, the first one makes the notes
        and all pass them: utils.distributed.from_main(lambda: Notes(path)).
    on_batch: called with the adversarial images of each batch that is attacked now; finished batches in notes are not.
    The Result's seconds are those of all processes and of all interrupted attempts together. Each image is judged by a
    pass that comes after the attack, so that a random network is not judged by a pass on which the attack was lucky.
    Warns (RuntimeWarning) as attacks.state.examined does, and the Result says so too. Raises UserError if the target is
    not a class of the network, or the label of every image.
    """
    options = dict(options or {})
    _check_attack(attack, epsilon, options, target)
    split = as_split(split, *_those_of(network, source))
    crafter = network if source is None else source
    transferred = crafter is not network
    if transferred and "early_stop" in inspect.signature(ATTACKS[attack]).parameters:
        options.setdefault("early_stop", False)
    goals = torch.full_like(split.labels, -1)  # which is not a class
    if target is not None:
        options["targeted"] = True
        goals = targets_of(crafter, split, target, options.get("seed", 0), batch_size)
    craft = partial(ATTACKS[attack], crafter, epsilon=epsilon, **options)

    def attacked(first: int, images: Tensor, labels: Tensor) -> Row:
        start, targets = time.perf_counter(), goals[first : first + len(labels)]
        with _noticing_zero_gradients() as zeros:
            adversarial = craft(images, labels) if target is None else _towards(craft, images, labels, targets)
        marks = _marks(network, adversarial, labels, targets)
        if on_batch:
            on_batch(adversarial)
        return marks.replace("1", "z") if zeros else marks, max(0.0, round(time.perf_counter() - start, 3))

    key = evaluation_key(network, split, attack, epsilon, options, source, batch_size, target) if notes else ""
    sizes = [len(labels) for labels in split.labels.split(batch_size)]
    rows = distributed.from_main(partial(notes.kept, key, sizes)) if notes else []
    visible = progress and distributed.rank() == 0
    title, done = f"{attack} at {epsilon_text(epsilon)}", sum(sizes[: len(rows)])
    unusual, those = _examined(network, split, source), _those_of(network, source)
    bar = progress_bar(title=title, total=len(split), unit="image", initial=done, visible=visible)
    with bar, evaluating(network, split.device), remembering(network, unusual), explaining(split, *those):
        for new in _rounds(split, batch_size, len(rows), attacked, bar):
            if notes:
                distributed.from_main(partial(notes.add, key, new))
            rows += new
            noted = "".join(hits for hits, _ in rows).replace("z", "1")
            bar.set_postfix(accuracy=f"{noted.count('1') / max(1, len(noted) - noted.count('-')):.1%}")
    noted = "".join(hits for hits, _ in rows)
    about: dict[str, Any] = {
        "options": options,
        "transferred": transferred,
        "target": None if target is None else str(target),
    }
    about |= {"unusual": (*unusual, ZERO_GRADIENT) if "z" in noted else unusual}
    about |= {"outcomes": noted.replace("z", "1") if target is not None else ""}
    mask = torch.tensor([mark in "1z" for mark in noted])
    seconds = sum(seconds for _, seconds in rows)
    return Result(epsilon, int(mask.sum()), len(noted) - noted.count("-"), seconds, attack, mask=mask, **about)


def _check_attack(attack: str, epsilon: float, options: dict[str, Any], target: int | str | None) -> None:
    """Raise UserError unless the attack exists and takes such options and targets; ValueError for another radius."""
    if attack not in ATTACKS:
        raise UserError(f"attack must be one of {', '.join(ATTACKS)}, not {shown(attack)}")
    if target is not None and "targeted" not in inspect.signature(ATTACKS[attack]).parameters:
        raise UserError(f"{attack} has no targets: take fgsm or pgd")
    # With targeted alone, the labels would be the targets, and the accuracy would be wrong.
    for name, instead in (("epsilon", "epsilon"), ("targeted", "target")):
        if name in options:
            raise UserError(f"{name} is not among the options: give the argument {instead}")
    check_epsilon(epsilon, options.get("norm", "linf"))


def targets_of(
    network: Model, split: Split, target: int | str, seed: int, batch_size: int = EVALUATION_BATCH
) -> Tensor:
    """The class that an attack with this target wants for each image: int64 (N,).

    target: the number of a class; "least-likely", the class to which the network gives its smallest logit (Kurakin et
        al., 2017, arXiv:1611.01236, section 2.2), which may be the label if the network is wrong; or "random", any
        class but the label, drawn for the whole split with the seed.
    network: the one on which examples are crafted. When several processes evaluate together, the first one is asked.
    Raises UserError if the target is not a class of the network, or the label of every image.
    """
    labels, classes = split.labels, count_classes(network, split)
    if target == "least-likely":
        with torch.no_grad(), evaluating(network, split.device):
            likely = [logits_of(network, images).argmin(1) for images, _ in batches(split, batch_size)]
        goals = distributed.from_main(lambda: torch.cat(likely).cpu()).to(labels.device)
    elif target == "random":
        drawn = torch.randint(1, classes, labels.shape, generator=torch.Generator().manual_seed(seed))
        goals = (labels + drawn.to(labels)) % classes
    elif isinstance(target, int) and 0 <= target < classes:
        goals = torch.full_like(labels, target)
    else:
        raise UserError(f"target must be a class from 0 to {classes - 1}, least-likely or random, not {target!r}")
    if (goals == labels).all():
        raise UserError(f"the target {target} is the label of every image: there is nothing to attack")
    return goals


def _towards(craft: Callable[..., Tensor], images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The images, moved towards their targets; where the label is the target, the image itself."""
    aimed, adversarial = targets != labels, images.clone()
    if aimed.any():
        adversarial[aimed] = craft(images[aimed], targets[aimed])
    return adversarial


def _marks(network: Model, images: Tensor, labels: Tensor, targets: Tensor) -> str:
    """What becomes of each image, as formats.Hits. targets: int64 (N,); -1: the image has no target."""
    with torch.no_grad():
        predicted = logits_of(network, images).argmax(1)
    triples = zip(predicted.tolist(), labels.tolist(), targets.tolist(), strict=True)
    return "".join("-" if y == t else "1" if p == y else "t" if p == t else "0" for p, y, t in triples)


@contextlib.contextmanager
def _noticing_zero_gradients() -> Iterator[list[str]]:
    """A context with a list that is empty until an attack warns of zero gradients."""
    found: list[str] = []
    token = zero_gradient_listener.set(lambda: found.append(ZERO_GRADIENT))
    try:
        yield found
    finally:
        zero_gradient_listener.reset(token)


def _examined(network: Model, split: Split, source: Model | None) -> tuple[str, ...]:
    """What attacks.state.examined says of the network and the split's first images, on every process alike."""
    with explaining(split, *_those_of(network, source)):
        return distributed.from_main(lambda: examined(network, next(batches(split, SMALL))[0]))


def evaluation_key(
    network: Model,
    split: Split,
    attack: str,
    epsilon: float,
    options: dict[str, Any],
    source: Model | None,
    batch_size: int,
    target: int | str | None = None,
) -> str:
    """What notes call an evaluation: another name as soon as anything differs that its results depend on."""
    return Notes.key(
        {
            "networks": [described(network), None if source is None else described(source)],
            "split": split.digest(),
            "attack": {"name": attack, "version": ATTACK_VERSIONS[attack], "epsilon": float(epsilon), **options},
            "batch_size": batch_size,
            "versions": versions("pyautoattack"),
            **({} if target is None else {"target": str(target)}),
        }
    )


def described(network: Model) -> list[Any]:
    """What tells a network from others, JSON-serialisable."""
    if not isinstance(network, nn.Module):
        raise TypeError("notes tell networks apart by their weights: the network must be an nn.Module")
    settings, tensors = [], []
    for module in modules_of(network):
        plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        code = _code_of(type(module))  # type: ignore[arg-type]  # mypy does not see that a class can be hashed
        settings.append([type(module).__name__, code, plain | {"training": False}])
        tensors += [tensor.detach() for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return [settings, tensor_digest(*tensors)]


@lru_cache
def _code_of(kind: type) -> str:
    """The digest of a class's source code; empty if the class is torch's, whose version is noted, or has no file."""
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):  # a class that was typed in, say
        return ""


def _rounds(
    split: Split, batch_size: int, first: int, attacked: Callable[[int, Tensor, Tensor], Row], bar: Bar
) -> Iterator[list[Row]]:
    """attacked(position, images, labels) for each batch from number `first` on, one batch for each process in a round.

    position: of the batch's first image in the split. Yields the rows of a round, in the order of the batches, on every
    process. In the last round, some processes may have no batch left. The bar counts images.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    mine = batches(split, batch_size, first + rank, ranks)
    for start in range(first * batch_size, len(split), ranks * batch_size):
        batch = next(mine, None)
        with moving(bar, min(ranks * batch_size, len(split) - start)):
            rows = distributed.gather(batch and attacked(start + rank * batch_size, *batch))
        yield [row for row in rows if row]
