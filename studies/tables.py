"""Tables and numbers for people: the only place with milliseconds, GB and TFLOP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

MS: Final = 1e3
GB: Final = 1e-9
TERA: Final = 1e-12
MISSING: Final = "-"
SMALLEST_PLACES: Final = 6


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with about this many significant digits, thousands grouped.

    Examples
    --------
    >>> number(1069.4), number(0.04217), number(0.0), number(2.5e-9)
    ('1,069', '0.0422', '0', '2.50e-09')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if not value:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}" if places <= SMALLEST_PLACES else f"{value:.{digits - 1}e}"


def seconds(value: float) -> str:
    """Return a time in milliseconds, or in seconds from one second on.

    Examples
    --------
    >>> seconds(0.2951), seconds(12.04)
    ('295 ms', '12.0 s')
    """
    return f"{number(value)} s" if value >= 1 else f"{number(value * MS)} ms"


def gigabytes(value: float) -> str:
    """Return bytes in GB (1e9 bytes)."""
    return number(value * GB)


def percent(share: float) -> str:
    """Return a share of one in percent."""
    return f"{share:.1%}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Return a plain table.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : iterable of sequence of str
        Cells.
    left : int
        Columns that are aligned to the left, from the first; the others hold numbers.
    """
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        is_text = index < left or index >= len(columns) - trailing_text(columns)
        result.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def sections(to: Console, *parts: RenderableType) -> None:
    """Print paragraphs and tables with an empty line between them."""
    for index, part in enumerate(parts):
        if index:
            to.print()
        to.print(part)


def trailing_text(columns: Sequence[str]) -> int:
    """Return how many of the last columns hold words, by their names."""
    words = {"bound", "source", "description", "kind"}
    count = 0
    for name in reversed(columns):
        if name not in words:
            break
        count += 1
    return count
