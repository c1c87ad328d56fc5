"""Measured against predicted times of held-out shapes, one panel a fit."""

from __future__ import annotations

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

COLUMNS: Final = 4
POINTS: Final = 400
"""Points a panel shows; every so manieth of the test rows."""
PANEL_INCHES: Final = 2.9


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
