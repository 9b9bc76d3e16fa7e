"""Do other libraries' attacks agree with ours on the shipped checkpoints? `make agreement` writes agreement.json.

FGSM's images should be the same except for one pixel in 50,000. (Our folded networks round differently, and rounding
decides whether an activation near 0 passes a ReLU.) Accuracies under FGSM should be the same. Those under PGD in both
norms and under MI-FGSM should be within a point, and so should the share of images that targeted PGD leads to its
target. An image's smallest radius, by PGD and bisection, should be within a twentieth of the one that foolbox's Fast
Minimum-Norm attack finds (Pintor et al., 2021, arXiv:2102.12827), in the median of the images. All others are
torchattacks'.
"""

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # new versions of Python warn about torchattacks' syntax
import foolbox  # noqa: E402
import torch  # noqa: E402
import torchattacks  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from attacks import fgsm, minimal_epsilon, pgd  # noqa: E402
from benchmarks.formats import AgreementEntry, AgreementFigures, AgreementRadii, AgreementReport  # noqa: E402
from study.robustness import checkpoint_paths  # noqa: E402
from utils.checkpoints import file_digest, load_checkpoint  # noqa: E402
from utils.constants import L2_RADIUS, ROOT  # noqa: E402
from utils.data import Split, batches, load_split, to_unit_range  # noqa: E402
from utils.evaluation import correctly_classified  # noqa: E402
from utils.formats import write_document  # noqa: E402

Attack = Callable[[Tensor, Tensor], Tensor]  # images and labels to adversarial images

EPSILON, STEPS = 8 / 255, 50
MOMENTUM_STEPS = 10  # of MI-FGSM, as in its paper
EXAMPLES_OF_RADII, MINIMUM_NORM_STEPS = 100, 100


def main() -> None:
    """Compare on every shipped checkpoint and write the report. Ends with status 1 if a figure disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    parser.add_argument("--examples", type=int, default=500)
    args = parser.parse_args()
    split = load_split("cifar10", "test", args.data_dir).first(args.examples)
    few = split.first(EXAMPLES_OF_RADII)
    checkpoints = [checkpoint for _, checkpoint in checkpoint_paths(ROOT / "models", wide=False)]
    about: dict[str, Any] = {
        "peers": [f"torchattacks {torchattacks.__version__}", f"foolbox {foolbox.__version__}"],
        "torch": torch.__version__,
        "epsilon": EPSILON,
        "epsilon_l2": L2_RADIUS,
        "steps": STEPS,
        "examples": len(split),
        "examples_of_radii": len(few),
    }
    entries = [compare(checkpoint, split) for checkpoint in checkpoints]
    radii = [smallest_radii(checkpoint, few) for checkpoint in checkpoints]
    write_document(ROOT / "results" / "agreement.json", AgreementReport(**about, entries=entries, radii=radii))
    sys.exit(not (all(entry.agrees() for entry in entries) and all(each.agrees() for each in radii)))


def compare(path: Path, split: Split) -> AgreementEntry:
    """One checkpoint under our attacks and the peers'."""
    network = load_checkpoint(path)
    attacks = pairs_of_attacks(network, split.images.shape[1:], len(split.class_names))
    torch.manual_seed(0)
    hits: Counter[tuple[str, str]] = Counter()
    differ = 0
    for images, labels in batches(split, 250):
        for name, pair in attacks.items():
            crafted = {whose: attack(images, labels) for whose, attack in zip(("ours", "peers"), pair, strict=True)}
            reached = following(labels, len(split.class_names)) if name == "targeted" else labels
            for whose, examples in crafted.items():
                hits[whose, name] += int(correctly_classified(network, examples, reached).sum())
            if name == "fgsm":
                differ += int(((crafted["ours"] - crafted["peers"]).abs() > 1e-6).sum())
    ours, peers = (
        AgreementFigures(**{name: hits[whose, name] / len(split) for name in attacks}) for whose in ("ours", "peers")
    )
    entry = AgreementEntry(
        name=path.stem,
        sha256=file_digest(path),
        ours=ours,
        peers=peers,
        pixels=len(split) * 3 * 32 * 32,
        pixels_that_differ=differ,
    )
    print(f"{entry.name}: {differ:,} of {entry.pixels:,} pixels differ\n  ours {ours}\n  peers {peers}", flush=True)
    return entry


def pairs_of_attacks(network: nn.Module, shape: torch.Size, classes: int) -> dict[str, tuple[Attack, Attack]]:
    """Each attack by its name in AgreementFigures: ours and torchattacks'."""
    pgd_options: dict[str, Any] = {"eps": EPSILON, "alpha": 2.5 * EPSILON / STEPS, "steps": STEPS}
    peers_targeted = torchattacks.PGD(network, **pgd_options)
    peers_targeted.set_mode_targeted_by_label(quiet=True)
    # PGDL2 views gradients as vectors, which only works in the contiguous format.
    contiguous = nn.Sequential(nn.Flatten(), nn.Unflatten(1, shape), network).eval()
    # Without random starts, because the peer's lie nearer to the images than ours, which fill the ball evenly.
    l2_options: dict[str, Any] = {"alpha": 2.5 * L2_RADIUS / STEPS, "steps": STEPS, "random_start": False}
    peers_l2 = torchattacks.PGDL2(contiguous, eps=L2_RADIUS, **l2_options)
    alpha = EPSILON / MOMENTUM_STEPS
    our_mi_fgsm: dict[str, Any] = {"steps": MOMENTUM_STEPS, "step_size": alpha, "momentum": 1.0}
    our_mi_fgsm |= {"random_start": False, "early_stop": False}
    our_pgd = partial(pgd, network, epsilon=EPSILON, steps=STEPS)
    return {
        "fgsm": (partial(fgsm, network, epsilon=EPSILON), torchattacks.FGSM(network, eps=EPSILON)),
        "pgd": (our_pgd, torchattacks.PGD(network, **pgd_options)),
        "pgd_l2": (
            partial(pgd, network, epsilon=L2_RADIUS, norm="l2", steps=STEPS, random_start=False),
            lambda images, labels: peers_l2(images.contiguous(), labels),
        ),
        "mi_fgsm": (
            partial(pgd, network, epsilon=EPSILON, **our_mi_fgsm),
            torchattacks.MIFGSM(network, eps=EPSILON, alpha=alpha, steps=MOMENTUM_STEPS, decay=1.0),
        ),
        "targeted": (
            lambda images, labels: our_pgd(images, following(labels, classes), targeted=True),
            lambda images, labels: peers_targeted(images, following(labels, classes)),
        ),
    }


def following(labels: Tensor, classes: int) -> Tensor:
    """The targets: for each image the class after its own."""
    return (labels + 1) % classes


def smallest_radii(path: Path, split: Split) -> AgreementRadii:
    """The smallest radii at which the images of one checkpoint fall: by our search, and by foolbox's."""
    network = load_checkpoint(path)
    images, labels = to_unit_range(split.images).contiguous(), split.labels
    ours = minimal_epsilon(network, images, labels)
    attack = foolbox.attacks.LInfFMNAttack(steps=MINIMUM_NORM_STEPS)
    _, examples, _ = attack(foolbox.PyTorchModel(network, bounds=(0, 1)), images, labels, epsilons=None)
    peers = (examples - images).abs().amax((1, 2, 3)).double()
    peers[correctly_classified(network, examples, labels)] = torch.inf
    clean = correctly_classified(network, images, labels)
    peers[~clean] = 0
    medians = {"ours": ours.median().item(), "peers": peers.median().item()}
    radii = AgreementRadii(
        name=path.stem, sha256=file_digest(path), **medians, ratio=(ours / peers)[clean].nanmedian().item()
    )
    print(radii, flush=True)
    return radii


if __name__ == "__main__":
    main()
