"""How tables are written: radii, percentages, and cells that stay one cell."""

import pytest

from utils.tables import (
    Markup,
    Point,
    bold,
    code,
    epsilon_text,
    images_text,
    joined,
    link,
    markdown,
    plain,
    under_headings,
    with_interval,
)


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (8 / 255, "8/255"),
        (1 / 255, "1/255"),
        (8.8 / 255, "8.8/255"),
        (0.02, "0.02"),
        (0.2, "0.2"),
        (0.0, "0"),
        (0.03127, "0.03127"),
    ],
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
    assert markdown([text], []).splitlines()[0].isprintable()
    assert row.isprintable()


def test_a_document_has_a_heading_for_each_text():
    assert under_headings("# A", {"B": "b", "C": "c"}) == "# A\n\n## B\n\nb\n\n## C\n\nc\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("a & b &lt;", "a &amp; b &amp;lt;"),
        ("**a** `b` ~c~", r"\*\*a\*\* \`b\` \~c\~"),
        ("[a](javascript:x)", r"\[a\](javascript:x)"),
        (r"\[a](b)", r"\\\[a\](b)"),
        ("$x$", r"\$x\$"),
        ("_a_ channels_last", r"\_a\_ channels_last"),
        ("a\x1b[2J\u202eb", r"a \[2J b"),
        ("N-FGSM at 8/255, width 64 (best)", "N-FGSM at 8/255, width 64 (best)"),
    ],
)
def test_text_from_a_file_is_shown_as_it_is(text, shown):
    assert plain(text) == shown
    assert markdown([text], [[text]]).splitlines()[::2] == [f"| {shown} |"] * 2
    assert under_headings("# A", {text: "b"}).splitlines()[2] == f"## {shown}"


def test_only_our_own_markup_is_markdown():
    assert markdown([Markup("a<br>b")], [[bold("*")], [joined(", ", ["<", bold("x")])]]).splitlines() == [
        "| a<br>b |",
        "| --- |",
        r"| **\*** |",
        "| &lt;, **x** |",
    ]


def test_neither_code_nor_a_link_can_be_left():
    assert code("a`<b>`|c\n") == r"`a'<b>'\|c `"
    assert link("a](b", "../a b)(c\n.safetensors") == r"[a\](b](../a%20b%29%28c%20.safetensors)"
    assert link("x", "javascript:alert(1)") == "[x](javascript%3Aalert%281%29)"
