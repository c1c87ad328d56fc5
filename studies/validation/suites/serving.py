"""The published serving curve of vLLM on four A100s: where throughput levels off."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from costmodel import load_engine
from studies.validation.rows import Row, Suite, by_group
from studies.validation.serving_curve import THROUGHPUT, measured_points, plateau
from studies.validation.vllm_epd import ENGINE, IMAGES, SOURCE, dp4, predict_run, traffic

TITLE: Final = "published serving curve"
NOTE: Final = (
    "Three host constants of engine vllm-0.11 were fitted to this curve, so that these rows show what the fit leaves; "
    "p99 TTFT and p99 TPOT, the mechanisms and what is missing: validation/vllm_epd.md."
)
TEXT_TOKENS: Final = 400
OVERLOAD_RPS: Final = 24.0
"""The highest rate of the curve: far beyond every plateau."""


def evaluate(data: Path | None = None) -> Suite:
    """Compare the plateau of each number of pictures with the throughput of an overloaded run."""
    del data  # the curve ships with the project
    points = measured_points()
    rows = tuple(_row(n_images, plateau(points, n_images)) for n_images in IMAGES)
    return Suite("serving", TITLE, rows, groups=by_group(rows, lambda row: row.what), note=NOTE)


def _row(n_images: int, measured: float) -> Row:
    deployment = dp4(n_images, load_engine(ENGINE))
    found = predict_run(deployment, traffic(TEXT_TOKENS, n_images, OVERLOAD_RPS))[THROUGHPUT]
    name = f"Qwen3-VL-4B on four A100s, {n_images} x 640x640"
    note = "plateau: mean of the overloaded runs; the engine was fitted to it"
    return Row(name, "throughput_rps", found, measured, "requests/s", SOURCE, note=note)
