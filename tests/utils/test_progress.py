"""Progress is a bar in a terminal, lines in a log, and nothing where it is not wanted."""

import io
import sys

import pytest

from attacks.progress import in_turn, report_progress
from utils import progress
from utils.progress import Lines, duration, moving


@pytest.fixture
def clock(monkeypatch):
    """A list whose last number is the time in seconds."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # another test may have run a notebook
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[-1])
    return times


def test_a_log_gets_a_line_every_half_minute(clock, capsys):
    bar = progress.progress_bar(iter("abcd"), title="epoch 1/2", total=4000, unit="step")
    for seconds, _ in zip((10, 31, 40, 62), bar, strict=True):
        bar.set_postfix(loss="0.5")
        clock.append(seconds)
    assert capsys.readouterr().err == (
        "epoch 1/2: 2 of 4,000 steps in 31 s, about 17 h 13 min left, loss 0.5\n"
        "epoch 1/2: 4 of 4,000 steps in 62 s, about 17 h 12 min left, loss 0.5\n"
    )


def test_updates_count_like_iterations(clock, capsys):
    with progress.progress_bar(title="pgd", total=1000, unit="image") as bar:
        bar.update(250)
        clock.append(100)
        bar.update(250)
    assert capsys.readouterr().err == "pgd: 500 of 1,000 images in 2 min, about 2 min left\n"


def test_what_was_done_before_does_not_count_as_fast(clock, capsys):
    with progress.progress_bar(title="pgd", total=1000, unit="image", initial=900) as bar:
        clock.append(40)
        bar.update(0)
        clock.append(80)
        bar.update(50)
    assert capsys.readouterr().err == (
        "pgd: 900 of 1,000 images in 40 s\npgd: 950 of 1,000 images in 80 s, about 80 s left\n"
    )


@pytest.mark.parametrize("visible", [True, False])
def test_an_attack_moves_the_bar_and_the_bar_around_it(visible, clock):
    outer = progress.progress_bar(title="diagnosis", total=40, unit="step", visible=visible)
    inner = progress.progress_bar(title="pgd", total=1000, unit="image", initial=500, visible=False)
    places = []
    with moving(outer, 10), moving(inner, 250):
        for fraction in (0, 0.5, 0.2, 1):  # a smaller fraction than before changes nothing
            report_progress(fraction)
            places.append((inner.n, outer.n))
    assert places == [(500, 5), (625, 6.25), (625, 6.25), (750, 7.5)]
    assert (inner.n, outer.n) == (750, 10)
    report_progress(1)  # nobody listens now
    assert (inner.n, outer.n) == (750, 10)


def test_a_terminal_shows_whole_units_and_the_time_left(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    times = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: times[-1])
    with progress.progress_bar(title="pgd", total=1000, unit="image") as bar, moving(bar, 500):
        times.append(10.0)
        report_progress(0.2005)
        assert "pgd:  10%" in stream.getvalue()
        assert "| 100/1,000 [00:10<01:29, 10.03image/s]" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3500, "58 min"), (3599, "1 h 00 min"), (6000, "1 h 40 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("terminal", "notebook"), [(True, False), (False, True)])
def test_outside_a_log_it_is_a_bar_that_tqdm_shows_or_hides(terminal, notebook, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    else:
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    bar = progress.progress_bar([1], title="a", total=1, unit="step")
    assert not isinstance(bar, Lines)
    assert bool(bar.disable) == notebook
    bar.close()


def test_bar_that_is_not_visible_prints_nothing(clock, capsys):
    for _ in progress.progress_bar([1, 2], title="a", total=2, unit="step", visible=False):
        clock.append(clock[-1] + 100)
    assert capsys.readouterr().err == ""


def test_what_is_reported_in_turn_counts_as_a_share_of_the_whole(clock):
    bar = progress.progress_bar(title="diagnosis", total=100, unit="step", visible=False)
    places = []
    with moving(bar, 80):
        for _ in in_turn("abc", [1, 3]):
            for _ in in_turn([1, 2, 3, 4], [1] * 4):
                report_progress(0.5)
                places.append(bar.n)
    assert places == [2.5, 7.5, 12.5, 17.5, 27.5, 42.5, 57.5, 72.5]
    assert bar.n == 80
