"""TODO: utils.notes."""

import hashlib
import json
import math
from itertools import takewhile
from pathlib import Path

from utils.files import naming, write_atomically
from utils.formats import read_json_lines


class Notes:
    """Finished batches of evaluations, in a file of JSON lines that outlives an interruption.

    A line is [key of the evaluation, "0110...", seconds]: 1 for a correct image. Whoever has stored what came out of
    the evaluations calls `finish`, which deletes the file.
    """

    def __init__(self, path):
        """What the file at `path` holds, if there is one; lines that are none, as of a killed writer, are dropped."""
        self.path = Path(path)
        self.rows: dict[str, list] = {}
        if self.path.exists():
            for key, *row in filter(self._is_a_line, read_json_lines(self.path, longest=None)):
                self.rows.setdefault(key, []).append(tuple(row))
            self._write()

    @staticmethod
    def _is_a_line(line):
        if not (isinstance(line, list) and [type(part) for part in line[:2]] == [str, str] and len(line) == 3):
            return False
        return set(line[1]) <= {"0", "1"} and isinstance(line[2], (int, float)) and math.isfinite(line[2])

    @staticmethod
    def key(about):
        """A name for an evaluation. about: what is evaluated and how, JSON-serialisable."""
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def kept(self, key, sizes):
        """(hits, seconds) of an evaluation's first batches, which are of these sizes.

        Of a damaged file, those before the first that is of another size; that one and what follows it are dropped.
        """
        noted = self.rows.get(key, [])
        fits = takewhile(lambda pair: len(pair[0][0]) == pair[1], zip(noted, sizes, strict=False))
        kept = [row for row, _ in fits]
        if len(kept) < len(noted):
            self.rows[key] = kept
            self._write()
        return list(kept)

    def add(self, key, rows):
        """rows: (hits, seconds) of the batches that come next."""
        self.rows.setdefault(key, []).extend(rows)
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([key, *row]) + "\n" for row in rows)

    def _write(self):
        lines = [[key, *row] for key, rows in self.rows.items() for row in rows]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def finish(self):
        self.path.unlink(missing_ok=True)
