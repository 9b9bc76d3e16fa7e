"""The page of the explorer: what it shows when it cannot start, and how the command ends."""

import sys

import IPython.display
import pytest

from study import explore
from utils.constants import UserError


def test_a_hostile_error_is_shown_as_it_is(monkeypatch):
    """A checkpoint's header may hold anything, and the error quotes it."""

    def refuse(_notebook):
        raise UserError("unknown network '<img src=x onerror=alert(1)>'")

    shown = []
    monkeypatch.setattr(explore, "explorer", refuse)
    monkeypatch.setattr(IPython.display, "display", lambda markdown: shown.append(markdown.data))
    explore.page()
    assert shown[-1] == "**unknown network '&lt;img src=x onerror=alert(1)&gt;'**"


def test_the_command_ends_with_the_status_of_the_server(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["explore", "--help-me"])
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit) as ended:
        explore.serve()
    assert ended.value.code == 1
