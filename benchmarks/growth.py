"""How the cost grows: speed by width, batch, images, steps, threads and processes; peak memory by batch and width."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from attacks import fgsm, pgd
from benchmarks.attacks import EPSILON, robust_images
from benchmarks.formats import MemoryGrowth, SpeedGrowth, TimedTraining
from benchmarks.timing import Setting, compared, rounds_in_turn, say, timed
from benchmarks.training import FAST, faster_precision, our_epoch
from defenses.losses import NFGSM, Defense
from networks import NETWORKS
from utils.allocator import keep_freed_memory
from utils.constants import RADIUS, ROOT
from utils.evaluation import evaluate_fgsm
from utils.recipes import RECIPES
from utils.runs import read_log

Work = tuple[int, Callable[[], float]]  # how many images, and a function that processes them and returns its seconds


def measure(setting: Setting) -> list[SpeedGrowth]:
    """The section "growth": each speed is the median of three runs, after one run to warm up.

    These are absolute speeds, so compare only their trend.
    """
    validation = setting.splits["validation"].first(10)
    training = setting.splits["train"].first(setting.pick(1280, 200))
    attacked = setting.splits["train"].first(setting.pick(1500, 50)).to(setting.device)
    images, labels = robust_images(setting.network(), attacked)
    recipe = RECIPES["one-cycle"]
    rows: list[SpeedGrowth] = []

    def fresh(name: str, width: int = 32) -> nn.Module:
        return NETWORKS[name](width).to(setting.device).to(memory_format=torch.channels_last).eval()

    def attack(function: Callable[..., Tensor], network: nn.Module, count: int, **options: Any) -> Work:
        count = min(count, len(images))
        return count, lambda: timed(lambda: function(network, images[:count], labels[:count], **options))

    def train(batch_size: int = recipe.batch_size, width: int = 32, defense: Defense | None = None) -> Work:
        sized = replace(recipe, batch_size=batch_size)
        return len(training), lambda: our_epoch(training, validation, defense, sized, setting.device, width=width)

    def add(axis: str, value: int | str, what: str, count: int, seconds: Callable[[], float]) -> None:
        seconds()
        middle = median(seconds() for _ in range(setting.pick(3, 1)))
        where: dict[str, Any] = {axis: value}
        rows.append(SpeedGrowth(**where, what=what, images_per_second=count / middle))
        print(f"  {rows[-1].axis}, {what}: {rows[-1].images_per_second:,.0f} images/s", flush=True)

    keep_freed_memory()  # as the scripts do; here, so that it holds for every row
    print("\nhow the cost grows")
    for width in setting.pick((16, 32, 64, 96), (8,)):
        add("width", width, "FGSM", *attack(fgsm, fresh("cnn", width), 250, epsilon=EPSILON))
        add("width", width, "training", *train(width=width))
        add("width", width, "training with N-FGSM", *train(width=width, defense=NFGSM(RADIUS)))
    for batch in setting.pick((1, 8, 32, 64, 125, 250, 500, 1000), (1, 8)):
        if batch <= len(images):
            add("batch", batch, "FGSM", *attack(fgsm, setting.network(), batch, epsilon=EPSILON))
    for batch in setting.pick((32, 64, 128, 256, 512), (32,)):
        add("batch", batch, "training", *train(batch))
    for name in ("cnn", "cnn-lstm"):
        add("network", name, "FGSM", *attack(fgsm, fresh(name), 250, epsilon=EPSILON))
    for count in setting.pick((250, 1000, 4000), (20,)):
        split = setting.splits["test"].first(count).to(setting.device)
        testing = partial(evaluate_fgsm, setting.network(), split, [EPSILON])
        add("images", len(split), "testing, clean and under FGSM", len(split), partial(timed, testing))
    for steps in setting.pick((5, 10, 20, 50), (2,)):
        options = {"epsilon": EPSILON, "steps": steps, "random_start": False}
        add("steps", steps, "PGD", *attack(pgd, setting.network(), 250, **options))
    before = torch.get_num_threads()
    for threads in range(1, setting.pick(os.cpu_count() or 1, 1) + 1):
        torch.set_num_threads(threads)
        add("threads", threads, "FGSM", *attack(fgsm, setting.network(), 250, epsilon=EPSILON))
        add("threads", threads, "training", *train())
    torch.set_num_threads(before)
    return rows


def processes(setting: Setting) -> TimedTraining:
    """The section "processes": a short training in one process for each core, and in one process with all threads.

    Both train to the end, in the faster precision and with one seed for each round. The seconds are those of all epochs
    in the log.
    """
    cores = os.cpu_count() or 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores)]
    precision = faster_precision(setting)
    arguments = [*setting.data, "--recipe", "fast"]
    arguments += ["--precision", precision, "--device", "cpu", "--quiet"]
    arguments += setting.pick([], ["--epochs", "1", "--width", "4"])
    many, one = f"{cores} processes", f"one process, {cores} threads"
    accuracies: dict[str, list[float]] = {many: [], one: []}

    def trained(name: str, launcher: list[str], threads: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.safetensors"
            seed = ["--seed", str(len(accuracies[name]))]
            command = [sys.executable, *launcher, str(ROOT / "train-cnn.py"), *arguments, *seed]
            subprocess.run(
                [*command, "--output", str(output)], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
            log = read_log(output.with_suffix(".jsonl"))
        accuracies[name].append(log.epochs[-1].validation_accuracy)
        return log.seconds

    contenders = {many: lambda: trained(many, torchrun, 1), one: lambda: trained(one, [], cores)}
    epochs = setting.pick(FAST.epochs, 1)
    rows = compared(rounds_in_turn(contenders, setting.pick(3, 1)), epochs * len(setting.splits["train"]))
    say("many processes", rows)
    return TimedTraining(precision=precision, epochs=epochs, accuracies=accuracies, rows=rows)


def memory(setting: Setting) -> list[MemoryGrowth]:
    """The section "memory": the peak of a process, testing under FGSM by batch and training on digits by width."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tested = ["--checkpoint", setting.checkpoints["cnn"], *setting.data, "--examples", "1000", "--epsilon", "0.02"]
        for batch in setting.pick((32, 128, 250, 500, 1000), (8,)):
            used = peak("test-cnn.py", *tested, "--batch-size", batch)
            rows.append(MemoryGrowth(batch=batch, what="test-cnn.py", peak_mebibytes=used))
        for width in setting.pick((16, 32, 64, 96), (4,)):
            output = Path(folder) / f"{width}.safetensors"
            arguments = ("--dataset", "digits", "--epochs", 1, "--width", width, "--output", output)
            used = peak("train-cnn.py", *arguments)
            rows.append(MemoryGrowth(width=width, what="train-cnn.py on digits", peak_mebibytes=used))
    print("\npeak memory")
    for row in rows:
        print(f"  {row.axis}, {row.what}: {row.peak_mebibytes:,} MiB")
    return rows


# Run by a small process of its own, because on Linux a child's peak starts at its parent's.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(script: str, *arguments: object) -> int:
    """The most memory that a script held, in MiB."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, other systems kibibytes
    return round(int(done.stdout) / unit)
