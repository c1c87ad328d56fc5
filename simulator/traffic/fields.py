"""Values of foreign files: what is missing or wrong is refused in one line with the file, the line and the key."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from costmodel.errors import first_line, shown
from simulator.request import Ints

ENCODING: Final = "utf-8-sig"
"""UTF-8, whether or not a spreadsheet put its mark in front."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table, or an object of a JSON file.

    Parameters
    ----------
    where : str
        The file, and the line or the place in it.
    values : mapping
        By key.
    """

    where: str
    values: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Return whether the key is there and holds something."""
        return self.values.get(key) not in (None, "")

    def number(self, key: str, least: float = 0.0) -> float:
        """Return a finite number that is not below the least."""
        value = self._held(key)
        try:
            found = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not (math.isfinite(found) and found >= least):
            raise self.wrong(key, f"must be a number of {least:g} or more")
        return found

    def whole(self, key: str, least: int = 0) -> int:
        """Return a whole number that is not below the least."""
        found = self.number(key, least)
        if found != int(found):
            raise self.wrong(key, f"must be a whole number of {least} or more")
        return int(found)

    def text(self, key: str) -> str:
        """Return what is written there."""
        value = self._held(key)
        if not isinstance(value, str):
            raise self.wrong(key, "must be a text")
        return value

    def part(self, key: str) -> Row:
        """Return an object inside this one."""
        value = self._held(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return Row(f"{self.where}, {key}", value)

    def parts(self, key: str) -> list[Row]:
        """Return the objects of a list."""
        inside = {f"{key}[{index}]": value for index, value in enumerate(self.sequence(key))}
        return [Row(self.where, inside).part(name) for name in inside]

    def sequence(self, key: str) -> list[Any]:
        """Return a list."""
        value = self._held(key)
        if not isinstance(value, list):
            raise self.wrong(key, "must be a list")
        return value

    def numbers(self, key: str, least: float = 0.0) -> list[float]:
        """Return the numbers of a list."""
        held = {f"{key}[{index}]": value for index, value in enumerate(self.sequence(key))}
        inside = Row(self.where, held)
        return [inside.number(name, least) for name in held]

    def wrong(self, key: str, rule: str) -> ValueError:
        """Return the error for a value that breaks a rule."""
        return ValueError(f"{self.where}: {key}={shown(self.values.get(key))} {rule}; correct the file")

    def wholes(self, key: str, least: int = 0) -> list[int]:
        """Return the whole numbers of a list."""
        held = {f"{key}[{index}]": value for index, value in enumerate(self.sequence(key))}
        inside = Row(self.where, held)
        return [inside.whole(name, least) for name in held]

    def _held(self, key: str) -> Any:  # noqa: ANN401 - foreign values have any type
        if not self.has(key):
            raise ValueError(f"{self.where}: {key} is missing; the format needs it")
        return self.values[key]


def csv_rows(path: str | Path, needed: Sequence[str], n: int | None = None) -> list[Row]:
    """Return the rows of a table, the first n of them.

    Parameters
    ----------
    path : str or Path
    needed : sequence of str
        Columns that it must have.
    n : int, optional
    """
    name = Path(path).name
    with Path(path).open(encoding=ENCODING, newline="") as file:
        reader = csv.reader(_decoded(file, name))
        header = [title.strip() for title in next(reader, [])]
        for title in needed:
            if title not in header:
                raise ValueError(f"{name}, line 1: the column {title} is missing; it has {', '.join(header) or 'none'}")
        rows = []
        for cells in itertools.islice(filter(None, reader), n):
            where = f"{name}, line {reader.line_num}"
            if len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} columns, and the head has {len(header)}; correct the file")
            rows.append(Row(where, dict(zip(header, cells, strict=True))))
    return _some(rows, name)


def json_lines(path: str | Path, n: int | None = None) -> list[Row]:
    """Return the objects of a file with one a line, the first n of them."""
    name = Path(path).name
    rows = []
    with Path(path).open(encoding=ENCODING) as file:
        lines = ((number, line) for number, line in enumerate(_decoded(file, name), 1) if line.strip())
        for number, line in itertools.islice(lines, n):
            rows.append(_object(line, f"{name}, line {number}"))
    return _some(rows, name)


def json_object(path: str | Path) -> Row:
    """Return the one object of a JSON file."""
    name = Path(path).name
    with Path(path).open(encoding=ENCODING) as file:
        return _object("".join(_decoded(file, name)), name)


def _decoded(lines: Iterator[str], name: str) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({first_line(error)}); convert it") from None


def _object(text: str, where: str) -> Row:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        at = where if "line" in where else f"{where}, line {error.lineno}"
        raise ValueError(f"{at}: {error.msg} at column {error.colno}; the JSON is cut off or malformed") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {shown(found)} must be an object; correct the file")  # noqa: TRY004 - bad input
    return Row(where, found)


def _some(rows: list[Row], name: str) -> list[Row]:
    if not rows:
        raise ValueError(f"{name} holds no requests; give a file with some")
    return rows


def at_least_one(values: Sequence[int], what: str, notes: list[str]) -> Ints:
    """Return counts of which those that are 0 count as 1, as a note says."""
    found = np.array(values, dtype=np.int64)
    empty = int((found < 1).sum())
    if empty:
        notes.append(f"{requests(empty)} with no {what} tokens: counted as one")
    return np.maximum(1, found)


def requests(count: int) -> str:
    """Return so many requests in words."""
    return f"{count:,} request{'' if count == 1 else 's'}"
