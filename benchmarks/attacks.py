"""FGSM and PGD-20 against torchattacks, foolbox and the Adversarial Robustness Toolbox, on the same network.

The peers are imported where they are called, so that the other sections run without them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import fgsm, pgd
from benchmarks.formats import AttackSpeed
from benchmarks.timing import Setting, compared, interleaved, say
from utils.data import Split
from utils.evaluation import correctly_classified

# So small that the network withstands it on most images: our PGD stops where it has won, and the peers' do not.
EPSILON, STEPS = 0.5 / 255, 20
STEP = 2.5 * EPSILON / STEPS

Attacks = dict[str, Callable[[], Tensor]]  # contender -> its attack on one batch


def measure(setting: Setting) -> list[AttackSpeed]:
    """The section "attacks" of the report."""
    network = setting.network()
    images, labels = robust_images(network, setting.splits["train"].first(setting.pick(2500, 50)).to(setting.device))
    report = []
    for name, contenders_of in (("fgsm", fgsm_contenders), ("pgd-20", pgd_contenders)):
        for batch in setting.pick((1, 32, 250, 1000), (1, 8)):
            if batch > len(images):
                continue
            ours = images[:batch], labels[:batch]
            # Once out of the box, when our networks and batches are channels_last and theirs are as torch makes them;
            # and once channels_last for all.
            for memory_format in (torch.contiguous_format, torch.channels_last):
                theirs = ours[0].contiguous(memory_format=memory_format), ours[1]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the peers warn about new versions of Python and torch
                    contenders = contenders_of(setting.network(memory_format), *theirs)
                    contenders["ours"] = contenders_of(network, *ours)["ours"]
                    check_equal(name, contenders, network, *ours)
                    rows = compared(interleaved(contenders, setting), batch)
                peers_format = str(memory_format).removeprefix("torch.")
                say(f"{name}, batch {batch}, the peers' memory format {peers_format}", rows)
                report.append(
                    AttackSpeed(
                        attack=name,
                        batch=batch,
                        peers_memory_format=peers_format,  # type: ignore[arg-type]  # the schema checks it
                        rows=rows,
                    )
                )
    return report


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
    """Raise AssertionError unless all find the same, up to rounding: FGSM's pixels, or the loss that PGD reaches."""
    crafted = {peer: attack().to(images) for peer, attack in contenders.items()}
    for peer, adversarial in crafted.items():
        if name == "fgsm":
            differing = ((adversarial - crafted["ours"]).abs() > 1e-5).float().mean().item()
            assert differing < 0.01, f"{peer}: {differing:.2%} of FGSM's pixels differ from ours"
        else:
            with torch.no_grad():
                loss, ours = (F.cross_entropy(network(x), labels).item() for x in (adversarial, crafted["ours"]))
            assert abs(loss - ours) < 0.01 * ours + 1e-3, f"{peer}: PGD reaches a loss of {loss}, ours {ours}"
