"""When requests come: `poisson`, `gamma:cv=2`, `weibull:cv=2`, `uniform`, `on-off:on=10,off=30`, `diurnal`, `burst`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from scipy.optimize import brentq

from costmodel.base import Array
from costmodel.errors import unknown

Generator = np.random.Generator


def arrival_times(text: str, rate: float, n: int, rng: Generator) -> Array:
    """Return the times of n arrivals [s].

    Parameters
    ----------
    text : str
        The process, NAME or NAME:key=value,…
    rate : float
        Mean requests a second.
    n : int
        Arrivals.
    rng : numpy.random.Generator

    Raises
    ------
    LookupError
        If nobody knows the process.
    ValueError
        If a parameter is not one of its, or out of range.
    """
    name, given = _parse(text)
    if name not in PROCESSES:
        raise unknown("arrivals", name, PROCESSES)
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate!r} must be a positive number of requests a second")
    draw, defaults = PROCESSES[name]
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(f"--arrivals {text!r}: {key}={value:g} is no parameter of {name}; known: {known}")
        if not 0 < value < math.inf:
            raise ValueError(f"--arrivals {text!r}: {key}={value:g} must be a positive number")
    return draw(rate, n, rng, {**defaults, **given})


def _parse(text: str) -> tuple[str, dict[str, float]]:
    name, _, rest = text.partition(":")
    given: dict[str, float] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        try:
            given[key.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--arrivals {text!r}: {pair!r} must read key=number, such as cv=2") from None
    return name.strip(), given


Parameters = Mapping[str, float]


def _poisson(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    del p
    times: Array = np.cumsum(rng.exponential(1 / rate, n))
    return times


def _uniform(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    del rng, p
    return np.arange(n) / rate


def _burst(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    """All at once."""
    del rate, rng, p
    return np.zeros(n)


def _gamma(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    """Gaps of a Gamma distribution with this coefficient of variation: shape 1 / cv²."""
    shape = p["cv"] ** -2
    times: Array = np.cumsum(rng.gamma(shape, 1 / (rate * shape), n))
    return times


def _weibull(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    """Gaps of a Weibull distribution with this coefficient of variation."""
    shape = _weibull_shape(p["cv"])
    scale = 1 / (rate * math.gamma(1 + 1 / shape))
    times: Array = np.cumsum(scale * rng.weibull(shape, n))
    return times


def _weibull_shape(cv: float) -> float:
    """Return the shape k with Γ(1 + 2/k) / Γ(1 + 1/k)² = 1 + cv²."""

    def miss(k: float) -> float:
        return math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k) - math.log1p(cv * cv)

    least, most = 0.1, 50.0
    if not miss(most) < 0 < miss(least):
        raise ValueError(f"cv={cv:g} of Weibull gaps must lie between 0.026 and about 400; use another")
    return float(brentq(miss, least, most))


def _on_off(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    """Poisson while on, nothing while off; both last exponentially long with these means [s]."""
    on, off = p["on"], p["off"]
    busy = np.cumsum(rng.exponential(on / (rate * (on + off)), n))
    spells = max(8, math.ceil(2 * busy[-1] / on) + 8) if n else 8
    ends = np.cumsum(rng.exponential(on, spells))
    while n and ends[-1] < busy[-1]:
        ends = np.concatenate([ends, ends[-1] + np.cumsum(rng.exponential(on, spells))])
    pauses = np.cumsum(rng.exponential(off, len(ends)))
    index = np.searchsorted(ends, busy)
    times: Array = busy + np.where(index > 0, pauses[np.maximum(index - 1, 0)], 0.0)
    return times


def _diurnal(rate: float, n: int, rng: Generator, p: Parameters) -> Array:
    """Poisson at rate · (1 + amplitude · sin(2π t / period)): uniform time, bent by the inverse of its integral."""
    amplitude, period = p["amplitude"], p["period"]
    if amplitude > 1:
        raise ValueError(f"amplitude={amplitude:g} of diurnal arrivals must be 1 or less; rates are not negative")
    even = np.cumsum(rng.exponential(1 / rate, n))
    grid = np.linspace(0, period, 2049)
    passed = grid + amplitude * period / (2 * np.pi) * (1 - np.cos(2 * np.pi * grid / period))
    days, rest = np.divmod(even, period)
    times: Array = days * period + np.interp(rest, passed, grid)
    return times


Process = Callable[[float, int, Generator, Parameters], Array]
PROCESSES: Final[Mapping[str, tuple[Process, Parameters]]] = {
    "poisson": (_poisson, {}),
    "uniform": (_uniform, {}),
    "burst": (_burst, {}),
    "gamma": (_gamma, {"cv": 2.0}),
    "weibull": (_weibull, {"cv": 2.0}),
    "on-off": (_on_off, {"on": 10.0, "off": 10.0}),
    "diurnal": (_diurnal, {"amplitude": 0.5, "period": 86400.0}),
}
"""By name, how times are drawn, and the defaults of its parameters."""
