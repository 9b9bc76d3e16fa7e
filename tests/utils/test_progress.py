"""Progress is a bar in a terminal, lines in a log, and nothing where it is not wanted."""

import sys

import pytest

from utils import progress
from utils.progress import Lines


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
        "epoch 1/2: 2 of 4,000 steps, 31 s, loss 0.5\nepoch 1/2: 4 of 4,000 steps, 62 s, loss 0.5\n"
    )


def test_updates_count_like_iterations(clock, capsys):
    with progress.progress_bar(title="pgd", total=1000, unit="image") as bar:
        bar.update(250)
        clock.append(100)
        bar.update(250)
    assert capsys.readouterr().err == "pgd: 500 of 1,000 images, 100 s\n"


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
