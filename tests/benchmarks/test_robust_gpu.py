"""`make robust-gpu` trains, tests and reports, here in seconds on a CPU."""

import re
import subprocess
import sys

import pytest
from msgspec.structs import replace

from benchmarks.formats import RobustGPUReport
from benchmarks.robust_gpu import EPOCHS, WIDTHS
from networks import NETWORKS
from study.plan import ROBUST
from tests.helpers.project import ROOT
from utils.formats import read_document, write_document
from utils.runs import described


@pytest.mark.parametrize("name", WIDTHS)
def test_the_networks_are_as_large_as_they_may_be(name):
    sizes = [sum(p.numel() for p in NETWORKS[name](width).parameters()) for width in (WIDTHS[name], WIDTHS[name] + 8)]
    assert sizes[0] <= 4_500_000 < sizes[1]
    assert name in EPOCHS


def refused(command, flags, message):
    """The command says why it ends, and trains nothing. Returns how it ended."""
    result = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert re.search(rf"error: .*{message}", result.stderr)
    assert "Traceback" not in result.stderr
    assert "epoch" not in result.stdout
    return result.stderr.count("\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--validation", "-1"], "argument --validation: .*'-1'"),
        (["--examples", "0"], "argument --examples: .*'0'"),
        (["--attack-batch", "0"], "argument --attack-batch: .*'0'"),
        (["--cnn-lstm-width", "9999"], "width"),
        (["--lr", "-1"], "lr"),
        (["--results", "README.md/report.json"], r"README\.md/report\.json cannot be written"),
        (["--results", "docs"], "docs cannot be written: it is not a file"),
        (["--results", "README.md"], r"README\.md is not a report"),
        (["--runs", "README.md"], r"README\.md/cnn\.safetensors cannot be written"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_training(flags, message, tmp_path):
    command = [sys.executable, "-m", "benchmarks.robust_gpu", "--device", "cpu", "--dataset", "digits"]
    refused([*command, "--runs", str(tmp_path), "--results", str(tmp_path / "report.json")], flags, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_trains_tests_and_reports_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.robust_gpu", "--device", "cpu", "--dataset", "digits"]
    command += ["--cnn-width", "4", "--cnn-lstm-width", "4", "--cnn-epochs", "2", "--cnn-lstm-epochs", "1"]
    command += ["--validation", "20", "--examples", "4", "--precision", "float32", "--seconds", "1000"]
    command += ["--runs", str(tmp_path), "--results", str(tmp_path / "report.json")]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True) for _ in range(2)
    )
    assert "epoch 2/2" in first.stdout
    assert "epoch" not in second.stdout  # the networks are there
    for flags, fault in (
        (["--lr", "0.2"], "is of another training: .*lr"),
        (["--precision", "bfloat16"], "was trained in float32 .*, not in bfloat16"),
        (["--validation", "21"], "was trained in float32 with 20 validation images, not in float32 with 21"),
    ):
        message = rf"cnn\.safetensors {fault}.*; remove .*cnn\.safetensors, or choose another folder"
        assert refused(command, flags, message) == 1
    report = read_document(tmp_path / "report.json", RobustGPUReport, "a report")
    for entry in report.entries:
        assert [(row.name, row.examples) for row in entry.test.attacks] == [("pgd", 300), ("autoattack", 4)]
    alone = ["--networks", "cnn-lstm", "--examples", "2"]
    message = r"report\.json has figures of .*cnn-lstm\.safetensors under AutoAttack on 4 images, which would be lost"
    assert refused(command, alone, message) == 1
    alone[-1] = "6"
    subprocess.run([*command, *alone], cwd=ROOT, capture_output=True, timeout=300, check=True)
    report = read_document(tmp_path / "report.json", RobustGPUReport, "a report")
    examples = [[(row.name, row.examples) for row in entry.test.attacks] for entry in report.entries]
    assert examples == [[("pgd", 300), ("autoattack", n)] for n in (4, 6)]  # the CNN's figures are kept
    other = tmp_path / "other.json"
    write_document(other, replace(report, device="another"))
    before = other.read_bytes()
    message = r"other\.json has figures of cnn from another device .*: choose another file with --results"
    assert refused(command, [*alone, "--results", str(other)], message) == 1
    assert other.read_bytes() == before
    time = tmp_path / "cnn.time.json"
    for damage in (lambda: time.write_text(""), time.unlink):
        damage()
        message = r"cnn\.time\.json .*; remove .*cnn\.safetensors, or choose another folder"
        assert refused(command, ["--examples", "6"], message) == 1
    assert [entry.test.network for entry in report.entries] == list(NETWORKS)[:2]
    assert [entry.training.epochs for entry in report.entries] == [2, 1]
    for entry in report.entries:
        planned = ROBUST[entry.test.network]
        assert entry.training.defense == described(planned.defense)
        assert (entry.training.lr, entry.training.shift) == (2 * planned.recipe.lr, planned.recipe.shift)
        assert 0 < entry.training_seconds <= entry.seconds + 0.1
