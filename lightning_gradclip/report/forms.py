"""Rows as JSON, CSV or a table of text."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any


def written(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """Rows of the same keys as "json" or "csv", in which a list of mappings is a word such as "head 0.9; body 0.1"."""
    if form == "json":
        return json.dumps(rows, indent=2, allow_nan=False)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    return file.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return "; ".join(" ".join(map(str, one.values())) for one in value)
    return value


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of the same keys as lines of aligned columns, of which the first stands to the left."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
