"""How fast this is, beside what people would use instead. `make benchmark` writes results/benchmarks.json and .md.

Contenders are timed in turn, so the ratios are what counts. On CIFAR-10, or on digits if CIFAR-10 is not there.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict, replace

from benchmarks import adversarial_sets, attacks, growth, profiles, startup, training
from benchmarks.formats import BenchmarkReport
from benchmarks.machine import device_name
from benchmarks.tables import benchmarks_document
from benchmarks.timing import Setting
from study.__main__ import DIGITS
from utils.checkpoints import versions
from utils.commands import types
from utils.commands.parser import check_writable, pick_device, run
from utils.constants import ARCHITECTURES, DATASETS, ROOT, SPLITS, UserError
from utils.data import DataError, Split, load_split
from utils.files import write_atomically
from utils.formats import read_document, write_document

SECTIONS: dict[str, Callable[[Setting], Any]] = {
    "startup": startup.measure,
    "attacks": attacks.measure,
    "adversarial-sets": adversarial_sets.measure,
    "training": training.images_a_second,
    "time-to-accuracy": training.to_the_studys_accuracy,
    "ablation": training.ablation,
    "processes": growth.processes,
    "growth": growth.measure,
    "memory": growth.memory,
    "profile": profiles.measure,
}
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")


def main() -> None:
    """Measure as the command line says."""
    parser = argument_parser()
    args = parser.parse_args()
    run(parser, lambda: measure_sections(args))


def measure_sections(args: argparse.Namespace) -> None:
    """Run the sections that the report lacks, or those that are named, and write the report after each."""
    device = pick_device(args.device)
    dataset, splits = splits_of("digits" if args.quick else args.dataset, args.data_dir)
    about = BenchmarkReport(
        dataset=dataset,  # type: ignore[arg-type]  # the schema checks it when the report is written
        device=device_name(device),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions=versions(*PEERS),
        quick=args.quick,
    )
    path = (args.results or (DIGITS if dataset == "digits" else Path("results"))) / "benchmarks.json"
    check_writable(path)
    report = report_to_continue(path, about, args.sections)
    with tempfile.TemporaryDirectory() as folder:
        data = ["--dataset", dataset]
        if args.data_dir:
            data += ["--data-dir", str(args.data_dir.resolve())]
        checkpoints = {
            name: checkpoint_of(name, dataset, data, Path(folder), quick=args.quick) for name in ARCHITECTURES
        }
        setting = Setting(checkpoints, splits, data, device, 1 if args.quick else args.rounds, args.quick)
        # In the order of SECTIONS, not of the arguments: a training changes its process's allocator, so attacks come
        # first.
        for section, measure in SECTIONS.items():
            wanted = args.sections or [name for name in SECTIONS if name != "ablation"]
            if section in args.sections or (section in wanted and getattr(report, field(section)) is None):
                report = replace(report, **{field(section): measure(setting)})
                write_document(path, report)
                write_atomically(path.with_suffix(".md"), benchmarks_document(report).encode())


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    option = parser.add_argument
    sections = f"of {', '.join(SECTIONS)}: measure these again (default: those that the report lacks)"
    option("sections", nargs="*", metavar="SECTION", choices=[[], *SECTIONS], help=sections)
    option("--data-dir", type=types.file_path, metavar="FOLDER", help="holds CIFAR-10 (default $DATA_DIR, else data)")
    option("--dataset", choices=DATASETS, default="cifar10")
    option("--device", choices=("auto", "cuda", "mps", "cpu"), default="cpu")
    option("--rounds", type=types.positive_int, default=7, help="of each comparison (default 7)")
    option("--results", type=types.file_path, metavar="FOLDER", help=f"default results, for digits {DIGITS}")
    option("--quick", action="store_true", help="see that everything runs, on a few digits; no figure means anything")
    return parser


def field(section: str) -> str:
    """The field of the report for a section."""
    return section.replace("-", "_")


def report_to_continue(path: Path, about: BenchmarkReport, sections: list[str]) -> BenchmarkReport:
    """The report at `path` if it is of this machine and these versions; otherwise a new one, `about`.

    sections: that are to be measured. Raises UserError if they are only a part, and other sections would be lost.
    """
    if not path.exists():
        return about
    earlier = read_document(path, BenchmarkReport, "a report of the benchmarks")
    done = [section for section in SECTIONS if getattr(earlier, field(section)) is not None]
    earlier_about = replace(earlier, **{field(section): None for section in SECTIONS})
    if earlier_about == about:
        return earlier
    if sections and done:
        differ = [name for name, value in asdict(about).items() if getattr(earlier_about, name) != value]
        raise UserError(
            f"{path} is not of this machine and environment ({', '.join(differ)}): name no section, or other --results"
        )
    return about


def checkpoint_of(architecture: str, dataset: str, data: list[str], folder: Path, *, quick: bool) -> Path:
    """The checkpoint to attack: the shipped baseline, or for digits one that is trained now."""
    if dataset != "digits":
        return ROOT / "models" / f"{architecture}.safetensors"
    # By a process of its own, because a training changes the allocator of its process.
    checkpoint = folder / f"{architecture}.safetensors"
    command = [sys.executable, str(ROOT / f"train-{architecture}.py"), *data, "--recipe", "short", "--quiet"]
    subprocess.run([*command, *(["--epochs", "1"] if quick else []), "--output", str(checkpoint)], check=True)
    return checkpoint


def splits_of(dataset: str, data_dir: Path | None) -> tuple[str, dict[str, Split]]:
    """The data set's name and its splits; digits if the data set is not there."""
    try:
        return dataset, {name: load_split(dataset, name, data_dir) for name in SPLITS}
    except DataError as error:
        print(f"{error}: using digits instead")
        return splits_of("digits", None)


if __name__ == "__main__":
    main()
