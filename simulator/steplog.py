"""What a worker writes down: a row a step (or leap), and the gaps between tokens as weighted values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from struct import Struct
from typing import Final

import numpy as np

from costmodel.base import Array

COLUMNS: Final = (
    "start_s",
    "end_s",
    "steps",
    "decoding",
    "chunk_tokens",
    "chunks",
    "finishing",
    "encode_s",
    "encoded_items",
    "waiting",
    "running",
    "kv_used_blocks",
)
ROW: Final = Struct(f"{len(COLUMNS)}d")
"""A row of them as bytes: an array takes them three times as fast as it takes numbers."""
MOST_GAPS: Final = 1 << 22
"""Gaps that are kept as they are; beyond, they are counted in bins."""
BINS_PER_E: Final = 4000
"""Bins of gaps for a factor of e: each is 0.025 % wide."""
SMALLEST_GAP_S: Final = 1e-9


class StepLog:
    """The log of one worker."""

    def __init__(self) -> None:
        self.rows = array("d")
        self.values = array("d")
        self.weights = array("d")
        self._runs: list[Array] = []  # ends of the steps of leaps
        self._run_weights: list[int] = []
        self._in_runs = 0
        self._bins: Array | None = None

    def gap(self, gap_s: float, tokens: int) -> None:
        """Note that so many sequences waited so long between two tokens [s]."""
        self.values.append(gap_s)
        self.weights.append(tokens)

    def gaps(self, ends_s: Array, tokens: int) -> None:
        """Note the gaps between the ends of some steps in a row, each for so many sequences [s]."""
        self._runs.append(ends_s if ends_s.base is None else ends_s.copy())  # not all of a leap that was cut
        self._run_weights.append(tokens)
        self._in_runs += len(ends_s) - 1
        if len(self.values) + self._in_runs > MOST_GAPS:
            self._compact()

    def _exact(self) -> tuple[Array, Array]:
        lengths = np.array([len(run) for run in self._runs], dtype=np.int64)
        between = np.ones(lengths.sum(), dtype=bool)
        between[np.cumsum(lengths) - lengths] = False  # from one leap to the next
        ends = np.concatenate([np.zeros(1), *self._runs])
        values = np.concatenate([np.array(self.values), np.diff(ends)[between]])
        of_runs = np.repeat(np.array(self._run_weights, dtype=float), np.maximum(lengths - 1, 0))
        return values, np.concatenate([np.array(self.weights), of_runs])

    def _compact(self) -> None:
        counts = _count(*self._exact())
        self._bins = counts if self._bins is None else self._bins + counts
        self.values, self.weights = array("d"), array("d")
        self._runs, self._run_weights, self._in_runs = [], [], 0

    def distribution(self) -> tuple[Array, Array]:
        """Return the gaps between tokens [s] and how often each occurred.

        Notes
        -----
        The gaps are exact up to `MOST_GAPS` steps, and within half a bin (0.0125 %) where there were more.
        """
        if self._bins is None:
            return self._exact()
        self._compact()
        used = np.flatnonzero(self._bins)
        return SMALLEST_GAP_S * np.exp((used + 0.5) / BINS_PER_E), self._bins[used]

    def table(self) -> dict[str, Array]:
        """Return the rows as columns."""
        rows = np.array(self.rows).reshape(-1, len(COLUMNS))
        return {name: rows[:, i] for i, name in enumerate(COLUMNS)}


def _count(values: Array, weights: Array) -> Array:
    """Return weights summed by bin."""
    n_bins = BINS_PER_E * 35  # up to e^35 nanoseconds, fifty days
    logs = np.log(np.maximum(values, SMALLEST_GAP_S) / SMALLEST_GAP_S)
    counts: Array = np.bincount(np.minimum((logs * BINS_PER_E).astype(int), n_bins - 1), weights, n_bins).astype(float)
    return counts


def pooled(logs: Sequence[StepLog]) -> tuple[Array, Array]:
    """Return the gaps of several workers [s] and how often each occurred."""
    parts = [log.distribution() for log in logs]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
