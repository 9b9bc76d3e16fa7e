"""Figures, one function each; every function returns the matplotlib Figure, and the caller saves or shows it."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from attacks import fgsm
from attacks.core import evaluation_mode
from utils.data import batches

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
TITLES = {"cnn": "CNN", "cnn-lstm": "CNN-LSTM", "small-cnn": "small CNN", "cifar10": "CIFAR-10"}


def accuracy_against_epsilon(report):
    """Accuracy against the attack's radius, with 95 % intervals, from the report that test-*.py --json writes."""
    points = sorted((a["epsilon"], a["accuracy"], *a["confidence_interval"]) for a in report["attacks"] if a["epsilon"])
    clean = (0, report["clean_accuracy"], *report["clean_confidence_interval"])
    radius, accuracy, low, high = np.array([clean, *points]).T
    setting = report["attacks"][0]["setting"].replace("_", "-")

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.fill_between(radius, 100 * low, 100 * high, color=BLUE, alpha=0.2, linewidth=0, label="95 % Wilson interval")
    axes.plot(radius, 100 * accuracy, color=BLUE, marker="o", clip_on=False, label=f"{setting} FGSM")
    axes.axhline(10, color=GREY, linestyle=":", label="chance (10 classes)")
    network, dataset = (TITLES.get(report[key], report[key]) for key in ("network", "dataset"))
    axes.set_title(f"FGSM against the {network}: {report['examples']:,} {dataset} {report['split']} images")
    axes.set_xlabel("epsilon (L-infinity radius, pixels in [0, 1])")
    axes.set_ylabel("accuracy (%)")
    axes.set(xlim=(0, None), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def adversarial_examples(network, split, epsilon, *, source=None, columns=5):
    """Image, perturbation and adversarial image with predictions and confidences, a column for each of some images.

    They are the split's first images that the network classifies correctly, each of another class (of all images,
    if it gets none right); whether the attack then succeeds has no part in the choice.
    """
    images, labels = _first_correct(network, split, columns)
    adversarial = fgsm(network if source is None else source, images, labels, epsilon=epsilon)
    perturbation = (adversarial - images) / (2 * epsilon) + 0.5 if epsilon else torch.full_like(images, 0.5)
    magnified = f"magnified {0.5 / epsilon:.0f} times" if epsilon else "none"

    figure, axes = plt.subplots(3, len(images), figsize=(1.8 * len(images) + 0.6, 6.6), squeeze=False)
    figure.set_layout_engine("constrained")
    for column, panels in enumerate(zip(images, perturbation, adversarial, strict=True)):
        for row, panel in enumerate(panels):
            axes[row, column].imshow(panel.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
        axes[1, column].set_xlabel(magnified, color=GREY)
    for row, shown in ((0, images), (2, adversarial)):
        for axis, label, (predicted, confidence) in zip(axes[row], labels, _predictions(network, shown), strict=True):
            color = GREEN if predicted == label else ORANGE
            axis.set_xlabel(f"{split.class_names[predicted]}, {100 * confidence:.1f} %", color=color)
    for axis, name in zip(axes[:, 0], ("image", "perturbation", "adversarial image"), strict=True):
        axis.set_ylabel(name)
    figure.suptitle(f"FGSM, epsilon = {_pixels(epsilon)}: what the network says, and how sure it is")
    return figure


def _pixels(epsilon):
    """An epsilon as papers write it: 8/255 where it is a whole number of grey levels, else a decimal."""
    levels = 255 * epsilon
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-9 else f"{epsilon:.4g}"


def _first_correct(network, split, count):
    """The first correctly classified image of each of `count` classes, or the first images if there is none."""
    found = {}
    for images, labels in batches(split, 100):
        with torch.no_grad(), evaluation_mode(network):
            correct = network(images).argmax(1) == labels
        for index in correct.nonzero().flatten().tolist():
            found.setdefault(labels[index].item(), (images[index], labels[index]))
        if len(found) >= count:
            break
    if not found:
        return next(batches(split.first(count), count))
    images, labels = zip(*list(found.values())[:count], strict=True)
    return torch.stack(images), torch.stack(labels)


def _predictions(network, images):
    """(class, confidence) of each image."""
    with torch.no_grad(), evaluation_mode(network):
        confidence, predicted = network(images).softmax(1).max(1)
    return list(zip(predicted.tolist(), confidence.tolist(), strict=True))


def save(figure, path):
    """Write the figure as a PNG and close it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
