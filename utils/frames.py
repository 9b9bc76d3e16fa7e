"""Any report as a pandas DataFrame, for notebooks and spreadsheets."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from utils.constants import UserError
from utils.files import read_bytes
from utils.formats import TestReport, parse_json
from utils.quoting import one_line

if TYPE_CHECKING:
    from pandas import DataFrame


def to_frame(report: Struct | Mapping[str, Any] | str | Path) -> "DataFrame":
    """A row for each network, attack and radius of a report.

    report: what test-*.py --json or the study wrote: the path of the file, its JSON, or the report that was read.
    The columns are the fields of the report, of its networks and of its attacks, such as network, examples, attack,
    setting, epsilon, accuracy and the attack's options; `low` and `high` are the ends of the 95 % interval.
    Raises UserError if the file is not such a report, or if pandas is not installed.
    """
    try:
        from pandas import DataFrame  # imported late: nothing else needs it
    except ImportError as error:
        raise UserError("to_frame needs the package pandas: pip install pandas") from error

    if isinstance(report, (str, Path)):
        try:
            found = parse_json(read_bytes(report, TestReport.longest).decode())
        except (OSError, ValueError) as error:
            raise UserError(f"{report} cannot be read as a report: {one_line(error)}") from error
    else:
        found = msgspec.to_builtins(report)
    try:
        rows = list(_rows(found))
    except (AttributeError, KeyError, TypeError, ValueError):  # another structure than that of our reports
        rows = []
    if not rows:
        raise UserError("this is not a report with attacks, such as test-*.py --json writes")
    return DataFrame(rows)


def _rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in report.get("networks", [report]):
        about = _plain(report) | _plain(entry)
        attacks = entry.get("attacks", entry.get("results"))
        if attacks is None:  # the study has two lists of FGSM, and radius 0 stands for clean images
            settings = ("transfer", "white_box")
            attacks = [{"name": "fgsm", "setting": name, **row} for name in settings for row in entry.get(name, ())]
        for row in attacks:
            low, high = row["confidence_interval"]
            options = {key: value for key, value in row.items() if key not in ("name", "confidence_interval")}
            yield about | {"attack": row["name"], **options, "low": low, "high": high}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a cell can hold, without the number of the format."""
    return {
        key: value for key, value in fields.items() if not isinstance(value, (list, tuple, dict)) and key != "format"
    }
