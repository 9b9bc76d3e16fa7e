"""The study's two reports: what is written is read back, and what is read can be shown by every table and figure."""

import copy
import json
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from study import figures, robustness, tables
from study.formats import (
    Measurement,
    RobustnessEntry,
    RobustnessReport,
    StudyEntry,
    StudyReport,
    WholeStudy,
    read_robustness,
    read_study,
    read_whole_study,
)
from study.paper import TRAINING_EPSILONS
from study.robustness import Logs
from tests.helpers.instances import instances
from tests.helpers.project import ROOT
from utils.constants import ARCHITECTURES, EPSILONS, UserError
from utils.formats import AttackRow, TrainingArguments, write_document

RESULTS = ROOT / "results"
SHIPPED = {name: json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in ("study", "robustness")}
NO_LOGS = Logs(*([] for _ in Logs._fields))

FRACTIONS = st.floats(0, 1)
INTERVALS = st.tuples(FRACTIONS, FRACTIONS)
DEFENSES = st.sampled_from(
    [None, "my|loss\n", {"name": "$mine$"}, {"name": "n-fgsm", "epsilon": 0.1}, {"name": "fgsm-augment", "epsilon": 0}]
)
TRAININGS = st.none() | instances(TrainingArguments, defense=DEFENSES)
MEASUREMENTS = st.tuples(
    *(
        st.builds(Measurement, epsilon=st.just(epsilon), accuracy=FRACTIONS, confidence_interval=INTERVALS)
        for epsilon in EPSILONS
    )
)
FIELDS = {
    "training": TRAININGS,
    "transfer": MEASUREMENTS,
    "white_box": MEASUREMENTS,
    "adversarial_set_seconds": st.floats(0, 1e18),
}
ENTRIES = instances(StudyEntry, training_epsilon=st.sampled_from([None, *TRAINING_EPSILONS]), **FIELDS)


@st.composite
def whole_studies(draw):
    """Reports with every network of the study, and some others."""
    drawn, others = draw(st.lists(ENTRIES, min_size=1, max_size=2)), draw(st.lists(ENTRIES, max_size=3))
    entries = [
        replace(draw(st.sampled_from(drawn)), part="study", architecture=architecture, training_epsilon=epsilon)
        for architecture, epsilon in product(ARCHITECTURES, (None, *TRAINING_EPSILONS))
    ]
    entries += [entry for entry in others if entry.part != "study"]
    return draw(instances(WholeStudy, entries=st.just(entries)))


@st.composite
def robustness_reports(draw):
    """Reports in which every attack was run on every network."""
    examples = draw(st.integers(1, 10**9))
    everything = draw(st.integers(examples, 10**9))
    plan = [(test, radius) for test in robustness.tests(everything, examples) for radius in test.radii]
    accuracies = draw(st.lists(FRACTIONS, min_size=len(plan), max_size=len(plan)))
    rows = [
        AttackRow(
            name=test.attack,
            setting=test.setting,
            epsilon=radius,
            first=test.first,
            examples=test.examples,
            accuracy=accuracy,
            confidence_interval=(accuracy, accuracy),
            seconds=1,
            **test.options,
        )
        for (test, radius), accuracy in zip(plan, accuracies, strict=True)
    ]
    entry = instances(RobustnessEntry, training=TRAININGS, results=st.just(rows))
    return draw(instances(RobustnessReport, entries=st.lists(entry, min_size=1, max_size=4)))


ANY_ROBUSTNESS = instances(
    RobustnessReport,
    entries=st.lists(
        instances(RobustnessEntry, training=TRAININGS, results=st.lists(instances(AttackRow, examples=st.just(5)))),
        min_size=1,
        max_size=2,
    ),
)


def show_study(report: WholeStudy) -> None:
    """Make every table and each kind of figure of the study, as the command and the notebooks do."""
    for make in (tables.document, tables.ahead_table, tables.conclusion_table, tables.summary):
        assert make(report).encode()
    figures.networks_compared(report)
    figures.difference_of_networks(report)
    for make in (figures.transfer_accuracy, figures.change_against_baseline, figures.transfer_and_white_box):
        make(report, "cnn-lstm")
    plt.close("all")


def show_robustness(report: RobustnessReport) -> None:
    """Make every table and the figure of the report on robustness."""
    try:
        assert tables.robustness_document(report, NO_LOGS).encode()
        figures.robust_accuracy(report)
    finally:
        plt.close("all")


# ---- what is written is read back, and can be shown ----


@pytest.mark.parametrize(
    ("reports", "read"),
    [
        (instances(StudyReport, entries=st.lists(ENTRIES, max_size=3)), read_study),
        (whole_studies(), read_whole_study),
        (ANY_ROBUSTNESS, read_robustness),
        (robustness_reports(), read_robustness),
    ],
    ids=["study", "whole study", "robustness", "whole robustness"],
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back_equal(reports, read, data, tmp_path_factory):
    report = data.draw(reports)
    path = tmp_path_factory.mktemp("report") / "a.json"
    write_document(path, report)
    assert read(path) == report


@settings(max_examples=5, deadline=None)
@given(whole_studies())
def test_every_table_and_figure_shows_a_whole_study(report):
    show_study(report)


@settings(max_examples=20, deadline=None)
@given(robustness_reports())
def test_every_table_and_figure_shows_a_whole_report_on_robustness(report):
    show_robustness(report)


@settings(max_examples=20, deadline=None)
@given(ANY_ROBUSTNESS)
def test_a_result_that_is_missing_is_named_in_one_line(report):
    with pytest.raises(UserError, match="python -m study robustness completes it") as raised:
        show_robustness(report)
    assert str(raised.value).isprintable()


def test_shipped_reports_are_read_and_shown():
    show_study(read_whole_study(RESULTS / "study.json"))
    report = read_robustness(RESULTS / "robustness.json")
    show_robustness(report)
    assert tables.conclusion_table(read_whole_study(RESULTS / "study.json"), report)


# ---- reports that somebody has changed ----


def changed(name: str, folder: Path, change) -> Path:
    """A copy of a shipped report, changed in place by a function."""
    report = copy.deepcopy(SHIPPED[name])
    change(report)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report))
    return path


def integer_accuracies(report: dict) -> None:
    for entry in report["networks"]:
        for row in (*entry.get("transfer", []), *entry.get("white_box", []), *entry.get("results", [])):
            row["accuracy"] = 1


@pytest.mark.parametrize(
    ("name", "read", "show"),
    [("study", read_whole_study, show_study), ("robustness", read_robustness, show_robustness)],
)
def test_an_accuracy_that_is_an_int_is_a_number_like_any_other(name, read, show, tmp_path):
    report = read(changed(name, tmp_path, integer_accuracies))
    show(report)


def without(key: str):
    """A change: the sixth network loses a field, or each of its measurements does."""

    def change(report: dict) -> None:
        entry = report["networks"][5]
        for holder in (entry, *entry.get("white_box", []), *entry.get("results", [])):
            holder.pop(key, None)

    return change


def other_radius(report: dict) -> None:
    report["networks"][0]["transfer"][1]["epsilon"] = 0.03


def one_radius_less(report: dict) -> None:
    report["networks"][0]["transfer"].pop()


STUDY_CHANGES = {
    "no networks": lambda report: report.update(networks=[]),
    "a network is missing": lambda report: report["networks"].pop(0),
    "a network comes twice": lambda report: report["networks"].insert(0, report["networks"][0]),
    "another radius": other_radius,
    "a radius less": one_radius_less,
    "another training radius": lambda report: report["networks"][1].update(training_epsilon=0.3),
    "another network": lambda report: report["networks"][0].update(network="small-cnn"),
    "another data set": lambda report: report.update(dataset="$x$"),
    "an unknown field": lambda report: report.update(sneaked="in"),
    "a newer format": lambda report: report.update(format=2),
    **{f"without {key}": without(key) for key in ("training_seconds", "adversarial_set_seconds", "evaluation_seconds")},
    **{f"without {key}": without(key) for key in ("validation_accuracy", "epsilon")},
}


@pytest.mark.parametrize("change", STUDY_CHANGES.values(), ids=STUDY_CHANGES)
def test_a_changed_study_is_refused_in_one_line(change, tmp_path):
    path = changed("study", tmp_path, change)
    with pytest.raises(UserError, match=r"study\.json is not a report of the whole study \(.+\)") as raised:
        read_whole_study(path)
    assert "\n" not in str(raised.value)


ROBUSTNESS_CHANGES = {
    "no networks": lambda report: report.update(networks=[]),
    "another network": lambda report: report["networks"][0].update(network="small-cnn"),
    "an unknown field": lambda report: report["networks"][0].update(sneaked="in"),
    **{f"without {key}": without(key) for key in ("sha256", "training", "accuracy", "examples", "seconds")},
}


@pytest.mark.parametrize("change", ROBUSTNESS_CHANGES.values(), ids=ROBUSTNESS_CHANGES)
def test_a_changed_report_on_robustness_is_refused_in_one_line(change, tmp_path):
    path = changed("robustness", tmp_path, change)
    with pytest.raises(UserError, match=r"robustness\.json is not a report on robustness \(.+\)") as raised:
        read_robustness(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("factor", "count"), [(0, 0), (2, 2)])
def test_results_that_are_missing_or_come_twice_are_one_line(factor, count, tmp_path):
    def change(report: dict) -> None:
        report["networks"][0]["results"] *= factor

    report = read_robustness(changed("robustness", tmp_path, change))
    for show in (tables.robustness_table, figures.robust_accuracy):
        with pytest.raises(UserError, match=f"has {count} results, instead of one, of fgsm"):
            show(report)
    plt.close("all")


def test_a_conclusion_without_the_robust_networks_is_one_line(tmp_path):
    def drop(report):
        report["networks"] = [network for network in report["networks"] if network["name"] != "cnn-robust"]

    path = changed("robustness", tmp_path, drop)
    with pytest.raises(UserError, match="has 0 networks, instead of one, called 'cnn-robust'"):
        tables.conclusion_table(read_whole_study(RESULTS / "study.json"), read_robustness(path))
