"""Training against a loop on a DataLoader: the time to the study's accuracy, and images a second with a defence."""

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from msgspec.structs import replace
from torchvision.transforms import ToTensor

from benchmarks import plain
from benchmarks.timing import in_turn, say, table, timed
from defenses.losses import NFGSM, PGD
from networks import CNN
from study.paper import PRINTED
from utils.allocator import keep_freed_memory
from utils.evaluation import accuracy
from utils.recipes import RECIPES
from utils.training import train

# Larger batches are faster, and their rate grows with them. The section "processes" of the report has the accuracies on
# the validation images, by which this was chosen.
SHORT = replace(RECIPES["short"], batch_size=128, lr=0.1)

DEFENSES = {  # ours, theirs, and of how many images
    "none": (None, plain.cross_entropy, 5120),
    "n-fgsm": (NFGSM(8 / 255), plain.n_fgsm, 5120),
    "pgd": (PGD(8 / 255), plain.pgd, 1280),  # with seven passes more an image
}


def to_the_studys_accuracy(setting):
    """Seconds of a training and of one evaluation, on the test images, from data that is in memory already.

    Ours with the short recipe, in larger batches, and three seeds, which are to reach the mark in the mean, in the
    precision in which it is faster; the study's in ten epochs with Adam and batches of 64, the mean of two. The
    validation after each epoch, of which a fixed schedule has no use, is ours on ten images.
    """
    examples = setting.pick(None, 128)
    training, test = (setting.splits[name].first(examples) for name in ("train", "test"))
    validation = setting.splits["validation"].first(10)
    recipe = replace(SHORT, epochs=setting.pick(SHORT.epochs, 1))
    workers = best_workers(setting, training.first(2560), plain.FLIP, 64, plain.cross_entropy)
    precision = faster_precision(setting)
    name, accuracies = f"DataLoader, {workers} workers, Adam", {"ours": [], "plain": []}

    def ours(seed):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.safetensors"
            options = {"output": output, "seed": seed, "device": setting.device, "precision": precision, "quiet": True}
            network = train("cnn", training, validation, recipe, **options)
        accuracies["ours"].append(accuracy(network, test.to(setting.device)))

    def theirs():
        torch.manual_seed(0)
        network = CNN().to(setting.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
        batches = plain.loader(plain.PILImages(training, plain.FLIP), 64, workers, shuffle=True)
        plain.train(network, batches, optimizer, setting.pick(10, 1), setting.device)
        held_out = plain.loader(plain.PILImages(test, ToTensor()), 250, workers)
        accuracies["plain"].append(plain.accuracy(network, held_out, setting.device))

    # Theirs before ours and after it, for in so many minutes the machine may become faster or slower.
    before = timed(theirs)
    our_seconds = [timed(partial(ours, seed)) for seed in setting.pick((0, 1, 2), (0,))]
    rows = table({"ours": our_seconds, name: [mean((before, timed(theirs)))] * len(our_seconds)})
    rows[1]["seconds_iqr"] = None
    title = "to the study's {} %: ours, {}, comes to {:.2%}, the plain loop to {:.2%}"
    say(title.format(PRINTED["cnn"][None][0], precision, *map(mean, accuracies.values())), rows)
    return {"precision": precision, "epochs": recipe.epochs, "accuracies": accuracies, "rows": rows}


def images_a_second(setting):
    """Of one epoch on a part of the training images, with the one-cycle recipe on both sides."""
    validation, recipe, report = setting.splits["validation"].first(10), RECIPES["one-cycle"], []
    for defense, (ours, theirs, count) in DEFENSES.items():
        training = setting.splits["train"].first(setting.pick(count, 64))
        workers = best_workers(setting, training.first(1280), plain.FLIP_AND_SHIFT, recipe.batch_size, theirs)
        images = plain.PILImages(training, plain.FLIP_AND_SHIFT)
        batches = plain.loader(images, recipe.batch_size, workers, shuffle=True)
        epoch = plain_epoch(batches, theirs, recipe, setting.device)
        epoch()  # starts the workers
        contenders = {
            "ours": partial(our_epoch, training, validation, ours, recipe, setting.device),
            f"DataLoader, {workers} workers": partial(timed, epoch),
        }
        rows = table(in_turn(contenders, setting.rounds), len(training))
        say(f"training, defence {defense}", rows)
        report.append({"defense": defense, "rows": rows})
    return report


def our_epoch(training, validation, defense, recipe, device, **options):
    """Seconds of the training loop's one epoch, by its own log: without validation."""
    recipe = replace(recipe, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "a.safetensors"
        options |= {"output": output, "device": device, "defense": defense, "quiet": True}
        train("cnn", training, validation, recipe, **options)
        return json.loads(output.with_suffix(".jsonl").read_text().splitlines()[1])["seconds"]


def plain_epoch(batches, loss_function, recipe, device):
    """A function that trains for an epoch."""
    network = CNN().to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    return partial(plain.train, network, batches, optimizer, 1, device, loss_function)


def faster_precision(setting):
    """Of our training steps on this machine."""
    training, validation = (setting.splits[name].first(count) for name, count in (("train", 2560), ("validation", 10)))

    def seconds_in(precision):
        epochs = (our_epoch(training, validation, None, SHORT, setting.device, precision=precision) for _ in range(2))
        return min(epochs)

    return min(("float32", "bfloat16"), key=seconds_in)


def best_workers(setting, split, transform, batch_size, loss_function):
    """The number of DataLoader workers with which an epoch on the split is fastest."""
    keep_freed_memory()  # as in what is timed, which ours has told it
    seconds = {}
    for workers in range(setting.pick(os.cpu_count(), 1) + 1):
        batches = plain.loader(plain.PILImages(split, transform), batch_size, workers, shuffle=True)
        epoch = plain_epoch(batches, loss_function, RECIPES["one-cycle"], setting.device)
        epoch()
        seconds[workers] = min(timed(epoch) for _ in range(3))
    return min(seconds, key=seconds.get)
