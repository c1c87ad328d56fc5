"""Fit a curve to measured times: least squares on the logarithm of the ratio, robust, with weak priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from costmodel.base import Array
from costmodel.efficiency import Curve

LOSS_SCALE: Final = 0.15
"""Residual from which on an error counts linearly [log ratio]."""
PRIOR_WEIGHT: Final = 0.02
"""Weight of one natural logarithm of distance from the prior, as a share of the root of the rows."""
MOST_CALLS: Final = 40
STEP: Final = 1e-3
SMALLEST: Final = 1e-12
NEAREST: Final = 1e-3
"""Nearest that the start of a share comes to its bounds."""
FARTHEST: Final = 6.0
"""Farthest from the prior that a parameter goes [natural logarithm or logit]."""

SomeCurve = TypeVar("SomeCurve", bound=Curve)


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale on which a parameter is fitted, free of bounds.

    Parameters
    ----------
    name : str
        Field of the curve.
    form : {"log", "logit", "log above one"}
    """

    name: str
    form: str

    def encode(self, value: float) -> float:
        """Return the free number of a parameter."""
        if self.form == "logit":
            share = min(max(value, NEAREST), 1 - NEAREST)
            return float(np.log(share / (1 - share)))
        return float(np.log(max(value - (self.form != "log"), SMALLEST)))

    def decode(self, free: float) -> float:
        """Return the parameter of a free number."""
        if self.form == "logit":
            return float(1 / (1 + np.exp(-free)))
        return float(np.exp(free)) + (self.form != "log")


def scales(curve: type[Curve], fixed: Mapping[str, float]) -> tuple[Scale, ...]:
    """Return the parameters of a curve that are fitted: those that are not fixed."""
    found = []
    for name, field in curve.model_fields.items():
        bounds = {key: getattr(limit, key) for limit in field.metadata for key in ("ge", "le") if hasattr(limit, key)}
        form = "logit" if bounds.get("le") == 1 else "log above one" if bounds.get("ge") == 1 else "log"
        if name not in fixed:
            found.append(Scale(name, form))
    return tuple(found)


def fit(
    curve: type[SomeCurve],
    predict: Callable[[SomeCurve], Array],
    measured_s: Array,
    *,
    fixed: Mapping[str, float] | None = None,
    priors: Mapping[str, float] | None = None,
) -> tuple[SomeCurve, float]:
    """Return the curve that comes closest to measured times, and what is left of the loss a row.

    Parameters
    ----------
    curve : type
        Its fields' defaults are the priors.
    predict : callable
        Returns the times of the measured shapes under a curve [s].
    measured_s : ndarray
        What they took [s].
    fixed : mapping, optional
        Parameters that these rows do not show.
    priors : mapping, optional
        Where these rows are expected elsewhere than the fields' defaults.
    """
    given: dict[str, Any] = dict(fixed or {})
    free = scales(curve, given)
    prior_values = curve(**{**(priors or {}), **given})
    start = np.array([scale.encode(getattr(prior_values, scale.name)) for scale in free])
    target = np.log(measured_s)
    weight = PRIOR_WEIGHT * np.sqrt(len(measured_s))

    def build(x: Array) -> SomeCurve:
        values = {scale.name: scale.decode(value) for scale, value in zip(free, x.tolist(), strict=True)}
        return curve(**given, **values)

    def residuals(x: Array) -> Array:
        result: Array = np.concatenate([np.log(predict(build(x))) - target, weight * (x - start)])
        return result

    found = least_squares(
        residuals,
        start,
        bounds=(start - FARTHEST, start + FARTHEST),
        loss="soft_l1",
        f_scale=LOSS_SCALE,
        diff_step=STEP,
        max_nfev=MOST_CALLS,
    )
    return build(found.x), float(found.cost / len(measured_s))


def together(parts: Sequence[Callable[[SomeCurve], Array]]) -> Callable[[SomeCurve], Array]:
    """Return the times of the rows of several devices under one curve, one device after the other [s]."""
    return lambda curve: np.concatenate([part(curve) for part in parts])


@dataclass(frozen=True, slots=True)
class SizeError:
    """How well a curve predicts rows of one range of sizes that it was not fitted to.

    Parameters
    ----------
    size : str
        The range, or `all`.
    rows : int
        Test rows.
    median, mean, p90 : float
        Of |predicted/measured - 1|.
    bias : float
        Median of predicted/measured - 1.
    low, high : float
        Band of measured over predicted time, less one: quantiles of the train rows.
    coverage : float
        Share of test rows inside it.
    """

    size: str
    rows: int
    median: float
    mean: float
    p90: float
    bias: float
    low: float
    high: float
    coverage: float


BAND: Final = (0.04, 0.96)
"""Quantiles of the train rows; a little wide, because those are the rows of the fit."""
FEWEST: Final = 20
"""A range with fewer train rows takes the band of all."""


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Rows of one side of the split under a curve: sizes, measured and predicted times [s]."""

    sizes: Array
    measured_s: Array
    predicted_s: Array

    @property
    def log_ratio(self) -> Array:
        """Logarithm of measured over predicted."""
        result: Array = np.log(self.measured_s / self.predicted_s)
        return result


def joined(parts: Sequence[Scored]) -> Scored:
    """Return the rows of several parts together."""
    return Scored(
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.measured_s for part in parts]),
        np.concatenate([part.predicted_s for part in parts]),
    )


class Bands(NamedTuple):
    """Bands of the logarithm of measured over predicted time: by size, shape (ranges, 2), and of all, shape (2,)."""

    by_size: Array
    of_all: Array

    def at(self, sizes: Array, edges: tuple[float, ...]) -> Array:
        """Return the band of each row, shape (rows, 2)."""
        result: Array = self.by_size[np.searchsorted(edges, sizes)]
        return result

    def inside(self, scored: Scored, edges: tuple[float, ...]) -> NDArray[np.bool_]:
        """Return which rows lie within the band of their range."""
        band = self.at(scored.sizes, edges)
        result: NDArray[np.bool_] = (scored.log_ratio >= band[:, 0]) & (scored.log_ratio <= band[:, 1])
        return result


def quantiles(scored: Scored, edges: tuple[float, ...], levels: Sequence[float] = BAND) -> Bands:
    """Return quantiles of the residuals by size, and of all, one a column; a range with few rows has those of all.

    Parameters
    ----------
    scored : Scored
        The residuals.
    edges : tuple of float
        Upper ends of the ranges but the last.
    levels : sequence of float
        Which quantiles.
    """
    number = np.searchsorted(edges, scored.sizes)
    everything = np.quantile(scored.log_ratio, levels)
    by_size = [
        np.quantile(scored.log_ratio[number == i], levels) if (number == i).sum() >= FEWEST else everything
        for i in range(len(edges) + 1)
    ]
    return Bands(np.array(by_size), everything)


def errors(train: Scored, test: Scored, edges: tuple[float, ...], labels: tuple[str, ...]) -> tuple[SizeError, ...]:
    """Return the errors of test rows by size, and of all; the bands are those of the train rows by size.

    Parameters
    ----------
    train, test : Scored
        Both sides of the split.
    edges : tuple of float
        Upper ends of the ranges but the last.
    labels : tuple of str
        Names of the ranges.
    """
    bands = quantiles(train, edges)
    return errors_within(bands, test, bands.inside(test, edges), edges, labels)


def errors_within(
    bands: Bands, test: Scored, inside: NDArray[np.bool_], edges: tuple[float, ...], labels: tuple[str, ...]
) -> tuple[SizeError, ...]:
    """Return the errors of test rows by size, and of all, beside bands that were found elsewhere.

    Parameters
    ----------
    bands : Bands
        What is stated.
    test : Scored
        Rows that no fit has seen.
    inside : ndarray, shape (rows,)
        Which of them are covered.
    edges, labels : tuple
        Ends of the ranges of sizes, and their names.
    """
    number = np.searchsorted(edges, test.sizes)
    rows = [(name, number == i, bands.by_size[i]) for i, name in enumerate(labels)]
    rows.append(("all", np.ones(len(test.sizes), dtype=bool), bands.of_all))
    return tuple(_error(name, test, inside, chosen, band) for name, chosen, band in rows)


def _error(name: str, test: Scored, inside: NDArray[np.bool_], chosen: NDArray[np.bool_], band: Array) -> SizeError:
    low, high = np.expm1(band).tolist()
    if not chosen.any():
        return SizeError(name, 0, np.nan, np.nan, np.nan, np.nan, low, high, np.nan)
    signed = test.predicted_s[chosen] / test.measured_s[chosen] - 1
    size = np.abs(signed)
    return SizeError(
        size=name,
        rows=int(chosen.sum()),
        median=float(np.median(size)),
        mean=float(size.mean()),
        p90=float(np.quantile(size, 0.9)),
        bias=float(np.median(signed)),
        low=low,
        high=high,
        coverage=float(inside[chosen].mean()),
    )
