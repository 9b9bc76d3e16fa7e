"""Notes of unfinished evaluations, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from utils.constants import UserError
from utils.files import append, read_bytes, remove, write_atomically
from utils.formats import NewerFormat, Note, decode, encode_lines
from utils.quoting import one_line

NOT_NOTES = "does not hold notes of an evaluation ({}): move it to another folder"
LONGEST = 2**28  # bytes of a file of notes, almost a million batches

Row = tuple[str, float]  # of a finished batch: "0110..." (see formats.NotedHits), seconds


def notes_beside(output: Path) -> "Notes":
    """The notes of the evaluations whose results go to the file `output`, which may be missing. Raises as Notes does.

    Two outputs never share notes: "out.json" and "out" have notes of their own.
    """
    return Notes(output.with_name(f"{output.name}.attacks.partial.jsonl"))


class Notes:
    """The finished batches of evaluations, in a file of JSON lines that survives an interruption (formats.Note).

    One file may hold several evaluations, each under its own key, also those of other commands. Call `finish` once the
    results are stored.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file at `path`, if there is one, and drop damaged lines at its end.

        Raises OSError if it cannot be read, and UserError if it holds something else, or notes of a newer version.
        """
        self.path = Path(path)
        self.rows: dict[str, list[Row]] = {}
        self.asked: set[str] = set()  # the keys of this run's evaluations
        if self.path.exists():
            for note in read_notes(self.path):
                self.rows.setdefault(note.key, []).append((note.hits, note.seconds))
            write_atomically(self.path, self._lines(self.rows))

    @staticmethod
    def key(about: Any) -> str:
        """The key of an evaluation. about: everything that its result depends on, JSON-serialisable."""
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def kept(self, key: str, sizes: Sequence[int]) -> list[Row]:
        """The rows of an evaluation's first batches. sizes: how many images each batch has.

        In a damaged file, the first row of another size and all rows after it are dropped.
        """
        self.asked.add(key)
        noted = self.rows.get(key, [])
        fits = takewhile(lambda pair: len(pair[0][0]) == pair[1], zip(noted, sizes, strict=False))
        kept = [row for row, _ in fits]
        if len(kept) < len(noted):
            self.rows[key] = kept
            write_atomically(self.path, self._lines(self.rows))
        return list(kept)

    def add(self, key: str, rows: Sequence[Row]) -> None:
        """Note the batches that come next. Raises OSError if the disk is full, say, and names the file."""
        self.asked.add(key)
        self.rows.setdefault(key, []).extend(rows)
        if self.path.exists():
            append(self.path, self._lines({key: rows}))
        else:  # so that the first line is always whole
            write_atomically(self.path, self._lines(self.rows))

    def add_each(self, rows: dict[str, Row]) -> None:
        """Note one batch of each of several evaluations, by key. Raises as `add` does."""
        for key, row in rows.items():
            self.add(key, [row])

    @staticmethod
    def _lines(rows: dict[str, Any]) -> bytes:
        return encode_lines([Note(key, *row) for key, of_a_key in rows.items() for row in of_a_key])

    def finish(self) -> None:
        """Forget the evaluations of this run, because their results are stored; keep those of other commands."""
        forgotten = [key for key in self.asked if self.rows.pop(key, None)]
        if self.rows and forgotten:
            write_atomically(self.path, self._lines(self.rows))
        elif forgotten:
            remove(self.path)


def read_notes(path: Path) -> list[Note]:
    """The notes in a file, up to the first damaged line: a killed writer leaves one.

    Raises OSError, and UserError if the file is too long, if its first line is not a note or if a newer version of this
    code wrote it.
    """
    notes: list[Note] = []
    try:
        lines = read_bytes(path, LONGEST).splitlines()
    except ValueError as error:
        raise UserError(f"{path} {NOT_NOTES.format(error)}") from error
    for line in lines:
        try:
            notes.append(decode(line, Note))
        except ValueError as error:
            if not notes or isinstance(error, NewerFormat):
                raise UserError(f"{path} {NOT_NOTES.format(one_line(error))}") from error
            break
    return notes
