"""`make torture` in small, and what docs/reliability.md says of it at full size."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import faults, torture
from tests.helpers.hostile import Tally
from tests.helpers.project import ROOT
from tests.helpers.torture import Experiment, TortureReport, torture_table
from utils import files
from utils.formats import read_document
from utils.tables import markdown

pytestmark = pytest.mark.slow


def torture_report(root):
    return read_document(root / "results" / "torture.json", TortureReport, "a report of a torture")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("experiment", "tries"), [pytest.param(*rest, id=name) for name, *rest in torture.EXPERIMENTS])
def test_a_little_torture_loses_and_runs_nothing(experiment, tries, tmp_path):
    tally = experiment(max(2, tries // 50), random.Random(0), tmp_path)  # two, so that the second sees a loss
    if tally is None:
        pytest.skip("CIFAR-10 is not here")
    assert tally.tried == tally.survived > 0
    assert (tally.lost, tally.executed, tally.first_loss) == (0, 0, "")


@pytest.mark.parametrize(("lost", "executed"), [(0, 0), (1, 0), (0, 1)])
def test_command_tells_of_each_and_ends_with_1_if_anything_is_lost(lost, executed, monkeypatch, capsys, tmp_path):
    def experiment(tries, draw, folder):
        assert folder.is_dir()
        return Tally(tried=tries, survived=tries - lost, lost=lost, executed=executed, first_loss="why" * lost)

    monkeypatch.setattr(torture, "EXPERIMENTS", [("this", experiment, 2000), ("that", lambda *_: None, 1)])
    monkeypatch.setattr(sys, "argv", ["torture"])
    monkeypatch.setattr(torture, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    page = tmp_path / torture.PAGE
    page.parent.mkdir()
    page.write_text(f"before {torture.BEFORE_THE_TABLE}\n\nan earlier table\n")
    with pytest.raises(SystemExit) as ended:
        torture.main()
    assert ended.value.code == bool(lost or executed)
    assert capsys.readouterr().out.splitlines() == [
        f"this: tried 2,000, survived {2000 - lost:,}, lost {lost}, executed {executed}",
        *["    why"] * lost,
        "that: not run, CIFAR-10 is not here",
    ]
    report = torture_report(tmp_path)
    (row,) = report.experiments
    assert (row.name, row.tried, row.lost, row.executed) == ("this", 2000, lost, executed)
    assert page.read_text() == f"before {torture.BEFORE_THE_TABLE}\n\n{torture_table(report)}\n"

    monkeypatch.setattr(sys, "argv", ["torture", "--part", "0.5"])
    page.unlink()
    with pytest.raises(SystemExit):
        torture.main()
    assert "tried 1,000" in capsys.readouterr().out
    assert torture_report(tmp_path) == report


@pytest.mark.parametrize(
    ("amounts", "gain", "lost"),
    [
        ([1, 2, 3], 1, 0),
        ([1, 1, 2], 1, 1),
        ([2, 0, 1], 0, 1),
        ([1, OSError("gone"), 3], 1, 1),
        ([math.inf, 1, 2], 1, 0),
    ],
)
def test_lost_progress_is_seen(amounts, gain, lost, tmp_path):
    """Of a script that always ends in the same file, whatever was lost on the way."""
    script = "import pathlib, sys, time\nif sys.argv[1:]: time.sleep(60)\npathlib.Path('a').write_text('end')\n"
    (tmp_path / "script.py").write_text(script)
    amounts, starts = iter(amounts), iter([0, 1, 1, 1, 0])

    def kept():
        amount = next(amounts)
        if isinstance(amount, OSError):
            raise amount
        return amount

    def started(arguments, folder, **options):
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), *["wait"] * next(starts)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torture, "started", started)
        tally = torture.interrupted(3, ("a",), tmp_path, Path("a"), lambda process: True, kept, gain=gain)
    assert (tally.tried, tally.survived, tally.lost) == (3, 3 - lost, lost)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
@pytest.mark.parametrize("kill", [True, False])
def test_a_write_that_is_not_atomic_is_noticed(kill, monkeypatch):
    log = (ROOT / "models" / "cnn.jsonl").read_bytes()

    def write(folder):
        with files.open(folder / "a.jsonl", "wb") as file:
            file.write(log)

    monkeypatch.setitem(faults.RUNS, "training", write)
    tally = faults.fail_at_every_call("training", kill, 10)
    assert (tally.tried, tally.lost) == (2, 1)
    assert tally.first_loss.startswith("call 2: TrainingError")


def test_a_traceback_at_a_file_call_is_noticed(monkeypatch):
    def fail(folder):
        try:
            files.os.stat(folder)
        except OSError:
            raise ValueError("a mistake of ours") from None

    monkeypatch.setitem(faults.RUNS, "training", fail)
    tally = faults.fail_at_every_call("training", False, 10)
    assert (tally.lost, tally.first_loss) == (1, "call 1: ValueError('a mistake of ours')")


@pytest.mark.parametrize("text", faults.HOSTILE)
def test_a_hostile_text_that_is_not_escaped_is_noticed(text):
    assert faults.is_harmless(markdown(["a"], [[text]]))
    assert not faults.is_harmless(f"| a |\n| --- |\n| {text} |")


REPORT = TortureReport(
    python="3",
    system="Linux",
    versions={},
    experiments=[
        Experiment(name="SIGKILL", tried=30, survived=30, lost=0, executed=0),
        Experiment(name="mutated checkpoints", tried=10_000, survived=9_999, lost=1, executed=2),
    ],
)


def test_table():
    assert torture_table(REPORT).splitlines()[2:] == [
        "| SIGKILL | 30 | 30 | 0 | 0 |",
        "| mutated checkpoints | 10,000 | 9,999 | 1 | 2 |",
    ]


def test_reliability_page_ends_with_the_table_of_the_last_torture():
    report = torture_report(ROOT)
    page = (ROOT / torture.PAGE).read_text(encoding="utf-8")
    assert page.endswith(f"{torture.BEFORE_THE_TABLE}\n\n{torture_table(report)}\n")
    assert not any(row.lost or row.executed for row in report.experiments)
    assert sum(row.tried for row in report.experiments if row.name.startswith("SIGKILL")) >= 30
