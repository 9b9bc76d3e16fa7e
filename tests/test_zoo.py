"""The zoo's report: its table is in the documents, and nobody in it got the wrong verdict."""

import pytest
import torch

from tests.helpers import zoo
from tests.helpers.defences import BROKEN
from tests.helpers.project import ROOT
from tests.helpers.zoo import PAGE, Cage, Row, ZooReport, adapted_accuracy, cages, row, wrong, zoo_table
from utils.checkpoints import load_checkpoint
from utils.formats import decode, encode, read_document

REPORT = ROOT / zoo.OUTPUT


def made_up(name="noisy images", family="randomness", verdict="not trustworthy: at most 0.0 %", **fields):
    figures = {"first": 0, "images": 100, "clean_accuracy": 0.9, "quoted": 0.5, "at_most": 0.01, "seconds": 1.0}
    return Row(name=name, family=family, honest=family == "honest", verdict=verdict, failed=[], **(figures | fields))


def test_who_got_the_wrong_verdict():
    right = [made_up(), made_up("cnn", "honest", "trustworthy"), made_up(verdict="cannot say: why")]
    assert wrong(right) == []
    assert wrong([*right, made_up(verdict="trustworthy")]) == ["noisy images was trusted"]
    assert wrong([made_up("cnn", "honest", "cannot say: why", first=500)]) == [
        "cnn was not trusted from image 500 on: cannot say: why"
    ]


def test_the_table_has_a_row_for_each_name():
    rows = [
        made_up("cnn", "honest", "trustworthy", first=500, images=300, quoted=0.1),
        made_up("cnn", "honest", "cannot say: why", quoted=0.5),
        made_up(adapted=0.02),
    ]
    report = ZooReport(rows=rows)
    assert decode(encode(report), ZooReport) == report
    assert zoo_table(report).splitlines()[2:] == [
        "| randomness | noisy images | 100 | 90.00 | 50.00 | 2.00 | 1.00 | not trustworthy |",
        "| honest | cnn | 400 | 90.00 | 20.00 |  | 1.00 | trustworthy (1 of 2), cannot say (1 of 2) |",
    ]


def test_the_zoo_has_what_it_promises():
    assert len(BROKEN) >= 20
    assert len({broken.name for broken in BROKEN}) == len(BROKEN)
    everyone = cages()
    assert {broken.name for broken in BROKEN} < {cage.name for cage in everyone}
    assert len({(cage.name, cage.first) for cage in everyone}) == len(everyone)
    for name in zoo.TRAININGS:
        assert sum(cage.name == name for cage in everyone) == 20


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_every_defence_classifies_and_is_broken_by_construction(broken, trained, digits):
    """On digits; `make zoo` shows it on CIFAR-10."""
    network, split = load_checkpoint(trained("cnn")), digits["test"].first(40)
    images, labels = split.take(torch.arange(len(split)))
    torch.manual_seed(0)
    defended = broken.build(load_checkpoint(trained("cnn")))
    if isinstance(defended, torch.nn.Module):
        defended.eval()
    with torch.no_grad():
        assert float((defended(images).argmax(1) == labels).float().mean()) >= 0.3  # chance is 0.1
    assert adapted_accuracy(broken, network, split, 0.2) <= 0.1


def test_the_shipped_report_is_in_the_documents_and_accuses_nobody():
    report = read_document(REPORT, ZooReport, "a report of the zoo")
    assert zoo_table(report) in (ROOT / PAGE).read_text(encoding="utf-8")
    assert wrong(report.rows) == []
    assert {broken.name for broken in BROKEN} <= {row.name for row in report.rows}


def test_a_row_says_what_the_diagnosis_says(trained, digits):
    network = load_checkpoint(trained("cnn"))
    split = digits["test"].first(10)
    diagnosis, seconds = zoo.diagnosed(network, split, 0.1, source=network, queries=10)
    found = row(Cage("cnn", "honest", 0, 10), diagnosis, 0.9, None, seconds)
    assert found.verdict == diagnosis.verdict
    assert found.at_most == diagnosis.strongest.accuracy <= found.clean_accuracy
    assert (found.quoted, found.adapted) == (0.9, None)
