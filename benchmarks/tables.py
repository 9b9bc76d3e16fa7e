"""The reports of the benchmarks as Markdown tables. A ratio is how many times faster ours was."""

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.formats import AgreementReport, BenchmarkReport, Contender, MemoryGrowth, SpeedGrowth, TimedTraining
from study.paper import PRINTED
from utils.constants import TITLES
from utils.tables import Markup, bold, markdown, percent, plain, under_headings

STUDYS_ACCURACY = f"{PRINTED['cnn'][None][0]} %"  # of the study's CNN on clean images
PEERS_FORMATS = {"contiguous_format": "out of the box", "channels_last": "all channels_last"}


def agreement_table(report: AgreementReport) -> str:
    """What our attacks and the peers' say of the same checkpoints."""
    titles = {"fgsm": "FGSM", "pgd": f"PGD-{report.steps}", "pgd_l2": f"PGD-{report.steps} in L2", "mi_fgsm": "MI-FGSM"}
    titles |= {"targeted": "reached by targeted PGD"}
    rows = [
        [
            entry.name,
            *(f"{percent(getattr(entry.ours, name))} / {percent(getattr(entry.peers, name))}" for name in titles),
            f"{entry.pixels_that_differ:,} of {entry.pixels:,}",
        ]
        for entry in report.entries
    ]
    return markdown(["network", *titles.values(), "pixels of FGSM that differ"], rows)


def radii_table(report: AgreementReport) -> str:
    """The smallest radii at which images fall, in 255ths of a pixel's range: our search and a peer's."""
    rows = [
        [each.name, f"{255 * each.ours:.2f}", f"{255 * each.peers:.2f}", f"{each.ratio:.2f}"] for each in report.radii
    ]
    return markdown(["network", "our median", "foolbox's median", "ours / foolbox's, median of the images"], rows)


def benchmarks_table(report: BenchmarkReport) -> str:
    """A row for each comparison that has been made: ours and the fastest of the others.

    Adversarial sets have two rows: beside the study's own way, and beside that way with more workers.
    """
    compared: list[tuple[str, Sequence[Contender]]] = []
    for attack in report.attacks or []:
        if attack.batch in (1, 250):
            name, *how = attack.attack.split(" ", 1)
            what = (
                f"{TITLES.get(attack.network, attack.network)}, {' '.join([name.upper(), *how])}, batch {attack.batch}"
            )
            compared.append((f"{what}, {PEERS_FORMATS[attack.peers_memory_format]}", attack.rows))
    for sets in report.adversarial_sets or []:
        ours, *others = sets.rows
        what = f"FGSM examples of {sets.images:,} images, {sets.epsilons} epsilon"
        compared += [(what, [ours, other]) for other in others]
    for training in report.training or []:
        compared.append((f"training, defence {training.defense}", training.rows))
    if report.time_to_accuracy:
        compared.append((f"training to {STUDYS_ACCURACY}", report.time_to_accuracy.rows))
    lines = []
    for what, rows in compared:
        fastest = fastest_of_the_others(rows)
        lines.append([what, speed(rows[0]), f"{fastest.name}: {speed(fastest)}", ratio(fastest)])
    return markdown(["", "here", "beside", "times faster"], lines)


def benchmarks_document(report: BenchmarkReport) -> str:
    """results/benchmarks.md: every section of the report that has been run."""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items() if number)
    about = f"{report.device}, {report.cores} cores, {report.threads} threads, Python {report.python}, {versions}"
    opening = (
        f"# Benchmarks\n\nMade by `python -m benchmarks.run` from benchmarks.json: {plain(about)}; "
        f"{TITLES.get(report.dataset, report.dataset)}. Contenders ran in turn: medians, and in brackets "
        "interquartile ranges; *ratio* is how many times faster ours was in the same round."
    )
    if report.quick:
        opening += " **A quick run, to see whether everything runs: no figure means anything.**"
    return under_headings(opening, sections(report))


def sections(report: BenchmarkReport) -> Mapping[str, str]:
    """The sections of results/benchmarks.md that have been run, by title."""
    titled = {}
    if report.attacks:
        titled["Attacks, images a second"] = attack_speed_table(report)
    for sets in report.adversarial_sets or []:
        titled[f"Adversarial sets: {sets.epsilons} epsilon"] = contenders_table(sets.rows)
    for training in report.training or []:
        titled[f"Training: defence {training.defense}"] = contenders_table(training.rows)
    if timed := report.time_to_accuracy:
        titled[f"Time to the study's {STUDYS_ACCURACY}"] = (
            f"Ours in {timed.epochs} epochs and {timed.precision}, against the plain loop. "
            f"{accuracies_by_seed(timed, 'Test')}"
        )
    if timed := report.ablation:
        titled["The tricks of the recipe fast"] = (
            f"{timed.epochs} epochs in {timed.precision}.\n\n{ablation_table(timed)}"
        )
    if timed := report.processes:
        reached = accuracies_by_seed(timed, "Validation")
        titled["Many processes"] = f"The same training of {timed.epochs} epochs in {timed.precision}. {reached}"
    for title, rows in (report.startup or {}).items():
        titled[f"Start-up: {title}"] = contenders_table(rows)
    if report.growth:
        titled["How the cost grows"] = speed_growth_table(report.growth)
    if report.memory:
        titled["Peak memory, MiB"] = memory_growth_table(report.memory)
    if report.profile:
        titled["Where the time goes"] = profile_table(report.profile)
    return titled


def attack_speed_table(report: BenchmarkReport) -> str:
    """Ours and each peer's speed, and our ratio to the fastest peer."""
    attacks = report.attacks or []
    lines = [
        [
            attack.network,
            attack.attack,
            str(attack.batch),
            attack.peers_memory_format.replace("_format", ""),
            *(f"{row.images_per_second or 0:,.0f}" for row in attack.rows),
            ratio(fastest_of_the_others(attack.rows)),
        ]
        for attack in attacks
    ]
    names = [row.name for row in attacks[0].rows] if attacks else []
    return markdown(
        ["network", "attack", "batch", "the peers' memory format", *names, "ratio to the fastest peer"], lines
    )


def accuracies_by_seed(timed: TimedTraining, split: str) -> str:
    """A sentence with the accuracy of each contender with each seed, above the table of their times."""
    reached = "; ".join(f"{name} {', '.join(map(percent, seeds))}" for name, seeds in timed.accuracies.items())
    return f"{split} accuracy in percent, by seed: {plain(reached)}.\n\n{contenders_table(timed.rows)}"


def ablation_table(timed: TimedTraining) -> str:
    """Mean validation accuracy and seconds of a recipe, and of the same recipe with each of its tricks left out."""
    means = {name: mean(seeds) for name, seeds in timed.accuracies.items() if seeds}
    lines = [
        [
            row.name,
            percent(means[row.name]),
            f"{100 * (means[row.name] - means.get(timed.rows[0].name, 0)):+.2f}",
            ", ".join(map(percent, timed.accuracies[row.name])),
            f"{row.seconds:.3g}",
        ]
        for row in timed.rows
        if row.name in means
    ]
    return markdown(["", "mean validation accuracy (%)", "difference", "by seed", "seconds"], lines)


def contenders_table(rows: Sequence[Contender]) -> str:
    """A row for each contender of a comparison."""
    lines = [
        [
            row.name,
            f"{row.seconds:.3g} " + ("(few runs)" if row.seconds_iqr is None else f"({row.seconds_iqr:.1g})"),
            f"{row.images_per_second:,.0f}" if row.images_per_second else "",
            ratio(row),
        ]
        for row in rows
    ]
    return markdown(["", "seconds", "images a second", "ratio"], lines)


def speed_growth_table(rows: Sequence[SpeedGrowth]) -> str:
    """The speed by what it grows with."""
    lines = [[row.what, row.axis, f"{row.images_per_second:,.0f}"] for row in rows]
    return markdown(["what", "by", "images per second"], lines)


def memory_growth_table(rows: Sequence[MemoryGrowth]) -> str:
    """The peak memory by what it grows with."""
    return markdown(["what", "by", "peak mebibytes"], [[row.what, row.axis, f"{row.peak_mebibytes:,}"] for row in rows])


def profile_table(profile: Mapping[str, Mapping[str, float]]) -> str:
    """The share of each kind of operation in the time, in percent: a row for each thing that was profiled."""
    kinds = list(dict.fromkeys(kind for shares in profile.values() for kind in shares))
    lines = [[what, *(f"{100 * shares.get(kind, 0):.0f}" for kind in kinds)] for what, shares in profile.items()]
    return markdown(["share of the time (%)", *kinds], lines)


def fastest_of_the_others(rows: Sequence[Contender]) -> Contender:
    """The fastest contender except ours, which is the first."""
    return min(rows[1:], key=lambda row: row.ratio)


def ratio(row: Contender) -> str:
    """How many times faster ours was, and the interquartile range."""
    return Markup(f"{bold(f'{row.ratio:.2f}')} ({row.ratio_iqr:.2f})")


def speed(row: Contender) -> str:
    """Images per second or, where it is not a matter of images, seconds."""
    return f"{row.images_per_second:,.0f} images/s" if row.images_per_second else f"{row.seconds:.3g} s"
