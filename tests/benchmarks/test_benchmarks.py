"""The benchmarks run, their report is read back and shown, and docs/performance.md computes what gradients weigh."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import AttackError
from benchmarks import attacks
from benchmarks import tables as benchmark_tables
from benchmarks.formats import AgreementEntry, AgreementReport, BenchmarkReport, Growth, MemoryGrowth, SpeedGrowth
from benchmarks.run import SECTIONS, main
from networks import CNN, CNNLSTM
from networks.cost import multiply_adds
from tests.helpers.instances import instances
from tests.helpers.project import ROOT, untraced
from utils.constants import UserError
from utils.formats import decode, encode, read_document


def row(name, seconds, images=None):
    speed = images and images / seconds
    return {
        "name": name,
        "seconds": seconds,
        "seconds_iqr": 0.01,
        "images_per_second": speed,
        "ratio": seconds / 0.5,
        "ratio_iqr": 0.02,
    }


PAIR = [row("ours", 0.5, 1000), row("theirs", 1.0, 1000)]
REPORT = {
    "dataset": "digits",
    "device": "a processor",
    "cores": 2,
    "threads": 2,
    "python": "3.12",
    "versions": {"torch": "2.9", "foolbox": None},
    "quick": False,
    "startup": {"import": [row("import attacks", 0.5), row("import torch", 1.0)]},
    "attacks": [
        {
            "network": "cnn-lstm",
            "attack": "fgsm",
            "batch": 250,
            "peers_memory_format": "contiguous_format",
            "rows": [*PAIR, row("slow", 3.0, 1000)],
        }
    ],
    "adversarial-sets": [{"epsilons": 10, "images": 1000, "rows": PAIR}],
    "training": [{"defense": "n-fgsm", "rows": PAIR}],
    "time-to-accuracy": {
        "precision": "bfloat16",
        "epochs": 4,
        "accuracies": {"ours": [0.81, 0.82], "plain": [0.8]},
        "rows": [PAIR[0], PAIR[1] | {"seconds_iqr": None}],
    },
    "ablation": {
        "precision": "float32",
        "epochs": 2,
        "accuracies": {"ours": [0.8, 0.82], "theirs": [0.79, 0.8]},
        "rows": PAIR,
    },
    "processes": {
        "precision": "float32",
        "epochs": 4,
        "accuracies": {"ours": [0.4], "theirs": [0.5]},
        "rows": PAIR,
    },
    "growth": [{"width": 16, "what": "FGSM", "images_per_second": 5000.4}],
    "memory": [{"batch": 250, "what": "test-cnn.py", "peak_mebibytes": 512}],
    "profile": {"a step": {"convolution": 0.75, "other": 0.25}, "another": {"LSTM": 1.0}},
}


def report_of(**changes) -> BenchmarkReport:
    """REPORT with some fields changed, as it is read from a file."""
    return decode(json.dumps({**REPORT, **changes}), BenchmarkReport)


def test_document_says_what_the_report_does():
    text = benchmark_tables.benchmarks_document(report_of())
    for part in (
        "a processor, 2 cores, 2 threads, Python 3.12, torch 2.9; digits",
        "| cnn-lstm | fgsm | 250 | contiguous | 2,000 | 1,000 | 333 | **2.00** (0.02) |",
        "## Adversarial sets: 10 epsilon",
        "## Training: defence n-fgsm",
        "Ours in 4 epochs and bfloat16, against the plain loop. "
        "Test accuracy in percent, by seed: ours 81.00, 82.00; plain 80.00.",
        "| theirs | 1 (few runs) | 1,000 | **2.00** (0.02) |",
        "| theirs | 79.50 | -1.50 | 79.00, 80.00 | 1 |",
        "The same training of 4 epochs in float32. Validation accuracy in percent, by seed: ours 40.00; theirs 50.00.",
        "| theirs | 1 (0.01) | 1,000 | **2.00** (0.02) |",
        "| import torch | 1 (0.01) |  | **2.00** (0.02) |",
        "| FGSM | width 16 | 5,000 |",
        "| test-cnn.py | batch 250 | 512 |",
        "| a step | 75 | 25 | 0 |",
    ):
        assert part in text


def test_document_has_only_the_sections_that_were_run():
    header = {name: REPORT[name] for name in ("dataset", "device", "cores", "threads", "python", "versions", "quick")}

    def document(**fields):
        return benchmark_tables.benchmarks_document(decode(json.dumps({**header, **fields}), BenchmarkReport))

    assert document().count("\n\n") == 1
    assert "no figure means anything" in document(quick=True)
    assert "## Start-up: import" in document(startup=REPORT["startup"])


def test_the_short_table_names_the_fastest_of_the_others():
    table = benchmark_tables.benchmarks_table(report_of())
    assert (
        "| CNN-LSTM, FGSM, batch 250, out of the box | 2,000 images/s | theirs: 1,000 images/s | **2.00** (0.02) |"
        in table
    )
    assert "| training to 80.374 % |" in table
    three = [{"epsilons": 10, "images": 1000, "rows": [*PAIR, row("slow", 3.0, 1000)]}]
    slow = benchmark_tables.benchmarks_table(report_of(**{"adversarial-sets": three}))
    assert all(f"10 epsilon | 2,000 images/s | {name}" in slow for name in ("theirs", "slow"))


@st.composite
def growths(draw, schema: type[Growth]):
    """Measurements that grow with one thing."""
    axis = draw(st.sampled_from(["width", "batch", "network", "images", "steps", "threads"]))
    values = {name: st.none() for name in ("width", "batch", "network", "images", "steps", "threads")}
    values[axis] = st.text(min_size=1, max_size=10) if axis == "network" else st.integers(1, 10**9)
    return draw(instances(schema, **values))


REPORTS = {
    BenchmarkReport: instances(
        BenchmarkReport,
        growth=st.none() | st.lists(growths(SpeedGrowth), max_size=3),
        memory=st.none() | st.lists(growths(MemoryGrowth), max_size=3),
    ),
    AgreementReport: instances(AgreementReport, entries=st.lists(instances(AgreementEntry), max_size=3)),
}


@settings(max_examples=25, deadline=None)
@given(REPORTS[BenchmarkReport])
def test_every_report_of_the_benchmarks_is_read_back_and_shown(report):
    assert decode(encode(report), BenchmarkReport) == report
    assert benchmark_tables.benchmarks_document(report).encode()
    assert benchmark_tables.benchmarks_table(report).encode()


@settings(max_examples=25, deadline=None)
@given(REPORTS[AgreementReport])
def test_every_report_of_the_agreement_is_read_back_and_shown(report):
    assert decode(encode(report), AgreementReport) == report
    assert (benchmark_tables.agreement_table(report) + benchmark_tables.radii_table(report)).encode()


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("attacks", lambda attacks: attacks[0].update(rows=[])),
        ("attacks", lambda attacks: attacks[0].update(peers_memory_format="x")),
        ("training", lambda trainings: trainings[0]["rows"].pop()),
        ("growth", lambda growth: growth[0].pop("width")),
        ("growth", lambda growth: growth[0].update(batch=3)),
        ("time-to-accuracy", lambda timed: timed["accuracies"].update(ours=[81])),
    ],
)
def test_a_report_that_no_table_could_show_is_refused_in_one_line(section, change, tmp_path):
    changed = json.loads(json.dumps(REPORT))
    change(changed[section])
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"benchmarks\.json is not a report \({section}") as raised:
        read_document(path, BenchmarkReport, "a report")
    assert "\n" not in str(raised.value)


WITHOUT_PEERS = [section for section in SECTIONS if section != "attacks"]


def quick_run(python: object, folder: Path, *sections: str) -> BenchmarkReport:
    """Run sections on a few digits and return the report."""
    command = [str(python), "-m", "benchmarks.run", "--quick", "--results", str(folder), *sections]
    done = subprocess.run(command, cwd=ROOT, env=untraced(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return read_document(folder / "benchmarks.json", BenchmarkReport, "a report")


@pytest.mark.slow
def test_every_section_runs_and_earlier_sections_are_kept(tmp_path):
    first = quick_run(sys.executable, tmp_path, "growth", "memory")
    report = quick_run(sys.executable, tmp_path, *(name for name in WITHOUT_PEERS if name not in ("growth", "memory")))
    assert report.quick
    assert (report.growth, report.memory) == (first.growth, first.memory)
    assert all(getattr(report, section.replace("-", "_")) for section in WITHOUT_PEERS)
    for shares in report.profile.values():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["convolution"] > 0
    assert ["LSTM" in shares for shares in report.profile.values()] == [False, False, True]
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text == benchmark_tables.benchmarks_document(report)
    assert all(
        f"## {title}" in text for title in ("Start-up: --help", "Many processes", "How the cost grows", "Peak memory")
    )


@pytest.mark.slow
def test_part_of_the_benchmarks_does_not_replace_those_of_another_machine(tmp_path):
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps({**REPORT, "quick": True}))
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--results", str(tmp_path), "startup"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "benchmarks.json is not of this machine and environment (device," in done.stderr
    assert json.loads(path.read_text()) == {**REPORT, "quick": True}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "this machine, or this build of torch, does not have it"),
        (["--device", "cpuu"], "invalid choice: 'cpuu'"),
        (["--rounds", "0"], "'0' is not a whole number"),
        (["--results", "/dev/null"], "/dev/null/benchmarks.json cannot be written"),
    ],
)
def test_a_mistake_is_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--dataset", "digits", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_attacks_find_what_the_peers_find(tmp_path):
    """In their own environment, which `make .venv-peers/installed` makes."""
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("the peers are not here: make .venv-peers/installed")
    report = quick_run(python, tmp_path, "attacks")
    ours = [speed for speed in report.attacks if speed.peers_memory_format == "channels_last"]
    expected = [
        ("fgsm", 1),
        ("fgsm", 8),
        ("pgd-20", 1),
        ("pgd-20 in bfloat16", 1),
        ("pgd-20", 8),
        ("pgd-20 in bfloat16", 8),
    ]
    assert [(speed.network, speed.attack, speed.batch) for speed in ours[:6]] == [("cnn", *each) for each in expected]
    of_the_lstm = [(speed.attack, speed.batch) for speed in ours[6:]]
    assert {speed.network for speed in ours[6:]} == {"cnn-lstm"}
    assert of_the_lstm == [each for each in expected if each in of_the_lstm]
    # Not every CPU has an LSTM in bfloat16, and fewer than eight images may withstand PGD.
    assert {("fgsm", 1), ("pgd-20", 1)} <= set(of_the_lstm)
    assert all(len(speed.rows) == 4 for speed in report.attacks)


@pytest.mark.parametrize(("seconds", "worth"), [(2, True), (3, False), (None, False)])
def test_bfloat16_is_left_out_where_a_cpu_only_imitates_it(seconds, worth, monkeypatch):
    def in_bfloat16():
        if seconds is None:
            raise AttackError("this device cannot compute the model in bfloat16")
        return seconds

    monkeypatch.setattr(attacks, "timed", lambda function: function())
    assert attacks.worth_measuring(in_bfloat16, lambda: 1, at_most=2) is worth


@pytest.mark.parametrize(("title", "network"), [("CNN", CNN), ("CNN-LSTM", CNNLSTM)])
def test_performance_page_computes_what_gradients_weigh(title, network):
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    times = r"\| (.*) ms " * 3
    rows = re.findall(rf"\| {title}, width (\d+) \| ([\d.]+) MB {times}\| (.*) million", page)
    assert len(rows) == 2
    for width, megabytes, nvlink, fast, slow, million in rows:
        built = network(int(width))
        gradients = 4 * sum(parameter.numel() for parameter in built.parameters())
        assert float(megabytes) == pytest.approx(gradients / 1e6, abs=0.005)
        for milliseconds, bytes_per_second in ((nvlink, 300e9), (fast, 12.5e9), (slow, 0.125e9)):
            assert float(milliseconds) == pytest.approx(1000 * gradients * 7 / 4 / bytes_per_second, rel=0.1)
        assert float(million) == pytest.approx(multiply_adds(built) / 1e6, abs=0.05)
