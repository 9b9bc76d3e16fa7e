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
from utils.constants import L2_RADIUS, PGD_20, RADIUS, UserError
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
    monkeypatch.setattr(robustness, "PGD_L2", {"steps": 2, "norm": "l2", "loss": "margin"})
    monkeypatch.setattr(robustness, "STRONG", {"seed": 0, "steps": 2})
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
    first, following = (entry.find("autoattack", RADIUS, first=first) for first in (0, 8))
    assert first.accuracy <= entry.find("pgd", RADIUS, steps=50).accuracy
    strong, in_l2 = entry.find("strong", RADIUS), entry.find("pgd", L2_RADIUS, norm="l2")
    for row, images, options in (
        (following, split.between(8, 16), {"seed": 0}),
        (strong, split, {"seed": 0}),
        (in_l2, split.first(8), {"steps": 50, "restarts": 10, "seed": 0, "norm": "l2", "loss": "margin"}),
    ):
        result = evaluate(other, images, row.name, row.epsilon, options=options)
        assert (row.accuracy, row.examples) == (result.accuracy, len(images))


def test_networks_that_exist_are_tested(tmp_path):
    """A network as wide as the robust one is optional, and the others are not."""
    names = ["cnn", "cnn-fgsm-augment-0.2", "cnn-robust", "cnn-lstm", "cnn-lstm-fgsm-augment-0.2", "cnn-lstm-robust"]
    assert [path.stem for _, path in robustness.checkpoint_paths(tmp_path)] == names
    (tmp_path / "cnn-lstm-wide.safetensors").touch()
    assert [path.stem for _, path in robustness.checkpoint_paths(tmp_path, wide=False)] == names
    names.insert(5, "cnn-lstm-wide")
    assert [path.stem for _, path in robustness.checkpoint_paths(tmp_path)] == names


def test_few_images_may_not_suffice_for_a_second_autoattack():
    assert [test.first for test in robustness.tests(40, 40) if test.attack == "autoattack"] == [0]
    assert [(test.first, test.examples) for test in robustness.tests(40, 30)[-3:]] == [(0, 30), (30, 10), (0, 40)]
    assert [(test.first, test.examples) for test in robustness.tests(40, 3)[-3:]] == [(0, 3), (3, 3), (0, 30)]


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
    assert runs.count("autoattack") == 4
    assert runs.count("fgsm") == 2
    assert len(runs) == 2 + len(RADII) + 2 + 4 + 1
    assert [entry.threads for entry in again.entries] == [first.entries[0].threads, 99]

    def accuracies(report):
        return [[row.accuracy for row in entry.results] for entry in report.entries]

    assert accuracies(again) == accuracies(first)
    with pytest.raises(UserError, match="numbers of images"):
        measure(networks, split, path, examples=5, quiet=True)
    assert read_robustness(path) == again
    measure(networks, split, path, examples=5, overwrite=True, quiet=True)
    assert runs.count("pgd") == (len(RADII) + 2) * 3  # other images, for both networks


@pytest.mark.slow
def test_figures_of_another_version_of_an_attack_are_measured_again(networks, digits, tmp_path, quick, monkeypatch):
    path, split = tmp_path / "robustness.json", digits["test"].first(8)
    measure(networks, split, path, examples=4, quiet=True)
    monkeypatch.setitem(evaluation.ATTACK_VERSIONS, "autoattack", 7)
    with pytest.raises(UserError, match="4 figures of other checkpoints, versions"):
        measure(networks, split, path, examples=4, quiet=True)
    runs, run = [], robustness.Test.run
    monkeypatch.setattr(robustness.Test, "run", lambda self, *a, **k: runs.append(self.attack) or run(self, *a, **k))
    report = measure(networks, split, path, examples=4, overwrite=True, quiet=True)
    assert runs == ["autoattack"] * 4
    versions = {row.name: row.version for row in report.entries[0].results}
    assert versions == {"fgsm": 1, "pgd": 1, "strong": 1, "autoattack": 7}


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
    assert len(calls) == 1 + 2 * (len(RADII) + 2)
    assert [len(entry.results) for entry in report.entries] == [2 * (len(RADII) + 1) + len(RADII) + 5] * 2
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
    text = tables.robustness_document(report, robustness.Logs(*([] for _ in robustness.Logs._fields)))
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
        autoattacks = [entry.find("autoattack", RADIUS, first=first) for first in (0, 8)]
        cells = [*autoattacks, entry.find("strong", RADIUS), entry.find("pgd", L2_RADIUS, norm="l2")]
        assert " | ".join([tables.defended(entry), *map(with_interval, cells)]) in text
    columns = ["AutoAttack, images 1 to 8", "AutoAttack, the next 8", "strong attack, images 1 to 40"]
    assert f"| network | {' | '.join(columns)} | PGD-50 on the margin, L2, 0.5 |" in text


def test_table_of_few_images_has_one_autoattack(measured):
    report = measured[0]
    entries = [replace(entry, results=[row for row in entry.results if not row.first]) for entry in report.entries]
    table = tables.strongest_table(replace(report, entries=entries))
    assert table.splitlines()[0].count("AutoAttack") == 1


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


def test_a_wide_network_is_not_called_the_baseline(measured):
    entry = measured[0].entries[0]
    wide = replace(entry, name="cnn-wide", training=replace(entry.training, width=96, activation="silu"))
    assert tables.defended(wide) == "CNN, none: width 96, SiLU"
    assert not trained_with(wide, OURS, "cnn-wide").is_wide


def test_accuracy_figure_draws_the_report(measured):
    baseline, other = measured[0].entries
    entries = [baseline, trained_with(other, THE_STUDYS, "retrained"), trained_with(other, None, "cnn-wide")]
    entries.append(trained_with(other, OURS, "robust"))
    figure = figures.robust_accuracy(replace(measured[0], entries=entries))
    labels = ["baseline", "the study's defence", "no defence, as wide as ours", "ours"]
    assert [line.get_label() for line in figure.axes[0].lines[::2]] == labels
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
        options = {name: arguments.pop(name) for name in ("loss", "steps", "noise") if name in arguments}
        first = {**LOG_HEADER, "label_smoothing": 0, "average": 0.999, **arguments}
        first["defense"] = {"epsilon": epsilon, "crafting": "training", **options, "name": defense}
        keys = ("seconds", "choosing_accuracy", "validation_accuracy", "robust_accuracy")
        lines = [{"epoch": i, **dict(zip(keys, epoch, strict=True))} for i, epoch in enumerate(epochs, start=1)]
        for line in lines:
            line |= {"single_step_accuracy": 0.4, "loss": 2.0, "images_per_second": 100}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in [first, *lines]))

    write(tmp_path / "results/defenses/trades.jsonl", "trades", (120, 0.2, 0.4, 0.3), epochs=1)
    write(tmp_path / "results/defenses/fgsm.jsonl", "fgsm", (30, 0.3, 0.5, 0.35), (60, 0.0, 0.8, 0.1), average=0)
    write(tmp_path / "results/candidates/a.jsonl", "n-fgsm", (30, 0.4, 0.6, 0.45), dataset="digits", lr=0.1, seed=1)
    write(tmp_path / "results/candidates/b.jsonl", "n-pgd", (60, 0.35, 0.6, 0.5), (60, 0.2, 0.7, 0.4), steps=2)
    write(tmp_path / "results/candidates/radius.jsonl", "n-fgsm", (30, 0.5, 0.5, 0.35), epsilon=8.8 / 255)
    write(tmp_path / "results/candidates/start.jsonl", "n-fgsm", (30, 0.3, 0.5, 0.35))
    write(tmp_path / "results/tried/cnn-n-fgsm-1.jsonl", "n-fgsm", (30, 0.3, 0.5, 0.35), width=64)
    recipe = asdict(replace(RECIPES["robust"], epochs=2))
    recipe |= {"loss": "margin", "steps": 3, "seed": 1}
    write(tmp_path / "results/tried/cnn-robust-1.jsonl", "n-pgd", (180, 0.4, 0.6, 0.45), **recipe)
    options = {"loss": "sampled", "noise": 1.0, "activation": "silu"}
    write(tmp_path / "results/tried/cnn-robust-n-fgsm-2.jsonl", "n-fgsm", (30, 0.3, 0.5, 0.35), **options)
    write(tmp_path / "results/tried/cnn-retrain-1.jsonl", "fgsm-augment", (30, 0.3, 0.5, 0.35))
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
        "| `train-cnn.py --recipe robust --defense n-pgd --loss margin --steps 3 --width 32 --epochs 2 --seed 1` "
        "| 3.0 | 60.00 | 45.00 | 40.00 |",
        "| `train-cnn.py --defense n-fgsm --loss sampled --width 32 --epochs 2 --average 0.999`, "
        "noise 1, activation silu | 0.5 | 50.00 | 35.00 | 30.00 |",
        "| `train-cnn.py --defense n-fgsm --width 96 --epochs 2 --average 0.999` | 0.5 | 60.00 | 45.00 | 40.00 |",
    ]


def test_candidates_are_told_by_what_is_changed(logs):
    """A training at another radius is left out: its validation images were attacked at that radius."""
    assert tables.candidates_table(logs.candidates).splitlines()[2:] == [
        "| lr 0.1, dataset digits, seed 1 | 1 | 0.5 | 60.00 | 45.00 | 40.00 |",
        "| defense n-pgd | 2 | 2.0 | 60.00 | 50.00 | 35.00 |",
        "| nothing | 1 | 0.5 | 50.00 | 35.00 | 30.00 |",
    ]


def with_defense(log, name, **options):
    """The log of the same training, but with this defence."""
    return log._replace(arguments=replace(log.arguments, defense={"name": name, "epsilon": RADIUS, **options}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"average": 0.9999999}, "--average 0.9999999"),
        ({"lr": 0.0123456789}, "--lr 0.0123456789"),
        ({"weight_decay": 5e-5}, "--weight-decay 5e-05"),
        ({"defense": {"name": "fgsm", "epsilon": 8.85 / 255}}, f"--epsilon {8.85 / 255}"),
        ({"defense": {"name": "fgsm", "epsilon": 8.8 / 255}}, "--epsilon 8.8/255"),
        ({"dataset": "digits"}, "--dataset digits"),
        ({"init_sha256": "0" * 64}, f"init sha256 {'0' * 64}"),
    ],
)
def test_a_command_names_all_that_changes_the_training(changes, words, logs):
    """A number is rounded only where that changes nothing."""
    log = logs.tried[0]._replace(arguments=replace(logs.tried[0].arguments, **changes))
    assert words in tables.training_table([log])


def test_an_option_of_somebodys_own_defence_is_not_a_flag(logs):
    own = with_defense(logs.tried[0], "own", lr=3.0, recipe="robust", width=1)
    command = "`train-cnn.py --defense own --width 64 --epochs 2 --average 0.999`"
    assert f"| {command}, epsilon 8/255, lr 3, recipe robust, width 1 |" in tables.training_table([own])


def test_a_candidate_in_another_precision_is_told(logs):
    first = logs.candidates[0]
    second = first._replace(epochs=[replace(epoch, precision="bfloat16") for epoch in first.epochs])
    assert "| precision bfloat16 |" in tables.candidates_table([first, second])


def test_a_command_names_the_precision(logs):
    log = logs.tried[0]
    in_bfloat16 = log._replace(epochs=[replace(epoch, precision="bfloat16") for epoch in log.epochs])
    assert "--average 0.999 --precision bfloat16` |" in tables.training_table([in_bfloat16])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (("n-fgsm", {}), ("n-fgsm", {"noise": 0.0}), "noise 0"),
        (("n-pgd", {"steps": 3}), ("n-pgd", {"steps": 2}), "steps 2"),
        (("n-pgd", {"steps": 3}), ("n-pgd", {}), "steps 2"),
        (("n-fgsm", {}), ("n-pgd", {"steps": 2}), "defense n-pgd"),
        (("n-fgsm", {}), ("n-pgd", {"steps": 3}), "defense n-pgd, steps 3"),
        (("n-fgsm", {}), ("n-fgsm", {"boost": 0.0, "noise": 2.0}), "nothing"),
        (("n-fgsm", {"boost": 1.0, "noise": 3.0}), ("n-fgsm", {}), "noise 2, boost 0"),
    ],
)
def test_every_change_of_a_candidate_is_named(before, after, words, logs):
    first, second = (with_defense(logs.candidates[0], name, **options) for name, options in (before, after))
    assert f"| {words} |" in tables.candidates_table([first, second])
    assert tables.candidates_table([first, second]).count("| nothing |") == 1 + (words == "nothing")


@pytest.fixture
def attacked(logs, tmp_path, trained, script):
    """`logs`, with a report of the strong attack on the network of a candidate."""
    report = tmp_path / "results" / "validation" / "a.json"
    report.parent.mkdir()
    flags = ["--split", "validation", "--examples", "20", "--attack", "strong", "--epsilon", "8/255", "--json", report]
    result = script("test-cnn.py", "--dataset", "digits", "--checkpoint", trained("cnn"), *flags)
    assert result.returncode == 0, result.stderr
    return report


def test_a_report_on_validation_images_stands_beside_its_training(attacked, tmp_path):
    (row,) = json.loads(attacked.read_text())["attacks"]
    logs = robustness.training_logs(tmp_path, tmp_path / "results")
    (line,) = tables.validation_table(logs.attacked).splitlines()[2:]
    command = "train-cnn.py --defense n-fgsm --width 32 --epochs 2 --lr 0.1 --average 0.999 --dataset digits --seed 1"
    assert line.startswith(f"| `{command}` ")
    assert f"| 60.00 | 45.00 | 40.00 | **{100 * row['accuracy']:.2f}** (" in line
    assert line.endswith("| 20 |")


def test_a_report_on_validation_images_that_does_not_belong_there_is_refused(attacked, trained, tmp_path):
    def refused(message, change=("", "")):
        text = attacked.read_text()
        attacked.write_text(text.replace(*change))
        with pytest.raises(UserError, match=message):
            robustness.training_logs(tmp_path, tmp_path / "results")
        attacked.write_text(text)

    lacks = "a.json lacks the strong, white-box attack at 8/255"
    refused(lacks, ('"strong"', '"pgd"'))
    refused(lacks, (str(8 / 255), str(6 / 255)))
    refused(lacks, ('"strong",', '"strong", "norm": "l2",'))
    refused(lacks, ('"white_box"', '"transfer"'))
    refused("a.json is not about validation images", ('"validation"', '"test"'))
    refused("a.json is about another network or data set", ('"network": "cnn"', '"network": "cnn-lstm"'))
    refused("a.json is about another network or data set", ('"digits"', '"cifar10"'))
    shutil.copy(trained("cnn-lstm"), tmp_path / "results" / "candidates" / "a.safetensors")
    refused("a.json is about another checkpoint")
    shutil.copy(trained("cnn"), tmp_path / "results" / "candidates" / "a.safetensors")
    for path in (attacked, tmp_path / "results" / "candidates" / "a.jsonl"):
        shutil.copy(path, path.with_stem("a2"))
    refused("a2.json is about the checkpoint of another report")
    attacked.with_stem("a2").unlink()
    attacked = attacked.rename(attacked.with_stem("b2"))
    refused("b2.json lacks the log of a defence: copy it to .*tried/b2.jsonl")


def test_candidates_without_the_one_that_they_are_compared_with_are_refused(logs, tmp_path):
    start = tmp_path / "results" / "candidates" / "start.jsonl"
    head, *epochs = start.read_text().splitlines(keepends=True)
    undefended = json.dumps({**json.loads(head), "defense": None}) + "\n"
    for change in (lambda: start.write_text("".join([undefended, *epochs])), start.unlink):
        change()
        with pytest.raises(UserError, match=r"candidates lacks start\.jsonl"):
            robustness.training_logs(tmp_path / "models", tmp_path / "results")


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


def test_time_and_robustness_are_points_at_the_kept_epoch(logs):
    figure = figures.time_and_robustness(logs.tried, logs.shipped)
    robust, clean = ([line for line in axes.lines if len(line.get_xdata())] for axes in figure.axes)
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in robust] == [(0.5, 40), (0.5, 30), (3, 40), (0.5, 30)]
    assert [line.get_ydata()[0] for line in clean] == [60, 50, 60, 50]
    assert [line.get_fillstyle() for line in robust] == ["full", "none", "none", "none"]
    assert len({line.get_color() for line in robust}) == 3
    assert robust[0].get_color() == robust[1].get_color() == plotting.OURS
    kinds = [
        "CNN, N-FGSM, SGD, ReLU, cross-entropy",
        "CNN, N-PGD, Muon, SiLU, margin",
        "CNN, N-FGSM, SGD, SiLU, sampled",
    ]
    assert figure.axes[0].get_legend_handles_labels()[1] == kinds
    plt.close(figure)


def test_a_foreign_log_is_found_before_the_attacks(script, trained, tmp_path):
    for name, path in robustness.checkpoint_paths(tmp_path):
        shutil.copy(trained(name), path)
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates" / "start.jsonl").write_text("{}\n")
    folders = ["--models", tmp_path, "--results", tmp_path]
    result = script("study robustness", "--dataset", "digits", "--examples", "4", *folders)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "start.jsonl is not a training log" in result.stderr
    assert not (tmp_path / "robustness.json").exists()


@pytest.mark.parametrize("text", ["", "[]\n", "{}\n", '{"network": "cnn", "width": 3, "defense": null}\n{}\n'])
def test_a_foreign_log_is_one_line(text, tmp_path):
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses" / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"a\.jsonl is not a training log") as raised:
        robustness.training_logs(tmp_path, tmp_path)
    assert "\n" not in str(raised.value)
