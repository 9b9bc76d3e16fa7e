"""Whether enough is covered: `python -m tests.floors .coverage.json`, which `coverage json` has written."""

import json
import sys
from pathlib import Path

FLOORS = {"lines": ("covered_lines", "num_statements", 95), "branches": ("covered_branches", "num_branches", 90)}


def main(path):
    """Print both percentages; status 1 if either is below its floor, of which coverage itself has one for both."""
    totals = json.loads(Path(path).read_text())["totals"]
    low = False
    for name, (covered, of, floor) in FLOORS.items():
        percent = 100 * totals[covered] / totals[of]
        print(f"{name}: {percent:.1f} % covered, of which {floor} % are asked")
        low |= percent < floor
    sys.exit(low)


if __name__ == "__main__":
    main(sys.argv[1])
