"""Fit a curve to measured times: least squares on the logarithm of the ratio, robust, with weak priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
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
    train_bin = np.searchsorted(edges, train.sizes)
    everything = np.quantile(train.log_ratio, BAND)
    bands = np.array(
        [
            np.quantile(train.log_ratio[train_bin == i], BAND) if (train_bin == i).sum() >= FEWEST else everything
            for i in range(len(labels))
        ]
    )
    return errors_within(test, edges, labels, np.vstack([bands, everything]))


def errors_within(
    test: Scored, edges: tuple[float, ...], labels: tuple[str, ...], bands: Array
) -> tuple[SizeError, ...]:
    """Return the errors of test rows by size, and of all, with the share inside given bands.

    Parameters
    ----------
    test : Scored
        Rows that were not fitted.
    edges, labels : tuple
        Upper ends of the ranges but the last, and their names.
    bands : ndarray, shape (n_labels + 1, 2)
        Of the logarithm of measured over predicted, by range; that of all rows last.
    """
    test_bin = np.searchsorted(edges, test.sizes)
    inside = (test.log_ratio >= bands[test_bin, 0]) & (test.log_ratio <= bands[test_bin, 1])
    chosen = [*(test_bin == i for i in range(len(labels))), np.ones(len(test.sizes), dtype=bool)]
    names = (*labels, "all")
    parts = zip(names, chosen, bands, strict=True)
    return tuple(_error(name, test, inside, some, band) for name, some, band in parts)


def _error(name: str, test: Scored, inside: Array, chosen: Array, band: Array) -> SizeError:
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
