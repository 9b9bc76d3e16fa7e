"""Two robust networks in a few minutes on one GPU: `make robust-gpu` trains and tests them.

The recipe and the defence are those of a CPU (study.plan.ROBUST), in larger batches and with other numbers to suit. The
report, results/robust-gpu.json, has the seconds of training and the accuracy on clean images, under PGD-20 and under
AutoAttack. The defaults are for an H100. A finished network is not trained again.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from benchmarks.formats import RobustGPUReport, TimeOnGPU, TrainedOnGPU
from benchmarks.machine import device_name
from study.plan import ROBUST
from utils.checkpoints import file_digest, load_checkpoint, read_metadata, versions
from utils.commands import types
from utils.commands.parser import check_writable, pick_device, run
from utils.constants import ARCHITECTURES, DATASETS, PGD_20, RADIUS, ROOT, SPLITS, UserError
from utils.data import Split, load_split
from utils.evaluation import evaluate, evaluate_fgsm, report_row
from utils.files import beside
from utils.formats import TestReport, read_document, write_document
from utils.runs import check_same_arguments, read_log, training_arguments
from utils.training import train
from utils.validation import best_epoch

WIDTHS = {"cnn": 160, "cnn-lstm": 120}  # the largest multiples of 8 with at most 4.5 million parameters
# Two thirds of what N-FGSM had (docs/performance.md), because a step of N-PGD has one more gradient. Not timed.
EPOCHS = {"cnn": 56, "cnn-lstm": 39}


def main() -> None:
    """Train and test the networks. Ends with status 1 if a training took longer than it may."""
    parser = argument_parser()
    args = parser.parse_args()
    entries: dict[str, TrainedOnGPU] = {}
    run(parser, lambda: train_and_test(args, entries))
    slow = [name for name in args.networks if entries[name].seconds > args.seconds]
    sys.exit(f"more than {args.seconds} s of training: {', '.join(slow)}" if slow else 0)


def train_and_test(args: argparse.Namespace, entries: dict[str, TrainedOnGPU]) -> None:
    """Train and test the networks and write the report. entries: gets what the report says of each network."""
    device = pick_device(args.device)
    torch.backends.cudnn.benchmark = True  # almost all batches of a training have one shape
    report = RobustGPUReport(
        device=device_name(device), most_seconds=args.seconds, versions=versions("pyautoattack"), entries=[]
    )
    entries |= earlier_entries(report, args)
    splits = {name: load_split(args.dataset, name, args.data_dir).to(device) for name in SPLITS}
    for name in args.networks:
        check(name, splits["train"], args)
    for name in args.networks:
        train_if_missing(name, splits, device, args)
    for name in args.networks:
        entries[name] = tested(name, splits["test"], args)
        write_document(args.results, replace(report, entries=[entries[key] for key in ARCHITECTURES if key in entries]))


def earlier_entries(report: RobustGPUReport, args: argparse.Namespace) -> dict[str, TrainedOnGPU]:
    """What an earlier report says of the networks that are not asked for now.

    Raises UserError if it would be lost, or if AutoAttack had more images of a network that is asked for again.
    """
    check_writable(args.results)
    if not args.results.exists():
        return {}
    earlier = read_document(args.results, RobustGPUReport, "a report of this command, which would replace it")
    entries = {entry.test.network: entry for entry in earlier.entries}
    others = {name: entry for name, entry in entries.items() if name not in args.networks}
    if others and (earlier.device, earlier.versions) != (report.device, report.versions):
        raise UserError(
            f"{args.results} has figures of {', '.join(others)} from another device or with other versions, which "
            "would be lost: choose another file with --results"
        )
    for name in (name for name in args.networks if name in entries):
        test, path = entries[name].test, checkpoint_path(name, args)
        examples = max((row.examples or 0 for row in test.attacks if row.name == "autoattack"), default=0)
        if examples > args.examples and path.exists() and file_digest(path) == test.sha256:
            raise UserError(
                f"{args.results} has figures of {path} under AutoAttack on {examples:,} images, which would be lost: "
                "choose another file with --results"
            )
    return others


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
    option("--batch-size", type=int, default=512, help="images in each step (default %(default)s)")
    option("--lr", type=float, help="highest learning rate (default: twice that of the network's recipe)")
    option("--average", type=float, default=0.998, help="part kept in each step (default %(default)s)")
    option("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    option("--seed", type=int, default=0)
    option(
        "--validation",
        type=types.positive_int,
        default=1000,
        help="images attacked or classified after an epoch (default 1000)",
    )
    option("--seconds", type=types.positive_int, default=240, help="seconds that each training may take (default 240)")
    examples = "attack the first N test images with AutoAttack (default all)"
    option("--examples", type=types.positive_int, default=10_000, help=examples)
    option("--attack-batch", type=types.positive_int, default=1000, help="images attacked at once (default 1000)")
    option("--runs", type=Path, default=ROOT / "runs" / "robust-gpu", help="a folder for the networks")
    option("--results", type=Path, default=ROOT / "results" / "robust-gpu.json", help="the report")
    return parser


def checkpoint_path(name: str, args: argparse.Namespace) -> Path:
    """Where a network is stored. Its log and its time lie beside it."""
    return args.runs / f"{name}.safetensors"


def how_to_train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """How a network is trained: its recipe, width, seed and defence."""
    epochs, width = (getattr(args, f"{name.replace('-', '_')}_{key}") for key in ("epochs", "width"))
    recipe = ROBUST[name].recipe
    numbers = {
        "lr": 2 * recipe.lr if args.lr is None else args.lr,
        "batch_size": args.batch_size,
        "average": args.average,
    }
    recipe = replace(recipe, epochs=epochs, **numbers)
    return {"recipe": recipe, "width": width, "seed": args.seed, "defense": ROBUST[name].defense}


def check(name: str, training: Split, args: argparse.Namespace) -> None:
    """Raise UserError if an argument is invalid, or if a checkpoint is of another training or cannot be written."""
    path = checkpoint_path(name, args)
    wanted = training_arguments(name, training, **how_to_train(name, args))
    if path.exists():
        try:
            header, log, time_taken = read_metadata(path), read_log(beside(path, ".jsonl")), read_time(path)
            check_same_arguments(path, header.training, wanted)
            check_same_arguments(path, log.arguments, wanted)
            found, asked = (header.precision, time_taken.validation), (args.precision, args.validation)
            if found != asked:
                texts = (f"in {precision} with {images:,} validation images" for precision, images in (found, asked))
                raise UserError(f"{path} was trained {', not '.join(texts)}")
        except UserError as error:
            raise UserError(f"{error}; remove {path}, or choose another folder with --runs") from None
    else:
        check_writable(path)


def read_time(path: Path) -> TimeOnGPU:
    """What lies beside a checkpoint. Raises UserError if it is missing or damaged."""
    return read_document(beside(path, ".time.json"), TimeOnGPU, "the time of a training")


def train_if_missing(name: str, splits: dict[str, Split], device: torch.device, args: argparse.Namespace) -> None:
    """Train a network and write its checkpoint, unless that is there."""
    path = checkpoint_path(name, args)
    if path.exists():
        return
    # Other trainings validate on more images. On a GPU, an epoch takes little longer than its validation.
    validation = splits["validation"].first(args.validation)
    start = time.perf_counter()
    how = {"output": path, "device": device, "precision": args.precision}
    train(name, splits["train"], validation, **how_to_train(name, args), **how)
    seconds = round(time.perf_counter() - start, 1)
    write_document(beside(path, ".time.json"), TimeOnGPU(seconds=seconds, validation=args.validation))


def tested(name: str, split: Split, args: argparse.Namespace) -> TrainedOnGPU:
    """Attack a trained network on the test images, print and return what the report says of it."""
    path = checkpoint_path(name, args)
    header, log = read_metadata(path), read_log(beside(path, ".jsonl"))
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
        training_seconds=round(log.seconds, 1),
        seconds=read_time(path).seconds,
        validation_accuracy=best_epoch(log.epochs).validation_accuracy,
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
