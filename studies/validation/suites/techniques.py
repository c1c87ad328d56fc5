"""Published effects of methods: ratios to the same request without them, and their own values."""

from __future__ import annotations

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
    groups = {
        "measured, ratio": errors_of([row for row in measured if _is_ratio(row)]),
        "measured, value": errors_of([row for row in measured if not _is_ratio(row)]),
        "exact, ratio": errors_of([row for row in exact if _is_ratio(row)]),
        "exact, value": errors_of([row for row in exact if not _is_ratio(row)]),
    }
    by_source = by_group(rows, lambda row: f"{'ratio' if _is_ratio(row) else 'value'} on {row.source}")
    by_what = by_group(rows, lambda row: f"{row.what} on all sources")
    return Suite("techniques", TITLE, rows, groups=groups | by_source | by_what, note=NOTE)


def _is_ratio(row: Row) -> bool:
    return row.unit == "ratio"
