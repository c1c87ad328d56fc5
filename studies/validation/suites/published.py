"""Published end-to-end figures that one request, or one fixed batch, answers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from studies.validation.published_files import EndToEnd, read_rows
from studies.validation.requests import band, is_calibration, predict_figure, value
from studies.validation.rows import Row, Suite, by_group

TITLE: Final = "published times and memory of one request"
FILE: Final = "end_to_end.csv"
NOTE: Final = "Sources disagree on equal requests by 1.5 to 4 times; what each row assumes is in its note."


def evaluate(data: Path | None = None) -> Suite:
    """Compare every published figure of a request, unless a setting was derived from it, with its prediction."""
    del data  # the figures ship with the project
    rows = tuple(_row(figure) for figure in read_rows(FILE, EndToEnd) if not is_calibration(figure))
    return Suite("published", TITLE, rows, groups=by_group(rows, lambda row: row.what), note=NOTE)


def _row(figure: EndToEnd) -> Row:
    prediction = predict_figure(figure)
    low, high = band(prediction, figure.what) or (None, None)
    return Row(
        figure.name,
        figure.what,
        value(prediction, figure.what),
        figure.measured,
        figure.si_unit,
        figure.source,
        low=low,
        high=high,
        rounding=figure.rounding,
        note=figure.note,
    )
