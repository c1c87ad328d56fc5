"""Published counts: tokens, parameters, cache, FLOPs and the ridge of a device. They need no machine and must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from costmodel import Workload, load_hardware
from costmodel.conventions import prefill_flops
from costmodel.counts import count
from costmodel.errors import unknown
from studies.validation.published_files import CountFigure, model_of, read_rows
from studies.validation.rows import Row, Suite, by_group

TITLE: Final = "published counts"
FILE: Final = "counts.csv"
NOTE: Final = "exact: the prediction rounds to what was printed."
RIDGE_PRECISION: Final = "bf16"


def evaluate(data: Path | None = None) -> Suite:
    """Compare every published count with ours."""
    del data  # the figures ship with the project
    rows = tuple(_row(figure) for figure in read_rows(FILE, CountFigure))
    return Suite("counts", TITLE, rows, groups=by_group(rows, lambda row: row.what), note=NOTE)


def _row(figure: CountFigure) -> Row:
    return Row(
        figure.name,
        figure.what,
        _predicted(figure),
        figure.measured,
        figure.si_unit,
        figure.source,
        rounding=figure.rounding,
        note=figure.note,
    )


def _predicted(figure: CountFigure) -> float:
    if figure.hardware:
        device = load_hardware(figure.hardware)
        return device.peak_flops_per_s[RIDGE_PRECISION] / device.memory_bandwidth_bytes_per_s
    if figure.convention:
        tokens = float((figure.visual_tokens or 0) + figure.text_tokens)
        return float(prefill_flops(model_of(figure.model).decoder, tokens, figure.convention))
    return _counted(figure)


def _counted(figure: CountFigure) -> float:
    visual = None if figure.visual_tokens is None else float(figure.visual_tokens)
    workload = Workload(figure.pictures(), text_tokens=float(figure.text_tokens), visual_tokens=visual)
    counts = count(model_of(figure.model), workload)
    parameters = counts.parameters
    values: dict[str, float] = {
        "parameters": parameters["total"],
        "weights_beyond_vision_share": 1 - parameters["vision"] / parameters["total"],
        "kv_bytes_per_token": counts.kv_bytes_per_token,
        "kv_bytes": counts.kv_bytes,
        "visual_kv_bytes": counts.kv_bytes_per_token * counts.tokens["visual"],
        **counts.tokens,
    }
    if figure.what not in values:
        raise unknown("count", figure.what, values)
    return float(values[figure.what])
