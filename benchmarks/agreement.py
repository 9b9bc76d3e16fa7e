"""Do our attacks agree with torchattacks' on the shipped checkpoints? `make agreement` writes results/agreement.json.

FGSM's images should be the same except for one pixel in 100,000. (Our folded networks round differently, and rounding
decides whether an activation near 0 passes a ReLU.) Accuracies under FGSM should be the same, those under PGD in both
norms and under MI-FGSM within a point.
"""

import argparse
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # new versions of Python warn about torchattacks' syntax
import torch  # noqa: E402
import torchattacks  # noqa: E402
from torch import nn  # noqa: E402

from attacks import fgsm, pgd  # noqa: E402
from benchmarks.formats import AgreementEntry, AgreementReport  # noqa: E402
from study.robustness import checkpoint_paths  # noqa: E402
from utils.checkpoints import file_digest, load_checkpoint  # noqa: E402
from utils.constants import L2_RADIUS, ROOT  # noqa: E402
from utils.data import Split, batches, load_split  # noqa: E402
from utils.evaluation import correctly_classified  # noqa: E402
from utils.formats import write_document  # noqa: E402

EPSILON, STEPS = 8 / 255, 50
MOMENTUM_STEPS = 10  # of MI-FGSM, as in its paper
DIFFERENT = 1e-5  # the part of the pixels that may differ


def main() -> None:
    """Compare on every shipped checkpoint and write the report. Ends with status 1 if a figure disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    parser.add_argument("--examples", type=int, default=1000)
    args = parser.parse_args()
    split = load_split("cifar10", "test", args.data_dir).first(args.examples)
    entries = [compare(path, split) for _, path in checkpoint_paths(ROOT / "models")]
    report = AgreementReport(
        peer=f"torchattacks {torchattacks.__version__}",
        torch=torch.__version__,
        epsilon=EPSILON,
        epsilon_l2=L2_RADIUS,
        steps=STEPS,
        examples=len(split),
        entries=entries,
    )
    write_document(ROOT / "results" / "agreement.json", report)
    sys.exit(not all(map(agrees, entries)))


def agrees(entry: AgreementEntry) -> bool:
    """Whether a network's figures are as close as they should be."""
    same_images = entry.pixels_that_differ <= DIFFERENT * entry.pixels
    pairs = ((getattr(entry, name), getattr(entry, f"peer_{name}")) for name in ("pgd", "pgd_l2", "mi_fgsm"))
    return same_images and entry.fgsm == entry.peer_fgsm and all(abs(ours - theirs) <= 0.01 for ours, theirs in pairs)


def compare(path: Path, split: Split) -> AgreementEntry:
    """One checkpoint under our attacks and the peer's."""
    network = load_checkpoint(path)
    peers_fgsm = torchattacks.FGSM(network, eps=EPSILON)
    peers_pgd = torchattacks.PGD(network, eps=EPSILON, alpha=2.5 * EPSILON / STEPS, steps=STEPS)
    # PGDL2 views gradients as vectors, which only works in the contiguous format.
    contiguous = nn.Sequential(nn.Flatten(), nn.Unflatten(1, split.images.shape[1:]), network).eval()
    # Without random starts, because the peer's lie nearer to the images than ours, which fill the ball evenly.
    l2_options: dict[str, Any] = {"alpha": 2.5 * L2_RADIUS / STEPS, "steps": STEPS, "random_start": False}
    peers_l2 = torchattacks.PGDL2(contiguous, eps=L2_RADIUS, **l2_options)
    alpha = EPSILON / MOMENTUM_STEPS
    peers_mi_fgsm = torchattacks.MIFGSM(network, eps=EPSILON, alpha=alpha, steps=MOMENTUM_STEPS, decay=1.0)
    mi_fgsm: dict[str, Any] = {
        "steps": MOMENTUM_STEPS,
        "step_size": alpha,
        "momentum": 1.0,
        "random_start": False,
        "early_stop": False,
    }
    torch.manual_seed(0)
    hits: Counter[str] = Counter()
    differ = 0
    for images, labels in batches(split, 250):
        examples = {
            "fgsm": fgsm(network, images, labels, epsilon=EPSILON),
            "peer_fgsm": peers_fgsm(images, labels),
            "pgd": pgd(network, images, labels, epsilon=EPSILON, steps=STEPS),
            "peer_pgd": peers_pgd(images, labels),
            "pgd_l2": pgd(network, images, labels, epsilon=L2_RADIUS, norm="l2", steps=STEPS, random_start=False),
            "peer_pgd_l2": peers_l2(images.contiguous(), labels),
            "mi_fgsm": pgd(network, images, labels, epsilon=EPSILON, **mi_fgsm),
            "peer_mi_fgsm": peers_mi_fgsm(images, labels),
        }
        for attack, crafted in examples.items():
            hits[attack] += int(correctly_classified(network, crafted, labels).sum())
        differ += int(((examples["fgsm"] - examples["peer_fgsm"]).abs() > 1e-6).sum())
    entry = AgreementEntry(
        name=path.stem,
        sha256=file_digest(path),
        **{attack: count / len(split) for attack, count in hits.items()},
        pixels=len(split) * 3 * 32 * 32,
        pixels_that_differ=differ,
    )
    print(
        f"{entry.name:25} FGSM {entry.fgsm:.2%}, theirs {entry.peer_fgsm:.2%}, {entry.pixels_that_differ:,} of "
        f"{entry.pixels:,} pixels differ; PGD-{STEPS} {entry.pgd:.2%}, theirs {entry.peer_pgd:.2%}; in L2 "
        f"{entry.pgd_l2:.2%}, theirs {entry.peer_pgd_l2:.2%}; MI-FGSM {entry.mi_fgsm:.2%}, theirs "
        f"{entry.peer_mi_fgsm:.2%}",
        flush=True,
    )
    return entry


if __name__ == "__main__":
    main()
