"""How the cost grows: speed by width, batch, images, steps, threads and processes; peak memory by batch and width."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from msgspec.structs import replace

from attacks import fgsm, pgd
from benchmarks.attacks import EPSILON, robust_images
from benchmarks.timing import ROOT, in_turn, say, table, timed
from benchmarks.training import SHORT, faster_precision, our_epoch
from networks import NETWORKS
from utils.allocator import keep_freed_memory
from utils.evaluation import evaluate_fgsm
from utils.recipes import RECIPES


def measure(setting):
    """Each figure the median of three, after one to warm up: absolute ones, which only their trend makes comparable."""
    training, validation = (setting.splits[name].first(n) for name, n in (("train", 1280), ("validation", 10)))
    training = training.first(setting.pick(None, 200))
    attacked = setting.splits["train"].first(setting.pick(1500, 50)).to(setting.device)
    images, labels = robust_images(setting.network(), attacked)
    recipe, rows = RECIPES["one-cycle"], []

    def fresh(name, width=32):
        return NETWORKS[name](width).to(setting.device, memory_format=torch.channels_last).eval()

    def attack(function, network, count, **options):
        count = min(count, len(images))
        return count, lambda: timed(lambda: function(network, images[:count], labels[:count], **options))

    def train(batch_size=recipe.batch_size, width=32):
        of_size = replace(recipe, batch_size=batch_size)
        return len(training), lambda: our_epoch(training, validation, None, of_size, setting.device, width=width)

    def add(axis, value, what, count, seconds):
        seconds()
        middle = median(seconds() for _ in range(setting.pick(3, 1)))
        rows.append({axis: value, "what": what, "images_per_second": count / middle})
        print(f"  {axis} {value}, {what}: {rows[-1]['images_per_second']:,.0f} images/s", flush=True)

    keep_freed_memory()  # as the scripts do, from the first row on
    print("\nhow the cost grows")
    for width in setting.pick((16, 32, 64, 96), (8,)):
        add("width", width, "FGSM", *attack(fgsm, fresh("cnn", width), 250, epsilon=EPSILON))
        add("width", width, "training", *train(width=width))
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
    for threads in range(1, setting.pick(os.cpu_count(), 1) + 1):
        torch.set_num_threads(threads)
        add("threads", threads, "FGSM", *attack(fgsm, setting.network(), 250, epsilon=EPSILON))
        add("threads", threads, "training", *train())
    torch.set_num_threads(before)
    return rows


def processes(setting):
    """A process for each core, of one thread, and one process with a thread for each core: the same short training.

    To its end, in the faster precision and with a seed for each round; the seconds are those of all epochs in the log.
    """
    cores = os.cpu_count()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores)]
    precision = faster_precision(setting)
    arguments = [*setting.data, "--recipe", "short", "--batch-size", str(SHORT.batch_size), "--lr", str(SHORT.lr)]
    arguments += ["--precision", precision, "--device", "cpu", "--quiet"]
    arguments += setting.pick([], ["--epochs", "1", "--width", "4"])

    many, one = f"{cores} processes", f"one process, {cores} threads"
    accuracies = {many: [], one: []}

    def trained(name, launcher, threads):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.safetensors"
            seed = ["--seed", str(len(accuracies[name]))]
            command = [sys.executable, *launcher, ROOT / "train-cnn.py", *arguments, *seed, "--output", output]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            _, *epochs = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines())
        accuracies[name].append(epochs[-1]["validation_accuracy"])
        return sum(epoch["seconds"] for epoch in epochs)

    contenders = {many: lambda: trained(many, torchrun, 1), one: lambda: trained(one, [], cores)}
    epochs = setting.pick(SHORT.epochs, 1)
    rows = table(in_turn(contenders, setting.pick(3, 1)), epochs * len(setting.splits["train"]))
    say("many processes", rows)
    return {"precision": precision, "epochs": epochs, "accuracies": accuracies, "rows": rows}


def memory(setting):
    """The most that a process held, in MiB: testing under FGSM by batch, and training on digits by width."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tested = ["--checkpoint", setting.checkpoint, *setting.data, "--examples", "1000", "--epsilon", "0.02"]
        for batch in setting.pick((32, 128, 250, 500, 1000), (8,)):
            used = peak("test-cnn.py", *tested, "--batch-size", batch)
            rows.append({"batch": batch, "what": "test-cnn.py", "peak_mebibytes": used})
        for width in setting.pick((16, 32, 64, 96), (4,)):
            output = Path(folder) / f"{width}.safetensors"
            arguments = ("--dataset", "digits", "--epochs", 1, "--width", width, "--output", output)
            used = peak("train-cnn.py", *arguments)
            rows.append({"width": width, "what": "train-cnn.py on digits", "peak_mebibytes": used})
    print("\npeak memory")
    for row in rows:
        print("  " + ", ".join(f"{name} {value}" for name, value in row.items()))
    return rows


# In a small process of its own, since Linux lets a child's peak begin at its parent's.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(script, *arguments):
    command = [sys.executable, ROOT / script, *map(str, arguments), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return round(int(done.stdout) / (2**20 if sys.platform == "darwin" else 2**10))  # of bytes, elsewhere of kibibytes
