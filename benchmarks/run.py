"""How fast is this, beside what people would use instead? `make benchmark` writes results/benchmarks.json and .md.

Contenders are timed in turn, so that what counts are the ratios. On CIFAR-10, or on digits where it is not to be had.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import adversarial_sets, attacks, growth, startup, training
from benchmarks.tables import benchmarks_document
from benchmarks.timing import ROOT, Setting, cpu_name
from study.__main__ import DEMO
from utils.checkpoints import versions
from utils.data import DataError, load_split
from utils.files import write_atomically

SECTIONS = {
    "startup": startup.measure,
    "attacks": attacks.measure,
    "adversarial-sets": adversarial_sets.measure,
    "training": training.images_a_second,
    "time-to-accuracy": training.to_the_studys_accuracy,
    "processes": growth.processes,
    "growth": growth.measure,
    "memory": growth.memory,
}
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    sections = f"of {', '.join(SECTIONS)}: measure these again (default: those that the report has not yet)"
    option("sections", nargs="*", metavar="SECTION", choices=[[], *SECTIONS], help=sections)
    option("--data-dir", type=Path, metavar="FOLDER", help="holds CIFAR-10 (default $DATA_DIR, else data)")
    option("--dataset", choices=("cifar10", "digits"), default="cifar10")
    option("--device", type=torch.device, default="cpu")
    option("--rounds", type=int, default=7, help="of each comparison (default 7)")
    option("--results", type=Path, metavar="FOLDER", help=f"default results, for digits {DEMO}")
    option("--quick", action="store_true", help="does everything run? On a few digits, once: no figure means anything")
    args = parser.parse_args()
    dataset, splits = splits_of("digits" if args.quick else args.dataset, args.data_dir)
    report = {
        "dataset": dataset,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(*PEERS),
        "quick": args.quick,
    }
    path = (args.results or (DEMO if dataset == "digits" else Path("results"))) / "benchmarks.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if report.items() <= earlier.items():  # of the same machine and versions
        report = earlier
    elif args.sections and any(name in earlier for name in SECTIONS):  # the others would be gone
        differ = ", ".join(name for name, value in report.items() if earlier.get(name) != value)
        parser.error(f"{path} is not of this machine and environment ({differ}): name no section, or other --results")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, data = ROOT / "models" / "cnn.safetensors", ["--dataset", dataset]
        if args.data_dir:
            data += ["--data-dir", args.data_dir.resolve()]
        if dataset == "digits":  # by a process of its own, because a training changes this one's allocator
            checkpoint = Path(folder) / "cnn.safetensors"
            command = [sys.executable, ROOT / "train-cnn.py", *data, "--recipe", "short", "--quiet"]
            command += ["--epochs", "1"] if args.quick else []
            subprocess.run([*command, "--output", checkpoint], check=True)
        rounds = 1 if args.quick else args.rounds
        setting = Setting(checkpoint, splits, data, args.device, rounds, args.quick)
        # In their order, whatever the arguments': a training leaves its process another allocator, attacks come before.
        for section in [name for name in SECTIONS if (name in args.sections if args.sections else name not in report)]:
            report[section] = SECTIONS[section](setting)
            write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
            write_atomically(path.with_suffix(".md"), benchmarks_document(report).encode())


def splits_of(dataset, data_dir):
    """The data set's name and its three splits; the digits' where it is not to be had."""
    try:
        return dataset, {name: load_split(dataset, name, data_dir) for name in ("train", "validation", "test")}
    except DataError as error:
        print(f"{error}: digits, then")
        return splits_of("digits", None)


if __name__ == "__main__":
    main()
