"""Do our attacks agree with torchattacks' on the shipped checkpoints? `make agreement` writes results/agreement.json.

FGSM's images should be the same but for one pixel in 100,000, where rounding, which in our folded networks is another,
decides whether an activation near 0 passes a ReLU; accuracies under FGSM the same, and under PGD within a point.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # torchattacks' syntax, on new versions of Python
import torch  # noqa: E402
import torchattacks  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from attacks import fgsm, pgd  # noqa: E402
from study.robustness import checkpoint_paths  # noqa: E402
from utils.checkpoints import file_digest, load_checkpoint  # noqa: E402
from utils.data import batches, load_split  # noqa: E402
from utils.evaluation import correctly_classified  # noqa: E402
from utils.files import write_atomically  # noqa: E402

EPSILON, STEPS = 8 / 255, 50
DIFFERENT = 1e-5  # of the pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("DATA_DIR"))
    parser.add_argument("--examples", type=int, default=1000)
    args = parser.parse_args()
    split = load_split("cifar10", "test", args.data_dir).first(args.examples)
    rows = [compare(path, split) for _, path in checkpoint_paths(ROOT / "models")]
    report = {
        "peer": f"torchattacks {torchattacks.__version__}",
        "torch": torch.__version__,
        "epsilon": EPSILON,
        "steps": STEPS,
        "examples": len(split),
        "networks": rows,
    }
    write_atomically(ROOT / "results" / "agreement.json", (json.dumps(report, indent=1) + "\n").encode())
    sys.exit(
        any(
            row["pixels_that_differ"] > DIFFERENT * row["pixels"]
            or row["fgsm"] != row["peer_fgsm"]
            or abs(row["pgd"] - row["peer_pgd"]) > 0.01
            for row in rows
        )
    )


def compare(path, split):
    network = load_checkpoint(path)
    peers = torchattacks.FGSM(network, eps=EPSILON)
    peers_pgd = torchattacks.PGD(network, eps=EPSILON, alpha=2.5 * EPSILON / STEPS, steps=STEPS)
    torch.manual_seed(0)
    hits = dict.fromkeys(("fgsm", "peer_fgsm", "pgd", "peer_pgd"), 0)
    differ = 0
    for images, labels in batches(split, 250):
        examples = {
            "fgsm": fgsm(network, images, labels, epsilon=EPSILON),
            "peer_fgsm": peers(images, labels),
            "pgd": pgd(network, images, labels, epsilon=EPSILON, steps=STEPS),
            "peer_pgd": peers_pgd(images, labels),
        }
        for attack, crafted in examples.items():
            hits[attack] += correctly_classified(network, crafted, labels).sum().item()
        differ += ((examples["fgsm"] - examples["peer_fgsm"]).abs() > 1e-6).sum().item()
    row = {
        "name": path.stem,
        "sha256": file_digest(path),
        **{attack: count / len(split) for attack, count in hits.items()},
        "pixels": len(split) * 3 * 32 * 32,
        "pixels_that_differ": differ,
    }
    print(
        f"{path.stem:25} FGSM {row['fgsm']:.2%}, theirs {row['peer_fgsm']:.2%}, {differ:,} of {row['pixels']:,} pixels "
        f"differ; PGD-{STEPS} {row['pgd']:.2%}, theirs {row['peer_pgd']:.2%}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
