"""Two robust networks in a few minutes on one GPU: `make robust-gpu` trains and tests them.

The recipe is "robust" with N-FGSM on the margin, as on a CPU, in larger batches and with other numbers to suit. The
report, results/robust-gpu.json, has the seconds of training and the accuracy on clean images, under PGD-20 and under
AutoAttack. The defaults are for an H100. A finished network is not trained again: remove it from runs/robust-gpu first.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from msgspec.structs import replace

from benchmarks.formats import RobustGPUReport, TrainedOnGPU
from benchmarks.timing import cpu_name
from defenses.losses import NFGSM
from utils.checkpoints import file_digest, load_checkpoint, read_metadata, versions
from utils.commands.parser import pick_device
from utils.constants import ARCHITECTURES, DATASETS, PGD_20, RADIUS, ROOT, SPLITS, UserError
from utils.data import Split, load_split
from utils.evaluation import evaluate, evaluate_fgsm, report_row
from utils.files import beside
from utils.formats import TestReport, write_document
from utils.recipes import RECIPES
from utils.runs import read_log
from utils.training import train
from utils.validation import best_epoch

WIDTHS = {"cnn": 160, "cnn-lstm": 120}  # the largest multiples of 8 with at most 4.5 million parameters
EPOCHS = {"cnn": 84, "cnn-lstm": 58}


def main() -> None:
    """Train and test the networks. Ends with status 1 if a training took longer than it may."""
    args = argument_parser().parse_args()
    entries = []
    try:
        device = pick_device(args.device)
        torch.backends.cudnn.benchmark = True  # almost all batches of a training have one shape
        splits = {name: load_split(args.dataset, name, args.data_dir).to(device) for name in SPLITS}
        for name in args.networks:
            trained(name, splits, device, args)
        for name in args.networks:
            entries.append(tested(name, splits["test"], args))
            report = RobustGPUReport(
                device=torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
                most_seconds=args.seconds,
                versions=versions("pyautoattack"),
                entries=entries,
            )
            write_document(args.results, report)
    except UserError as error:
        sys.exit(f"robust_gpu: error: {error}")
    slow = [entry.test.network for entry in entries if entry.seconds > args.seconds]
    sys.exit(f"more than {args.seconds} s of training: {', '.join(slow)}" if slow else 0)


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robust_gpu", description=(__doc__ or "").partition("\n")[0]
    )
    option = parser.add_argument
    option("--data-dir", type=Path, default=os.environ.get("DATA_DIR"), help="holds CIFAR-10 (default $DATA_DIR)")
    option("--dataset", choices=DATASETS, default="cifar10")
    option("--device", choices=("auto", "cuda", "mps", "cpu"), default="cuda", help="default cuda")
    option("--networks", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    for name in ARCHITECTURES:
        option(f"--{name}-width", type=int, default=WIDTHS[name], help="default %(default)s")
        option(f"--{name}-epochs", type=int, default=EPOCHS[name], help="default %(default)s")
    recipe = replace(RECIPES["robust"], batch_size=512, lr=0.1, shift=4, average=0.998)
    option("--batch-size", type=int, default=recipe.batch_size, help="images in each step (default %(default)s)")
    option("--lr", type=float, default=recipe.lr, help="highest learning rate (default %(default)s)")
    option("--shift", type=int, default=recipe.shift, help="augmentation, in pixels (default %(default)s)")
    option("--average", type=float, default=recipe.average, help="part kept in each step (default %(default)s)")
    option("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    option("--seed", type=int, default=0)
    option("--validation", type=int, default=1000, help="images attacked or classified after an epoch (default 1000)")
    option("--seconds", type=int, default=240, help="that each training may take (default 240)")
    option("--examples", type=int, default=10_000, help="attack the first N test images with AutoAttack (default all)")
    option("--attack-batch", type=int, default=1000, help="images attacked at once (default 1000)")
    option("--runs", type=Path, default=ROOT / "runs" / "robust-gpu", help="a folder for the networks")
    option("--results", type=Path, default=ROOT / "results" / "robust-gpu.json", help="the report")
    return parser


def trained(name: str, splits: dict[str, Split], device: torch.device, args: argparse.Namespace) -> Path:
    """The checkpoint of a network, which is trained unless it is there."""
    path = args.runs / f"{name}.safetensors"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    epochs, width = (getattr(args, f"{name.replace('-', '_')}_{key}") for key in ("epochs", "width"))
    numbers = {key: getattr(args, key) for key in ("batch_size", "lr", "shift", "average")}
    recipe = replace(RECIPES["robust"].with_defense(), epochs=epochs, **numbers)
    how = {"width": width, "seed": args.seed, "device": device, "precision": args.precision}
    # Other trainings validate on more images. On a GPU, an epoch takes little longer than its validation.
    validation = splits["validation"].first(args.validation)
    start = time.perf_counter()
    train(name, splits["train"], validation, recipe, output=path, defense=NFGSM(RADIUS, loss="margin"), **how)
    beside(path, ".seconds").write_text(f"{time.perf_counter() - start:.1f}")
    return path


def tested(name: str, split: Split, args: argparse.Namespace) -> TrainedOnGPU:
    """Attack a trained network on the test images, print and return what the report says of it."""
    path = args.runs / f"{name}.safetensors"
    header, epochs = read_metadata(path), read_log(beside(path, ".jsonl")).epochs
    network = load_checkpoint(path, split.device)
    (clean,) = evaluate_fgsm(network, split, [])
    results = [
        evaluate(network, split, "pgd", RADIUS, options=PGD_20, batch_size=args.attack_batch, progress=True),
        evaluate(
            network,
            split.first(args.examples),
            "autoattack",
            RADIUS,
            options={"seed": 0},
            batch_size=args.attack_batch,
            progress=True,
        ),
    ]
    assert header.training is not None  # a checkpoint of `train` has it
    entry = TrainedOnGPU(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        training=header.training,
        precision=header.precision,
        training_seconds=round(sum(epoch.seconds for epoch in epochs), 1),
        seconds=float(beside(path, ".seconds").read_text()),
        validation_accuracy=best_epoch(epochs).validation_accuracy,
        test=TestReport(
            checkpoint=str(path),
            sha256=file_digest(path),
            network=name,
            dataset=split.dataset,
            split=split.name,
            examples=len(split),
            clean_accuracy=clean.accuracy,
            clean_confidence_interval=clean.confidence_interval,
            attacks=[report_row(result, "white_box") for result in results],
        ),
    )
    figures = ", ".join(f"{result.attack} {result.accuracy:.2%} of {result.examples:,}" for result in results)
    print(f"{name}: {entry.seconds:.0f} s of training, clean {clean.accuracy:.2%}, {figures}", flush=True)
    return entry


if __name__ == "__main__":
    main()
