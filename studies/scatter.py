"""Predicted against measured times: one panel a fit, or one a suite of published figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from studies.tables import MS, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from runtime.calibrate import Fit
    from runtime.compare import ComparedRow
    from studies.validation.rows import Row, Suite

COLUMNS: Final = 4
POINTS: Final = 400
"""Points a panel shows; every so manieth of the test rows."""
PANEL_INCHES: Final = 2.9
SUITE_INCHES: Final = 4.6
FACTOR: Final = 1.5
"""Published sources disagree on equal requests by about this much, and more."""
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""


def measured_against_predicted(fits: Sequence[Fit], device: str) -> Figure:
    """Return one panel a fit.

    Parameters
    ----------
    fits : sequence of Fit
        Those with held-out rows are drawn.
    device : str
        For the title.
    """
    drawn = [fit for fit in fits if len(fit.test.measured_s)]
    columns = max(1, min(COLUMNS, len(drawn)))
    lines = max(1, math.ceil(len(drawn) / columns))
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{device}: held-out shapes, predicted against measured [ms]", fontsize=10)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, fit in zip(panels, drawn, strict=False):
        _panel(axes, fit)
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    return figure


def suites_against_measured(suites: Sequence[Suite]) -> Figure:
    """Return one panel a suite that has times, its quantities by colour.

    Parameters
    ----------
    suites : sequence of Suite
        Those without times are left out.
    """
    drawn = [(suite, [row for row in suite.rows if row.unit == "s"]) for suite in suites]
    drawn = [(suite, rows) for suite, rows in drawn if rows]
    figure = Figure(figsize=(SUITE_INCHES * len(drawn), SUITE_INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(drawn), squeeze=False).ravel()
    for axes, (suite, rows) in zip(panels, drawn, strict=True):
        _suite_panel(axes, suite, rows)
    return figure


def _suite_panel(axes: Axes, suite: Suite, rows: Sequence[Row]) -> None:
    for what, colour in zip(dict.fromkeys(row.what for row in rows), itertools.cycle(COLOURS), strict=False):
        some = [row for row in rows if row.what == what]
        measured, predicted = (
            np.array([getattr(row, side) for row in some]) * MS for side in ("measured", "predicted")
        )
        axes.scatter(
            measured, predicted, s=14, color=colour, alpha=0.7, linewidths=0, zorder=2, label=what.removesuffix("_s")
        )
    values = [value * MS for row in rows for value in (row.measured, row.predicted)]
    ends = np.array([min(values), max(values)])
    axes.fill_between(ends, ends / FACTOR, ends * FACTOR, color="0.93", linewidth=0, zorder=0)
    axes.plot(ends, ends, color="0.4", linewidth=0.8, zorder=1)
    axes.set_title(f"{suite.name} (grey: within a factor of {FACTOR:g})", fontsize=9, loc="left")
    axes.set_xlabel("measured [ms]", fontsize=8)
    axes.set_ylabel("predicted [ms]", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)


def _panel(axes: Axes, fit: Fit) -> None:
    every = max(1, len(fit.test.measured_s) // POINTS)
    measured, predicted = fit.test.measured_s[::every] * MS, fit.test.predicted_s[::every] * MS
    everything = fit.errors[-1]
    axes.set_title(
        f"{fit.samples.library} {fit.samples.name}\nmedian {percent(everything.median)}, p90 {percent(everything.p90)}",
        fontsize=7,
    )
    ends = np.array([min(measured.min(), predicted.min()), max(measured.max(), predicted.max())])
    axes.fill_between(ends, ends / (1 + everything.high), ends / (1 + everything.low), color="0.9", linewidth=0)
    axes.plot(ends, ends, color="0.4", linewidth=0.8)
    axes.scatter(measured, predicted, s=3, color="#0072B2", alpha=0.4, linewidths=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.tick_params(labelsize=6)


def predicted_against_measured(rows: Sequence[ComparedRow]) -> Figure:
    """Return measured against predicted times of compared rows, a colour a kind, with the line of no error.

    Parameters
    ----------
    rows : sequence of ComparedRow
        Those with a prediction are drawn.
    """
    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = [row for row in rows if row.predicted_s is not None]
    for kind in dict.fromkeys(row.kind for row in drawn):
        some = [row for row in drawn if row.kind == kind]
        measured = np.array([row.measured_s for row in some]) * MS
        predicted = np.array([row.predicted_s for row in some], dtype=float) * MS
        median = float(np.median(np.abs(predicted / measured - 1)))
        axes.scatter(measured, predicted, s=12, alpha=0.6, linewidths=0, label=f"{kind}: median {percent(median)}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axline((1.0, 1.0), (10.0, 10.0), color="0.4", linewidth=0.8)
    axes.set_xlabel("measured [ms]")
    axes.set_ylabel("predicted [ms]")
    axes.set_title(f"{', '.join(dict.fromkeys(row.device for row in drawn))}: predicted against measured", fontsize=10)
    if drawn:
        axes.legend(fontsize=8)
    return figure
