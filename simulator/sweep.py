"""How much load a deployment bears: rates tried one after another, its goodputs, saturation and knee."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from simulator.goodput import ATTAINED_SHARE, attained_share
from simulator.report import Report

UNLOADED_PER_S: Final = 1e-4
"""A rate at which requests do not meet: one in three hours [requests/s]."""
KNEE: Final = 2.0
"""At the knee a request takes this many times as long as alone. In an M/M/1 queue it is where rate over latency, the
`power` of L. Kleinrock (ICC 1979), is largest, at half the capacity; in an M/D/1 queue at two thirds of it."""
FIRST_SHARE: Final = 1 / 8
"""Share of the time that requests take at the first rate, were they one after another: hardly any meet."""
MOST_DOUBLINGS, MOST_HALVINGS = 40, 10
BEYOND: Final = 8.0
"""Offered over finished requests, from which on a rate cannot be told from all requests at once."""
TOLERANCE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate that was simulated.

    Parameters
    ----------
    rate_per_s : float
        Offered [requests/s].
    report : Report
    share : float
        Of the requests, those that keep every promise.
    passes : bool
        Whether these are as many as asked for.
    """

    rate_per_s: float
    report: Report
    share: float
    passes: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a deployment bears.

    Parameters
    ----------
    tried : tuple of Tried
        By rate, ascending; the unloaded one is not among them.
    alone_s : float
        Mean time from arrival to the last token of a request that meets no other [s].
    attained : float
        Share of requests that must keep every promise.
    tolerance : float
        Relative width to which rates were narrowed down.
    """

    tried: tuple[Tried, ...]
    alone_s: float
    attained: float
    tolerance: float

    @property
    def goodput_last_pass(self) -> float | None:
        """Highest tried rate that passes; None where none does [requests/s]."""
        return max((one.rate_per_s for one in self.tried if one.passes), default=None)

    @property
    def goodput_first_violation(self) -> float | None:
        """Lowest tried rate that fails; None where none does [requests/s]."""
        return min((one.rate_per_s for one in self.tried if not one.passes), default=None)

    @property
    def goodput_steady(self) -> float | None:
        """Highest rate that passes with all tried rates below it; None where the lowest does not [requests/s]."""
        first = self.goodput_first_violation
        passing = [one.rate_per_s for one in self.tried if first is None or one.rate_per_s < first]
        return max(passing, default=None)

    @property
    def saturation_per_s(self) -> float:
        """Most finished requests a second at any rate, of the whole run with its start and its end [requests/s]."""
        return max(one.report.throughput_requests_per_s for one in self.tried)

    @property
    def knee_per_s(self) -> float | None:
        """Highest rate up to which the mean time of a request stays below `KNEE` times `alone_s` [requests/s]."""
        beyond = [one.rate_per_s for one in self.tried if _is_late(one, self.alone_s)]
        below = [one.rate_per_s for one in self.tried if not beyond or one.rate_per_s < min(beyond)]
        return max(below, default=None) if beyond else None


@dataclass(slots=True)
class _Search:
    """Rates that were tried so far."""

    at: Callable[[float], Report]
    attained: float
    tried: dict[float, Tried] = field(default_factory=dict)

    def run(self, rate_per_s: float) -> Tried:
        if rate_per_s not in self.tried:
            report = self.at(rate_per_s)
            share = attained_share(report)
            self.tried[rate_per_s] = Tried(rate_per_s, report, share, share >= self.attained)
        return self.tried[rate_per_s]

    def narrow(self, fails: Callable[[Tried], bool], tolerance: float) -> None:
        """Halve the bracket around the lowest rate that fails until it is this narrow, or has no lower end."""
        while True:
            high = min((rate for rate, one in self.tried.items() if fails(one)), default=math.inf)
            low = max((rate for rate in self.tried if rate < high), default=0.0)
            if not low or math.isinf(high) or high <= low * (1 + tolerance):
                return
            self.run(math.sqrt(low * high))


def sweep(
    at: Callable[[float], Report],
    *,
    attained: float = ATTAINED_SHARE,
    tolerance: float = TOLERANCE,
    low_per_s: float | None = None,
) -> Sweep:
    """Return what a deployment bears, by doubling the rate until it is saturated and halving brackets.

    Parameters
    ----------
    at : callable
        Simulates a rate [requests/s] and returns its report against promises; equal seeds for all rates make what is
        found steady, since the same requests come in the same order, only faster.
    attained : float
        Share of requests that must keep every promise.
    tolerance : float
        Relative width at which to stop.
    low_per_s : float, optional
        Rate to begin with; by default one at which requests hardly meet. Where it fails, lower ones are tried.

    Raises
    ------
    ValueError
        If a setting is out of range, nothing is promised, or a request alone does not finish.

    Notes
    -----
    A run of n requests can be overloaded only for as long as n requests come: with few of them even a rate beyond
    saturation may keep its promises. Where all do, `goodput_first_violation` is None and more requests are needed.
    """
    _check(attained, tolerance, low_per_s)
    alone = at(UNLOADED_PER_S)
    if alone.goodput_requests_per_s is None:
        raise ValueError("a sweep needs a promise to keep; give ttft_s, tpot_s or e2e_s")
    if alone.e2e_s.mean is None:
        raise ValueError("no request finishes even alone; see the reasons in the report of a single run")
    search = _Search(at, attained)
    alone_s = alone.e2e_s.mean
    first = low_per_s or FIRST_SHARE / alone_s
    _double(search, first, tolerance)
    if attained_share(alone) >= attained:
        _halve(search, first, alone_s)
    search.narrow(lambda one: not one.passes, tolerance)
    search.narrow(lambda one: _is_late(one, alone_s), tolerance)
    return Sweep(tuple(search.tried[rate] for rate in sorted(search.tried)), alone_s, attained, tolerance)


def _check(attained: float, tolerance: float, low_per_s: float | None) -> None:
    if not 0 < attained <= 1:
        raise ValueError(f"attained={attained} must be a share of the requests, above 0 and up to 1")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be a relative width between 0 and 1, such as {TOLERANCE}")
    if low_per_s is not None and not 0 < low_per_s < math.inf:
        raise ValueError(f"low_per_s={low_per_s} must be a positive number of requests a second")


def _double(search: _Search, rate_per_s: float, tolerance: float) -> None:
    """Try ever higher rates until finished requests grow no more, promises are broken and requests take long."""
    best = 0.0
    for _ in range(MOST_DOUBLINGS):
        one = search.run(rate_per_s)
        found = one.report.throughput_requests_per_s
        saturated = found <= best * (1 + tolerance)
        best = max(best, found)
        if (saturated and not one.passes) or rate_per_s >= BEYOND * best:
            return
        rate_per_s *= 2


def _halve(search: _Search, rate_per_s: float, alone_s: float) -> None:
    """Try ever lower rates until promises are kept and requests are quick."""
    for _ in range(MOST_HALVINGS):
        one = search.run(rate_per_s)
        if one.passes and not _is_late(one, alone_s):
            return
        rate_per_s /= 2


def _is_late(one: Tried, alone_s: float) -> bool:
    mean = one.report.e2e_s.mean
    return mean is None or mean >= KNEE * alone_s


__all__ = ["Sweep", "Tried", "sweep"]
