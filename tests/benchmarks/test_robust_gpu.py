"""`make robust-gpu` trains, tests and reports, here in seconds on a CPU."""

import subprocess
import sys

import pytest

from benchmarks.formats import RobustGPUReport
from benchmarks.robust_gpu import EPOCHS, WIDTHS
from networks import NETWORKS
from tests.helpers.project import ROOT
from utils.formats import read_document


@pytest.mark.parametrize("name", WIDTHS)
def test_the_networks_are_as_large_as_they_may_be(name):
    sizes = [sum(p.numel() for p in NETWORKS[name](width).parameters()) for width in (WIDTHS[name], WIDTHS[name] + 8)]
    assert sizes[0] <= 4_500_000 < sizes[1]
    assert name in EPOCHS


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
    report = read_document(tmp_path / "report.json", RobustGPUReport, "a report")
    assert [entry.test.network for entry in report.entries] == list(NETWORKS)[:2]
    assert [entry.training.epochs for entry in report.entries] == [2, 1]
    for entry in report.entries:
        assert entry.training.defense["name"] == "n-fgsm"
        assert 0 < entry.training_seconds <= entry.seconds + 0.1
        assert [(row.name, row.examples) for row in entry.test.attacks] == [("pgd", 300), ("autoattack", 4)]
