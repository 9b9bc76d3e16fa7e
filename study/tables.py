"""The two reports as tables: Markdown for results/*.md, the documents and the notebooks, plain text for a terminal.

Accuracies are in percent. A cell with an interval in brackets has the 95 % Wilson interval.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict
from torch import nn

from defenses.losses import DEFENSES
from networks.cost import multiply_adds
from study.formats import (
    RobustnessEntry,
    RobustnessReport,
    StudyEntry,
    StudyReport,
    WholeStudy,
    examples_of,
)
from study.paper import PRINTED, REMEASURED
from study.robustness import PGD_50, PGD_L2, RADII, Logs
from utils.commands import types
from utils.commands.train import DEFENSES_OF_FLAG, flags_of_recipe
from utils.constants import ARCHITECTURES, EPSILONS, L2_RADIUS, PGD_20, RADIUS, TITLES
from utils.data import Split
from utils.evaluation import evaluate, evaluate_fgsm
from utils.formats import AttackRow, TestReport, TrainingArguments
from utils.recipes import nearest_recipe
from utils.runs import USUAL_OPTIONS, Log
from utils.statistics import difference_interval
from utils.tables import (
    Markup,
    Measured,
    Point,
    bold,
    code,
    epsilon_text,
    images_text,
    joined,
    link,
    markdown,
    percent,
    under_headings,
    with_interval,
)
from utils.validation import best_epoch


def document(report: WholeStudy) -> str:
    """results/tables.md: every table of the study's report, each under its heading."""
    tested = images_text(report.examples, report.dataset, report.split)
    opening = (
        "# Tables of the study\n\n"
        f"Made by `python -m study` from study.json: accuracy in percent on {tested}, by testing "
        "epsilon (L-infinity, pixels in [0, 1]; 0: clean). In brackets, 95 % Wilson intervals: they cover the sampling "
        "of the test images, not how a figure moves from one training to the next (Table 5)."
    )
    titled = {"In short": in_short(report)}
    titled |= {
        f"Table {number}: {TITLES[name]}, transferred FGSM": transfer_table(report, name)
        for number, name in enumerate(ARCHITECTURES, start=1)
    }
    titled |= {
        "Table 3: white-box FGSM, through each network's own gradient": white_box_table(report),
        "Table 4: the study's own recipe, transferred FGSM": reproduction_table(report),
        "Table 5: three seeds of the short recipe, CNN, transferred FGSM": spread_table(report),
        "Checkpoints": checkpoint_table(report),
        "Times": times_table(report),
    }
    if report.dataset == "cifar10":
        titled["Retrained cells below the study's"] = misses_text(report)
    return under_headings(opening, titled)


def in_short(report: WholeStudy) -> str:
    """A sentence for each architecture: the baseline, the study's defence, and that defence without the transfer."""
    sentences = []
    for name in ARCHITECTURES:
        baseline, *_, retrained = report.entries_of("study", name)
        theirs = f" (the study: {PRINTED[name][0.2][-1]:g} %)" if report.dataset == "cifar10" else ""

        def at(entry: StudyEntry, setting: str, epsilon: float) -> str:
            return f"{percent(entry.at(setting, epsilon).accuracy)} %"

        sentences.append(
            f"- **{TITLES[name]}.** Trained on clean images: {at(baseline, 'white_box', 0)} clean, "
            f"{at(baseline, 'white_box', 0.02)} under FGSM at 0.02, {at(baseline, 'white_box', 0.1)} at 0.1. "
            f"Retrained on FGSM examples of 0.2, the study's defence: {at(retrained, 'transfer', 0)} clean, "
            f"{at(retrained, 'transfer', 0.1)}{theirs} under FGSM at 0.1 crafted on the baseline, and "
            f"**{at(retrained, 'white_box', 0.02)}** under FGSM at 0.02 crafted on the retrained network itself, "
            f"{at(retrained, 'white_box', 0.1)} at 0.1."
        )
    return "\n".join(sentences)


def transfer_table(report: StudyReport, architecture: str) -> str:
    """The study's Table 1 (CNN) or 2 (CNN-LSTM): our figures, and below each the printed and the re-measured ones."""
    note = "In each cell: ours (95 % interval)"
    if report.dataset == "cifar10":
        note += "; below, the study's as printed / its checkpoints measured again with the attack done right"
    rows = []
    for entry in report.entries_of("study", architecture):
        cells = [with_interval(measurement) for measurement in entry.transfer]
        if report.dataset == "cifar10":
            tables = (table[architecture][entry.training_epsilon] for table in (PRINTED, REMEASURED))
            cells = [Markup(f"{cell}<br>{a:g} / {b:g}") for cell, a, b in zip(cells, *tables, strict=True)]
        rows.append([trained_on(entry.training_epsilon), *cells])
    return f"{note}.\n\n" + markdown([f"{TITLES[architecture]} trained on", *columns()], rows)


def white_box_table(report: StudyReport) -> str:
    """Every network of the study under FGSM through its own gradient."""
    rows = [[label(entry), *map(with_interval, entry.white_box)] for entry in report.entries_of("study")]
    return markdown(["trained on", *columns()], rows)


def reproduction_table(report: StudyReport) -> str:
    """The networks trained with the original study's recipe, beside its own figures."""
    rows = []
    for entry in report.entries_of("reproduction"):
        rows.append([f"{label(entry)}: ours", *map(with_interval, entry.transfer)])
        if report.dataset == "cifar10":
            for name, table in (("as printed", PRINTED), ("measured again", REMEASURED)):
                theirs = table[entry.architecture][entry.training_epsilon]
                rows.append([f"{label(entry)}: {name}", *(f"{value:g}" for value in theirs)])
    return markdown(["trained on", *columns()], rows)


def spread_table(report: StudyReport) -> str:
    """The same training with several seeds, and how far the figures lie apart."""
    rows = []
    for epsilon in dict.fromkeys(entry.training_epsilon for entry in report.entries_of("spread")):
        entries = [entry for entry in report.entries_of("spread") if entry.training_epsilon == epsilon]
        rows += [
            [f"{trained_on(epsilon)}, seed {entry.seed}", *(percent(m.accuracy) for m in entry.transfer)]
            for entry in entries
        ]
        if len(entries) > 1:
            by_radius = zip(*([100 * m.accuracy for m in entry.transfer] for entry in entries), strict=True)
            spread = [f"{max(column) - min(column):.2f} / {statistics.stdev(column):.2f}" for column in by_radius]
            rows.append([f"{trained_on(epsilon)}: range / standard deviation", *spread])
    return markdown(["CNN trained on", *columns()], rows)


def checkpoint_table(report: StudyReport) -> str:
    """A row for each shipped network of the study."""
    rows = []
    for entry in report.entries_of("study"):
        clean, *_, transfer = map(with_interval, entry.transfer)
        rows.append(
            [
                link(entry.name, f"{entry.name}.safetensors"),
                entry.precision,
                percent(entry.validation_accuracy),
                clean,
                transfer,
                with_interval(entry.white_box[-1]),
                code(entry.sha256),
            ]
        )
    header = ["checkpoint", "trained in", "validation", "clean", "transferred 0.1", "white-box 0.1", "SHA-256"]
    return markdown(header, rows)


def times_table(report: WholeStudy) -> str:
    """How many minutes the ten networks of the study took; a dash where a training has left no log."""
    rows = []
    for name in ARCHITECTURES:
        baseline, *retrained = report.entries_of("study", name)
        trainings = [entry.training_seconds for entry in retrained]
        seconds = [
            baseline.training_seconds,
            baseline.adversarial_set_seconds,
            None if None in trainings else sum(filter(None, trainings)),
            sum(entry.evaluation_seconds for entry in (baseline, *retrained)),
        ]
        rows.append([TITLES[name], *("–" if value is None else f"{value / 60:.1f}" for value in seconds)])
    header = ["minutes", "training the baseline", "adversarial sets", "retraining four networks", "testing all five"]
    return markdown(header, rows)


def misses(report: StudyReport) -> list[tuple[StudyEntry, float, float, float]]:
    """The retrained networks' cells below the better of the study's printed and re-measured figures.

    Returns for each cell its entry, its testing radius, our accuracy in [0, 1] and the study's figure in percent.
    """
    found = []
    for entry in report.entries_of("study"):
        if entry.training_epsilon is not None:
            tables = (table[entry.architecture][entry.training_epsilon] for table in (PRINTED, REMEASURED))
            for measurement, *theirs in zip(entry.transfer, *tables, strict=True):
                if round(100 * measurement.accuracy, 2) < max(theirs):
                    found.append((entry, measurement.epsilon, measurement.accuracy, max(theirs)))
    return found


def misses_text(report: StudyReport) -> str:
    """`misses` as a list, a line for each cell."""
    found = [
        f"- {label(entry)}, at {epsilon:g}: {percent(accuracy)} against {best:g}"
        for entry, epsilon, accuracy, best in misses(report)
    ]
    return "\n".join(found) or "None: each is at or above both the printed and the re-measured figure."


def summary(report: StudyReport) -> str:
    """The ten networks of the study as plain text: transferred and white-box accuracy of every network."""
    lines = []
    for setting, title in (("transfer", "FGSM through the baseline"), ("white_box", "FGSM through its own gradient")):
        lines += ["", f"{title}: accuracy in percent, by testing epsilon"]
        lines.append(f"{'network':10}{'trained on':16}" + "".join(f"{epsilon:>8g}" for epsilon in EPSILONS))
        for entry in report.entries_of("study"):
            cells = "".join(f"{100 * measurement.accuracy:8.2f}" for measurement in entry.under(setting))
            lines.append(f"{TITLES[entry.architecture]:10}{trained_on(entry.training_epsilon):16}{cells}")
    return "\n".join(lines)


# ---- CNN against CNN-LSTM ----


def ahead_table(report: WholeStudy) -> str:
    """In how many cells of the study's tables one architecture is ahead by more than the 95 % interval."""
    first, second = (TITLES[name] for name in ARCHITECTURES)
    baselines, *retrained = report.pairs()
    kinds = {  # kind -> the accuracies that are compared, both architectures' in the same order
        # Clean accuracy is the first measurement in either setting.
        "clean": [[entry.transfer[:1] for entry in pair] for pair in report.pairs()],
        "baselines, under their own examples": [[entry.white_box[1:] for entry in baselines]],
        "retrained, transferred FGSM": [[entry.transfer[1:] for entry in pair] for pair in retrained],
        "retrained, white-box FGSM": [[entry.white_box[1:] for entry in pair] for pair in retrained],
    }
    rows = []
    for kind, compared in kinds.items():
        counts, largest_lead = dict.fromkeys((first, second, "neither"), 0), {first: 0.0, second: 0.0}
        for a, b in (cells for pair in compared for cells in zip(*pair, strict=True)):
            low, high = difference_interval(a.accuracy, b.accuracy, report.examples)
            ahead = first if low > 0 else second if high < 0 else "neither"
            counts[ahead] += 1
            if ahead != "neither":
                largest_lead[ahead] = max(largest_lead[ahead], abs(a.accuracy - b.accuracy))
        leads = (
            f"{counts[name]}, by up to {percent(largest_lead[name])}" if counts[name] else "0"
            for name in (first, second)
        )
        rows.append([kind, *leads, str(counts["neither"])])
    return markdown(["cells in which one is ahead", first, second, "neither"], rows)


def conclusion_table(report: WholeStudy, robustness: RobustnessReport | None = None) -> str:
    """The study's conclusion, claim by claim: both figures, and their difference with its 95 % interval.

    robustness: has the robust networks' figures; without it, that claim is left out.
    Raises UserError if `robustness` does not have AutoAttack's results on the robust networks.
    """
    baselines, *_, largest = report.pairs()
    at = f"FGSM at {EPSILONS[-1]:g}"
    radius = largest[0].training_epsilon
    table = [
        _claim("more accurate: baselines, clean", [entry.transfer[0] for entry in baselines], report.examples),
        _claim(
            f"more robust: retrained on {radius:g}, transferred {at}",
            [entry.transfer[-1] for entry in largest],
            report.examples,
        ),
        _claim(f"more robust: the same, white-box {at}", [entry.white_box[-1] for entry in largest], report.examples),
    ]
    if robustness:
        rows = [robustness.entry(f"{name}-robust").find("autoattack", RADIUS) for name in ARCHITECTURES]
        table.append(_claim("more robust: adversarially trained, AutoAttack", rows, examples_of(rows)))
    ours, other = (entry.training_seconds for entry in baselines)
    if ours and other:
        slower = f"{100 * (ours / other - 1):+.0f} %"
        minutes = [f"{ours / 60:.1f} min", f"{other / 60:.1f} min"]
        table.append(["faster to train: baselines", *minutes, slower, "one run each"])
    first, second = (TITLES[name] for name in ARCHITECTURES)
    return markdown([f"the {first} is …", first, second, "difference (95 %)", "so?"], table)


def _claim(claim: str, pair: Sequence[Measured], examples: int) -> list[str]:
    """A row: whether the first accuracy of the pair is higher, by more than the 95 % interval."""
    first, second = (measured.accuracy for measured in pair)
    low, high = difference_interval(first, second, examples)
    verdict = "holds" if low > 0 else "the other way round" if high < 0 else "open"
    difference = f"{100 * (first - second):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    return [claim, percent(first), percent(second), difference, verdict]


# ---- robustness ----


def robustness_document(report: RobustnessReport, logs: Logs) -> str:
    """results/robustness.md: every table of the report on robustness, each under its heading.

    Raises UserError if the report does not have every result.
    """
    on_all, on_some = (f"{count:,}" for count in tested_counts(report))
    opening = (
        f"# Robustness\n\nMade by `python -m study robustness` from robustness.json: accuracy in percent on the "
        f"{on_all} {TITLES.get(report.dataset, report.dataset)} {report.split} images, under PGD and "
        f"AutoAttack on the first {on_some} unless a column says otherwise; in brackets, 95 % Wilson intervals."
    )
    titled = {
        "Who holds": robustness_table(report),
        "Under other strong attacks": strongest_table(report),
        "White-box PGD, by radius": radius_table(report, "pgd", **PGD_20),
        "White-box FGSM, by radius": radius_table(report, "fgsm"),
        "Checkpoints tested": robust_checkpoint_table(report),
        "Four defences on the same network": training_table(logs.defenses),
        "Changes to one short training": candidates_table(logs.candidates),
        "Under the strong attack, on validation images": validation_table(logs.attacked),
        "Catastrophic overfitting": overfitting_table(logs.overfitting),
        "What was tried, and the shipped networks": training_table(logs.tried + logs.shipped),
    }
    return under_headings(opening, titled)


def robustness_table(report: RobustnessReport) -> str:
    """Every network under the attacks, from the weakest attack to the strongest.

    Raises UserError if the report does not have every result.
    """

    def row(entry: RobustnessEntry) -> list[AttackRow]:
        return [
            entry.find("fgsm", 0.0),
            entry.find("fgsm", 0.1, "transfer"),
            entry.find("fgsm", RADIUS),
            entry.find("pgd", RADIUS, "white_box", **PGD_50),
            entry.find("autoattack", RADIUS),
        ]

    attacks = ["clean", "transferred FGSM, 0.1", "white-box FGSM, 8/255", "PGD-50, 10 restarts, 8/255"]
    rows = [[defended(entry), *map(with_interval, row(entry))] for entry in report.entries]
    return markdown(["network, and how it is defended", *attacks, "AutoAttack, 8/255"], rows)


def strongest_table(report: RobustnessReport) -> str:
    """Every network under AutoAttack on two sets of images, under the strong attack on more, and under PGD in L2.

    The column of the second set is left out if the report does not have it, as on digits, which are few.
    Raises UserError if the report does not have every other result.
    """
    _, on_some = tested_counts(report)
    on_more = examples_of([report.entries[0].find("strong", RADIUS)])
    columns: dict[str, dict[str, Any]] = {f"AutoAttack, images 1 to {on_some:,}": {"attack": "autoattack"}}
    if any(row.first for row in report.entries[0].results):
        following = examples_of([report.entries[0].find("autoattack", RADIUS, first=on_some)])
        columns[f"AutoAttack, the next {following:,}"] = {"attack": "autoattack", "first": on_some}
    columns[f"strong attack, images 1 to {on_more:,}"] = {"attack": "strong"}
    columns[f"PGD-50 on the margin, L2, {L2_RADIUS}"] = {"attack": "pgd", "epsilon": L2_RADIUS, **PGD_L2}
    rows = [
        [defended(entry), *(with_interval(entry.find(**{"epsilon": RADIUS, **each})) for each in columns.values())]
        for entry in report.entries
    ]
    return markdown(["network", *columns], rows)


def radius_table(report: RobustnessReport, attack: str, **options: Any) -> str:
    """Every network under one white-box attack at each of RADII. options: of the attack, to choose among its results.

    Raises UserError if the report does not have every result.
    """
    rows = [
        [defended(entry), *(with_interval(entry.find(attack, radius, **options)) for radius in RADII)]
        for entry in report.entries
    ]
    return markdown(["network", *map(epsilon_text, RADII)], rows)


def robust_checkpoint_table(report: RobustnessReport) -> str:
    """The checkpoints of the report, and how long they were attacked."""
    rows = []
    for entry in report.entries:
        minutes = sum(row.seconds for row in entry.results) / 60
        name = link(entry.name, f"{entry.name}.safetensors")
        rows.append([name, f"{entry.parameters:,}", f"{minutes:.1f}", code(entry.sha256)])
    return markdown(["checkpoint", "parameters", "minutes under attack", "SHA-256"], rows)


def tested_counts(report: RobustnessReport) -> tuple[int, int]:
    """How many images FGSM was run on, and how many PGD and AutoAttack. Raises UserError if a result is missing."""
    entry = report.entries[0]
    return examples_of([entry.find("fgsm", 0.0)]), examples_of([entry.find("autoattack", RADIUS)])


def defended(entry: RobustnessEntry) -> str:
    """The heading of an entry's row: the architecture and its defence."""
    title, training = TITLES[entry.architecture], entry.training
    if training is not None and entry.is_wide:
        return f"{title}, none: width {training.width}, {TITLES[training.activation]}"
    if entry.defense == "none" or training is None:
        return f"{title}, none (baseline)"
    name, epsilon = training.defense_name or "", training.defense_epsilon
    if epsilon is None:  # somebody's own
        return f"{title}, {name}"
    if entry.defense == "the study's":
        return f"{title}, the study's: FGSM examples of {epsilon:g}"
    ours = f": {TITLES.get(name, name)} at {epsilon_text(epsilon)}, width {training.width}"
    return joined("", [f"{title}, ", bold("ours"), ours])


def diagnosis_table(reports: Sequence[TestReport]) -> str:
    """The verdicts of `test-*.py --diagnose --json`, a row for each report that has one."""
    rows = []
    for report in reports:
        if diagnosis := report.diagnosis:
            failed = sum(check.passed is False for check in diagnosis.checks)
            passed = f"{len(diagnosis.checks) - failed} of {len(diagnosis.checks)}"
            verdict = diagnosis.verdict.split(":")[0].split(",")[0]
            left = diagnosis.robust_accuracy if diagnosis.at_most is None else diagnosis.at_most  # old reports lack it
            strongest = Point(diagnosis.epsilon, left or 0.0, diagnosis.confidence_interval)
            rows.append([Path(report.checkpoint).stem, passed, verdict, with_interval(strongest)])
    return markdown(
        ["network", "checks passed", "is the evaluation trustworthy?", "left by the strongest attack"], rows
    )


# ---- trainings ----


def training_table(logs: Sequence[Log]) -> str:
    """Defended trainings, by their flags, and the accuracy on validation images after the epoch that was kept."""
    rows = [[_command(log), *_time_and_accuracies(log)] for log in logs]
    return markdown(["training", "minutes", "clean", "PGD-10", "PGD-10 on the margin"], rows)


def candidates_table(logs: Sequence[Log]) -> str:
    """Trainings, by what tells them from the first one; the most robust comes first. Accuracies: `training_table`.

    Trainings at another radius are left out, because their validation images were attacked at that radius.
    """
    comparable = [log for log in logs if log.arguments.defense_epsilon == logs[0].arguments.defense_epsilon]
    by_robustness = sorted(comparable, key=lambda log: -(best_epoch(log.epochs).choosing_accuracy or 0))
    rows = [[_changes(logs[0], log), str(len(log.epochs)), *_time_and_accuracies(log)] for log in by_robustness]
    return markdown(["what is changed", "epochs", "minutes", "clean", "PGD-10", "PGD-10 on the margin"], rows)


def validation_table(attacked: Sequence[tuple[Log, AttackRow]]) -> str:
    """Defended trainings, by their flags, and the strong attack on validation images beside the others.

    The training measured PGD at the radius of its defence: at another radius than that of the strong attack, PGD is
    left out.
    """
    rows = []
    for log, row in sorted(attacked, key=lambda pair: (_command(pair[0]), pair[1].accuracy)):
        clean, *pgd = _kept_accuracies(log)
        if log.arguments.defense_epsilon != row.epsilon:
            pgd = ["–"] * len(pgd)
        rows.append([_command(log), clean, *pgd, with_interval(row), f"{row.examples:,}"])
    return markdown(["training", "clean", "PGD-10", "PGD-10 on the margin", "strong", "images"], rows)


def _time_and_accuracies(log: Log) -> list[str]:
    """The minutes of a defended training, and the accuracies of what is kept of it."""
    return [f"{log.seconds / 60:.1f}", *_kept_accuracies(log)]


def _kept_accuracies(log: Log) -> list[str]:
    """The accuracies of a defended training on validation images, after the epoch that was kept."""
    kept = best_epoch(log.epochs)
    return _percentages(kept.validation_accuracy, kept.robust_accuracy, kept.choosing_accuracy)


def _changes(before: Log, after: Log) -> str:
    """What tells a defended training from another, apart from its length: the names and values of its options.

    The name of another defence stands for its usual options. An option that a log lacks is 0.
    """
    old, new = _options(before), _options(after)
    same = new["defense"] == old["defense"]
    implied = {} if same else _usual_options(after.arguments)
    new = (dict.fromkeys(old, 0) if same else {}) | new
    changed = {name: value for name, value in new.items() if value not in (old.get(name, 0), implied.get(name, ...))}
    return ", ".join(_option_texts(changed)) or "nothing"


def _options(log: Log) -> dict[str, Any]:
    """The defence, all that a training was given but the number of epochs, and the options of the defence."""
    arguments = log.arguments
    asked = {"defense": None} | asdict(arguments)  # the defence comes first
    asked |= {"defense": arguments.defense_name, "precision": log.epochs[0].precision}
    del asked["epochs"]
    return asked | _usual_options(arguments) | arguments.defense_options


def _usual_options(arguments: TrainingArguments) -> dict[str, Any]:
    """The name of the defence and its defaults, at 8/255."""
    defense = DEFENSES.get(arguments.defense_name or "")
    return {"name": arguments.defense_name, **USUAL_OPTIONS, **(vars(defense(RADIUS)) if defense else {})}


def overfitting_table(logs: Sequence[Log]) -> str:
    """Defended trainings, by their flags, and the accuracy on validation images after each of the last two epochs."""
    rows = []
    for log in logs:
        for epoch in log.epochs[-2:]:
            accuracies = _percentages(epoch.validation_accuracy, epoch.single_step_accuracy, epoch.robust_accuracy)
            rows.append([_command(log), str(epoch.epoch), *accuracies])
    return markdown(["training", "epoch", "clean", "a single step (FGSM)", "PGD-10"], rows)


def _percentages(*accuracies: float | None) -> list[str]:
    return ["–" if accuracy is None else percent(accuracy) for accuracy in accuracies]


def _command(log: Log) -> str:
    """The command of a defended training, with the flags that tell it from others. Words name what is not a flag."""
    arguments = log.arguments
    recipe, replaced = nearest_recipe(arguments)
    usual = _usual_options(arguments)
    flags: dict[str, Any] = {} if recipe == "one-cycle" else {"recipe": recipe}
    flags |= {"defense": arguments.defense_name}
    options = {name: value for name, value in arguments.defense_options.items() if value != usual.get(name, 0)}
    asked = [name for name in options if arguments.defense_name in DEFENSES_OF_FLAG.get(name, ())]
    flags |= {name: options.pop(name) for name in asked}
    flags |= {"width": arguments.width, "epochs": arguments.epochs, **replaced}
    others = {
        "dataset": (arguments.dataset, "cifar10"),
        "seed": (arguments.seed, 0),
        "precision": (log.epochs[0].precision, "float32"),
        "init_sha256": (arguments.init_sha256, None),
    }
    flags |= {name: value for name, (value, default) in others.items() if value != default}
    known = {"recipe", "defense", *DEFENSES_OF_FLAG, "width", "dataset", "seed", "precision"}
    known |= {name for name, *_ in flags_of_recipe()}
    texts = [f"--{name.replace('_', '-')} {_option_text(name, flags.pop(name))}" for name in [*flags] if name in known]
    words = [*_option_texts(options), *_option_texts(flags)]
    return joined(", ", [code(f"train-{arguments.network}.py {' '.join(texts)}"), *words])


def _option_texts(options: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {_option_text(name, value)}" for name, value in options.items()]


def _option_text(name: str, value: Any) -> str:
    """The value of an option of a training, as its flag takes it: rounded only where that changes nothing."""
    if not isinstance(value, float):
        return str(value)
    write, read = (epsilon_text, types.radius) if name == "epsilon" else ("{:g}".format, float)
    text = write(value)
    return text if read(text) == value else str(value)


def cost_table(tested: Mapping[str, tuple[nn.Module, Log]]) -> str:
    """Parameters, multiply-adds and training time. tested: name -> the network and the log of its training."""
    rows = []
    for name, (network, log) in tested.items():
        parameters = sum(parameter.numel() for parameter in network.parameters())
        size = [str(log.arguments.width), f"{parameters:,}", f"{multiply_adds(network):,}"]
        rows.append([name, *size, f"{log.seconds / 60:.1f}", log.epochs[0].precision])
    header = ["network", "width", "parameters", "multiply-adds an image", "training, minutes", "trained in"]
    return markdown(header, rows)


def attacked_table(networks: Mapping[str, nn.Module], split: Split, epsilon: float, *, progress: bool = False) -> str:
    """Networks, by name, on the split's images: clean, under white-box FGSM and under PGD-20 at one radius."""
    rows = []
    for name, network in networks.items():
        results = evaluate_fgsm(network, split, [epsilon], progress=progress)
        results.append(evaluate(network, split, "pgd", epsilon, options=PGD_20, progress=progress))
        rows.append([name, *map(with_interval, results)])
    at = epsilon_text(epsilon)
    return markdown([f"first {len(split):,} test images", "clean", f"FGSM, {at}", f"PGD-20, {at}"], rows)


# ---- words that several tables use ----


def label(entry: StudyEntry) -> str:
    """Architecture and training of a network."""
    return f"{TITLES[entry.architecture]}, {trained_on(entry.training_epsilon)}"


def trained_on(epsilon: float | None) -> str:
    """What a network was trained on. epsilon: the radius of the FGSM examples; None: clean images."""
    return "clean images" if epsilon is None else f"epsilon {epsilon_text(epsilon)}"


def columns() -> list[str]:
    """The headings of the testing radii."""
    return [f"{epsilon:g}" for epsilon in EPSILONS]
