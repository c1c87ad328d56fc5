"""Splitwise: prompt phases and decode steps of Llama-2-70B and BLOOM-176B on A100 and H100, TP 2 to 8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from costmodel import Parallelism, Prediction, Workload, predict
from studies.validation.published_files import UNITS, PhaseTimes, model_of, read_rows
from studies.validation.requests import band, engine_of, value
from studies.validation.rows import Row, Suite, by_group

TITLE: Final = "Splitwise prompt and token times"
FILE: Final = "splitwise.csv"
SOURCE: Final = "splitwise"
NOTE: Final = (
    "Medians of 5 to 15 runs at 16 bits. BLOOM-176B is priced as an OPT of its shape. Four requests on A100, from "
    "which the engine's host times were derived, are not scored."
)


def evaluate(data: Path | None = None) -> Suite:
    """Compare every prompt phase and every decode step with its prediction, but those the engine was derived from."""
    del data  # the medians ship with the project
    rows = tuple(row for times in read_rows(FILE, PhaseTimes) if not times.calibration for row in _rows(times))
    groups = by_group(rows, lambda row: f"{row.what} {row.name.partition(' x ')[0]}")
    return Suite("splitwise", TITLE, rows, groups=by_group(rows, lambda row: row.what) | groups, note=NOTE)


def _rows(times: PhaseTimes) -> Iterator[Row]:
    prediction = _predict(times)
    name = f"{times.model} on {times.hardware} x {times.tp}, {times.batch} x {times.prompt_tokens} tokens"
    for what, measured_ms in (("ttft_s", times.prompt_ms), ("tpot_s", times.token_ms)):
        low, high = band(prediction, what) or (None, None)
        yield Row(
            name,
            what,
            value(prediction, what),
            measured_ms * UNITS["ms"][1],
            "s",
            SOURCE,
            low=low,
            high=high,
            note=f"{times.runs} runs",
        )


def _predict(times: PhaseTimes) -> Prediction:
    return predict(
        model_of(times.model),
        times.hardware,
        Workload(text_tokens=float(times.prompt_tokens), output_tokens=float(times.output_tokens)),
        batch=float(times.batch),
        parallelism=Parallelism(tp=times.tp),
        engine=engine_of(SOURCE),
    )
