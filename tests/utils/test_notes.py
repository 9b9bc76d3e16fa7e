"""Notes keep what an interrupted evaluation has finished."""

import json

import pytest

from utils.notes import Notes

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
