"""`lvlm validate`: how far predictions are from published and measured data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console, RenderableType
from rich.table import Table

from costmodel.errors import unknown
from studies.options import FOR_PEOPLE, OUTPUT, Format
from studies.output import Answer, emit, note
from studies.tables import GB, MISSING, MS, TERA, number, percent, sections, table
from studies.validation.published_files import source_of
from studies.validation.rows import Errors, Fit, Row, Suite, bands
from studies.validation.suites import run_suites, suite_names

SUFFIXES = (".svg", ".png", ".pdf")
ROW_COLUMNS = ("request", "what", "predicted", "measured", "error", "band", "inside")
ERROR_COLUMNS = ("rows", "median", "mean", "p90", "bias", "covered")
FEWEST_GB_BYTES = 1e8
"""Less memory is shown in bytes."""
SHOWN_UNITS: Mapping[str, tuple[str, float]] = {
    "s": ("ms", MS),
    "FLOP": ("TFLOP", TERA),
    "share": ("%", 100.0),
}
"""Units for people: their name, and how many make one SI unit."""


def validate(
    suite: str | None = None,
    /,
    *,
    data: Annotated[Path | None, Parameter(name="--data")] = None,
    figure: Annotated[Path | None, Parameter(name=("--figure", "-o"), group=OUTPUT)] = None,
    form: Format = FOR_PEOPLE,
) -> None:
    """Compare predictions with published and measured data: errors, and how many values lie in their bands.

    Parameters
    ----------
    suite : str
        One suite, such as counts, operators, published, serving, splitwise or techniques; all of them by default.
    data : Path
        A folder above raw kernel tables: the suite of operators scores its fits on them. Needs the extra `data`.
    figure : Path
        Draw predicted against measured values into this file: .svg, .png or .pdf.
    """
    if suite is not None and suite not in suite_names():
        raise unknown("suite", suite, suite_names())
    if data is not None and not data.is_dir():
        raise ValueError(f"--data={str(data)!r} is no folder; give one that holds the measured tables")
    if figure is not None:
        _check(figure)
    suites = run_suites([] if suite is None else [suite], data)
    if figure is not None:
        _draw(suites, figure)
    inputs = {
        "suites": [one.name for one in suites],
        "data": None if data is None else str(data),
        "sources": _sources(suites),
    }
    values = {"suites": {one.name: one.as_dict() for one in suites}, "bands": bands(suites)}
    emit(Answer("validate", inputs, values, lambda: _csv(suites), lambda to: _show(to, suites)), form)


def _sources(suites: Sequence[Suite]) -> dict[str, dict[str, str]]:
    """Return the sources of the rows, with the engine that stands for what each measured."""
    used = dict.fromkeys(row.source for suite in suites for row in suite.rows)
    return {key: source_of(key).model_dump() for key in used}


def _check(path: Path) -> None:
    """Refuse a file that no figure can be written to, before the work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw into {str(path)!r}; use a name that ends in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: its folder must exist, and it must be no folder itself")


def _draw(suites: Sequence[Suite], path: Path) -> None:
    if not any(row.unit == "s" for suite in suites for row in suite.rows):
        note(f"no times to draw in {', '.join(suite.name for suite in suites)}; {path} is not written")
        return
    from studies import figures, scatter  # half a second of matplotlib

    figures.save(scatter.suites_against_measured(suites), path)
    note(f"wrote {path}")


def _csv(suites: Sequence[Suite]) -> list[dict[str, Any]]:
    """Return one row a value and one a fit, all with the same keys."""
    return [_csv_row(suite.name, one) for suite in suites for one in suite.lines]


def _csv_row(suite: str, one: Row | Fit) -> dict[str, Any]:
    if isinstance(one, Row):
        values = one.as_dict()
        shown = {key: values[key] for key in ("unit", "predicted", "measured", "low", "high", "error", "inside")}
        ends = {"source": one.source, "note": one.note}
        return {"suite": suite, "name": one.name, "what": one.what, "rows": 1, **shown, **_of_fit(None), **ends}
    nothing = dict.fromkeys(("unit", "predicted", "measured", "low", "high", "error", "inside"))
    head = {"suite": suite, "name": one.name, "what": one.kind, "rows": one.errors.rows}
    return {**head, **nothing, **_of_fit(one.errors), "source": one.library, "note": ""}


def _of_fit(errors: Errors | None) -> dict[str, Any]:
    return {key: getattr(errors, key, None) for key in ("median", "mean", "p90", "bias", "coverage")}


def _show(to: Console, suites: Sequence[Suite]) -> None:
    for suite in suites:
        parts: list[RenderableType] = [f"{suite.name}: {suite.title}"]
        parts += [_rows(suite.rows)] if suite.rows else []
        parts += [errors_table({fit.name: fit.errors for fit in suite.fits}, "fit")] if suite.fits else []
        parts += [errors_table(suite.groups), summary_line(suite), suite.note]
        sections(to, *parts)
        to.print()
    to.print(bands_line(suites))


def _rows(rows: Sequence[Row]) -> Table:
    return table(ROW_COLUMNS, [row_cells(row) for row in rows], left=2)


def row_cells(row: Row) -> tuple[str, ...]:
    """Return a row as it is shown: name, quantity, predicted, measured, error, band, whether it is inside."""
    unit, scale = _shown_unit(row)
    span, verdict = MISSING, "exact" if row.exact else MISSING
    if row.low is not None and row.high is not None:
        span, verdict = f"{number(row.low * scale)}-{number(row.high * scale)}", "yes" if row.inside else "no"
    what = row.what.removesuffix("_s").removesuffix("_bytes").removesuffix("_flops").replace("_", " ")
    values = (f"{_amount(value * scale)} {unit}" for value in (row.predicted, row.measured))
    return row.name, what, *values, f"{row.error:+.1%}", span, verdict


def _shown_unit(row: Row) -> tuple[str, float]:
    """Return the unit in which a row is shown, and how many make one SI unit."""
    if row.unit == "bytes":
        return ("GB", GB) if row.measured >= FEWEST_GB_BYTES else ("bytes", 1.0)
    return SHOWN_UNITS.get(row.unit, (row.unit, 1.0))


def _amount(value: float) -> str:
    """Return a number in full if it counts something, else with four digits."""
    return f"{value:,.0f}" if float(value).is_integer() else number(value, 4)


def bands_line(suites: Sequence[Suite]) -> str:
    """Return in words how many values lie in their band."""
    found = bands(suites)
    low, high = found["asked"]
    parts = {"values": found, "of requests alone": found["requests"]}
    counts = [
        f"{part['inside']:,} of {part['banded']:,} {name} ({percent(part['coverage'])})"
        for name, part in parts.items()
        if part["banded"] and (part is found or part["banded"] < found["banded"])
    ]
    if not counts:
        return "No value here has a band."
    return f"Bands at {found['nominal']:.0%} hold {'; '.join(counts)}; {low:.0%} to {high:.0%} are asked."


def errors_table(groups: Mapping[str, Errors], what: str = "group") -> Table:
    """Return errors by group.

    Parameters
    ----------
    groups : mapping of str to Errors
        In the order in which they are shown.
    what : str
        What a group is.
    """
    return table((what, *ERROR_COLUMNS), [(name, *error_cells(errors)) for name, errors in groups.items()])


def error_cells(errors: Errors) -> tuple[str, ...]:
    """Return rows, median, mean, ninth decile, bias and coverage as they are shown."""
    shares = (errors.median, errors.mean, errors.p90)
    bias = MISSING if errors.bias is None else f"{errors.bias:+.1%}"
    covered = MISSING if errors.coverage is None else f"{errors.coverage:.0%} of {errors.banded:,}"
    return f"{errors.rows:,}", *(MISSING if share is None else percent(share) for share in shares), bias, covered


def summary_line(suite: Suite) -> str:
    """Return the summary of a suite in words."""
    errors = suite.summary
    named = (("median", errors.median), ("mean", errors.mean), ("p90", errors.p90))
    size = ", ".join(f"{name} {percent(share)}" for name, share in named if share is not None)
    exact = f"; {errors.exact:,} exact" if errors.exact else ""
    inside = (
        f"; {errors.inside:,} of {errors.banded:,} in their band ({percent(errors.coverage)})"
        if errors.coverage is not None
        else ""
    )
    return f"{errors.rows:,} rows: absolute error {size}{exact}{inside}."
