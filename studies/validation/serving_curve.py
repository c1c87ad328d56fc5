"""The published serving curve of vLLM on four A100s as points, and what is read off such a curve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import numpy as np
from pydantic import Field

from costmodel.base import Frozen
from studies.validation.published_files import read_rows

FILE: Final = "vllm_dp4_400_tokens.csv"
METRICS: Final = ("request_throughput_rps", "p99_ttft_ms", "p99_tpot_ms")
THROUGHPUT, TTFT, TPOT = METRICS
OVERLOAD: Final = 1.1
"""A run is overloaded where more than this many times what it finished was offered; plateaus are means over such."""
TTFT_LIMIT_MS: Final = 20_000.0
"""The blog's promise for the 99th percentile of TTFT."""
TPOT_LIMIT_MS: Final = 100.0
"""And for that of TPOT."""


class CurvePoint(Frozen):
    """One value of a serving curve: a row of the published file, or of ours.

    Parameters
    ----------
    text_tokens, images : int
        The request.
    topology : str
        How four devices are used.
    offered_rps : float
        Requests that come in a second.
    metric : str
        Of `METRICS`.
    value : float
        In the unit that its name says.
    quality : str
        What the reader of the figure noted.
    """

    text_tokens: Annotated[int, Field(ge=1)]
    images: Annotated[int, Field(ge=1)]
    topology: str
    offered_rps: Annotated[float, Field(gt=0)]
    metric: str
    value: Annotated[float, Field(gt=0)]
    quality: str = ""

    @property
    def run(self) -> tuple[int, int, str, float]:
        """Which run it belongs to."""
        return self.text_tokens, self.images, self.topology, self.offered_rps


def measured_points() -> list[CurvePoint]:
    """Return the published curve."""
    return read_rows(FILE, CurvePoint)


def plateau(points: Iterable[CurvePoint], images: int) -> float:
    """Return the mean throughput of overloaded runs [requests/s]."""
    found = [p.value for p in points if p.metric == THROUGHPUT and p.images == images]
    offered = [p.offered_rps for p in points if p.metric == THROUGHPUT and p.images == images]
    return float(np.mean([x for x, rate in zip(found, offered, strict=True) if rate > OVERLOAD * x]))


def last_passing_rate(points: Iterable[CurvePoint], images: int) -> float:
    """Return the highest offered rate up to which every 99th percentile of TTFT keeps the blog's promise."""
    curve = sorted((p.offered_rps, p.value) for p in points if p.metric == TTFT and p.images == images)
    passed = 0.0
    for rate, value in curve:
        if value > TTFT_LIMIT_MS:
            break
        passed = rate
    return passed


def goodput_rate(points: Iterable[CurvePoint]) -> float:
    """Return the highest offered rate up to which one curve keeps both promises of the blog; 0 if none does."""
    limits = {TTFT: TTFT_LIMIT_MS, TPOT: TPOT_LIMIT_MS}
    held: dict[float, bool] = {}
    for point in points:
        if point.metric in limits:
            held[point.offered_rps] = held.get(point.offered_rps, True) and point.value <= limits[point.metric]
    passed = 0.0
    for rate in sorted(held):
        if not held[rate]:
            break
        passed = rate
    return passed
