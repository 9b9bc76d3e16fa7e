"""Training against a loop on a DataLoader: the time to the study's accuracy, and images a second with a defence."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn
from torchvision.transforms import ToTensor

from benchmarks import plain
from benchmarks.formats import TimedTraining, TrainingSpeed
from benchmarks.tables import STUDYS_ACCURACY
from benchmarks.timing import Setting, compared, rounds_in_turn, say, timed
from defenses.losses import NFGSM, PGD
from networks import CNN
from utils.allocator import keep_freed_memory
from utils.data import Split
from utils.evaluation import accuracy
from utils.formats import Precision
from utils.recipes import RECIPES, Recipe
from utils.runs import read_log
from utils.training import train

FAST = RECIPES["fast"]
VARIANTS: dict[str, dict[str, Any]] = {  # FAST without each of its tricks, and with one that does not pay
    "fast": {},
    "SGD instead of Muon": {"optimizer": "sgd", "lr": 0.1},
    "first filters learnt, not whitened": {"whitened": False},
    "without label smoothing": {"label_smoothing": 0.0},
    "with shifts of one pixel": {"shift": 1},
}

DEFENSES: dict[str, tuple[Any, plain.LossFunction, int]] = {  # ours, theirs, and on how many images
    "none": (None, plain.clean_loss, 5120),
    "n-fgsm": (NFGSM(8 / 255), plain.n_fgsm_loss, 5120),
    "pgd": (PGD(8 / 255), plain.pgd_loss, 1280),  # takes seven more passes for each image
}


def to_the_studys_accuracy(setting: Setting) -> TimedTraining:
    """The section "time-to-accuracy": seconds of a training and one test, from data that is already in memory.

    Ours: the recipe `fast`, in the faster precision, with five seeds. Theirs: ten epochs with Adam and batches of 64,
    as in the study, once, between our second training and our third. Ours validates after each epoch, which a fixed
    schedule does not need, so it gets ten validation images.
    """
    examples = setting.pick(len(setting.splits["train"]), 128)
    training, test = (setting.splits[name].first(examples) for name in ("train", "test"))
    few = setting.splits["validation"].first(10)
    recipe = replace(FAST, epochs=setting.pick(FAST.epochs, 1))
    workers = best_workers(setting, training.first(setting.pick(2560, 64)), plain.FLIP, 64, plain.clean_loss)
    precision = faster_precision(setting)
    name = f"DataLoader, {workers} workers, Adam"
    accuracies: dict[str, list[float]] = {"ours": [], "plain": []}

    def ours(seed: int) -> None:
        network = trained(setting, training, few, recipe, seed, precision)
        accuracies["ours"].append(accuracy(network, test.to(setting.device)))

    def theirs() -> None:
        torch.manual_seed(0)
        network = CNN().to(setting.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
        batches = plain.loader(plain.PILImages(training, plain.FLIP), 64, workers, shuffle=True)
        plain.train(network, batches, optimizer, setting.pick(10, 1), setting.device)
        held_out = plain.loader(plain.PILImages(test, ToTensor()), 250, workers)
        accuracies["plain"].append(plain.accuracy(network, held_out, setting.device))

    seeds = setting.pick((0, 1, 2, 3, 4), (0,))
    our_seconds = [timed(partial(ours, seed)) for seed in seeds[:2]]
    their_seconds = timed(theirs)
    our_seconds += [timed(partial(ours, seed)) for seed in seeds[2:]]
    row, other = compared({"ours": our_seconds, name: [their_seconds] * len(our_seconds)})
    rows = [row, replace(other, seconds_iqr=None)]
    reached, plainly = (mean(values) for values in accuracies.values())
    say(f"to the study's {STUDYS_ACCURACY}: ours, {precision}, {reached:.2%}; the plain loop {plainly:.2%}", rows)
    return TimedTraining(precision=precision, epochs=recipe.epochs, accuracies=accuracies, rows=rows)


def ablation(setting: Setting) -> TimedTraining:
    """The section "ablation": the recipe `fast` and its VARIANTS, with validation accuracies.

    Every variant is trained with the same seeds in turn: three, which do not choose anything any more. The seconds are
    of a training and one test, on the validation images.
    """
    training = setting.splits["train"].first(setting.pick(len(setting.splits["train"]), 128))
    validation, precision = setting.splits["validation"], faster_precision(setting)
    epochs = setting.pick(FAST.epochs, 1)
    accuracies: dict[str, list[float]] = {name: [] for name in VARIANTS}

    few = validation.first(10)

    def train_and_test(name: str) -> None:
        recipe, seed = replace(FAST, epochs=epochs, **VARIANTS[name]), len(accuracies[name])
        network = trained(setting, training, few, recipe, seed, precision)
        accuracies[name].append(accuracy(network, validation.to(setting.device)))

    contenders = {name: partial(timed, partial(train_and_test, name)) for name in VARIANTS}
    rows = compared(rounds_in_turn(contenders, setting.pick(3, 1)))
    say("the tricks of the recipe fast", rows)
    return TimedTraining(precision=precision, epochs=epochs, accuracies=accuracies, rows=rows)


def trained(
    setting: Setting, training: Split, validation: Split, recipe: Recipe, seed: int, precision: Precision
) -> nn.Module:
    """A CNN, trained from data in memory."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "a.safetensors"
        options: dict[str, Any] = {"seed": seed, "device": setting.device, "precision": precision, "quiet": True}
        return train("cnn", training, validation, recipe, output=output, **options)


def images_a_second(setting: Setting) -> list[TrainingSpeed]:
    """The section "training": one epoch on the first training images, with the one-cycle recipe on both sides."""
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
        rows = compared(rounds_in_turn(contenders, setting.rounds), len(training))
        say(f"training, defence {defense}", rows)
        report.append(TrainingSpeed(defense=defense, rows=rows))
    return report


def our_epoch(
    training: Split, validation: Split, defense: Any, recipe: Recipe, device: torch.device, **options: Any
) -> float:
    """The seconds of one epoch of our training loop without validation, as its log has them."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "a.safetensors"
        options |= {"output": output, "device": device, "defense": defense, "quiet": True}
        train("cnn", training, validation, replace(recipe, epochs=1), **options)
        return read_log(output.with_suffix(".jsonl")).epochs[0].seconds


def plain_epoch(
    batches: plain.DataLoader, loss_function: plain.LossFunction, recipe: Recipe, device: torch.device
) -> Callable[[], None]:
    """A function that trains for an epoch with the plain loop."""
    network = CNN().to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    return partial(plain.train, network, batches, optimizer, 1, device, loss_function)


def faster_precision(setting: Setting) -> Precision:
    """The precision in which our training steps are faster on this machine."""
    training = setting.splits["train"].first(setting.pick(2560, 64))
    validation = setting.splits["validation"].first(10)

    def seconds_in(precision: Precision) -> float:
        epochs = (our_epoch(training, validation, None, FAST, setting.device, precision=precision) for _ in range(2))
        return min(epochs)

    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    return min(precisions, key=seconds_in)


def best_workers(
    setting: Setting, split: Split, transform: Callable[[Any], Any], batch_size: int, loss_function: plain.LossFunction
) -> int:
    """The number of DataLoader workers with which an epoch on the split is fastest."""
    keep_freed_memory()  # as our training does, in the process in which both are timed later
    seconds: dict[int, float] = {}
    for workers in range(setting.pick(os.cpu_count() or 1, 1) + 1):
        batches = plain.loader(plain.PILImages(split, transform), batch_size, workers, shuffle=True)
        epoch = plain_epoch(batches, loss_function, RECIPES["one-cycle"], setting.device)
        epoch()
        seconds[workers] = min(timed(epoch) for _ in range(3))
    return min(seconds, key=lambda workers: seconds[workers])
