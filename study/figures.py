"""The two reports as figures. Every function returns a matplotlib Figure; the caller saves or shows it."""

from collections.abc import Container, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from torch import Tensor, nn

from attacks import fgsm
from study.formats import RobustnessReport, StudyReport, WholeStudy
from study.paper import PRINTED
from study.robustness import RADII, Logs
from study.tables import tested_counts, trained_on
from utils.constants import ARCHITECTURES, EPSILONS, PGD_20, RADIUS, TITLES
from utils.data import Split
from utils.plotting import (
    BASELINE,
    GREY,
    OTHERS,
    OURS,
    RIGHT,
    STUDYS,
    WIDTH,
    WRONG,
    answers,
    first_correct,
    input_gradients,
    line_with_interval,
    mark_radii,
    names_of,
    percentages,
    show_image,
    targeted_examples,
    title_of,
)
from utils.runs import Log
from utils.statistics import difference_interval
from utils.tables import epsilon_text, images_text
from utils.validation import best_epoch

TESTING = "testing epsilon (L-infinity, pixels in [0, 1])"
SETTINGS = ("transfer", "white_box")
PANELS = ("PGD-10 on the margin, 2,000 images", "clean, 5,000 images")  # of the figures about trainings
BELOW: dict[str, Any] = {"loc": "outside lower center", "ncols": 5, "frameon": False}  # where most legends stand


# ---- the study ----


def study_figures(report: WholeStudy) -> dict[str, Figure]:
    """Every figure of the study's report, by name."""
    figures = {"networks": networks_compared(report)}
    for name in ARCHITECTURES:
        figures[f"{name}-transfer"] = transfer_accuracy(report, name)
        figures[f"{name}-change"] = change_against_baseline(report, name)
        figures[f"{name}-white-box"] = transfer_and_white_box(report, name)
    return figures


def networks_compared(report: WholeStudy) -> Figure:
    """CNN beside CNN-LSTM, a panel for each training epsilon, with 95 % intervals."""
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH, 5.4), sharex=True, sharey=True, layout="constrained")
    looks: Sequence[dict[str, Any]] = ({"marker": "o"}, {"marker": "s", "linestyle": "--", "markerfacecolor": "white"})
    for axes, pair in zip(panels.flat, report.pairs(), strict=False):
        for entry, look in zip(pair, looks, strict=True):
            line_with_interval(axes, entry.transfer, _style(entry.training_epsilon) | look)
        axes.set_title(f"trained on {trained_on(pair[0].training_epsilon)}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set(ylim=(0, 100))
        mark_radii(axes, EPSILONS, "")
        axes.tick_params(labelbottom=True)
    panels[0, 0].set_ylabel("accuracy (%)")
    panels[1, 0].set_ylabel("accuracy (%)")
    panels[1, 2].remove()  # the legend stands there
    figure.supxlabel(TESTING, fontsize="medium")
    figure.suptitle(f"FGSM examples crafted on each network's own baseline\n({_tested(report)})", fontsize="medium")
    handles = [Line2D([], [], color=GREY, label=TITLES[name], **looks[i]) for i, name in enumerate(ARCHITECTURES)]
    figure.legend(handles=handles, loc="center", bbox_to_anchor=(0.85, 0.3), frameon=False)
    return figure


def difference_of_networks(report: WholeStudy) -> Figure:
    """CNN less CNN-LSTM in percentage points with 95 % intervals, by testing epsilon, a panel for each setting."""
    first, second = (TITLES[name] for name in ARCHITECTURES)
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.4), sharey=True, layout="constrained")
    titles = ("transfer: crafted on each one's baseline", "white-box: crafted on the network itself")
    for axes, setting, title in zip(panels, SETTINGS, titles, strict=True):
        for place, pair in enumerate(report.pairs()):
            ours, others = ([measurement.accuracy for measurement in entry.under(setting)] for entry in pair)
            difference = np.subtract(ours, others)
            intervals = [difference_interval(a, b, report.examples) for a, b in zip(ours, others, strict=True)]
            low, high = np.array(intervals).T
            shifted = np.array(EPSILONS) + 0.0012 * (place - 2)
            error = 100 * np.array([difference - low, high - difference])
            epsilon = pair[0].training_epsilon
            style = {**_style(epsilon), "linestyle": "", "capsize": 2, "label": trained_on(epsilon)}
            axes.errorbar(shifted, 100 * difference, error, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
        mark_radii(axes, EPSILONS, TESTING)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{first} less {second} (percentage points)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="trained on", **BELOW)
    figure.suptitle(f"Which architecture is ahead? ({_tested(report)})", fontsize="medium")
    return figure


def transfer_accuracy(report: StudyReport, architecture: str) -> Figure:
    """Accuracy against testing epsilon, a line for each training epsilon: ours solid, the study's dashed."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for entry in report.entries_of("study", architecture):
        style = _style(entry.training_epsilon)
        line_with_interval(axes, entry.transfer, style)
        if report.dataset == "cifar10":
            printed = PRINTED[architecture][entry.training_epsilon]
            axes.plot(EPSILONS, printed, **{**style, "linestyle": "--"}, alpha=0.7)
    title = f"{TITLES[architecture]}: FGSM examples crafted on the baseline ({_tested(report)})"
    figure.suptitle(title, fontsize="medium")
    _finish(figure, [axes], report, architecture)
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    return figure


def change_against_baseline(report: WholeStudy, architecture: str) -> Figure:
    """What retraining adds to the baseline's accuracy, in percentage points: ours solid, the study's dashed."""
    baseline, *retrained = report.entries_of("study", architecture)
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for entry in retrained:
        epsilon, style = entry.training_epsilon, _style(entry.training_epsilon)
        axes.plot(EPSILONS, percentages(entry.transfer) - percentages(baseline.transfer), **style)
        if report.dataset == "cifar10":
            printed = np.subtract(PRINTED[architecture][epsilon], PRINTED[architecture][None])
            axes.plot(EPSILONS, printed, **{**style, "linestyle": "--"}, alpha=0.7)
    axes.axhline(0, color="black", linewidth=0.8)
    title = f"{TITLES[architecture]}: what retraining changes under FGSM examples crafted on the baseline"
    figure.suptitle(title, fontsize="medium")
    _finish(figure, [axes], report, architecture, baseline=False)
    axes.set(ylabel="change against the baseline (percentage points)")
    return figure


def transfer_and_white_box(report: StudyReport, architecture: str) -> Figure:
    """The same networks under examples crafted on the baseline (left) and through their own gradient (right)."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.6), sharey=True, layout="constrained")
    titles = ("transfer: crafted on the baseline", "white-box: crafted on the network itself")
    for axes, setting, title in zip(panels, SETTINGS, titles, strict=True):
        for entry in report.entries_of("study", architecture):
            line_with_interval(axes, entry.under(setting), _style(entry.training_epsilon))
        axes.set_title(title, fontsize="medium")
    title = f"{TITLES[architecture]} under FGSM: who crafts the examples decides ({_tested(report)})"
    figure.suptitle(title, fontsize="medium")
    _finish(figure, panels, report, architecture, printed=False)
    panels[0].set(ylabel="accuracy (%)", ylim=(0, 100))
    return figure


def side_by_side(
    baseline: nn.Module, retrained: nn.Module, split: Split, epsilon: float, title: str, columns: int = 4
) -> Figure:
    """What a baseline and a network retrained on its FGSM examples answer to clean images and under both attacks.

    A row for the images, a row for the examples crafted on the baseline and a row for those crafted on the retrained
    network. The images are those of `first_correct` for the baseline.
    """
    images, labels = first_correct(baseline, split, columns)
    rows = {
        "clean image": images,
        "crafted on\nthe baseline": fgsm(baseline, images, labels, epsilon=epsilon),
        "crafted on the\nretrained network": fgsm(retrained, images, labels, epsilon=epsilon),
    }
    figure, axes = plt.subplots(3, len(images), figsize=(WIDTH, 7.6), squeeze=False)
    figure.subplots_adjust(left=0.08, right=0.99, bottom=0.07, top=0.91, wspace=0.08, hspace=0.29)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, picture in zip(row, pictures, strict=True):
            show_image(axis, picture)
        for line, (who, network) in enumerate({"baseline": baseline, "retrained": retrained}.items()):
            _caption_answers(row, line, who, network, pictures, labels, names_of(split))
    attack = f"FGSM at epsilon {epsilon_text(epsilon)}, crafted on each of them"
    figure.suptitle(f"{title}\n{attack} (green: right; purple and bold: wrong)", fontsize="medium")
    return figure


def _caption_answers(
    row: Sequence[Axes], line: int, who: str, network: nn.Module, pictures: Tensor, labels: Tensor, names: Sequence[str]
) -> None:
    """Write what a network answers below each picture of a row. line: 0 for the first line of text."""
    for axis, label, (predicted, confidence) in zip(row, labels.tolist(), answers(network, pictures), strict=True):
        axis.annotate(
            f"{who}: {names[predicted]}, {100 * confidence:.0f} %",
            (0.5, -0.03 - 0.11 * line),
            xycoords="axes fraction",
            ha="center",
            va="top",
            fontsize="small",
            **(RIGHT if predicted == label else WRONG),
        )


# ---- robustness ----


def robustness_figures(
    report: RobustnessReport, logs: Logs, networks: Mapping[str, nn.Module], split: Split
) -> dict[str, Figure]:
    """Every figure of the report on robustness, by name.

    networks: name in the report -> network, on the split's device. Raises UserError if the report lacks a result.
    """
    figures = {"pgd": robust_accuracy(report)}
    if logs.defenses:
        first, (_, epsilon) = logs.defenses[0].arguments, _defense(logs.defenses[0])
        title = f"Defences at {epsilon_text(epsilon)}, {title_of(first.network)} of width {first.width}"
        by_name = {_defense(log)[0]: log for log in logs.defenses}
        figures["defenses"] = trainings_compared(by_name, title, {title_of("n-fgsm")})
    if logs.overfitting:
        by_settings = {_settings(log, "epsilon", "width"): log for log in logs.overfitting}
        ours = {label for label, log in by_settings.items() if log.arguments.defense_name == "n-fgsm"}
        figures["overfitting"] = trainings_compared(by_settings, "Catastrophic overfitting", ours, against="epoch")
    if logs.tried:
        figures["tried"] = time_and_robustness(logs.tried, logs.shipped)
    for name in ARCHITECTURES:
        named = {
            {"none": "baseline", "ours": "robust"}[entry.defense]: networks[entry.name]
            for entry in report.entries
            if entry.architecture == name and entry.defense in ("none", "ours") and not entry.is_wide
        }
        if named:
            figures[f"{name}-gradients"] = input_gradients(named, split, TITLES[name])
            figures[f"{name}-targeted"] = targeted_examples(named, split, TITLES[name])
    return figures


def robust_accuracy(report: RobustnessReport) -> Figure:
    """Accuracy under PGD against its radius, with 95 % intervals and AutoAttack's, a panel for each architecture.

    Raises UserError if the report lacks a result.
    """
    names = list(dict.fromkeys(entry.architecture for entry in report.entries))
    figure, panels = plt.subplots(1, len(names), figsize=(WIDTH, 4.8), sharey=True, layout="constrained", squeeze=False)
    looks = {
        "none": (BASELINE, "o", "baseline"),
        "the study's": (STUDYS, "D", "the study's defence"),
        "wide": (GREY, "^", "no defence, as wide as ours"),
        "ours": (OURS, "s", "ours"),
    }
    for axes, name in zip(panels[0], names, strict=True):
        for entry in (entry for entry in report.entries if entry.architecture == name):
            color, marker, label = looks["wide" if entry.is_wide else entry.defense]
            rows = [entry.find("fgsm", 0.0), *(entry.find("pgd", radius, "white_box", **PGD_20) for radius in RADII)]
            line_with_interval(
                axes, rows, {"color": color, "marker": marker, "markersize": 5, "fillstyle": "none", "label": label}
            )
            strongest = 100 * entry.find("autoattack", RADIUS).accuracy
            axes.plot(RADIUS, strongest, "*", color=color, markersize=13, markeredgecolor="white")
        axes.set_title(TITLES[name], fontsize="medium")
        mark_radii(axes, [0, 4 / 255, RADIUS, 12 / 255, 16 / 255, 0.08, 0.1])
        axes.tick_params(axis="x", labelsize="small")
        axes.grid(alpha=0.3)
        axes.set(xlim=(0, None), ylim=(0, 100))
    panels[0, 0].set_ylabel("accuracy (%)")
    labelled = {line.get_label(): line for axes in panels[0] for line in axes.get_legend_handles_labels()[0]}
    handles = list(labelled.values())
    handles.append(Line2D([], [], linestyle="", marker="*", color=GREY, markersize=11, label="AutoAttack, 8/255"))
    figure.legend(handles=handles, **BELOW | {"ncols": 3})
    clean, attacked = tested_counts(report)
    title = f"White-box PGD-20 (first {attacked:,} test images; at epsilon 0, clean, {clean:,})"
    figure.suptitle(title, fontsize="medium")
    return figure


def trainings_compared(logs: Mapping[str, Log], title: str, ours: Container[str], *, against: str = "time") -> Figure:
    """Accuracy under PGD-10 (left) and clean (right) on validation images, a line for each training.

    logs: label -> log. ours: the labels that are drawn in the colour of our defence. against: what runs to the right,
    "time" of training or "epoch".
    """
    columns = 1 if max(map(len, logs)) > 50 else 2
    size = (WIDTH, 3.6 + 0.2 * len(logs) / columns)
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for (label, log), color, marker in zip(logs.items(), cycle(OTHERS), cycle("sD^ovP"), strict=False):
        color = OURS if label in ours else color
        minutes = np.cumsum([epoch.seconds for epoch in log.epochs]) / 60
        places = minutes if against == "time" else [epoch.epoch for epoch in log.epochs]
        style = {"color": color, "marker": marker, "markersize": 5, "fillstyle": "none", "label": label}
        panels[0].plot(places, [100 * (epoch.choosing_accuracy or 0) for epoch in log.epochs], **style)
        panels[1].plot(places, [100 * epoch.validation_accuracy for epoch in log.epochs], **style)
    for axes, name in zip(panels, PANELS, strict=True):
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("training time (minutes)" if against == "time" else "epoch")
        axes.grid(alpha=0.3)
        axes.set(xlim=(0, None), ylim=(0, 100))
    panels[0].set_ylabel("validation accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), **BELOW | {"ncols": columns, "fontsize": 9})
    figure.suptitle(title, fontsize="medium")
    return figure


def time_and_robustness(tried: Sequence[Log], shipped: Sequence[Log]) -> Figure:
    """Accuracy under PGD-10 (left) and clean (right) on validation images against the time of training, on a log scale.

    Each training is a point, at the epoch that is kept. Those of the shipped networks are filled.
    """
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 4.8), layout="constrained")
    looks: dict[str, str] = {}  # what the legend says after the architecture -> colour
    ours = {_settings(log, "recipe", "loss") for log in shipped}
    for log in (*shipped, *tried):
        kind = _settings(log, "recipe", "loss")
        other = OTHERS[len(looks) % len(OTHERS)]
        color = OURS if kind in ours else looks.setdefault(kind.partition(", ")[2], other)
        kept = best_epoch(log.epochs)
        minutes = max(log.seconds / 60, 0.01)  # a log scale does not have 0
        style = {"color": color, "marker": "o" if log.arguments.network == "cnn" else "s", "linestyle": ""}
        filled = {"fillstyle": "full", "zorder": 3} if log in shipped else {"fillstyle": "none"}
        for axes, accuracy in zip(panels, (kept.choosing_accuracy, kept.validation_accuracy), strict=True):
            axes.plot(minutes, 100 * (accuracy or 0), markersize=8, **style, **filled)
        if kind not in panels[0].get_legend_handles_labels()[1]:
            panels[0].plot([], [], fillstyle="none", label=kind, **style)
    for axes, name in zip(panels, PANELS, strict=True):
        axes.set_title(name, fontsize="medium")
        axes.set_xscale("log")
        axes.set_xlabel("training time (minutes)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), **BELOW | {"ncols": 2, "fontsize": 9})
    figure.suptitle(
        "Robustness against training time: what was tried, and the shipped networks (filled)", fontsize="medium"
    )
    return figure


def _settings(log: Log, *names: str) -> str:
    """The architecture and the defence of a training in words, and its settings of these names."""
    arguments, (defense, epsilon) = log.arguments, _defense(log)
    words = {
        "epsilon": f"epsilon {epsilon_text(epsilon)}",
        "width": f"width {arguments.width}",
        "recipe": f"{title_of(arguments.optimizer)}, {title_of(arguments.activation)}",
        "loss": str(arguments.defense_options.get("loss", "cross_entropy")).replace("_", "-"),
    }
    return ", ".join([f"{title_of(arguments.network)}, {defense}", *(words[name] for name in names)])


def _defense(log: Log) -> tuple[str, float]:
    """The title and the radius of a training's defence. `training_logs` returns only trainings that have one."""
    return title_of(log.arguments.defense_name or ""), log.arguments.defense_epsilon or 0.0


# ---- words and legends that several figures use ----


def _tested(report: StudyReport) -> str:
    return images_text(report.examples, report.dataset, report.split)


def _finish(
    figure: Figure,
    panels: Sequence[Axes],
    report: StudyReport,
    architecture: str,
    *,
    baseline: bool = True,
    printed: bool = True,
) -> None:
    """Axis titles, grid, and a legend: a colour for each training epsilon, a dash for the study's.

    baseline: whether the figure has the baseline's line; printed: whether it has the study's lines.
    """
    for axes in panels:
        mark_radii(axes, EPSILONS, TESTING)
        axes.grid(alpha=0.3)
    epsilons = [entry.training_epsilon for entry in report.entries_of("study", architecture)]
    handles = [Line2D([], [], label=trained_on(e), **_style(e)) for e in epsilons if baseline or e is not None]
    if len(panels) > 1:
        figure.legend(handles=handles, title="trained on", **BELOW)
        return
    handles.insert(0, _heading("trained on"))
    if printed and report.dataset == "cifar10":
        handles += [
            _heading("\nfigures of"),
            Line2D([], [], color="black", label="this repository"),
            Line2D([], [], color="black", linestyle="--", alpha=0.7, label="the study, as printed"),
        ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _heading(text: str) -> Line2D:
    """For a legend: a line of text without a line beside it."""
    return Line2D([], [], linestyle="", label=text)


def _style(epsilon: float | None) -> dict[str, Any]:
    """Colour and marker of a training epsilon; both, so that a print without colours can be read too."""
    shades = {0.005: ("#F0B475", "v"), 0.01: ("#E79A4B", "s"), 0.015: ("#DE7F24", "^"), 0.2: (STUDYS, "D")}
    color, marker = (BASELINE, "o") if epsilon is None else shades[epsilon]
    return {"color": color, "marker": marker, "markersize": 5}
