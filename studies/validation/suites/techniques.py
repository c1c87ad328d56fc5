"""Published effects of methods: ratios to the same request without them, and their own values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from studies.validation.methods import EXACT, MEASURED, MethodFigure, rows_of
from studies.validation.published_files import read_rows
from studies.validation.rows import Row, Suite, by_group, errors_of

TITLE: Final = "published effects of methods"
NOTE: Final = (
    "A ratio compares a request with and without the method, so that what a source does otherwise cancels; values "
    "carry the spread of baselines as well. A method that cannot be predicted is an error, never left out."
)


def evaluate(data: Path | None = None) -> Suite:
    """Compare every published measurement of a method with its prediction.

    Raises
    ------
    Unsupported
        If a primitive of a method is not modelled, naming the row.
    """
    del data  # the figures ship with the project
    exact = [row for figure in read_rows(EXACT, MethodFigure) for row in rows_of(figure)]
    measured = [row for figure in read_rows(MEASURED, MethodFigure) for row in rows_of(figure)]
    rows = (*measured, *exact)
    parts = {"measured": measured, "exact": exact}
    groups = {f"{part}, {kind}": errors_of(of) for part, found in parts.items() for kind, of in _split(found).items()}
    detail = by_group(measured, lambda row: f"{row.what} on GPUs")
    return Suite("techniques", TITLE, rows, groups=groups | detail, note=NOTE)


def _split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the ratios and the values among rows."""
    return {"ratio": [row for row in rows if _is_ratio(row)], "value": [row for row in rows if not _is_ratio(row)]}


def _is_ratio(row: Row) -> bool:
    return row.unit == "ratio"
