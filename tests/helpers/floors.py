"""Whether the tests cover enough: `python -m tests.helpers.floors .coverage.json`, a file from `coverage json`."""

import json
import sys
from pathlib import Path

FLOORS = {"lines": ("covered_lines", "num_statements", 95), "branches": ("covered_branches", "num_branches", 90)}


def main(path: str) -> None:
    """Print both percentages, and end with status 1 if one is below its floor.

    coverage itself has a single floor for lines and branches together.
    """
    totals = json.loads(Path(path).read_text())["totals"]
    low = False
    for name, (covered, existing, floor) in FLOORS.items():
        percent = 100 * totals[covered] / totals[existing]
        print(f"{name}: {percent:.1f} % covered, at least {floor} % wanted")
        low |= percent < floor
    sys.exit(low)


if __name__ == "__main__":
    main(sys.argv[1])
