"""TODO: study.figures."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from study.formats import find
from study.paper import PRINTED
from study.robustness import RADII
from study.tables import networks, pairs, part, tested_counts, trained_on
from utils.constants import EPSILONS, PGD_20, RADIUS, TITLES
from utils.plotting import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    _line_with_interval,
    _percent,
    input_gradients,
    targeted_examples,
)
from utils.statistics import difference_interval
from utils.tables import pixels, tested_images

TESTING = "testing epsilon (L-infinity radius, pixels in [0, 1])"


def difference_of_networks(report):
    """CNN less CNN-LSTM in percentage points with 95 % intervals, by testing epsilon, a panel for each setting."""
    first, second = networks(report)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = ("transfer: crafted on each one's baseline", "white-box: crafted on the network itself")
    for axes, setting, title in zip(panels, ("transfer", "white_box"), titles, strict=True):
        for place, pair in enumerate(pairs(report)):
            rows = [[row["accuracy"] for row in entry[setting]] for entry in pair]
            difference = np.subtract(rows[0], rows[1])
            low, high = np.array([difference_interval(a, b, report["examples"]) for a, b in zip(*rows, strict=True)]).T
            shifted = np.array(EPSILONS) + 0.0012 * (place - 2)
            error = 100 * np.array([difference - low, high - difference])
            epsilon = pair[0]["training_epsilon"]
            style = {**_style(epsilon), "linestyle": "", "capsize": 2, "label": trained_on(epsilon)}
            axes.errorbar(shifted, 100 * difference, error, **style)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(TESTING)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{TITLES[first]} less {TITLES[second]} (percentage points)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, title="trained on")
    figure.suptitle(f"Which architecture is ahead? ({tested_images(report)})")
    return figure


def study_figures(report):
    """Every figure of a study's report, {name: Figure}."""
    figures = {"networks": networks_compared(report)}
    for network in networks(report):
        figures[f"{network}-transfer"] = transfer_accuracy(report, network)
        figures[f"{network}-change"] = change_against_baseline(report, network)
        figures[f"{network}-white-box"] = transfer_and_white_box(report, network)
    return figures


def transfer_accuracy(report, network):
    """Accuracy against testing epsilon, a line for each training epsilon: ours solid, the study's dashed."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for entry in part(report, "study", network):
        style = _style(entry["training_epsilon"])
        _line_with_interval(axes, entry["transfer"], style)
        if report["dataset"] == "cifar10":
            axes.plot(EPSILONS, PRINTED[network][entry["training_epsilon"]], **{**style, "linestyle": "--"}, alpha=0.7)
    figure.suptitle(f"{TITLES[network]}: FGSM examples crafted on the baseline ({tested_images(report)})")
    _finish(figure, [axes], report, network)
    axes.set(ylabel="accuracy (%)", ylim=(0, 100))
    return figure


def change_against_baseline(report, network):
    """What retraining adds to the baseline's accuracy, in percentage points: ours solid, the study's dashed."""
    baseline, *retrained = part(report, "study", network)
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    for entry in retrained:
        epsilon, style = entry["training_epsilon"], _style(entry["training_epsilon"])
        axes.plot(EPSILONS, _percent(entry["transfer"]) - _percent(baseline["transfer"]), **style)
        if report["dataset"] == "cifar10":
            theirs = np.subtract(PRINTED[network][epsilon], PRINTED[network][None])
            axes.plot(EPSILONS, theirs, **{**style, "linestyle": "--"}, alpha=0.7)
    axes.axhline(0, color="black", linewidth=0.8)
    figure.suptitle(f"{TITLES[network]}: what retraining changes under FGSM examples crafted on the baseline")
    _finish(figure, [axes], report, network, baseline=False)
    axes.set(ylabel="change against the baseline (percentage points)")
    return figure


def networks_compared(report):
    """CNN beside CNN-LSTM, a panel for each training epsilon, with 95 % intervals."""
    names = networks(report)
    trainings = [entry["training_epsilon"] for entry in part(report, "study", names[0])]
    figure, panels = plt.subplots(1, len(trainings), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axes, epsilon in zip(panels, trainings, strict=True):
        for name, color, marker in zip(names, (BLUE, ORANGE), "os", strict=False):
            (entry,) = (e for e in part(report, "study", name) if e["training_epsilon"] == epsilon)
            _line_with_interval(axes, entry["transfer"], {"color": color, "marker": marker, "label": TITLES[name]})
        axes.set_title(f"trained on {trained_on(epsilon)}", fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set(ylim=(0, 100))
    panels[0].set_ylabel("accuracy (%)")
    figure.supxlabel(TESTING, fontsize="medium")
    figure.suptitle(f"FGSM examples crafted on each network's own baseline ({tested_images(report)})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def transfer_and_white_box(report, network):
    """The same networks under examples crafted on the baseline (left) and through their own gradient (right)."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.6), sharey=True, layout="constrained")
    titles = ("transfer: crafted on the baseline", "white-box: crafted on the network itself")
    for axes, setting, title in zip(panels, ("transfer", "white_box"), titles, strict=True):
        for entry in part(report, "study", network):
            _line_with_interval(axes, entry[setting], _style(entry["training_epsilon"]))
        axes.set_title(title, fontsize="medium")
    figure.suptitle(f"{TITLES[network]} under FGSM: who crafts the examples decides ({tested_images(report)})")
    _finish(figure, panels, report, network, theirs=False)
    panels[0].set(ylabel="accuracy (%)", ylim=(0, 100))
    return figure


def robustness_figures(report, logs, tested, split):
    """Every figure on robustness, {name: Figure}.

    logs: of `utils.robustness.training_logs`. tested: {path: (architecture, network)}, as for `measure`.
    """
    figures = {"pgd": robust_accuracy(report)}
    if logs["defenses"]:
        first = logs["defenses"][0][0]
        title = (
            f"Defences at {pixels(first['defense']['epsilon'])}, {TITLES[first['network']]} of width {first['width']}"
        )
        by_name = {TITLES[log[0]["defense"]["name"]]: log for log in logs["defenses"]}
        figures["defenses"] = trainings_compared(by_name, title)
    if logs["overfitting"]:
        by_settings = {_settings(log, "epsilon", "width"): log for log in logs["overfitting"]}
        figures["overfitting"] = trainings_compared(by_settings, "Catastrophic overfitting", against="epoch")
    if logs["tried"]:
        by_settings = {_settings(log, "width", "epochs", "average", "crafting"): log for log in logs["tried"]}
        figures["tried"] = trainings_compared(by_settings, "What was tried, of adversarial training")
    for name in dict.fromkeys(name for name, _ in tested.values()):
        baseline, _, robust = (network for other, network in tested.values() if other == name)
        figures[f"{name}-gradients"] = input_gradients({"baseline": baseline, "robust": robust}, split, TITLES[name])
        figures[f"{name}-targeted"] = targeted_examples({"baseline": baseline, "robust": robust}, split, TITLES[name])
    return figures


def robust_accuracy(report):
    """Accuracy under PGD against its radius, with 95 % intervals and AutoAttack's, a panel for each architecture."""
    names = list(dict.fromkeys(entry["network"] for entry in report["networks"]))
    figure, panels = plt.subplots(1, len(names), figsize=(9.6, 4.2), sharey=True, layout="constrained", squeeze=False)
    looks = [("black", "o", "baseline"), (ORANGE, "D", "the study's defence"), (BLUE, "s", "ours")]
    for axes, name in zip(panels[0], names, strict=True):
        entries = [entry for entry in report["networks"] if entry["network"] == name]
        for entry, (color, marker, label) in zip(entries, looks, strict=True):
            rows = [find(report, entry["name"], "pgd", radius, **PGD_20) for radius in RADII]
            rows = [find(report, entry["name"], "fgsm", 0.0), *rows]
            _line_with_interval(axes, rows, {"color": color, "marker": marker, "markersize": 4, "label": label})
            strongest = find(report, entry["name"], "autoattack", RADIUS)
            axes.plot(RADIUS, 100 * strongest["accuracy"], "*", color=color, markersize=13, markeredgecolor="white")
        axes.set_title(TITLES[name], fontsize="medium")
        axes.set_xlabel("epsilon (L-infinity radius, pixels in [0, 1])")
        axes.grid(alpha=0.3)
        axes.set(xlim=(0, None), ylim=(0, 100))
    panels[0, 0].set_ylabel("accuracy (%)")
    handles, _ = panels[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="*", color=GREY, markersize=11, label="AutoAttack, 8/255"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    clean, attacked = tested_counts(report)
    figure.suptitle(f"White-box PGD-20 (first {attacked:,} test images; at epsilon 0, clean, {clean:,})")
    return figure


def _settings(log, *keys):
    """In words, architecture and defence of a training, and those of its arguments."""
    arguments, defense = log[0], log[0]["defense"]
    words = {
        "epsilon": f"epsilon {pixels(defense['epsilon'])}",
        "width": f"width {arguments['width']}",
        "epochs": f"{arguments['epochs']} epochs",
        "average": f"average {arguments['average']:g}" if arguments["average"] else "last weights",
        "crafting": "crafted in evaluation mode" if defense.get("crafting") == "evaluation" else "",
    }
    named = [f"{TITLES[arguments['network']]}, {TITLES[defense['name']]}", *(words[key] for key in keys)]
    return ", ".join(filter(None, named))


def trainings_compared(logs, title, against="time"):
    """Accuracy under PGD-10 (left) and clean (right) on validation images, a line for each log.

    logs: {label: what a training's .jsonl holds, its arguments and then an entry for each epoch}. against: training
    "time", or "epoch".
    """
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), sharey=True, layout="constrained")
    looks = cycle(zip((BLUE, ORANGE, GREEN, "black", SKY, GREY), "sD^ovP", strict=True))
    for (label, (_, *epochs)), (color, marker) in zip(logs.items(), looks, strict=False):
        minutes = np.cumsum([epoch["seconds"] for epoch in epochs]) / 60
        places = minutes if against == "time" else [epoch["epoch"] for epoch in epochs]
        style = {"color": color, "marker": marker, "markersize": 4, "label": label}
        for axes, key in zip(panels, ("choosing_accuracy", "validation_accuracy"), strict=True):
            axes.plot(places, [100 * epoch[key] for epoch in epochs], **style)
    for axes, name in zip(panels, ("PGD-10 on the margin, 2,000 images", "clean, 5,000 images"), strict=True):
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("training time (minutes)" if against == "time" else "epoch")
        axes.grid(alpha=0.3)
        axes.set(xlim=(0, None), ylim=(0, 100))
    panels[0].set_ylabel("validation accuracy (%)")
    style = {"loc": "outside lower center", "ncols": 2, "frameon": False, "fontsize": "small"}
    figure.legend(*panels[0].get_legend_handles_labels(), **style)
    figure.suptitle(title)
    return figure


def _finish(figure, panels, report, network, *, baseline=True, theirs=True):
    """Axis titles, grid, and legends beside the panels: a colour for each training epsilon, a dash for the study's."""
    for axes in panels:
        axes.set_xlabel(TESTING)
        axes.grid(alpha=0.3)
    shown = [entry["training_epsilon"] for entry in part(report, "study", network)]
    handles = [
        _heading("trained on"),
        *(Line2D([], [], label=trained_on(e), **_style(e)) for e in shown if baseline or e is not None),
    ]
    if theirs and report["dataset"] == "cifar10":
        dashed = Line2D([], [], color="black", linestyle="--", alpha=0.7, label="the study, as printed")
        handles += [
            _heading("\nfigures of"),
            Line2D([], [], color="black", label="this repository"),
            dashed,
        ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _heading(text):
    """For a legend: a line of text without a line beside it."""
    return Line2D([], [], linestyle="", label=text)


def _style(epsilon):
    """Colour and marker of a training epsilon; both, so that a print without colours can be read too."""
    styles = {None: ("black", "o"), 0.005: (SKY, "v"), 0.01: (BLUE, "s"), 0.015: (GREEN, "^"), 0.2: (ORANGE, "D")}
    color, marker = styles[epsilon]
    return {"color": color, "marker": marker, "markersize": 5}
