"""How a deployment scales: as many times the load on as many times the devices, over once each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from simulator.goodput import attained_rate, attained_share
from simulator.report import Report

TIMES: Final = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A deployment k times as large under k times the load, beside the one that it is made of.

    Parameters
    ----------
    times : int
        k.
    report : Report
        Of k times the load on k times the devices.
    share : float
        Of the requests, those that keep every promise.
    slo_efficiency : float or None
        Eq. 8 of arXiv:2604.05546: this share over that of once the load on once the devices. 1 where the resources of
        a request stay what they were; more where what is pooled waits less. None where nothing keeps its promises.
    goodput_efficiency, throughput_efficiency : float or None
        Rate of requests that keep every promise, and of finished ones, over k times that of one.

    References
    ----------
    .. [1] Efficient Inference for Large Vision-Language Models, arXiv:2604.05546, Eq. 8.
    """

    times: int
    report: Report
    share: float
    slo_efficiency: float | None
    goodput_efficiency: float | None
    throughput_efficiency: float | None


def scalability(at: Callable[[int], Report], times: Sequence[int] = TIMES) -> tuple[Scaled, ...]:
    """Return how a deployment scales.

    Parameters
    ----------
    at : callable
        Simulates k times the load on k times the devices and returns the report against promises; with k times the
        requests, so that runs last equally long. See `simulator.assembly.scaled`.
    times : sequence of int
        Which k, ascending; 1 is simulated in any case.

    Raises
    ------
    ValueError
        If one is no whole number from 1 on.
    """
    if not times or any(k < 1 or k != int(k) for k in times):
        raise ValueError(f"times={list(times)} must be whole numbers from 1 on, such as 1, 2, 4")
    one = at(1)
    return tuple(_beside(one, k, one if k == 1 else at(k)) for k in sorted(set(times)))


def _beside(one: Report, times: int, report: Report) -> Scaled:
    return Scaled(
        times=times,
        report=report,
        share=attained_share(report),
        slo_efficiency=_ratio(attained_share(report), attained_share(one)),
        goodput_efficiency=_ratio(attained_rate(report), times * attained_rate(one)),
        throughput_efficiency=_ratio(report.throughput_requests_per_s, times * one.throughput_requests_per_s),
    )


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None
