"""Notes keep what an interrupted evaluation has finished."""

import json

import pytest

from utils.constants import UserError
from utils.notes import Notes, notes_beside

KEY = "a" * 64


def test_notes_of_any_length_are_kept(tmp_path):
    """An evaluation of hours does not start again because its batches are small."""
    path = tmp_path / "notes.jsonl"
    rows = [("1", 0.001)] * 20_000
    Notes(path).add(KEY, rows)
    before = path.read_bytes()
    assert len(before) > 2**20
    assert Notes(path).kept(KEY, [1] * 20_000) == rows
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "line", [None, [], 7, {"a": 1}, [KEY], [KEY, "01"], [KEY, "0121", 1.0], [KEY, "01", "1"], [1, "01", 1.0]]
)
def test_damaged_lines_are_dropped(line, tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add("b" * 64, [("10", 0.5)])
    intact = path.read_bytes()
    path.write_bytes(intact + json.dumps(line).encode() + b"\n")
    assert Notes(path).rows == {"b" * 64: [("10", 0.5)]}
    assert path.read_bytes() == intact


@pytest.mark.parametrize("text", ["noted\n", "hello", "{}\n", json.dumps([KEY, "01", 1.0, 2]) + "\n"])
def test_a_file_that_holds_something_else_is_refused_and_kept(text, tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="does not hold notes of an evaluation"):
        Notes(path)
    assert path.read_text() == text


def test_a_note_of_a_newer_version_is_not_dropped(tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add(KEY, [("10", 0.5)])
    text = path.read_text() + json.dumps([KEY, "01", 1.0, 2]) + "\n"
    path.write_text(text)
    with pytest.raises(UserError, match="format 2, newer than 1"):
        Notes(path)
    assert path.read_text() == text


def test_a_command_forgets_its_own_evaluations_only(tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add(KEY, [("10", 0.5)])
    other = Notes(path)
    other.add("b" * 64, [("01", 0.5)])
    other.finish()
    assert Notes(path).rows == {KEY: [("10", 0.5)]}
    last = Notes(path)
    assert last.kept(KEY, [2]) == [("10", 0.5)]
    last.finish()
    assert not path.exists()


def test_notes_that_nobody_asked_for_stay(tmp_path):
    path = tmp_path / "notes.jsonl"
    Notes(path).add(KEY, [("10", 0.5)])
    Notes(path).finish()
    assert Notes(path).rows == {KEY: [("10", 0.5)]}


def test_outputs_of_different_names_share_no_notes(tmp_path):
    names = ("out", "out.json", "out.safetensors", "out.jsonl", ".json")
    assert len({notes_beside(tmp_path / name).path for name in names}) == len(names)
