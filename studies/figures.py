"""Figures: files drawn with matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from costmodel import Prediction
from costmodel.stage_cost import OperatorCost, StageCost
from studies.roofs import Roof, device_stages, rate_flops_per_s, roofs
from studies.tables import MS, TERA, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".svg", ".png", ".pdf")
COLOURS: Final = {"encode": "#0072B2", "adapt": "#CC79A7", "prefill": "#D55E00", "decode": "#009E73"}
"""From the palette of Okabe and Ito, which colour-blind readers can tell apart."""
LARGEST_AREA: Final = 220.0
SMALLEST_AREA: Final = 8.0
NAMED_SHARE: Final = 0.12
"""Operators with a larger share of their stage's time get a label."""


def check(path: Path) -> None:
    """Refuse a file that no figure can be written to, before the work is done.

    Raises
    ------
    ValueError
        If its suffix is no format that is drawn.
    FileNotFoundError
        If its folder does not exist.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw into {str(path)!r}; use a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} for {path.name!r}; make it first")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix says how."""
    figure.savefig(path, format=path.suffix.lower().removeprefix("."), dpi=150)


def roofline(prediction: Prediction, title: Sequence[str]) -> Figure:
    """Return the stages and operators of a prediction under the roofs of its device.

    Parameters
    ----------
    prediction : Prediction
        One point.
    title : sequence of str
        Who was asked, and what.
    """
    figure = Figure(figsize=(10, 6.4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.1, 0.88, 0.77))
    axes.set_title("\n".join(title), fontsize=9, loc="left")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("intensity [FLOP/byte]")
    axes.set_ylabel("rate on one device [TFLOP/s]")
    axes.grid(visible=True, which="major", color="0.92")
    stages = {name: stage for name, stage in device_stages(prediction).items() if stage.flops}
    lines = roofs(prediction)
    _limits(axes, list(stages.values()), lines)
    _draw_roofs(axes, lines, prediction.hardware.memory_bandwidth_bytes_per_s)
    for name, stage in stages.items():
        _draw_stage(axes, name, stage)
    labels = Labels(axes)
    for name, stage in stages.items():
        labels.add(name, stage.intensity_flops_per_byte, rate_flops_per_s(stage), COLOURS[name], size=11)
    for name, stage in stages.items():
        for operator in stage.operators:
            if operator.flops and operator.time_s > NAMED_SHARE * stage.time_s and len(stage.operators) > 1:
                text = operator.name.removeprefix(f"{name}.")
                labels.add(text, operator.intensity_flops_per_byte, rate_flops_per_s(operator), COLOURS[name], size=7)
    axes.legend(loc="lower right", fontsize=8, title=_legend_title(stages), title_fontsize=8, alignment="left")
    return figure


def _legend_title(stages: dict[str, StageCost]) -> str:
    idle = sum(o.time_s for stage in stages.values() for o in stage.operators if not o.flops)
    total = sum(stage.time_s for stage in stages.values())
    return (
        "large: stage, small: its operators, area by share of time\n"
        f"not drawn: operators without matrix work, {percent(idle / total)} of the time"
    )


def _points(stages: Sequence[StageCost]) -> list[OperatorCost | StageCost]:
    return [*stages, *(operator for stage in stages for operator in stage.operators if operator.flops)]


def _limits(axes: Axes, stages: Sequence[StageCost], lines: Sequence[Roof]) -> None:
    """Set limits that hold every point and all ridges."""
    points = _points(stages)
    x = [p.intensity_flops_per_byte for p in points if p.bytes] + [roof.ridge_flops_per_byte for roof in lines]
    y = [rate_flops_per_s(p) * TERA for p in points] + [roof.peak_flops_per_s * TERA for roof in lines]
    axes.set_xlim(min(x) / 3, max(x) * 6)
    axes.set_ylim(min(y) / 6, max(y) * 3)


def _draw_roofs(axes: Axes, lines: Sequence[Roof], bandwidth_bytes_per_s: float) -> None:
    left, right = axes.get_xlim()
    slope = bandwidth_bytes_per_s * TERA
    for style, roof in zip(("-", "--", "-.", ":"), lines, strict=False):
        peak, ridge = roof.peak_flops_per_s * TERA, roof.ridge_flops_per_byte
        axes.plot([left, ridge, right], [left * slope, peak, peak], color="0.25", linewidth=1.4, linestyle=style)
        axes.plot([ridge, ridge], [axes.get_ylim()[0], peak], color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"{roof.name} {number(peak)} TFLOP/s, ridge {number(ridge)} FLOP/byte",
            (right, peak),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    start = max(left, axes.get_ylim()[0] / slope) * 1.3
    low, high = axes.transData.transform([(start, start * slope), (start * 10, start * 10 * slope)])
    axes.annotate(
        f"memory {number(slope)} TB/s",
        (start, start * slope),
        xytext=(0, 4),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(high[1] - low[1], high[0] - low[0])),
        rotation_mode="anchor",
        fontsize=8,
    )


def _draw_stage(axes: Axes, name: str, stage: StageCost) -> None:
    drawn = [operator for operator in stage.operators if operator.flops and operator.bytes]
    areas = [max(SMALLEST_AREA, LARGEST_AREA * operator.time_s / stage.time_s) for operator in drawn]
    x = [operator.intensity_flops_per_byte for operator in drawn]
    y = [rate_flops_per_s(operator) * TERA for operator in drawn]
    axes.scatter(x, y, s=areas, color=COLOURS[name], alpha=0.45, linewidths=0, zorder=3)
    axes.scatter(
        [stage.intensity_flops_per_byte],
        [rate_flops_per_s(stage) * TERA],
        s=LARGEST_AREA,
        marker="D",
        color=COLOURS[name],
        edgecolors="black",
        zorder=4,
        label=f"{name}: {number(stage.time_s * MS)} ms, bound by {stage.bound}",
    )


@dataclass(slots=True)
class Labels:
    """Places labels beside points so that they do not cover each other.

    Parameters
    ----------
    axes : Axes
        With its limits set.
    taken : list of tuple
        Boxes of the labels so far, left, lower, right and upper [points].
    """

    axes: Axes
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def add(self, text: str, x: float, flops_per_s: float, colour: str, *, size: float) -> None:
        """Write a label at the first free place around a point."""
        y = flops_per_s * TERA
        dpi_scale = 72.0 / self.axes.figure.dpi
        px, py = (float(value) * dpi_scale for value in self.axes.transData.transform((x, y)))
        width, height = 0.58 * size * len(text), 1.25 * size
        places = [(dx, dy) for dy in (0, -14, 14, -24, 24, -36, 36, -48, 48) for dx in (11, -11 - width)]
        dx, dy = next((place for place in places if self._is_free(px, py, place, width, height)), places[0])
        self.taken.append((px + dx, py + dy - height / 2, px + dx + width, py + dy + height / 2))
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5} if abs(dy) > 14 else None  # noqa: PLR2004
        self.axes.annotate(
            text,
            (x, y),
            xytext=(dx, dy),
            textcoords="offset points",
            color=colour,
            fontsize=size,
            va="center",
            fontweight="bold" if size > 8 else "normal",  # noqa: PLR2004
            arrowprops=arrow,
            zorder=5,
        )

    def _is_free(self, x: float, y: float, place: tuple[float, float], width: float, height: float) -> bool:
        left, lower = x + place[0], y + place[1] - height / 2
        return all(
            left + width < other[0] or left > other[2] or lower + height < other[1] or lower > other[3]
            for other in self.taken
        )
