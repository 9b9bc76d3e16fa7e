"""Figures of any network, one function each. Every function returns a matplotlib Figure; the caller saves or shows it.

Networks, images and labels are on one device. Images are float tensors (N, 3, H, W) in [0, 1]; labels are int64 (N,).
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from attacks import default_step_size, fgsm, fgsm_direction, pgd_iterates, step
from attacks.core import Model, attacking, evaluation_mode, input_gradient, logits_of
from networks import CNNLSTM
from utils.constants import TITLES
from utils.data import Split, batches, to_unit_range
from utils.evaluation import Result
from utils.files import write_atomically
from utils.formats import TestReport
from utils.quoting import printable
from utils.runs import Log
from utils.tables import Measured, MeasuredAt, Point, epsilon_text, images_text

# What each colour means in every figure of this project: how a network is defended, and which images it gets. The
# colours are from Okabe and Ito's palette, which colour-blind readers can tell apart. Purple is Tol's: it suits text.
BASELINE, STUDYS, OURS = "black", "#D55E00", "#0072B2"
CLEAN, TRANSFER, WHITE_BOX = "#009E73", "#56B4E9", "#AA3377"
RIGHT: dict[str, Any] = {"color": CLEAN}
WRONG: dict[str, Any] = {"color": WHITE_BOX, "weight": "bold"}  # bold, so that it can be told without colours
GREY = "#666666"
OTHERS = ("#E69F00", "#332288", GREY, "#6B4423", "#999933", "#CC6677")  # lines that none of these words describes

WIDTH = 8  # inches, of every figure: text of 9 points can be read where a page shows the figure 800 pixels wide
EPSILON_AXIS = "epsilon (L-infinity radius, pixels in [0, 1])"
EPSILON_AXIS_L2 = "epsilon (L2 radius, pixels in [0, 1])"


def plain_text(text: str) -> str:
    """A text that may come from anyone, as matplotlib can draw it: "$" does not start a formula."""
    return printable(text).replace("$", r"\$")


def names_of(split: Split) -> list[str]:
    """The names of the classes, as matplotlib can draw them: they may come from anyone's file or folder."""
    return [plain_text(name) for name in split.class_names]


def title_of(name: str) -> str:
    """What an attack, a defence or a network is called in a figure; an unknown one keeps its name."""
    return TITLES.get(name, plain_text(name))


# ---- accuracies ----


def percentages(measured: Sequence[Measured]) -> NDArray[np.float64]:
    """The accuracies in percent, (N,)."""
    return 100 * np.array([one.accuracy for one in measured])


def line_with_interval(axes: Axes, points: Sequence[MeasuredAt], style: Mapping[str, Any]) -> None:
    """Draw accuracy against radius as a line and the 95 % intervals as a band. style: the line's, with its color."""
    low, high = 100 * np.array([point.confidence_interval for point in points]).T
    radii = [point.epsilon for point in points]
    axes.fill_between(radii, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(radii, percentages(points), clip_on=False, **style)


def mark_radii(axes: Axes, radii: Sequence[float], label: str = EPSILON_AXIS) -> None:
    """Put ticks at these radii, written as in the tables."""
    axes.set_xticks(radii, map(epsilon_text, radii))
    axes.set_xlabel(label)


def accuracy_against_epsilon(report: TestReport) -> Figure:
    """Accuracy against each attack's radius, with 95 % intervals, from the report that test-*.py --json writes."""
    clean = Point(0, report.clean_accuracy, report.clean_confidence_interval)
    names = list(dict.fromkeys(attack.name for attack in report.attacks))
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    for name, line, marker in zip(names, ("-", "--", ":"), "osD", strict=False):
        rows = [attack for attack in report.attacks if attack.name == name]
        points: list[MeasuredAt] = [clean, *sorted((row for row in rows if row.epsilon), key=lambda row: row.epsilon)]
        label = f"{rows[0].setting.replace('_', '-')} {title_of(name)}"
        color = TRANSFER if rows[0].setting == "transfer" else WHITE_BOX
        line_with_interval(axes, points, {"color": color, "marker": marker, "linestyle": line, "label": label})
    axes.fill_between([], [], color=GREY, alpha=0.2, linewidth=0, label="95 % Wilson interval")
    tested = images_text(report.examples, report.dataset, report.split)
    attacks = " and ".join(map(title_of, names)) or "No attack"
    radii = sorted({0.0, *(row.epsilon for row in report.attacks)})
    title = f"{attacks} against the {title_of(report.network)}: {plain_text(tested)}"
    label = EPSILON_AXIS_L2 if any(attack.norm == "l2" for attack in report.attacks) else EPSILON_AXIS
    _finish_accuracy(axes, title, radii, report.classes or 10, label)
    return figure


def robustness_curve(report: TestReport) -> Figure:
    """Which part of the images withstands PGD at each radius, from the smallest radius at which each image falls.

    The part is an upper bound, because each radius is one. Raises ValueError if the report lacks `minimal_epsilon`.
    """
    found = report.minimal_epsilon
    if found is None:
        raise ValueError("the report has no minimal epsilons")
    fallen = np.array(sorted(epsilon for epsilon in found.epsilons if epsilon is not None))
    left = 100 * (1 - np.arange(len(fallen) + 1) / found.examples)
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    axes.step([0, *fallen], left, where="post", color=WHITE_BOX, label=f"withstands PGD-{found.steps}, at most")
    if found.median is not None:
        axes.axvline(found.median, color=GREY, linestyle="--", label=f"median {found.median:.3g}")
    tested = plain_text(images_text(found.examples, report.dataset, report.split))
    axes.set_title(f"The smallest radius at which the {title_of(report.network)} errs: {tested}", fontsize="medium")
    label = EPSILON_AXIS_L2 if found.norm == "l2" else EPSILON_AXIS
    axes.set(xlabel=label, ylabel="accuracy (%)", xlim=(0, None), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def accuracy_curves(results: Mapping[str, Sequence[Result]], title: str) -> Figure:
    """Accuracy against radius with 95 % intervals. results: label -> the Results of a network, the clean one first."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    looks = zip((BASELINE, *OTHERS), "osD^vPX", strict=True)
    for (label, points), (color, marker) in zip(results.items(), looks, strict=False):
        line_with_interval(axes, points, {"color": color, "marker": marker, "markersize": 4, "label": label})
    _finish_accuracy(axes, title, [point.epsilon for point in next(iter(results.values()))])
    return figure


def _finish_accuracy(
    axes: Axes, title: str, radii: Sequence[float], classes: int = 10, label: str = EPSILON_AXIS
) -> None:
    """Title, axis titles, ranges, legend and the line of chance. radii: where the ticks stand, if they have room."""
    axes.axhline(100 / classes, color=GREY, linestyle=":", label=f"chance ({classes:,} classes)")
    axes.set_title(title, fontsize="medium")
    mark_radii(axes, radii if len(radii) <= 10 else [radii[0], radii[-1]], label)
    axes.set(ylabel="accuracy (%)", xlim=(0, None), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def training_curve(log: Log, title: str) -> Figure:
    """Loss (left) and accuracy on the validation images (right) by epoch, from a training's log."""
    epochs = [entry.epoch for entry in log.epochs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained")
    left.plot(epochs, [entry.loss for entry in log.epochs], color=GREY, marker=".")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    clean = [100 * entry.validation_accuracy for entry in log.epochs]
    right.plot(epochs, clean, color=CLEAN, marker="o", markersize=4, label="clean")
    robust = [100 * entry.robust_accuracy for entry in log.epochs if entry.robust_accuracy is not None]
    if len(robust) == len(epochs):
        right.plot(epochs, robust, color=WHITE_BOX, marker="s", markersize=4, label="under PGD-10, white-box")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 100))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    return figure


def transfer_heatmap(matrix: Sequence[Sequence[Result]], names: Sequence[str], title: str) -> Figure:
    """Accuracy under examples crafted on one network (rows) and shown to another (columns).

    matrix: what utils.evaluation.transfer_matrix returns for the networks called `names`.
    """
    cells = np.array([percentages(row) for row in matrix])
    figure, axes = plt.subplots(figsize=(1.25 * len(names) + 2.6, 0.95 * len(names) + 1.6), layout="constrained")
    heatmap = axes.imshow(cells, cmap="viridis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(cells):
        low, high = matrix[row][column].confidence_interval
        color = "black" if value > 60 else "white"
        text = f"{value:.1f}\n({100 * low:.1f}–{100 * high:.1f})"
        axes.text(column, row, text, ha="center", va="center", fontsize="x-small", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="shown to", ylabel="crafted on")
    axes.set_title(title, fontsize="medium")
    figure.colorbar(heatmap, ax=axes, label="accuracy (%)")
    return figure


# ---- networks ----


def layers(network: nn.Module) -> Figure:
    """The network layer by layer, for one image: each output is a block as high as the map and as wide as deep."""
    shapes = [("normalised\nimage", (3, 32, 32)), *_layer_outputs(network)]
    figure, axes = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    left = 0.0
    for name, shape in shapes:
        channels, *size = shape
        height = size[0] if len(size) == 2 else 32 * channels / 160 + 4
        width = 4 + channels / 12 if len(size) == 2 else 4
        kind = name.split()[-1]
        color = {"image": GREY, "LSTM": OTHERS[0], "linear": OTHERS[3]}.get(kind, OTHERS[1])
        axes.add_patch(plt.Rectangle((left, -height / 2), width, height, color=color, alpha=0.75))
        text = "×".join(map(str, shape))
        axes.annotate(name, (left + width / 2, 18), ha="center", va="bottom", fontsize="small")
        axes.annotate(text, (left + width / 2, -18), ha="center", va="top", fontsize="small")
        left += width + 8
    axes.set(xlim=(-4, left), ylim=(-22, 27))
    axes.axis("off")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    axes.set_title(
        f"{type(network).__name__}: {parameters:,} parameters (channels × height × width, or positions × units)",
        fontsize="medium",
    )
    return figure


def _layer_outputs(network: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """The name of each convolution block, LSTM and linear layer, in order, and its output's shape for one image."""
    found: list[tuple[str, tuple[int, ...]]] = []
    hooks = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.append((name, tuple((output[0] if isinstance(output, tuple) else output).shape[1:])))

        return hook

    norm = ", norm" if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) else ""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            name = f"{module.kernel_size[0]} × {module.kernel_size[0]} conv\nstride {module.stride[0]}\nReLU{norm}"
        elif isinstance(module, nn.LSTM):
            name = f"{module.num_layers}-layer LSTM"
        elif isinstance(module, nn.Linear):
            name = "linear"
        else:
            continue
        hooks.append(module.register_forward_hook(record(name)))
    device = next(network.parameters()).device
    with torch.no_grad(), evaluation_mode(network):
        network(torch.zeros(1, 3, 32, 32, device=device))
    for hook in hooks:
        hook.remove()
    return found


def sequence(network: CNNLSTM, image: Tensor, title: str) -> Figure:
    """What the CNN-LSTM's LSTM reads of one image, (1, 3, 32, 32): its sixteen positions and the vector at each."""
    with torch.no_grad(), evaluation_mode(network):
        (vectors,) = network.sequence(image).cpu().numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3), width_ratios=(1, 2.2), layout="constrained")
    show_image(left, image[0])
    for position in range(16):
        row, column = divmod(position, 4)
        left.add_patch(plt.Rectangle((8 * column - 0.5, 8 * row - 0.5), 8, 8, fill=False, color="white"))
        box = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5}
        left.text(8 * column + 3.5, 8 * row + 3.5, position + 1, color="white", ha="center", va="center", bbox=box)
    left.set_title("positions, as they are read", fontsize="medium")
    heatmap = right.imshow(vectors, aspect="auto", cmap="viridis", interpolation="nearest")
    right.set(xlabel="channel", ylabel="position", yticks=range(0, 16, 3), yticklabels=range(1, 17, 3))
    right.set_title("what is read, a row at each step", fontsize="medium")
    figure.colorbar(heatmap, ax=right, label="value")
    figure.suptitle(title, fontsize="medium")
    return figure


def by_position(measured: Mapping[str, Tensor], what: str) -> Figure:
    """A line over the sixteen positions of the CNN-LSTM's sequence for each label, and the same on the map.

    measured: label -> a part of 1 at each position, float (16,). what: that is measured, in percent.
    """
    count = len(measured)
    figure = plt.figure(figsize=(WIDTH, 3.2), layout="constrained")
    *maps, lines = figure.subplots(1, count + 1, width_ratios=[1] * count + [1.6])
    largest = max(100 * found.max().item() for found in measured.values())
    for axes, (label, found), color in zip(maps, measured.items(), OTHERS, strict=False):
        grid = 100 * found.cpu().numpy().reshape(4, 4)
        axes.imshow(grid, cmap="Greys", vmin=0, vmax=1.5 * largest)  # so light that black text can be read on it
        for (row, column), value in np.ndenumerate(grid):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="small")
        axes.set(xticks=[], yticks=[])
        axes.set_title(label, fontsize="medium")
        lines.plot(range(1, 17), grid.flatten(), color=color, marker="o", label=label)
    lines.set(xlabel="position in the sequence", ylim=(0, None), xticks=range(1, 17, 3))
    lines.grid(alpha=0.3)
    lines.legend(frameon=False)
    figure.suptitle(f"{what}, by position on the map (left) and in the order of reading (right)", fontsize="medium")
    return figure


# ---- images ----


def show_image(axes: Axes, image: Tensor) -> None:
    """Draw an image, (3, H, W), without ticks; what leaves [0, 1] is clipped."""
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def class_examples(split: Split, columns: int = 8) -> Figure:
    """The first images of each class, a row for each."""
    rows = {
        name: to_unit_range(split.images[split.labels == label][:columns]) for label, name in enumerate(names_of(split))
    }
    figure, axes = plt.subplots(len(rows), columns, figsize=(0.8 * columns + 1, 0.8 * len(rows)))
    figure.subplots_adjust(left=0.14, right=1, bottom=0, top=1, wspace=0.05, hspace=0.05)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, image in zip(row, images, strict=False):
            show_image(axis, image)
        for axis in row:  # also those that are left empty, where a class has fewer images
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
    return figure


def adversarial_examples(
    network: nn.Module, split: Split, epsilon: float, *, source: nn.Module | None = None, columns: int = 5
) -> Figure:
    """Some images, their FGSM perturbations and the adversarial images, with the network's answers and confidences.

    source: the network whose gradient crafts the examples; None: `network` itself. The images are those of
    `first_correct`, so that the success of the attack has no part in the choice.
    """
    images, labels = first_correct(network, split, columns)
    adversarial = fgsm(network if source is None else source, images, labels, epsilon=epsilon)
    perturbation = (adversarial - images) / (2 * epsilon) + 0.5 if epsilon else torch.full_like(images, 0.5)
    magnified = f"magnified {0.5 / epsilon:.0f} times" if epsilon else "none"
    figure, axes = plt.subplots(3, len(images), figsize=(WIDTH, 5.6), squeeze=False)
    figure.set_layout_engine("constrained")
    for row, pictures in zip(axes, (images, perturbation, adversarial), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            show_image(axis, picture)
    for axis in axes[1]:
        axis.set_xlabel(magnified, color=GREY, fontsize=9)
    for row, pictures in ((axes[0], images), (axes[2], adversarial)):
        for axis, label, (predicted, confidence) in zip(row, labels, answers(network, pictures), strict=True):
            look = RIGHT if predicted == label else WRONG
            axis.set_xlabel(f"{names_of(split)[predicted]}, {100 * confidence:.1f} %", fontsize=9, **look)
    for axis, name in zip(axes[:, 0], ("image", "perturbation", "adversarial image"), strict=True):
        axis.set_ylabel(name)
    title = f"FGSM at epsilon {epsilon_text(epsilon)}: what the network says, and how sure it is"
    figure.suptitle(title, fontsize="medium")
    return figure


def along_the_sign(
    network: nn.Module, image: Tensor, label: Tensor, split: Split, largest: float = 16 / 255, points: int = 65
) -> Figure:
    """The probabilities of the label and of every class that wins as one image moves along its gradient's sign.

    image: (1, 3, H, W); label: (1,). largest: how far the image moves, in pixel units.
    """
    direction = fgsm_direction(network, image, label)
    epsilons = torch.linspace(0, largest, points)
    with torch.no_grad(), evaluation_mode(network):
        moved = torch.cat([step(image, direction, epsilon) for epsilon in epsilons.tolist()])
        probabilities = logits_of(network, moved).softmax(1).cpu().numpy()
    classes = sorted({label.item(), *probabilities.argmax(1).tolist()}, key=lambda k: k != label.item())
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    for k, color in zip(classes, (CLEAN, *OTHERS, *OTHERS), strict=False):
        style: dict[str, Any] = {"color": color, "label": names_of(split)[k]}
        if k == label.item():
            style |= {"linewidth": 2.5, "label": f"{names_of(split)[k]} (the label)"}
        axes.plot(epsilons, 100 * probabilities[:, k], **style)
    axes.set(ylabel="probability (%)", ylim=(0, 100), xlim=(0, largest))
    mark_radii(axes, [largest * eighth / 8 for eighth in range(9)])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("What the network says, along the sign of the gradient", fontsize="medium")
    return figure


def attacked_image(
    network: nn.Module, image: Tensor, adversarial: Tensor, label: Tensor, split: Split, title: str
) -> Figure:
    """Image, magnified perturbation, adversarial image, and the probability of each class before and after.

    image, adversarial: (1, 3, H, W); label: (1,).
    """
    return attacked_images({title: network}, image, {title: adversarial}, label, split)


def attacked_images(
    networks: Mapping[str, Model], image: Tensor, adversarial: Mapping[str, Tensor], label: Tensor, split: Split
) -> Figure:
    """`attacked_image` for several networks: a row for each title, with the network's own adversarial image."""
    rows = len(networks)
    # Placed by hand and not by a layout engine, because the explorer redraws this at every move of its slider.
    figure = plt.figure(figsize=(WIDTH, 2.5 * rows))
    for number, (title, network) in enumerate(networks.items()):
        top, height = 1 - (number + 0.13) / rows, 0.62 / rows
        places = [(0.01 + 0.2 * column, top - height - 0.06 / rows, 0.19, height) for column in range(3)]
        axes = [figure.add_axes(place) for place in (*places, (0.71, top - height - 0.06 / rows, 0.25, height))]
        _draw_attacked(axes, network, image, adversarial[title], label, split)
        figure.text(0.5, 1 - (number + 0.02) / rows, title, ha="center", va="top", fontsize="medium")
    return figure


def _draw_attacked(
    axes: Sequence[Axes], network: Model, image: Tensor, adversarial: Tensor, label: Tensor, split: Split
) -> None:
    largest = (adversarial - image).abs().max().item()
    perturbation = (adversarial - image) / (2 * largest or 1) + 0.5
    magnified = f"change × {0.5 / largest:.3g}" if largest else "no change"
    pictures = {"image": image, magnified: perturbation, "adversarial image": adversarial}
    for axis, (name, picture) in zip(axes, pictures.items(), strict=False):
        show_image(axis, picture[0])
        axis.set_title(name, fontsize="small")
    with torch.no_grad(), evaluation_mode(network):
        before, after = logits_of(network, torch.cat([image, adversarial])).softmax(1).cpu().numpy()
    for axis, probabilities in ((axes[0], before), (axes[2], after)):
        predicted = probabilities.argmax()
        look = RIGHT if predicted == label.item() else WRONG
        axis.set_xlabel(f"{names_of(split)[predicted]}, {100 * probabilities[predicted]:.1f} %", **look)
    places = np.arange(len(before))
    axes[3].barh(places - 0.2, 100 * before, 0.4, color=CLEAN, label="image")
    axes[3].barh(places + 0.2, 100 * after, 0.4, color=WHITE_BOX, label="adversarial image")
    axes[3].set(yticks=places, yticklabels=names_of(split), xlim=(0, 100), xlabel="probability (%)")
    axes[3].tick_params(axis="y", labelsize="small")
    axes[3].invert_yaxis()
    above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 0.99), "ncols": 2, "borderaxespad": 0}
    axes[3].legend(frameon=False, fontsize="small", **above)


def input_gradients(networks: Mapping[str, nn.Module], split: Split, title: str, columns: int = 6) -> Figure:
    """Images, and below each the gradient of the loss for it: a row for each network, by name.

    Each gradient is drawn around grey and scaled to its own 99th percentile, because its size says little.
    """
    images, labels = first_correct(next(iter(networks.values())), split, columns)
    rows = {"image": images}
    for name, network in networks.items():
        with attacking(network, images.device):
            _, _, gradient = input_gradient(network, images, labels)
        largest = gradient.abs().flatten(1).quantile(0.99, dim=1).clamp_min(1e-30)
        rows[f"gradient of the\n{name} network"] = gradient / (2 * largest.view(-1, 1, 1, 1)) + 0.5
    captions = [names_of(split)[label] for label in labels.tolist()]
    return _grid(rows, captions, f"{title}: the gradient that an attack follows")


def targeted_examples(
    networks: Mapping[str, nn.Module],
    split: Split,
    title: str,
    columns: int = 6,
    epsilon: float = 0.25,
    steps: int = 100,
) -> Figure:
    """Images, and below each the same image moved towards the next class by PGD: a row for each network, by name.

    A network that sees what people see is convinced only by an image that shows the other class.
    """
    images, labels = first_correct(next(iter(networks.values())), split, columns)
    targets = (labels + 1) % len(split.class_names)
    rows = {"image": images}
    for name, network in networks.items():
        rows[f"through the\n{name} network"] = towards(network, images, targets, epsilon=epsilon, steps=steps)
    names = names_of(split)
    captions = [f"{names[a]}\nto {names[b]}" for a, b in zip(labels, targets, strict=True)]
    moved = f"moved towards another class (targeted PGD, {steps} steps, epsilon {epsilon_text(epsilon)})"
    return _grid(rows, captions, f"{title}: {moved}")


def towards(network: nn.Module, images: Tensor, targets: Tensor, *, epsilon: float, steps: int) -> Tensor:
    """The last iterate of targeted PGD, which goes on lowering the loss after the network has given the target.

    targets: int64 (N,). Returns images of the same shape, within epsilon of the originals and inside [0, 1].
    """
    with attacking(network, images.device):
        *_, last = pgd_iterates(
            images,
            images,
            lambda iterate: -input_gradient(network, iterate, targets)[2],
            epsilon=epsilon,
            sizes=[default_step_size(epsilon, steps)] * steps,
        )
    return last


def _grid(rows: Mapping[str, Tensor], captions: Sequence[str], title: str) -> Figure:
    """A row of pictures, (N, 3, H, W), for each name; the captions stand below the columns."""
    size = (WIDTH, (WIDTH - 0.6) / len(captions) * len(rows) + 0.7)
    figure, axes = plt.subplots(len(rows), len(captions), figsize=size, squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for axis, picture in zip(row, pictures, strict=True):
            show_image(axis, picture)
    for axis, caption in zip(axes[-1], captions, strict=True):
        axis.set_xlabel(caption)
    figure.suptitle(title, fontsize="medium")
    return figure


def first_correct(network: nn.Module, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """The first images that the network classifies correctly, each of another class, and their labels.

    At most `count` of them; if the network gets no image right, the split's first images.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for images, labels in batches(split, 100):
        with torch.no_grad(), evaluation_mode(network):
            correct = logits_of(network, images).argmax(1) == labels
        for index in correct.nonzero().flatten().tolist():
            found.setdefault(int(labels[index]), (images[index], labels[index]))
        if len(found) >= count:
            break
    if not found:
        return next(batches(split.first(count), count))
    chosen, chosen_labels = zip(*list(found.values())[:count], strict=True)
    return torch.stack(chosen), torch.stack(chosen_labels)


def answers(network: nn.Module, images: Tensor) -> list[tuple[int, float]]:
    """The class that the network gives to each image, and its confidence in [0, 1]."""
    with torch.no_grad(), evaluation_mode(network):
        confidence, predicted = logits_of(network, images).softmax(1).max(1)
    return list(zip(predicted.tolist(), confidence.tolist(), strict=True))


# ---- files ----


def png(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG; the figure is closed."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    plt.close(figure)
    return drawn.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, atomically, and close it."""
    write_atomically(path, png(figure, dpi=150))
