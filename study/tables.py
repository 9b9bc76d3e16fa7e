"""The reports as tables: Markdown for results/*.md and README, plain text for a terminal."""

import statistics
from pathlib import Path

from study.formats import find
from study.paper import PRINTED, REMEASURED
from study.robustness import PGD_50, RADII
from utils.constants import EPSILONS, PGD_20, RADIUS, TITLES
from utils.evaluation import evaluate, evaluate_fgsm, multiply_adds
from utils.statistics import difference_interval
from utils.tables import markdown, percent, pixels, tested_images, with_interval


def document(report):
    """results/tables.md: every table of the report, each under its heading."""
    opening = (
        "# Tables of the study\n\n"
        f"Made by `python -m study` from study.json: accuracy in percent on {tested_images(report)}, by testing "
        "epsilon (L-infinity, pixels in [0, 1]; 0: clean). In brackets, 95 % Wilson intervals: they cover the sampling "
        "of the test images, not how a figure moves from one training to the next (Table 5)."
    )
    titled = {"In short": in_short(report)}
    titled |= {
        f"Table {number}: {TITLES[name]}, transferred FGSM": transfer_table(report, name)
        for number, name in enumerate(networks(report), start=1)
    }
    titled |= {
        "Table 3: white-box FGSM, through each network's own gradient": white_box_table(report),
        "Table 4: the study's own recipe, transferred FGSM": reproduction_table(report),
        "Table 5: three seeds of the short recipe, CNN, transferred FGSM": spread_table(report),
        "Checkpoints": checkpoint_table(report),
        "Times": times_table(report),
    }
    if report["dataset"] == "cifar10":
        titled["Retrained cells below the study's"] = misses_text(report)
    return "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in titled.items())]) + "\n"


def in_short(report):
    """A sentence for each architecture: the baseline, the study's defence, and the same without the transfer."""
    lines = []
    for name in networks(report):
        baseline, *_, retrained = part(report, "study", name)
        theirs = f" (the study: {PRINTED[name][0.2][-1]:g} %)" if report["dataset"] == "cifar10" else ""
        lines.append(
            f"- **{TITLES[name]}.** Trained on clean images: {_at(baseline, 'white_box', 0)} clean, "
            f"{_at(baseline, 'white_box', 0.02)} under FGSM at 0.02, {_at(baseline, 'white_box', 0.1)} at 0.1. "
            f"Retrained on FGSM examples of 0.2, the study's defence: {_at(retrained, 'transfer', 0)} clean, "
            f"{_at(retrained, 'transfer', 0.1)}{theirs} under FGSM at 0.1 crafted on the baseline, and "
            f"**{_at(retrained, 'white_box', 0.02)}** under FGSM at 0.02 crafted on the retrained network itself, "
            f"{_at(retrained, 'white_box', 0.1)} at 0.1."
        )
    return "\n".join(lines)


def _at(entry, setting, epsilon):
    (result,) = (row for row in entry[setting] if row["epsilon"] == epsilon)
    return f"{percent(result['accuracy'])} %"


def networks(report):
    """The architectures of the study proper, in order."""
    return list(dict.fromkeys(entry["network"] for entry in part(report, "study")))


def part(report, name, network=None):
    """The entries of one part of the report: "study", "reproduction" or "spread"."""
    return [e for e in report["networks"] if e["part"] == name and network in (None, e["network"])]


def transfer_table(report, network):
    """The study's Table 1 (CNN) or 2 (CNN-LSTM): ours with its interval; below, the printed and the re-measured."""
    note = "In each cell: ours (95 % interval)"
    if report["dataset"] == "cifar10":
        note += "; below, the study's as printed / its checkpoints measured again with the attack done right"
    rows = []
    for entry in part(report, "study", network):
        cells = [with_interval(result) for result in entry["transfer"]]
        if report["dataset"] == "cifar10":
            theirs = zip(*(table[network][entry["training_epsilon"]] for table in (PRINTED, REMEASURED)), strict=True)
            cells = [f"{cell}<br>{a:g} / {b:g}" for cell, (a, b) in zip(cells, theirs, strict=True)]
        rows.append([trained_on(entry["training_epsilon"]), *cells])
    return f"{note}.\n\n" + markdown([f"{TITLES[network]} trained on", *columns()], rows)


def white_box_table(report):
    rows = [[label(entry), *map(with_interval, entry["white_box"])] for entry in part(report, "study")]
    return markdown(["trained on", *columns()], rows)


def reproduction_table(report):
    rows = []
    for entry in part(report, "reproduction"):
        rows.append([f"{label(entry)}: ours", *map(with_interval, entry["transfer"])])
        if report["dataset"] == "cifar10":
            for name, table in (("as printed", PRINTED), ("measured again", REMEASURED)):
                theirs = table[entry["network"]][entry["training_epsilon"]]
                rows.append([f"{label(entry)}: {name}", *(f"{value:g}" for value in theirs)])
    return markdown(["trained on", *columns()], rows)


def spread_table(report):
    rows = []
    for epsilon in dict.fromkeys(entry["training_epsilon"] for entry in part(report, "spread")):
        entries = [e for e in part(report, "spread") if e["training_epsilon"] == epsilon]
        rows += [
            [f"{trained_on(epsilon)}, seed {e['seed']}", *(percent(result["accuracy"]) for result in e["transfer"])]
            for e in entries
        ]
        columns_of_seeds = list(zip(*([100 * r["accuracy"] for r in e["transfer"]] for e in entries), strict=True))
        if len(entries) > 1:
            spread = [f"{max(c) - min(c):.2f} / {statistics.stdev(c):.2f}" for c in columns_of_seeds]
            rows.append([f"{trained_on(epsilon)}: range / standard deviation", *spread])
    return markdown(["CNN trained on", *columns()], rows)


def checkpoint_table(report):
    """A row for each shipped network."""
    rows = []
    for entry in part(report, "study"):
        name = f"[{entry['name']}]({entry['name']}.safetensors)"
        validation = percent(entry["validation_accuracy"])
        clean, *_, transfer = map(with_interval, entry["transfer"])
        white_box = with_interval(entry["white_box"][-1])
        digest = f"`{entry['sha256']}`"
        rows.append([name, entry["precision"], validation, clean, transfer, white_box, digest])
    header = ["checkpoint", "trained in", "validation", "clean", "transferred 0.1", "white-box 0.1", "SHA-256"]
    return markdown(header, rows)


def times_table(report):
    """Minutes that the study proper took, as its entries say; a dash where there was no log of a training."""
    rows = []
    for name in networks(report):
        baseline, *retrained = part(report, "study", name)
        seconds = [
            baseline["training_seconds"],
            baseline["adversarial_set_seconds"],
            _sum(entry["training_seconds"] for entry in retrained),
            _sum(entry["evaluation_seconds"] for entry in (baseline, *retrained)),
        ]
        rows.append([TITLES[name], *("–" if value is None else f"{value / 60:.1f}" for value in seconds)])
    header = ["minutes", "training the baseline", "adversarial sets", "retraining four networks", "testing all five"]
    return markdown(header, rows)


def _sum(seconds):
    seconds = list(seconds)
    return None if None in seconds else sum(seconds)


def misses(report):
    """(entry, result, best) of the retrained cells below `best`, the higher of the study's printed and re-measured."""
    found = []
    for entry in part(report, "study"):
        epsilon, network = entry["training_epsilon"], entry["network"]
        if epsilon is not None:
            theirs = zip(PRINTED[network][epsilon], REMEASURED[network][epsilon], strict=True)
            for result, figures in zip(entry["transfer"], theirs, strict=True):
                if round(100 * result["accuracy"], 2) < max(figures):
                    found.append((entry, result, max(figures)))
    return found


def misses_text(report):
    found = [
        f"- {label(entry)}, at {result['epsilon']:g}: {percent(result['accuracy'])} against {best:g}"
        for entry, result, best in misses(report)
    ]
    return "\n".join(found) or "None: each is at or above both the printed and the re-measured figure."


def summary(report):
    """The study proper as plain text: transferred and white-box accuracy of every network."""
    lines = []
    for setting, title in (("transfer", "FGSM through the baseline"), ("white_box", "FGSM through its own gradient")):
        lines += ["", f"{title}: accuracy in percent, by testing epsilon"]
        lines.append(f"{'network':10}{'trained on':16}" + "".join(f"{epsilon:>8g}" for epsilon in EPSILONS))
        for entry in part(report, "study"):
            cells = "".join(f"{100 * result['accuracy']:8.2f}" for result in entry[setting])
            lines.append(f"{TITLES[entry['network']]:10}{trained_on(entry['training_epsilon']):16}{cells}")
    return "\n".join(lines)


def robustness_document(report, logs):
    """results/robustness.md: every table of the report on robustness, each under its heading.

    logs: of `utils.robustness.training_logs`.
    """
    on_all, on_some = (f"{count:,}" for count in tested_counts(report))
    opening = (
        f"# Robustness\n\nMade by `python -m study robustness` from robustness.json: accuracy in percent on the "
        f"{on_all} {TITLES.get(report['dataset'], report['dataset'])} {report['split']} images, under PGD and "
        f"AutoAttack on the first {on_some}; in brackets, 95 % Wilson intervals."
    )
    titled = {
        "Who holds": robustness_table(report),
        "White-box PGD, by radius": radius_table(report, "pgd", **PGD_20),
        "White-box FGSM, by radius": radius_table(report, "fgsm"),
        "Checkpoints tested": robust_checkpoint_table(report),
        "Four defences on the same network": training_table(logs["defenses"]),
        "Catastrophic overfitting": overfitting_table(logs["overfitting"]),
        "What was tried": training_table(logs["tried"]),
    }
    return "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in titled.items())]) + "\n"


def robustness_table(report):
    """Baseline, the study's defence and ours, from the attack that flatters most to the one that flatters least."""
    columns: dict[str, tuple] = {
        "clean": ("fgsm", 0.0, {}),
        "transferred FGSM, 0.1": ("fgsm", 0.1, {"setting": "transfer"}),
        "white-box FGSM, 8/255": ("fgsm", RADIUS, {}),
        "PGD-50, 10 restarts, 8/255": ("pgd", RADIUS, PGD_50),
        "AutoAttack, 8/255": ("autoattack", RADIUS, {}),
    }
    rows = [
        [
            defended(entry),
            *(with_interval(find(report, entry["name"], *test[:2], **test[2])) for test in columns.values()),
        ]
        for entry in report["networks"]
    ]
    return markdown(["network, and how it is defended", *columns], rows)


def radius_table(report, attack, **options):
    rows = [
        [defended(entry), *(with_interval(find(report, entry["name"], attack, radius, **options)) for radius in RADII)]
        for entry in report["networks"]
    ]
    return markdown(["network", *(pixels(radius) for radius in RADII)], rows)


def robust_checkpoint_table(report):
    rows = []
    for entry in report["networks"]:
        seconds = sum(row["seconds"] for row in entry["results"])
        name = f"[{entry['name']}]({entry['name']}.safetensors)"
        rows.append([name, f"{entry['parameters']:,}", f"{seconds / 60:.1f}", f"`{entry['sha256']}`"])
    return markdown(["checkpoint", "parameters", "minutes under attack", "SHA-256"], rows)


def training_table(logs):
    """Defended trainings, by their flags, and what the validation images say of the epoch that was kept."""
    rows = []
    for log in logs:
        kept = max(log[1:], key=lambda epoch: epoch["choosing_accuracy"])
        minutes = sum(epoch["seconds"] for epoch in log[1:]) / 60
        accuracies = [percent(kept[f"{key}_accuracy"]) for key in ("validation", "robust", "choosing")]
        rows.append([f"`train-{log[0]['network']}.py {training_flags(log)}`", f"{minutes:.1f}", *accuracies])
    return markdown(["training", "minutes", "clean", "PGD-10", "PGD-10 on the margin"], rows)


def overfitting_table(logs):
    """Defended trainings, by their flags, and what the watched validation images say after the last epochs."""
    rows = []
    for log in logs:
        for epoch in log[-2:]:
            accuracies = [percent(epoch[f"{key}_accuracy"]) for key in ("validation", "single_step", "robust")]
            rows.append([f"`train-{log[0]['network']}.py {training_flags(log)}`", str(epoch["epoch"]), *accuracies])
    return markdown(["training", "epoch", "clean", "a single step (FGSM)", "PGD-10"], rows)


def training_flags(log):
    """The flags that tell a defended training from others."""
    arguments, defense = log[0], log[0]["defense"]
    flags = f"--defense {defense['name']}"
    if defense["epsilon"] != RADIUS:
        flags += f" --epsilon {pixels(defense['epsilon'])}"
    flags += f" --width {arguments['width']} --epochs {arguments['epochs']}"
    if arguments["average"]:
        flags += f" --average {arguments['average']:g}"
    if defense.get("crafting") == "evaluation":
        flags += " --crafting evaluation"
    return flags


def diagnosis_table(reports):
    """The verdicts of `test-*.py --diagnose --json`; reports: in the order of the rows."""
    rows = []
    for report in reports:
        diagnosis = report["diagnosis"]
        failed = sum(check["passed"] is False for check in diagnosis["checks"])
        strongest = {"accuracy": diagnosis["robust_accuracy"], "confidence_interval": diagnosis["confidence_interval"]}
        checks = f"{len(diagnosis['checks']) - failed} of {len(diagnosis['checks'])}"
        verdict = diagnosis["verdict"].split(":")[0].split(",")[0]
        rows.append([Path(report["checkpoint"]).stem, checks, verdict, with_interval(strongest)])
    return markdown(
        ["network", "checks passed", "is the evaluation trustworthy?", "left by the strongest attack"], rows
    )


def defended(entry):
    """An entry's row heading: the architecture and its defence."""
    training, title = entry["training"] or {}, TITLES[entry["network"]]
    defense = training.get("defense")
    if defense is None:
        return f"{title}, none (baseline)"
    if isinstance(defense, str) or "epsilon" not in defense:  # somebody's own
        return f"{title}, {defense if isinstance(defense, str) else defense['name']}"
    name, epsilon = defense["name"], defense["epsilon"]
    if name == "fgsm-augment":
        return f"{title}, the study's: FGSM examples of {epsilon:g}"
    return f"{title}, **ours**: {TITLES.get(name, name)} at {pixels(epsilon)}, width {training.get('width', '?')}"


def tested_counts(report):
    """Images that FGSM was run on, and PGD and AutoAttack."""
    rows = report["networks"][0]["results"]
    return rows[0]["examples"], rows[-1]["examples"]


def pairs(report):
    """The study's entries of one architecture, each with the other's of the same training epsilon."""
    first, second = (part(report, "study", name) for name in networks(report))
    others = {entry["training_epsilon"]: entry for entry in second}
    return [(entry, others[entry["training_epsilon"]]) for entry in first]


def ahead_table(report):
    """In how many cells of the study's tables either architecture is ahead, by more than the 95 % interval."""
    names = [TITLES[name] for name in networks(report)]
    baselines, *retrained = pairs(report)
    kinds: dict[str, list] = {  # the first cell of a row is the clean accuracy, in either setting
        "clean": [(entry["transfer"][:1], other["transfer"][:1]) for entry, other in pairs(report)],
        "baselines, under their own examples": [[entry["white_box"][1:] for entry in baselines]],
        "retrained, transferred FGSM": [[entry["transfer"][1:] for entry in pair] for pair in retrained],
        "retrained, white-box FGSM": [[entry["white_box"][1:] for entry in pair] for pair in retrained],
    }
    rows = []
    for kind, cells in kinds.items():
        counts, extreme = dict.fromkeys((*names, "neither"), 0), dict.fromkeys(names, 0.0)
        for a, b in (pair for row in cells for pair in zip(*row, strict=True)):
            low, high = difference_interval(a["accuracy"], b["accuracy"], report["examples"])
            ahead = names[0] if low > 0 else names[1] if high < 0 else "neither"
            counts[ahead] += 1
            if ahead != "neither":
                extreme[ahead] = max(extreme[ahead], abs(a["accuracy"] - b["accuracy"]))
        leads = (f"{counts[n]}, by up to {percent(extreme[n])}" if counts[n] else "0" for n in names)
        rows.append([kind, *leads, str(counts["neither"])])
    return markdown(["cells in which one is ahead", *names, "neither"], rows)


def conclusion_table(report, robustness=None):
    """The study's conclusion, claim by claim, with the 95 % interval of what it rests on.

    report: the study's; robustness: that of utils.robustness, for the networks that hold. Accuracies in percent.
    """
    first, second = networks(report)
    baselines, *_, largest = pairs(report)
    at = f"FGSM at {EPSILONS[-1]:g}"
    claims = {
        "more accurate: baselines, clean": ([entry["transfer"][0] for entry in baselines], report["examples"]),
        f"more robust: retrained on {largest[0]['training_epsilon']:g}, transferred {at}": (
            [entry["transfer"][-1] for entry in largest],
            report["examples"],
        ),
        f"more robust: the same, white-box {at}": ([entry["white_box"][-1] for entry in largest], report["examples"]),
    }
    if robustness:
        rows = [find(robustness, f"{name}-robust", "autoattack", RADIUS) for name in (first, second)]
        claims["more robust: adversarially trained, AutoAttack"] = rows, rows[0]["examples"]
    table = []
    for claim, (rows, examples) in claims.items():
        a, b = (row["accuracy"] for row in rows)
        low, high = difference_interval(a, b, examples)
        verdict = "holds" if low > 0 else "the other way round" if high < 0 else "open"
        difference = f"{100 * (a - b):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        table.append([claim, percent(a), percent(b), difference, verdict])
    seconds = [entry["training_seconds"] for entry in baselines]
    if all(seconds):
        a, b = (f"{s / 60:.1f} min" for s in seconds)
        table.append(
            ["faster to train: baselines", a, b, f"{100 * (seconds[0] / seconds[1] - 1):+.0f} %", "one run each"]
        )
    return markdown([f"the {TITLES[first]} is …", TITLES[first], TITLES[second], "difference (95 %)", "so?"], table)


def cost_table(tested):
    """Parameters, multiply-adds and training time of networks. tested: {name: (network, log of its training)}."""
    rows = []
    for name, (network, log) in tested.items():
        parameters = sum(parameter.numel() for parameter in network.parameters())
        minutes = sum(epoch["seconds"] for epoch in log[1:]) / 60
        width = str(network.arguments["width"])
        precision = log[1].get("precision", "float32")
        rows.append([name, width, f"{parameters:,}", f"{multiply_adds(network):,}", f"{minutes:.1f}", precision])
    header = ["network", "width", "parameters", "multiply-adds an image", "training, minutes", "trained in"]
    return markdown(header, rows)


def attacked_table(networks, split, epsilon, *, progress=False):
    """Networks, {name: network}, clean, under white-box FGSM and under PGD-20, on a split."""
    rows = []
    for name, network in networks.items():
        results = evaluate_fgsm(network, split, [epsilon], progress=progress)
        results.append(evaluate(network, split, "pgd", epsilon, options=PGD_20, progress=progress))
        cells = ({"accuracy": r.accuracy, "confidence_interval": r.confidence_interval} for r in results)
        rows.append([name, *map(with_interval, cells)])
    at = pixels(epsilon)
    return markdown([f"first {len(split):,} test images", "clean", f"FGSM, {at}", f"PGD-20, {at}"], rows)


def label(entry):
    return f"{TITLES[entry['network']]}, {trained_on(entry['training_epsilon'])}"


def trained_on(epsilon):
    return "clean images" if epsilon is None else f"epsilon {epsilon:g}"


def columns():
    return [f"{epsilon:g}" for epsilon in EPSILONS]
