"""Reports as tables: a row for each network, attack and radius."""

import msgspec
import pytest

from tests.helpers.project import ROOT
from utils.constants import UserError
from utils.formats import MinimalEpsilons, TestReport, read_document, write_document
from utils.frames import to_frame

pandas = pytest.importorskip("pandas")
RESULTS = ROOT / "results"


@pytest.mark.parametrize("name", ["cnn.json", "diagnosis/cnn-robust.json"])
def test_a_test_report_has_a_row_for_each_attack_and_radius(name):
    report = read_document(RESULTS / name, TestReport, "a test report")
    for frame in (to_frame(RESULTS / name), to_frame(report)):
        assert isinstance(frame, pandas.DataFrame)
        assert frame["epsilon"].tolist() == [row.epsilon for row in report.attacks]
        assert frame["accuracy"].tolist() == [row.accuracy for row in report.attacks]
        assert list(zip(frame["low"], frame["high"], strict=True)) == [
            row.confidence_interval for row in report.attacks
        ]
        assert set(frame["attack"]) == {row.name for row in report.attacks}
        assert set(frame["network"]) == {report.network}
        assert "checks" not in frame


def test_the_studys_reports_have_a_row_for_each_network_too():
    robustness = to_frame(RESULTS / "robustness.json")
    assert set(robustness["attack"]) >= {"fgsm", "pgd", "autoattack"}
    assert "cnn-robust" in set(robustness["name"])
    study = to_frame(RESULTS / "study.json")
    baseline = study[(study["name"] == "cnn") & (study["setting"] == "white_box")]
    assert baseline["epsilon"].tolist() == [0, 0.02, 0.04, 0.06, 0.08, 0.1]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"attacks": []}',
        '{"networks": 3}',
        '{"networks": [1]}',
        '{"attacks": [{"name": "x"}]}',
        '{"attacks": [{"name": "x", "confidence_interval": [1]}]}',
    ],
)
def test_another_file_is_one_line(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError):
        to_frame(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot be read"):
        to_frame(tmp_path / "none.json")


def test_a_report_on_many_images_is_written_and_read(tmp_path):
    report = read_document(RESULTS / "cnn.json", TestReport, "a test report")
    found = MinimalEpsilons(norm="linf", steps=20, examples=100_000, median=0.0123456, epsilons=[0.0123456] * 100_000)
    write_document(tmp_path / "a.json", msgspec.structs.replace(report, minimal_epsilon=found), indent=2)
    assert len(to_frame(tmp_path / "a.json")) == len(report.attacks)
