"""The command line as a user meets it: scripts run on digits, with good and with bad arguments."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from argparse import SUPPRESS, Namespace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from attacks import core
from defenses import losses
from tests.helpers.faults import odd_surroundings
from tests.helpers.project import QUICK, ROOT, command, prog, untraced
from utils.checkpoints import file_digest, load_checkpoint, read_metadata, save_checkpoint
from utils.commands.checkpoints import overwrite_advice
from utils.commands.parser import Parser, run
from utils.commands.test import check_report_fits, fgsm_results
from utils.commands.test import test_parser as parser_of_tests
from utils.commands.train import flags_of_recipe, train_parser
from utils.commands.types import epsilon
from utils.constants import DEFENSE_LOSSES, LOSSES, UserError
from utils.evaluation import report_row
from utils.formats import MinimalEpsilons, TestReport, encode, read_document
from utils.notes import Notes
from utils.recipes import RECIPES
from utils.statistics import wilson_interval

SCRIPTS = ("train-cnn.py", "train-cnn-lstm.py", "test-cnn.py", "test-cnn-lstm.py", "study", "study robustness")
DEAD_PROXY = "http://127.0.0.1:9"  # nothing listens there
NO_NETWORK = {"https_proxy": DEAD_PROXY, "HTTPS_PROXY": DEAD_PROXY, "no_proxy": "", "NO_PROXY": ""}


@pytest.mark.parametrize("name", ["cnn", "cnn-lstm"])
def test_train_then_test(name, script, tmp_path):
    output = tmp_path / "with a space" / "a.safetensors"
    trained = script(f"train-{name}.py", *QUICK, "--output", output)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("validation accuracy") == 2
    assert sorted(path.name for path in output.parent.iterdir()) == ["a.jsonl", "a.safetensors"]

    report_path, figures = tmp_path / "deep" / "out.json", tmp_path / "figures"
    tested = script(
        f"test-{name}.py",
        "--checkpoint",
        output,
        "--attack",
        "fgsm",
        "--epsilon",
        "0.02",
        "8/255",
        "--examples",
        100,
        "--json",
        report_path,
        "--figures",
        figures,
    )
    assert tested.returncode == 0, tested.stderr
    report = read_document(report_path, TestReport, "a test report")
    assert (report.checkpoint, report.sha256) == (str(output), file_digest(output))
    assert (report.network, report.dataset, report.split, report.examples) == (name, "digits", "test", 100)
    clean = report.clean_accuracy
    assert report.clean_confidence_interval == pytest.approx(wilson_interval(round(clean * 100), 100))
    assert [row.epsilon for row in report.attacks] == [0.02, 8 / 255]
    for row in report.attacks:
        assert (row.name, row.setting, row.source, row.targeted) == ("fgsm", "white_box", None, False)
        low, high = row.confidence_interval
        assert 0 <= low <= row.accuracy <= high <= 1
        assert f"{row.accuracy:.2%}" in tested.stdout
    assert f"{clean:.2%}" in tested.stdout
    assert {path.name for path in figures.iterdir()} == {"accuracy.png", "examples.png"}


def test_transfer(script, trained, tmp_path):
    source = trained("cnn-lstm")
    tested = script(
        "test-cnn.py", "--checkpoint", trained("cnn"), "--source", source, "--epsilon", 0.1, "--json", tmp_path / "o"
    )
    assert tested.returncode == 0, tested.stderr
    (attack,) = attacks_in(tmp_path / "o")
    assert (attack.setting, attack.source) == ("transfer", str(source))
    white_box = script("test-cnn.py", "--checkpoint", trained("cnn"), "--epsilon", 0.1, "--json", tmp_path / "w")
    assert white_box.returncode == 0, white_box.stderr
    assert attacks_in(tmp_path / "w")[0].accuracy <= attack.accuracy


def test_any_mix_of_attacks(script, trained, tmp_path):
    """FGSM comes first, the others in the order of --attack, at each radius. The report has every option."""
    arguments = ["--checkpoint", trained("cnn"), "--examples", 12, "--epsilon", 0.05, 0.1, "--json", tmp_path / "o"]
    arguments += ["--attack", "autoattack", "pgd", "fgsm", "--steps", 5, "--restarts", 2, "--loss", "margin"]
    tested = script("test-cnn.py", *arguments, "--figures", tmp_path / "figures")
    assert tested.returncode == 0, tested.stderr
    attacks = attacks_in(tmp_path / "o")
    assert [row.name for row in attacks] == ["fgsm"] * 2 + ["autoattack"] * 2 + ["pgd"] * 2
    assert [row.epsilon for row in attacks] == [0.05, 0.1] * 3
    pgd = attacks[4]
    assert (pgd.steps, pgd.step_size, pgd.restarts, pgd.random_start) == (5, 0.025, 2, True)
    assert (pgd.loss, pgd.seed) == ("margin", 0)
    assert attacks[5].step_size == 0.05
    assert attacks[2].seed == 0
    for weak, strong in ((0, 4), (1, 5), (4, 2), (5, 3)):
        assert attacks[strong].accuracy <= attacks[weak].accuracy + 1 / 12
    assert {path.name for path in tmp_path.iterdir()} == {"o", "figures"}


@pytest.mark.slow
def test_interrupted_test_keeps_the_attacks_that_are_done(script, trained, tmp_path):
    """The attacks of --diagnose are kept too, until the report is written."""
    arguments = ["--checkpoint", trained("cnn"), "--source", trained("cnn-lstm"), "--examples", 12, "--epsilon", 0.1]
    arguments += ["--attack", "pgd", "autoattack", "--diagnose", "--json", tmp_path / "o.json"]
    whole = script("test-cnn.py", *arguments)
    assert whole.returncode == 0, whole.stderr
    report = json.loads((tmp_path / "o.json").read_text())
    (tmp_path / "o.json").unlink()
    process = subprocess.Popen(
        [sys.executable, ROOT / "test-cnn.py", *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    notes, deadline = tmp_path / "o.json.attacks.partial.jsonl", time.monotonic() + 120
    while not (notes.exists() and len(notes.read_text().splitlines()) > 5):  # clean, pgd, autoattack, the first checks
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    noted = notes.read_text().splitlines()[1:5]
    again = script("test-cnn.py", *arguments)
    assert again.returncode == 0, again.stderr
    assert not notes.exists()
    resumed = json.loads((tmp_path / "o.json").read_text())
    assert [row["seconds"] for row in resumed["attacks"][-2:]] == [json.loads(line)[2] for line in noted[:2]]
    for row in (*report["attacks"], *resumed["attacks"]):
        del row["seconds"]
    assert resumed == report


@pytest.mark.slow
def test_what_attacks_need_is_missed_before_any_is_run(script, trained, tmp_path):
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--epsilon", 0.1]
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util, sys\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'pyautoattack' else find(name, *rest)\n"
    )
    for flags in (["--attack", "pgd", "autoattack"], ["--diagnose"]):
        result = script("test-cnn.py", *arguments, *flags, PYTHONPATH=str(tmp_path))
        assert_one_line(result, "pip install pyautoattack")
        assert result.stdout == ""
    (tmp_path / "damaged.safetensors").write_bytes(b"garbage")
    result = script("test-cnn.py", *arguments, "--diagnose", "--source", tmp_path / "damaged.safetensors")
    assert_one_line(result, "damaged.safetensors", "not a safetensors checkpoint")
    assert result.stdout == ""


@pytest.mark.parametrize(("flag", "value"), [("steps", 3), ("step-size", 0.1), ("restarts", 2), ("loss", "margin")])
def test_flags_of_pgd_belong_to_it(flag, value, script):
    assert_one_line(script("test-cnn.py", f"--{flag}", value), f"--{flag} belongs to --attack pgd")


def test_eot_belongs_to_the_attacks_that_follow_a_gradient(script, trained, tmp_path):
    assert_one_line(
        script("test-cnn.py", "--attack", "autoattack", "--eot", 2), "--eot belongs to --attack fgsm and pgd"
    )
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--epsilon", 0.1, "--attack", "fgsm", "pgd"]
    tested = script("test-cnn.py", *arguments, "--eot", 2, "--steps", 1, "--json", tmp_path / "o")
    assert tested.returncode == 0, tested.stderr
    assert [row.eot for row in attacks_in(tmp_path / "o")] == [2, 2]


def test_transferred_pgd_takes_all_its_steps(script, trained, tmp_path):
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--attack", "pgd", "--steps", 1]
    for flags, stops in (([], True), (["--source", trained("cnn-lstm")], False)):
        assert script("test-cnn.py", *arguments, *flags, "--json", tmp_path / "o").returncode == 0
        assert [row.early_stop for row in attacks_in(tmp_path / "o")] == [stops]


@pytest.mark.slow
def test_a_checkpoint_that_is_replaced_during_its_test_gets_no_report(script, trained, tmp_path):
    """The finished batches stay, in case the first file comes back."""
    path = shutil.copy(trained("cnn"), tmp_path / "tested.safetensors")
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil, sys\n"
        "if 'test-cnn.py' in ' '.join(sys.orig_argv):\n"
        "    import utils.evaluation as evaluation\n"
        "    evaluate = evaluation.evaluate\n"
        "    def replacing(*arguments, **options):\n"
        "        result = evaluate(*arguments, **options)\n"
        f"        shutil.copy({str(trained('cnn-lstm'))!r}, {str(path)!r})\n"
        "        return result\n"
        "    evaluation.evaluate = replacing\n"
    )
    arguments = ["--checkpoint", path, "--examples", 5, "--attack", "pgd", "--steps", 1, "--json", tmp_path / "o.json"]
    result = script("test-cnn.py", *arguments, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "tested.safetensors was replaced during the test" in result.stderr
    assert not (tmp_path / "o.json").exists()
    assert (tmp_path / "o.json.attacks.partial.jsonl").exists()


def test_default_radius_of_an_iterative_attack(script, trained, tmp_path):
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--attack", "pgd", "--steps", 1]
    assert script("test-cnn.py", *arguments, "--json", tmp_path / "o").returncode == 0
    assert [row.epsilon for row in attacks_in(tmp_path / "o")] == [8 / 255]


def test_a_test_leaves_the_notes_of_other_tests_alone(script, trained, tmp_path):
    """Those of reports with a similar name, and those of another evaluation that went to the same report."""
    noted = {}
    for name in ("out-0.2", "out", "out.json", "out-0.3"):
        path = tmp_path / f"{name}.attacks.partial.jsonl"
        Notes(path).add("a" * 64, [("01", 0.5)])
        noted[path] = path.read_text()
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--attack", "pgd", "--steps", 1]
    assert script("test-cnn.py", *arguments, "--json", tmp_path / "out-0.3").returncode == 0
    assert {path: path.read_text() for path in noted} == noted
    (tmp_path / "out.attacks.partial.jsonl").write_text("somebody's")
    assert_one_line(script("test-cnn.py", *arguments, "--json", tmp_path / "out"), "does not hold notes")
    assert (tmp_path / "out.attacks.partial.jsonl").read_text() == "somebody's"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--figures", "figures"], ["--figures", "figures", "--json", "out.json"]])
def test_an_interruption_while_figures_are_drawn_loses_no_evaluation(flags, script, trained, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'test-cnn.py' in ' '.join(sys.orig_argv):\n"
        "    import utils.plotting as plotting\n"
        "    def save(*_):\n"
        "        raise KeyboardInterrupt\n"
        "    plotting.save = save\n"
    )
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--attack", "pgd", "fgsm", "--steps", 1, *flags]
    arguments += ["--epsilon", 0.1]
    result = script("test-cnn.py", *arguments, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert result.returncode == 130
    assert "the finished batches are kept" in result.stderr
    output = tmp_path / ("out.json" if "--json" in flags else "figures/accuracy.png")
    noted = Notes(f"{output}.attacks.partial.jsonl").rows.values()
    assert [[len(hits) for hits, _ in rows] for rows in noted] == [[5]] * 3  # clean, FGSM and PGD
    again = script("test-cnn.py", *arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert without_seconds(again.stdout) == without_seconds(result.stdout)
    assert not [*tmp_path.rglob("*.partial.*")]


def without_seconds(output):
    return [line.rsplit(maxsplit=1)[0] for line in output.splitlines() if line]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("report", [True, False])
def test_interrupted_test_speaks_of_kept_batches_only_if_there_are_some(report, trained, tmp_path):
    arguments = ["--checkpoint", trained("cnn"), "--attack", "pgd", "--steps", 200, "--batch-size", 20]
    process = interruptible("test-cnn.py", *arguments, *(["--json", tmp_path / "o.json"] if report else []))
    if report:
        wait_for(tmp_path / "o.json.attacks.partial.jsonl", process)
    else:
        while not process.stdout.readline().startswith("clean"):  # the next row, of pgd, comes much later
            assert process.poll() is None, "it ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = ": the finished batches are kept, and the same command continues after them" if report else ""
    assert errors.endswith(f"test-cnn.py: interrupted{kept}\n")


def test_diagnose_prints_checks_and_two_verdicts(script, trained, tmp_path):
    arguments = ["--checkpoint", trained("cnn"), "--examples", 10, "--epsilon", 0.2, "--json", tmp_path / "o"]
    tested = script("test-cnn.py", *arguments, "--source", trained("cnn-lstm"), "--diagnose")
    assert tested.returncode == 0, tested.stderr
    diagnosis = read_document(tmp_path / "o", TestReport, "a test report").diagnosis
    assert (diagnosis.epsilon, diagnosis.source) == (0.2, str(trained("cnn-lstm")))
    assert len(diagnosis.checks) >= 9
    for check in diagnosis.checks:
        assert f"{check.name}: {check.figures}" in tested.stdout
    assert f"is the evaluation trustworthy? {diagnosis.verdict}" in tested.stdout
    figure = "robust accuracy" if diagnosis.trustworthy else "an upper bound, not a robust accuracy"
    assert f"left by all attacks together: {diagnosis.at_most:.2%}" in tested.stdout
    assert tested.stdout.endswith(f": {figure}\n")
    assert diagnosis.robust_accuracy == (diagnosis.at_most if diagnosis.trustworthy else None)


def test_train_with_a_defence(script, tmp_path):
    output = tmp_path / "a.safetensors"
    arguments = [*QUICK, "--defence", "trades", "--epsilon", "0.1", "--steps", 2, "--beta", 3, "--average", "0.5"]
    result = script("train-cnn.py", *arguments, "--crafting", "evaluation", "--output", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("under PGD") == 2
    training = read_metadata(output).training
    assert training.defense == {"name": "trades", "epsilon": 0.1, "steps": 2, "beta": 3.0, "crafting": "evaluation"}
    assert (training.label_smoothing, training.average) == (0, 0.5)


def test_flags_replace_the_numbers_of_a_recipe(script, tmp_path):
    """Each described field of Recipe has a flag, and 0 is a value like any other."""
    output = tmp_path / "a.safetensors"
    wanted = {"lr": 0.01, "epochs": 1, "batch_size": 500, "weight_decay": 0.0, "shift": 1, "contrast": 0.5}
    wanted |= {"average": 0.0}
    flags = [f"--{name.replace('_', '-')}={value:g}" for name, value in wanted.items()]
    arguments = ["--dataset", "digits", "--width", 2, "--recipe", "retrain", *flags, "--output", output]
    result = script("train-cnn.py", *arguments)
    assert result.returncode == 0, result.stderr
    training = read_metadata(output).training
    assert {name for name, _, _ in flags_of_recipe()} == set(wanted)
    assert {name: getattr(training, name) for name in wanted} == wanted
    assert (training.optimizer, training.warmup) == ("adam", RECIPES["retrain"].warmup)


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        ((), "none"),
        (("--quiet",), None),
        (("--defense", "n-fgsm"), None),
        (("--recipe", "fast"), None),
        (("--defense", "fgsm-augment", "--epsilon", 0.1), "fgsm-augment"),
    ],
)
def test_the_recipe_robust_without_an_online_defence_is_noted(flags, noted, script, trained, tmp_path):
    """The name promises robustness, which the defence brings."""
    if "fgsm-augment" in flags:
        flags = (*flags, "--source", trained("cnn"))
    quick = ["--dataset", "digits", "--width", 2, "--recipe", "robust", "--epochs", 1]
    result = script("train-cnn.py", *quick, *flags, "--output", tmp_path / "a.safetensors")
    assert result.returncode == 0, result.stderr
    note = f"note: with --defense {noted}, the recipe robust trains a network that is not robust\n"
    assert result.stderr.count("note") == result.stderr.count(note) == (noted is not None)


@pytest.mark.slow
def test_retrain_on_adversarial_examples(script, tmp_path):
    """The study's defence: the default source and name, --resume, and the adversarial set, which is used again."""
    assert script("train-cnn.py", *QUICK, "--quiet", cwd=tmp_path).returncode == 0
    defended = (*QUICK, "--defense", "fgsm-augment", "--epsilon", "8/255")
    trained = script("train-cnn.py", *defended, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "2,394 digits images, fgsm-augment at 8/255" in trained.stdout
    output = tmp_path / "runs" / "cnn-digits-fgsm-augment-0.0313725.safetensors"
    assert read_metadata(output).training.defense["epsilon"] == 8 / 255
    (kept,) = (tmp_path / "data" / "adversarial").iterdir()
    assert kept.name == "digits-train-fgsm-cnn-digits.safetensors"
    made = kept.stat().st_mtime_ns
    assert "nothing to resume" in script("train-cnn.py", *defended, "--resume", cwd=tmp_path).stdout
    assert kept.stat().st_mtime_ns == made

    other = script("train-cnn.py", *QUICK, "--seed", 1, "--quiet", "--overwrite", cwd=tmp_path)
    assert other.returncode == 0
    refused = script("train-cnn.py", *defended, "--resume", "--quiet", cwd=tmp_path)
    assert_one_line(refused, output.name, "source_sha256")
    again = script("train-cnn.py", *defended, "--overwrite", "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (0, 1)
    assert f"{kept.name}: made from another source: building it again" in again.stderr


def test_retraining_with_no_or_a_foreign_source(script, trained, tmp_path):
    defended = (*QUICK, "--defense", "fgsm-augment", "--epsilon", 0.2, "--output", tmp_path / "a.safetensors")
    missing = "runs/cnn-digits.safetensors is missing: python train-cnn.py --dataset digits makes it"
    assert_one_line(script("train-cnn.py", *defended, cwd=tmp_path), missing)
    assert_one_line(script("test-cnn.py", "--dataset", "digits", cwd=tmp_path), missing)
    itself = (*QUICK, "--defense", "fgsm-augment", "--epsilon", 0.2, "--overwrite", "--source", trained("cnn"))
    before = trained("cnn").read_bytes()
    replaced = script("train-cnn.py", *itself, "--output", trained("cnn"), cwd=tmp_path)
    assert_one_line(replaced, "is the --source, and would replace it")
    assert trained("cnn").read_bytes() == before
    foreign = (*defended, "--source", ROOT / "models" / "cnn.safetensors")
    assert_one_line(script("train-cnn.py", *foreign, cwd=tmp_path), "trained on 'cifar10', not on digits")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_default_names_and_another_working_directory(script, tmp_path):
    assert script("train-cnn.py", *QUICK, "--quiet", cwd=tmp_path).stdout == ""
    assert (tmp_path / "runs" / "cnn-digits.safetensors").exists()
    tested = script("test-cnn.py", "--dataset", "digits", "--split", "validation", cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    assert "runs/cnn-digits.safetensors" in tested.stdout.replace("\\", "/")
    assert "newest" not in tested.stdout  # it is the tested one
    assert "digits validation split, 300 images" in tested.stdout
    assert tested.stdout.count("fgsm") == 5


def test_a_test_says_how_to_test_the_newest_training(script, trained, tmp_path):
    (tmp_path / "runs").mkdir()
    for age, name in enumerate(("my net.safetensors", "cnn-digits.safetensors", "broken.safetensors")):
        (tmp_path / "runs" / name).write_bytes(trained("cnn").read_bytes() if age < 2 else b"not a checkpoint")
        os.utime(tmp_path / "runs" / name, (1e9, 1e9 - age))
    for name, newer in (("lstm", "cnn-lstm"), ("\x1b[2J", "cnn")):  # the name of the second commands a terminal
        (tmp_path / "runs" / f"{name}.safetensors").write_bytes(trained(newer).read_bytes())
    tested = script("test-cnn.py", "--dataset", "digits", "--examples", 5, cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr
    hint = "to test your newest training: python test-cnn.py --checkpoint 'runs/my net.safetensors'"
    assert hint in tested.stdout.replace("\\", "/").splitlines()


def test_a_working_folder_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    train = " ".join(map(shlex.quote, command("train-cnn.py", "--data", "pictures")))
    removed = ["bash", "-c", f"cd {shlex.quote(str(tmp_path))}/gone && rmdir ../gone && {train}"]
    refused = subprocess.run(removed, capture_output=True, text=True, check=False, timeout=120)
    assert_one_line(refused, "the working folder does not exist any more")


@pytest.mark.parametrize("flags", [(), ("--resume",)])
@pytest.mark.parametrize("name", ["models/cnn.safetensors", "models/new.safetensors", "results/cnn.safetensors"])
def test_shipped_files_are_not_replaced_and_nothing_advises_it(name, flags, script):
    """--overwrite with --output does replace them, which no test should try."""
    shipped = [path for path in (ROOT / "models").iterdir() if path.suffix != ".md"]
    before = {path: file_digest(path) for path in shipped}
    refused = script("train-cnn.py", *QUICK, "--output", ROOT / name, *flags)
    assert_one_line(refused, "is among the shipped files: choose another --output, such as runs/")
    assert "--overwrite" not in refused.stderr
    assert before == {path: file_digest(path) for path in shipped}
    assert (ROOT / name).exists() == (name == "models/cnn.safetensors")


def test_advice_to_overwrite_is_for_files_of_the_user():
    assert overwrite_advice(Path("runs/cnn.safetensors"), "replaces it") == "--overwrite replaces it, "
    assert overwrite_advice(ROOT / "results/digits/study.json", "replaces it") == "--overwrite replaces it, "
    assert overwrite_advice(ROOT / "models/../models/cnn.safetensors", "replaces it") == ""
    assert overwrite_advice(ROOT / "results/study.json", "replaces it") == ""


def test_existing_output_is_refused_unless_told(script, tmp_path):
    output = tmp_path / "a.safetensors"
    assert script("train-cnn.py", *QUICK, "--output", output).returncode == 0
    before = output.read_bytes()
    for name, flags, message in [
        ("train-cnn.py", (), "exists: --output chooses another file, --overwrite replaces this one"),
        ("train-cnn.py", ("--resume", "--seed", 1), "seed 0, not 1"),
        ("train-cnn-lstm.py", ("--resume",), "network 'cnn', not 'cnn-lstm'"),
    ]:
        refused = script(name, *QUICK, "--output", output, *flags)
        assert_one_line(refused, message)
        assert output.read_bytes() == before
    assert script("train-cnn.py", *QUICK, "--output", output, "--resume", "--quiet").stdout == ""
    finished = script("train-cnn.py", *QUICK, "--output", output, "--resume")
    assert (finished.returncode, "nothing to resume" in finished.stdout) == (0, True)
    assert script("train-cnn.py", *QUICK, "--output", output, "--overwrite", "--seed", 1).returncode == 0
    assert output.read_bytes() != before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupted_run_resumes_to_the_bit_identical_end(script, tmp_path):
    """Checks the messages. The torture test interrupts and kills trainings at many moments."""
    arguments = ("--dataset", "digits", "--epochs", 4, "--width", 8, "--batch-size", 32)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert script("train-cnn.py", *arguments, "--output", whole).returncode == 0

    process = interruptible("train-cnn.py", *arguments, "--output", broken, "--quiet")
    wait_for(tmp_path / "broken.partial.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert re.fullmatch(
        r"train-cnn\.py: interrupted: (1 epoch is|\d epochs are) saved; --resume, with the same flags, continues "
        r"after them\n",
        errors,
    )
    assert not broken.exists()

    assert_one_line(script("train-cnn.py", *arguments, "--output", broken), "--resume continues it")
    assert script("train-cnn.py", *arguments, "--output", broken, "--resume").returncode == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".jsonl"}
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_training_interrupted_in_the_first_epoch_does_not_speak_of_a_saved_one(tmp_path):
    arguments = (
        "--dataset",
        "digits",
        "--epochs",
        1,
        "--width",
        32,
        "--batch-size",
        1,
        "--lr",  # without it the loss becomes nan after two seconds, which a busy machine may take to send the signal
        1e-4,
        "--output",
        tmp_path / "a.safetensors",
    )
    process = interruptible("train-cnn.py", *arguments)
    assert process.stdout.readline().startswith("training cnn")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("train-cnn.py: interrupted")
    assert "--resume" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("name", ["train-cnn.py", "test-cnn.py", "study", "study robustness", "study demo"])
@pytest.mark.parametrize("library", ["argparse", "torch"])
def test_interrupt_while_a_library_is_imported_is_one_line(library, name, tmp_path):
    expected = "interrupted" if library == "argparse" else f"{prog(name)}: interrupted"
    assert interrupted_in(library, tmp_path, name) == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("library", ["msgspec", "numpy", pytest.param("sklearn", marks=pytest.mark.slow)])
def test_interrupt_later_in_the_start_is_one_line(library, tmp_path):
    """msgspec describes the flags; torch imports numpy from C, where Ctrl-C can get lost; sklearn holds the digits."""
    expected = "interrupted" if library == "msgspec" else "train-cnn.py: interrupted"
    assert interrupted_in(library, tmp_path, "train-cnn.py", "--dataset", "digits") == expected


def interrupted_in(library, folder, name, *arguments):
    """What a command prints that is interrupted while it imports the library, of which a slow one is made in folder."""
    (folder / f"{library}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = interruptible(name, *arguments, cwd=folder, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=50)
    assert (process.returncode, output, errors.count("\n")) == (130, "", 1)
    return errors.removesuffix("\n")


def interruptible(name, *arguments, cwd=ROOT, **environment):
    """A running command that heeds SIGINT; Python ignores it in a background job."""
    return subprocess.Popen(
        command(name, *arguments),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path, process):
    """Wait until the process has made the file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", [*SCRIPTS, "study demo"])
def test_help_fits_on_a_screen_explains_every_flag_and_needs_no_torch(name, columns, script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('--help imports torch')")
    shown = script(name, "--help", COLUMNS=str(columns), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("\n") <= 60
    flags = shown.stdout.split("examples:\n")[0]
    assert max(map(len, flags.splitlines())) < columns
    groups, wanted = {
        "train": (
            "data network training defence output",
            "dataset data-dir epochs batch-size lr weight-decay shift contrast average width recipe defense epsilon "
            "steps beta loss crafting source output overwrite resume seed device precision quiet data classes init",
        ),
        "study": (
            "data network training output",
            "dataset data-dir epochs width models scratch results overwrite device precision quiet",
        ),
        "demo": ("data network training output", "data-dir device epochs results"),
        "robustness": ("data network output", "dataset data-dir models results examples overwrite device quiet"),
        "test": (
            "data network attack output",
            "checkpoint attack epsilon steps step-size restarts loss source split examples diagnose dataset data-dir "
            "device batch-size seed json figures per-image",
        ),
    }[name.removesuffix(".py").split()[-1].split("-")[0]]
    assert re.findall(r"^(\w+):$", flags, re.MULTILINE) == groups.split()
    for flag in wanted.split():
        assert f"  --{flag} " in flags
    assert "--defence" not in flags  # understood, but one name is enough to read
    if name == "study":
        assert "python -m study robustness --help" in " ".join(flags.split())


@pytest.mark.parametrize("parser", [train_parser("cnn"), parser_of_tests("cnn")], ids=["train", "test"])
def test_help_names_every_choice(parser):
    for action in parser._actions:
        for choice in (action.choices or ()) if action.help != SUPPRESS else ():
            assert re.search(rf"(?<![\w-]){choice}(?![\w-])", parser.format_help()), (action.dest, choice)


def test_every_loss_can_be_asked_for():
    assert tuple(core.LOSSES) == LOSSES
    assert tuple(losses.DEFENSE_LOSSES) == DEFENSE_LOSSES


@pytest.mark.parametrize("name", [*SCRIPTS, "study demo"])
def test_examples_in_help_run_as_they_stand(name, script, tmp_path):
    """Their flags are accepted, no training writes to a shipped checkpoint, and what they read is there."""
    examples = script(name, "--help").stdout.split("examples:\n")[1].splitlines()
    assert examples
    for line in examples:
        assert line.startswith(f"  python {prog(name).removeprefix('python ')}")
        arguments = line.removeprefix(f"  python {prog(name).removeprefix('python ')}").split()
        assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("models/"))
        if name.startswith("study"):
            assert_one_line(script(name, *arguments, "--results", ROOT / "README.md"), "README.md", "cannot be written")
            continue
        assert "--output" not in arguments
        # The last value of a flag counts. The run ends where it looks for the output's folder or the checkpoint.
        file = "--output" if name.startswith("train") else "--checkpoint"
        (tmp_path / "a").touch()
        result = script(name, *arguments, file, "a/none.safetensors", cwd=tmp_path)
        assert_one_line(result, "none.safetensors")


def attacks_in(path):
    """The attack rows of a test report."""
    return read_document(path, TestReport, "a test report").attacks


def assert_one_line(result, *parts, status=2):
    assert result.returncode == status, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("train-cnn.py", ["--dataset", "mnist"], ["mnist", "digits"]),
        ("train-cnn.py", ["--recipe", "secret"], ["secret"]),
        ("train-cnn.py", ["--epochs", "0"], ["--epochs"]),
        ("train-cnn.py", ["--epochs", "many"], ["--epochs", "many"]),
        ("train-cnn.py", ["--batch-size", "-1"], ["--batch-size"]),
        ("train-cnn.py", ["--batch-size", "99999999999999999999"], ["--batch-size"]),
        ("train-cnn.py", ["--seed", "99999999999999999999"], ["--seed"]),
        ("train-cnn.py", ["--seed", "-1"], ["--seed"]),
        ("train-cnn.py", ["--lr", "nan"], ["--lr"]),
        ("train-cnn.py", ["--lr", "fast"], ["--lr", "fast"]),
        ("train-cnn.py", ["--lr", "0"], ["--lr"]),
        ("train-cnn.py", ["--lr", "1e308"], ["--lr", "at most 1,000,000,000"]),
        ("train-cnn.py", ["--output", b"\xff.safetensors"], ["--output", "is not in UTF-8"]),
        ("train-cnn.py", ["--weight-decay", "-1"], ["--weight-decay"]),
        ("train-cnn.py", ["--shift", "32"], ["--shift", "at least 0", "at most 31"]),
        ("train-cnn.py", ["--contrast", "1.5"], ["--contrast", "at most 1"]),
        ("train-cnn.py", ["--contrast", "0"], ["--contrast", "above 0"]),
        ("train-cnn.py", ["--average", "1"], ["--average", "below 1"]),
        ("train-cnn.py", ["--average", "-1"], ["--average", "at least 0"]),
        ("train-cnn.py", ["--width", "1.5"], ["--width"]),
        ("train-cnn.py", ["--width", "100000"], ["--width"]),
        ("train-cnn.py", ["--output", "model.pt"], ["model.pt", ".safetensors"]),
        ("train-cnn.py", ["--output", "README.md/a.safetensors"], ["README.md/a.safetensors", "cannot be written"]),
        ("train-cnn.py", ["--resume", "--overwrite"], ["--overwrite"]),
        ("train-cnn.py", ["--no-such-flag"], ["--no-such-flag"]),
        ("train-cnn.py", ["--defense", "magic"], ["magic", "fgsm-augment"]),
        ("train-cnn.py", ["--defense", "fgsm-augment"], ["fgsm-augment needs --epsilon"]),
        ("train-cnn.py", ["--defense", "fgsm-augment", "--epsilon", "0"], ["--epsilon", "0 changes no image"]),
        ("train-cnn.py", ["--defense", "fgsm-augment", "--epsilon", "-1"], ["--epsilon", "-1"]),
        ("train-cnn.py", ["--defense", "pgd", "--epsilon", "8"], ["--epsilon", "did you mean 8/255?"]),
        ("train-cnn.py", ["--defence", "magic"], ["magic", "fgsm-augment"]),
        ("train-cnn.py", ["--epsilon", "0.2"], ["--epsilon", "--defense fgsm-augment"]),
        ("train-cnn.py", ["--source", "models/cnn.safetensors"], ["--source", "--defense fgsm-augment"]),
        ("train-cnn.py", ["--defense", "n-fgsm", "--steps", "3"], ["--steps", "n-pgd or pgd or trades"]),
        ("train-cnn.py", ["--defense", "pgd", "--beta", "3"], ["--beta", "trades"]),
        ("train-cnn.py", ["--defense", "pgd", "--source", "models/cnn.safetensors"], ["--source", "fgsm-augment"]),
        ("train-cnn.py", ["--defense", "trades", "--beta", "-1"], ["--beta"]),
        ("train-cnn.py", ["--defense", "trades", "--crafting", "magic"], ["--crafting", "magic"]),
        ("train-cnn.py", ["--crafting", "training"], ["--crafting", "n-fgsm"]),
        ("train-cnn.py", ["--defense", "trades", "--loss", "margin"], ["--loss", "fgsm or n-fgsm or n-pgd or pgd"]),
        ("train-cnn.py", ["--defense", "n-fgsm", "--loss", "magic"], ["--loss", "magic", "margin"]),
        ("train-cnn.py", ["--smoothing", "0.2"], ["--smoothing", "fgsm or n-fgsm or n-pgd or pgd"]),
        ("train-cnn.py", ["--defense", "n-fgsm", "--smoothing", "1"], ["--smoothing", "below 1"]),
        ("study", ["robusness"], ["robusness", "robustness"]),
        ("study", ["--dataset", "digits", "robustness"], ["robustness comes before the flags"]),
        ("study", ["--dataset", "mnist"], ["mnist", "digits"]),
        ("study", ["--epochs", "0"], ["--epochs"]),
        ("study", ["--models", "README.md"], ["README.md", "cannot be written"]),
        ("study", ["--dataset", "digits", "--results", "README.md"], ["README.md", "cannot be written"]),
        ("study", ["--overwrite"], ["--overwrite could replace shipped files", "--models"]),
        ("study", ["--overwrite", "--models", "runs/models"], ["could replace shipped files", "--results"]),
        ("study robustness", ["--overwrite"], ["--overwrite could replace shipped files", "--results"]),
        ("study", ["--scratch", "README.md"], ["README.md", "cannot be written"]),
        ("study robustness", ["--examples", "0"], ["--examples"]),
        ("study robustness", ["--results", "README.md"], ["README.md", "cannot be written"]),
        ("study robustness", ["--dataset", "digits", "--models", "tests"], ["tests/cnn.safetensors", "no such"]),
        ("train-cnn.py", ["--device", "quantum"], ["quantum"]),
        ("test-cnn.py", ["--epsilon", "-1"], ["--epsilon", "-1"]),
        ("test-cnn.py", ["--epsilon", "0.1", "8"], ["--epsilon", "did you mean 8/255?"]),
        ("test-cnn.py", ["--epsilon", "1.5"], ["--epsilon", "'1.5' is above 1", "did you mean 1.5/255?"]),
        ("test-cnn.py", ["--epsilon", "500/255"], ["--epsilon", "'500/255' is above 1, but pixels are in [0, 1] ("]),
        ("test-cnn.py", ["--attack", "pgd", "--step-size", "2"], ["--step-size", "did you mean 2/255?"]),
        ("test-cnn.py", ["--attack", "pgd", "--step-size", "0.1"], ["--step-size 0.1 is more than twice --epsilon"]),
        ("test-cnn.py", ["--epsilon", "abc"], ["--epsilon", "abc"]),
        ("test-cnn.py", ["--epsilon", "8/0"], ["--epsilon", "8/0"]),
        ("test-cnn.py", ["--epsilon", "nan"], ["--epsilon", "nan"]),
        ("test-cnn.py", ["--epsilon", "1e999"], ["--epsilon", "1e999"]),
        ("test-cnn.py", ["--epsilon", "1e99999999"], ["--epsilon", "1e99999999"]),
        ("test-cnn.py", ["--epsilon", "8/255/2"], ["--epsilon", "8/255/2"]),
        ("test-cnn.py", ["--epsilon", "8/", "255"], ["--epsilon", "8/"]),
        ("test-cnn.py", ["--epsilon", "8/inf"], ["--epsilon", "8/inf"]),
        ("test-cnn.py", ["--epsilon", "-8/255"], ["--epsilon"]),
        ("test-cnn.py", ["--attack", "magic"], ["magic", "fgsm"]),
        ("test-cnn.py", ["--attack", "pgd", "--steps", "0"], ["--steps"]),
        ("test-cnn.py", ["--attack", "pgd", "--step-size", "-1/255"], ["--step-size"]),
        ("test-cnn.py", ["--attack", "pgd", "--restarts", "none"], ["--restarts", "none"]),
        ("test-cnn.py", ["--attack", "pgd", "--restarts", "9223372036854775807"], ["--restarts"]),
        ("test-cnn.py", ["--attack", "pgd", "--loss", "hinge"], ["--loss", "hinge"]),
        ("test-cnn.py", ["--split", "dev"], ["dev"]),
        ("test-cnn.py", ["--examples", "0"], ["--examples"]),
        ("test-cnn.py", ["--checkpoint", "none.safetensors"], ["none.safetensors", "no such checkpoint"]),
        ("test-cnn.py", ["--checkpoint", "README.md"], ["README.md", "damaged or not"]),
        ("test-cnn.py", ["--json", "README.md/out.json"], ["README.md/out.json", "cannot be written"]),
        ("test-cnn.py", ["--json", "utils"], ["utils", "cannot be written"]),
        ("test-cnn.py", ["--json", "/"], ["/ cannot be written"]),
        ("test-cnn.py", ["--json", "models/cnn.safetensors"], ["models/cnn.safetensors", "would replace it"]),
        ("test-cnn.py", ["--json", "README.md"], ["README.md is not a test report", "would replace it"]),
        ("test-cnn.py", ["--json", os.devnull], [os.devnull, "cannot be written"]),
        ("test-cnn.py", ["--figures", "README.md"], ["README.md", "cannot be written"]),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(name, arguments, parts, script, tmp_path):
    arguments = [os.fsdecode(argument) for argument in arguments]
    if name.startswith("train") and "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "a.safetensors")]
    assert_one_line(script(name, *arguments), f"{prog(name)}: error: ", *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "mnist"}, "'mnist'"),
        ({"dataset": "\x1b[31m\nred"}, "\\x1b[31m\\nred"),
        ({"class_names": list("abcdefghij")}, "other classes"),
    ],
)
def test_checkpoint_of_foreign_data(changes, message, script, trained, tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {**msgspec.structs.asdict(read_metadata(trained("cnn"))), **changes}
    for name in ("format", "network", "arguments", "versions"):
        del metadata[name]
    save_checkpoint(path, load_checkpoint(trained("cnn")), metadata)
    assert_one_line(script("test-cnn.py", "--checkpoint", path), str(path), message)


def test_checkpoint_of_the_wrong_network_data_set_or_source(script, trained):
    cnn, lstm = trained("cnn"), trained("cnn-lstm")
    assert_one_line(script("test-cnn.py", "--checkpoint", lstm), str(lstm), "holds a cnn-lstm, not a cnn")
    assert_one_line(script("test-cnn.py", "--checkpoint", cnn, "--dataset", "cifar10"), str(cnn), "digits", "cifar10")
    assert_one_line(script("test-cnn.py", "--checkpoint", cnn, "--source", "none"), "none", "no such checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flag"), [("train-cnn.py", "--output"), ("test-cnn.py", "--json")])
def test_missing_cifar10_without_network_is_one_line(name, flag, script, tmp_path):
    folder = tmp_path / "nowhere"
    result = script(name, "--dataset", "cifar10", "--data-dir", folder, flag, tmp_path / "a.safetensors", **NO_NETWORK)
    if name == "test-cnn.py":
        assert "Traceback" not in result.stderr
    assert_one_line(result, str(folder), "--data-dir", "--dataset digits")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="only Unix has RLIMIT_FSIZE")
def test_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(tmp_path):
    import resource

    output = tmp_path / "a.safetensors"
    output.write_bytes(b"earlier")
    result = subprocess.run(
        [sys.executable, ROOT / "train-cnn.py", *map(str, QUICK), "--output", output, "--overwrite", "--quiet"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        # The limit would damage the .pyc files that Python writes, and stop coverage from writing its own file.
        env=untraced() | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert_one_line(result, "File too large", str(output.with_suffix(".partial.safetensors")), status=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert output.read_bytes() == b"earlier"


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("0.02", 0.02), ("8/255", 8 / 255), ("1e-3", 0.001), (" 4/255 ", 4 / 255), ("1", 1)]
)
def test_epsilon_is_read_as_a_number_or_a_fraction(text, value):
    assert epsilon(text) == value


# ---- odd surroundings ----


@pytest.mark.slow
def test_commands_in_odd_surroundings(tmp_path):
    """One of each kind; `make torture` tries all."""
    tally = odd_surroundings(5, random.Random(0), tmp_path)
    assert (tally.survived, tally.first_loss) == (5, "")


@pytest.mark.slow
def test_figures_need_no_valid_backend(script, trained, tmp_path):
    arguments = ["--checkpoint", trained("cnn"), "--examples", 5, "--figures", tmp_path, "--epsilon", 0.1]
    result = script("test-cnn.py", *arguments, MPLBACKEND="no such thing")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "examples.png").exists()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "try --batch-size 125"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "--batch-size 125"),
        (MemoryError(), "try --batch-size 125"),
    ],
)
def test_a_full_memory_is_one_line_with_a_batch_size_to_try(error, advice, capsys):
    def command():
        raise error

    with pytest.raises(SystemExit) as end:
        run(Parser("test.py", "", []), command, batch_size=250)
    assert end.value.code == 2
    assert advice in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="ours"):
        run(Parser("test.py", "", []), lambda: (_ for _ in ()).throw(RuntimeError("ours")))


def test_an_error_that_quotes_a_file_cannot_command_the_terminal(capsys):
    def command():
        raise UserError("a\x1b[2J\nb")

    with pytest.raises(SystemExit):
        run(Parser("test.py", "", []), command)
    assert capsys.readouterr().err == "test.py: error: a [2J b\n"


@pytest.mark.parametrize("flag", ["per_image", "minimal_epsilon"])
def test_a_report_that_would_be_too_long_is_refused_before_the_attacks(flag):
    """The longest report that is not refused can be written."""
    about = {"checkpoint": "a", "network": "cnn", "dataset": "digits", "split": "train", "clean_accuracy": 1.0}
    about |= {"clean_confidence_interval": (0.0, 1.0), "attacks": []}
    asked = {"json": Path("a.json"), "attack": ["fgsm"], "epsilon": [0.1], "per_image": False, "minimal_epsilon": False}
    args = Namespace(**asked | {flag: True})
    count = (TestReport.longest - 2**16) // (2 if flag == "per_image" else 20)
    check_report_fits(count, args)
    minimal = MinimalEpsilons(norm="linf", steps=1, examples=count, median=0.1, epsilons=[1.23456e-07] * count)
    parts = {"per_image": {"clean_hits": "1" * 2 * count}, "minimal_epsilon": {"minimal_epsilon": minimal}}
    encode(TestReport(**about, examples=count, **parts[flag]), indent=2)
    with pytest.raises(UserError, match=f"leave out --{flag.replace('_', '-')}, or use --examples"):
        check_report_fits(count + 1, args)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("transferred", [True, False])
def test_fgsm_that_is_read_from_notes_keeps_its_doubts(flat, transferred, digits, trained, tmp_path):
    network, source = load_checkpoint(trained("cnn")), load_checkpoint(trained("cnn-lstm"))
    if flat:
        torch.nn.init.zeros_(network.classifier.weight)
        torch.nn.init.zeros_(source.classifier.weight)
    split = digits["test"].first(20)
    reports = []
    for _ in range(2):
        notes = Notes(tmp_path / "out.json.attacks.partial.jsonl")
        subject = SimpleNamespace(network=network, source=source if transferred else None, split=split, notes=notes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = fgsm_results(subject, Namespace(eot=1, batch_size=20), [0.1], {"source": subject.source})
        reports.append([(r.accuracy, r.unusual, r.transferred, report_row(r, "transfer").upper_bound) for r in found])
    assert reports[0] == reports[1]
    assert ("zero gradient" in reports[0][1][3], "transferred" in reports[0][1][3]) == (flat, transferred)
