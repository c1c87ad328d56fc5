"""Tables of fitted curves read number by number, without arrays: for the simulator, which asks for a step at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from costmodel.base import Array
from costmodel.chunked import ChunkPart
from costmodel.efficiency.attention import AttentionKernel, Tiles
from costmodel.priced import PricedTable, priced
from costmodel.tabulated import BATCH_GRID, CONTEXT_GRID, ROWS_GRID, DecodeTable, Group
from costmodel.units import TINY

Terms = tuple[tuple[int, float], ...]
"""Which sums make a number, and how much of each."""
ROWS: Final[list[float]] = ROWS_GRID.tolist()
CONTEXTS: Final[list[float]] = CONTEXT_GRID.tolist()
BATCHES: Final[list[float]] = BATCH_GRID.tolist()


def _terms(vector: Array) -> Terms:
    return tuple((int(i), float(vector[i])) for i in np.flatnonzero(vector))


def _dot(terms: Terms, sums: Sequence[float]) -> float:
    return sum(weight * sums[i] for i, weight in terms)


def _between(grid: list[float], values: list[float], x: float) -> float:
    """Return the value at x, on straight lines between grid points and flat beyond the ends."""
    left = bisect_right(grid, x) - 1
    left = 0 if left < 0 else min(left, len(grid) - 2)
    below = grid[left]
    share = (x - below) / (grid[left + 1] - below)
    share = 0.0 if share < 0.0 else min(share, 1.0)
    near = values[left]
    return near + share * (values[left + 1] - near)


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """Decode attention at one number of sequences: seconds by mean context.

    Parameters
    ----------
    seconds : ndarray, shape (n_context,)
    values : list of float
        The same.
    """

    seconds: Array
    values: list[float]

    @staticmethod
    def of(step: DecodeTable, sequences: float) -> Line:
        """Return a table at a number of sequences, where it is called once."""
        low = min(max(bisect_right(BATCHES, sequences) - 1, 0), len(BATCHES) - 2)
        share = min(max((sequences - BATCHES[low]) / (BATCHES[low + 1] - BATCHES[low]), 0.0), 1.0)
        near, far = step.seconds[low], step.seconds[low + 1]
        seconds = near + share * (far - near)
        return Line(seconds, seconds.tolist())

    def read(self, context: float) -> float:
        """Return the seconds at a mean context."""
        return _between(CONTEXTS, self.values, context)

    def read_many(self, contexts: Array) -> Array:
        """Return the seconds at mean contexts, bit by bit what `read` returns."""
        low, high = float(contexts[0]), float(contexts[-1])
        first = bisect_right(CONTEXTS, low) - 1
        if 0 <= first < len(CONTEXTS) - 1 and low <= high <= CONTEXTS[first + 1]:  # nearly always between two points
            start, value = CONTEXTS[first], self.values[first]
            between = contexts - start  # then in place: the simulator asks for nearly every leap
            between /= CONTEXTS[first + 1] - start
            between *= self.values[first + 1] - value
            between += value
            return between
        left = np.clip(np.searchsorted(CONTEXT_GRID, contexts, side="right") - 1, 0, len(CONTEXT_GRID) - 2)
        below = CONTEXT_GRID[left]
        share = np.clip((contexts - below) / (CONTEXT_GRID[left + 1] - below), 0.0, 1.0)
        near = self.seconds[left]
        result: Array = near + share * (self.seconds[left + 1] - near)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class LeanGroup:
    """Operators driven by one number."""

    driver: Terms
    calls: Terms
    values: list[float]

    @staticmethod
    def of(group: Group) -> LeanGroup:
        """Return a group without arrays."""
        return LeanGroup(_terms(group.driver), _terms(group.calls), group.total.tolist())

    def total_s(self, sums: Sequence[float]) -> float:
        """Return their time [s]."""
        calls = _dot(self.calls, sums)
        return calls * _between(ROWS, self.values, _dot(self.driver, sums) / calls) if calls else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class LeanChunk:
    """One operator of attention over sequences."""

    drivers: tuple[Terms, Terms, Terms, Terms]
    repeats: float
    kernel: AttentionKernel
    index: int
    tiles: tuple[Tiles, ...]

    @staticmethod
    def of(part: ChunkPart) -> list[LeanChunk]:
        """Return the operators of a part without arrays."""
        drivers = part.drivers.reshape(4, len(part.rows), -1)
        return [
            LeanChunk(
                drivers=(_terms(calls), _terms(rows), _terms(pairs), _terms(keys)),
                repeats=float(part.repeats[i, 0]),
                kernel=part.kernel,
                index=i,
                tiles=part.kernel.alone(i),
            )
            for i, (calls, rows, pairs, keys) in enumerate(zip(*drivers, strict=True))
        ]

    def total_s(self, sums: Sequence[float]) -> float:
        """Return its time [s]."""
        calls, rows, pairs, keys = (_dot(terms, sums) for terms in self.drivers)
        if not calls:
            return 0.0
        once = self.kernel.single_s(self.tiles, self.index, rows / calls, pairs / calls, keys / calls)
        return once * calls * self.repeats


@dataclass(frozen=True, slots=True, eq=False)
class LeanStep:
    """One operator of decode attention."""

    drivers: tuple[Terms, ...]
    table: DecodeTable
    lines: dict[float, Line]

    @staticmethod
    def of(step: DecodeTable) -> LeanStep:
        """Return an operator without arrays."""
        return LeanStep(tuple(_terms(driver) for driver in step.drivers), step, {})

    def total_s(self, sums: Sequence[float]) -> float:
        """Return its time [s]."""
        calls, queries, pairs, keys = (_dot(terms, sums) for terms in self.drivers)
        if not calls:
            return 0.0
        each = max(pairs / max(keys, TINY), 1.0)
        sequences = queries / each
        line = self.lines.get(sequences / calls)
        if line is None:
            line = self.lines[sequences / calls] = Line.of(self.table, sequences / calls)
        seconds = calls * line.read(keys / max(sequences, TINY))
        return max(seconds, pairs * self.table.pair_s) if each > 1.0 else seconds


@dataclass(frozen=True, slots=True, eq=False)
class LeanTable:
    """A table whose every operator has a curve, one point at a time."""

    parts: tuple[LeanGroup | LeanChunk | LeanStep, ...]

    @staticmethod
    def of(table: PricedTable) -> LeanTable:
        """Return the table without arrays."""
        groups = [LeanGroup.of(group) for group in table.groups.groups]
        chunks = [lean for part in table.chunks for lean in LeanChunk.of(part)]
        return LeanTable((*groups, *chunks, *(LeanStep.of(step) for step in table.steps)))

    def total_s(self, sums: Sequence[float]) -> float:
        """Return the time of all operators [s]."""
        return sum(part.total_s(sums) for part in self.parts)


def cached_table(table: PricedTable, n_entries: int) -> PricedTable:
    """Return the operators whose work depends on the keys of cache entries, the last sums of a step."""
    n_sums = table.table.coefficients.shape[2]
    return priced(table.table.apart(n_sums - n_entries), table.kernels)


def without_line(table: PricedTable, n_entries: int) -> tuple[int, ...]:
    """Return the cache entries none of whose operators has a curve: those whose keys drive no decode table."""
    n_sums = table.table.coefficients.shape[2]
    driven = {int(np.flatnonzero(step.drivers[-1])[0]) for step in table.steps}
    return tuple(i for i in range(n_entries) if n_sums - n_entries + i not in driven)
