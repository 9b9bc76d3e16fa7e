"""`make torture` in small, and what README says of it at full size."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import tables


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_little_torture_loses_and_runs_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.torture", "--part", "0.02", "--output", str(tmp_path / "torture.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    experiments = json.loads((tmp_path / "torture.json").read_text())["experiments"]
    assert len(experiments) >= 10
    for row in experiments:
        assert row["tried"] == row["survived"] > 0
        assert (row["lost"], row["executed"]) == (0, 0)
        line = f"{row['name']}: tried {row['tried']:,}, survived {row['survived']:,}, lost 0, executed 0"
        assert line in result.stdout.splitlines()


REPORT = {
    "experiments": [
        {"name": "SIGKILL", "tried": 30, "survived": 30, "lost": 0, "executed": 0},
        {"name": "mutated checkpoints", "tried": 10_000, "survived": 9_999, "lost": 1, "executed": 2},
    ]
}


def test_table():
    assert tables.torture_table(REPORT).splitlines()[2:] == [
        "| SIGKILL | 30 | 30 | 0 | 0 |",
        "| mutated checkpoints | 10,000 | 9,999 | 1 | 2 |",
    ]


def test_readme_has_the_table_of_the_last_torture():
    report = json.loads((ROOT / "results" / "torture.json").read_text(encoding="utf-8"))
    assert tables.torture_table(report) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert not any(row["lost"] or row["executed"] for row in report["experiments"])
    assert sum(row["tried"] for row in report["experiments"] if row["name"].startswith("SIGKILL")) >= 30
