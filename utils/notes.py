"""Notes of unfinished evaluations, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from utils.files import naming, read_bytes, write_atomically
from utils.formats import Note, decode, encode_lines

Row = tuple[str, float]  # of a finished batch: "0110..." (see formats.NotedHits), seconds


class Notes:
    """The finished batches of evaluations, in a file of JSON lines that survives an interruption (formats.Note).

    One file may hold several evaluations, each under its own key. Call `finish`, which deletes the file, once the
    results of all evaluations are stored.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file at `path`, if there is one, and drop damaged lines. Raises OSError if it cannot be read."""
        self.path = Path(path)
        self.rows: dict[str, list[Row]] = {}
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
        noted = self.rows.get(key, [])
        fits = takewhile(lambda pair: len(pair[0][0]) == pair[1], zip(noted, sizes, strict=False))
        kept = [row for row, _ in fits]
        if len(kept) < len(noted):
            self.rows[key] = kept
            write_atomically(self.path, self._lines(self.rows))
        return list(kept)

    def add(self, key: str, rows: Sequence[Row]) -> None:
        """Note the batches that come next. Raises OSError if the disk is full, say, and names the file."""
        self.rows.setdefault(key, []).extend(rows)
        with naming(self.path), open(self.path, "ab") as file:
            file.write(self._lines({key: rows}))

    @staticmethod
    def _lines(rows: dict[str, Any]) -> bytes:
        return encode_lines([Note(key, *row) for key, of_a_key in rows.items() for row in of_a_key])

    def finish(self) -> None:
        """Delete the file: the results are stored elsewhere."""
        self.path.unlink(missing_ok=True)


def read_notes(path: Path) -> list[Note]:
    """The notes in a file, up to the first damaged line: a killed writer leaves one. Raises OSError."""
    notes = []
    for line in read_bytes(path, longest=None).splitlines():
        try:
            notes.append(decode(line, Note))
        except ValueError:
            break
    return notes
