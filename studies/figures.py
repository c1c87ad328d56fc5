"""Figures: files drawn with matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from costmodel import Prediction
from costmodel.stage_cost import OperatorCost, StageCost
from studies.roofs import Roof, device_stages, rate_flops_per_s, roofs
from studies.tables import TERA, number, percent, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

COLOURS: Final = {"encode": "#0072B2", "adapt": "#CC79A7", "prefill": "#D55E00", "decode": "#009E73"}
"""From the palette of Okabe and Ito, which colour-blind readers can tell apart."""
POINTS_PER_INCH: Final = 72.0
LARGEST_AREA: Final = 220.0
SMALLEST_AREA: Final = 8.0
STAGE_AREA: Final = 110.0
NAMED_SHARE: Final = 0.2
"""Operators with a larger share of their stage's time get a label, ..."""
NAMED_STAGE: Final = 0.03
"""... if the stage has a larger share of the device's time."""
STAGE_SIZE: Final = 11.0
OPERATOR_SIZE: Final = 7.5


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
    axes = figure.add_axes((0.08, 0.1, 0.89, 0.81))
    axes.set_title("\n".join(title), fontsize=9, loc="left", parse_math=False)
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
    _name_points(axes, stages)
    axes.legend(
        loc="lower right", fontsize=8, title=_legend_title(stages), title_fontsize=8, alignment="left", markerscale=0.6
    )
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
    axes.set_xlim(min(x) / 3, max(x) * 8)
    axes.set_ylim(min(y) / 6, max(y) * 4)


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
    start = math.sqrt(max(left, axes.get_ylim()[0] / slope) * min(roof.ridge_flops_per_byte for roof in lines)) / 2
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
        s=STAGE_AREA,
        marker="D",
        color=COLOURS[name],
        edgecolors="black",
        zorder=4,
        label=f"{name}: {seconds(stage.time_s)}, bound by {stage.bound}",
    )


def _name_points(axes: Axes, stages: dict[str, StageCost]) -> None:
    """Write the names of the stages, and of the operators that make up much of one."""
    labels = Labels(axes)
    labels.taken += [_box(text) for text in axes.texts]
    for stage in stages.values():
        labels.keep_clear(stage, STAGE_AREA)
        for operator in stage.operators:
            if operator.flops:
                labels.keep_clear(operator, LARGEST_AREA * operator.time_s / stage.time_s)
    total_s = sum(stage.time_s for stage in stages.values())
    for name, stage in stages.items():
        labels.add(name, stage, COLOURS[name], size=STAGE_SIZE)
    for name, stage in stages.items():
        dear = [o for o in stage.operators if o.flops and o.time_s > NAMED_SHARE * stage.time_s]
        if stage.time_s > NAMED_STAGE * total_s and len(stage.operators) > 1:
            for operator in dear:
                labels.add(operator.name.removeprefix(f"{name}."), operator, COLOURS[name], size=OPERATOR_SIZE)


Box: TypeAlias = tuple[float, float, float, float]
"""Left, lower, right and upper edge [points]."""


@dataclass(slots=True)
class Labels:
    """Places labels beside points so that they cover neither points nor each other.

    Parameters
    ----------
    axes : Axes
        With its limits set.
    taken : list of Box
        What is covered so far.
    """

    axes: Axes
    taken: list[Box] = field(default_factory=list)

    def keep_clear(self, cost: OperatorCost | StageCost, area: float) -> None:
        """Keep labels off the marker of a point."""
        x, y = self._position(cost)
        reach = math.sqrt(area) / 2
        self.taken.append((x - reach, y - reach, x + reach, y + reach))

    def add(self, text: str, cost: OperatorCost | StageCost, colour: str, *, size: float) -> None:
        """Write a label at the nearest free place around a point, with a line to it when that is far."""
        x, y = self._position(cost)
        width, height = 0.62 * size * len(text), 1.2 * size
        heights = (0, -16, 16, -26, 26, -38, 38, -52, 52, -68, 68, -86, 86, -106, 106)
        places = [(dx, dy) for dy in heights for dx in (9, -9 - width, -width / 2) if dy or dx != -width / 2]
        boxes = [(x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2) for dx, dy in places]
        best = next((i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in self.taken)), 0)
        self.taken.append(boxes[best])
        far = abs(places[best][1]) > size + 4
        self.axes.annotate(
            text,
            (cost.intensity_flops_per_byte, rate_flops_per_s(cost) * TERA),
            xytext=places[best],
            textcoords="offset points",
            color=colour,
            fontsize=size,
            fontweight="bold" if size == STAGE_SIZE else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if far else None,
            zorder=5,
            path_effects=[withStroke(linewidth=2.0, foreground="white")],
        )

    def _position(self, cost: OperatorCost | StageCost) -> tuple[float, float]:
        x, y = self.axes.transData.transform((cost.intensity_flops_per_byte, rate_flops_per_s(cost) * TERA))
        points = POINTS_PER_INCH / self.axes.figure.dpi
        return float(x) * points, float(y) * points


def _box(text: Text) -> Box:
    """Return the box of a text that was drawn before [points]."""
    figure = text.get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was drawn
    extent, points = text.get_window_extent(), POINTS_PER_INCH / figure.dpi
    return extent.x0 * points, extent.y0 * points, extent.x1 * points, extent.y1 * points


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
