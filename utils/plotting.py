"""Figures, one function each; every function returns the matplotlib Figure, and the caller saves or shows it."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from attacks import fgsm
from utils.data import batches

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def accuracy_against_epsilon(report):
    """Accuracy against the attack's radius, with 95 % intervals, from the report that test-*.py --json writes."""
    points = sorted((a["epsilon"], a["accuracy"], *a["confidence_interval"]) for a in report["attacks"] if a["epsilon"])
    clean = (0, report["clean_accuracy"], *report["clean_confidence_interval"])
    radius, accuracy, low, high = np.array([clean, *points]).T
    setting = report["attacks"][0]["setting"].replace("_", "-")

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.fill_between(radius, 100 * low, 100 * high, color=BLUE, alpha=0.2, linewidth=0, label="95 % Wilson interval")
    axes.plot(radius, 100 * accuracy, color=BLUE, marker="o", label=f"{report['network']}, {setting} FGSM")
    axes.axhline(10, color=GREY, linestyle=":", label="chance (10 classes)")
    axes.set(
        xlabel="epsilon (L-infinity radius, pixels in [0, 1])", ylabel="accuracy (%)", ylim=(0, 100),
        title=f"FGSM against {report['network']}: {report['examples']:,} {report['dataset']} {report['split']} images",
    )  # fmt: skip
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def adversarial_examples(network, split, epsilon, *, source=None, rows=4):
    """Image, perturbation and adversarial image with predictions and confidences, a row for each of `rows` images.

    They are the split's first images that the network classifies correctly, each of another class; whether the
    attack then succeeds has no part in the choice.
    """
    images, labels = _first_correct(network, split, rows)
    adversarial = fgsm(network if source is None else source, images, labels, epsilon=epsilon)
    perturbation = (adversarial - images) / (2 * epsilon) + 0.5 if epsilon else torch.full_like(images, 0.5)

    figure, axes = plt.subplots(len(images), 3, figsize=(6.6, 2.35 * len(images)), layout="constrained", squeeze=False)
    magnified = f"magnified {0.5 / epsilon:.0f} times" if epsilon else "none"
    for row, panels in zip(axes, zip(images, perturbation, adversarial, strict=True), strict=True):
        for axis, panel in zip(row, panels, strict=True):
            axis.imshow(panel.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for row, (before, after, label) in enumerate(
        zip(_predictions(network, images), _predictions(network, adversarial), labels.tolist(), strict=True)
    ):
        for column, (predicted, confidence) in ((0, before), (2, after)):
            axes[row, column].set_xlabel(
                f"{split.class_names[predicted]}, {100 * confidence:.1f} %",
                color=GREEN if predicted == label else ORANGE,
            )
        axes[row, 1].set_xlabel(magnified, color=GREY)
    axes[0, 0].set_title("image")
    axes[0, 1].set_title("perturbation")
    axes[0, 2].set_title("adversarial image")
    figure.suptitle(f"FGSM, epsilon = {_pixels(epsilon)}")
    return figure


def _pixels(epsilon):
    """An epsilon as papers write it: 8/255 where it is a whole number of grey levels, else a decimal."""
    levels = 255 * epsilon
    return f"{round(levels)}/255" if abs(levels - round(levels)) < 1e-9 else f"{epsilon:.4g}"


def _first_correct(network, split, count):
    found = {}
    for images, labels in batches(split, 100):
        with torch.no_grad():
            correct = network(images).argmax(1) == labels
        for index in correct.nonzero().flatten().tolist():
            found.setdefault(labels[index].item(), (images[index], labels[index]))
        if len(found) >= count:
            break
    images, labels = zip(*list(found.values())[:count], strict=True)
    return torch.stack(images), torch.stack(labels)


def _predictions(network, images):
    """(class, confidence) of each image."""
    with torch.no_grad():
        confidence, predicted = network(images).softmax(1).max(1)
    return list(zip(predicted.tolist(), confidence.tolist(), strict=True))


def save(figure, path):
    """Write the figure as a PNG and close it."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
