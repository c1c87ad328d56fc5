"""Inverse questions: how much of something still meets a target, and from where on a technique pays.

Every answer is found on predictions, never on a formula of its own. A number rises or falls with what is varied, or it
does not: where it turns, the answer is the end of the piece that begins where it was looked from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np

from costmodel.base import Array, Quantity
from costmodel.errors import Unsupported, unknown
from costmodel.hardware import HardwareProfile
from costmodel.predict import Prediction, evaluate
from costmodel.query import Query

Target: TypeAlias = Mapping[str, float]
Make: TypeAlias = Callable[[float], Prediction]
Many: TypeAlias = Callable[[Array], Prediction]
AT_MOST: Final = ("ttft_s", "tpot_s", "total_s", "energy_j", "co2_g", "cost_usd", "peak_bytes")
AT_LEAST: Final = ("throughput_tokens_per_s", "max_batch")
MOST_STEPS: Final = 200
SCREENED: Final = 65
"""Values of the sweep before a bisection."""
GRID_POINTS: Final = 400
"""Points of the sweep that looks for a break-even."""
CLOSE: Final = 1e-6
"""Relative width at which a share or a rate is found."""
SWEPT: Final = frozenset({"ttft_s", "tpot_s", "total_s"})
"""What a sweep has."""


@dataclass(frozen=True, slots=True)
class Span:
    """What may be varied.

    Parameters
    ----------
    low, high : float
        The least and the most.
    whole : bool
        Whether only whole numbers make sense.
    choices : tuple of float
        The values that exist, ascending; empty where all between the ends do.
    prefers : {"most", "least"}
        Which end one would like to have.
    """

    low: float
    high: float
    whole: bool = False
    choices: tuple[float, ...] = ()
    prefers: Literal["most", "least"] = "most"


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What meets a target.

    Parameters
    ----------
    value : float or None
        The answer; None where nothing in the span meets the target.
    at_end : bool
        Whether it is the preferred end of the span, so that more may do as well.
    prediction : Prediction
        At the answer; where there is none, at the end of the span that comes closest.
    tried : int
        Predictions made.
    """

    value: float | None
    at_end: bool
    prediction: Prediction
    tried: int


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From where on a technique pays.

    Parameters
    ----------
    tokens : float or None
        The smallest number of tokens from which on it pays; None where it never does in the span.
    ratio : float
        The number with the technique over that without, there (or at the end of the span).
    gains_at_end : float
        The same at the largest number of tokens.
    """

    tokens: float | None
    ratio: float
    gains_at_end: float


def check_target(target: Target) -> None:
    """Refuse a target that no prediction has.

    Raises
    ------
    LookupError
        If a name is unknown.
    ValueError
        If there is none, or a number is not positive.
    """
    if not target:
        raise ValueError("there is no target; give one, such as ttft_s=0.5")
    for name, value in target.items():
        if name not in (*AT_MOST, *AT_LEAST):
            raise unknown("target", name, (*AT_MOST, *AT_LEAST))
        if not 0 < value < math.inf:
            raise ValueError(f"target {name}={value!r} must be a number above 0")


def met(prediction: Prediction, target: Target) -> bool:
    """Return whether a prediction meets every part of a target."""
    return all(_number(prediction, n) <= v if n in AT_MOST else _number(prediction, n) >= v for n, v in target.items())


def _number(prediction: Prediction, name: str) -> float:
    if name == "peak_bytes":
        return prediction.memory.peak_bytes
    value = getattr(prediction, name)
    if value is None:
        raise Unsupported(
            f"{name} of {prediction.hardware.name} is unknown: it has no public price; set price_usd_per_s"
        )
    return float(value)


def solve(make: Make, span: Span, target: Target, *, many: Many | None = None) -> Solution:
    """Return what meets a target, as far towards the preferred end of a span as possible.

    Parameters
    ----------
    make : callable
        Returns the prediction for a value.
    span : Span
        What may be varied.
    target : mapping
        Names of numbers and their limits: at most, for throughput and batch at least.
    many : callable, optional
        Returns the sweep over an array of values: one call that finds between which two the border lies.

    Notes
    -----
    The ends are tried first. If the preferred end misses the target and the other one meets it, the border between
    them is found by bisection. If both miss it, nothing is said to meet it.
    """
    check_target(target)
    values = span.choices or (span.low, span.high)
    wanted, other = (values[-1], values[0]) if span.prefers == "most" else (values[0], values[-1])
    first = make(wanted)
    if met(first, target):
        return Solution(wanted, at_end=True, prediction=first, tried=1)
    last = make(other)
    if not met(last, target):
        best = min((first, last), key=lambda prediction: _miss(prediction, target))
        return Solution(None, at_end=False, prediction=best, tried=2)
    if span.choices:
        return _chosen(make, span, target, wanted)
    good, bad = (other, wanted) if many is None or set(target) - SWEPT else _screened(many, span, target, wanted)
    return _bisected(make, span, target, good=(good, last if good == other else make(good)), bad=bad)


def _screened(many: Many, span: Span, target: Target, wanted: float) -> tuple[float, float]:
    """Return the neighbours on a grid of which the first meets a target and the other, nearer to the end, does not."""
    grid = np.geomspace(span.low, span.high, SCREENED) if span.low > 0 else np.linspace(span.low, span.high, SCREENED)
    values = np.unique(np.round(grid)) if span.whole else grid
    values[[0, -1]] = span.low, span.high
    swept = many(values)
    limits = [np.broadcast_to(getattr(swept, name), values.shape) <= limit for name, limit in target.items()]
    order = np.argsort(np.abs(values - wanted))  # from the preferred end on
    place = int(np.argmax(np.logical_and.reduce(limits)[order]))
    return float(values[order[place]]), float(values[order[max(place - 1, 0)]])


def _chosen(make: Make, span: Span, target: Target, wanted: float) -> Solution:
    """Return the choice nearest to the preferred end that meets the target; the other end does."""
    ordered = sorted(span.choices, key=lambda value: abs(value - wanted))
    for tried, value in enumerate(ordered[1:], start=3):
        prediction = make(value)
        if met(prediction, target):
            return Solution(value, at_end=False, prediction=prediction, tried=tried)
    raise AssertionError("the other end meets the target")


def _bisected(make: Make, span: Span, target: Target, *, good: tuple[float, Prediction], bad: float) -> Solution:
    """Return the last value that meets the target on the way from one that does to one that does not."""
    value, prediction = good
    for tried in range(3, MOST_STEPS):
        middle = _middle(value, bad, span)
        if middle in (value, bad) or abs(bad - value) <= CLOSE * max(abs(bad), abs(value)) * (not span.whole):
            return Solution(value, at_end=False, prediction=prediction, tried=tried - 1)
        between = make(middle)
        value, prediction, bad = (middle, between, bad) if met(between, target) else (value, prediction, middle)
    return Solution(value, at_end=False, prediction=prediction, tried=MOST_STEPS)


def _middle(one: float, other: float, span: Span) -> float:
    """Return what lies between: the geometric mean where the span is wide, a whole number where it must be one."""
    low, high = min(one, other), max(one, other)
    middle = math.sqrt(low * high) if low > 0 and high > 2 * low else (low + high) / 2
    return math.floor(middle) if span.whole else middle


def _miss(prediction: Prediction, target: Target) -> float:
    """Return how many times a target is missed, at its worst part."""
    ratios = [
        _number(prediction, name) / value if name in AT_MOST else value / max(_number(prediction, name), 1e-300)
        for name, value in target.items()
    ]
    return max(ratios)


# What is varied


def with_keep(query: Query, keep: Quantity) -> Query:
    """Return the query with a share of its visual tokens, chosen before the language model and at no cost."""
    media = replace(query.media, block_pairs=query.media.block_pairs * keep**2)
    return replace(query, visual_tokens=query.visual_tokens * keep, media=media)


def with_bandwidth(hardware: HardwareProfile, bytes_per_s: float) -> HardwareProfile:
    """Return the device with another memory bandwidth."""
    return hardware.model_copy(update={"memory_bandwidth_bytes_per_s": bytes_per_s})


def with_price(hardware: HardwareProfile, usd_per_s: float) -> HardwareProfile:
    """Return the device at another price."""
    return hardware.model_copy(update={"price_usd_per_s": usd_per_s})


# Where a technique pays


def break_even(
    without: Callable[[Array], Query],
    using: Callable[[Array], Query],
    hardware: HardwareProfile,
    *,
    metric: str,
    most: float,
) -> BreakEven:
    """Return the smallest number of tokens from which on a technique pays.

    Parameters
    ----------
    without, using : callable
        Return the request with an array of so many tokens, without and with the technique.
    hardware : HardwareProfile
    metric : {"ttft_s", "tpot_s", "total_s"}
        What shall get less.
    most : float
        Tokens up to which to look.

    Notes
    -----
    One sweep over a grid finds the last point at which the technique does not pay, a second one the number of tokens
    behind it exactly.
    """
    if metric not in SWEPT:
        raise unknown("metric of a break-even", metric, SWEPT)

    def ratios(tokens: Array) -> Array:
        pair = [np.asarray(getattr(evaluate(make(tokens), hardware), metric)) for make in (using, without)]
        return np.broadcast_to(pair[0] / pair[1], tokens.shape)

    grid = np.unique(np.round(np.geomspace(1.0, most, GRID_POINTS)))
    found = ratios(grid)
    losing = np.flatnonzero(found >= 1.0)
    if not losing.size:
        return BreakEven(float(grid[0]), float(found[0]), float(found[-1]))
    last = int(losing[-1])
    if last == grid.size - 1:
        return BreakEven(None, float(found[-1]), float(found[-1]))
    between = np.arange(grid[last] + 1.0, grid[last + 1] + 1.0)
    inside = ratios(between)
    behind = np.flatnonzero(inside >= 1.0)
    first = int(behind[-1]) + 1 if behind.size else 0
    return BreakEven(float(between[first]), float(inside[first]), float(found[-1]))
