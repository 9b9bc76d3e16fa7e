"""How tables are written: radii, percentages, and cells that stay one cell."""

import pytest

from utils.tables import Point, epsilon_text, images_text, markdown, under_headings, with_interval


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(8 / 255, "8/255"), (1 / 255, "1/255"), (0.02, "0.02"), (0.2, "0.2"), (0.0, "0"), (0.03127, "0.03127")],
)
def test_radii_are_written_as_in_papers(epsilon, text):
    assert epsilon_text(epsilon) == text


def test_an_accuracy_has_two_decimals_and_its_interval():
    assert with_interval(Point(0.1, 0.12345, (0.1, 0.15))) == "**12.35** (10.00–15.00)"


def test_images_are_counted_and_named():
    assert images_text(10_000, "cifar10", "test") == "10,000 CIFAR-10 test images"


@pytest.mark.parametrize("text", ["a|b", "a\nb", "a\r\n| b", "\ud800", "\x1b[2J"])
def test_a_cell_stays_one_cell_whatever_it_says(text):
    header, rule, row = markdown(["one", "two"], [[text, "b"]]).splitlines()
    assert (header, rule) == ("| one | two |", "| --- | --- |")
    assert row.replace("\\|", "").count("|") == 3
    assert row.isprintable()


def test_a_document_has_a_heading_for_each_text():
    assert under_headings("# A", {"B": "b", "C": "c"}) == "# A\n\n## B\n\nb\n\n## C\n\nc\n"
