"""How fast is this, beside what people would use instead? `make benchmark` writes results/benchmarks.json and .md.

Contenders are timed in turn, so that what counts are the ratios. On CIFAR-10, or on digits where it is not to be had.
"""

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import adversarial_sets, attacks, growth, startup, training
from benchmarks.timing import ROOT, Setting, cpu_name
from utils.checkpoints import versions, write_atomically
from utils.cli import DEMO
from utils.data import DataError, load_split
from utils.recipes import RECIPES
from utils.tables import benchmarks_document
from utils.training import train

SECTIONS = {
    "startup": startup.measure,
    "attacks": attacks.measure,
    "adversarial_sets": adversarial_sets.measure,
    "training": training.images_a_second,
    "time_to_accuracy": training.to_the_studys_accuracy,
    "processes": growth.processes,
    "growth": growth.measure,
    "memory": growth.memory,
}
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="measure this again and keep the rest")
    option("--data-dir", type=Path, metavar="FOLDER", help="holds CIFAR-10 (default $DATA_DIR, else data)")
    option("--dataset", choices=("cifar10", "digits"), default="cifar10")
    option("--device", type=torch.device, default="cpu")
    option("--rounds", type=int, default=7, help="of each comparison (default 7)")
    args = parser.parse_args()
    try:
        splits = {name: load_split(args.dataset, name, args.data_dir) for name in ("train", "validation", "test")}
    except DataError as error:
        print(f"{error}: digits, then")
        splits = {name: load_split("digits", name) for name in ("train", "validation", "test")}
    dataset = splits["train"].dataset
    report = {
        "dataset": dataset,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {**versions(), **{peer: version(peer) for peer in PEERS}},
    }
    path = (DEMO if dataset == "digits" else ROOT / "results") / "benchmarks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if report.items() <= earlier.items():
        report = earlier
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ROOT / "models" / "cnn.safetensors"
        if dataset == "digits":
            checkpoint = Path(folder) / "cnn.safetensors"
            train("cnn", splits["train"], splits["validation"], RECIPES["short"], output=checkpoint, quiet=True)
        setting = Setting(checkpoint, splits, args.device, args.rounds)
        for name in args.only:
            report[name] = SECTIONS[name](setting)
            write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
            write_atomically(path.with_suffix(".md"), benchmarks_document(report).encode())


if __name__ == "__main__":
    main()
