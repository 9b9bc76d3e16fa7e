"""FGSM and PGD-20 against torchattacks, foolbox and the Adversarial Robustness Toolbox, on the same network.

The peers are imported where they are called, so that the other sections run without them.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import AttackError, fgsm, pgd
from benchmarks.formats import AttackSpeed
from benchmarks.timing import Setting, compared, interleaved, say, timed
from utils.constants import ARCHITECTURES
from utils.data import Split
from utils.evaluation import correctly_classified

# So small that the network withstands it on most images: our PGD stops where it has won, and the peers' do not.
EPSILON, STEPS = 0.5 / 255, 20
STEP = 2.5 * EPSILON / STEPS

FORMATS = ("contiguous_format", "channels_last")  # of the peers' networks and batches
IN_BFLOAT16 = "ours, with gradients in bfloat16"  # it decides in float32 whether an image is fooled

Attacks = dict[str, Callable[[], Tensor]]  # contender -> its attack on one batch


def measure(setting: Setting) -> list[AttackSpeed]:
    """The section "attacks" of the report."""
    report: list[AttackSpeed] = []
    training = setting.splits["train"].first(setting.pick(2500, 50)).to(setting.device)
    for architecture in ARCHITECTURES:
        images, labels = robust_images(setting.network(architecture), training)
        batches = [batch for batch in setting.pick((1, 250), (1, 8)) if batch <= len(images)]
        for attack, batch, peers_format in itertools.product(CONTENDERS, batches, FORMATS):
            times = seconds_of(setting, architecture, attack, images[:batch], labels[:batch], peers_format)
            in_bfloat16 = times.pop(IN_BFLOAT16, None)
            theirs = {name: seconds for name, seconds in times.items() if name != "ours"}
            names = {attack: times["ours"], f"{attack} in bfloat16": in_bfloat16}
            for name, ours in names.items():
                if ours:
                    rows = compared({"ours": ours, **theirs}, batch)
                    say(f"{architecture}, {name}, batch {batch}, the peers' memory format {peers_format}", rows)
                    about: dict[str, Any] = {"network": architecture, "attack": name, "batch": batch, "rows": rows}
                    report.append(AttackSpeed(**about, peers_memory_format=peers_format))  # type: ignore[arg-type]
    return report


def seconds_of(
    setting: Setting, architecture: str, attack: str, images: Tensor, labels: Tensor, peers_format: str
) -> dict[str, list[float]]:
    """The seconds of one attack on one batch, by contender.

    Our network and batch are channels_last. peers_format: of theirs. "contiguous_format" is how torch makes networks
    and batches, so this is what people get out of the box.
    """
    network, memory_format = setting.network(architecture), getattr(torch, peers_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers warn about new versions of Python and torch
        theirs = images.contiguous(memory_format=memory_format), labels
        contenders = CONTENDERS[attack](setting.network(architecture, memory_format), *theirs)
        ours = CONTENDERS[attack](network, images, labels)
        contenders |= {name: ours[name] for name in ("ours", IN_BFLOAT16) if name in ours}
        in_bfloat16 = contenders.get(IN_BFLOAT16)
        if in_bfloat16 and not worth_measuring(in_bfloat16, contenders["ours"], setting.pick(2, math.inf)):
            del contenders[IN_BFLOAT16]
        check_equal(attack, contenders, network, images, labels)
        return interleaved(contenders, setting)


def worth_measuring(in_bfloat16: Callable[[], Tensor], in_float32: Callable[[], Tensor], at_most: float) -> bool:
    """Whether this device computes the attack in bfloat16, and takes at_most times as long as in float32.

    A CPU without AVX512_BF16 or AMX imitates bfloat16, about ten times as slowly. Some have no LSTM in it at all.
    """
    try:
        return min(timed(in_bfloat16) for _ in range(2)) <= at_most * min(timed(in_float32) for _ in range(2))
    except AttackError:
        return False


def robust_images(network: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """The images, channels_last, on which the network withstands PGD-20, and their labels."""
    images, labels = split.take(torch.arange(len(split), device=split.device))
    adversarial = pgd(network, images, labels, epsilon=EPSILON, steps=STEPS, random_start=False)
    left = correctly_classified(network, adversarial, labels)
    return images[left].contiguous(memory_format=torch.channels_last), labels[left]


def fgsm_contenders(network: nn.Module, images: Tensor, labels: Tensor) -> Attacks:
    """FGSM on a batch, ours and the peers'."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import FastGradientMethod

    theirs = torchattacks.FGSM(network, eps=EPSILON)
    wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
    foolboxs = foolbox.attacks.LinfFastGradientAttack()
    arts = FastGradientMethod(art(network, images.device), eps=EPSILON, batch_size=len(images))
    arrays = as_arrays(images, labels)
    return {
        "ours": lambda: fgsm(network, images, labels, epsilon=EPSILON),
        "torchattacks": lambda: theirs(images, labels),
        "foolbox": lambda: foolboxs(wrapped, images, labels, epsilons=EPSILON)[1],
        "adversarial-robustness-toolbox": lambda: torch.from_numpy(arts.generate(*arrays)),
    }


def pgd_contenders(network: nn.Module, images: Tensor, labels: Tensor) -> Attacks:
    """PGD-20 on a batch, ours and the peers'."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescent

    ours: dict[str, Any] = {"epsilon": EPSILON, "steps": STEPS, "step_size": STEP, "random_start": False}
    theirs = torchattacks.PGD(network, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
    foolboxs = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=STEP, steps=STEPS, random_start=False)
    arts = ProjectedGradientDescent(
        art(network, images.device), eps=EPSILON, eps_step=STEP, max_iter=STEPS, batch_size=len(images), verbose=False
    )
    arrays = as_arrays(images, labels)
    return {
        "ours": lambda: pgd(network, images, labels, **ours),
        IN_BFLOAT16: lambda: pgd(network, images, labels, **ours, precision="bfloat16"),
        "torchattacks": lambda: theirs(images, labels),
        "foolbox": lambda: foolboxs(wrapped, images, labels, epsilons=EPSILON)[1],
        "adversarial-robustness-toolbox": lambda: torch.from_numpy(arts.generate(*arrays)),
    }


def art(network: nn.Module, device: torch.device) -> Any:
    """The network as the Adversarial Robustness Toolbox takes it."""
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        network,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu" if device.type == "cpu" else "gpu",  # otherwise it moves the network to a GPU
    )


def as_arrays(images: Tensor, labels: Tensor) -> tuple[Any, Any]:
    """Images and labels as the Adversarial Robustness Toolbox takes them; NumPy keeps the memory format."""
    return images.cpu().numpy(), labels.cpu().numpy()


def check_equal(name: str, contenders: Attacks, network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise AssertionError unless all find the same, up to rounding: FGSM's pixels, or the loss that PGD reaches.

    Rounding decides the sign of a gradient near zero, and so where PGD goes from there. In many images this evens out.
    """
    crafted = {peer: attack().to(images) for peer, attack in contenders.items()}
    for peer, adversarial in crafted.items():
        if name == "fgsm":
            differing = ((adversarial - crafted["ours"]).abs() > 1e-5).float().mean().item()
            assert differing < 0.01, f"{peer}: {differing:.2%} of FGSM's pixels differ from ours"
        else:
            with torch.no_grad():
                loss, ours = (F.cross_entropy(network(x), labels).item() for x in (adversarial, crafted["ours"]))
            tolerance = (0.01 + 0.05 / len(images) ** 0.5) * ours + 1e-3
            assert abs(loss - ours) < tolerance, f"{peer}: PGD reaches a loss of {loss}, ours {ours}"


CONTENDERS = {"fgsm": fgsm_contenders, "pgd-20": pgd_contenders}
