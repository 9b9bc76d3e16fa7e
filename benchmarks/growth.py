"""How the cost grows: speed by width, batch, steps, threads and processes, and peak memory by batch and width."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from attacks import fgsm, pgd
from benchmarks.attacks import EPSILON, robust_images
from benchmarks.timing import ROOT, say, table, timed
from benchmarks.training import our_epoch
from networks import NETWORKS
from utils.recipes import RECIPES

WIDTHS, BATCHES, STEPS = (16, 32, 64, 96), (1, 8, 32, 128, 250, 500, 1000), (5, 10, 20, 50)


def measure(setting):
    training, validation = setting.splits["train"].first(2560), setting.splits["validation"].first(10)
    images, labels = robust_images(setting.network(), training.to(setting.device))
    recipe, rows = RECIPES["one-cycle"], []

    def fresh(name, width=32):
        return NETWORKS[name](width).to(setting.device, memory_format=torch.channels_last).eval()

    def attack(function, network, count, **options):
        count = min(count, len(images))
        return count, lambda: timed(lambda: function(network, images[:count], labels[:count], **options))

    def train(batch_size=recipe.batch_size, width=32):
        of_size = replace(recipe, batch_size=batch_size)
        return len(training), lambda: our_epoch(training, validation, None, of_size, setting.device, width)

    def add(axis, value, what, count, seconds):
        seconds()
        rows.append({axis: value, "what": what, "images_per_second": count / median(seconds() for _ in range(3))})
        print(f"  {axis} {value}, {what}: {rows[-1]['images_per_second']:,.0f} images/s", flush=True)

    print("\nhow the cost grows")
    for width in WIDTHS:
        add("width", width, "FGSM", *attack(fgsm, fresh("cnn", width), 250, epsilon=EPSILON))
        add("width", width, "training", *train(width=width))
    for batch in BATCHES:
        add("batch", batch, "FGSM", *attack(fgsm, setting.network(), batch, epsilon=EPSILON))
    for batch in (32, 64, 128, 256, 512):
        add("batch", batch, "training", *train(batch))
    for name in ("cnn", "cnn-lstm"):
        add("network", name, "FGSM", *attack(fgsm, fresh(name), 250, epsilon=EPSILON))
    for steps in STEPS:
        options = {"epsilon": EPSILON, "steps": steps, "random_start": False}
        add("steps", steps, "PGD", *attack(pgd, setting.network(), 250, **options))
    before = torch.get_num_threads()
    for threads in range(1, os.cpu_count() + 1):
        torch.set_num_threads(threads)
        add("threads", threads, "FGSM", *attack(fgsm, setting.network(), 250, epsilon=EPSILON))
        add("threads", threads, "training", *train())
    torch.set_num_threads(before)
    return rows


def processes(setting):
    """One process with a thread for each core, and a process for each core with one thread: training, by its log."""
    dataset = setting.splits["train"].dataset
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    cores = os.cpu_count()
    contenders = {"one process": [sys.executable], f"{cores} processes": [*torchrun, str(cores)]}
    times, images = {name: [] for name in contenders}, len(setting.splits["train"])
    for _ in range(setting.rounds):
        for name, command in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / "a.safetensors"
                arguments = ["--dataset", dataset, "--epochs", "2", "--device", "cpu", "--quiet", "--output", output]
                environment = {**os.environ, "OMP_NUM_THREADS": str(cores if command == [sys.executable] else 1)}
                subprocess.run([*command, ROOT / "train-cnn.py", *arguments], check=True, env=environment)
                entries = output.with_suffix(".jsonl").read_text().splitlines()
                times[name].append(json.loads(entries[-1])["seconds"])
    rows = table(times, images)
    say("many processes", rows)
    return rows


def memory(setting):
    """The most that a process held, in MiB: testing under FGSM by batch, and training on digits by width."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ["--checkpoint", setting.checkpoint, "--examples", "1000", "--epsilon", "0.02"]
        for batch in BATCHES[2:]:
            used = peak("test-cnn.py", *checkpoint, "--batch-size", batch)
            rows.append({"batch": batch, "what": "test-cnn.py", "peak_mebibytes": used})
        for width in WIDTHS:
            output = Path(folder) / f"{width}.safetensors"
            arguments = ("--dataset", "digits", "--epochs", 1, "--width", width, "--output", output)
            used = peak("train-cnn.py", *arguments)
            rows.append({"width": width, "what": "train-cnn.py", "peak_mebibytes": used})
    print("\npeak memory")
    for row in rows:
        print("  " + ", ".join(f"{name} {value}" for name, value in row.items()))
    return rows


def peak(script, *arguments):
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments), "--device", "cpu"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{script} ended with status {status}")
    return round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))  # of bytes, elsewhere of kibibytes
