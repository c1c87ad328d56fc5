"""`lvlm compare`: predictions beside measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from costmodel import load_hardware
from costmodel.efficiency.fitted import FittedProfile, read_fitted
from costmodel.errors import first_line
from studies import runs
from studies.options import FOR_PEOPLE, OUTPUT, Format
from studies.output import Answer, emit, note
from studies.tables import percent, seconds, sections, table

if TYPE_CHECKING:
    from runtime.compare import ComparedGroup, ComparedRow

GROUPS: Final = ("implementation, what", "predicted by", "rows", "median", "p90", "bias", "in band")
ROWS: Final = ("implementation, what", "shape", "measured", "predicted", "error", "in band")
MISSING: Final = "-"
MOST_ROWS: Final = 40
"""Rows that are shown one by one; all are in the JSON and the CSV."""
UNSHOWN: Final = ("model", "part", "direction", "kind", "codec", "file_bytes", "width", "height")
"""Keys of a shape that its row names, or that say little."""
KERNELS: Final = ("gemm", "prefill_attention", "decode_attention", "encoder_attention", "elementwise", "collective")
SUFFIXES: Final = (".svg", ".png", ".pdf")
REMARK: Final = (
    "Errors are (predicted - measured) / measured: median and p90 of their size, bias their median with its sign."
)


def compare(
    measurements: Annotated[tuple[Path, ...], Parameter(show_default=False)],
    /,
    *,
    model: str | None = None,
    hardware: str | None = None,
    engine: str = "fused",
    fitted: Annotated[tuple[Path, ...], Parameter(show_default=False)] = (),
    simulated: str | None = None,
    form: Format = FOR_PEOPLE,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), group=OUTPUT)] = None,
) -> None:
    """Put measurements beside their predictions: signed errors, medians, and how many lie in the band.

    A result of vllm bench serve, guidellm or aiperf is put beside a simulated run: latencies and throughput.

    Kernels are predicted under the fitted curve of their library on the device, where there is one, and else under the
    flat efficiencies of the engine; stages as lvlm predict does.

    Parameters
    ----------
    measurements : tuple of Path
        Files of measurement lines, or folders of them; or one result of a benchmark tool.
    model : str
        Of lines of stages that name none.
    hardware : str
        The device; by default the one that the lines name.
    engine : str
        What the software adds; see lvlm engines.
    fitted : tuple of Path
        A file of curves that lvlm calibrate wrote, which counts before those of the catalogue. Repeat for several.
    simulated : str
        Beside a result: what lvlm simulate -o run.json wrote, or a PLAN.toml, under which the result's own requests are
        simulated; by default --model on one --hardware.
    output : Path
        Draw measured against predicted times into this file, .svg, .png or .pdf.
    """
    if len(measurements) == 1 and runs.holds_result(str(measurements[0])):
        if output is not None or fitted:
            raise ValueError("a result has no --output and no --fitted; leave them out")
        emit(runs.compared(str(measurements[0]), simulated, model=model, hardware=hardware), form)
        return
    if simulated is not None:
        raise ValueError("--simulated stands beside one result of vllm bench serve, guidellm or aiperf; give that file")
    from runtime import compare as comparing
    from runtime.measurement import measurement_files, read_measurements

    _check(output)
    files = measurement_files(measurements)
    if not files:
        raise ValueError(f"no measurement lines, *.jsonl, in {', '.join(map(str, measurements))}")
    lines = [line for file in files for line in read_measurements(file)]
    profiles = [_read(path) for path in fitted]
    device = load_hardware(hardware) if hardware else None
    rows = comparing.compare(lines, model, hardware=device, engine=engine, fitted=profiles)
    found = comparing.groups(rows)
    if output is not None and any(row.predicted_s for row in rows):
        _draw(output, rows)
    elif output is not None:
        note(f"nothing is predicted, so {output} was not drawn")
    inputs = {
        "measurements": [str(file) for file in files],
        "model": model,
        "hardware": hardware,
        "engine": engine,
        "fitted": [str(path) for path in fitted],
    }
    values = {"groups": [asdict(group) for group in found], "rows": [_values(row) for row in rows]}
    emit(Answer("compare", inputs, values, lambda: _flat(rows), lambda to: _show(to, rows, found)), form)


def _check(output: Path | None) -> None:
    """Refuse a picture that cannot be written, before the work is done."""
    if output is not None and not (output.suffix in SUFFIXES and output.parent.is_dir()):
        raise ValueError(f"cannot write {str(output)!r}; name a {', '.join(SUFFIXES)} file in a folder that exists")


def _read(path: Path) -> FittedProfile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read fitted curves {str(path)!r}: {first_line(error)}") from None
    return read_fitted(text, str(path))


def _draw(path: Path, rows: Sequence[ComparedRow]) -> None:
    from studies import figures, scatter

    figures.save(scatter.predicted_against_measured(rows), path)
    note(f"wrote {path}")


def _values(row: ComparedRow) -> dict[str, Any]:
    names = ("kind", "variant", "implementation", "precision", "device", "source")
    times = ("measured_s", "predicted_s", "error", "low_s", "high_s", "inside")
    return {**{name: getattr(row, name) for name in (*names, *times)}, "shape": dict(row.shape)}


def _flat(rows: Sequence[ComparedRow]) -> list[dict[str, Any]]:
    return [{**_values(row), "shape": json.dumps(dict(row.shape))} for row in rows]


def _show(to: Console, rows: Sequence[ComparedRow], found: Sequence[ComparedGroup]) -> None:
    stages = [_stage(row) for row in rows if row.kind not in KERNELS and row.predicted_s is not None]
    parts: list[Table | str] = [table(GROUPS, [_group(group) for group in found], left=2)]
    if stages:
        parts.append(table(ROWS, stages[:MOST_ROWS], left=2))
    if len(stages) > MOST_ROWS:
        parts.append(f"and {len(stages) - MOST_ROWS} more rows; --csv lists all")
    sections(to, *parts, REMARK)


def _group(group: ComparedGroup) -> tuple[str, ...]:
    shares = [MISSING if share is None else percent(share) for share in (group.median, group.p90)]
    bias = MISSING if group.bias is None else f"{group.bias:+.1%}"
    covered = MISSING if group.coverage is None else f"{group.coverage:.0%}"
    name = f"{group.implementation} {group.kind}.{group.variant}"
    return name, group.source, f"{group.rows:,}", *shares, bias, covered


def _stage(row: ComparedRow) -> tuple[str, ...]:
    assert row.predicted_s is not None  # noqa: S101 - the caller chose those
    assert row.error is not None  # noqa: S101
    inside = MISSING if row.inside is None else ("yes" if row.inside else "no")
    times = (seconds(row.measured_s), seconds(row.predicted_s))
    return f"{row.implementation} {row.kind}.{row.variant}", _shape(row), *times, f"{row.error:+.1%}", inside


def _shape(row: ComparedRow) -> str:
    said = row.shape
    size = [f"{said['width']}x{said['height']}"] if "width" in said and "height" in said else []
    return ", ".join([*size, *(f"{key} {_plain(value)}" for key, value in said.items() if key not in UNSHOWN)])


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in value)
    return str(value)
