"""TODO: benchmarks.tables."""

from study.paper import PRINTED
from utils.constants import TITLES
from utils.tables import markdown, percent


def agreement_table(report):
    """Our attacks and a peer's on the same checkpoints; report: what benchmarks/agreement.py wrote."""
    peer, steps = report["peer"].split()[0], report["steps"]
    header = ["network", "FGSM", f"{peer}'s FGSM", "pixels that differ", f"PGD-{steps}", f"{peer}'s PGD-{steps}"]
    rows = []
    for row in report["networks"]:
        fgsm, theirs, pgd, their_pgd = (percent(row[key]) for key in ("fgsm", "peer_fgsm", "pgd", "peer_pgd"))
        differ = f"{row['pixels_that_differ']:,} of {row['pixels']:,}"
        rows.append([row["name"], fgsm, theirs, differ, pgd, their_pgd])
    return markdown(header, rows)


def benchmarks_table(report):
    """For README: each comparison in results/benchmarks.json that has been made, with the fastest of the others.

    With two of them, where one is how the study did it and the other is faster.
    """
    compared = []
    for part in report.get("attacks", []):
        if part["batch"] in (1, 250):
            theirs = {"contiguous_format": "out of the box", "channels_last": "all channels_last"}
            what = f"{part['attack'].upper()}, batch {part['batch']}, {theirs[part['peers_memory_format']]}"
            compared.append((what, part["rows"]))
    for part in report.get("adversarial-sets", []):
        what, (ours, *others) = f"FGSM examples of {part['images']:,} images, {part['epsilons']} epsilon", part["rows"]
        compared += [(what, [ours, other]) for other in others]  # as the study did it, and with workers
    for part in report.get("training", []):
        compared.append((f"training, defence {part['defense']}", part["rows"]))
    if "time-to-accuracy" in report:
        compared.append((f"training to {PRINTED['cnn'][None][0]} %", report["time-to-accuracy"]["rows"]))
    lines = []
    for what, rows in compared:
        fastest = fastest_of_the_others(rows)
        lines.append([what, speed(rows[0]), f"{fastest['name']}: {speed(fastest)}", ratio(fastest)])
    return markdown(["", "here", "beside", "times faster"], lines)


def fastest_of_the_others(rows):
    """Of the rows of benchmarks/timing.py, of which the first is ours."""
    return min(rows[1:], key=lambda row: row["ratio"])


def ratio(row):
    """How many times faster ours was than a row of benchmarks/timing.py, and its interquartile range."""
    return f"**{row['ratio']:.2f}** ({row['ratio_iqr']:.2f})"


def speed(row):
    """Of a row of benchmarks/timing.py."""
    return f"{row['images_per_second']:,.0f} images/s" if row["images_per_second"] else f"{row['seconds']:.3g} s"


def benchmarks_document(report):
    """results/benchmarks.md: every section of the report that benchmarks/run.py writes, as far as it has been run."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    opening = (
        f"# Benchmarks\n\nMade by `make benchmark` from benchmarks.json: {report['device']}, {report['cores']} cores, "
        f"{report['threads']} threads, Python {report['python']}, {versions}; "
        f"{TITLES.get(report['dataset'], report['dataset'])}. Contenders ran in turn: medians, and in brackets "
        "interquartile ranges; *ratio* is how many times faster ours was in the same round."
    )
    if report["quick"]:
        opening += " **A quick run, to see whether everything runs: no figure means anything.**"
    titled = {}
    if "attacks" in report:
        titled["Attacks, images a second"] = attack_speed_table(report)
    for title, key in (("Adversarial sets", "adversarial-sets"), ("Training", "training")):
        for part in report.get(key, []):
            what = f"{part['epsilons']} epsilon" if "epsilons" in part else f"defence {part['defense']}"
            titled[f"{title}: {what}"] = contenders_table(part["rows"])
    if "time-to-accuracy" in report:
        part = report["time-to-accuracy"]
        text = (
            f"Ours in {part['epochs']} epochs and {part['precision']}, three times, against the mean of the plain loop "
            f"before and after. {accuracies(part, 'Test')}"
        )
        titled[f"Time to the study's {PRINTED['cnn'][None][0]} %"] = text
    if "processes" in report:
        part = report["processes"]
        text = f"The same training of {part['epochs']} epochs in {part['precision']}. {accuracies(part, 'Validation')}"
        titled["Many processes"] = text
    for title, rows in report.get("startup", {}).items():
        titled[f"Start-up: {title}"] = contenders_table(rows)
    if "growth" in report:
        titled["How the cost grows"] = growth_table(report["growth"], "images_per_second")
    if "memory" in report:
        titled["Peak memory, MiB"] = growth_table(report["memory"], "peak_mebibytes")
    return "\n\n".join([opening, *(f"## {title}\n\n{text}" for title, text in titled.items())]) + "\n"


def attack_speed_table(report):
    """Ours and each peer's speed, and our ratio to the fastest peer."""
    names = [row["name"] for row in report["attacks"][0]["rows"]]
    lines = []
    for part in report["attacks"]:
        lines.append(
            [
                part["attack"],
                str(part["batch"]),
                part["peers_memory_format"].replace("_format", ""),
                *(f"{row['images_per_second']:,.0f}" for row in part["rows"]),
                ratio(fastest_of_the_others(part["rows"])),
            ]
        )
    return markdown(["attack", "batch", "the peers' memory format", *names, "ratio to the fastest peer"], lines)


def accuracies(part, split):
    """What each contender came to with each seed, above the table."""
    reached = "; ".join(f"{name} {', '.join(map(percent, of_seeds))}" for name, of_seeds in part["accuracies"].items())
    return f"{split} accuracy in percent, by seed: {reached}.\n\n{contenders_table(part['rows'])}"


def contenders_table(rows):
    lines = [
        [
            row["name"],
            f"{row['seconds']:.3g} " + ("(mean of 2)" if row["seconds_iqr"] is None else f"({row['seconds_iqr']:.1g})"),
            f"{row['images_per_second']:,.0f}" if row["images_per_second"] else "",
            ratio(row),
        ]
        for row in rows
    ]
    return markdown(["", "seconds", "images a second", "ratio"], lines)


def growth_table(rows, value):
    lines = []
    for row in rows:
        (axis, *_) = row
        lines.append([row["what"], f"{axis} {row[axis]}", f"{row[value]:,.0f}"])
    return markdown(["what", "by", value.replace("_", " ")], lines)
