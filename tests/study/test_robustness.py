"""The report on robustness: it measures what it says, skips what is done, and its tables and figures show it."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from msgspec.structs import asdict, replace

from study import figures, robustness, tables
from study.formats import RobustnessEntry, read_robustness
from study.robustness import RADII, measure
from utils import evaluation, plotting
from utils.checkpoints import load_checkpoint
from utils.constants import PGD_20, RADIUS, UserError
from utils.evaluation import evaluate, evaluate_fgsm
from utils.recipes import RECIPES
from utils.tables import with_interval
from utils.training import train

LOG_HEADER = {
    **asdict(replace(RECIPES["one-cycle"], epochs=2)),
    "network": "cnn",
    "width": 32,
    "dataset": "cifar10",
    "seed": 0,
    "threads": 2,
    "versions": {},
}


@pytest.fixture(scope="module")
def networks(trained, digits, tmp_path_factory):
    """The networks of a report, by path: a baseline and another CNN."""
    other = tmp_path_factory.mktemp("other") / "cnn-other.safetensors"
    recipe = replace(RECIPES["paper"], epochs=3)
    train("cnn", digits["train"], digits["validation"], recipe, output=other, width=8, seed=1, quiet=True)
    return {path: load_checkpoint(path) for path in (trained("cnn"), other)}


@pytest.fixture
def quick(monkeypatch):
    """Attacks that take a second, for tests that do not depend on their strength."""
    monkeypatch.setattr(robustness, "PGD_50", {"steps": 2, "restarts": 2, "seed": 0})
    monkeypatch.setattr(robustness, "AUTOATTACK", {"seed": 0, "attacks": ["apgd-ce"]})


@pytest.fixture(scope="module")
def measured(networks, digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "robustness.json"
    return measure(networks, digits["test"].first(40), path, examples=8, quiet=True), path


def test_it_measures_what_it_says(measured, networks, digits):
    report, path = measured
    assert read_robustness(path) == report
    assert [path.name for path in path.parent.iterdir()] == ["robustness.json"]
    split = digits["test"].first(40)
    source, other = networks.values()
    baseline, entry = report.entries
    transferred = evaluate_fgsm(other, split, RADII, source=source)
    white_box = evaluate_fgsm(other, split, RADII)
    for setting, results in (("transfer", transferred), ("white_box", white_box)):
        for result in results:
            row = entry.find("fgsm", result.epsilon, setting)
            assert (row.accuracy, row.examples) == (result.accuracy, 40)
    for options in (PGD_20, {"steps": 50, "restarts": 10, "seed": 0}):
        result = evaluate(other, split.first(8), "pgd", RADIUS, options=options)
        row = entry.find("pgd", RADIUS, **options)
        assert (row.accuracy, row.examples) == (result.accuracy, 8)
    on_itself, on_the_baseline = (
        [baseline.find("fgsm", radius, setting).accuracy for radius in RADII] for setting in ("white_box", "transfer")
    )
    assert on_itself == on_the_baseline  # which is the same network
    assert entry.find("autoattack", RADIUS).accuracy <= entry.find("pgd", RADIUS, steps=50).accuracy


@pytest.mark.slow
def test_what_is_done_is_skipped_and_what_changed_is_not(measured, networks, digits, tmp_path, quick, monkeypatch):
    path = tmp_path / "robustness.json"
    split = digits["test"].first(20)
    first = measure(networks, split, path, examples=4, quiet=True)
    runs = []
    run = robustness.Test.run
    monkeypatch.setattr(robustness.Test, "run", lambda self, *a, **k: runs.append(self.attack) or run(self, *a, **k))
    assert measure(networks, split, path, examples=4, quiet=True) == first
    assert runs == []

    holed = json.loads(path.read_text())
    baseline, entry = holed["networks"]
    entry["results"] = [row for row in entry["results"] if row["name"] != "autoattack"]
    entry["threads"] = 99  # the number of threads changes no figure
    entry["versions"]["torch"] += ".of-another-build" if "+" in entry["versions"]["torch"] else "+of-another-build"
    baseline["sha256"] = "0" * 64  # another baseline
    path.write_text(json.dumps(holed))
    with pytest.raises(UserError, match=r"of other checkpoints.*would be lost.*--overwrite"):
        measure(networks, split, path, examples=4, quiet=True)
    assert json.loads(path.read_text()) == holed
    again = measure(networks, split, path, examples=4, overwrite=True, quiet=True)
    assert runs.count("autoattack") == 2
    assert runs.count("fgsm") == 2
    assert len(runs) == 2 + len(RADII) + 1 + 1 + 1

    def accuracies(report):
        return [[row.accuracy for row in entry.results] for entry in report.entries]

    assert accuracies(again) == accuracies(first)
    with pytest.raises(UserError, match="numbers of images"):
        measure(networks, split, path, examples=5, quiet=True)
    assert read_robustness(path) == again
    measure(networks, split, path, examples=5, overwrite=True, quiet=True)
    assert runs.count("pgd") == (len(RADII) + 1) * 3  # other images, for both networks


@pytest.mark.slow
def test_figures_of_another_version_of_an_attack_are_measured_again(networks, digits, tmp_path, quick, monkeypatch):
    path, split = tmp_path / "robustness.json", digits["test"].first(8)
    measure(networks, split, path, examples=4, quiet=True)
    monkeypatch.setitem(evaluation.ATTACK_VERSIONS, "autoattack", 7)
    with pytest.raises(UserError, match="2 figures of other checkpoints, versions"):
        measure(networks, split, path, examples=4, quiet=True)
    runs, run = [], robustness.Test.run
    monkeypatch.setattr(robustness.Test, "run", lambda self, *a, **k: runs.append(self.attack) or run(self, *a, **k))
    report = measure(networks, split, path, examples=4, overwrite=True, quiet=True)
    assert runs == ["autoattack"] * 2
    assert {row.name: row.version for row in report.entries[0].results} == {"fgsm": 1, "pgd": 1, "autoattack": 7}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn.safetensors", "cnn-other.safetensors"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_checkpoint_that_is_replaced_gets_no_figures(
    name, when, networks, digits, trained, tmp_path, quick, monkeypatch
):
    """The baseline, which crafts transferred examples for both networks, or the other network."""
    copies = {}
    for source, network in networks.items():
        copies[Path(shutil.copy(source, tmp_path))] = network
    path, split = tmp_path / "robustness.json", digits["test"].first(8)
    runs, run, plan = [], robustness.Test.run, robustness.tests

    def replacing(self, *arguments, **options):
        runs.append(self.attack)
        if when == "during" and len(runs) == 15:  # the second test of the second network
            shutil.copy(trained("cnn-lstm"), tmp_path / name)
        return run(self, *arguments, **options)

    monkeypatch.setattr(robustness.Test, "run", replacing)
    monkeypatch.setattr(robustness, "tests", lambda *counts: plan(*counts)[:13])
    if when == "before":  # but after the networks were loaded
        other = next(each for each in networks if each.name != name)
        shutil.copy(other, tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} was replaced {'during' if when == 'during' else 'after'}"):
        measure(copies, split, path, examples=4, quiet=True)
    if when == "during":
        first, second = read_robustness(path).entries
        assert len(first.results) == 2 * (len(RADII) + 1) + len(RADII) + 1
        assert len(second.results) == len(RADII) + 1  # of the first test
    else:
        assert not path.exists()


def test_an_interruption_loses_nothing(networks, digits, tmp_path, quick, monkeypatch):
    path, split = tmp_path / "robustness.json", digits["test"].first(20)
    pgd, calls = evaluation.ATTACKS["pgd"], []

    def interrupted(*arguments, **options):
        calls.append(options)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return pgd(*arguments, **options)

    monkeypatch.setitem(evaluation.ATTACKS, "pgd", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(networks, split, path, examples=4, quiet=True)
    assert len(read_robustness(path).entries) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["robustness.json"]  # a finished test needs no notes
    report = measure(networks, split, path, examples=4, quiet=True)
    assert len(calls) == 1 + 2 * (len(RADII) + 1)
    assert [len(entry.results) for entry in report.entries] == [2 * (len(RADII) + 1) + len(RADII) + 2] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["robustness.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"sha256"', '"sha1"'),
        lambda text: text.replace('"confidence_interval"', '"interval"'),
        lambda text: text.replace('"accuracy": ', '"accuracy": "x", "was": '),
    ],
)
def test_a_damaged_report_is_one_line(damage, measured, tmp_path):
    path = tmp_path / "robustness.json"
    path.write_text(damage(measured[1].read_text()))
    with pytest.raises(UserError, match="is not a report on robustness") as raised:
        read_robustness(path)
    assert "\n" not in str(raised.value)


def test_tables_are_the_reports(measured):
    report, _ = measured
    text = tables.robustness_document(report, robustness.Logs([], [], [], []))
    assert "on the 40 digits test images, under PGD and AutoAttack on the first 8" in text
    for entry in report.entries:
        cells = [
            entry.find("fgsm", 0.0),
            entry.find("fgsm", 0.1, "transfer"),
            entry.find("fgsm", RADIUS),
            entry.find("pgd", RADIUS, steps=50),
            entry.find("autoattack", RADIUS),
        ]
        row = " | ".join([tables.defended(entry), *map(with_interval, cells)])
        assert f"| {row} |" in tables.robustness_table(report)
        curve = [entry.find("pgd", radius, **PGD_20) for radius in RADII]
        assert " | ".join(map(with_interval, curve)) in text


def trained_with(entry: RobustnessEntry, defense: object, name: str) -> RobustnessEntry:
    """The entry, as if its network had been trained with this defence."""
    return replace(entry, name=name, training=replace(entry.training, defense=defense))


OURS = {"name": "n-fgsm", "epsilon": 8 / 255}
THE_STUDYS = {"name": "fgsm-augment", "epsilon": 0.2}


@pytest.mark.parametrize(
    ("defense", "heading"),
    [
        (None, "CNN, none (baseline)"),
        (THE_STUDYS, "CNN, the study's: FGSM examples of 0.2"),
        (OURS, "CNN, **ours**: N-FGSM at 8/255, width 8"),
        ("my_loss", "CNN, my_loss"),
        ({"name": "label-noise", "rate": 0.1}, "CNN, label-noise"),
    ],
)
def test_rows_say_how_a_network_was_defended(defense, heading, measured):
    assert tables.defended(trained_with(measured[0].entries[0], defense, "a")) == heading


def test_accuracy_figure_draws_the_report(measured):
    baseline, other = measured[0].entries
    entries = [baseline, trained_with(other, THE_STUDYS, "retrained"), trained_with(other, OURS, "robust")]
    figure = figures.robust_accuracy(replace(measured[0], entries=entries))
    assert [line.get_label() for line in figure.axes[0].lines[::2]] == ["baseline", "the study's defence", "ours"]
    for entry, line in zip(entries, figure.axes[0].lines[::2], strict=True):
        x, y = line.get_data()
        assert list(x) == pytest.approx([0, *RADII])
        rows = [entry.find("fgsm", 0.0), *(entry.find("pgd", radius, **PGD_20) for radius in RADII)]
        assert list(y) == pytest.approx([100 * row.accuracy for row in rows])
    plt.close(figure)


@pytest.fixture
def logs(tmp_path):
    """The logs of some trainings, in folders where `training_logs` looks for them."""

    def write(path, defense, *epochs, epsilon=8 / 255, **arguments):
        first = {**LOG_HEADER, "average": 0.999, **arguments}
        first["defense"] = {"name": defense, "epsilon": epsilon, "crafting": "training"}
        keys = ("seconds", "choosing_accuracy", "validation_accuracy", "robust_accuracy")
        lines = [{"epoch": i, **dict(zip(keys, epoch, strict=True))} for i, epoch in enumerate(epochs, start=1)]
        for line in lines:
            line |= {"single_step_accuracy": 0.4, "loss": 2.0, "images_per_second": 100}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines]))

    write(tmp_path / "results/defenses/trades.jsonl", "trades", (120, 0.2, 0.4, 0.3), epochs=1)
    write(tmp_path / "results/defenses/fgsm.jsonl", "fgsm", (30, 0.3, 0.5, 0.35), (60, 0.0, 0.8, 0.1), average=0)
    write(tmp_path / "results/tried/cnn-n-fgsm-1.jsonl", "n-fgsm", (30, 0.3, 0.5, 0.35), width=64)
    # Somebody's own defence, of which only the name is known.
    own = tmp_path / "results/defenses/own.jsonl"
    write(own, "own", (30, 0.3, 0.5, 0.35))
    head, epoch = own.read_text().splitlines()
    own.write_text(json.dumps({**json.loads(head), "defense": "my-epsilon"}) + "\n" + epoch + "\n")
    overfitting = ((30, 0.2, 0.5, 0.3), (30, 0.0, 0.2, 0.1))
    write(tmp_path / "results/overfitting/fgsm.jsonl", "fgsm", *overfitting, average=0, epsilon=16 / 255)
    write(tmp_path / "models/cnn-robust.jsonl", "n-fgsm", (30, 0.4, 0.6, 0.45), width=96)
    return robustness.training_logs(tmp_path / "models", tmp_path / "results")


def test_trainings_are_told_by_flags_and_kept_epoch(logs):
    table = tables.training_table(logs.defenses + logs.tried + logs.shipped).splitlines()
    assert table[2:] == [
        "| `train-cnn.py --defense fgsm --width 32 --epochs 2` | 1.5 | 50.00 | 35.00 | 30.00 |",
        "| `train-cnn.py --defense trades --width 32 --epochs 1 --average 0.999` | 2.0 | 40.00 | 30.00 | 20.00 |",
        "| `train-cnn.py --defense n-fgsm --width 64 --epochs 2 --average 0.999` | 0.5 | 50.00 | 35.00 | 30.00 |",
        "| `train-cnn.py --defense n-fgsm --width 96 --epochs 2 --average 0.999` | 0.5 | 60.00 | 45.00 | 40.00 |",
    ]


def test_overfitting_is_told_by_the_last_two_epochs(logs):
    training = "`train-cnn.py --defense fgsm --epsilon 16/255 --width 32 --epochs 2`"
    assert tables.overfitting_table(logs.overfitting).splitlines()[2:] == [
        f"| {training} | 1 | 50.00 | 40.00 | 30.00 |",
        f"| {training} | 2 | 20.00 | 40.00 | 10.00 |",
    ]


def test_trainings_figure_draws_the_logs(logs):
    figure = figures.trainings_compared({"a": logs.defenses[0], "b": logs.defenses[1]}, "title", {"b"})
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert (colors[0] == plotting.OURS, colors[1] == plotting.OURS) == (False, True)
    robust, clean = ([line.get_data() for line in axes.lines] for axes in figure.axes)
    assert [list(x) for x, _ in robust] == [list(x) for x, _ in clean] == [[0.5, 1.5], [2.0]]
    assert [list(y) for _, y in robust] == [[30, 0], [20]]
    assert [list(y) for _, y in clean] == [[50, 80], [40]]
    plt.close(figure)


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", '{"network": "cnn", "width": 3, "defense": null}\n{}\n'])
def test_a_foreign_log_is_one_line(text, tmp_path):
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses" / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"a\.jsonl is not a training log") as raised:
        robustness.training_logs(tmp_path, tmp_path)
    assert "\n" not in str(raised.value)
