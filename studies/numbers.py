"""Numbers of a profile one by one, each with its source: what `lvlm hardware NAME` and `lvlm engines NAME` show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from costmodel.sources import Source
from studies.tables import table


@dataclass(frozen=True, slots=True)
class SourcedNumber:
    """One number and where it comes from.

    Parameters
    ----------
    key : str
        Dotted key in the file.
    value : float
        In SI units.
    kind, title, url, note : str
        Of its source.
    """

    key: str
    value: float
    kind: str
    title: str
    url: str = ""
    note: str = ""


def sourced(numbers: Iterable[tuple[str, float]], sources: Sequence[Source]) -> list[SourcedNumber]:
    """Return numbers with the first source that covers each."""
    found = []
    for key, value in numbers:
        source = next(source for source in sources if source.covers_key(key))
        found.append(SourcedNumber(key, value, source.kind, source.title, source.url, source.note))
    return sorted(found, key=lambda number: number.key)


def as_rows(numbers: Iterable[SourcedNumber]) -> list[dict[str, Any]]:
    """Return the numbers as rows for CSV and JSON."""
    return [asdict(number) for number in numbers]


def numbers_table(numbers: Sequence[SourcedNumber]) -> Table:
    """Return the numbers as a table; sources are numbered and stand below it, see `source_lines`."""
    order = _source_order(numbers)
    rows = [
        (n.key, f"{n.value:,.6g}" if _is_short(n.value) else f"{n.value:.5g}", n.kind, f"[{order[n.title]}]")
        for n in numbers
    ]
    return table(("number", "value (SI)", "kind", "source"), rows)


def _is_short(value: float) -> bool:
    return value == 0 or 1e-3 <= abs(value) < 1e6  # noqa: PLR2004


def _source_order(numbers: Iterable[SourcedNumber]) -> Mapping[str, int]:
    return {title: index for index, title in enumerate(dict.fromkeys(n.title for n in numbers), start=1)}


def source_lines(numbers: Sequence[SourcedNumber]) -> list[str]:
    """Return one paragraph a source: title, address and what to mind."""
    by_title = {number.title: number for number in numbers}
    return [
        f"[{index}] "
        + ". ".join(part.rstrip(".") for part in (title, by_title[title].note, by_title[title].url) if part)
        for title, index in _source_order(numbers).items()
    ]
