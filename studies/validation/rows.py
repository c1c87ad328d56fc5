"""What `lvlm validate` scores: predicted beside measured, and the errors of many such rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

TAIL: Final = 0.9
NOMINAL: Final = 0.9
"""Share of measured values that a band is meant to hold."""
ASKED: Final = (0.85, 0.95)
"""Between these shares bands do what they say."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published or measured value beside what is predicted.

    Parameters
    ----------
    name : str
        The request.
    what : str
        The quantity, such as ttft_s.
    predicted, measured : float
        In `unit`.
    unit : str
        An SI unit, or what is counted.
    source : str
        Key of `published/sources.toml`.
    low, high : float or None
        Band of the measured value, in `unit`; None where the engine states none.
    rounding : float
        Half of the last printed digit of the measured value.
    note : str
        What was assumed.
    """

    name: str
    what: str
    predicted: float
    measured: float
    unit: str
    source: str
    low: float | None = None
    high: float | None = None
    rounding: float = 0.0
    note: str = ""

    @property
    def error(self) -> float:
        """Signed error: predicted/measured - 1."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the measured value lies in the band; None without one."""
        return None if self.low is None or self.high is None else self.low <= self.measured <= self.high

    @property
    def exact(self) -> bool:
        """Whether the prediction rounds to what was printed."""
        return abs(self.predicted - self.measured) <= self.rounding

    def as_dict(self) -> dict[str, Any]:
        """Return the row under the names of the JSON output."""
        return {**asdict(self), "error": self.error, "inside": self.inside, "exact": self.exact}


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of some rows.

    Parameters
    ----------
    rows : int
    median, mean, p90 : float or None
        Of |predicted/measured - 1|: median, mean absolute percentage error as a share, and ninth decile. The median and
        the decile of pooled groups are unknown.
    bias : float or None
        Median of predicted/measured - 1.
    banded, inside : int
        Rows with a band, and those of them whose measured value lies in it.
    exact : int
        Rows that agree to the last printed digit.
    """

    rows: int
    median: float | None = None
    mean: float | None = None
    p90: float | None = None
    bias: float | None = None
    banded: int = 0
    inside: int = 0
    exact: int = 0

    @property
    def coverage(self) -> float | None:
        """Share of the banded rows that lie in their band; None where no row has one."""
        return self.inside / self.banded if self.banded else None

    def as_dict(self) -> dict[str, Any]:
        """Return the errors under the names of the JSON output."""
        return {**asdict(self), "coverage": self.coverage}


def errors_of(rows: Sequence[Row]) -> Errors:
    """Return the errors of rows."""
    if not rows:
        return Errors(0)
    signed = np.array([row.error for row in rows])
    size = np.abs(signed)
    return Errors(
        rows=len(rows),
        median=float(np.median(size)),
        mean=float(size.mean()),
        p90=float(np.quantile(size, TAIL)),
        bias=float(np.median(signed)),
        banded=sum(row.inside is not None for row in rows),
        inside=sum(row.inside is True for row in rows),
        exact=sum(row.exact for row in rows),
    )


def pooled(parts: Iterable[Errors]) -> Errors:
    """Return the errors of groups together: the mean and the coverage by rows; the rest is unknown.

    A single group is returned as it is.
    """
    known = [part for part in parts if part.rows]
    if len(known) == 1:
        return known[0]
    rows = sum(part.rows for part in known)
    scored = [(part.rows, part.mean) for part in known if part.mean is not None]
    weight = sum(count for count, _ in scored)
    return Errors(
        rows=rows,
        mean=sum(count * mean for count, mean in scored) / weight if weight else None,
        banded=sum(part.banded for part in known),
        inside=sum(part.inside for part in known),
        exact=sum(part.exact for part in known),
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """The errors of one fitted curve on held-out kernels.

    Parameters
    ----------
    device, library, kind, variant : str
        Whose curve, for what.
    errors : Errors
        All held-out rows.
    """

    device: str
    library: str
    kind: str
    variant: str
    errors: Errors

    @property
    def name(self) -> str:
        """Device, library, kind and variant."""
        return f"{self.device} {self.library} {self.kind}.{self.variant}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fit under the names of the JSON output."""
        head = {key: getattr(self, key) for key in ("name", "device", "library", "kind", "variant")}
        return head | self.errors.as_dict()


@dataclass(frozen=True, slots=True)
class Suite:
    """What one suite found.

    Parameters
    ----------
    name, title : str
        Its file, and what it compares.
    rows : tuple of Row
        Predicted beside measured; none in a suite of fits.
    fits : tuple of Fit
        Errors of fitted curves; none in a suite of rows.
    groups : mapping of str to Errors
        Errors by group, in the order in which they are shown.
    note : str
        How to read it.
    """

    name: str
    title: str
    rows: tuple[Row, ...] = ()
    fits: tuple[Fit, ...] = ()
    groups: Mapping[str, Errors] = field(default_factory=dict)
    note: str = ""

    @property
    def lines(self) -> tuple[Row | Fit, ...]:
        """Rows and fits, as the JSON output lists them."""
        return (*self.rows, *self.fits)

    @property
    def summary(self) -> Errors:
        """The errors of everything."""
        return errors_of(self.rows) if self.rows else pooled(fit.errors for fit in self.fits)

    def as_dict(self) -> dict[str, Any]:
        """Return the suite under the names of the JSON output."""
        return {
            "title": self.title,
            "note": self.note,
            "rows": [line.as_dict() for line in self.lines],
            "groups": {name: errors.as_dict() for name, errors in self.groups.items()},
            "summary": self.summary.as_dict(),
        }


def by_group(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, Errors]:
    """Return the errors of rows by group, in order of first appearance."""
    names = dict.fromkeys(key(row) for row in rows)
    return {name: errors_of([row for row in rows if key(row) == name]) for name in names}


def bands(suites: Sequence[Suite]) -> dict[str, Any]:
    """Return how many of all values with a band lie in it, and how many of those of requests, kernels left out."""
    everything = pooled(suite.summary for suite in suites)
    requests = pooled(suite.summary for suite in suites if suite.rows)
    return {"nominal": NOMINAL, "asked": list(ASKED), **_held(everything), "requests": _held(requests)}


def _held(errors: Errors) -> dict[str, Any]:
    return {"banded": errors.banded, "inside": errors.inside, "coverage": errors.coverage}
