"""The goodputs of the literature, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from simulator.report import Report
from simulator.serving_plan import Slo

ATTAINED_SHARE: Final = 0.9
"""DistServe, EPDServe and HydraInfer call a rate served when 90 % of the requests keep their promises."""


def attained_rate(report: Report) -> float:
    """Return the rate of requests that keep every promise (Table 5 of arXiv:2604.05546)."""
    return report.goodput_requests_per_s or 0.0


def attained_share(report: Report) -> float:
    """Return the share of arrived requests that keep every promise."""
    arrived = report.requests["arrived"]
    return round(attained_rate(report) * report.span_s) / arrived if arrived else 0.0


def serves_90(report: Report, slo: Slo) -> bool:
    """Return whether nine requests of ten keep both promises."""
    del slo
    return (report.slo_attainment["joint"] or 0.0) >= ATTAINED_SHARE


def serves_p99(report: Report, slo: Slo) -> bool:
    """Return whether the 99th percentiles keep the promises (vLLM's blog on disaggregated encoders)."""
    pairs = ((report.ttft_s.p99, slo.ttft_s), (report.tpot_s.p99, slo.tpot_s), (report.e2e_s.p99, slo.e2e_s))
    return all(bound is None or (value is not None and value <= bound) for value, bound in pairs)


MAX_RATES: Final[Mapping[str, Callable[[Report, Slo], bool]]] = {
    "max_rate_90": serves_90,
    "max_rate_p99": serves_p99,
}
"""The two goodputs that are maximum rates, by the test that a rate must pass."""


def max_rate(
    at: Callable[[float], Report],
    slo: Slo,
    *,
    serves: Callable[[Report, Slo], bool] = serves_90,
    low: float,
    high: float,
    tolerance: float = 0.02,
) -> float:
    """Return the largest rate that is served, by bisection [requests/s].

    Parameters
    ----------
    at : callable
        Simulates a rate and returns its report; equal seeds make the answer steady.
    slo : Slo
        What is promised.
    serves : callable
        Which goodput: `serves_90` or `serves_p99`.
    low, high : float
        Where to search; 0.0 is returned when even `low` is not served.
    tolerance : float
        Relative width at which to stop.
    """
    if not 0 < low < high:
        raise ValueError(f"low={low} must be positive and below high={high}; give another range")
    if not serves(at(low), slo):
        return 0.0
    if serves(at(high), slo):
        return high
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if serves(at(middle), slo) else (low, middle)
    return low
