"""What the studies of the frontiers share: rounding, tables in Markdown, figures, and the files they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIGITS: Final = 6
"""Significant digits of the numbers that are written: fewer than another machine would change."""
FOLDER: Final = Path(__file__).parent
Numbers: TypeAlias = dict[str, Any]


def rounded(value: Any) -> Any:  # noqa: ANN401 - numbers, words, and lists and mappings of them
    """Return numbers with `DIGITS` significant digits; what is infinite or none is None."""
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        number = float(f"{value:.{DIGITS - 1}e}")
        return number if abs(number) < float("inf") else None
    return value


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines) + "\n"


def panels(path: Path, columns: int, draw: Callable[[Sequence[Axes]], None], *, width: float = 4.6) -> None:
    """Write a figure of panels side by side.

    Parameters
    ----------
    path : Path
    columns : int
        Panels.
    draw : callable
        Draws on them.
    width : float
        Of one panel [inch].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(list(figure.subplots(1, columns, squeeze=False)[0]))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def write(
    name: str,
    numbers: Callable[[bool], Numbers],
    report: Callable[[Numbers], str],
    draw: Callable[[Numbers, Path], None],
) -> None:
    """Run a study from the command line: `--smoke` for its smallest size, `-o` for another folder.

    Parameters
    ----------
    name : str
        Of the files.
    numbers : callable
        Returns what is found, at smoke size or not.
    report, draw : callable
        Make the page and the figure of it.
    """
    parser = argparse.ArgumentParser(description=f"Write {name}.md, {name}.json and {name}.svg.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    parser.add_argument("--smoke", action="store_true", help="the smallest size, for a test")
    asked = parser.parse_args()
    found = rounded(numbers(asked.smoke))
    page = report(found)
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (asked.output / f"{name}.md").write_text(page, encoding="utf-8")
    draw(found, asked.output / f"{name}.svg")
    print(page)
