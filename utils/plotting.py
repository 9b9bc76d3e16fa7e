"""Figures, one function each; every function returns the matplotlib Figure, and the caller saves or shows it."""

import io

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from attacks import default_step_size, fgsm, fgsm_direction, step
from attacks.core import attacking, evaluation_mode, input_gradient
from utils.constants import TITLES
from utils.data import batches, to_unit_range
from utils.files import write_atomically
from utils.tables import pixels, tested_images

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#666666"


def accuracy_against_epsilon(report):
    """Accuracy against each attack's radius, with 95 % intervals, from the report that test-*.py --json writes."""
    clean = {
        "epsilon": 0,
        "accuracy": report["clean_accuracy"],
        "confidence_interval": report["clean_confidence_interval"],
    }
    setting = report["attacks"][0]["setting"].replace("_", "-")
    names = list(dict.fromkeys(attack["name"] for attack in report["attacks"]))

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, color, marker in zip(names, (BLUE, ORANGE, GREEN), "osD", strict=False):
        points = [attack for attack in report["attacks"] if attack["name"] == name and attack["epsilon"]]
        points = [clean, *sorted(points, key=lambda attack: attack["epsilon"])]
        style = {"color": color, "marker": marker, "label": f"{setting} {TITLES[name]}"}
        _line_with_interval(axes, points, style)
    axes.fill_between([], [], color=GREY, alpha=0.2, linewidth=0, label="95 % Wilson interval")
    axes.axhline(10, color=GREY, linestyle=":", label="chance (10 classes)")
    attacks = " and ".join(TITLES[name] for name in names)
    axes.set_title(f"{attacks} against the {TITLES[report['network']]}: {tested_images(report)}", fontsize="medium")
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
    figure.suptitle(f"FGSM, epsilon = {pixels(epsilon)}: what the network says, and how sure it is")
    return figure


def class_examples(split, columns=8):
    """The first images of each class, a row for each."""
    rows = {
        name: to_unit_range(split.images[split.labels == label][:columns])
        for label, name in enumerate(split.class_names)
    }
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.8 * columns + 1, 0.8 * len(rows)))
    figure.subplots_adjust(left=0.14, right=1, bottom=0, top=1, wspace=0.05, hspace=0.05)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    return figure


def layers(network):
    """The network layer by layer: a block for what each leaves of an image, as high as the map and as wide as deep."""
    shapes = [("normalised\nimage", (3, 32, 32)), *_layer_outputs(network)]
    figure, axes = plt.subplots(figsize=(10, 3.4), layout="constrained")
    left = 0.0
    for name, shape in shapes:
        channels, *size = shape
        height = size[0] if len(size) == 2 else 32 * channels / 160 + 4
        width = 4 + channels / 12 if len(size) == 2 else 4
        kind = name.split()[-1]
        color = {"image": GREY, "LSTM": ORANGE, "linear": GREEN}.get(kind, BLUE)
        axes.add_patch(plt.Rectangle((left, -height / 2), width, height, color=color, alpha=0.75))
        text = " × ".join(map(str, shape))
        axes.annotate(name, (left + width / 2, 18), ha="center", va="bottom", fontsize="small")
        axes.annotate(text, (left + width / 2, -18), ha="center", va="top", fontsize="small")
        left += width + 6
    axes.set(xlim=(-4, left), ylim=(-22, 27))
    axes.axis("off")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    axes.set_title(
        f"{type(network).__name__}: {parameters:,} parameters (channels × height × width, or positions × units)",
        fontsize="medium",
    )
    return figure


def _layer_outputs(network):
    """(name, shape of its output for one image) of each convolution block, LSTM and linear layer, in order."""
    found, hooks = [], []

    def record(name):
        def hook(_module, _inputs, output):
            found.append((name, tuple((output[0] if isinstance(output, tuple) else output).shape[1:])))

        return hook

    blocks = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.LSTM | nn.Linear)]
    norm = ", norm" if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) else ""
    for module in blocks:
        if isinstance(module, nn.Conv2d):
            (size, _), (stride, _) = module.kernel_size, module.stride
            name = f"{size} × {size} conv\nstride {stride}\nReLU{norm}"
        else:
            name = f"{module.num_layers}-layer LSTM" if isinstance(module, nn.LSTM) else "linear"
        hooks.append(module.register_forward_hook(record(name)))
    device = next(network.parameters()).device
    with torch.no_grad(), evaluation_mode(network):
        network(torch.zeros(1, 3, 32, 32, device=device))
    for hook in hooks:
        hook.remove()
    return found


def training_curve(log, title):
    """Loss (left) and validation accuracy (right) by epoch. log: what a training's .jsonl holds."""
    _, *epochs = log
    number = [entry["epoch"] for entry in epochs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(number, [entry["loss"] for entry in epochs], color=BLUE, marker=".")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.plot(number, [100 * entry["validation_accuracy"] for entry in epochs], color=BLUE, marker=".", label="clean")
    if all("robust_accuracy" in entry for entry in epochs):
        label = "under PGD-10"
        right.plot(number, [100 * entry["robust_accuracy"] for entry in epochs], color=ORANGE, marker=".", label=label)
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    return figure


def confusion_matrices(predictions, labels, class_names):
    """What is taken for what, in percent of the images of a class; a panel for each of {title: predicted classes}."""
    figure, panels = plt.subplots(1, len(predictions), figsize=(5 * len(predictions), 4.8), layout="constrained")
    count = len(class_names)
    for axes, (title, predicted) in zip(np.atleast_1d(panels), predictions.items(), strict=True):
        counts = torch.bincount(labels.cpu() * count + predicted.cpu(), minlength=count**2).view(count, count).double()
        cells = (100 * counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
        axes.imshow(cells, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(cells):
            if value >= 0.5:
                color = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="x-small", color=color)
        axes.set_xticks(range(count), class_names, rotation=45, ha="right", fontsize="small")
        axes.set_yticks(range(count), class_names, fontsize="small")
        axes.set(xlabel="predicted", ylabel="label (cells in % of it)")
        axes.set_title(title, fontsize="medium")
    return figure


def sequence(network, image, title):
    """What the CNN-LSTM's LSTM reads of one image, (1, 3, 32, 32): its sixteen positions, and a vector for each."""
    with torch.no_grad(), evaluation_mode(network):
        (vectors,) = network.sequence(image).cpu().numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 2.2), layout="constrained")
    left.imshow(image[0].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    for position in range(16):
        row, column = divmod(position, 4)
        left.add_patch(plt.Rectangle((8 * column - 0.5, 8 * row - 0.5), 8, 8, fill=False, color="white"))
        box = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5}
        left.text(8 * column + 3.5, 8 * row + 3.5, position + 1, color="white", ha="center", va="center", bbox=box)
    left.set(xticks=[], yticks=[])
    left.set_title("the positions, in the order of reading", fontsize="medium")
    shown = right.imshow(vectors, aspect="auto", cmap="viridis", interpolation="nearest")
    right.set(xlabel="channel", ylabel="position", yticks=range(0, 16, 3), yticklabels=range(1, 17, 3))
    right.set_title("what is read, a row at each step", fontsize="medium")
    figure.colorbar(shown, ax=right, label="value")
    figure.suptitle(title, fontsize="medium")
    return figure


def positions_disturbed(network, images, adversarial, title):
    """How far an attack moves what the CNN-LSTM's LSTM reads (left) and what it remembers (right), by position.

    images, adversarial: (N, 3, 32, 32) in [0, 1]. In percent of the norm of what it was, the mean over the images.
    """
    with torch.no_grad(), evaluation_mode(network):
        read, attacked = network.sequence(images), network.sequence(adversarial)
        remembered, disturbed = network.lstm(read)[0], network.lstm(attacked)[0]
    moved = [
        (100 * (b - a).norm(dim=2) / a.norm(dim=2)).mean(0).cpu().numpy()
        for a, b in ((read, attacked), (remembered, disturbed))
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1, 1.6), layout="constrained")
    grid = moved[0].reshape(4, 4)
    shown = left.imshow(grid, cmap="Oranges", vmin=0)
    for (row, column), value in np.ndenumerate(grid):
        text, color = f"{4 * row + column + 1}\n{value:.0f} %", "white" if value > 0.6 * grid.max() else "black"
        left.text(column, row, text, ha="center", va="center", fontsize="small", color=color)
    left.set(xticks=[], yticks=[])
    left.set_title("what it reads, on the map", fontsize="medium")
    figure.colorbar(shown, ax=left, label="change (%)")
    right.plot(range(1, 17), moved[0], color=ORANGE, marker="o", label="what it reads")
    right.plot(range(1, 17), moved[1], color=BLUE, marker="s", label="what it remembers then")
    right.set(xlabel="position in the sequence", ylabel="change (%)", ylim=(0, None), xticks=range(1, 17))
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def transfer_matrix(matrix, names, title):
    """Accuracy under examples crafted on one network (rows) and shown to another (columns), (N, N) Results."""
    cells = np.array([[100 * result.accuracy for result in row] for row in matrix])
    figure, axes = plt.subplots(figsize=(1.25 * len(names) + 2.6, 0.95 * len(names) + 1.6), layout="constrained")
    shown = axes.imshow(cells, cmap="viridis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(cells):
        low, high = matrix[row][column].confidence_interval
        color = "black" if value > 60 else "white"
        text = f"{value:.1f}\n({100 * low:.1f}–{100 * high:.1f})"
        axes.text(column, row, text, ha="center", va="center", fontsize="x-small", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="shown to", ylabel="crafted on")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(shown, ax=axes, label="accuracy (%)")
    return figure


def accuracies(results, title):
    """Accuracy against epsilon with 95 % intervals; results: {label: [Result, ...]}, the clean one first."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    looks = zip((BLUE, ORANGE, GREEN, "black", SKY), "osD^v", strict=True)
    for (label, rows), (color, marker) in zip(results.items(), looks, strict=False):
        points = [
            {"epsilon": r.epsilon, "accuracy": r.accuracy, "confidence_interval": r.confidence_interval} for r in rows
        ]
        _line_with_interval(axes, points, {"color": color, "marker": marker, "markersize": 4, "label": label})
    axes.axhline(10, color=GREY, linestyle=":", label="chance (10 classes)")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("epsilon (L-infinity radius, pixels in [0, 1])")
    axes.set(ylabel="accuracy (%)", xlim=(0, None), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def along_the_sign(network, image, label, split, largest=16 / 255, points=65):
    """The probability of the classes that matter as one image moves along the sign of its gradient."""
    direction = fgsm_direction(network, image, label)
    epsilons = torch.linspace(0, largest, points)
    with torch.no_grad(), evaluation_mode(network):
        moved = torch.cat([step(image, direction, epsilon) for epsilon in epsilons.tolist()])
        probabilities = network(moved).softmax(1).cpu().numpy()
    shown = sorted({label.item(), *probabilities.argmax(1).tolist()}, key=lambda k: k != label.item())
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for k in shown:
        style = {"linewidth": 2.5, "label": f"{split.class_names[k]} (the label)"} if k == label.item() else {}
        axes.plot(
            255 * epsilons, 100 * probabilities[:, k], **{"color": f"C{k}", "label": split.class_names[k], **style}
        )
    axes.set(xlabel="epsilon (in grey levels, of 255)", ylabel="probability (%)", ylim=(0, 100))
    axes.set_xlim(0, 255 * largest)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("What the network says, along the sign of the gradient", fontsize="medium")
    return figure


def attacked_image(network, image, adversarial, label, split, title):
    """Image, magnified perturbation, adversarial image, and the probability of each class before and after.

    image, adversarial: (1, 3, H, W) in [0, 1]; label: (1,).
    """
    return attacked_images({title: network}, image, {title: adversarial}, label, split)


def attacked_images(networks, image, adversarial, label, split):
    """The same, a row for each of {title: network}, with its own of {title: adversarial image}."""
    rows = len(networks)
    # Placed by hand, for the explorer draws this anew at every move of its slider.
    figure = plt.figure(figsize=(10, 2.9 * rows))
    for number, (title, network) in enumerate(networks.items()):
        top, height = 1 - (number + 0.13) / rows, 0.62 / rows
        places = [(0.01 + 0.2 * column, top - height - 0.06 / rows, 0.19, height) for column in range(3)]
        axes = [figure.add_axes(place) for place in (*places, (0.71, top - height - 0.06 / rows, 0.25, height))]
        _draw_attacked(axes, network, image, adversarial[title], label, split)
        figure.text(0.5, 1 - (number + 0.02) / rows, title, ha="center", va="top", fontsize="medium")
    return figure


def _draw_attacked(axes, network, image, adversarial, label, split):
    largest = (adversarial - image).abs().max().item()
    perturbation = (adversarial - image) / (2 * largest or 1) + 0.5
    magnified = f"perturbation, magnified {0.5 / largest:.3g} times" if largest else "no perturbation"
    pictures = {"image": image, magnified: perturbation, "adversarial image": adversarial}
    for axis, (name, picture) in zip(axes, pictures.items(), strict=False):
        axis.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize="small")
    with torch.no_grad(), evaluation_mode(network):
        before, after = network(torch.cat([image, adversarial])).softmax(1).cpu().numpy()
    for axis, probabilities in ((axes[0], before), (axes[2], after)):
        predicted = probabilities.argmax()
        color = GREEN if predicted == label.item() else ORANGE
        axis.set_xlabel(f"{split.class_names[predicted]}, {100 * probabilities[predicted]:.1f} %", color=color)
    places = np.arange(len(before))
    axes[3].barh(places - 0.2, 100 * before, 0.4, color=GREY, label="image")
    axes[3].barh(places + 0.2, 100 * after, 0.4, color=BLUE, label="adversarial image")
    axes[3].set(yticks=places, yticklabels=split.class_names, xlim=(0, 100), xlabel="probability (%)")
    axes[3].tick_params(axis="y", labelsize="small")
    axes[3].invert_yaxis()
    above = {"loc": "lower right", "bbox_to_anchor": (1, 0.99), "ncols": 2, "borderaxespad": 0}
    axes[3].legend(frameon=False, fontsize="small", **above)


def side_by_side(baseline, retrained, split, epsilon, title, columns=5):
    """What a baseline and a network retrained on its FGSM examples say of clean images and under both attacks.

    A row for the images, one for the examples crafted on the baseline and one for those crafted on the retrained
    network; they are chosen as in `adversarial_examples`.
    """
    images, labels = _first_correct(baseline, split, columns)
    rows = {
        "clean image": images,
        "crafted on\nthe baseline": fgsm(baseline, images, labels, epsilon=epsilon),
        "crafted on the\nretrained network": fgsm(retrained, images, labels, epsilon=epsilon),
    }
    figure, axes = plt.subplots(3, len(images), figsize=(1.9 * len(images) + 0.8, 7.4), squeeze=False)
    figure.subplots_adjust(left=0.08, right=0.99, bottom=0.07, top=0.91, wspace=0.08, hspace=0.29)
    for row, (label, shown) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label)
        said = [_predictions(network, shown) for network in (baseline, retrained)]
        for axis, image, truth, *predictions in zip(row, shown, labels.tolist(), *said, strict=True):
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for line, (who, (predicted, confidence)) in enumerate(
                zip(("baseline", "retrained"), predictions, strict=True)
            ):
                text = f"{who}: {split.class_names[predicted]}, {100 * confidence:.0f} %"
                color, weight = (GREEN, "normal") if predicted == truth else (ORANGE, "bold")
                axis.annotate(
                    text,
                    (0.5, -0.03 - 0.11 * line),
                    xycoords="axes fraction",
                    ha="center",
                    va="top",
                    color=color,
                    weight=weight,
                    fontsize="small",
                )
    attack = f"FGSM at epsilon = {pixels(epsilon)}, crafted on each of them"
    figure.suptitle(f"{title}: {attack}\n(green: right; orange and bold: wrong)", fontsize="medium")
    return figure


def input_gradients(tested, split, title, columns=6):
    """Images, and below each the gradient of the loss for it, of each network in {name: network}.

    Each gradient is drawn around grey and scaled to its own 99th percentile, for its size says little.
    """
    images, labels = _first_correct(next(iter(tested.values())), split, columns)
    rows = {"image": images}
    for name, network in tested.items():
        with attacking(network, images.device):
            _, _, gradient = input_gradient(network, images, labels)
        largest = gradient.abs().flatten(1).quantile(0.99, dim=1).clamp_min(1e-30)
        rows[f"gradient of the\n{name} network"] = gradient / (2 * largest.view(-1, 1, 1, 1)) + 0.5
    return _grid(
        rows, [split.class_names[label] for label in labels.tolist()], f"{title}: the gradient that an attack follows"
    )


def targeted_examples(tested, split, title, columns=6, epsilon=0.25, steps=100):
    """Images, and below each the same moved towards another class by PGD, by up to a large epsilon, for each network.

    The class is the next one. A network that sees what people see can only be convinced by an image that shows it.
    """
    images, labels = _first_correct(next(iter(tested.values())), split, columns)
    targets = (labels + 1) % len(split.class_names)
    rows = {"image": images}
    for name, network in tested.items():
        # Not `pgd`, which stops as soon as the class is reached: here the loss goes down for as long as it can.
        rows[f"through the\n{name} network"] = _towards(network, images, targets, epsilon, steps)
    captions = [f"{split.class_names[a]} to {split.class_names[b]}" for a, b in zip(labels, targets, strict=True)]
    return _grid(
        rows,
        captions,
        f"{title}: moved towards another class (targeted PGD, {steps} steps, epsilon = {pixels(epsilon)})",
    )


def _towards(network, images, targets, epsilon, steps):
    low, high = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    iterates = images
    with attacking(network, images.device):
        for _ in range(steps):
            _, _, gradient = input_gradient(network, iterates, targets)
            iterates = step(iterates, -gradient.sign(), default_step_size(epsilon, steps), low, high)
    return iterates


def _grid(rows, captions, title):
    """A row of pictures, (N, 3, H, W) in [0, 1], for each name; the captions stand below the columns."""
    size = (1.7 * len(captions) + 0.9, 1.7 * len(rows) + 0.8)
    figure, axes = plt.subplots(len(rows), len(captions), figsize=size, squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, caption in zip(axes[-1], captions, strict=True):
        axis.set_xlabel(caption)
    figure.suptitle(title)
    return figure


def _line_with_interval(axes, results, style):
    low, high = 100 * np.array([result["confidence_interval"] for result in results]).T
    radius = [result["epsilon"] for result in results]
    axes.fill_between(radius, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(radius, _percent(results), clip_on=False, **style)


def _percent(results):
    return 100 * np.array([result["accuracy"] for result in results])


def _first_correct(network, split, count):
    """The first correctly classified image of each of `count` classes, or the first images if there is none."""
    found: dict[int, tuple] = {}
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
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    plt.close(figure)
    write_atomically(path, drawn.getvalue())
